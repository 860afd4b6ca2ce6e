"""Being asked to stop: what a run does when its machine is taken away, or its user presses Ctrl-C.

The first SIGTERM or SIGINT sets a flag, which the training loop looks at after every step. A second SIGINT ends the
process at once, and so does a step, an evaluation or a compilation that takes longer than the time a machine is given.
Both are done by a thread that is woken by the signal itself: Python's own handlers run only once the main thread is
back from compiled code, which may take a minute.
"""

import contextlib
import os
import select
import signal
import threading

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h, "try again later": the same command goes on
GRACE_SECONDS = 25  # cluster managers give 30 before they kill


class Interrupted(Exception):
    """A run was asked to stop; the message says what is kept."""


@contextlib.contextmanager
def watch_signals():
    """Yields a `threading.Event` that SIGTERM or SIGINT sets.

    Nothing sets it outside of the main thread, where Python has no handlers, nor where there are several processes: JAX
    has a handler of its own then, see `is_asked_to_stop`.
    """
    stop = threading.Event()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=_watch, args=(reader, stop), daemon=True)
    watcher.start()
    old_descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # The handlers do nothing; without them the signals would end the process.
    old_handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_descriptor)
        os.close(writer)  # ends the thread
        watcher.join()
        os.close(reader)


def is_asked_to_stop(stop, step):
    """Tells whether to save and to stop after a step; several processes, one of which was asked, agree on the step."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return stop.is_set()


def _watch(reader, stop):
    """Reads the numbers of the signals that arrive, until the other end of the pipe is closed."""
    while select.select([reader], [], [], GRACE_SECONDS if stop.is_set() else None)[0]:
        numbers = os.read(reader, 1)
        if not numbers:
            return
        number = signal.Signals(numbers[0])
        if number not in (signal.SIGTERM, signal.SIGINT):
            continue
        if stop.is_set() and number == signal.SIGINT:
            _exit(f'stopped at once by a second {number.name}')
        if not stop.is_set():
            _tell(f'{number.name}: finishing the step, then saving (a second Ctrl-C stops at once)')
            stop.set()
    _exit(f'the step did not finish within {GRACE_SECONDS} s of the signal')


def _tell(message):
    # os.write, as the main thread may hold the lock of the buffer that print would wait for.
    os.write(2, f'\n{message}\n'.encode())


def _exit(reason):
    _tell(f'error: {reason}: the checkpoints that are saved stand, and the same command goes on from the latest')
    os._exit(EXIT_CODE)
