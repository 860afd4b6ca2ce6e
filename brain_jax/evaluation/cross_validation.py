"""Cross-validation: every image is tested once, by a network that saw nothing of its group."""

import csv
import io
import itertools
import pathlib
import typing

import numpy as np
from absl import logging
from scipy import special, stats

from brain_jax import InputError, features, files, finished_run, parallel, train
from brain_jax.data import pipeline
from brain_jax.evaluation import evaluate, figures, report, scores

TITLES = {
    'validation_accuracy': 'accuracy on validation',
    'accuracy': 'accuracy',
    'macro_f1': 'F1, macro',
    'roc_auc': 'ROC-AUC, macro',
    'ece': 'expected calibration error',
    'ece_calibrated': 'ECE, temperature of validation',
    'ece_cross_calibrated': 'ECE, temperature of other folds',
}
SCORES = tuple(TITLES)


class Fold(typing.NamedTuple):
    """One part of the images, tested by a run that did not learn from it.

    Attributes:
      split: 'grouped' or 'random'.
      seed: of the split and of the training.
      fold: which part.
      examples: its `pipeline.Examples`, n of them.
      num_seen: number of images that the run learned from or was chosen by.
      validation_accuracy: of the chosen checkpoint, on images that the run did not learn from, and that are not of this
        part: what to choose a recipe by. None without validation.
      logits: float64 [n, classes].
      temperature: that validation gave; None without one.
      hashes: of checkpoint, configuration and split.
    """

    split: str
    seed: int
    fold: int
    examples: typing.Any
    num_seen: int
    validation_accuracy: float | None
    logits: np.ndarray
    temperature: float | None
    hashes: dict

    @property
    def probabilities(self):
        """What the network answers, float64 [n, classes]."""
        return special.softmax(self.logits, axis=1)


def cross_validate(config, output, *, seeds=(0,), splits=('grouped',)):
    """Trains and tests a network on every fold, and reports the scores over all of them.

    A run that is finished is not repeated, and one that was stopped goes on. Written are a folder a run, and
    predictions.csv, cross_validation.json and report.html.

    Args:
      config: the configuration of each run; its split, fold and seed are replaced.
      output: the folder to write.
      seeds: integers; each draws other folds, and trains with other random numbers.
      splits: 'grouped', and 'random' for what a split that ignores groups would tell.

    Returns:
      The content of cross_validation.json, a dictionary.

    Raises:
      InputError: for configurations and data that cannot be used, and an output that cannot be written.
    """
    output = pathlib.Path(output)
    if output.exists() and not output.is_dir():
        raise InputError(f'the output {output} is a file: give a folder')
    images = train.load_images(config, output)
    folds, pooled = [], {}
    runs = list(itertools.product(splits, seeds, range(config.folds)))
    for number, (split, seed, fold) in enumerate(runs, 1):
        workdir = output / f'{split}_seed{seed}_fold{fold}'
        logging.info('run %d of %d: %s', number, len(runs), workdir)
        fold_config = config.copy_and_resolve_references()
        fold_config.update({'split': split, 'seed': seed, 'fold': fold})
        train.train_and_evaluate(fold_config.lock(), workdir, images)
        if config.mode == 'frozen' and seed not in pooled:  # without pretrained weights the backbone depends on it
            pooled[seed] = load_features(fold_config, images)
        folds.append(test_fold(workdir, images, pooled.get(seed)))
    result = {
        'class_names': list(images.class_names),
        'mode': config.mode,
        'dataset': images.name,
        'folds': config.folds,
        'seeds': list(seeds),
        'splits': {
            split: summarize([fold for fold in folds if fold.split == split], images.class_names) for split in splits
        },
    }
    both = {'random', 'grouped'} <= set(splits)
    result['inflation'] = measure_inflation(result['splits']['random'], result['splits']['grouped']) if both else None
    write_report(result, folds, output)
    return result


def measure_inflation(random, grouped):
    """Returns by how much random folds flatter, for each of `SCORES`: their mean less that of grouped folds."""
    means = {name: (random['mean'][name], grouped['mean'][name]) for name in SCORES}
    return {name: None if None in pair else pair[0] - pair[1] for name, pair in means.items()}


def load_features(config, images):
    """Returns the backbone's features of all images: the runs find them beside the prepared records."""
    mesh = parallel.make_mesh()
    dataset = pipeline.split_images(images, config)
    model = train.create_model(config, len(images.class_names))
    state, _, _ = train.create_train_state(config, model, mesh, total_steps=1, steps_per_epoch=1.0)
    return features.load_features(dataset, model, state.params, state.batch_stats, config, mesh)


def test_fold(workdir, images, pooled):
    """Returns the `Fold` of a finished run."""
    run = finished_run.load_run(workdir, images=images, pooled=pooled)
    logits = finished_run.predict(run, 'test').astype(np.float64)
    temperature, validation_accuracy = None, None
    if run.dataset.validation is not None:
        labels, answers = run.dataset.validation.labels, finished_run.predict(run, 'validation')
        temperature = scores.fit_temperature(answers, labels)
        validation_accuracy = float(np.mean(answers.argmax(axis=1) == labels))
    return Fold(
        split=run.config.split,
        seed=run.config.seed,
        fold=run.config.fold,
        examples=run.dataset.test,
        num_seen=len(images.examples) - len(run.dataset.test),
        validation_accuracy=validation_accuracy,
        logits=logits,
        temperature=temperature,
        hashes=evaluate.describe_run(run, 'test')['hashes'],
    )


def summarize(folds, class_names):
    """Scores the folds of one kind of split.

    Args:
      folds: list of `Fold`, of one split.
      class_names: str [classes].

    Returns:
      A dictionary: `runs`, the `SCORES` of each fold; `mean`, `standard_deviation` and `interval` of each score over
      them; `images`, the scores of all images of a seed together, each by the run that did not see it, a dictionary by
      seed, with their `temperature`, that of `fit_on_folds`.
    """
    runs, temperatures = [], {}
    for fold in folds:
        found = scores.score_predictions(fold.probabilities, fold.examples.labels, fold.examples.groups, class_names)
        others = [other for other in folds if other.seed == fold.seed and other.fold != fold.fold]
        found['validation_accuracy'] = fold.validation_accuracy
        found['ece'] = calibration_error([fold], [1.0])
        found['ece_calibrated'] = calibration_error([fold], [fold.temperature])
        temperatures[fold.seed, fold.fold] = fit_on_folds(others)
        found['ece_cross_calibrated'] = calibration_error([fold], [temperatures[fold.seed, fold.fold]])
        runs.append(
            {'seed': fold.seed, 'fold': fold.fold, 'n': len(fold.examples), 'groups': found['groups']}
            | {name: found[name] for name in SCORES}
            | {'hashes': fold.hashes}
        )
    summary = {'runs': runs, 'mean': {}, 'standard_deviation': {}, 'interval': {}, 'images': {}}
    ratio = np.mean([len(fold.examples) / fold.num_seen for fold in folds])
    for name in SCORES:
        values = [run[name] for run in runs]
        exists = None not in values
        summary['mean'][name] = float(np.mean(values)) if exists else None
        summary['standard_deviation'][name] = float(np.std(values, ddof=1)) if exists and len(values) > 1 else None
        summary['interval'][name] = corrected_interval(values, ratio) if exists else None
    for seed in dict.fromkeys(fold.seed for fold in folds):
        mine = [fold for fold in folds if fold.seed == seed]
        probabilities, labels, groups = (
            np.concatenate(parts)
            for parts in zip(
                *[(fold.probabilities, fold.examples.labels, fold.examples.groups) for fold in mine], strict=True
            )
        )
        summary['images'][str(seed)] = {
            **scores.score_predictions(probabilities, labels, groups, class_names),
            'ece': calibration_error(mine, [1.0] * len(mine)),
            'ece_calibrated': calibration_error(mine, [fold.temperature for fold in mine]),
            'ece_cross_calibrated': calibration_error(mine, [temperatures[fold.seed, fold.fold] for fold in mine]),
            'temperature': fit_on_folds(mine),
        }
    return summary


def fit_on_folds(folds):
    """Returns the temperature that suits the answers of several folds, each by the network that did not see its images.

    A validation part has few groups, and its temperature scatters; all other folds together have many. Their networks
    did learn from the fold that the temperature is then used on, but hand over one number only.
    """
    logits, labels = (
        np.concatenate(parts) for parts in zip(*[(fold.logits, fold.examples.labels) for fold in folds], strict=True)
    )
    return scores.fit_temperature(logits, labels)


def calibration_error(folds, temperatures):
    """Returns the expected calibration error of folds together, each at its temperature; None where one has none."""
    if None in temperatures:
        return None
    probabilities = [special.softmax(fold.logits / t, axis=1) for fold, t in zip(folds, temperatures, strict=True)]
    labels = [fold.examples.labels for fold in folds]
    return scores.score_calibration(np.concatenate(probabilities), np.concatenate(labels))['ece']


def corrected_interval(values, ratio):
    """Returns the 95 % interval of the mean of a score over folds.

    Folds share most of their training images, so their scores vary less than independent ones would: the variance is
    corrected as Nadeau and Bengio (2003) do, `(1 / folds + test images / training images)` times that of the scores.

    Args:
      values: float [runs], folds of one or several seeds.
      ratio: test images over training images of a run.

    Returns:
      Its two ends, or None for less than two values.
    """
    count = len(values)
    if count < 2:
        return None
    deviation = np.sqrt((1 / count + ratio) * np.var(values, ddof=1))
    reach = stats.t.ppf(0.975, count - 1) * deviation
    return [float(np.mean(values) - reach), float(np.mean(values) + reach)]


def format_predictions(folds, class_names):
    """Returns the content of predictions.csv: a row an image, split and seed."""
    rows = []
    for fold in folds:
        for i, probabilities in enumerate(fold.probabilities):
            rows.append(
                {
                    'path': fold.examples.file_names[i],
                    'split': fold.split,
                    'seed': fold.seed,
                    'fold': fold.fold,
                    'label': class_names[fold.examples.labels[i]],
                    'predicted': class_names[probabilities.argmax()],
                }
                | {f'probability_{name}': value for name, value in zip(class_names, probabilities, strict=True)}
                | {'group': fold.examples.groups[i], 'patient': fold.examples.patients[i]}
                | {f'{name}_sha256': fold.hashes[f'{name}_sha256'] for name in ('checkpoint', 'config', 'split')}
            )
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def write_report(result, folds, output):
    """Writes predictions.csv, cross_validation.json and report.html."""
    class_names = result['class_names']
    pictures = {}
    for split, summary in result['splits'].items():
        for seed, found in summary['images'].items():
            title = f'{split}, seed {seed}: {found["n"]:,} images'
            pixels = figures.draw_confusion(found['confusion'], class_names, title, f'{result["dataset"]}')
            pictures[split, seed] = figures.to_data_uri(figures.to_png(pixels))
    page = (
        report.environment()
        .get_template('cross_validation.html')
        .render(result=result, pictures=pictures, titles=TITLES)
    )
    files.write_whole(output / 'predictions.csv', format_predictions(folds, class_names))
    files.write_whole(output / 'cross_validation.json', report.format_json(result))
    files.write_whole(output / 'report.html', page)


def format_summary(result):
    """Returns the scores as lines for a terminal."""
    lines = []
    for split, summary in result['splits'].items():
        lines.append(f'{split}, {result["folds"]} folds, {len(result["seeds"])} seeds:')
        for name in SCORES:
            mean, deviation = summary['mean'][name], summary['standard_deviation'][name]
            if mean is None:
                lines.append(f'  {TITLES[name]:32} not defined in every fold')
                continue
            interval = summary['interval'][name]
            lines.append(
                f'  {TITLES[name]:32} {mean:.4f} +- {deviation:.4f}   95 % [{interval[0]:.4f}, {interval[1]:.4f}]'
            )
    if result['inflation'] is not None:
        lines.append(f'random folds flatter: accuracy {100 * result["inflation"]["accuracy"]:+.1f} points')
    return '\n'.join(lines)
