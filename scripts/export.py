"""Exports a run for other runtimes, and proves on all its test images that the export answers as the run does.

python scripts/export.py --workdir runs/first --format onnx
python scripts/export.py --workdir runs/first --format keras --output first.keras
"""

import os
import sys

# TensorFlow and Keras read these on import.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')
os.environ['KERAS_BACKEND'] = 'tensorflow'

import tensorflow as tf
from absl import app, flags, logging

from brain_jax import InputError
from brain_jax.serving import export, runtimes

_WORKDIR = flags.DEFINE_string('workdir', None, "The run's folder, evaluated by scripts/evaluate.py.", required=True)
_FORMAT = flags.DEFINE_enum('format', None, list(export.SUFFIXES), 'What to export to.', required=True)
_OUTPUT = flags.DEFINE_string(
    'output', None, 'File to write, for saved_model the folder. Default: exports/model.FORMAT in the workdir.'
)
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'The data folder, where it is no longer that of the run.')
_GROUPS = flags.DEFINE_string('groups', None, "Another group table than the run's; empty for none.")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    tf.config.set_visible_devices([], 'GPU')  # else TensorFlow takes the memory that JAX needs
    logging.set_verbosity(logging.WARNING)
    try:
        output, record = export.export_run(
            _WORKDIR.value, _FORMAT.value, _OUTPUT.value, data_dir=_DATA_DIR.value, groups=_GROUPS.value
        )
    except InputError as error:
        sys.exit(f'error: {error}')
    print(f'wrote {output} and {runtimes.record_path(output).name}')
    for runtime, proof in record['runtimes'].items():
        print(f'{runtime}: {runtimes.describe(proof)}{"" if proof["accepted"] else "; too far off to be served"}')


if __name__ == '__main__':
    app.run(main)
