"""Trains and tests a network on every fold of a grouped split, and reports the scores over all of them.

    python scripts/cross_validate.py --config configs/densenet121.py:frozen --workdir runs/cross_validation \
        --config.data_dir DATA --config.groups groups.csv --config.folds=5 --seeds 0,1,2 --random

Stopped, it goes on where it was when the same command is given again.
"""

import os
import sys

from absl import app, flags, logging

from brain_jax import main  # main has the flags config and workdir, and keeps TensorFlow quiet
from brain_jax.evaluation import cross_validation

_SEEDS = flags.DEFINE_list('seeds', ['0'], 'Each draws other folds and trains with other random numbers.')
_RANDOM = flags.DEFINE_bool('random', False, 'Also split at random, whatever belongs together, to see the difference.')


def run(argv):
    if len(argv) > 1:
        sys.exit(f'error: unexpected arguments: {" ".join(argv[1:])}')
    main.set_up()
    config = flags.FLAGS.config
    if not all(seed.isdecimal() for seed in _SEEDS.value):
        sys.exit(f'error: --seeds is {",".join(_SEEDS.value)}: give whole numbers, such as 0,1,2')
    output = flags.FLAGS.workdir or os.path.join('runs', f'cross_validation_{config.mode}')
    with main.telling_errors():
        result = cross_validation.cross_validate(
            config,
            output,
            seeds=tuple(map(int, _SEEDS.value)),
            splits=('grouped', 'random') if _RANDOM.value else ('grouped',),
        )
    print(cross_validation.format_summary(result))
    logging.info('wrote %s', os.path.join(output, 'report.html'))


if __name__ == '__main__':
    app.run(run, flags_parser=main.parse_flags)
