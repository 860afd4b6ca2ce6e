"""Tests of brain_jax.evaluation.strangers."""

import json
import pathlib
import runpy
import subprocess
import sys

import numpy as np
import pytest
from scipy import spatial

pytest.importorskip('skimage')
pytest.importorskip('pydicom')

from brain_jax import train
from brain_jax.data import phantom
from brain_jax.evaluation import evaluate, strangers

REPOSITORY = pathlib.Path(__file__).parents[1]
get_config = runpy.run_path(str(REPOSITORY / 'configs/densenet121.py'))['get_config']


def test_sets_are_images_and_equal_seeds_give_equal_ones():
    head, _ = phantom.draw_head(np.random.default_rng(0), 'glioma', 64)
    sets, again, other = (strangers.make_sets([head], seed=seed) for seed in (0, 0, 1))
    assert {'photographs', 'text', 'noise', 'blank', 'faces', 'other DICOM', 'inverted'} <= sets.keys()
    for name, pictures in sets.items():
        assert pictures and all(picture.dtype == np.uint8 and picture.ndim == 2 for picture in pictures), name
        assert all(map(np.array_equal, pictures, again[name]))
    assert not all(map(np.array_equal, sets['noise'], other['noise']))
    np.testing.assert_array_equal(sets['inverted'][0], 255 - head)
    assert sets['cropped to an eighth'][0].size == pytest.approx(head.size / 8, rel=0.1)
    assert {tuple(np.unique(picture)) for picture in sets['blank'][:2]} == {(0,), (5,)}


def test_nearest_distances():
    rng = np.random.default_rng(0)
    bank, queries = rng.standard_normal((30, 5)), rng.standard_normal((4, 5))
    # Of normalised vectors the squared distance is twice the cosine distance.
    expected = np.sqrt(2 * np.sort(spatial.distance.cdist(queries, bank, 'cosine'), axis=1)[:, 2])
    np.testing.assert_allclose(strangers.nearest_distances(bank, queries, k=3), expected)


def test_scores_of_sets():
    known = np.array([1.0, 2.0, 3.0, 4.0])
    found = strangers.score_sets(known, {'far': np.array([5.0, 6.0]), 'amid': np.array([2.5])}, threshold=3.5)
    assert found['far'] == {'n': 2, 'auroc': 1, 'caught': 1}
    assert found['amid'] == {'n': 1, 'auroc': 0.5, 'caught': 0}


def test_script(data, tmp_path):
    config = get_config('scratch')
    config.update(
        model='_DenseNetTiny', image_size=32, batch_size=16, eval_batch_size=24, num_epochs=1.0,
        validation_fraction=0.25, **data,
    )  # fmt: skip
    train.train_and_evaluate(config.lock(), tmp_path / 'run')
    evaluate.evaluate_run(tmp_path / 'run', tmp_path / 'out')
    command = [sys.executable, REPOSITORY / 'scripts/measure_strangers.py', '--workdir', tmp_path / 'run']
    command += ['--output', tmp_path / 'strangers', '--changed', '3']
    done = subprocess.run(command, cwd=REPOSITORY, env=None, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / 'strangers/strangers.json').read_text())
    assert len(found) == 2
    for rows in found.values():
        assert rows['inverted']['n'] == 3 and 0 <= rows['false_alarms'] <= 1
        assert rows['noise']['auroc'] > 0.5
    assert (tmp_path / 'strangers/strangers.md').read_text().strip() in done.stdout
