"""Runs that are killed, whose disk is full, whose folder is gone: real processes, a real file system."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time

import pytest
from test_interruption import start, wait_for_checkpoint
from test_train import REPOSITORY, TINY, assert_trees_equal, command, load_variables, make_config, run

from brain_jax.benchmark import worker

CHANGES = TINY | {'num_epochs': 120.0, 'checkpoint_every_steps': 25, 'eval_every_epochs': 15.0}  # 360 steps


@pytest.fixture(scope='module')
def never_stopped(data, tmp_path_factory):
    """Summary and variables of a run that was left alone."""
    return run(make_config(data, **CHANGES), tmp_path_factory.mktemp('whole'))


def checkpoint_steps(workdir):
    return sorted(int(path.name) for path in workdir.glob('checkpoints/*') if path.name.isdigit())


def wait_until(condition, process, seconds):
    """Waits until something holds, the process ends, or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)


def kill_at_some_moment(rng, data, workdir):
    """Starts a run and kills it while it starts, within a save or between; returns which, and what was saved."""
    kind = rng.choice(['starting', 'saving', 'between'])
    before = checkpoint_steps(workdir)
    process = start(CHANGES | data, workdir)
    if kind == 'starting':
        wait_until(lambda: False, process, rng.uniform(0, 10))
    else:
        wait_until(lambda: set(checkpoint_steps(workdir)) - set(before), process, 120)
        if kind == 'saving':
            wait_until(lambda: list(workdir.glob('checkpoints/*tmp*')), process, 60)
        wait_until(lambda: False, process, rng.uniform(0, 0.05 if kind == 'saving' else 1.0))
    process.kill()
    process.communicate()
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
    summary, variables = run(make_config(data, **CHANGES), workdir)
    assert_trees_equal(variables, never_stopped[1])
    assert {**summary, 'wall_seconds': 0} == {**never_stopped[0], 'wall_seconds': 0}


def test_killed_at_some_moments(data, tmp_path, never_stopped):
    check_kills(3, 0, data, tmp_path, never_stopped)


@pytest.mark.soak
def test_killed_at_thirty_moments(data, tmp_path, never_stopped):
    for i in range(5):  # of six each: a run may end before more
        check_kills(6, 1 + i, data, tmp_path / str(i), never_stopped)


def test_damaged_checkpoint_is_left_behind(data, tmp_path, never_stopped):
    process = start(CHANGES | data, tmp_path)
    wait_for_checkpoint(process, tmp_path, 25)
    process.kill()
    process.communicate()
    steps = checkpoint_steps(tmp_path)
    damaged = next((tmp_path / f'checkpoints/{steps[-1]}/training/d').iterdir())
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)

    process = start(CHANGES | data, tmp_path)
    _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    name = damaged.relative_to(tmp_path / f'checkpoints/{steps[-1]}')
    assert f'checkpoints/{steps[-1]} is damaged: {name} differs from its checksum' in log
    assert f'going on from step {steps[-2]} of 360' in log
    summary = json.loads((tmp_path / 'summary.json').read_text())
    assert summary['test'] == never_stopped[0]['test']
    config = make_config(data, **CHANGES)
    assert_trees_equal(load_variables(config, tmp_path, summary['best_step']), never_stopped[1])


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
    with small_disk(tmp_path / 'disk', '20m') as disk:
        workdir = disk / 'run'
        changes = CHANGES | data | {'compilation_cache': ''}
        process = start(changes, workdir)
        last = wait_for_checkpoint(process, workdir)
        filler = disk / 'filler'
        with contextlib.suppress(OSError), open(filler, 'wb', buffering=0) as file:
            while True:
                file.write(bytes(4096))
        _, log = process.communicate(timeout=120)
        assert process.returncode == 1
        line = log.strip().splitlines()[-1]
        assert line.startswith('error: ') and 'No space left on device' in line, log
        assert checkpoint_steps(workdir)[-1] >= last and not (workdir / 'summary.json').exists()

        filler.unlink()
        process = start(changes, workdir)
        _, log = process.communicate(timeout=300)
        assert process.returncode == 0, log
        assert json.loads((workdir / 'summary.json').read_text())['test'] == never_stopped[0]['test']


def test_folder_that_vanishes(data, tmp_path):
    process = start(CHANGES | data, tmp_path / 'run')
    wait_for_checkpoint(process, tmp_path / 'run')
    (tmp_path / 'run').rename(tmp_path / 'elsewhere')
    _, log = process.communicate(timeout=120)
    assert process.returncode == 1 and 'Traceback' not in log
    assert log.strip().splitlines()[-1].startswith(f'error: {tmp_path}/run/checkpoints is gone: '), log
    assert not (tmp_path / 'run').exists()


def test_folder_that_cannot_be_written(data, tmp_path):
    with small_disk(tmp_path / 'disk', '1m') as disk:
        subprocess.run(['mount', '-o', 'remount,ro', str(disk)], check=True)
        process = start(CHANGES | data, disk / 'run')
        _, log = process.communicate(timeout=120)
    assert process.returncode == 1 and 'Traceback' not in log
    assert log.strip().splitlines()[-1] == f'error: {disk}/run/run.json cannot be written: Read-only file system'


@pytest.mark.soak
def test_killed_every_fifty_of_a_thousand_steps(data, tmp_path):
    changes = TINY | data | {'num_epochs': 250.0, 'eval_every_epochs': 25.0, 'checkpoint_every_steps': 50}
    changes |= {'validation_fraction': 0.0}
    config = make_config(changes, 'demo')
    peaks = []
    for step in range(50, 1000, 50):
        process = subprocess.Popen(
            command(changes, tmp_path / 'killed', 'demo'), cwd=REPOSITORY, stderr=subprocess.DEVNULL, text=True
        )
        wait_for_checkpoint(process, tmp_path / 'killed', step - 1)
        peaks.append(worker.read_memory('VmHWM', process.pid) / 1e6)
        process.kill()
        process.wait()
        print(f'killed after step {max(checkpoint_steps(tmp_path / "killed"))}, peak {peaks[-1]:.0f} MB', flush=True)
    summary, variables = run(config, tmp_path / 'killed')
    expected_summary, expected = run(config, tmp_path / 'whole')
    assert_trees_equal(variables, expected)
    assert summary['steps'] == 1000 and summary['test'] == expected_summary['test']
    assert peaks[-1] < 1.1 * peaks[0]


@pytest.mark.soak
def test_memory_of_a_run_stays_flat(data, tmp_path):
    process = start(CHANGES | data | {'num_epochs': 3000.0, 'eval_every_epochs': 100.0}, tmp_path)
    sizes = []
    for step in (1000, 9000):
        wait_for_checkpoint(process, tmp_path, step - 1)
        sizes.append(worker.read_memory('VmRSS', process.pid) / 1e6)
        print(f'step {step}: {sizes[-1]:.0f} MB resident', flush=True)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert sizes[1] < 1.1 * sizes[0]
