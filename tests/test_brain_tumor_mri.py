import csv
import hashlib
import os
import pathlib
import pickle
import shutil
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging
from PIL import Image

from brain_jax import InputError
from brain_jax.data import brain_tumor_mri, images

CLASSES = ('glioma', 'meningioma', 'notumor', 'pituitary')


def write_image(path, seed=0):
    """Writes a small image of random grey values; its size depends on the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8 + seed % 3, 12), np.uint8)).save(path)


def write_tree(root, splits=('Training', 'Testing'), classes=CLASSES, count=3):
    """Writes a data folder with `count` images a class and split, and returns it."""
    seed = 0
    for split in splits:
        for name in classes:
            for i in range(count):
                write_image(root / split / name / f'scan_{i}.png', seed)
                seed += 1
    return root


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / 'data')


@pytest.fixture
def prepared(tmp_path):
    return tmp_path / 'prepared'


def records(prepared):
    """Returns the prepared files, finished or not."""
    return [path for path in prepared.rglob('*') if 'record' in path.name or 'incomplete' in path.name]


def test_every_file_is_found_again_in_the_order_of_the_names(tree, prepared):
    builder = brain_tumor_mri.prepare(tree, prepared_dir=prepared)
    assert builder.info.features['label'].names == list(CLASSES)
    assert builder.info.file_format == tfds.core.FileFormat.ARRAY_RECORD
    sources = builder.as_data_source()
    for split, folder in (('train', 'Training'), ('test', 'Testing')):
        files = sorted((tree / folder).glob('*/*'))
        assert len(sources[split]) == len(files) == 12
        for example, path in zip(sources[split], files, strict=True):
            assert example['file_name'].decode() == path.relative_to(tree).as_posix()
            assert CLASSES[example['label']] == path.parent.name
            assert example['sha256'].decode() == hashlib.sha256(path.read_bytes()).hexdigest()
            np.testing.assert_array_equal(example['image'][..., 0], np.asarray(Image.open(path)))


def test_the_source_can_be_sent_to_another_process(tree, prepared):
    source = brain_tumor_mri.prepare(tree, prepared_dir=prepared).as_data_source('train')
    assert pickle.loads(pickle.dumps(source))[3]['file_name'] == source[3]['file_name']


def test_data_folder_is_only_read_and_preparing_is_not_repeated(tree, prepared):
    before = sorted(tree.rglob('*'))
    first = brain_tumor_mri.prepare(str(tree), prepared_dir=str(prepared))
    written = {path: path.stat().st_mtime_ns for path in prepared.rglob('*')}
    second = brain_tumor_mri.prepare(tree, prepared_dir=prepared)
    assert second.data_path == first.data_path
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob('*')} == written
    assert sorted(tree.rglob('*')) == before


def test_a_changed_folder_is_prepared_anew(tree, prepared):
    def count():
        return brain_tumor_mri.prepare(tree, prepared_dir=prepared).info.splits['train'].num_examples

    assert count() == 12
    write_image(tree / 'Training' / 'glioma' / 'more.png')
    assert count() == 13
    (tree / 'Training' / 'glioma' / 'more.png').unlink()
    assert count() == 12
    # The same name, size and place, but other pixels, written later.
    path = tree / 'Training' / 'glioma' / 'scan_0.png'
    image = np.asarray(Image.open(path))
    Image.fromarray(255 - image).save(path)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    example = brain_tumor_mri.prepare(tree, prepared_dir=prepared).as_data_source('train')[0]
    np.testing.assert_array_equal(example['image'][..., 0], 255 - image)


def test_a_copy_elsewhere_is_prepared_alike(tree, tmp_path):
    shutil.copytree(tree, tmp_path / 'copy')  # keeps the times
    first, second = brain_tumor_mri.read_folder(tree), brain_tumor_mri.read_folder(tmp_path / 'copy')
    assert first.fingerprint == second.fingerprint and first.files == second.files


@pytest.mark.parametrize('splits', [('train', 'test'), ('TRAIN', 'Testing')])
def test_names_of_the_split_folders(tmp_path, splits):
    folder = brain_tumor_mri.read_folder(write_tree(tmp_path, splits))
    assert {split: len(files) for split, files in folder.files.items()} == {'train': 12, 'test': 12}
    assert folder.files['test'][0] == (f'{splits[1]}/glioma/scan_0.png', 0)


def test_class_aliases(tmp_path):
    write_tree(tmp_path, ('Training',), ('Glioma_tumor', 'meningioma', 'no tumour', 'Pituitary Tumor'))
    write_tree(tmp_path, ('Testing',), ('glioma', 'Meningioma-Tumour', 'No_Tumor', 'pituitary'))
    folder = brain_tumor_mri.read_folder(tmp_path)
    assert folder.class_names == CLASSES
    assert ('Testing/Meningioma-Tumour/scan_0.png', 1) in folder.files['test']


def test_a_folder_has_classes_of_its_own(tmp_path, prepared):
    builder = brain_tumor_mri.prepare(write_tree(tmp_path / 'data', classes=('No', 'YES')), prepared_dir=prepared)
    assert builder.info.features['label'].names == ['No', 'YES']


def test_what_systems_leave_behind_is_not_seen(tree):
    for junk in ('.DS_Store', 'Thumbs.db', 'desktop.ini', '.ipynb_checkpoints/scan-checkpoint.png'):
        (tree / 'Testing' / 'glioma' / junk).parent.mkdir(exist_ok=True)
        (tree / 'Testing' / 'glioma' / junk).write_bytes(b'junk')
    (tree / 'Training' / '.cache').mkdir()
    (tree / 'readme.txt').write_text('about the data')
    (tree / 'Training' / 'labels.csv').write_text('about the data')
    assert len(brain_tumor_mri.read_folder(tree).files['test']) == 12


def break_tree(tree, what):
    """Spoils a data folder in one way."""
    glioma = tree / 'Training' / 'glioma'
    if what == 'no such folder':
        shutil.rmtree(tree)
    elif what == 'a file':
        shutil.rmtree(tree)
        tree.write_text('text')
    elif what == 'no training folder':
        shutil.rmtree(tree / 'Training')
    elif what == 'one level too high':
        tree.rename(tree.parent / 'archive')
        tree.mkdir()
        (tree.parent / 'archive').rename(tree / 'archive')
    elif what == 'two training folders':
        shutil.copytree(tree / 'Training', tree / 'train')
    elif what == 'no class folders':
        shutil.rmtree(tree / 'Testing')
        write_image(tree / 'Testing' / 'scan.png')
    elif what == 'empty class folder':
        shutil.rmtree(glioma)
        glioma.mkdir()
    elif what == 'nested class folder':
        shutil.rmtree(glioma)
        write_image(glioma / 'patient_1' / 'scan.png')
    elif what == 'class only in Testing':
        shutil.copytree(tree / 'Testing' / 'glioma', tree / 'Testing' / 'schwannoma')
    elif what == 'two folders of one class':
        shutil.copytree(glioma, tree / 'Training' / 'glioma_tumor')
    elif what == 'name that is not UTF-8':
        (glioma / 'scan_0.png').rename(os.fsdecode(os.fsencode(glioma / 'scan_') + b'\xfc.png'))
    elif what == 'truncated image':
        (glioma / 'scan_1.png').write_bytes((glioma / 'scan_1.png').read_bytes()[:60])
    elif what == 'text named .jpg':
        (glioma / 'notes.jpg').write_text('seen twice')
    elif what == 'broken link':
        (glioma / 'lost.png').symlink_to(tree / 'lost.png')


@pytest.mark.parametrize(
    ('what', 'message'),
    [
        ('no such folder', r'data: no such folder'),
        ('a file', r'data: no such folder'),
        ('no training folder', r'data: there is no Training/ or train/ in it'),
        ('one level too high', r'there is no Training/ .*; give .*/data/archive instead\?'),
        ('two training folders', r'Training and train are the same split'),
        ('no class folders', r'Testing: there are no class folders'),
        ('empty class folder', r'Training/glioma: a class folder with no images'),
        ('nested class folder', r'Training/glioma: a class folder with only folders, which are not searched'),
        ('class only in Testing', r'class schwannoma is in the test folder but not in the training folder'),
        ('two folders of one class', r'Training/glioma and glioma_tumor/ both mean class glioma'),
        ('name that is not UTF-8', r'the name is not UTF-8'),
        ('truncated image', r'cannot read 1 of 24 image files .*/Training/glioma/scan_1.png: cannot be decoded'),
        ('text named .jpg', r'cannot read 1 of 25 image files .*/Training/glioma/notes.jpg: not a JPEG'),
        ('broken link', r'cannot read 1 of 25 image files .*/Training/glioma/lost.png: not a file'),
    ],
)
def test_bad_folder_gives_one_line_and_nothing_half_written(tree, prepared, what, message):
    break_tree(tree, what)
    with pytest.raises(InputError, match=message) as error:
        brain_tumor_mri.prepare(tree, prepared_dir=prepared)
    assert '\n' not in str(error.value)
    assert not records(prepared)


def test_all_unreadable_files_are_listed(tree, prepared):
    bad = ['Testing/notumor/scan_2.png', 'Training/glioma/scan_0.png', 'Training/pituitary/scan_1.png']
    for name in bad:
        (tree / name).write_bytes(b'')
    with pytest.raises(InputError, match='cannot read 3 of 24 image files') as error:
        brain_tumor_mri.prepare(tree, prepared_dir=prepared)
    assert sorted(str(error.value).splitlines()[1:]) == [f'  {tree / name}: an empty file' for name in bad]
    assert not records(prepared)


def test_unreadable_files_are_left_out_on_request(tree, prepared, caplog):
    (tree / 'Training' / 'notumor' / 'scan_0.png').write_text('text')
    (tree / 'Testing' / 'glioma' / 'scan_2.png').write_text('text')
    for _ in range(2):  # prepared, then found again
        caplog.clear()
        builder = brain_tumor_mri.prepare(tree, prepared_dir=prepared, skip_unreadable=True)
        assert {split: len(source) for split, source in builder.as_data_source().items()} == {'train': 11, 'test': 11}
        assert [line.split(': ')[0] for line in builder.info.metadata['unreadable']] == [
            str(tree / 'Training' / 'notumor' / 'scan_0.png'),
            str(tree / 'Testing' / 'glioma' / 'scan_2.png'),
        ]
        assert 'left out 2 of 24 image files' in caplog.text
    with pytest.raises(InputError):
        brain_tumor_mri.prepare(tree, prepared_dir=prepared)


def test_a_class_is_never_left_out_as_a_whole(tree, prepared):
    for path in (tree / 'Training' / 'notumor').iterdir():
        path.write_text('text')
    with pytest.raises(InputError, match='no train image can be read of notumor'):
        brain_tumor_mri.prepare(tree, prepared_dir=prepared, skip_unreadable=True)
    assert not records(prepared)


@pytest.mark.parametrize(
    ('dataset', 'row'),
    [
        ('kaggle_v1', 'train   meningioma       1,339       3  -1,336'),
        ('kaggle_v2', 'test    glioma             400       3  -397'),
    ],
)
def test_other_counts_than_published_give_a_table(tree, prepared, caplog, dataset, row):
    brain_tumor_mri.prepare(tree, dataset=dataset, prepared_dir=prepared)
    (warning,) = [record for record in caplog.records if record.levelname == 'WARNING']
    assert warning.getMessage().splitlines()[0] == f'{tree} is not {dataset} as published:'
    assert row in warning.getMessage().splitlines()


def test_kaggle_has_four_known_classes(tmp_path):
    with pytest.raises(InputError, match=r'the classes are No, YES, not glioma.*--config.dataset=folder'):
        brain_tumor_mri.prepare(write_tree(tmp_path, classes=('No', 'YES')), dataset='kaggle_v1')


def test_without_a_folder_the_manual_folder_is_used(prepared, caplog):
    write_tree(prepared / 'downloads' / 'manual' / 'brain_tumor_mri')
    builder = brain_tumor_mri.prepare(None, prepared_dir=prepared)
    assert builder.builder_config.name.startswith('kaggle_v1-')
    assert 'is not kaggle_v1 as published' in caplog.text


def test_without_any_data_one_message_says_all(prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, 'kagglehub', None)  # what Python itself sets for a module that cannot be imported
    with pytest.raises(InputError) as error:
        brain_tumor_mri.prepare(None, prepared_dir=prepared)
    for part in (
        str(prepared / 'downloads' / 'manual' / 'brain_tumor_mri'),
        'Training/ and Testing/',
        'https://www.kaggle.com/datasets/masoudnickparvar/brain-tumor-mri-dataset/versions/1',
        'pip install kagglehub',
        '--config configs/densenet121.py:demo',
    ):
        assert part in str(error.value)


def test_unusable_manual_folder_tells_how_to_get_the_data(prepared):
    manual = prepared / 'downloads' / 'manual' / 'brain_tumor_mri'
    manual.mkdir(parents=True)
    (manual / 'archive.zip').write_bytes(b'')
    with pytest.raises(InputError, match=rf'{manual}: there is no Training/ or train/ in it(.|\n)*:demo'):
        brain_tumor_mri.prepare(None, prepared_dir=prepared)


@pytest.mark.parametrize(
    ('dataset', 'message'), [('kaggle_v3', 'unknown dataset'), ('folder', 'needs --config.data_dir')]
)
def test_dataset_that_cannot_be(dataset, message):
    with pytest.raises(InputError, match=message):
        brain_tumor_mri.prepare(None, dataset=dataset)


def test_place_that_cannot_be_written(tree, tmp_path):
    (tmp_path / 'file').write_text('text')
    with pytest.raises(InputError, match=r'cannot write prepared data in .*--config.prepared_dir'):
        brain_tumor_mri.prepare(tree, prepared_dir=tmp_path / 'file')


def test_builder_works_the_tfds_way(tree, tmp_path):
    manual = tmp_path / 'downloads' / 'manual'
    manual.mkdir(parents=True)
    tree.rename(manual / 'brain_tumor_mri')
    builder = brain_tumor_mri.BrainTumorMri(config='folder', data_dir=tmp_path, file_format='array_record')
    builder.download_and_prepare()
    assert len(builder.as_data_source('test')) == 12


def test_builder_reads_the_class_names_of_a_folder(tmp_path):
    write_tree(tmp_path / 'downloads' / 'manual' / 'brain_tumor_mri', classes=('No', 'YES'))
    builder = brain_tumor_mri.BrainTumorMri(config='folder', data_dir=tmp_path, file_format='array_record')
    builder.download_and_prepare()
    assert builder.info.features['label'].names == ['No', 'YES']
    assert {row['label'] for row in builder.as_data_source('train')} == {0, 1}


def run_prepare(tree, prepared, **options):
    """Starts a process that prepares the folder."""
    code = f'from brain_jax.data import brain_tumor_mri as b; b.prepare({str(tree)!r}, prepared_dir={str(prepared)!r})'
    return subprocess.Popen([sys.executable, '-c', code], cwd=pathlib.Path(__file__).parents[1], **options)


def test_a_killed_preparation_is_not_taken_for_finished(tree, prepared):
    write_tree(tree, ('Testing',), ('pituitary',), count=3000)
    process = run_prepare(tree, prepared, stderr=subprocess.DEVNULL)
    while not any('incomplete' in path.name for path in prepared.rglob('*')):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any('incomplete' in path.name for path in prepared.rglob('*'))  # it was killed in the middle
    builder = brain_tumor_mri.prepare(tree, prepared_dir=prepared)
    assert len(builder.as_data_source('test')) == 3009


def test_processes_that_prepare_the_same_do_not_disturb_each_other(tree, prepared):
    processes = [run_prepare(tree, prepared) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(brain_tumor_mri.prepare(tree, prepared_dir=prepared).as_data_source('test')) == 12


def test_output_that_is_no_terminal_gets_no_progress_bar(tree, prepared):
    process = run_prepare(tree, prepared, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stdout, stderr = process.communicate()
    assert process.returncode == 0
    assert not stdout
    assert 'Preparing the' not in stderr and 'Generating' not in stderr and '%|' not in stderr


def test_terminal_gets_a_progress_bar(tree, prepared):
    reader, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    process = run_prepare(tree, prepared, stdout=terminal, stderr=terminal)
    assert process.wait() == 0
    os.set_blocking(reader, False)
    shown = os.read(reader, 100_000).decode()  # before the last writer is closed, or it is lost
    os.close(reader)
    os.close(terminal)
    assert 'Preparing the train images' in shown and '12' in shown


def test_real_data(shared, prepared, caplog):
    """Compares a part of the real images with the table that was made from them independently."""
    real = shared / 'brain-tumor-mri'
    folder = brain_tumor_mri.read_folder(real)
    with open(shared / 'brain-tumor-mri-groups.csv') as file:
        listed = sorted(row['path'] for row in csv.DictReader(file))
    assert sorted(name for files in folder.files.values() for name, _ in files) == listed
    brain_tumor_mri._check_counts(folder, 'kaggle_v1', brain_tumor_mri._KAGGLE_COUNTS['kaggle_v1'])
    assert 'train   notumor          1,595   1,591  -4' in caplog.text  # four files are absent from this copy
    for name in listed[::50]:
        target = prepared.parent / 'part' / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(real / name)
    builder = brain_tumor_mri.prepare(prepared.parent / 'part', dataset='kaggle_v1', prepared_dir=prepared)
    examples = [example for source in builder.as_data_source().values() for example in source]
    assert sorted(example['file_name'].decode() for example in examples) == listed[::50]
    for example in examples[::10]:
        path = real / example['file_name'].decode()
        assert CLASSES[example['label']] == path.parent.name
        np.testing.assert_array_equal(example['image'][..., 0], images.read_image(path))


@pytest.fixture(autouse=True)
def _log(caplog):
    """Lets caplog see what absl logs."""
    logging.use_absl_handler()
    logging.get_absl_logger().propagate = True
    caplog.set_level('INFO')
