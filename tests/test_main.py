"""The command line, as a user meets it: real processes."""

import os
import pathlib
import subprocess
import sys

import pytest

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
