"""The folder of a run: what stands there beside the checkpoints and TensorBoard's files.

`run.json` tells what the run is and `summary.json`, written last, what came out of it.
"""

import functools
import hashlib
import importlib.metadata
import json
import operator
import time

import flax.traverse_util
import jax

from brain_jax import InputError, files, models, parallel


def describe_run(config, dataset, weights_sha256):
    """Returns what a run is, for its folder: configuration, classes, preprocessing, data and versions."""
    packages = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'tensorflow-datasets', 'numpy', 'ml-collections', 'clu')
    return {
        'config': resolve(config),
        'class_names': list(dataset.class_names),
        'preprocessing': {
            'channels': 'grey',
            'pad': 'black, to a centred square',
            'resize': 'antialiased bilinear',
            'image_size': config.image_size,
            'scale': 1 / 255,
            'mean': models.IMAGENET_MEAN,
            'standard_deviation': models.IMAGENET_STANDARD_DEVIATION,
        },
        'dataset': dataset.name,
        'split_sha256': dataset.split_sha256,
        'weights_sha256': weights_sha256,
        'versions': {package: importlib.metadata.version(package) for package in packages},
    }


def use_compilation_cache(config, workdir):
    """Keeps compiled programs on disk, so that the next run or evaluation of the same network starts at once.

    A cache that is set already, as by the environment variable JAX_COMPILATION_CACHE_DIR, stays. A damaged one, or one
    that cannot be written, costs no run: JAX warns, and compiles.

    Args:
      config: the run's configuration; `compilation_cache` is a folder, 'auto' for `compilation_cache` beside the
        workdir, or '' for none.
      workdir: pathlib.Path, the run's folder.
    """
    if config.compilation_cache and not jax.config.jax_compilation_cache_dir:
        folder = config.compilation_cache
        folder = workdir.resolve().parent / 'compilation_cache' if folder == 'auto' else folder
        jax.config.update('jax_compilation_cache_dir', str(folder))


def resolve(config):
    """Returns the configuration as a dictionary, without `distributed`: the processes of a run differ in it."""
    return {field: value for field, value in config.to_dict().items() if field != 'distributed'}


def config_hash(config):
    """Returns the SHA-256 of the resolved configuration, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(resolve(config), sort_keys=True).encode()).hexdigest()


def write_json(path, value):
    """Writes a JSON file that is whole or not there, and its folder if need be; the first of several processes does.

    Raises:
      InputError: where the folder cannot be written to.
    """
    if jax.process_index() == 0:
        files.write_whole(path, json.dumps(value, indent=2) + '\n')


def check_workdir(config, workdir):
    """Raises `InputError` where the folder holds a run of another configuration, and names the fields that differ."""
    run_file = workdir / 'run.json'
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f'the workdir {workdir} is a file: give a folder')
    if not run_file.exists():
        return
    flatten = functools.partial(flax.traverse_util.flatten_dict, sep='.')
    old = flatten(json.loads(run_file.read_text())['config'])
    new = flatten(json.loads(json.dumps(resolve(config))))  # as JSON has it: tuples are lists there
    differences = [
        f'{field}: {old.get(field)!r} there, {new.get(field)!r} now'
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
    ]
    if differences:
        raise InputError(
            f'the workdir {workdir} belongs to another configuration ({"; ".join(differences)}); '
            'give the same configuration to go on with it, or another --workdir'
        )


def write_run(path, run):
    """Writes `run.json` when a run starts.

    Raises:
      InputError: where it is there already and tells of other data or weights, which would make another run of it; or
        where processes disagree on what the run is, or do not share its folder.
    """
    parallel.check_agreement(**{name: run[name] for name in ('split_sha256', 'versions')})
    if path.exists():
        old = json.loads(path.read_text())
        for field in ('class_names', 'split_sha256', 'weights_sha256'):
            if old[field] != run[field]:
                raise InputError(
                    f'the workdir {path.parent} was started with other data or weights ({field} was {old[field]}, is '
                    f'{run[field]}): bring back the old files, or give another --workdir'
                )
    write_json(path, run)
    if not parallel.first_then_others(lambda: _appears(path)):
        raise InputError(f'process 0 wrote {path}, but it is not there: the workdir must be on a disk that all share')


def _appears(path):
    """Tells whether a file of another process comes up; a network file system may hide it for half a minute."""
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    return path.exists()


def read_finished_run(workdir):
    """Returns what `run.json` and `summary.json` of a finished run hold.

    Raises:
      InputError: where the folder holds no finished run.
    """
    if not (workdir / 'run.json').exists():
        raise InputError(f'{workdir} is no folder of a run: there is no run.json in it')
    if not (workdir / 'summary.json').exists():
        raise InputError(f'the run in {workdir} is not finished: give the command that started it again')
    return json.loads((workdir / 'run.json').read_text()), json.loads((workdir / 'summary.json').read_text())


def check_config(config):
    """Raises `InputError` for values that no run can use."""
    modes = ('finetune', 'frozen', 'scratch', 'demo')
    rules = [
        (config.mode in modes, 'mode', f'one of {", ".join(modes)}'),
        (0 <= config.seed < 2**32, 'seed', 'an integer from 0 to 2**32 - 1'),
        (config.num_epochs > 0, 'num_epochs', 'more than 0'),
        (config.batch_size > 0, 'batch_size', 'at least 1'),
        (config.eval_batch_size > 0, 'eval_batch_size', 'at least 1'),
        (config.gradient_accumulation > 0, 'gradient_accumulation', 'at least 1'),
        (config.image_size >= 32, 'image_size', 'at least 32 pixels'),
        (config.learning_rate > 0, 'learning_rate', 'more than 0'),
        (0 <= config.warmup_fraction < 1, 'warmup_fraction', 'at least 0 and less than 1'),
        (0 <= config.label_smoothing < 1, 'label_smoothing', 'at least 0 and less than 1'),
        (0 <= config.ema_decay < 1, 'ema_decay', 'at least 0 and less than 1'),
        (config.mixup >= 0, 'mixup', 'at least 0'),
        (0 <= config.augment.zoom < 1, 'augment.zoom', 'at least 0 and less than 1'),
        (config.class_weights in ('none', 'balanced'), 'class_weights', "'none' or 'balanced'"),
        (config.log_every_steps > 0, 'log_every_steps', 'at least 1'),
        (config.checkpoint_every_steps > 0, 'checkpoint_every_steps', 'at least 1'),
        (config.eval_every_epochs > 0, 'eval_every_epochs', 'more than 0'),
        (
            not config.early_stopping or config.validation_fraction,
            'early_stopping',
            '0 where validation_fraction is 0: nothing tells when to stop',
        ),
        (
            config.distributed == 'off' or jax.distributed.is_initialized(),
            'distributed',
            "'off': only brain_jax.main starts several processes",
        ),
    ]
    for holds, field, wanted in rules:
        if not holds:
            raise InputError(f'config.{field} is {operator.attrgetter(field)(config)!r}: give {wanted}')
