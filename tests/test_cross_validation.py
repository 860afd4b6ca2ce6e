"""Tests of brain_jax.evaluation.cross_validation and its script."""

import csv
import json
import pathlib
import runpy
import subprocess
import sys

import numpy as np
import pytest
from scipy import optimize, special
from sklearn import metrics

from brain_jax.data import phantom
from brain_jax.evaluation import cross_validation

REPOSITORY = pathlib.Path(__file__).parents[1]
get_config = runpy.run_path(str(REPOSITORY / 'configs/densenet121.py'))['get_config']


@pytest.fixture(scope='module')
def command(tmp_path_factory):
    """The command line of a small cross-validation, and its folder after it ran."""
    folder = tmp_path_factory.mktemp('cross_validation')
    phantom.make_phantom(folder / 'phantom', train_per_class=12, test_per_class=4, image_size=32)
    fields = {
        'data_dir': folder / 'phantom',
        'prepared_dir': folder / 'prepared',
        'model': '_DenseNetTiny',
        'pretrained': '',
        'image_size': 32,
        'batch_size': 16,
        'eval_batch_size': 16,
        'num_epochs': 40.0,
        'learning_rate': 0.01,
        'eval_every_epochs': 40.0,
        'validation_fraction': 0.25,
        'folds': 2,
    }
    arguments = [sys.executable, 'scripts/cross_validate.py', '--config', 'configs/densenet121.py:frozen']
    arguments += ['--workdir', str(folder / 'out'), '--seeds', '3,4', '--random']
    arguments += [f'--config.{name}={value}' for name, value in fields.items()]
    result = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return arguments, folder, result.stdout


def test_every_image_is_tested_once(command):
    _, folder, printed = command
    with open(folder / 'out/predictions.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    report = json.loads((folder / 'out/cross_validation.json').read_text())
    paths = sorted(path.relative_to(folder / 'phantom').as_posix() for path in (folder / 'phantom').glob('*/*/*.png'))
    for split in ('grouped', 'random'):
        summary = report['splits'][split]
        for seed in (3, 4):
            mine = [row for row in rows if (row['split'], row['seed']) == (split, str(seed))]
            assert sorted(row['path'] for row in mine) == paths
            accuracy = metrics.accuracy_score([row['label'] for row in mine], [row['predicted'] for row in mine])
            assert summary['images'][str(seed)]['accuracy'] == pytest.approx(accuracy)
            for fold in (0, 1):
                part = [row for row in mine if row['fold'] == str(fold)]
                names = report['class_names']
                probabilities = np.array([[float(row[f'probability_{name}']) for name in names] for row in part])
                assert [names[k] for k in probabilities.argmax(axis=1)] == [row['predicted'] for row in part]
                (run,) = (run for run in summary['runs'] if (run['seed'], run['fold']) == (seed, fold))
                expected = metrics.accuracy_score([row['label'] for row in part], [row['predicted'] for row in part])
                assert run['accuracy'] == pytest.approx(expected)
                expected = metrics.roc_auc_score(
                    [names.index(row['label']) for row in part],
                    probabilities / probabilities.sum(axis=1, keepdims=True),
                    multi_class='ovr',
                )
                assert run['roc_auc'] == pytest.approx(expected)
                # What the run itself measured on the same images.
                written = json.loads((folder / f'out/{split}_seed{seed}_fold{fold}/summary.json').read_text())
                assert written['test']['accuracy'] == pytest.approx(run['accuracy'])
                assert written['validation']['accuracy'] == pytest.approx(run['validation_accuracy'])
        accuracies = [run['accuracy'] for run in summary['runs']]
        assert len(set(accuracies)) > 1
        assert summary['mean']['accuracy'] == pytest.approx(np.mean(accuracies))
        assert summary['standard_deviation']['accuracy'] == pytest.approx(np.std(accuracies, ddof=1))
        assert f'{np.mean(accuracies):.4f}' in printed
    means = [np.mean([run['accuracy'] for run in report['splits'][split]['runs']]) for split in ('random', 'grouped')]
    assert report['inflation']['accuracy'] == pytest.approx(means[0] - means[1])
    assert f'accuracy {100 * (means[0] - means[1]):+.1f} points' in printed


def expected_calibration_error(probabilities, labels):
    bins = np.ceil(probabilities.max(axis=1) * 15)
    correct = probabilities.argmax(axis=1) == labels
    gaps = [abs(np.sum(correct[bins == b]) - np.sum(probabilities.max(axis=1)[bins == b])) for b in np.unique(bins)]
    return np.sum(gaps) / len(labels)


def test_calibration_by_the_other_folds(command):
    with open(command[1] / 'out/predictions.csv', newline='') as file:
        rows = [row for row in csv.DictReader(file) if (row['split'], row['seed']) == ('grouped', '3')]
    report = json.loads((command[1] / 'out/cross_validation.json').read_text())
    names, summary = report['class_names'], report['splits']['grouped']
    answers = np.array([[float(row[f'probability_{name}']) for name in names] for row in rows])
    labels, fold = np.array([names.index(row['label']) for row in rows]), np.array([int(row['fold']) for row in rows])

    def at_temperature(chosen, temperature):
        return special.softmax(np.log(answers[chosen]) / temperature, axis=1)

    def fit(chosen):
        def loss(temperature):
            return metrics.log_loss(labels[chosen], at_temperature(chosen, temperature), labels=range(len(names)))

        return optimize.brute(loss, [(0.05, 20)], Ns=200)[0]

    everything = np.ones(len(rows), bool)
    together = summary['images']['3']
    assert together['temperature'] == pytest.approx(fit(everything), rel=0.01)
    assert together['ece'] == pytest.approx(expected_calibration_error(answers, labels), abs=1e-6)
    calibrated = np.zeros_like(answers)
    for run in summary['runs'][:2]:  # those of seed 3
        assert run['seed'] == 3
        mine = fold == run['fold']
        calibrated[mine] = at_temperature(mine, fit(~mine))
        expected = expected_calibration_error(calibrated[mine], labels[mine])
        assert run['ece_cross_calibrated'] == pytest.approx(expected, abs=0.01)
    expected = expected_calibration_error(calibrated, labels)
    assert together['ece_cross_calibrated'] == pytest.approx(expected, abs=0.01)


def test_finished_runs_are_not_repeated(command):
    arguments, folder, _ = command
    summaries = sorted((folder / 'out').glob('*/summary.json'))
    assert len(summaries) == 8
    times = [path.stat().st_mtime_ns for path in summaries[1:]]
    first = json.loads(summaries[0].read_text())
    summaries[0].unlink()
    result = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert [path.stat().st_mtime_ns for path in summaries[1:]] == times
    assert json.loads(summaries[0].read_text())['test'] == first['test']
    features = list((folder / 'prepared').rglob('features_*.npy'))
    # Of the images and their mirror images, by the two random backbones that the seeds give: one set for all folds.
    assert len(features) == 4


def test_page_needs_no_other_file(command):
    page = (command[1] / 'out/report.html').read_text()
    assert '://' not in page and page.count('data:image/png') == 4


def test_page_in_chromium(command, check_in_chromium):
    check_in_chromium(command[1] / 'out/report.html')


def test_corrected_interval():
    # By hand: mean 0.9, variance 0.0001, factor 1/5 + 1/4, t(0.975, 4) = 2.776445.
    reach = 2.776445 * np.sqrt(0.45 * 0.0001)
    values = 0.9 + np.array([-0.01, -0.01, 0, 0.01, 0.01])
    assert np.var(values, ddof=1) == pytest.approx(0.0001)
    assert cross_validation.corrected_interval(values, 0.25) == pytest.approx([0.9 - reach, 0.9 + reach], abs=1e-6)
    assert cross_validation.corrected_interval([0.9], 0.25) is None


def test_bad_seeds(command):
    arguments = [*command[0], '--seeds', '1,x']
    result = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1] == 'error: --seeds is 1,x: give whole numbers, such as 0,1,2'
