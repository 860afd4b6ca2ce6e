"""Checkpoints: the only module that knows orbax.

A checkpoint holds `variables` (parameters and running statistics: all that a prediction needs), `training` (optimiser
state and averaged parameters) and `progress` (a small JSON of what the host keeps).
"""

import hashlib
import os

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from brain_jax import InputError


def open_checkpoints(workdir):
    """Opens the checkpoints of a run, which are saved in the background: the two latest and the best are kept.

    Args:
      workdir: the run's folder.

    Returns:
      An orbax `CheckpointManager`; use it in a `with`, or close it. `best_step()` is the one with the lowest validation
      loss, or the latest where none was validated.
    """
    policies = [
        checkpoint_managers.LatestN(2),
        checkpoint_managers.BestN(
            get_metric_fn=lambda metrics: -metrics['loss'], n=1, keep_checkpoints_without_metrics=False
        ),
    ]
    options = ocp.CheckpointManagerOptions(
        best_fn=lambda metrics: metrics['loss'],
        best_mode='min',
        keep_checkpoints_without_metrics=True,
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
    )
    handlers = {
        'variables': ocp.StandardCheckpointHandler(),
        'training': ocp.StandardCheckpointHandler(),
        'progress': ocp.JsonCheckpointHandler(),
    }
    directory = os.path.abspath(os.path.join(workdir, 'checkpoints'))
    return ocp.CheckpointManager(directory, options=options, item_handlers=handlers)


def split_state(state):
    """Returns the (variables, training) parts of a `TrainState`, as nested dictionaries."""
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    training = {'step': state.step, 'opt_state': state.opt_state, 'ema_params': state.ema_params}
    return variables, training


def save(manager, state, progress, validation=None):
    """Starts to save a checkpoint at `state.step`; does nothing where that step is saved already.

    Args:
      manager: of `open_checkpoints`.
      state: a `TrainState`.
      progress: dictionary of numbers, for JSON.
      validation: dictionary of scores with `loss`, after an evaluation.
    """
    step = int(state.step)
    if step in manager.all_steps():
        return
    variables, training = split_state(state)
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
      InputError: where there is no such checkpoint, or it is of another network or another optimiser.
    """
    if step not in manager.all_steps():
        raise InputError(f'{manager.directory} holds no checkpoint of step {step}: it is lost, and the run with it')
    # Orbax notices another shape only when it is half through reading.
    metadata, (variables, training) = manager.item_metadata(step), split_state(state)
    saved, wanted = shapes(metadata.variables.tree), shapes(variables)
    differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
    if differing:
        raise InputError(
            f'the checkpoint {manager.directory / str(step)} is of another network: {len(differing)} arrays differ, '
            f'{differing[0]} first'
        )
    kept, needed = (sorted(leaf.shape for leaf in jax.tree.leaves(tree)) for tree in (metadata.training.tree, training))
    if kept != needed:
        raise InputError(
            f'the checkpoint {manager.directory / str(step)} keeps other arrays of the optimiser: use the version of '
            'brain_jax that wrote it'
        )
    variables, training = jax.tree.map(ocp.utils.to_shape_dtype_struct, (variables, training))
    restored = manager.restore(
        step,
        args=ocp.args.Composite(
            variables=ocp.args.StandardRestore(variables),
            training=ocp.args.StandardRestore(training),
            progress=ocp.args.JsonRestore(),
        ),
    )
    return state.replace(**restored.variables, **restored.training), restored.progress


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
