"""The evaluation of a run: what it predicts, and its scores on every part of a split by what it has seen before."""

import collections.abc
import pathlib
import typing

import ml_collections
import numpy as np
from scipy import special

from brain_jax import InputError, finished_run, run_folder
from brain_jax.data import leakage, pipeline
from brain_jax.evaluation import out_of_distribution, report, scores

WANTED_ERRORS = (0.01, 0.02, 0.05)  # shares of wrong answers among those given


class Predictions(typing.NamedTuple):
    """What a classifier says of some images.

    Attributes:
      class_names: str [classes].
      examples: `pipeline.Examples`, n of them.
      probabilities: float64 [n, classes], as the network gives them.
      calibrated: float64 [n, classes], the same at the fitted temperature; None without one.
      parts: {name: bool [n]}, the whole first.
      nearest: int [n], the class that the nearest training image on tiny pixels has.
      matches: `leakage.Matches` of each image among the images of training and validation.
    """

    class_names: tuple[str, ...]
    examples: pipeline.Examples
    probabilities: np.ndarray
    calibrated: np.ndarray | None
    parts: dict[str, np.ndarray]
    nearest: np.ndarray
    matches: leakage.Matches

    @property
    def best(self):
        """The probabilities to act upon."""
        return self.probabilities if self.calibrated is None else self.calibrated

    @property
    def predicted(self):
        """The most probable class, int [n]."""
        return self.probabilities.argmax(axis=1)

    @property
    def correct(self):
        """Whether that is the true one, bool [n]."""
        return self.predicted == self.examples.labels


class _Pictures(collections.abc.Sequence):
    """The images of several `Examples`, one after the other, each read when it is asked for."""

    def __init__(self, *parts):
        self._places = [(examples.images, i) for examples in parts for i in examples.index]

    def __len__(self):
        return len(self._places)

    def __getitem__(self, i):
        source, index = self._places[i]
        return source[index]


def evaluate_run(
    workdir,
    output,
    *,
    split='test',
    data_dir=None,
    groups=None,
    other_workdir=None,
    wanted_errors=WANTED_ERRORS,
    false_alarms=out_of_distribution.FALSE_ALARMS,
):
    """Evaluates the best checkpoint of a run and writes all that is known about it.

    Written are, in `output`, metrics.json, predictions.csv, calibration.json, figures and report.html; in the workdir,
    where the images and their split are those of the training, calibration.json, out_of_distribution.npz, TensorBoard
    summaries and, for the test split, MODEL_CARD.md.

    Args:
      workdir: the run's folder.
      output: the folder to write.
      split: 'test' or 'validation'.
      data_dir: where the images are now; None: where the run found them.
      groups: another group table, '' for none; None: that of the run.
      other_workdir: a run to compare with on the images that both have in this split, or None.
      wanted_errors: shares of wrong answers for which to find the confidence to answer from.
      false_alarms: share of validation images that may be taken for others than a run was made for.

    Returns:
      The content of metrics.json, a dictionary.

    Raises:
      InputError: for a workdir without a finished checkpoint, a split without images, or an output that cannot be
        written.
    """
    for wanted_error in wanted_errors:
        if not 0 < wanted_error < 1:
            raise InputError(f'wanted_error is {wanted_error:g}: give a share of wrong answers, such as 0.01')
    if not 0 < false_alarms < 1:
        raise InputError(f'false_alarms is {false_alarms:g}: give a share of images, such as 0.05')
    workdir, output = pathlib.Path(workdir), pathlib.Path(output)
    if output.exists() and not output.is_dir():
        raise InputError(f'the output {output} is a file: give a folder')
    run = finished_run.load_run(workdir, data_dir, groups)
    examples = getattr(run.dataset, split)
    if examples is None:
        raise InputError(f'the run {workdir} kept no {split} images: train with --config.validation_fraction above 0')
    logits = {
        name: finished_run.predict(run, name)
        for name in {split, 'validation'}
        if getattr(run.dataset, name) is not None
    }
    calibration = calibrate(run.dataset.validation, logits.get('validation'), wanted_errors)
    if run.dataset.split_sha256 != run.run['split_sha256']:
        # A validation part that was drawn anew holds images that the run learned from.
        calibration = calibrate(None, None, ()) | {'note': 'the images or their split are not those of the training'}
    predictions = make_predictions(run, split, logits[split], calibration['temperature'])
    comparison = None
    if other_workdir:
        comparison = compare_runs(run, predictions, split, finished_run.load_run(other_workdir, data_dir, groups))
    detector, distances = detect_strangers(run, split, false_alarms)
    metrics = describe_run(run, split) | score_run(predictions, calibration)
    metrics |= {
        'out_of_distribution': score_strangers(detector, distances, predictions.parts, false_alarms),
        'comparison': comparison,
    }
    report.write_outputs(predictions, metrics, output, workdir)
    if detector is not None:
        out_of_distribution.save(workdir, detector, run.checkpoint_sha256)
    return metrics


def detect_strangers(run, split, false_alarms):
    """Fits what tells images apart from those that the run was made for, see `out_of_distribution`.

    Returns:
      A `Detector` and the distances of the images of the split, float64 [n]; None, None without validation images of
      the training.
    """
    if run.dataset.validation is None or run.dataset.split_sha256 != run.run['split_sha256']:
        return None, None
    pooled = finished_run.pooled_features(run)
    detector = out_of_distribution.fit(
        pooled[run.dataset.train.index], pooled[run.dataset.validation.index], false_alarms
    )
    return detector, out_of_distribution.distances(detector, pooled[getattr(run.dataset, split).index])


def score_strangers(detector, distances, parts, false_alarms):
    """Returns the share of images of each part that are taken for others than the run was made for; None without."""
    if detector is None:
        return None
    shares = {name: float(np.mean(distances[rows] > detector.threshold)) for name, rows in parts.items() if rows.any()}
    return {'wanted_false_alarms': false_alarms, 'threshold': detector.threshold, 'false_alarms': shares}


def calibrate(examples, logits, wanted_errors):
    """Fits what is fitted on validation images: the temperature, and the confidence to answer from.

    Args:
      examples: `pipeline.Examples` of validation; None where there is none.
      logits: float [n, classes], of the network for them.
      wanted_errors: shares of wrong answers.

    Returns:
      A dictionary, the content of calibration.json but for its hashes.
    """
    found = {'fitted_on': None, 'n': 0, 'groups': 0, 'temperature': None, 'note': None, 'thresholds': []}
    names = [f'{name}{suffix}' for name in scores.CALIBRATION_SCORES for suffix in ('', '_calibrated')]
    if examples is None:
        return found | dict.fromkeys(names) | {'note': 'the run kept no validation images to fit a temperature on'}
    temperature = scores.fit_temperature(logits, examples.labels)
    if temperature is None:
        found['note'] = 'no validation image is wrong, so that the sharpest temperature would always be the likeliest'
    before = special.softmax(np.asarray(logits, np.float64), axis=1)
    after = special.softmax(np.asarray(logits, np.float64) / (temperature or 1), axis=1)
    correct = logits.argmax(axis=1) == examples.labels
    confidence = after.max(axis=1)
    return found | {
        'fitted_on': 'validation',
        'n': len(examples),
        'groups': len(np.unique(examples.groups)),
        'temperature': temperature,
        **_score_calibration(before, None if temperature is None else after, examples.labels),
        'thresholds': [scores.find_threshold(confidence, correct, examples.groups, error) for error in wanted_errors],
    }


def _score_calibration(probabilities, calibrated, labels):
    """Returns the calibration scores before and, with the suffix _calibrated, after temperature scaling."""
    before = scores.score_calibration(probabilities, labels)
    after = dict.fromkeys(before) if calibrated is None else scores.score_calibration(calibrated, labels)
    return before | {f'{name}_calibrated': value for name, value in after.items()}


def make_predictions(run, split, logits, temperature):
    """Returns the `Predictions` of a run for a split, sorted into parts by what the run has seen before."""
    examples = getattr(run.dataset, split)
    seen = [run.dataset.train]
    if split == 'test' and run.dataset.validation is not None:
        seen.append(run.dataset.validation)  # the checkpoint was chosen by it
    labels, groups, patients = (
        np.concatenate([getattr(part, name) for part in seen]) for name in ('labels', 'groups', 'patients')
    )
    pictures, seen_pictures = _Pictures(examples), _Pictures(*seen)
    thumbnails, seen_thumbnails = leakage.thumbnails(pictures), leakage.thumbnails(seen_pictures)
    matches = leakage.best_matches(thumbnails, seen_thumbnails)
    copied = matches.correlation >= leakage.NEAR_COPY
    copied[leakage.aligned_pairs(thumbnails, matches, seen_thumbnails).first] = True
    known = np.isin(examples.groups, groups) | ((examples.patients != '') & np.isin(examples.patients, patients))
    logits = np.asarray(logits, np.float64)
    return Predictions(
        class_names=run.dataset.class_names,
        examples=examples,
        probabilities=scores.check_probabilities(special.softmax(logits, axis=1)),
        calibrated=None if temperature is None else special.softmax(logits / temperature, axis=1),
        parts={
            run.config.split: np.ones(len(examples), bool),
            'copied': copied,
            'seen_patient': known & ~copied,
            'unseen': ~known & ~copied,
        },
        nearest=leakage.nearest_pixels(seen_pictures, labels, pictures),
        matches=matches,
    )


def describe_run(run, split):
    """Returns what was evaluated: names, hashes, and the numbers of images, groups and patients of each split."""
    config = ml_collections.ConfigDict(run.run['config'])  # as trained, wherever the data are now
    data = {}
    for name in ('train', 'validation', 'test'):
        examples = getattr(run.dataset, name)
        if examples is not None:
            counts = np.bincount(examples.labels, minlength=len(run.dataset.class_names)).tolist()
            data[name] = {
                'n': len(examples),
                'groups': len(np.unique(examples.groups)),
                'patients': len(set(examples.patients) - {''}),
                'images_of_known_patients': int(np.sum(examples.patients != '')),
                'classes': dict(zip(run.dataset.class_names, counts, strict=True)),
            }
    return {
        'workdir': run.workdir.resolve().name,
        'split': split,
        'protocol': run.config.split,
        'fold': None if run.config.split == 'standard' else run.config.fold,
        'folds': None if run.config.split == 'standard' else run.config.folds,
        'model': run.config.model,
        'mode': run.config.mode,
        'step': int(run.step),
        'image_size': run.config.image_size,
        'dataset': run.run['dataset'],
        'class_names': list(run.dataset.class_names),
        'data': data,
        'as_trained': run.dataset.split_sha256 == run.run['split_sha256'],
        'hashes': {
            'checkpoint_sha256': run.checkpoint_sha256,
            'config_sha256': run_folder.config_hash(config),
            'split_sha256': run.dataset.split_sha256,
            'weights_sha256': run.run['weights_sha256'],
        },
        'versions': run.run['versions'],
    }


def score_run(predictions, calibration):
    """Returns the scores of every part, of patients, of calibration and of selective prediction."""
    turned = predictions.parts['copied'] & (predictions.matches.orientation != 0)
    return {
        **{name: score_part(predictions, rows) for name, rows in predictions.parts.items()},
        'copies': {
            'threshold': leakage.NEAR_COPY,
            'count': int(predictions.parts['copied'].sum()),
            'mirrored_or_turned': int(turned.sum()),
        },
        'patients': score_patients(predictions),
        'calibration': calibration,
        'selective': score_selective(predictions, calibration['thresholds']),
    }


def score_part(predictions, rows):
    """Scores some of the images: classes, calibration, tumour against none, and the nearest neighbour as the floor."""
    labels, groups = predictions.examples.labels[rows], predictions.examples.groups[rows]
    probabilities, names = predictions.probabilities[rows], predictions.class_names
    calibrated = None if predictions.calibrated is None else predictions.calibrated[rows]
    nearest = scores.score_predictions(np.eye(len(names))[predictions.nearest[rows]], labels, groups, names)
    return {
        **scores.score_predictions(probabilities, labels, groups, names),
        **_score_calibration(probabilities, calibrated, labels),
        'aurc': scores.score_selection(predictions.best[rows].max(axis=1), predictions.correct[rows]),
        'tumor': scores.score_tumor(probabilities, labels, groups, names),
        # Of hard answers there are no curves.
        'nearest_pixels': {name: nearest[name] for name in nearest if name.startswith(('n', 'accuracy', 'macro'))}
        | {'recall': {name: row['recall'] for name, row in nearest['per_class'].items()}},
    }


def score_patients(predictions):
    """Scores one answer a patient, over all images; None where no patient is known."""
    examples = predictions.examples
    names, probabilities, labels, groups, mixed = scores.combine_patients(
        predictions.best, examples.labels, examples.patients, examples.groups
    )
    if len(names) + len(mixed) == 0:
        return None
    seen = np.unique(examples.patients[predictions.parts['copied'] | predictions.parts['seen_patient']])
    wrong = np.flatnonzero(probabilities.argmax(axis=1) != labels)
    return {
        **scores.score_predictions(probabilities, labels, groups, predictions.class_names),
        'seen': int(np.isin(names, seen).sum()),
        'with_two_labels': mixed,
        'wrong': [
            {
                'patient': str(names[i]),
                'images': int(np.sum(examples.patients == names[i])),
                'wrong_images': int(np.sum((examples.patients == names[i]) & ~predictions.correct)),
                'label': predictions.class_names[labels[i]],
                'predicted': predictions.class_names[probabilities[i].argmax()],
                'probability': float(probabilities[i].max()),
            }
            for i in wrong
        ],
    }


def score_selective(predictions, thresholds):
    """Returns the risk-coverage curve at up to 100 points, its area, and what the thresholds hold on these images."""
    confidence = predictions.best.max(axis=1)
    coverage, risk = scores.risk_coverage(confidence, predictions.correct)
    points = np.unique(np.linspace(0, len(coverage) - 1, min(100, len(coverage))).astype(int))
    return {
        'aurc': scores.score_selection(confidence, predictions.correct),
        'coverage': coverage[points].tolist(),
        'risk': risk[points].tolist(),
        'thresholds': [
            found
            | {
                'parts': {
                    name: scores.score_answered(confidence[rows], predictions.correct[rows], found['threshold'])
                    for name, rows in predictions.parts.items()
                }
            }
            for found in thresholds
        ],
    }


def compare_runs(run, predictions, split, other):
    """Compares with another run on the images that both have in the split: a dictionary, by part of this run.

    Raises:
      InputError: where the other run knows other classes, or shares no image.
    """
    examples, theirs = predictions.examples, getattr(other.dataset, split)
    if other.dataset.class_names != run.dataset.class_names:
        raise InputError(f'{other.workdir} knows other classes: {", ".join(other.dataset.class_names)}')
    places = (
        {} if theirs is None else {key: i for i, key in enumerate(zip(theirs.file_names, theirs.sha256, strict=True))}
    )
    keys = zip(examples.file_names, examples.sha256, strict=True)
    pairs = [(i, places[key]) for i, key in enumerate(keys) if key in places]
    if not pairs:
        raise InputError(f'{other.workdir} shares no {split} image with {run.workdir}: nothing to compare')
    here, there = np.array(pairs).T
    other_correct = finished_run.predict(other, split)[there].argmax(axis=1) == examples.labels[here]
    correct, groups = predictions.correct[here], examples.groups[here]
    return {
        'workdir': other.workdir.resolve().name,
        'hashes': describe_run(other, split)['hashes'],
        'n': len(pairs),
        'of': len(examples),
        'parts': {
            name: scores.compare(correct[rows[here]], other_correct[rows[here]], groups[rows[here]])
            for name, rows in predictions.parts.items()
        },
    }
