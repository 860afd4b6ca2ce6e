"""Runs of several processes on one machine, which talk to each other by its loopback."""

import json
import multiprocessing
import os
import pathlib
import re
import runpy
import signal
import socket
import sys
import time

import jax
import numpy as np
import pytest
from absl import app
from test_train import TINY, assert_trees_equal, load_variables, make_config

from brain_jax import InputError, main, parallel, run_folder
from brain_jax.data import phantom, pipeline

CONFIG = pathlib.Path(__file__).parents[1] / 'configs/densenet121.py'
# Its processes are forked from one that has imported everything, which takes longer than what they do.
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['test_distributed'])
SETTINGS = TINY | {'eval_batch_size': 16, 'optimizer': 'sgd', 'learning_rate': 0.05, 'num_epochs': 1.0}
LONGER = {'num_epochs': 6.0}  # so that it is still going on when it is killed
LIMIT = 240  # seconds for anything that must end; a run that hangs fails the test


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """As the one of all tests, but prepared by the processes of the first run here."""
    folder = tmp_path_factory.mktemp('data')
    phantom.make_phantom(folder / 'phantom', train_per_class=16, test_per_class=5, image_size=32)
    return {'data_dir': str(folder / 'phantom'), 'prepared_dir': str(folder / 'prepared')}


def work(devices, log, function, *arguments):
    """Calls a function in a new process, with so many devices and its own log."""
    jax.config.update('jax_num_cpu_devices', devices)
    jax.config.update('jax_disable_most_optimizations', True)  # most of the time goes into compiling
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
    function(*arguments)


def call_main(flags):
    """Does what `python -m brain_jax.main` does."""
    sys.argv = ['main', *flags]  # here ml_collections looks for the fields that are set
    app.run(main.main, flags_parser=main.parse_flags)


def start(devices, log, function, *arguments):
    process = CONTEXT.Process(target=work, args=(devices, str(log), function, *arguments))
    process.start()
    return process


def free_port():
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def start_run(changes, workdir, *, processes, devices, mode):
    """Starts all processes of a run; their logs are beside the workdir."""
    port = free_port()
    flags = [f'--config={CONFIG}:{mode}', f'--workdir={workdir}']
    flags += [f'--config.{name}={value}' for name, value in changes.items()]
    addresses = [f'127.0.0.1:{port},{processes},{index}' if processes > 1 else 'off' for index in range(processes)]
    return [
        start(devices, log_of(workdir, index), call_main, [*flags, f'--config.distributed={address}'])
        for index, address in enumerate(addresses)
    ]


def log_of(workdir, index):
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


def run(changes, workdir, *, mode='scratch', **kwargs):
    """Runs all processes to the end; returns the summary, and the parameters and statistics of the last step."""
    codes = finish(start_run(changes, workdir, mode=mode, **kwargs))
    assert codes == [0] * len(codes), [log_of(workdir, index).read_text()[-2000:] for index in range(len(codes))]
    summary = json.loads((workdir / 'summary.json').read_text())
    return summary, load_variables(make_config({}, mode, **changes), workdir, summary['steps'])


@pytest.fixture(scope='module')
def one_process(data, tmp_path_factory):
    """Returns a function from the number of devices to what one process makes of them."""
    folder, known = tmp_path_factory.mktemp('one_process'), {}

    def get(devices):
        if devices not in known:
            known[devices] = run(SETTINGS | data, folder / str(devices), processes=1, devices=devices)
        return known[devices]

    return get


@pytest.mark.parametrize(('processes', 'devices'), [(2, 2), (4, 1), (4, 2)])
def test_processes_do_what_one_does_with_their_devices(processes, devices, data, one_process, tmp_path):
    workdir = tmp_path / 'run'
    summary, variables = run(SETTINGS | data, workdir, processes=processes, devices=devices)
    expected_summary, expected = one_process(processes * devices)
    # Sums over four devices or more depend on their order, which is another within a process than between processes.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), variables, expected)
    for split in ('validation', 'test'):
        assert summary[split] == pytest.approx(expected_summary[split], rel=1e-4)
    for name in ('config_sha256', 'split_sha256', 'best_step', 'steps'):
        assert summary[name] == expected_summary[name]
    assert len(list(workdir.glob('events.*'))) == 1
    assert 'step 3, test: accuracy' in log_of(workdir, 0).read_text()
    assert all('accuracy' not in log_of(workdir, index).read_text() for index in range(1, processes))


@pytest.fixture(scope='module')
def never_stopped(data, tmp_path_factory):
    """What one process makes of two devices in more steps."""
    return run(SETTINGS | data | LONGER, tmp_path_factory.mktemp('whole') / 'run', processes=1, devices=2)


@pytest.mark.parametrize('killed', [1, 0])
def test_killed_process_ends_all_and_the_restart_goes_on(killed, data, never_stopped, tmp_path):
    workdir, changes = tmp_path / 'run', SETTINGS | data | LONGER
    started = start_run(changes, workdir, processes=2, devices=1, mode='scratch')
    deadline = time.monotonic() + LIMIT
    while not any(path.name.isdigit() for path in workdir.glob('checkpoints/*')):
        assert all(process.is_alive() for process in started) and time.monotonic() < deadline
        time.sleep(0.01)
    started[killed].kill()
    start_time = time.monotonic()
    codes = finish(started)
    assert time.monotonic() - start_time < 60
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] not in (0, None)
    last = last_line(log_of(workdir, 1 - killed))
    assert re.match(f'error: process {1 - killed} of 2.*the same command, given to all of them again, goes on', last)
    assert not (workdir / 'summary.json').exists()

    summary, variables = run(changes, workdir, processes=2, devices=1)
    assert 'going on from step' in log_of(workdir, 0).read_text()
    expected_summary, expected = never_stopped
    assert_trees_equal(variables, expected)  # a sum of two has no order
    assert summary['test'] == expected_summary['test']


def test_head_on_frozen_features(data, tmp_path):
    changes = TINY | data | {'eval_batch_size': 16}
    _, variables = run(changes, tmp_path / 'two', processes=2, devices=1, mode='frozen')
    for features in pathlib.Path(data['prepared_dir']).glob('**/features_*'):
        features.unlink()
    _, expected = run(changes, tmp_path / 'one', processes=1, devices=2, mode='frozen')
    assert_trees_equal(variables, expected)


def note_images(data, distributed, path):
    """Writes which images of an epoch come to the devices of this process."""
    with parallel.processes(distributed):
        config = make_config(data, validation_fraction=0.0)
        train = parallel.first_then_others(lambda: pipeline.load_dataset(config)).train
        batches = pipeline.train_batches(
            train, batch_size=16, seed=0, num_steps=4, process_index=jax.process_index(), process_count=2
        )
        batches = pipeline.prefetch(batches, parallel.split_over_data(parallel.make_mesh()))
        seen = [shard.data for batch in batches for shard in batch['index'].addressable_shards]
        np.save(path, np.concatenate(seen))


def test_each_image_is_seen_once_an_epoch(data, tmp_path):
    port = free_port()
    files = [tmp_path / f'{index}.npy' for index in range(2)]
    started = [
        start(2, tmp_path / f'{index}.log', note_images, data, f'127.0.0.1:{port},2,{index}', files[index])
        for index in range(2)
    ]
    assert finish(started) == [0, 0]
    seen = [np.load(file) for file in files]
    assert [len(part) for part in seen] == [32, 32]
    assert sorted(np.concatenate(seen)) == list(range(64))


@pytest.mark.parametrize(
    ('distributed', 'message'),
    [
        ('on', "give 'off', 'auto' or HOST:PORT,COUNT,INDEX"),
        ('host,2,0', 'HOST:PORT,COUNT,INDEX'),
        ('host:1234,2,-1', 'HOST:PORT,COUNT,INDEX'),
        ('host:1234,2,2', '2 processes have the indices 0 to 1'),
        ('host:99999,2,0', 'the port is one of 1 to 65535'),
    ],
)
def test_bad_settings(distributed, message):
    with pytest.raises(InputError, match=message):
        parallel.parse_distributed(distributed)


@pytest.mark.parametrize(
    ('distributed', 'message'),
    [
        ('auto', 'neither SLURM, Kubernetes, a TPU pod nor Open MPI is detected'),
        ('127.0.0.1:1234,2', "config.distributed is '127.0.0.1:1234,2': give 'off'"),
    ],
)
def test_what_cannot_start_ends_with_one_line(distributed, message, tmp_path):
    log = tmp_path / 'log'
    assert finish([start(1, log, call_main, [f'--config={CONFIG}', f'--config.distributed={distributed}'])]) == [1]
    assert message in last_line(log)


def join_for_two_seconds(distributed):
    with parallel.processes(distributed, timeout_seconds=2):
        pass


def test_processes_that_stay_alone(tmp_path):
    addresses = [f'127.0.0.1:{free_port()}' for _ in range(2)]
    logs = [tmp_path / f'{index}.log' for index in range(2)]
    started = [start(1, logs[i], join_for_two_seconds, f'{addresses[i]},2,{i}') for i in range(2)]
    assert all(code not in (0, None) for code in finish(started))
    for address, log in zip(addresses, logs, strict=True):
        assert last_line(log).startswith(f'error: the processes did not find each other at {address}')


def test_processes_that_disagree_do_not_start(data, tmp_path):
    port = free_port()
    flags = [f'--config={CONFIG}:scratch', f'--workdir={tmp_path / "run"}']
    flags += [f'--config.{name}={value}' for name, value in (SETTINGS | data).items()]
    started = [
        start(1, tmp_path / f'{i}.log', call_main, [*flags, f'--config.distributed=127.0.0.1:{port},2,{i}', *more])
        for i, more in enumerate([[], ['--config.seed=1']])
    ]
    assert finish(started) == [1, 1]
    for index in range(2):
        last = last_line(tmp_path / f'{index}.log')
        assert last.startswith(f'error: process {index} of 2: processes [1] have another config than process 0')
    assert not (tmp_path / 'run').exists()


def test_distributed_is_no_part_of_what_a_run_is():
    get_config = runpy.run_path(str(CONFIG))['get_config']
    config, other = get_config(), get_config()
    other.distributed = 'host:1234,2,1'
    assert run_folder.config_hash(config) == run_folder.config_hash(other)
