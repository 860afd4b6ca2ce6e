"""What the JSON endpoints and the page share: the network, the decoding of uploads, what is counted."""

import asyncio
import concurrent.futures
import pathlib

import prometheus_client as prometheus

from brain_jax import InputError
from brain_jax.data import scans
from brain_jax.serving import batching, explain, predictor

MAX_BYTES = 2**27  # of a request; `images` and `scans` have limits of their own for a file
MAX_FILES = 16  # of a request
MAX_IMAGES = 64  # slices of all files of a request
ANSWER_SECONDS = 30  # that an image may wait
DECODERS = 2  # files that are decoded at a time; each may take up to a gigabyte


class Busy(Exception):
    """There is more to do than can be done in time; the message says what to do."""


class Service:
    """A run that is served.

    Attributes:
      predictor: its `Predictor`.
      hashes: SHA-256 of its checkpoint, configuration, split and weights, by name.
      batcher: a `batching.Batcher`.
      monitor: a `Monitor`.
    """

    def __init__(self, workdir, *, runtime='jax', wanted_error=None):
        """Loads a run; see `predictor.Predictor.from_workdir` for what it raises."""
        self.predictor = predictor.Predictor.from_workdir(workdir, runtime=runtime, wanted_error=wanted_error)
        self.hashes = predictor.read_calibration(pathlib.Path(workdir))['hashes']
        self.monitor = Monitor()
        self.batcher = batching.Batcher(
            self.predictor,
            lambda loaded, batch: explain.class_activation(loaded, batch),
            observe=self.monitor.batch_size.observe,
        )
        self.monitor.queue_length.set_function(lambda: len(self.batcher))
        self._decoders = concurrent.futures.ThreadPoolExecutor(DECODERS, thread_name_prefix='decode')

    def stop(self):
        """Finishes what waits; where all is still being compiled, what is being compiled now."""
        self._decoders.shutdown(cancel_futures=True)
        self.batcher.stop()

    def decode(self, read, suffix, *, plane='axial', slices='middle'):
        """Decodes an upload in a thread of its own, so that a costly file holds up nobody but others like it.

        Args:
          read: function that returns the file's bytes.
          suffix: ending of its name, with the dot.
          plane, slices: see `scans.decode_slices`.

        Returns:
          A `concurrent.futures.Future` of a list of (name, uint8 [height, width]); it raises `InputError`, whose
          message names no file, where the upload cannot be used.
        """
        return self._decoders.submit(_decode, read, suffix, plane, slices)

    async def answer(self, pictures, *, explain=False):
        """Answers to images.

        Args:
          pictures: sequence of uint8 [height, width] grey arrays of any size.
          explain: whether to tell where in the images the answers come from.

        Returns:
          A list of `batching.Answer`.

        Raises:
          Busy: where too much is waiting already, or an answer took too long.
        """
        waiting = []
        try:
            waiting = await asyncio.to_thread(self.batcher.submit, pictures, explain=explain)
            answers = asyncio.gather(*map(asyncio.wrap_future, waiting))
            return await asyncio.wait_for(answers, ANSWER_SECONDS)
        except batching.Full:
            raise Busy('too many images are waiting; try again in a few seconds') from None
        except TimeoutError:
            raise Busy(f'no answer within {ANSWER_SECONDS} s; try again later') from None
        finally:
            for future in waiting:
                future.cancel()  # of no effect on those that are done


def _decode(read, suffix, plane, slices):
    # Only DICOM needs the ending of a name; the rest of it may be a patient's.
    name = f'file{suffix.lower()}' if suffix.lower() in scans.SUFFIXES else 'file'
    try:
        return scans.decode_slices(read(), name=name, plane=plane, slices=slices)
    except InputError as error:
        raise InputError(str(error).removeprefix(f'{name}: ')) from None


class Monitor:
    """What is counted, in the form that Prometheus reads; see `render`."""

    def __init__(self):
        self._registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        self._requests = prometheus.Counter(
            'brain_jax_requests', 'Requests by what they asked for and how they ended.', ['endpoint', 'status'],
            registry=registry,
        )  # fmt: skip
        self._errors = prometheus.Counter(
            'brain_jax_errors', 'Requests that were refused or failed, by kind.', ['kind'], registry=registry
        )
        self._seconds = prometheus.Histogram(
            'brain_jax_request_seconds', 'Time from the head of a request to the end of the answer.', ['endpoint'],
            buckets=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60), registry=registry,
        )  # fmt: skip
        self.queue_length = prometheus.Gauge('brain_jax_queue_length', 'Images that wait.', registry=registry)
        self.held_files = prometheus.Gauge('brain_jax_held_files', 'Files that open pages hold.', registry=registry)
        self.batch_size = prometheus.Histogram(
            'brain_jax_batch_size', 'Images that were computed together.', buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )  # fmt: skip

    def count(self, endpoint, status, seconds):
        """Counts a request.

        Args:
          endpoint: what was asked for, one of few.
          status: of HTTP.
          seconds: that it took.
        """
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)
        if status >= 400 and endpoint != '/healthz':  # which says so while all is well
            self._errors.labels(ERROR_KINDS.get(status, 'other')).inc()

    def render(self):
        """Returns what was counted as bytes, and their content type."""
        return prometheus.generate_latest(self._registry), prometheus.CONTENT_TYPE_LATEST


ERROR_KINDS = {
    400: 'malformed', 401: 'no_token', 403: 'cross_site', 404: 'not_found', 405: 'method', 408: 'too_slow',
    413: 'too_large', 415: 'content_type', 422: 'unusable', 500: 'defect', 503: 'busy',
}  # fmt: skip
