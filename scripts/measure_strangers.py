"""Measures how well a run notices images that it was not made for.

    pip install scikit-image==0.26.0 -r requirements-serve.txt
    python scripts/measure_strangers.py --workdir runs/finetune --output strangers

Writes strangers.json and strangers.md: for each set of images the area under the ROC curve that parts it from the test
images, by two distances, and the share that the run takes for strangers. See `brain_jax/evaluation/strangers.py`.
"""

import json
import os
import pathlib
import sys

# TensorFlow reads these on import. It only reads data here, and has nothing to tell about that.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')

import numpy as np
import tensorflow as tf
from absl import app, flags, logging

from brain_jax import InputError, files, finished_run
from brain_jax.evaluation import out_of_distribution, strangers
from brain_jax.serving import predictor

_WORKDIR = flags.DEFINE_string('workdir', None, "The run's folder, evaluated.", required=True)
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'The data folder, where it is no longer that of the run.')
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write.', required=True)
_CHANGED = flags.DEFINE_integer('changed', 200, 'How many validation images are turned, inverted, blurred and cut.')


def measure(workdir, data_dir):
    """Returns {distance: {'false_alarms': share of test images, set: scores}}."""
    loaded = predictor.Predictor.from_workdir(workdir)
    if loaded.detector is None:
        raise InputError(f'{workdir} kept no validation images, and so has no threshold')
    run = finished_run.load_run(workdir, data_dir)
    pooled = finished_run.pooled_features(run)
    train, validation, test = (pooled[getattr(run.dataset, name).index] for name in ('train', 'validation', 'test'))
    own = run.dataset.validation
    chosen = np.random.default_rng(0).permutation(own.index)[: _CHANGED.value]
    sets = strangers.make_sets([own.images[i] for i in chosen])
    seen = {name: loaded.answer(loaded.preprocess(pictures))[1] for name, pictures in sets.items()}
    found = {}
    for name, distances in (
        ('principal components', lambda x: out_of_distribution.distances(loaded.detector, x)),
        ('10 nearest neighbours', lambda x: strangers.nearest_distances(train, x)),
    ):
        threshold = np.quantile(distances(validation), 1 - out_of_distribution.FALSE_ALARMS)
        known = distances(test)
        found[name] = {'false_alarms': float(np.mean(known > threshold))} | strangers.score_sets(
            known, {key: distances(x) for key, x in seen.items()}, threshold
        )
    return found


def format_markdown(found):
    """Returns what was found as a table."""
    lines = ['| images | n |', '|---|---|']
    for name in found:
        lines[0] += f' AUROC, {name} | noticed |'
        lines[1] += '---|---|'
    first = next(iter(found.values()))
    for key in [key for key in first if key != 'false_alarms']:
        cells = [f'{rows[key]["auroc"]:.3f} | {100 * rows[key]["caught"]:.0f} %' for rows in found.values()]
        lines.append(f'| {key} | {first[key]["n"]} | {" | ".join(cells)} |')
    alarms = ' | '.join(f' | {100 * rows["false_alarms"]:.1f} %' for rows in found.values())
    lines.append(f'| test images: false alarms | | {alarms} |')
    return '\n'.join(lines) + '\n'


def run(argv):
    if len(argv) > 1:
        sys.exit(f'error: unexpected arguments: {" ".join(argv[1:])}')
    tf.config.set_visible_devices([], 'GPU')  # else TensorFlow takes the memory that JAX needs
    logging.set_verbosity(logging.WARNING)
    try:
        found = measure(pathlib.Path(_WORKDIR.value), _DATA_DIR.value)
        files.write_whole(pathlib.Path(_OUTPUT.value, 'strangers.json'), json.dumps(found, indent=2) + '\n')
        files.write_whole(pathlib.Path(_OUTPUT.value, 'strangers.md'), format_markdown(found))
    except InputError as error:
        sys.exit(f'error: {error}')
    print(format_markdown(found))


if __name__ == '__main__':
    app.run(run)
