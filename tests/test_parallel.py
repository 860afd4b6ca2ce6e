"""Whether batches can be split over the devices, without the devices."""

import jax
import pytest
from ml_collections import ConfigDict

from brain_jax import InputError, parallel

EIGHT_DEVICES = jax.sharding.AbstractMesh((8,), ('data',))


def make_config(**fields):
    return ConfigDict({'batch_size': 32, 'gradient_accumulation': 1, 'eval_batch_size': 64} | fields)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'batch_size': 36}, 'batch_size is 36, which 8 devices.*try --config.batch_size=32'),
        ({'batch_size': 4}, 'batch_size is 4, .*try --config.batch_size=8'),
        ({'gradient_accumulation': 3}, 'batch_size is 32, .*8 devices x gradient_accumulation 3 = 24'),
        ({'eval_batch_size': 100}, 'eval_batch_size is 100, .*try --config.eval_batch_size=96'),
    ],
)
def test_batch_that_devices_cannot_share(fields, message):
    with pytest.raises(InputError, match=message):
        parallel.check_batch_sizes(make_config(**fields), EIGHT_DEVICES)


def test_batch_that_devices_can_share():
    parallel.check_batch_sizes(make_config(gradient_accumulation=4), EIGHT_DEVICES)


def test_mesh_has_all_devices():
    mesh = parallel.make_mesh()
    assert list(mesh.devices) == jax.devices()
    batch = jax.device_put(jax.numpy.zeros((len(jax.devices()) * 2, 3)), parallel.split_over_data(mesh))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, 3)}
