"""The device mesh: one axis, `data`. Batches are split along it, everything else is on every device."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from brain_jax import InputError


def make_mesh():
    """Returns a mesh over all devices of all processes."""
    # Mesh, not jax.make_mesh: the latter asks for explicit axis types, under which every operation needs a sharding.
    return Mesh(np.array(jax.devices()), ('data',))


def split_over_data(mesh):
    """Returns the sharding of a batch: its first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec('data'))


def replicated(mesh):
    """Returns the sharding of parameters: a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_sizes(config, mesh):
    """Raises `InputError` where a batch cannot be split evenly over the devices."""
    devices = mesh.size
    parts = devices * config.gradient_accumulation
    if config.batch_size % parts:
        raise InputError(
            f'batch_size is {config.batch_size}, which {devices} devices x gradient_accumulation '
            f'{config.gradient_accumulation} = {parts} does not divide; try '
            f'--config.batch_size={max(1, round(config.batch_size / parts)) * parts}'
        )
    if config.eval_batch_size % devices:
        raise InputError(
            f'eval_batch_size is {config.eval_batch_size}, which {devices} devices do not divide; try '
            f'--config.eval_batch_size={max(1, round(config.eval_batch_size / devices)) * devices}'
        )
