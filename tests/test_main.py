"""The command line, as a user meets it: real processes."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

REPOSITORY = pathlib.Path(__file__).parents[1]


def run_main(*flags, folder):
    """Runs `python -m brain_jax.main` with a home of its own; returns the finished process."""
    environment = os.environ | {
        'HOME': str(folder),
        'TFDS_DATA_DIR': str(folder / 'tfds'),
        'KAGGLEHUB_CACHE': str(folder),
    }
    command = [sys.executable, '-m', 'brain_jax.main', f'--workdir={folder / "run"}', *flags]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--config=configs/densenet121.py', '--config.learning_rat=1'], 'Did you mean "learning_rate"'),
        (['--config=configs/densenet121.py:fast'], "unknown mode 'fast': use 'finetune', 'frozen'"),
        (['--config=configs/nowhere.py'], 'configs/nowhere.py'),
        (['--config=configs/densenet121.py', '--config.data_dir=/nowhere'], '/nowhere: no such folder'),
    ],
)
def test_wrong_flags_end_with_one_line(tmp_path, flags, message):
    process = run_main(*flags, folder=tmp_path)
    assert process.returncode == 1
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith('error: ') and message in last
    assert 'Traceback' not in process.stderr
    assert not (tmp_path / 'run').exists()


def write_folder(root):
    """Writes a tiny tree of class folders; returns the flags that train on it with random weights."""
    for split in ('Training', 'Testing'):
        for name in ('glioma', 'notumor'):
            (root / split / name).mkdir(parents=True)
            for i in range(12):
                pixels = np.random.default_rng([i, len(split), len(name)]).integers(0, 256, (32, 32), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f'{i}.png')
    return ['--config=configs/densenet121.py:scratch', f'--config.data_dir={root}', '--config.image_size=32']


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
def test_bad_input_ends_with_one_line(tmp_path, monkeypatch, spoil, flag, message):
    monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=2')
    root = tmp_path / 'data'
    flags = write_folder(root)
    spoil(root)
    process = run_main(*flags, *([flag.format(root=root)] if flag else []), folder=tmp_path)
    assert process.returncode == 1 and 'Traceback' not in process.stderr
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith('error: ') and message in last
    assert not (tmp_path / 'run').exists()


def test_without_data_it_says_where_it_looked_and_what_to_do(tmp_path):
    process = run_main('--config=configs/densenet121.py', folder=tmp_path)
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
