"""Tests of brain_jax.serving.predictor, on a run that was trained and evaluated on generated images."""

import csv
import json
import pathlib
import runpy
import shutil

import numpy as np
import pytest

from brain_jax import InputError, train
from brain_jax.data import images
from brain_jax.evaluation import evaluate, out_of_distribution
from brain_jax.serving import predictor

pytestmark = pytest.mark.usefixtures('quick_compilation')
get_config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / 'configs/densenet121.py'))['get_config']


def make_run(data, workdir, **changes):
    config = get_config('scratch')
    config.update(
        model='_DenseNetTiny', image_size=32, batch_size=16, eval_batch_size=24, num_epochs=6.0, learning_rate=3e-3,
        validation_fraction=0.25, **data,
    )  # fmt: skip
    config.update(changes)
    train.train_and_evaluate(config.lock(), workdir)
    evaluate.evaluate_run(workdir, workdir / 'evaluation_test', wanted_errors=(0.05, 0.9))
    return workdir


@pytest.fixture(scope='module', params=['last', 'wide'])
def workdir(data, tmp_path_factory, request):
    """The folder of a run, with either head."""
    return make_run(data, tmp_path_factory.mktemp('runs') / 'run', head=request.param)


@pytest.fixture(scope='module')
def answers(workdir, data):
    """Paths and images of the test split, and the predictions for them."""
    folder = pathlib.Path(data['data_dir'])
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.glob('Testing/*/*.png'))
    pictures = [images.read_image(folder / path) for path in paths]
    return paths, pictures, predictor.Predictor.from_workdir(workdir, wanted_error=0.9).predict(pictures)


def test_answers_are_those_of_the_evaluation(workdir, answers):
    with open(workdir / 'evaluation_test/predictions.csv', newline='') as file:
        expected = {row['path']: row for row in csv.DictReader(file)}
    names = json.loads((workdir / 'run.json').read_text())['class_names']
    paths, _, predictions = answers
    assert len(predictions) == len(expected) == 20
    for path, prediction in zip(paths, predictions, strict=True):
        row = expected[path]
        assert prediction.predicted == row['predicted']
        calibrated = [float(row[f'calibrated_{name}'] or row[f'probability_{name}']) for name in names]
        np.testing.assert_allclose(prediction.probabilities, calibrated, atol=1e-5)


def test_abstains_below_the_threshold_of_validation(workdir, answers):
    calibration = json.loads((workdir / 'calibration.json').read_text())
    (threshold,) = (row['threshold'] for row in calibration['thresholds'] if row['wanted_error'] == 0.9)
    reasons = [prediction.reason for prediction in answers[2]]
    for prediction in answers[2]:
        assert prediction.abstain == (prediction.reason != '')
        if prediction.out_of_distribution > 1:
            assert prediction.reason == 'out_of_distribution'
        else:
            assert prediction.reason == ('uncertain' if prediction.probabilities.max() < threshold else '')
    assert '' in reasons


def test_one_by_one_is_as_together(workdir, answers):
    _, pictures, together = answers
    loaded = predictor.Predictor.from_workdir(workdir, wanted_error=0.9)
    for picture, expected in zip(pictures[:3], together, strict=False):
        (alone,) = loaded.predict([picture])
        np.testing.assert_allclose(alone.probabilities, expected.probabilities, atol=1e-5)
        assert alone.out_of_distribution == pytest.approx(expected.out_of_distribution, rel=1e-3)
    many = loaded.predict(pictures * 4)  # more than the largest batch
    assert [row.predicted for row in many] == [row.predicted for row in together] * 4
    assert loaded.predict([]) == []


def test_any_size_is_padded_and_resized(workdir):
    loaded = predictor.Predictor.from_workdir(workdir)
    wide = np.full((50, 100), 200, np.uint8)
    (seen,) = loaded.preprocess([wide])
    # A quarter of the square above and below is padding.
    assert seen.shape == (32, 32) and np.all(seen[:7] == 0) and np.all(seen[9:23] == 200) and np.all(seen[25:] == 0)


def test_white_noise_is_no_head(workdir, answers):
    noise = np.random.default_rng(0).integers(0, 256, (8, 32, 32), np.uint8)
    predictions = predictor.Predictor.from_workdir(workdir, wanted_error=0.9).predict(noise)
    distances = np.median([row.out_of_distribution for row in predictions])
    assert distances > 1 and distances > np.median([row.out_of_distribution for row in answers[2]])


def test_folders_that_cannot_answer(workdir, tmp_path):
    with pytest.raises(InputError, match=r'there is no run\.json in it'):
        predictor.Predictor.from_workdir(tmp_path)
    with pytest.raises(InputError, match=r'wanted_error is 0\.3: scripts/evaluate\.py looked for 0\.05, 0\.9; use'):
        predictor.Predictor.from_workdir(workdir, wanted_error=0.3)
    copy = shutil.copytree(workdir, tmp_path / 'copy')
    calibration = json.loads((copy / 'calibration.json').read_text())
    calibration['hashes']['checkpoint_sha256'] = '0' * 64
    (copy / 'calibration.json').write_text(json.dumps(calibration))
    with pytest.raises(InputError, match=r'calibration\.json is of another checkpoint'):
        predictor.Predictor.from_workdir(copy)
    (copy / 'calibration.json').unlink()
    with pytest.raises(InputError, match=r'was not evaluated yet.*scripts/evaluate\.py --workdir'):
        predictor.Predictor.from_workdir(copy)


def test_without_validation_it_never_abstains(data, tmp_path):
    folder = make_run(data, tmp_path / 'run', validation_fraction=0.0, num_epochs=1.0)
    assert out_of_distribution.load(folder, 'any') is None
    loaded = predictor.Predictor.from_workdir(folder)
    assert loaded.temperature == 1 and loaded.threshold == 0
    (prediction,) = loaded.predict([np.zeros((32, 32), np.uint8)])
    assert not prediction.abstain and prediction.out_of_distribution is None


def test_nothing_sure_enough_always_abstains():
    calibration = {'fitted_on': 'validation', 'thresholds': [{'wanted_error': 0.01, 'threshold': None}]}
    assert predictor.choose_threshold(calibration, 0.01) > 1
