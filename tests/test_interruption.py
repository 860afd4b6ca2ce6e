"""Runs that are stopped by real signals, in real processes."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from processes import checkpoint_steps, finish, log_of, run, start_run, wait_for_checkpoint
from test_train import TINY, assert_trees_equal, read_scalars

from brain_jax import interruption

REPOSITORY = pathlib.Path(__file__).parents[1]
# What is kept beside the parameters is all in use, and no cadence divides another.
CHANGES = TINY | {
    'num_epochs': 30.0,
    'batch_size': 8,
    'gradient_accumulation': 2,
    'mixup': 0.2,
    'ema_decay': 0.9,
    'log_every_steps': 7,
    'checkpoint_every_steps': 11,
    'eval_every_epochs': 7.3,
}


def test_stopped_and_resumed_is_never_stopped(data, tmp_path):
    changes, workdir = CHANGES | data, tmp_path / 'stopped'
    step, steps = -1, []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        started = start_run(changes, workdir)
        wait_for_checkpoint(started, workdir, step)
        time.sleep(0.05)
        os.kill(started[0].pid, number)
        codes, log = finish(started), log_of(workdir).read_text()
        assert codes == [interruption.EXIT_CODE], log
        assert 'Traceback' not in log and f'{number.name}: finishing the step' in log
        step = checkpoint_steps(workdir)[-1]
        steps.append(step)
        assert f'stopped: step {step} of ' in log
    assert steps == sorted(set(steps)) and any(step % 7 and step % 11 for step in steps), steps

    summary, variables = run(changes, workdir, step='best_step')
    expected_summary, expected = run(changes, tmp_path / 'whole', step='best_step')
    assert_trees_equal(variables, expected)
    for name in ('best_step', 'steps', 'test', 'validation'):
        assert summary[name] == expected_summary[name]
    scalars, expected_scalars = (read_scalars(tmp_path / name)[0] for name in ('stopped', 'whole'))
    for tag in expected_scalars:
        if not any(word in tag for word in ('per_sec', 'waiting', 'uptime')):
            assert scalars[tag] == expected_scalars[tag], tag


def test_second_interrupt_stops_at_once(data, tmp_path):
    workdir = tmp_path / 'run'
    started = start_run(CHANGES | data | {'num_epochs': 1000.0, 'checkpoint_every_steps': 1}, workdir)
    wait_for_checkpoint(started, workdir)
    for _ in range(2):
        os.kill(started[0].pid, signal.SIGINT)
        time.sleep(0.001)
    codes, log = finish(started), log_of(workdir).read_text()
    assert codes == [interruption.EXIT_CODE] and 'Traceback' not in log


@pytest.mark.parametrize(
    ('numbers', 'message'),
    [
        (['SIGTERM'], 'error: the step did not finish within 1 s of the signal'),
        (['SIGINT', 'SIGINT'], 'error: stopped at once by a second SIGINT'),
    ],
)
def test_compiled_code_does_not_hold_a_signal_up(numbers, message):
    program = f"""if True:
        import hashlib, os, signal, threading, time
        from brain_jax import interruption
        interruption.GRACE_SECONDS = 1
        def ask():
            for number in {numbers}:
                time.sleep(0.5)
                os.kill(os.getpid(), signal.Signals[number])
        with interruption.watch_signals() as stop:
            threading.Thread(target=ask).start()
            hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)  # minutes without a look at Python's handlers
    """
    process = subprocess.run(
        [sys.executable, '-c', program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == interruption.EXIT_CODE, process.stderr
    assert message in process.stderr and 'Traceback' not in process.stderr


def test_handlers_are_those_from_before():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with interruption.watch_signals() as stop:
        assert not interruption.is_asked_to_stop(stop, 1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.wait(10) and interruption.is_asked_to_stop(stop, 1)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
