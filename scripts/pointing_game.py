"""Measures whether explanations point at the lesion, on generated heads whose lesions are known.

    python scripts/pointing_game.py --workdir runs/demo --output pointing_game

The run is one of mode demo, evaluated. Writes pointing_game.json, pointing_game.md and pointing_game.png. See
`brain_jax/evaluation/pointing_game.py`.
"""

import json
import os
import pathlib
import sys

# TensorFlow reads these on import. It only reads data here, and has nothing to tell about that.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')

import tensorflow as tf
from absl import app, flags, logging

from brain_jax import InputError, files
from brain_jax.evaluation import figures, pointing_game
from brain_jax.serving import predictor

_WORKDIR = flags.DEFINE_string('workdir', None, "The run's folder, evaluated.", required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write.', required=True)
_IMAGES_PER_CLASS = flags.DEFINE_integer('images_per_class', 100, 'Heads of each class with a lesion.', lower_bound=2)
_SEED = flags.DEFINE_integer('seed', 0, 'Equal seeds give equal heads.', lower_bound=0)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    tf.config.set_visible_devices([], 'GPU')  # else TensorFlow takes the memory that JAX needs
    logging.set_verbosity(logging.WARNING)
    output = pathlib.Path(_OUTPUT.value)
    try:
        loaded = predictor.Predictor.from_workdir(_WORKDIR.value)
        found, gallery = pointing_game.play(loaded, _IMAGES_PER_CLASS.value, seed=_SEED.value)
        table = pointing_game.format_markdown(found)
        files.write_whole(output / 'pointing_game.png', figures.to_png(gallery))
        files.write_whole(output / 'pointing_game.md', table)
        files.write_whole(output / 'pointing_game.json', json.dumps(found, indent=2, allow_nan=False) + '\n')
    except InputError as error:
        sys.exit(f'error: {error}')
    print(table)
    print(json.dumps(found['sanity'], indent=2))


if __name__ == '__main__':
    app.run(main)
