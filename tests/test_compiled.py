"""What is read from compiled programs; for a TPU that is not there only where libtpu is installed."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from brain_jax import InputError, compiled

pytestmark = pytest.mark.usefixtures('quick_compilation')
REPOSITORY = pathlib.Path(__file__).parents[1]
COMMAND = [sys.executable, 'scripts/compile_for.py', '--config=configs/densenet121.py', '--config.dtype=bfloat16']

# Each of 8 devices has 3 x 5 float32 and 2 bfloat16.
PROGRAM = """
import json
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from brain_jax import compiled, parallel

def reduce_twice(x, y):
    def body(i, x):
        return jax.lax.psum(jnp.sin(x), 'data') / 8
    x = jax.lax.fori_loop(0, 3, body, x)
    total = jax.lax.psum((x, y.astype(jnp.float32)), 'data')
    everything = jax.lax.all_gather(x, 'data')
    part = jax.lax.psum_scatter(jnp.tile(y.astype(jnp.float32), 8), 'data', tiled=True)
    neighbour = jax.lax.ppermute(y, 'data', [(i, (i + 1) % 8) for i in range(8)])
    return total, everything, part, neighbour

mesh = parallel.make_mesh()
step = jax.shard_map(reduce_twice, mesh=mesh, in_specs=P('data'), out_specs=P('data'), check_vma=False)
x, y = jnp.ones((24, 5)), jnp.ones(16, jnp.bfloat16)
program = jax.jit(step).lower(x, y).compile()
print(json.dumps(compiled.count_collectives(program.as_text())))
"""


def test_collectives_of_a_known_program():
    environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8', 'PYTHONPATH': str(REPOSITORY)}
    process = subprocess.run(
        [sys.executable, '-c', PROGRAM], env=environment | {'JAX_PLATFORMS': 'cpu'}, check=True, capture_output=True
    )
    found = json.loads(process.stdout)
    # One in the loop, which runs three times, of 60 bytes; then one for both sums, or one each: 60 + 8 bytes.
    assert found['all-reduce']['count'] in (2, 3)
    assert found['all-reduce']['bytes'] == 60 + 60 + 8
    assert found['all-gather'] == {'count': 1, 'bytes': 8 * 60}
    assert found['reduce-scatter'] == {'count': 1, 'bytes': 8}
    # XLA may send bfloat16 as float32.
    assert found['collective-permute'] in ({'count': 1, 'bytes': 4}, {'count': 1, 'bytes': 8})
    assert 'all-to-all' not in found


TRAINING_STEP = """
import json
import runpy
from brain_jax import compiled, parallel

config = runpy.run_path('configs/densenet121.py')['get_config']()
config.update(model='_DenseNetTiny', image_size=32, batch_size=16, eval_batch_size=16)
steps = compiled.lower_steps(config, parallel.make_mesh())
print(json.dumps(compiled.count_collectives(steps['train_step'].compile().as_text())))
"""


def test_devices_exchange_statistics_and_gradients_alone():
    environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=8', 'PYTHONPATH': str(REPOSITORY)}
    process = subprocess.run(
        [sys.executable, '-c', TRAINING_STEP],
        env=environment | {'JAX_PLATFORMS': 'cpu'},
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    found = json.loads(process.stdout)
    assert found.keys() == {'all-reduce'}
    # Feature maps: of the stem, its pool, two of each of 5 dense layers, of 3 transitions. Each has moments to reduce
    # on the way there and their gradients on the way back; then there are the gradients of the parameters.
    feature_maps = 1 + 1 + 2 * 5 + 3
    assert found['all-reduce']['count'] <= 2 * feature_maps + 4


LOWERED_STEP = """
import hashlib
import runpy
from brain_jax import compiled, parallel

config = runpy.run_path('configs/densenet121.py')['get_config']()
config.update(model='_DenseNetTiny', image_size=32, batch_size=2, eval_batch_size=2)
steps = compiled.lower_steps(config, parallel.make_mesh())
print(hashlib.sha256(steps['train_step'].as_text().encode()).hexdigest())
"""


def test_every_process_has_the_same_program():
    """Else no process finds what another one compiled, and several cannot compute together."""
    programs = set()
    for seed in range(3):  # of the order of sets
        environment = os.environ | {'PYTHONHASHSEED': str(seed), 'PYTHONPATH': str(REPOSITORY), 'JAX_PLATFORMS': 'cpu'}
        command = [sys.executable, '-c', LOWERED_STEP]
        programs.add(subprocess.run(command, env=environment, cwd=REPOSITORY, check=True, capture_output=True).stdout)
    assert len(programs) == 1


def test_started_and_awaited_is_one():
    text = """
      %s = (f32[8]{0:T(128)}, bf16[2,3]{1,0:T(8,128)(2,1)S(1)}) all-reduce-start(%a, %b), to_apply=%add
      %d = (f32[8]{0:T(128)}, bf16[2,3]{1,0:T(8,128)(2,1)S(1)}) all-reduce-done(%s)
      %g = ((f32[4]{0}, pred[2]{0}), (f32[32]{0}, /*index=1*/pred[16]{0})) all-gather-start(%c, %e), dimensions={0}
      %h = (f32[32]{0}, pred[16]{0}) all-gather-done(%g)
      %p = (s32[5]{0}, s32[5]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%f)
      ROOT %q = s32[5]{0} collective-permute-done(%p)
      %n = f32[64]{0} fusion(%all-reduce), calls=%all-gather(
    """
    assert compiled.count_collectives(text) == {
        'all-reduce': {'count': 1, 'bytes': 8 * 4 + 6 * 2},
        'all-gather': {'count': 1, 'bytes': 32 * 4 + 16},
        'collective-permute': {'count': 1, 'bytes': 5 * 4},
    }


def test_bounds_and_largest_batch():
    chip = compiled.Chip(memory=1000.0, bandwidth=50.0, arithmetic=20.0)
    figures = {'images': 10, 'argument_bytes': 100, 'output_bytes': 90, 'alias_bytes': 80, 'program_bytes': 40}
    figures |= {'temporary_bytes': 200, 'temporary_bytes_per_image': 20.0, 'bytes_accessed': 100.0, 'flops': 400.0}
    assert compiled.bound_speed(chip, figures) == {'traffic': 5.0, 'arithmetic': 0.5}
    assert compiled.bound_speed(chip, figures | {'flops': None}) == {'traffic': None, 'arithmetic': None}
    assert compiled.estimate_largest_batch(chip, figures) == 42  # (1000 - 150) / 20 = 42.5
    # 15 bytes an image and 50 whatever the number: (1000 - 150 - 50) / 15 = 53.3
    other = figures | {'images': 20, 'temporary_bytes': 350}
    assert compiled.estimate_largest_batch(chip, figures, other) == 53
    assert compiled.estimate_largest_batch(chip, figures | {'temporary_bytes_per_image': 0.0}) is None


def test_unknown_topology():
    for topology in ('v9:2x4', 'v5e'):
        with pytest.raises(InputError, match=f"topology is '{topology}': use v4, v5e.* such as v5e:2x4"):
            compiled.open_mesh(topology)


def run_script(*flags):
    return subprocess.run([*COMMAND, *flags], cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.skipif(bool(importlib.util.find_spec('libtpu')), reason='libtpu is installed')
def test_without_libtpu_it_says_what_to_install(tmp_path):
    process = run_script(f'--output={tmp_path / "output"}')
    assert process.returncode == 1
    assert process.stderr.splitlines()[-1] == 'error: libtpu is not installed: pip install -r requirements-tpu.txt'
    assert not (tmp_path / 'output').exists()


@pytest.mark.skipif(not importlib.util.find_spec('libtpu'), reason='libtpu is not installed: see requirements-tpu.txt')
def test_steps_for_eight_chips_that_are_not_there(tmp_path):
    flags = ['--config.model=_DenseNetTiny', '--config.image_size=32', '--batch_per_chip=4', f'--output={tmp_path}']
    process = run_script(*flags)
    assert process.returncode == 0, process.stderr
    assert process.stdout == (tmp_path / 'compile_for.md').read_text()
    report = json.loads((tmp_path / 'compile_for.json').read_text())
    assert (report['chips'], report['batch_per_chip'], report['config']['dtype']) == (8, 4, 'bfloat16')
    train_step, eval_step = report['programs']['train_step'], report['programs']['eval_step']
    assert set(train_step['collectives']) == set(eval_step['collectives']) == {'all-reduce'}
    # 15 feature maps: stem, pool, two for each of 5 layers, 3 transitions. Their statistics, and their gradients, once;
    # the parameters' gradients in 4 at most.
    assert train_step['collectives']['all-reduce']['count'] <= 2 * 15 + 4
    # The parameters and two moments of each, in float32, and the batch of 4 images.
    assert train_step['argument_bytes'] > eval_step['argument_bytes'] > 0
    assert train_step['flops'] > eval_step['flops'] > 0
    for figures in (train_step, eval_step):
        bounds = figures['bound_images_per_second']
        assert bounds['traffic'] == pytest.approx(4 * 819e9 / figures['bytes_accessed'])
        assert bounds['arithmetic'] == pytest.approx(4 * 197e12 / figures['flops'])
