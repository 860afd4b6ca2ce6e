"""Runs of several processes on one machine, which talk to each other by its loopback."""

import os
import pathlib
import re
import runpy
import signal
import time

import jax
import numpy as np
import pytest
from processes import (
    CONFIG,
    call_main,
    checkpoint_steps,
    finish,
    free_port,
    last_line,
    log_of,
    run,
    start,
    start_run,
    wait_for_checkpoint,
)
from test_train import TINY, assert_trees_equal, make_config

from brain_jax import InputError, interruption, parallel, run_folder
from brain_jax.data import phantom, pipeline

SETTINGS = TINY | {'eval_batch_size': 16, 'optimizer': 'sgd', 'learning_rate': 0.05, 'num_epochs': 1.0}
# So that it is still going on when it is stopped: JAX looks once a second whether a process was asked to.
LONGER = {'num_epochs': 80.0, 'eval_every_epochs': 20.0, 'checkpoint_every_steps': 20}  # 240 steps


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """As the one of all tests, but prepared by the processes of the first run here."""
    folder = tmp_path_factory.mktemp('data')
    phantom.make_phantom(folder / 'phantom', train_per_class=16, test_per_class=5, image_size=32)
    return {'data_dir': str(folder / 'phantom'), 'prepared_dir': str(folder / 'prepared')}


@pytest.fixture(scope='module')
def one_process(data, tmp_path_factory):
    """Returns a function from the number of devices to what one process makes of them."""
    folder, known = tmp_path_factory.mktemp('one_process'), {}

    def get(devices):
        if devices not in known:
            known[devices] = run(SETTINGS | data, folder / str(devices), devices=devices)
        return known[devices]

    return get


@pytest.mark.parametrize(
    ('processes', 'devices'), [(2, 2), *(pytest.param(4, n, marks=pytest.mark.soak) for n in (1, 2))]
)
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
    assert 'step 3, test: accuracy' in log_of(workdir).read_text()
    assert all('accuracy' not in log_of(workdir, index).read_text() for index in range(1, processes))


def test_four_devices_do_what_one_does(one_process):
    summary, variables = one_process(4)
    expected_summary, expected = one_process(1)
    assert summary['test']['loss'] == pytest.approx(expected_summary['test']['loss'], rel=1e-3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), variables, expected)


def check_asked_to_stop(asked, changes, workdir, after):
    """Asks one of two processes to stop, after a later step than `after`; returns the step that both have saved."""
    started = start_run(changes, workdir, processes=2)
    wait_for_checkpoint(started, workdir, after)
    os.kill(started[asked].pid, signal.SIGTERM)
    assert finish(started) == [interruption.EXIT_CODE] * 2
    logs = [log_of(workdir, index).read_text() for index in range(2)]
    steps = [re.search(r'stopped: step (\d+) of \d+ is saved: the same command goes on', log)[1] for log in logs]
    assert steps == [str(checkpoint_steps(workdir)[-1])] * 2
    assert all('Traceback' not in log for log in logs)
    return int(steps[0])


def check_killed(killed, changes, workdir, after):
    """Kills one of two processes, after a later step than `after`: the other ends, too. Returns the last saved step."""
    started = start_run(changes, workdir, processes=2)
    wait_for_checkpoint(started, workdir, after)
    started[killed].kill()
    start_time = time.monotonic()
    codes = finish(started)
    assert time.monotonic() - start_time < 60
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] not in (0, None)
    last = last_line(log_of(workdir, 1 - killed))
    assert re.match(f'error: process {1 - killed} of 2.*the same command, given to all of them again, goes on', last)
    return checkpoint_steps(workdir)[-1]


@pytest.mark.soak
@pytest.mark.parametrize('process', [0, 1])
def test_one_of_two_processes_is_asked_to_stop_then_killed(process, data, tmp_path):
    """The same command goes on, both times, and ends as one process with two devices that is never stopped."""
    workdir, changes = tmp_path / 'run', SETTINGS | data | LONGER
    step = -1
    for check in (check_asked_to_stop, check_killed):
        step = check(process, changes, workdir, step)
        print(f'{check.__name__}({process}): {step} steps are saved', flush=True)
        assert not (workdir / 'summary.json').exists()
    summary, variables = run(changes, workdir, processes=2)
    assert f'going on from step {step} of ' in log_of(workdir).read_text()
    expected_summary, expected = run(changes, tmp_path / 'whole', devices=2)
    assert_trees_equal(variables, expected)  # a sum of two has no order
    assert summary['test'] == expected_summary['test']


def test_head_on_frozen_features(data, tmp_path):
    changes = TINY | data | {'eval_batch_size': 16}
    _, variables = run(changes, tmp_path / 'two', processes=2, mode='frozen')
    for features in pathlib.Path(data['prepared_dir']).glob('**/features_*'):
        features.unlink()
    _, expected = run(changes, tmp_path / 'one', devices=2, mode='frozen')
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
