"""Tests of brain_jax.evaluation.pointing_game, and of its script on a small run."""

import json
import os
import pathlib
import runpy
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from brain_jax import InputError, train
from brain_jax.data import phantom
from brain_jax.evaluation import evaluate, pointing_game
from brain_jax.serving import predictor

pytestmark = pytest.mark.usefixtures('quick_compilation')
REPOSITORY = pathlib.Path(__file__).parents[1]
get_config = runpy.run_path(str(REPOSITORY / 'configs/densenet121.py'))['get_config']


def test_heads_are_in_no_folder_of_the_generator(tmp_path):
    batch, masks, names = pointing_game.draw_heads(4, 32)
    assert batch.shape == masks.shape == (12, 32, 32) and masks.any(axis=(1, 2)).all()
    assert list(names) == ['glioma'] * 4 + ['meningioma'] * 4 + ['pituitary'] * 4
    phantom.make_phantom(tmp_path / 'heads', train_per_class=4, test_per_class=4, image_size=32)
    known = {np.asarray(Image.open(path)).tobytes() for path in tmp_path.rglob('*.png')}
    assert len(known) == 32
    others = pointing_game.draw_heads(4, 32, split=3)[0]
    assert not {image.tobytes() for image in batch} & known
    assert not {image.tobytes() for image in others} & (known | {image.tobytes() for image in batch})


def test_scores_of_points():
    masks = np.zeros((4, 64, 64), bool)
    masks[:, 10:20, 30:40] = True
    # Inside, at the corner, two pixels (a 32nd of the side) beside it, three pixels beside it.
    points = np.array([[15, 35], [10, 39], [21, 35], [22, 35]])
    names = np.array(['glioma', 'glioma', 'pituitary', 'pituitary'])
    found = pointing_game.score_points(masks, points, names, right=np.array([True, False, True, True]))
    shares = {key: found[key]['share'] for key in ('all', 'near', 'right')}
    assert shares == {'all': 0.5, 'near': 0.75, 'right': pytest.approx(1 / 3)}
    assert found['classes']['glioma']['share'] == 1 and found['classes']['pituitary']['share'] == 0
    assert found['classes']['meningioma'] == {'n': 0, 'share': None, 'interval': None}
    assert found['all']['interval'] == pytest.approx([0.1500, 0.8500], abs=1e-4)  # 2 of 4, of a table


def test_blind_points():
    batch = np.zeros((2, 64, 64), np.uint8)
    batch[0, 40:44, 8:12] = 200
    batch[:, 5, 5] = 255  # a single pixel is no place
    other_masks = np.zeros((3, 64, 64), bool)
    other_masks[0, :20, :20] = other_masks[1, 19:30, 19:30] = other_masks[2, 50, 50] = True
    points = pointing_game.blind_points(batch, np.array(['a', 'b']), other_masks, np.array(['a', 'a', 'b']))
    row, column = points['brightest place'][0]
    assert 40 <= row < 44 and 8 <= column < 12
    np.testing.assert_array_equal(points['centre of the image'], [[32, 32], [32, 32]])
    np.testing.assert_array_equal(points['usual place of the class'], [[19, 19], [50, 50]])


@pytest.fixture(scope='module')
def workdir(data, tmp_path_factory):
    """The folder of an evaluated run on generated heads."""
    workdir = tmp_path_factory.mktemp('runs') / 'run'
    config = get_config('scratch')
    config.update(model='_DenseNetTiny', image_size=32, batch_size=16, eval_batch_size=24, num_epochs=1.0, **data)
    train.train_and_evaluate(config.lock(), workdir)
    evaluate.evaluate_run(workdir, workdir / 'evaluation_test')
    return workdir


def test_script(workdir, tmp_path):
    command = [sys.executable, REPOSITORY / 'scripts/pointing_game.py', '--workdir', workdir]
    command += ['--output', tmp_path / 'out', '--images_per_class', '2']
    environment = os.environ | {'PYTHONPATH': str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / 'out/pointing_game.json').read_text())
    table = (tmp_path / 'out/pointing_game.md').read_text()
    assert table in done.stdout and all(name in table for name in pointing_game.MAPS)
    assert found['sanity']['largest_gap'] < 1e-4
    assert {row['all']['n'] for row in found['hits'].values()} == {6}
    with Image.open(tmp_path / 'out/pointing_game.png') as picture:
        assert picture.format == 'PNG' and picture.width > 800


def test_run_of_other_classes(workdir):
    loaded = predictor.Predictor.from_workdir(workdir)._replace(class_names=('cat', 'dog', 'notumor', 'horse'))
    with pytest.raises(InputError, match=r'does not know glioma, meningioma, pituitary.*give a run of mode demo'):
        pointing_game.play(loaded, 2)
