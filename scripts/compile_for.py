"""Compiles the training and the evaluation step for chips that are not there, and tells what they need and move.

    python scripts/compile_for.py --config configs/densenet121.py --topology v5e:2x4 --batch_per_chip 128 \
        --output compiled --config.dtype=bfloat16

Needs libtpu (`pip install -r requirements-tpu.txt`) and no TPU; for `--topology h100:8` jax[cuda13] and no GPU. Writes
compile_for.json and compile_for.md. See `brain_jax/compiled.py`.
"""

import json
import os
import pathlib
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'  # else JAX looks for the chip whose compiler is installed

from absl import app, flags, logging

from brain_jax import InputError, compiled, files, main, run_folder, train  # main has the flag config
from brain_jax.benchmark import text_book

_TOPOLOGY = flags.DEFINE_string('topology', 'v5e:2x4', 'A TPU slice, kind and shape, or GPUs, kind and number: h100:8.')
_BATCH = flags.DEFINE_integer('batch_per_chip', 128, 'Images of a step on each chip.', lower_bound=1)
_SECOND_BATCH = flags.DEFINE_integer(
    'second_batch_per_chip',
    None,
    'Compile for another number, too, and estimate the largest batch from both. Takes twice as long.',
    lower_bound=1,
)
_TEXT_BOOK = flags.DEFINE_bool('text_book', False, "Compile the network of Flax' own layers instead, to compare with.")
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write to.', required=True)


def run(argv):
    if len(argv) > 1:
        sys.exit(f'error: unexpected arguments: {" ".join(argv[1:])}')
    logging.set_verbosity(logging.INFO)
    config = flags.FLAGS.config
    output = pathlib.Path(_OUTPUT.value)
    try:
        run_folder.check_config(config)
        network = text_book if _TEXT_BOOK.value else train
        report = compiled.compile_for(
            config, _TOPOLOGY.value, _BATCH.value, _SECOND_BATCH.value, create_model=network.create_model
        )
        table = compiled.format_table(report)
        files.write_whole(output / 'compile_for.json', json.dumps(report, indent=2) + '\n')
        files.write_whole(output / 'compile_for.md', table)
    except InputError as error:
        sys.exit(f'error: {error}')
    print(table, end='')


if __name__ == '__main__':
    app.run(run, flags_parser=main.parse_flags)
