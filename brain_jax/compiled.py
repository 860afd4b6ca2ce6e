"""What compiled steps need and move: memory, arithmetic, traffic, collectives. The chips need not be there.

The compilers for TPUs and for NVIDIA GPUs run on any machine. So the training and the evaluation step of a
configuration are compiled here for chips that only have a name, with shapes in the place of arrays, and XLA's own
account of the program is read.

All figures are those of the program of one chip, for the images that this chip gets of a step. XLA does not tell the
arithmetic and the traffic of a program for GPUs.
"""

import functools
import importlib.metadata
import math
import os
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import topologies

from brain_jax import InputError, parallel, train

NUM_CLASSES = 4  # of the dataset; the head's width changes next to nothing
COLLECTIVES = ('all-reduce', 'all-gather', 'reduce-scatter', 'collective-permute', 'all-to-all')


class Chip(NamedTuple):
    """What the maker says of a chip: memory in bytes, its bandwidth in bytes/s, bfloat16 operations/s."""

    memory: float
    bandwidth: float
    arithmetic: float


# By the first part of a topology's name: the system-architecture pages of Cloud TPU, the data sheet of the H100 SXM.
CHIPS = {
    'v4': Chip(memory=32e9, bandwidth=1228e9, arithmetic=275e12),
    'v5e': Chip(memory=16e9, bandwidth=819e9, arithmetic=197e12),
    'v5p': Chip(memory=95e9, bandwidth=2765e9, arithmetic=459e12),
    'v6e': Chip(memory=32e9, bandwidth=1638e9, arithmetic=918e12),
    'h100': Chip(memory=80e9, bandwidth=3350e9, arithmetic=989e12),
}

# What XLA asks a GPU for when there is one.
GPU_TARGETS = {
    'h100': """
        gpu_device_info {
          cuda_compute_capability { major: 9 }
          core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
          threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
          registers_per_core_limit: 65536  registers_per_block_limit: 65536
          shared_memory_per_core: 233472  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
          device_memory_size: 85000000000  memory_bandwidth: 3350000000000  l2_cache_size: 52428800
        }
        platform_name: "CUDA"
        dnn_version_info { major: 9 minor: 8 }
        device_description_str: "NVIDIA H100 80GB HBM3"
    """,
}


def open_mesh(topology):
    """Returns a mesh over the chips of a topology, without any of them.

    Args:
      topology: kind and shape of a TPU slice, such as 'v5e:2x4', or kind and number of GPUs, such as 'h100:8'.

    Raises:
      InputError: where the compiler is not installed or does not know the topology.
    """
    kind, _, shape = topology.partition(':')
    if kind not in CHIPS or not shape:
        raise InputError(f'topology is {topology!r}: use {", ".join(CHIPS)} and a shape, such as v5e:2x4 or h100:8')
    arguments = {'platform': 'tpu', 'topology_name': topology}
    if kind in GPU_TARGETS:
        arguments = {'platform': 'cuda', 'topology': f'1x1x{shape}', 'target_config': GPU_TARGETS[kind]}
    try:
        importlib.metadata.version(_compiler(topology))
    except importlib.metadata.PackageNotFoundError:
        install = '"jax[cuda13]==0.10.2"' if kind in GPU_TARGETS else '-r requirements-tpu.txt'
        raise InputError(f'{_compiler(topology)} is not installed: pip install {install}') from None
    os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'  # several may compile at a time: there is no TPU to share
    os.environ['TPU_SKIP_MDS_QUERY'] = '1'  # else libtpu asks the network what machine this is
    os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'  # else it complains that there is no host with a TPU
    try:
        devices = topologies.get_topology_desc(**arguments).devices
    except Exception as error:  # XLA's, of several types
        raise InputError(f'there is no topology {topology!r}: {str(error).strip().splitlines()[0]}') from error
    return jax.sharding.Mesh(np.array(devices), ('data',))


def _compiler(topology):
    """Returns the name of the package that compiles for a topology."""
    return 'jax-cuda13-plugin' if topology.partition(':')[0] in GPU_TARGETS else 'libtpu'


def lower_steps(config, mesh, create_model=train.create_model):
    """Lowers the training and the evaluation step of a run, as `train.train_and_evaluate` calls them.

    Args:
      config: the run's configuration; no data and no weights are read.
      mesh: the devices, which need not be there.
      create_model: makes the network; another one than that of a run, to compare with.

    Returns:
      {'train_step': lowered, 'eval_step': lowered}, of `jax.stages.Lowered`.
    """
    model = create_model(config, NUM_CLASSES)
    state = jax.eval_shape(functools.partial(_create_state, config, model))
    state = jax.tree.map(functools.partial(_abstract, sharding=parallel.replicated(mesh)), state)
    moments = None
    if config.mode == 'frozen':
        channels = state.params['predictions']['kernel'].shape[0]
        moments = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    train_step = train.make_train_step(model, config, np.ones(NUM_CLASSES), mesh, moments)
    eval_step = train.make_eval_step(model, config, mesh)
    train_batch = _abstract_batch(config, state, mesh, config.batch_size)
    eval_batch = _abstract_batch(config, state, mesh, config.eval_batch_size)
    return {
        'train_step': train_step.lower(state, {name: train_batch[name] for name in ('image', 'label', 'index')}),
        'eval_step': eval_step.lower(state.eval_params, state.batch_stats, eval_batch),
    }


def _create_state(config, model):
    variables = train.init_variables(config, model)
    return train.make_train_state(config, model, variables, total_steps=1000, steps_per_epoch=100.0)[0]


def _abstract(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _abstract_batch(config, state, mesh, batch_size):
    """Returns the shapes of a batch of the pipeline; in mode 'frozen' its images are features."""
    sharding = parallel.split_over_data(mesh)
    image = jax.ShapeDtypeStruct((batch_size, config.image_size, config.image_size), jnp.uint8, sharding=sharding)
    if config.mode == 'frozen':
        views = 2 if config.augment.flip_horizontal else 1
        channels = state.params['predictions']['kernel'].shape[0]
        image = jax.ShapeDtypeStruct((batch_size, views, channels), jnp.float32, sharding=sharding)
    vector = functools.partial(jax.ShapeDtypeStruct, (batch_size,), sharding=sharding)
    return {'image': image, 'label': vector(jnp.int32), 'index': vector(jnp.int32), 'mask': vector(jnp.bool)}


def count_collectives(hlo_text):
    """Counts the collective operations of a compiled program.

    One that is started and awaited is one. What stands in a loop is counted once, however often the loop runs.

    Args:
      hlo_text: of `compiled.as_text()`.

    Returns:
      {kind: {'count': operations, 'bytes': bytes of their results on one device}}, of the kinds that occur.
    """
    operation = re.compile(rf'^\s*(?:ROOT )?\S+ = (.+?) ({"|".join(COLLECTIVES)})(-start)?\(', re.MULTILINE)
    found = {}
    for shape, kind, start in operation.findall(hlo_text):
        if start and kind != 'all-reduce':
            shape = _elements(shape)[1]  # (operands, results, ...)
        entry = found.setdefault(kind, {'count': 0, 'bytes': 0})
        entry['count'] += 1
        entry['bytes'] += _count_bytes(shape)
    return found


def _elements(shape):
    """Returns the parts of a tuple's shape: '(f32[2], (f32[3], u8[4]))' -> ['f32[2]', '(f32[3], u8[4])']."""
    parts, depth = [''], 0
    for letter in re.sub(r'{[^}]*}|/\*.*?\*/', '', shape)[1:-1]:  # without layouts and the comments that number
        depth += (letter in '([') - (letter in ')]')
        if letter == ',' and depth == 0:
            parts.append('')
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _count_bytes(shape):
    """Returns the bytes of an array's shape or of all arrays of a tuple's: 'bf16[2,3]{1,0}' -> 12."""
    total = 0
    for kind, width, sizes in re.findall(r'\b([a-z]+)(\d*)\w*\[([\d,]*)\]', shape):
        bits = {'pred': 8, 'token': 0}.get(kind) or int(width or 0)
        total += math.prod(map(int, filter(None, sizes.split(',')))) * bits
    return math.ceil(total / 8)


def describe(compiled, images):
    """Returns what a compiled program needs and moves, on one chip.

    Args:
      compiled: a `jax.stages.Compiled`.
      images: number of images that one chip gets.

    Returns:
      A dictionary: bytes of memory (of `temporary` those of the largest moment), `flops` and `bytes_accessed` as XLA
      estimates them or None, these also per image, and `collectives` of `count_collectives`.
    """
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    figures = {
        'images': images,
        'argument_bytes': memory.argument_size_in_bytes,
        'output_bytes': memory.output_size_in_bytes,
        'alias_bytes': memory.alias_size_in_bytes,  # of outputs in the memory of arguments
        'program_bytes': memory.generated_code_size_in_bytes,
        'temporary_bytes': memory.temp_size_in_bytes,
        'flops': cost.get('flops'),
        'bytes_accessed': cost.get('bytes accessed'),
    }
    per_image = {
        f'{name}_per_image': None if figures[name] is None else figures[name] / images
        for name in ('temporary_bytes', 'flops', 'bytes_accessed')
    }
    return figures | per_image | {'collectives': count_collectives(compiled.as_text())}


def estimate_largest_batch(chip, figures, other=None):
    """Estimates how many images of a step fit into a chip's memory.

    Args:
      chip: a `Chip`.
      figures: of `describe`.
      other: of the same program with another number of images. Without it, all temporaries are taken to grow with the
        images, which is on the careful side.

    Returns:
      The number; None where the temporaries do not grow, as those of a tiny network need not.
    """
    fixed = figures['argument_bytes'] + figures['output_bytes'] - figures['alias_bytes'] + figures['program_bytes']
    slope, rest = figures['temporary_bytes_per_image'], 0
    if other:
        slope = (other['temporary_bytes'] - figures['temporary_bytes']) / (other['images'] - figures['images'])
        rest = figures['temporary_bytes'] - slope * figures['images']
    return math.floor((chip.memory - fixed - rest) / slope) if slope > 0 else None


def bound_speed(chip, figures):
    """Returns the images/s a chip that no run can exceed: by its memory's bandwidth and by its arithmetic.

    The former takes every byte that XLA counts to cross the memory's bus; the bound of both is the smaller. None where
    XLA counts nothing.
    """
    if figures['flops'] is None:
        return {'traffic': None, 'arithmetic': None}
    return {
        'traffic': figures['images'] * chip.bandwidth / figures['bytes_accessed'],
        'arithmetic': figures['images'] * chip.arithmetic / figures['flops'],
    }


def compile_for(config, topology, batch_per_chip, second_batch_per_chip=None, create_model=train.create_model):
    """Compiles the steps of a run for chips that are not there and describes them.

    Args:
      config: the run's configuration; its batch sizes are replaced.
      topology: such as 'v5e:2x4', see `open_mesh`.
      batch_per_chip: images of a step on each chip.
      second_batch_per_chip: another number, to tell by how much the temporaries grow with an image; None: not compiled.
      create_model: see `lower_steps`.

    Returns:
      A dictionary: what was compiled with what, and `programs` {name: figures}.

    Raises:
      InputError: for a topology or a configuration that cannot be used.
    """
    mesh = open_mesh(topology)
    chip = CHIPS[topology.partition(':')[0]]
    programs = _compile_steps(config, mesh, batch_per_chip, create_model)
    others = _compile_steps(config, mesh, second_batch_per_chip, create_model) if second_batch_per_chip else {}
    for name, figures in programs.items():
        figures['largest_batch_estimate'] = estimate_largest_batch(chip, figures, others.get(name))
        figures['bound_images_per_second'] = bound_speed(chip, figures)
    return {
        'topology': topology,
        'chips': mesh.size,
        'chip': mesh.devices.flat[0].device_kind,
        'chip_figures': chip._asdict(),
        'batch_per_chip': batch_per_chip,
        'second_batch_per_chip': second_batch_per_chip,
        'config': config.to_dict(),
        'network': create_model.__module__,
        'versions': {name: importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'flax', _compiler(topology))},
        'programs': programs,
    }


def _compile_steps(config, mesh, batch_per_chip, create_model):
    config = config.copy_and_resolve_references()
    config.batch_size = config.eval_batch_size = batch_per_chip * mesh.size
    parallel.check_batch_sizes(config, mesh)
    programs = {}
    for name, lowered in lower_steps(config, mesh, create_model).items():
        logging.info('compiling %s for %d chips, %d images each: minutes', name, mesh.size, batch_per_chip)
        start = time.monotonic()
        programs[name] = describe(lowered.compile(), batch_per_chip)
        programs[name]['compile_seconds'] = round(time.monotonic() - start, 1)
    return programs


def format_table(report):
    """Returns the report of `compile_for` as a Markdown table."""
    programs = report['programs']
    kinds = [kind for kind in COLLECTIVES if any(kind in figures['collectives'] for figures in programs.values())]
    estimate = 'two batch sizes' if report['second_batch_per_chip'] else 'temporaries an image'

    def collective(figures, kind):
        entry = figures['collectives'].get(kind, {'count': 0, 'bytes': 0})
        return f'{entry["count"]} ({entry["bytes"] / 1e6:.2f} MB)'

    rows = {
        'temporaries, MB an image': lambda f: _number(f['temporary_bytes_per_image'], 1e6, 1),
        'temporaries, MB': lambda f: _number(f['temporary_bytes'], 1e6, 1),
        'arguments, MB': lambda f: _number(f['argument_bytes'], 1e6, 1),
        'memory traffic, MB an image': lambda f: _number(f['bytes_accessed_per_image'], 1e6, 1),
        'memory traffic, GB': lambda f: _number(f['bytes_accessed'], 1e9, 2),
        'GFLOP an image': lambda f: _number(f['flops_per_image'], 1e9, 2),
        'TFLOP': lambda f: _number(f['flops'], 1e12, 3),
        **{kind: functools.partial(collective, kind=kind) for kind in kinds},
        f'largest batch, estimated from {estimate}': lambda f: _number(f['largest_batch_estimate']),
        'bound by traffic, images/s': lambda f: _number(f['bound_images_per_second']['traffic']),
        'bound by arithmetic, images/s': lambda f: _number(f['bound_images_per_second']['arithmetic']),
        'compiled in, s': lambda f: _number(f['compile_seconds']),
    }
    title = f'each of {report["chips"]} {report["chip"]}, {report["batch_per_chip"]} images'
    lines = [[title, *programs], ['---'] * (1 + len(programs))]
    lines += [[name, *map(value, programs.values())] for name, value in rows.items()]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines) + '\n'


def _number(value, unit=1, digits=0):
    """Returns a number for the table, in units of `unit`."""
    return 'not told' if value is None else f'{value / unit:,.{digits}f}'
