"""Runs that are killed, whose disk is full, whose folder is gone: real processes, a real file system."""

import contextlib
import os
import random
import signal
import subprocess
import time

import pytest
from processes import checkpoint_steps, finish, log_of, run, start_run, wait_for_checkpoint
from test_train import REPOSITORY, TINY, assert_trees_equal, command, make_config
from test_train import run as train_here

from brain_jax.benchmark import worker

CHANGES = TINY | {'num_epochs': 120.0, 'checkpoint_every_steps': 25, 'eval_every_epochs': 15.0}  # 360 steps


@pytest.fixture(scope='module')
def never_stopped(data, tmp_path_factory):
    """Summary and variables of a run that was left alone."""
    return run(CHANGES | data, tmp_path_factory.mktemp('whole') / 'run', step='best_step')


def wait_until(condition, process, seconds):
    """Waits until something holds, the process ends, or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)


def kill_at_some_moment(rng, data, workdir):
    """Starts a run and kills it while it starts, within a save or between; returns which, and what was saved."""
    kind = rng.choice(['starting', 'saving', 'between'])
    before = checkpoint_steps(workdir)
    (process,) = start_run(CHANGES | data, workdir)
    if kind == 'starting':
        wait_until(lambda: False, process, rng.uniform(0, 5))
    else:
        wait_until(lambda: set(checkpoint_steps(workdir)) - set(before), process, 120)
        if kind == 'saving':
            wait_until(lambda: list(workdir.glob('checkpoints/*tmp*')), process, 60)
        wait_until(lambda: False, process, rng.uniform(0, 0.05 if kind == 'saving' else 1.0))
    process.kill()
    process.join()
    return kind, before, checkpoint_steps(workdir)


def check_kills(count, seed, data, workdir, never_stopped):
    """Kills a run at some moments, lets it end, and compares; prints what happened."""
    rng = random.Random(seed)
    for i in range(count):
        kind, before, after = kill_at_some_moment(rng, data, workdir)
        print(f'kill {i + 1} of {count}, {kind}: checkpoints {before} before, {after} after', flush=True)
        assert max(after, default=0) >= max(before, default=0)  # nothing that was saved is lost
        if (workdir / 'summary.json').exists():
            break
    summary, variables = run(CHANGES | data, workdir, step='best_step')
    assert_trees_equal(variables, never_stopped[1])
    assert {**summary, 'wall_seconds': 0} == {**never_stopped[0], 'wall_seconds': 0}


def test_killed_at_some_moments(data, tmp_path, never_stopped):
    check_kills(3, 0, data, tmp_path / 'run', never_stopped)


@pytest.mark.soak
def test_killed_at_thirty_moments(data, tmp_path, never_stopped):
    for i in range(5):  # of six each: a run may end before more
        check_kills(6, 1 + i, data, tmp_path / str(i), never_stopped)


def test_damaged_checkpoint_is_left_behind(data, tmp_path, never_stopped):
    workdir = tmp_path / 'run'
    started = start_run(CHANGES | data, workdir)
    wait_for_checkpoint(started, workdir, 25)
    started[0].kill()
    started[0].join()
    steps = checkpoint_steps(workdir)
    damaged = next((workdir / f'checkpoints/{steps[-1]}/training/d').iterdir())
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)

    summary, variables = run(CHANGES | data, workdir, step='best_step')
    log = log_of(workdir).read_text()
    name = damaged.relative_to(workdir / f'checkpoints/{steps[-1]}')
    assert f'checkpoints/{steps[-1]} is damaged: {name} differs from its checksum' in log
    assert f'going on from step {steps[-2]} of 360' in log
    assert summary['test'] == never_stopped[0]['test']
    assert_trees_equal(variables, never_stopped[1])


@contextlib.contextmanager
def small_disk(path, size):
    """Mounts a file system of a few megabytes."""
    path.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(path)]
    if os.getuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip('no right to mount a file system')
    try:
        yield path
    finally:
        subprocess.run(['umount', '-l', str(path)], check=True)


def test_full_disk(data, tmp_path, never_stopped):
    with small_disk(tmp_path / 'disk', '20m') as workdir:
        changes = CHANGES | data | {'compilation_cache': ''}
        started = start_run(changes, workdir)
        last = wait_for_checkpoint(started, workdir)
        filler = workdir / 'filler'
        with contextlib.suppress(OSError), open(filler, 'wb', buffering=0) as file:
            while True:
                file.write(bytes(4096))
        codes, log = finish(started), log_of(workdir).read_text()
        assert codes == [1]
        line = log.strip().splitlines()[-1]
        assert line.startswith('error: ') and 'No space left on device' in line, log
        assert checkpoint_steps(workdir)[-1] >= last and not (workdir / 'summary.json').exists()

        filler.unlink()
        summary, _ = run(changes, workdir)
        assert summary['test'] == never_stopped[0]['test']


def test_folder_that_vanishes(data, tmp_path):
    workdir = tmp_path / 'run'
    started = start_run(CHANGES | data, workdir)
    wait_for_checkpoint(started, workdir)
    workdir.rename(tmp_path / 'elsewhere')
    codes, log = finish(started), log_of(workdir).read_text()
    assert codes == [1] and 'Traceback' not in log
    assert log.strip().splitlines()[-1].startswith(f'error: {workdir}/checkpoints is gone: '), log
    assert not workdir.exists()


def test_folder_that_cannot_be_written(data, tmp_path):
    with small_disk(tmp_path / 'disk', '1m') as workdir:
        subprocess.run(['mount', '-o', 'remount,ro', str(workdir)], check=True)
        codes, log = finish(start_run(CHANGES | data, workdir)), log_of(workdir).read_text()
    assert codes == [1] and 'Traceback' not in log
    assert log.strip().splitlines()[-1] == f'error: {workdir}/run.json cannot be written: Read-only file system'


def start_command(changes, workdir, mode='scratch'):
    """Starts a run as a user does: its memory is all its own."""
    return subprocess.Popen(command(changes, workdir, mode), cwd=REPOSITORY, stderr=subprocess.DEVNULL)


def wait_for_step(process, workdir, step):
    """Waits until there is a checkpoint of this step or a later one."""
    while max(checkpoint_steps(workdir), default=0) < step:
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.soak
def test_killed_every_fifty_of_a_thousand_steps(data, tmp_path):
    changes = TINY | data | {'num_epochs': 250.0, 'eval_every_epochs': 25.0, 'checkpoint_every_steps': 50}
    changes |= {'validation_fraction': 0.0}
    workdir, peaks = tmp_path / 'killed', []
    for step in range(50, 1000, 50):
        process = start_command(changes, workdir, 'demo')
        wait_for_step(process, workdir, step)
        peaks.append(worker.read_memory('VmHWM', process.pid) / 1e6)
        process.kill()
        process.wait()
        print(f'killed after step {checkpoint_steps(workdir)[-1]}, peak {peaks[-1]:.0f} MB', flush=True)
    config = make_config(changes, 'demo')
    summary, variables = train_here(config, workdir)
    expected_summary, expected = train_here(config, tmp_path / 'whole')
    assert_trees_equal(variables, expected)
    assert summary['steps'] == 1000 and summary['test'] == expected_summary['test']
    assert peaks[-1] < 1.1 * peaks[0]


@pytest.mark.soak
def test_memory_of_a_run_stays_flat(data, tmp_path):
    changes = CHANGES | data | {'num_epochs': 3000.0, 'eval_every_epochs': 100.0}  # 9,000 steps, 30 evaluations
    process = start_command(changes, tmp_path)
    sizes = []
    for step in range(1000, 9000, 1000):
        wait_for_step(process, tmp_path, step)
        sizes.append(worker.read_memory('VmRSS', process.pid) / 1e6)
        print(f'step {step}: {sizes[-1]:.0f} MB resident', flush=True)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert sizes[-1] < 1.1 * sizes[0]
