"""The evaluation of a small run on generated images, with a copy and a patient planted on both sides."""

import csv
import json
import os
import pathlib
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import special
from tensorboard.backend.event_processing import event_accumulator

from brain_jax import InputError, finished_run, train
from brain_jax.data import phantom
from brain_jax.evaluation import evaluate

REPOSITORY = pathlib.Path(__file__).parents[1]
get_config = runpy.run_path(str(REPOSITORY / 'configs/densenet121.py'))['get_config']


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Folders with 16 training and 6 test images a class; returns the fields that name them, and the planted images."""
    folder = tmp_path_factory.mktemp('data')
    phantom.make_phantom(folder / 'phantom', train_per_class=16, test_per_class=6, image_size=32)
    train_files, test_files = (
        sorted((folder / 'phantom' / split / 'glioma').iterdir()) for split in ('Training', 'Testing')
    )
    with Image.open(train_files[0]) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(test_files[0])
    table = [('path', 'patient_id')]
    for path in (train_files[1], test_files[1]):
        table.append((path.relative_to(folder / 'phantom').as_posix(), 'p1'))
    with open(folder / 'groups.csv', 'w', newline='') as file:
        csv.writer(file).writerows(table)
    fields = {
        'data_dir': str(folder / 'phantom'),
        'prepared_dir': str(folder / 'prepared'),
        'groups': str(folder / 'groups.csv'),
    }
    return fields, *(path.relative_to(folder / 'phantom').as_posix() for path in test_files[:2])


def make_run(fields, workdir, **changes):
    config = get_config('scratch')
    config.update(
        model='_DenseNetTiny',
        image_size=32,
        batch_size=16,
        eval_batch_size=24,
        num_epochs=6.0,
        learning_rate=3e-3,
        validation_fraction=0.25,
        **fields,
    )
    config.update(changes)
    return train.train_and_evaluate(config.lock(), workdir)


@pytest.fixture(scope='module')
def evaluated(data, tmp_path_factory):
    """A finished run that was evaluated and compared with itself: its folder, summary and metrics."""
    workdir = tmp_path_factory.mktemp('run')
    summary = make_run(data[0], workdir)
    metrics = evaluate.evaluate_run(workdir, workdir / 'out', other_workdir=workdir, wanted_errors=(0.5,))
    return workdir, summary, metrics


def read_predictions(folder):
    with open(folder / 'predictions.csv', newline='') as file:
        return {row['path']: row for row in csv.DictReader(file)}


def test_whole_split_scores_as_the_run_did(evaluated):
    workdir, summary, metrics = evaluated
    assert metrics['standard']['n'] == summary['test']['n'] == 24
    assert metrics['standard']['accuracy'] == pytest.approx(summary['test']['accuracy'])
    assert metrics['standard']['negative_log_likelihood'] == pytest.approx(summary['test']['loss'], rel=1e-4)
    assert metrics['calibration']['negative_log_likelihood'] == pytest.approx(summary['validation']['loss'], rel=1e-4)
    assert metrics['hashes']['config_sha256'] == summary['config_sha256']
    assert metrics['hashes']['split_sha256'] == summary['split_sha256']
    assert json.loads((workdir / 'out/metrics.json').read_text()) == metrics


def test_what_was_planted_is_found(evaluated, data):
    workdir, _, metrics = evaluated
    _, copy, of_patient = data
    rows = read_predictions(workdir / 'out')
    assert rows[copy]['part'] == 'copied'
    assert rows[of_patient]['part'] == 'seen_patient' and rows[of_patient]['patient'] == 'p1'
    assert metrics['copies']['mirrored_or_turned'] >= 1
    assert metrics['copied']['n'] + metrics['seen_patient']['n'] + metrics['unseen']['n'] == len(rows) == 24
    assert metrics['patients']['n'] == metrics['patients']['seen'] == 1


def test_temperature_is_that_of_validation(evaluated):
    workdir, _, metrics = evaluated
    stored = json.loads((workdir / 'calibration.json').read_text())
    temperature = stored['temperature']
    assert stored['fitted_on'] == 'validation' and temperature > 0
    # At the fitted temperature validation is likelier than at its neighbours.
    run = finished_run.load_run(workdir)
    logits, labels = finished_run.predict(run, 'validation').astype(np.float64), run.dataset.validation.labels
    losses = [
        -special.log_softmax(logits / t, axis=1)[np.arange(len(labels)), labels].mean()
        for t in (temperature, 0.98 * temperature, 1.02 * temperature)
    ]
    assert losses[0] == min(losses)
    row = next(iter(read_predictions(workdir / 'out').values()))
    probabilities, calibrated = (
        np.array([float(row[f'{prefix}_{name}']) for name in metrics['class_names']])
        for prefix in ('probability', 'calibrated')
    )
    np.testing.assert_allclose(special.softmax(np.log(probabilities) / temperature), calibrated, rtol=1e-6)


def test_comparison_with_itself(evaluated):
    comparison = evaluated[2]['comparison']
    assert comparison['n'] == comparison['of'] == 24
    row = comparison['parts']['standard']
    assert row['difference'] == 0 and row['p_value'] == 1 and row['difference_interval'] is None


def test_tensorboard_shows_the_figures(evaluated):
    workdir, summary, _ = evaluated
    events = event_accumulator.EventAccumulator(str(workdir), {event_accumulator.TENSORS: 0})
    events.Reload()
    tags = events.Tags()['tensors']
    assert {'evaluation_test/reliability', 'evaluation_test/confusion_standard', 'evaluation_test/errors'} <= set(tags)
    assert events.Tensors('evaluation_test/standard/accuracy')[0].step == summary['best_step']


def test_validation_has_its_own_folder_and_no_card(evaluated, tmp_path):
    workdir = evaluated[0]
    card = (workdir / 'MODEL_CARD.md').read_text()
    metrics = evaluate.evaluate_run(workdir, tmp_path / 'out', split='validation')
    assert metrics['split'] == 'validation' and metrics['standard']['n'] == metrics['calibration']['n']
    assert metrics['standard']['ece_calibrated'] == metrics['calibration']['ece_calibrated']
    assert metrics['seen_patient']['n'] == 0  # no group on both sides
    assert (workdir / 'MODEL_CARD.md').read_text() == card
    assert 'their scores flatter' in (tmp_path / 'out/report.html').read_text()


def test_other_images_than_those_of_the_run(evaluated, data, tmp_path):
    workdir = evaluated[0]
    shutil.copytree(data[0]['data_dir'], tmp_path / 'data')
    next((tmp_path / 'data/Training/glioma').iterdir()).unlink()
    before = {name: (workdir / name).read_text() for name in ('calibration.json', 'MODEL_CARD.md')}
    metrics = evaluate.evaluate_run(workdir, tmp_path / 'out', data_dir=str(tmp_path / 'data'), groups='')
    assert metrics['calibration']['temperature'] is None and metrics['standard']['ece_calibrated'] is None
    assert metrics['calibration']['note'] in (tmp_path / 'out/report.html').read_text()
    assert {name: (workdir / name).read_text() for name in before} == before


def test_grouped_fold_without_validation(data, tmp_path):
    make_run(data[0], tmp_path / 'run', split='grouped', folds=4, fold=1, validation_fraction=0.0)
    metrics = evaluate.evaluate_run(tmp_path / 'run', tmp_path / 'out')
    assert metrics['grouped']['n'] == metrics['data']['test']['n'] and 'standard' not in metrics
    assert metrics['grouped']['ece'] is not None and metrics['grouped']['ece_calibrated'] is None
    assert metrics['calibration']['temperature'] is None and metrics['selective']['thresholds'] == []
    assert metrics['seen_patient']['n'] == 0
    with pytest.raises(InputError, match='kept no validation images'):
        evaluate.evaluate_run(tmp_path / 'run', tmp_path / 'validation', split='validation')
    assert not (tmp_path / 'validation').exists()


def test_eight_devices_give_the_same(evaluated, tmp_path):
    workdir, _, metrics = evaluated
    command = [sys.executable, REPOSITORY / 'scripts/evaluate.py', '--workdir', workdir, '--output', tmp_path]
    environment = {'PYTHONPATH': str(REPOSITORY), 'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / 'metrics.json').read_text())
    for name in ('accuracy', 'accuracy_interval_by_group', 'macro_f1', 'roc_auc', 'ece', 'ece_calibrated'):
        assert found['standard'][name] == pytest.approx(metrics['standard'][name], abs=1e-4)
    for path, row in read_predictions(tmp_path).items():
        expected = read_predictions(workdir / 'out')[path]
        assert row['predicted'] == expected['predicted'] and row['part'] == expected['part']
        for name in metrics['class_names']:
            assert float(row[f'probability_{name}']) == pytest.approx(float(expected[f'probability_{name}']), abs=1e-4)


def test_bad_input_leaves_nothing(evaluated, tmp_path):
    workdir = evaluated[0]
    (tmp_path / 'file').write_text('')
    for output, changes, message in (
        ('out', {'wanted_errors': (2.0,)}, 'wanted_error is 2'),
        ('out', {'data_dir': '/nowhere'}, '/nowhere'),
        ('file', {}, 'is a file: give a folder'),
    ):
        with pytest.raises(InputError, match=message):
            evaluate.evaluate_run(workdir, tmp_path / output, **changes)
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_command_line_tells_in_one_line_what_is_wrong(tmp_path):
    command = [sys.executable, REPOSITORY / 'scripts/evaluate.py', '--workdir', tmp_path]
    environment = os.environ | {'PYTHONPATH': str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith('error: ') and 'run.json' in line]
