"""Images of many requests, answered together: one thread owns the network and takes what waits.

It never waits for a batch to fill up. While a batch is computed the next one gathers by itself, so the more is asked,
the larger batches become.
"""

import collections
import concurrent.futures
import threading
import time
from typing import NamedTuple

import numpy as np

from brain_jax.serving import predictor as predictors

MAX_WAITING = 256  # images; at the pace of a CPU a quarter of a minute
MAX_BATCH_SECONDS = 2


class Full(Exception):
    """Too many images wait already."""


class Answer(NamedTuple):
    """What the network says to an image.

    Attributes:
      prediction: a `predictor.Prediction`.
      heat: float32 [image_size, image_size], where in the image that comes from; None where it was not asked for.
    """

    prediction: predictors.Prediction
    heat: np.ndarray | None


class _Waiting(NamedTuple):
    image: np.ndarray  # uint8 [image_size, image_size]
    explain: bool
    future: concurrent.futures.Future


class Batcher:
    """Answers to images from several threads; see the module.

    Args:
      predictor: a `Predictor`.
      explain: function from a predictor and uint8 [n, image_size, image_size] to heat, float32 of the same shape.
      observe: function that is told the number of images of every batch.
      max_waiting: how many images may wait.
    """

    def __init__(self, predictor, explain, *, observe=lambda size: None, max_waiting=MAX_WAITING):
        self.predictor = predictor
        self.max_waiting = max_waiting
        self._explain = explain
        self._observe = observe
        self.ready = threading.Event()  # set once all is compiled
        self._seconds = dict.fromkeys(predictors.BATCH_SIZES, 1.0)  # that a batch takes, by size, until it is measured
        self._waiting = collections.deque()
        self._condition = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name='network', daemon=True)

    def __len__(self):
        """Returns how many images wait."""
        return len(self._waiting)

    def start(self, *, warm_up=True):
        """Starts the thread, which first compiles all that will be needed, unless told not to; see `ready`."""
        self._warm = warm_up
        self._thread.start()

    def submit(self, pictures, *, explain=False):
        """Hands images over to the thread: all of them, or none.

        Args:
          pictures: sequence of uint8 [height, width] grey arrays of any size.
          explain: whether to tell where in the images the answers come from.

        Returns:
          For each a `concurrent.futures.Future` of an `Answer`; one that is cancelled while it waits costs nothing.

        Raises:
          Full: where too many wait already.
        """
        with self._condition:
            self._check_room(len(pictures))
        batch = self.predictor.preprocess(pictures)  # in the caller's thread: it takes a while
        waiting = [_Waiting(image, explain, concurrent.futures.Future()) for image in batch]
        with self._condition:
            self._check_room(len(waiting))
            self._waiting.extend(waiting)
            self._condition.notify()
        return [item.future for item in waiting]

    def stop(self):
        """Lets the thread finish what waits, and waits for its end."""
        with self._condition:
            self._stopped = True
            self._condition.notify()
        self._thread.join()

    def _warm_up(self):
        """Compiles for batches of each size and measures these; ends early where it should stop.

        While a batch is computed all others wait, so the largest size is left out where it would take many seconds.
        """
        size, measured = self.predictor.image_size, {}
        for count in predictors.BATCH_SIZES:
            expected = min((count / smaller * seconds for smaller, seconds in measured.items()), default=0)
            if self._stopped or (len(measured) > 1 and expected > MAX_BATCH_SECONDS):
                break
            batch = np.zeros((count, size, size), np.uint8)
            self.predictor.answer(batch)
            measured[count] = _seconds(self.predictor.answer, batch)[0]
        self._seconds = measured or self._seconds
        if not self._stopped:
            self._explain(self.predictor, np.zeros((1, size, size), np.uint8))

    def _check_room(self, number):
        if self._stopped or len(self._waiting) + number > self.max_waiting:
            raise Full

    def _run(self):
        if self._warm:
            self._warm_up()
        self.ready.set()
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting or self._stopped)
                if not self._waiting:
                    return
                taken = [self._waiting.popleft() for _ in range(self._choose_size(len(self._waiting)))]
            taken = [item for item in taken if item.future.set_running_or_notify_cancel()]
            if taken:
                self._answer(taken)

    def _choose_size(self, waiting):
        """Returns how many images to take: a batch that is mostly padding can be slower than several small ones."""
        pace = {size: min(size, waiting) / seconds for size, seconds in self._seconds.items()}
        return min(max(pace, key=pace.get), waiting)

    def _adapt(self, count, seconds):
        """Takes how long a batch took into account: the machine may have more or less else to do than at the start."""
        size = next((size for size in self._seconds if size >= count), max(self._seconds))
        self._seconds[size] += 0.1 * (seconds - self._seconds[size])

    def _answer(self, taken):
        """Answers to some images; a defect reaches those who wait for these, and not the thread."""
        self._observe(len(taken))
        try:
            batch = np.stack([item.image for item in taken])
            seconds, found = _seconds(self.predictor.answer, batch)
            self._adapt(len(taken), seconds)
            predictions = self.predictor.judge(*found)
            heats = [self._explain(self.predictor, item.image[None])[0] if item.explain else None for item in taken]
        except Exception as error:
            for item in taken:
                item.future.set_exception(error)
        else:
            for item, prediction, heat in zip(taken, predictions, heats, strict=True):
                item.future.set_result(Answer(prediction, heat))


def _seconds(function, argument):
    """Returns how long a function takes, and what it returns."""
    start = time.perf_counter()
    found = function(argument)
    return time.perf_counter() - start, found
