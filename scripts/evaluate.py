"""Scores a finished run: intervals, calibration, what leaks, errors; in tables, figures, one page and a model card.

python scripts/evaluate.py --workdir runs/first
python scripts/evaluate.py --workdir runs/first --compare runs/second --wanted_error 0.02
"""

import os
import sys

# TensorFlow reads these on import. It only reads data and writes logs here, and has nothing to tell about that.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')

import tensorflow as tf
from absl import app, flags, logging

from brain_jax import InputError
from brain_jax.evaluation import evaluate, out_of_distribution, wording

_WORKDIR = flags.DEFINE_string('workdir', None, "The run's folder.", required=True)
_SPLIT = flags.DEFINE_enum('split', 'test', ['test', 'validation'], 'Which images to score.')
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'The data folder, where it is no longer that of the run.')
_GROUPS = flags.DEFINE_string('groups', None, "Another group table than the run's; empty for none.")
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write. Default: evaluation_SPLIT in the workdir.')
_COMPARE = flags.DEFINE_string('compare', None, 'Folder of another run, to compare with on the same images.')
_WANTED_ERROR = flags.DEFINE_multi_float(
    'wanted_error',
    list(evaluate.WANTED_ERRORS),
    'Share of wrong answers for which to find the confidence to answer from.',
)
_FALSE_ALARMS = flags.DEFINE_float(
    'false_alarms', out_of_distribution.FALSE_ALARMS, 'Share of images that may be taken for no image of this kind.'
)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    tf.config.set_visible_devices([], 'GPU')  # else TensorFlow takes the memory that JAX needs
    logging.set_verbosity(logging.WARNING)
    output = _OUTPUT.value or os.path.join(_WORKDIR.value, f'evaluation_{_SPLIT.value}')
    try:
        metrics = evaluate.evaluate_run(
            _WORKDIR.value,
            output,
            split=_SPLIT.value,
            data_dir=_DATA_DIR.value,
            groups=_GROUPS.value,
            other_workdir=_COMPARE.value,
            wanted_errors=_WANTED_ERROR.value,
            false_alarms=_FALSE_ALARMS.value,
        )
    except InputError as error:
        sys.exit(f'error: {error}')
    print(wording.summarize(metrics))
    print(f'See {os.path.join(output, "report.html")}')


if __name__ == '__main__':
    app.run(main)
