"""Trains and evaluates a DenseNet on brain-MRI images.

This file is short on purpose: the logic is in `brain_jax.train`, where it can be imported and tested.
"""

import contextlib
import os
import sys

# TensorFlow reads these on import. It only reads data and writes logs here, and has nothing to tell about that.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')

import jax
import tensorflow as tf
from absl import app, flags, logging
from ml_collections import config_flags

from brain_jax import InputError, interruption, parallel, train

FLAGS = flags.FLAGS

config_flags.DEFINE_config_file('config', None, 'File and mode of the configuration.', lock_config=True)
flags.DEFINE_string('workdir', None, "The run's folder: checkpoints, logs, summary. Default: runs/MODE.")
flags.mark_flags_as_required(['config'])


def parse_flags(argv):
    """Parses the command line; ends with one line where it, or the configuration it names, is wrong."""
    try:
        arguments = FLAGS(argv)
        FLAGS.config.lock()  # a file that is not there is noticed on first use only
    except (flags.Error, AttributeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1].strip()  # above it may stand a stack trace
        if isinstance(error, AttributeError):  # of ml_collections, around a KeyError
            reason = f'the configuration has no field {" ".join(str(error.args[0].args[0]).split())}'
        sys.exit(f'error: {reason}')
    return arguments


def is_worth_reading(record):
    """Tells whether a log record is for the user: libraries tell much about their inner life."""
    chatty = ('/orbax/', '/clu/platform/', '/jax/_src/')
    # Not every checkpoint is one that was validated; and what goes to TensorBoard need not be announced.
    if record.getMessage().startswith('Requested `tracked_metric`') or str(record.msg).startswith('[%d]%s Got '):
        return False
    # What fails in their threads is raised, too, and told in one line; here it has a stack trace for every array.
    if record.levelno >= logging.converter.STANDARD_ERROR:
        return not any(name in record.pathname for name in ('/orbax/', '/clu/', '/asyncio/'))
    return record.levelno > logging.converter.STANDARD_INFO or not any(name in record.pathname for name in chatty)


def set_up():
    """Sets up the log, which is that of the first process, and keeps TensorFlow off the accelerators."""
    logging.set_verbosity(logging.INFO if jax.process_index() == 0 else logging.WARNING)
    logging.get_absl_handler().addFilter(is_worth_reading)
    tf.config.set_visible_devices([], 'GPU')  # else TensorFlow takes the memory that JAX needs
    logging.info('JAX devices: %s', ', '.join(str(device) for device in jax.devices()))


@contextlib.contextmanager
def telling_errors():
    """Ends the process where a run cannot go on: with one line, or with the status of a run that was asked to stop."""
    try:
        yield
    except (InputError, FloatingPointError) as error:
        sys.exit(f'error: {error}')
    except interruption.Interrupted as error:
        logging.warning('stopped: %s', error)
        sys.exit(interruption.EXIT_CODE)
    except KeyboardInterrupt:
        sys.exit('error: stopped by Ctrl-C outside of training; the same command goes on')


def main(argv):
    """Runs the training that the flags describe."""
    if len(argv) > 1:
        sys.exit(f'error: unexpected arguments: {" ".join(argv[1:])}')
    with telling_errors(), parallel.processes(FLAGS.config.distributed):
        set_up()
        train.train_and_evaluate(FLAGS.config, FLAGS.workdir or os.path.join('runs', FLAGS.config.mode))


if __name__ == '__main__':
    app.run(main, flags_parser=parse_flags)
