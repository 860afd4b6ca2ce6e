"""Measures brain_jax beside Keras, torch, ONNX Runtime and OpenVINO on the CPU of this machine.

    pip install -r requirements-benchmark.txt
    python scripts/benchmark.py --output benchmark --devices 1,2,4,8

Writes benchmark.json, benchmark.md and benchmark.png. What is not installed is left out. See `brain_jax/benchmark`.
"""

import pathlib
import sys

from absl import app, flags, logging

from brain_jax import InputError, main  # main has the flag config, and keeps TensorFlow quiet
from brain_jax.benchmark import contenders, measure, report

_CONFIG = pathlib.Path(__file__).parents[1] / 'configs/densenet121.py'
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write to.', required=True)
_TASKS = flags.DEFINE_list('tasks', list(measure.TASKS), 'What to measure.')
_CONTENDERS = flags.DEFINE_list('contenders', list(contenders.PACKAGES), 'What to compare.')
_DEVICES = flags.DEFINE_list('devices', [], 'Also measure training on so many virtual devices, e.g. 1,2,4,8.')
_IMAGE_SIZE = flags.DEFINE_integer('image_size', 224, 'Pixels a side.', lower_bound=32)
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 16, 'Images a step.', lower_bound=1)
_ROUNDS = flags.DEFINE_integer('rounds', 5, 'How often each speed is measured.', lower_bound=1)
_SECONDS = flags.DEFINE_float('seconds', 3.0, 'How long, each time; at least one step.', lower_bound=0)
_DATA_DIR = flags.DEFINE_string('data_dir', None, 'Images for pipeline and search. Default: generated ones.')


def parse_flags(argv):
    """Parses the command line, with the repository's configuration where it names none."""
    named = any(argument.lstrip('-').split('=')[0] == 'config' for argument in argv[1:])
    return main.parse_flags(argv if named else [argv[0], f'--config={_CONFIG}', *argv[1:]])


def check_names(flag, allowed):
    """Ends with one line where the list of a flag has something that is not allowed."""
    for name in flag.value:
        if name not in allowed:
            sys.exit(f'error: --{flag.name} has {name!r}: use {", ".join(allowed)}')


def run(argv):
    if len(argv) > 1:
        sys.exit(f'error: unexpected arguments: {" ".join(argv[1:])}')
    logging.set_verbosity(logging.INFO)
    check_names(_TASKS, measure.TASKS)
    check_names(_CONTENDERS, contenders.PACKAGES)
    if not all(count.isdecimal() and int(count) and _BATCH_SIZE.value % int(count) == 0 for count in _DEVICES.value):
        sys.exit(f'error: --devices is {",".join(_DEVICES.value)}: give divisors of --batch_size={_BATCH_SIZE.value}')
    config = flags.FLAGS.config
    with config.unlocked():
        config.image_size, config.batch_size, config.data_dir = _IMAGE_SIZE.value, _BATCH_SIZE.value, _DATA_DIR.value
    try:
        report.make_folder(_OUTPUT.value)
        found = measure.measure(
            config,
            tasks=_TASKS.value,
            names=_CONTENDERS.value,
            devices=[int(count) for count in _DEVICES.value],
            rounds=_ROUNDS.value,
            seconds=_SECONDS.value,
        )
        report.write(found, _OUTPUT.value)
    except InputError as error:
        sys.exit(f'error: {error}')
    print(report.format_markdown(found))


if __name__ == '__main__':
    app.run(run, flags_parser=parse_flags)
