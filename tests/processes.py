"""Runs in processes of their own, of one machine, which tests stop and kill.

They do what `python -m brain_jax.main` does, but are forked from a process that has imported everything, which takes
longer than what they do.
"""

import json
import multiprocessing
import os
import pathlib
import socket
import sys
import time
from multiprocessing import forkserver

import jax
import pytest
from absl import app
from test_train import load_variables, make_config

from brain_jax import main

CONFIG = pathlib.Path(__file__).parents[1] / 'configs/densenet121.py'
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['processes'])
LIMIT = 240  # seconds for anything that must end; a run that hangs fails the test


def work(devices, log, function, *arguments):
    """Calls a function in a new process, with so many devices and its own log."""
    jax.config.update('jax_num_cpu_devices', devices)
    jax.config.update('jax_disable_most_optimizations', True)  # most of the time goes into compiling
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    function(*arguments)


def call_main(flags):
    """Does what `python -m brain_jax.main` does."""
    sys.argv = ['main', *flags]  # here ml_collections looks for the fields that are set
    app.run(main.main, flags_parser=main.parse_flags)


def start(devices, log, function, *arguments):
    """Starts one process."""
    with pytest.MonkeyPatch.context() as patch:
        # Python 3.11 does not tell the process that is forked where modules are, and it goes on without them.
        patch.setenv('PYTHONPATH', os.pathsep.join(sys.path))
        forkserver.ensure_running()
    process = CONTEXT.Process(target=work, args=(devices, str(log), function, *arguments))
    process.start()
    return process


def free_port():
    """Returns a port of the loopback that nobody uses."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def start_run(changes, workdir, *, processes=1, devices=1, mode='scratch'):
    """Starts all processes of a run; their logs are beside the workdir."""
    port = free_port()
    flags = [f'--config={CONFIG}:{mode}', f'--workdir={workdir}']
    flags += [f'--config.{name}={value}' for name, value in changes.items()]
    addresses = [f'127.0.0.1:{port},{processes},{index}' if processes > 1 else 'off' for index in range(processes)]
    return [
        start(devices, log_of(workdir, index), call_main, [*flags, f'--config.distributed={address}'])
        for index, address in enumerate(addresses)
    ]


def log_of(workdir, index=0):
    """Returns where a process of a run writes its log."""
    return workdir.with_name(f'{workdir.name}.{index}.log')


def finish(started):
    """Waits for processes; returns their exit codes."""
    deadline = time.monotonic() + LIMIT
    for process in started:
        process.join(max(0, deadline - time.monotonic()))
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes


def last_line(log):
    """Returns the last line for the user, which may be printed just after the process has ended."""
    deadline = time.monotonic() + 10
    while not (lines := log.read_text().strip().splitlines()) or not lines[-1].startswith('error: '):
        assert time.monotonic() < deadline, lines
        time.sleep(0.05)
    return lines[-1]


def checkpoint_steps(workdir):
    """Returns the steps of which there are checkpoints, rising."""
    return sorted(int(path.name) for path in workdir.glob('checkpoints/*') if path.name.isdigit())


def wait_for_checkpoint(started, workdir, after=-1):
    """Waits until there is a checkpoint of a later step than `after`; returns the step."""
    deadline = time.monotonic() + LIMIT
    while True:
        steps = checkpoint_steps(workdir)
        if steps and steps[-1] > after:
            return steps[-1]
        alive = all(process.is_alive() for process in started)
        assert alive and time.monotonic() < deadline, log_of(workdir).read_text()[-2000:]
        time.sleep(0.01)


def run(changes, workdir, *, mode='scratch', step='steps', **kwargs):
    """Runs all processes to the end; returns the summary, and the variables of a step that it names.

    Args:
      changes: fields of the configuration and their values.
      workdir: the run's folder.
      mode: of the configuration.
      step: 'steps' for the last step, 'best_step' for the one that the run was measured on.
      **kwargs: of `start_run`.
    """
    codes = finish(start_run(changes, workdir, mode=mode, **kwargs))
    assert codes == [0] * len(codes), [log_of(workdir, index).read_text()[-2000:] for index in range(len(codes))]
    summary = json.loads((workdir / 'summary.json').read_text())
    return summary, load_variables(make_config({}, mode, **changes), workdir, summary[step])
