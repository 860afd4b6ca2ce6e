"""Data sets at the edge: a class of one image, one image a class, one image, equal images, and a hundred thousand."""

import csv
import os
import re
import subprocess
import time

import numpy as np
import pytest
from PIL import Image
from processes import run
from test_train import REPOSITORY, TINY, assert_checkpoints_are_finite, command, make_config

from brain_jax import InputError, train
from brain_jax.evaluation import evaluate

CLASSES = ('glioma', 'meningioma', 'notumor', 'pituitary')


def write_images(folder, train_counts, test_counts, draw):
    """Writes so many images of each class; `draw` makes each, uint8 [32, 32]. Returns the fields that name them."""
    for split, counts in (('Training', train_counts), ('Testing', test_counts)):
        for name, count in zip(CLASSES, counts, strict=True):
            for i in range(count):
                path = folder / 'data' / split / name / f'{i:05}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw()).save(path, compress_level=1)
    return {'data_dir': str(folder / 'data'), 'prepared_dir': str(folder / 'prepared')}


def draw_noise():
    """Returns a function that draws images of which no two are alike."""
    rng = np.random.default_rng(0)
    return lambda: rng.integers(0, 256, (32, 32), np.uint8)


def check_run(changes, workdir, mode='scratch'):
    """Trains, checks that every number in every checkpoint is one, and returns the summary."""
    summary, _ = run(TINY | changes, workdir, mode=mode)
    assert summary['steps'] in assert_checkpoints_are_finite(make_config(changes, mode), workdir)
    assert np.isfinite(summary['test']['loss'])
    return summary


def test_class_of_one_image(tmp_path):
    data = write_images(tmp_path, (1, 6, 6, 6), (1, 1, 1, 0), draw_noise())
    message = 'class glioma has only 1 group of images, a split into 4 parts .*, or 0 to train without validation'
    with pytest.raises(InputError, match=message):
        train.train_and_evaluate(make_config(data), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
    summary = check_run(data | {'validation_fraction': 0.0, 'class_weights': 'balanced'}, tmp_path / 'run')
    assert summary['test']['n'] == 3


@pytest.mark.parametrize('mode', ['scratch', 'frozen'])
def test_one_image_of_each_class(mode, tmp_path):
    data = write_images(tmp_path, (1, 1, 1, 1), (1, 1, 1, 1), draw_noise())
    summary = check_run(data | {'validation_fraction': 0.0}, tmp_path / 'run', mode)
    assert summary['steps'] == 1 and summary['test']['n'] == 4  # two epochs of a quarter of a batch
    if mode == 'scratch':  # the pages tell of both modes alike
        metrics = evaluate.evaluate_run(tmp_path / 'run', tmp_path / 'out')
        assert metrics['standard']['accuracy'] == summary['test']['accuracy']


def test_image_that_is_alone(tmp_path):
    data = write_images(tmp_path, (1, 0, 0, 0), (1, 0, 0, 0), draw_noise())
    with pytest.raises(InputError, match='glioma is the only class, so there is nothing to tell apart'):
        train.train_and_evaluate(make_config(data, validation_fraction=0.0), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('mode', ['scratch', 'frozen'])
def test_equal_images(mode, tmp_path):
    data = write_images(tmp_path, (2, 2, 2, 2), (1, 1, 1, 1), lambda: np.zeros((32, 32), np.uint8))
    with pytest.raises(InputError, match='class glioma has only 1 group of images'):  # as all are copies
        train.train_and_evaluate(make_config(data, mode), tmp_path / 'run')
    assert check_run(data | {'validation_fraction': 0.0}, tmp_path / 'run', mode)['test']['n'] == 4


@pytest.mark.soak
def test_hundred_thousand_images(tmp_path):
    """A run on 100,000 images, where 100 of the test images are mirror images of training images."""
    pytest.importorskip('faiss')
    data = write_images(tmp_path, (20_000,) * 4, (5000,) * 4, draw_noise())
    for i in range(100):
        with Image.open(f'{data["data_dir"]}/Training/glioma/{i:05}.png') as image:
            mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mirrored.save(f'{data["data_dir"]}/Testing/notumor/{i:05}.png')
    changes = TINY | data | {'num_epochs': 0.01, 'eval_batch_size': 480, 'checkpoint_every_steps': 100}
    start = time.monotonic()
    lines = []
    with subprocess.Popen(
        command(changes, tmp_path / 'run'), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr:
            lines.append(line)
            if re.search('Preparing|train: |wrote ', line):
                print(f'after {time.monotonic() - start:.0f} s: {line.strip()}', flush=True)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, lines
    print(f'{usage.ru_maxrss / 1e6:.2f} GB at the most')
    assert usage.ru_maxrss < 5e6  # kilobytes
    (table,) = (tmp_path / 'prepared').rglob('copies_*.csv')
    with open(table, newline='') as file:
        groups = {row['path']: row['group'] for row in csv.DictReader(file)}
    assert len(groups) == 100_000 and len(set(groups.values())) == 100_000 - 100
    for i in range(100):
        assert groups[f'Training/glioma/{i:05}.png'] == groups[f'Testing/notumor/{i:05}.png']
