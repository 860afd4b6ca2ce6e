"""Several processes, and the device mesh: one axis, `data`. Batches are split along it, the rest is on every device."""

import collections
import contextlib
import functools
import hashlib
import os
import re
import subprocess
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from brain_jax import InputError, interruption

HEARTBEAT_SECONDS = 40  # a process that is silent for so long is taken for dead, and then all end
GOES_ON = 'the same command, given to all of them again, goes on from the last checkpoint'
# Prints the last line that it was given once the process that started it is no more.
_WATCHER = 'import sys; *_, last = ["", *sys.stdin.read().splitlines()]; sys.exit(last or 0)'


def parse_distributed(distributed):
    """Returns what `config.distributed` means, as arguments of `jax.distributed.initialize`; None for 'off'.

    Raises:
      InputError: where it means nothing.
    """
    if distributed == 'off':
        return None
    if distributed == 'auto':
        return {}
    match = re.fullmatch(r'([^,]+:(\d+)),(\d+),(\d+)', distributed)
    if not match:
        raise InputError(
            f"config.distributed is {distributed!r}: give 'off', 'auto' or HOST:PORT,COUNT,INDEX, e.g. host:1234,2,0"
        )
    port, count, index = map(int, match.groups()[1:])
    if not 0 < port < 2**16:
        raise InputError(f'config.distributed is {distributed!r}: the port is one of 1 to 65535')
    if index >= count:
        raise InputError(f'config.distributed is {distributed!r}: {count} processes have the indices 0 to {count - 1}')
    # Nothing is asked of a cluster then, which may be there and be meant for something else.
    return {
        'coordinator_address': match[1],
        'num_processes': count,
        'process_id': index,
        'cluster_detection_method': 'deactivate',
    }


@contextlib.contextmanager
def processes(distributed, timeout_seconds=300):
    """Joins the processes of a run, which end together: use it around all that computes.

    Where the body raises, or where JAX notices that another process died, this process ends at once, with a line that
    says so; an orderly end would wait for processes that wait for it. Only SystemExit and `Interrupted` are taken to
    come in all of them.

    Args:
      distributed: `config.distributed`: 'off', 'auto' for what JAX detects, or HOST:PORT,COUNT,INDEX.
      timeout_seconds: how long to wait for the other processes.

    Raises:
      InputError: where `distributed` means nothing, or no cluster is detected.
    """
    arguments = parse_distributed(distributed)
    if arguments is None:
        yield
        return
    with _last_words() as leave:
        _join(arguments, timeout_seconds, leave)
        process = f'process {jax.process_index()} of {jax.process_count()}'
        leave(f'error: {process} was ended, most often because another one had died (see above): {GOES_ON}')
        try:
            _meet()
            yield
        except (SystemExit, interruption.Interrupted):
            jax.distributed.shutdown()
            raise
        except BaseException as error:
            _end_at_once(error, process, leave)
        jax.distributed.shutdown()


@contextlib.contextmanager
def _last_words():
    """Yields a function that takes the line to print if this process ends before the body does.

    JAX aborts a process from a thread of its own, where no Python runs any more, so another process has to print it.
    """
    command = [sys.executable, '-S', '-c', _WATCHER]
    # In a session of its own, as Ctrl-C would end it with the rest.
    watcher = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def leave(words):
        with contextlib.suppress(OSError):  # no reason to end, should the watcher have been killed
            watcher.stdin.write(f'{words}\n'.encode())
            watcher.stdin.flush()

    try:
        yield leave
    finally:
        leave('')
        watcher.stdin.close()
        watcher.wait()


def _join(arguments, timeout_seconds, leave):
    """Waits for the other processes; on failure JAX aborts this one."""
    where = arguments.get('coordinator_address', 'the address that the cluster gives')
    leave(
        f'error: the processes did not find each other at {where} (see above): start all of them, within '
        f'{timeout_seconds} s; process 0 must run on that host with the port free, and the others must reach it'
    )
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=timeout_seconds,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        if not arguments and str(error) == 'coordinator_address should be defined.':
            error = 'neither SLURM, Kubernetes, a TPU pod nor Open MPI is detected'
        raise InputError(f'config.distributed is {"HOST:PORT,COUNT,INDEX" if arguments else "auto"}: {error}') from None


def _meet():
    """Makes the processes' connections; raises `InputError` where one has more devices than another.

    The first exchange makes them, for which gloo waits no longer than 30 s: processes are in step here, not later.
    """
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        raise InputError(f'the processes have {", ".join(map(str, counts.values()))} devices: give all the same number')
    multihost_utils.sync_global_devices('meet')


def _end_at_once(error, process, leave):
    """Ends this process with a line for the user, and a stack trace where the error is a defect."""
    text = ' '.join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        text = 'stopped by Ctrl-C'
    elif re.search('Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED', text):
        text = f'another process has ended or hangs, see what it says itself ({text[:200]}): {GOES_ON}'
    elif not isinstance(error, InputError | FloatingPointError):
        traceback.print_exception(error)
        text = f'{type(error).__name__}: {text}'
    print(f'error: {process}: {text}', file=sys.stderr, flush=True)
    if jax.process_index() == 0:
        time.sleep(3)  # without this process JAX aborts the others, who have something to say themselves
    leave('')
    os._exit(1)


def first_then_others(function):
    """Calls a function in process 0 and only then in the others: what it wrote they find, if their disk is the same."""
    if jax.process_index() == 0:
        result = function()
    multihost_utils.sync_global_devices('first_then_others')
    return result if jax.process_index() == 0 else function()


def check_agreement(**values):
    """Raises `InputError` in all processes where one has another value, as printed by `repr`, than process 0."""
    for name, value in values.items():
        digest = np.frombuffer(hashlib.sha256(repr(value).encode()).digest(), np.uint8)
        digests = multihost_utils.process_allgather(digest)
        differing = np.flatnonzero(np.any(digests != digests[0], axis=1))
        if differing.size:
            raise InputError(f'processes {differing.tolist()} have another {name} than process 0: give all the same')


def hides_progress():
    """Returns what tqdm calls `disable`: bars show on a terminal, and of several processes only those of the first."""
    return True if jax.distributed.is_initialized() and jax.process_index() else None


def make_mesh():
    """Returns a mesh over all devices of all processes."""
    # A process' devices stand together, as do its images in a batch: every image lies where one process would put it.
    devices = sorted(jax.devices(), key=lambda device: device.process_index)
    # Mesh, not jax.make_mesh: the latter asks for explicit axis types, under which every operation needs a sharding.
    return Mesh(np.array(devices), ('data',))


def split_over_data(mesh):
    """Returns the sharding of a batch: its first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec('data'))


def replicated(mesh):
    """Returns the sharding of parameters: a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree, mesh):
    """Puts a tree of arrays, the same in all processes, on the devices: a whole copy on each."""
    if jax.process_count() == 1:
        return jax.device_put(tree, replicated(mesh))
    # jax.device_put would compare every array between the processes, one after the other.
    put = functools.partial(jax.make_array_from_process_local_data, replicated(mesh))
    return jax.tree.map(lambda leaf: put(np.asarray(jnp.asarray(leaf))), tree)


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
