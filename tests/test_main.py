"""The command line: what it says where it cannot go on."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from processes import CONFIG, call_main, finish, last_line, start

REPOSITORY = pathlib.Path(__file__).parents[1]


def check_error(flags, message, folder, devices=1):
    """Checks that a run ends with one line and leaves no folder."""
    log, workdir = folder / 'log', folder / 'run'
    flags = [f'--workdir={workdir}', *flags]
    assert finish([start(devices, log, call_main, flags)]) == [1]
    assert message in last_line(log) and 'Traceback' not in log.read_text()
    assert not workdir.exists()


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ([f'--config={CONFIG}', '--config.learning_rat=1'], 'Did you mean "learning_rate"'),
        ([f'--config={CONFIG}:fast'], "unknown mode 'fast': use 'finetune', 'frozen'"),
        (['--config=configs/nowhere.py'], 'configs/nowhere.py'),
        ([f'--config={CONFIG}', '--config.data_dir=/nowhere'], '/nowhere: no such folder'),
        ([f'--config={CONFIG}', 'more'], 'unexpected arguments: more'),
    ],
)
def test_wrong_flags_end_with_one_line(tmp_path, flags, message):
    check_error(flags, message, tmp_path)


def write_folder(root):
    """Writes a tiny tree of class folders; returns the flags that train on it with random weights."""
    for split in ('Training', 'Testing'):
        for name in ('glioma', 'notumor'):
            (root / split / name).mkdir(parents=True)
            for i in range(12):
                pixels = np.random.default_rng([i, len(split), len(name)]).integers(0, 256, (32, 32), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f'{i}.png')
    fields = {'data_dir': root, 'prepared_dir': f'{root}_prepared', 'image_size': 32, 'model': '_DenseNetTiny'}
    return [f'--config={CONFIG}:scratch', *(f'--config.{name}={value}' for name, value in fields.items())]


@pytest.mark.parametrize(
    ('spoil', 'flag', 'message'),
    [
        (lambda root: [path.unlink() for path in (root / 'Training/glioma').iterdir()], '', 'a class folder with no'),
        (lambda root: (root / 'Testing/other').mkdir(), '', 'Testing/other: a class folder with no images'),
        (lambda root: (root / 'Training/glioma/0.jpg').write_text('text'), '', '0.jpg: not a JPEG, PNG'),
        (lambda root: (root / 'w.h5').write_bytes(b'\x89HDF'), '--config.pretrained={root}/w.h5', 'w.h5'),
        (lambda root: None, '--config.batch_size=7', 'batch_size is 7, which 2 devices'),
    ],
)
def test_bad_input_ends_with_one_line(tmp_path, spoil, flag, message):
    root = tmp_path / 'data'
    flags = write_folder(root)
    spoil(root)
    check_error([*flags, *([flag.format(root=root)] if flag else [])], message, tmp_path, devices=2)


def test_without_data_it_says_where_it_looked_and_what_to_do(tmp_path):
    """As a user meets it, with a home of its own."""
    folders = {'HOME': str(tmp_path), 'TFDS_DATA_DIR': str(tmp_path / 'tfds'), 'KAGGLEHUB_CACHE': str(tmp_path)}
    command = [sys.executable, '-m', 'brain_jax.main', f'--workdir={tmp_path / "run"}', f'--config={CONFIG}']
    process = subprocess.run(
        command, cwd=REPOSITORY, env=os.environ | folders, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 1 and 'Traceback' not in process.stderr
    message = process.stderr[process.stderr.index('error: ') :]
    for part in (
        str(tmp_path / 'tfds/downloads/manual/brain_tumor_mri'),
        'masoudnickparvar/brain-tumor-mri-dataset/versions/1',
        'Training/ and Testing/',
        '--config.data_dir',
        '--config configs/densenet121.py:demo',
    ):
        assert part in message
    assert not (tmp_path / 'run').exists()
