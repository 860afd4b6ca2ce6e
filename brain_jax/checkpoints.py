"""Checkpoints: the only module that knows orbax.

A checkpoint holds `variables` (parameters, running statistics and averaged parameters: all that a prediction needs),
`training` (optimiser state and the sums of the metrics since the last report) and `progress` (a small JSON of what the
host keeps). `files.sha256` in its folder lists what its files must hold, as `sha256sum --check files.sha256` reads it:
Orbax takes much of a damaged checkpoint for good.
"""

import contextlib
import errno
import functools
import hashlib
import os
import pathlib
import shutil

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from brain_jax import InputError

CHECKSUMS = 'files.sha256'


@contextlib.contextmanager
def open_checkpoints(workdir):
    """Opens the checkpoints of a run, which are saved in the background: the two latest and the best are kept.

    Args:
      workdir: the run's folder.

    Yields:
      An orbax `CheckpointManager`. `best_step()` is the one with the lowest validation loss, or the latest where none
      was validated.

    Raises:
      InputError: where the folder cannot be used, or what was saved last cannot be written.
    """
    policies = [
        checkpoint_managers.LatestN(2),
        checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: -metrics['loss'], n=1, keep_checkpoints_without_metrics=False
        ),
    ]
    directory = os.path.abspath(os.path.join(workdir, 'checkpoints'))
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics['loss'],
        best_mode='min',
        keep_checkpoints_without_metrics=True,
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
        async_options=ocp.AsyncOptions(post_finalization_callback=functools.partial(_write_checksums, directory)),
    )
    handlers = {
        'variables': ocp.StandardCheckpointHandler(),
        'training': ocp.StandardCheckpointHandler(),
        'progress': ocp.JsonCheckpointHandler(),
    }
    try:
        manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
    except Exception as error:  # it reads the scores of all checkpoints, which may be damaged
        raise InputError(f'the checkpoints in {directory} cannot be opened: {_reason(error)}') from error
    try:
        yield manager
        wait_until_saved(manager)
    finally:
        with contextlib.suppress(Exception):  # it has been told by wait_until_saved, or something worse is on its way
            manager.close()


def split_state(state):
    """Returns the (variables, training) parts of a `TrainState`, as nested dictionaries."""
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    if state.ema_params is not None:
        variables['ema_params'] = state.ema_params
    return variables, {'step': state.step, 'opt_state': state.opt_state, 'metrics': state.metrics}


def save(manager, state, progress, validation=None):
    """Starts to save a checkpoint at `state.step`; one that is there already is replaced.

    Args:
      manager: of `open_checkpoints`.
      state: a `TrainState`.
      progress: dictionary of numbers, for JSON.
      validation: dictionary of scores with `loss`, after an evaluation.

    Raises:
      InputError: where this checkpoint, or the one before, cannot be written.
    """
    if not os.path.isdir(manager.directory):  # Orbax would make it anew, and the rest of the run would be missing
        raise InputError(f'{manager.directory} is gone: bring the workdir back, and give the same command')
    step = int(state.step)
    variables, training = split_state(state)
    with _explain_failure(manager):
        if step in manager.all_steps():
            manager.wait_until_finished()
            manager.delete(step)
        manager.save(
            step,
            args=ocp.args.Composite(
                variables=ocp.args.StandardSave(variables),
                training=ocp.args.StandardSave(training),
                progress=ocp.args.JsonSave(progress),
            ),
            metrics=validation,
            force=True,
        )


def wait_until_saved(manager):
    """Waits until all checkpoints are on disk.

    Raises:
      InputError: where one cannot be written.
    """
    with _explain_failure(manager):
        manager.wait_until_finished()


@contextlib.contextmanager
def _explain_failure(manager):
    """Turns whatever Orbax and TensorStore raise when they cannot write into one line that says what is left."""
    try:
        yield
    except Exception as error:  # OSError and ValueError, with a status in its text, at least
        steps = [int(path.name) for path in pathlib.Path(manager.directory).glob('*') if path.name.isdigit()]
        last = f'that of step {max(steps)} is the last good one' if steps else 'there is none yet'
        raise InputError(f'a checkpoint cannot be saved in {manager.directory}: {_reason(error)}; {last}') from error


def _reason(error):
    """Returns what the operating system says of an error, or the first line of its text."""
    while not getattr(error, 'strerror', None) and error.__cause__ is not None:
        error = error.__cause__
    if getattr(error, 'strerror', None):
        return error.strerror
    text = ' '.join(str(error).split())
    known = [os.strerror(number) for number in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENOENT, errno.EIO)]
    return next((reason for reason in known if reason in text), f'{type(error).__name__}: {text[:200]}')


def restore(manager, state, step):
    """Restores a checkpoint.

    Args:
      manager: of `open_checkpoints`.
      state: a `TrainState` of arrays that tells shapes, types and shardings; it may lie on other devices than the saved
        one did.
      step: which one.

    Returns:
      The restored state and the progress dictionary.

    Raises:
      InputError: where there is no such checkpoint, or it is damaged, or of another network or another optimiser.
    """
    variables, training = split_state(state)
    items = _restore_items(manager, step, variables=variables, training=training, progress=None)
    return state.replace(**items['variables'], **items['training']), items['progress']


def restore_variables(manager, variables, step):
    """Restores what a prediction needs of a checkpoint: see `restore`, with the first result of `split_state`."""
    return _restore_items(manager, step, variables=variables)['variables']


def _restore_items(manager, step, **items):
    """Returns {name: content}; `items` are trees of arrays, or None for JSON."""
    folder = manager.directory / str(step)
    if step not in manager.all_steps():
        raise InputError(f'{manager.directory} holds no checkpoint of step {step}: it is lost, and the run with it')
    damage = find_damage(folder)
    if damage:
        raise InputError(f'the checkpoint {folder} is damaged: {damage}')
    # Orbax notices another shape only when it is half through reading.
    metadata = manager.item_metadata(step)
    saved, wanted = shapes(metadata.variables.tree), shapes(items['variables'])
    differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if differing:
        raise InputError(
            f'the checkpoint {folder} is of another network: {len(differing)} arrays differ, {differing[0]} first'
        )
    if 'training' in items:
        trees = metadata.training.tree, items['training']
        kept, needed = (sorted(leaf.shape for leaf in jax.tree.leaves(tree)) for tree in trees)
        if kept != needed:
            raise InputError(
                f'the checkpoint {folder} keeps other arrays of the optimiser: use the version of brain_jax that '
                'wrote it'
            )
    args = {
        name: ocp.args.JsonRestore()
        if tree is None
        else ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))
        for name, tree in items.items()
    }
    return dict(manager.restore(step, args=ocp.args.Composite(**args)))


def _write_checksums(directory):
    """Lists the files of a checkpoint that is about to get its name, and what they hold."""
    if jax.process_index() == 0:
        for folder in pathlib.Path(directory).glob('*.orbax-checkpoint-tmp'):
            lines = [f'{_hash_file(path)}  {path.relative_to(folder)}\n' for path in _list_files(folder)]
            (folder / CHECKSUMS).write_text(''.join(lines))


def _list_files(folder):
    """Returns the files of a checkpoint, but for the list itself and what Orbax changes when it gives the name."""
    last = (CHECKSUMS, 'commit_success.txt', '_CHECKPOINT_METADATA')
    return sorted(path for path in folder.rglob('*') if path.is_file() and path.name not in last)


def _hash_file(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def find_damage(folder):
    """Returns what is wrong with the files of a checkpoint, in words; '' where nothing is."""
    folder = pathlib.Path(folder)
    if not (folder / CHECKSUMS).exists():
        return f'{CHECKSUMS} is missing'
    try:
        listed = dict(line.split('  ')[::-1] for line in (folder / CHECKSUMS).read_text().splitlines())
        present = {str(path.relative_to(folder)): path for path in _list_files(folder)}
        for name in sorted(listed.keys() | present.keys()):
            if name not in present:
                return f'{name} is missing'
            if _hash_file(present[name]) != listed.get(name):
                return f'{name} differs from its checksum'
    except OSError as error:
        return f'{error.filename} cannot be read: {error.strerror}'
    except ValueError:  # no text, or no two columns
        return f'{CHECKSUMS} cannot be read'
    return ''


def remove_damaged(workdir):
    """Removes damaged checkpoints where there is a whole one to go on from.

    Args:
      workdir: the run's folder.

    Raises:
      InputError: where there are checkpoints and none is whole; none is removed then.
    """
    directory = pathlib.Path(workdir).resolve() / 'checkpoints'
    folders = [path for path in directory.glob('*') if path.name.isdigit()]
    damaged = {folder: damage for folder in folders if (damage := find_damage(folder))}
    for folder, damage in damaged.items():
        logging.warning('the checkpoint %s is damaged: %s', folder, damage)
    if damaged and len(damaged) == len(folders):
        folder = max(folders, key=lambda path: int(path.name))
        raise InputError(
            f'no checkpoint in {directory} is whole: of {folder.name}, {damaged[folder]}. Start anew in another '
            '--workdir'
        )
    for folder in damaged:
        shutil.rmtree(folder)


def content_hash(tree):
    """Returns the SHA-256 of the paths and values of a tree of arrays, wherever they lie."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f'{jax.tree_util.keystr(path)} {array.dtype} {array.shape}'.encode() + array.tobytes())
    return digest.hexdigest()


def shapes(tree):
    """Returns {path: shape} of a nested dictionary of arrays."""
    return {path: tuple(leaf.shape) for path, leaf in flax.traverse_util.flatten_dict(tree, sep='/').items()}
