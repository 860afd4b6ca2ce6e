"""How batches and parameters lie on devices."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest
from ml_collections import ConfigDict

from brain_jax import InputError, parallel

REPOSITORY = pathlib.Path(__file__).parents[1]
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


def test_checkpoint_of_eight_devices_on_fewer_and_back(tmp_path):
    program = f"""if True:
        import runpy
        import jax, numpy as np
        from brain_jax import checkpoints, models, parallel, train
        jax.config.update('jax_disable_most_optimizations', True)  # most of the time goes into compiling
        config = runpy.run_path('configs/densenet121.py')['get_config']('scratch')
        config.model, config.image_size = '_DenseNetTiny', 32
        model = train.create_model(config, 4)
        images = np.random.default_rng(0).integers(0, 256, (8, 32, 32), np.uint8)

        def make_state(mesh):
            return train.create_train_state(config, model, mesh, total_steps=10, steps_per_epoch=5.0)[0]

        def evaluate(state, mesh):
            batch = jax.device_put(images, parallel.split_over_data(mesh))
            variables = {{'params': state.params, 'batch_stats': state.batch_stats}}
            return np.asarray(jax.jit(lambda v, x: model.apply(v, models.normalize(x)))(variables, batch))

        def mesh_of(count):
            return jax.sharding.Mesh(np.array(jax.devices()[:count]), ('data',))

        state = make_state(mesh_of(8))
        batch = {{'image': images, 'label': np.arange(8) % 4, 'index': np.arange(8)}}
        batch = jax.device_put(batch, parallel.split_over_data(mesh_of(8)))
        state, _ = train.make_train_step(model, config, np.ones(4), mesh_of(8))(state, batch)
        expected = evaluate(state, mesh_of(8))
        for i, count in enumerate((4, 2, 1, 8)):
            with checkpoints.open_checkpoints(r'{tmp_path}/' + str(i)) as manager:
                checkpoints.save(manager, state, {{}})
            with checkpoints.open_checkpoints(r'{tmp_path}/' + str(i)) as manager:
                other, _ = checkpoints.restore(manager, make_state(mesh_of(count)), 1)
            jax.tree.map(np.testing.assert_array_equal, *map(checkpoints.split_state, (state, other)))
            assert all(len(leaf.sharding.device_set) == count for leaf in jax.tree.leaves(other))
            np.testing.assert_allclose(evaluate(other, mesh_of(count)), expected, atol=1e-5)
            state = other
    """
    environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
    subprocess.run([sys.executable, '-c', program], cwd=REPOSITORY, env=environment, check=True)
