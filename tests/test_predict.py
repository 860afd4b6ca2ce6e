"""Answers to files: brain_jax.serving.answers and scripts/predict.py, with a run on generated images."""

import csv
import io
import itertools
import json
import os
import pathlib
import pty
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_predictor import make_run

from brain_jax.data import images, phantom
from brain_jax.evaluation import scores
from brain_jax.serving import answers, predictor

REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def run(data, tmp_path_factory):
    """A run that was trained and evaluated; its folder and `Predictor`."""
    workdir = make_run(data, tmp_path_factory.mktemp('runs') / 'run')
    return workdir, predictor.Predictor.from_workdir(workdir, wanted_error=0.9)


def predict(workdir, *arguments, **options):
    """Runs the script; returns the finished process."""
    command = [sys.executable, REPOSITORY / 'scripts/predict.py', '--workdir', workdir, '--wanted_error', '0.9']
    environment = os.environ | {'PYTHONPATH': str(REPOSITORY)}
    return subprocess.run([*command, *arguments], capture_output=True, env=environment, **options)


def read_csv(text):
    return list(csv.DictReader(io.StringIO(text, newline='')))


def write(form, predictor, paths, **options):
    """Returns what is written for files, and how many could not be read."""
    file = io.StringIO(newline='')
    unread = answers.write_answers(answers.answer_files(predictor, paths, **options), file, form, predictor.class_names)
    return file.getvalue(), unread


def make_volume(path):
    """Writes a NIfTI volume of four axial slices of 32 x 32 and returns them as a radiologist sees them."""
    nibabel = pytest.importorskip('nibabel')
    generator = np.random.default_rng(0)
    slices = [phantom.draw_head(generator, name, 32)[0] for name in ('glioma', 'pituitary', 'glioma', 'notumor')]
    slices = [np.asarray(image, np.float32) for image in slices]
    voxels = np.stack([image.T[::-1, ::-1] for image in slices], axis=-1)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    black, white = np.percentile(voxels, [0.1, 99.9])
    return [np.rint(np.clip((image - black) / (white - black), 0, 1) * 255).astype(np.uint8) for image in slices]


def test_folder_is_answered_as_it_was_evaluated(run, data, tmp_path):
    """The labels are those of the evaluation, which computed them in other batches from prepared data."""
    workdir, _ = run
    with open(workdir / 'evaluation_test/predictions.csv', newline='') as file:
        expected = {row['path']: row for row in csv.DictReader(file)}
    folder = pathlib.Path(data['data_dir'])
    maps = ('--explain', tmp_path / 'maps')
    done = predict(workdir, folder / 'Testing', '--output', tmp_path / 'new/answers.csv', *maps)
    assert done.returncode == 0 and not done.stdout, done.stderr
    assert os.listdir(tmp_path / 'new') == ['answers.csv'] and len(os.listdir(tmp_path / 'maps')) == 20
    rows = read_csv((tmp_path / 'new/answers.csv').read_text())
    names = json.loads((workdir / 'run.json').read_text())['class_names']
    probabilities = [f'probability_{name}' for name in names]
    assert list(rows[0]) == ['path', 'predicted', *probabilities, 'abstain', 'reason', 'out_of_distribution', 'error']
    assert [row['path'] for row in rows] == sorted(str(folder / path) for path in expected)
    for row in rows:
        found = expected[pathlib.Path(row['path']).relative_to(folder).as_posix()]
        assert row['predicted'] == found['predicted'] and row['error'] == ''
        for name in names:
            calibrated = float(found[f'calibrated_{name}'] or found[f'probability_{name}'])
            assert float(row[f'probability_{name}']) == pytest.approx(calibrated, abs=1e-5)
        assert row['abstain'] == str(row['reason'] != '')


def test_list_of_files_with_bad_ones(run, data, tmp_path):
    """What cannot be read is a row with the reason; all else is answered, in order, and the status tells of it."""
    good = str(next(pathlib.Path(data['data_dir']).glob('Testing/*/*.png')))
    test_scans = pytest.importorskip('test_scans')
    (tmp_path / 'bad.png').write_bytes(b'no image')
    (tmp_path / 'marked.dcm').write_bytes(test_scans.make_marked(WindowCenter='SECRET'))
    slices = make_volume(tmp_path / 'volume.nii.gz')
    paths = [good, 'bad.png', 'nowhere.dcm', './bad.png', 'volume.nii.gz', 'marked.dcm']
    listed = '\n'.join(paths).encode()
    done = predict(run[0], '-', '--format', 'jsonl', '--slices', 'all', input=listed, cwd=tmp_path)
    assert done.returncode == 1 and b'Traceback' not in done.stderr, done.stderr
    rows = [json.loads(line) for line in done.stdout.decode().splitlines()]
    assert [row['path'] for row in rows] == paths
    assert not test_scans.MARK.search((done.stdout + done.stderr).decode())
    damaged = 'no JPEG, PNG, BMP, TIFF, WebP, DICOM or NIfTI file, or its header is damaged'
    lost = 'cannot be decoded (ValueError); it may be damaged'
    assert [row['error'] for row in rows] == ['', damaged, 'not a file', damaged, '', lost]
    assert [row['predicted'] is None for row in rows] == [False, True, True, True, False, True]
    assert 'slices' not in rows[0] and [found['slice'] for found in rows[4]['slices']] == [
        f'axial {i}' for i in (1, 2, 3, 4)
    ]
    for row, prediction in zip(rows[4]['slices'], run[1].predict(slices), strict=True):
        assert row['predicted'] == prediction.predicted
        found = [row[f'probability_{name}'] for name in run[1].class_names]
        np.testing.assert_allclose(found, prediction.probabilities, atol=2e-5)


def test_volume_is_answered_by_its_slices(run, tmp_path):
    """As the images of a patient are."""
    _, predictor = run
    slices = predictor.predict(make_volume(tmp_path / 'volume.nii'))
    probabilities = np.array([prediction.probabilities for prediction in slices])
    zeros, name = np.zeros(4, int), np.full(4, 'x')
    _, expected, *_ = scores.combine_patients(probabilities, zeros, name, name)
    (answer,) = answers.answer_files(predictor, [str(tmp_path / 'volume.nii')], slices='all')
    np.testing.assert_allclose(answer.prediction.probabilities, expected[0], atol=1e-5)
    assert answer.prediction.predicted == predictor.class_names[expected[0].argmax()]
    assert [name for name, _ in answer.slices] == ['axial 1', 'axial 2', 'axial 3', 'axial 4']
    distances = sorted(prediction.out_of_distribution for prediction in slices)
    assert answer.prediction.out_of_distribution == pytest.approx((distances[1] + distances[2]) / 2, rel=1e-3)
    # One slice is its own answer.
    (answer,) = answers.answer_files(predictor, [str(tmp_path / 'volume.nii')], plane='sagittal')
    np.testing.assert_allclose(answer.prediction.probabilities, answer.slices[0][1].probabilities)
    assert answer.images.shape == (1, 32, 32) and answer.slices[0][0].startswith('sagittal ')


@pytest.mark.parametrize(
    ('distances', 'confidence', 'reason'),
    [
        ([0.5, 0.9, 5.0], 0.99, ''),
        ([0.5, 1.1, 5.0], 0.99, 'out_of_distribution'),
        ([0.5, 0.9, 5.0], 0.3, 'uncertain'),
        ([None, None, None], 0.99, ''),
    ],
)
def test_volume_abstains(run, distances, confidence, reason):
    _, predictor = run
    predictor = predictor._replace(threshold=0.5)
    rest = (1 - confidence) / 3
    probabilities = np.array([confidence, rest, rest, rest])
    slices = [predictor.decide(probabilities, distance) for distance in distances]
    combined = answers.combine(predictor, slices)
    assert combined.reason == reason and combined.abstain == bool(reason)
    np.testing.assert_allclose(combined.probabilities, probabilities)


def test_dicom_frames(run, tmp_path):
    test_scans = pytest.importorskip('test_scans')
    frames = np.stack([images.pad_and_resize(np.full((8, 8), value, np.uint8), 32) for value in (0, 90, 200)])
    (tmp_path / 'scan.dcm').write_bytes(test_scans.make_dicom(frames))
    (answer,) = answers.answer_files(run[1], [str(tmp_path / 'scan.dcm')], slices=2)
    assert [name for name, _ in answer.slices] == ['frame 1', 'frame 3']
    np.testing.assert_array_equal(answer.images, frames[[0, 2]])


def test_answers_come_while_files_are_still_to_be_read(run, data):
    """Of an endless list of paths no more are taken than two batches need."""
    paths = itertools.cycle(sorted(str(path) for path in pathlib.Path(data['data_dir']).glob('Testing/*/*.png')))
    taken = []
    endless = (taken.append(path) or path for path in paths)
    found = answers.answer_files(run[1], endless)
    first = [next(found) for _ in range(130)]
    assert [answer.path for answer in first] == taken[:130]
    assert len(taken) <= 3 * 64 + 1 + 64
    found.close()


def test_pictures_of_the_evidence(run, tmp_path):
    _, predictor = run
    make_volume(tmp_path / 'a volume?.nii')
    Image.new('L', (8, 8), 90).save(tmp_path / 'b.png')
    paths = ['nowhere', *(str(tmp_path / name) for name in ('a volume?.nii', 'b.png'))]
    given = list(answers.answer_files(predictor, paths, slices=2))
    assert list(answers.explain_answers(predictor, given, tmp_path / 'new/maps')) == given
    names = ['00002_a_volume_.nii_axial_2.png', '00002_a_volume_.nii_axial_4.png', '00003_b.png.png']
    assert sorted(os.listdir(tmp_path / 'new/maps')) == names
    for name in names:
        with Image.open(tmp_path / 'new/maps' / name) as image:
            assert image.width > image.height > 100 and len(image.convert('RGB').getcolors(2**20)) > 20


def test_no_cell_is_a_formula(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ['=1+1.png', '+1.png', '-1.png', '@SUM(A1).png', '\tx.png', 'a,"b"\nc.png']
    for name in names:
        Image.new('L', (8, 8)).save(name)
    text, unread = write('csv', run[1], names)
    rows = read_csv(text)
    assert unread == 0 and [os.path.normpath(row['path']) for row in rows] == names
    cells = [cell for row in csv.reader(io.StringIO(text, newline='')) for cell in row]
    assert not [cell for cell in cells if cell.startswith(('=', '+', '-', '@', '\t'))]


def test_table_obeys_no_file_name(run, tmp_path):
    Image.new('L', (8, 8)).save(tmp_path / 'a\x1b[2J\nb.png')
    (tmp_path / 'c.png').write_bytes(b'')
    table, unread = write('table', run[1], answers.find_files([str(tmp_path)]))
    lines = table.splitlines()
    assert len(lines) == 3 and unread == 1
    assert lines[0].split() == ['predicted', 'probability', 'note', 'path']
    assert lines[1].endswith('/a?[2J?b.png') and lines[1].split()[0] in run[1].class_names
    assert 'error: an empty file' in lines[2]


def test_terminal_gets_a_table(run, data):
    """And no progress bar, which would write over it."""
    reader, writer = pty.openpty()
    path = next(pathlib.Path(data['data_dir']).glob('Testing/*/*.png'))
    command = [sys.executable, REPOSITORY / 'scripts/predict.py', '--workdir', run[0], '--wanted_error', '0.9', path]
    environment = os.environ | {'PYTHONPATH': str(REPOSITORY)}
    with subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, env=environment) as process:
        os.close(writer)
        _, errors = process.communicate(timeout=120)
    lines = os.read(reader, 10_000).decode().splitlines()
    os.close(reader)
    assert process.returncode == 0 and b'files' not in errors, errors
    assert len(lines) == 2 and lines[0].startswith('predicted') and lines[1].endswith(f'  {path}')


def test_tensorflow_is_not_loaded():
    """It would be most of the time until the first answer, and of the memory."""
    program = "import sys, brain_jax.serving.predictor; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, '-c', program], cwd=REPOSITORY, check=True)


def test_find_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('b/2.png', 'b/10.png', 'b/.hidden', 'b/.git/x.png', 'a/deep/er/1.dcm', 'c[1].png', 'c2.png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / 'b/loop').symlink_to('.')
    (tmp_path / 'b/linked.png').symlink_to('2.png')
    below = ['b/10.png', 'b/2.png', 'b/linked.png']
    assert answers.find_files(['b']) == below
    assert answers.find_files(['a', 'b/2.png']) == ['a/deep/er/1.dcm', 'b/2.png']
    assert answers.find_files(['c*.png']) == ['c2.png', 'c[1].png']
    assert answers.find_files(['c[1].png']) == ['c[1].png']  # a file of that name before a pattern
    assert answers.find_files(['[ab]']) == ['a/deep/er/1.dcm', *below]
    assert answers.find_files(['**/*.dcm', 'none*', 'nowhere']) == ['a/deep/er/1.dcm', 'none*', 'nowhere']
    assert answers.find_files(['c2.png', '-'], ['b/2.png\n', '\n', 'x y.png\n', 'z']) == [
        'c2.png',
        'b/2.png',
        'x y.png',
        'z',
    ]


def test_nothing_about_the_patient_gets_out(run, tmp_path):
    test_scans = pytest.importorskip('test_scans')
    for name, data in test_scans.marked_files().items():
        (tmp_path / f'{name}.dcm').write_bytes(data)
    for form in ('csv', 'jsonl', 'table'):
        text, unread = write(form, run[1], answers.find_files([str(tmp_path)]))
        assert not test_scans.MARK.search(text) and 5 < unread < len(os.listdir(tmp_path))


def test_output_that_cannot_be_written(run, tmp_path):
    (tmp_path / 'file').touch()
    done = predict(run[0], 'a.png', '--output', tmp_path / 'file/answers.csv')
    assert done.returncode == 1 and not done.stdout and b'Traceback' not in done.stderr
    assert f'error: {tmp_path}/file/answers.csv cannot be written: ' in done.stderr.decode()
    assert os.listdir(tmp_path) == ['file']
