"""A process that reads files for tests, each in a child of its own whose memory is measured.

A reader that hangs, crashes or eats memory ends its child and nothing else. One process imports what readers need, and
forks for each file. The kernel keeps the children from writing: no file can be made longer than 0 bytes.
"""

import contextlib
import json
import os
import resource
import signal
import sys
import time

import seeds

with contextlib.suppress(ImportError):  # optional; each child would import them anew
    import nibabel  # noqa: F401
    import pydicom.pixels  # noqa: F401

from brain_jax import InputError, pretrained
from brain_jax.data import images, reference, scans

SECONDS = 30  # for one file, by the clock; it should take less than 5, but a busy machine is not to fail
ADDRESSES = 8 << 30  # bytes that a child may map more than it has, to spare the machine


def read_image(path):
    """Reads an image as the data pipeline does."""
    with contextlib.suppress(InputError):  # that of the pixels is the one to look at
        images.read_header(images.read_file(path))
    images.pad_and_resize(images.read_image(path), 224)


def read_scan(path):
    """Reads a scan as it costs most: all slices at once."""
    for _, image in scans.read_slices(path, slices='all'):
        images.pad_and_resize(image, 224)


READERS = {
    'image': read_image,
    'scan': read_scan,
    'weights': lambda path: pretrained.load_pretrained(path, seeds.VARIABLES),
    'figshare': lambda path: images.pad_and_resize(reference.read_figshare(path)[0], 64),
}


def read(reader, path):
    """Reads a file in this process; returns what came of it, see `serve`."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = None
    try:
        READERS[reader](path)
        outcome = 'read'
    except InputError as error:
        outcome, message = 'refused', str(error)
    except BaseException as error:
        outcome, message = type(error).__name__, str(error)
    seconds = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {'outcome': outcome, 'message': message, 'seconds': seconds, 'bytes': grown}


def read_in_child(reader, path):
    """Reads a file in a child; returns what came of it, see `serve`."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        with open('/proc/self/statm') as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + ADDRESSES, mapped + ADDRESSES))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        signal.alarm(SECONDS)  # without a handler it ends the child
        with open(sender, 'w') as pipe:
            json.dump(read(reader, path), pipe)
        os._exit(0)
    os.close(sender)
    with open(receiver) as pipe:
        result = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return json.loads(result) if status == 0 else {'outcome': f'ended by {signal.Signals(-status).name}'}


def serve():
    """Answers lines [reader, path] with lines {'outcome': ..., 'message': ..., 'seconds': ..., 'bytes': ...}.

    The outcome is 'read', 'refused', the name of another error, or what ended the child; the seconds are those of
    the processor, the bytes what the memory grew by.
    """
    for line in sys.stdin:
        print(json.dumps(read_in_child(*json.loads(line))), flush=True)


if __name__ == '__main__':
    serve()
