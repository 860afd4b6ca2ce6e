"""A finished run that answers: images in; calibrated probabilities, or an abstention, out.

All that it needs stands in the run's folder: weights, class names and preprocessing from the training, temperature,
thresholds and what training images look like from `scripts/evaluate.py`.
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from absl import logging
from scipy import special

from brain_jax import InputError, checkpoints, finished_run, models, parallel, run_folder, train
from brain_jax.data import images
from brain_jax.evaluation import out_of_distribution
from brain_jax.serving import runtimes

BATCH_SIZES = (1, 8, 64)  # for which the network is compiled; what comes between is filled up


class Prediction(NamedTuple):
    """The answer to an image.

    Attributes:
      predicted: the most probable class, also where it abstains.
      probabilities: float64 [classes], calibrated.
      abstain: whether the answer should not be relied on.
      reason: why it abstains: 'uncertain', 'out_of_distribution' or ''.
      out_of_distribution: distance to the training images, 1 is as far as it may be; None where the run kept no
        validation images to tell how far that is.
    """

    predicted: str
    probabilities: np.ndarray
    abstain: bool
    reason: str
    out_of_distribution: float | None


class Predictor(NamedTuple):
    """A finished run, ready to answer; made by `Predictor.from_workdir`.

    Attributes:
      workdir: pathlib.Path, the run's folder.
      run: content of its `run.json`.
      config: its configuration.
      class_names: of the classes.
      model: a `DenseNet`.
      variables: `params`, averaged where the run averaged them, and `batch_stats` of the chosen checkpoint.
      step: number of that checkpoint.
      checkpoint_sha256: of its parameters and running statistics.
      temperature: by which logits are divided; 1 where none was fitted.
      threshold: the calibrated probability from which it answers; 0 where there was nothing to find one on.
      detector: `out_of_distribution.Detector`, or None.
      answer: function from uint8 [n, image_size, image_size] to logits float32 [n, classes] and what the head sees of
        the images, float32 [n, channels].
    """

    workdir: pathlib.Path
    run: dict
    config: ml_collections.ConfigDict
    class_names: tuple[str, ...]
    model: models.DenseNet
    variables: dict
    step: int
    checkpoint_sha256: str
    temperature: float
    threshold: float
    detector: out_of_distribution.Detector | None
    answer: Callable

    @classmethod
    def from_workdir(cls, workdir, *, runtime='jax', wanted_error=None):
        """Loads a finished and evaluated run.

        Args:
          workdir: the run's folder.
          runtime: what computes the answers, 'jax', or one of `runtimes.LOADERS` for the run's ONNX export.
          wanted_error: share of wrong answers among those given; one of those that `scripts/evaluate.py` looked for,
            None: the largest of them.

        Returns:
          A `Predictor`.

        Raises:
          InputError: where the folder holds no finished and evaluated run, or no export that is proven to be it.
        """
        workdir = pathlib.Path(workdir)
        run, summary = run_folder.read_finished_run(workdir)
        calibration = read_calibration(workdir)
        config, model = finished_run.read_network(workdir, run)
        mesh = parallel.make_mesh()
        variables = finished_run.load_variables(workdir, config, model, mesh, summary['best_step'])
        checkpoint_sha256 = checkpoints.content_hash([variables['params'], variables['batch_stats']])
        if calibration['hashes']['checkpoint_sha256'] != checkpoint_sha256:
            raise InputError(
                f'{workdir / "calibration.json"} is of another checkpoint: run scripts/evaluate.py --workdir {workdir}'
            )
        if runtime == 'jax':
            answer = make_answer(model, config, variables, mesh)
        else:
            answer = runtimes.load_answer(workdir, runtime, checkpoint_sha256)
        return cls(
            workdir=workdir,
            run=run,
            config=config,
            class_names=tuple(run['class_names']),
            model=model,
            variables=variables,
            step=summary['best_step'],
            checkpoint_sha256=checkpoint_sha256,
            temperature=calibration['temperature'] or 1.0,
            threshold=choose_threshold(calibration, wanted_error),
            detector=out_of_distribution.load(workdir, checkpoint_sha256),
            answer=answer,
        )

    @property
    def image_size(self):
        """Side of the images that the network sees, in pixels."""
        return self.config.image_size

    def preprocess(self, pictures):
        """Pads and resizes images: uint8 [height, width] each -> uint8 [n, image_size, image_size]."""
        size = self.image_size
        if not len(pictures):
            return np.zeros((0, size, size), np.uint8)
        return np.stack([images.pad_and_resize(picture, size) for picture in pictures])

    def predict(self, pictures):
        """Answers to images.

        Args:
          pictures: sequence of uint8 [height, width] grey arrays of any size, as `images.read_image` returns them.

        Returns:
          A list of `Prediction`, in their order.
        """
        return self.judge(*self.answer(self.preprocess(pictures)))

    def judge(self, logits, pooled):
        """Makes a `Prediction` of each row of what `answer` returned."""
        probabilities = special.softmax(np.asarray(logits, np.float64) / self.temperature, axis=1)
        if self.detector is None:
            distances = [None] * len(probabilities)
        else:
            distances = out_of_distribution.distances(self.detector, pooled) / self.detector.threshold
        return [self.decide(*row) for row in zip(probabilities, distances, strict=True)]

    def decide(self, probabilities, distance):
        """Makes a `Prediction` of calibrated probabilities, float64 [classes], and of a distance or None."""
        best, reason = int(probabilities.argmax()), ''
        if distance is not None and distance > 1:
            reason = 'out_of_distribution'
        elif probabilities[best] < self.threshold:
            reason = 'uncertain'
        distance = None if distance is None else float(distance)
        return Prediction(self.class_names[best], probabilities, bool(reason), reason, distance)


def read_calibration(workdir):
    """Returns the content of a run's calibration.json.

    Raises:
      InputError: where there is none.
    """
    path = workdir / 'calibration.json'
    if not path.exists():
        raise InputError(
            f'{workdir} was not evaluated yet, so that nothing tells how far to trust it: '
            f'run scripts/evaluate.py --workdir {workdir}'
        )
    return json.loads(path.read_text())


def choose_threshold(calibration, wanted_error):
    """Returns the probability from which to answer; above 1 where no validation answer is sure enough, 0 without any.

    Raises:
      InputError: where no threshold was looked for with this share of errors.
    """
    if calibration['fitted_on'] is None:
        logging.warning('the run kept no validation images: it never abstains, and its probabilities are as trained')
        return 0.0
    thresholds = {found['wanted_error']: found['threshold'] for found in calibration['thresholds']}
    wanted_error = max(thresholds) if wanted_error is None else wanted_error
    if wanted_error not in thresholds:
        raise InputError(
            f'wanted_error is {wanted_error:g}: scripts/evaluate.py looked for {", ".join(map(str, thresholds))}; use '
            f'one of these, or run it with --wanted_error={wanted_error:g}'
        )
    if thresholds[wanted_error] is None:
        logging.warning('no validation answer is sure enough for %g wrong ones: it always abstains', wanted_error)
        return np.inf
    return thresholds[wanted_error]


def compute_answer(model, config, variables, batch):
    """Computes what a run answers.

    Args:
      model: a `DenseNet`.
      config: the run's configuration.
      variables: its `params` and `batch_stats`.
      batch: uint8 [n, image_size, image_size].

    Returns:
      Logits float32 [n, classes], where `train.averages_flips` means of those of an image and its mirror image, and
      what the head sees of the images, float32 [n, channels].
    """
    views = train.stack_views(batch, train.averages_flips(config))
    inputs = models.normalize(views.reshape(-1, *batch.shape[1:]))
    logits, outputs = model.apply(variables, inputs, return_features=True)
    logits, pooled = (x.reshape(-1, views.shape[1], x.shape[-1]) for x in (logits, outputs['pooled']))
    return logits.mean(axis=1), pooled[:, 0]


def make_answer(model, config, variables, mesh):
    """Returns the function that answers to preprocessed images, see `Predictor`.

    It is compiled once for each of the `BATCH_SIZES` that comes up, and `run_folder.use_compilation_cache` keeps that.
    """

    def answer_step(variables, batch):
        return compute_answer(model, config, variables, batch)

    answer_step = jax.jit(answer_step, out_shardings=parallel.replicated(mesh))
    return lambda batch: in_batches(functools.partial(answer_step, variables), mesh, batch)


def in_batches(step, mesh, *arrays, sizes=BATCH_SIZES):
    """Applies a compiled function to many images.

    Args:
      step: function from arrays [size, ...] to one array [size, ...] or a tuple of them.
      mesh: the devices over which each batch is split.
      *arrays: of NumPy, [n, ...].
      sizes: of the batches, in increasing order: it is called for these only, with zeros for what is missing.

    Returns:
      What `step` returns, [n, ...] of NumPy.
    """
    sizes = [-(-size // mesh.size) * mesh.size for size in sizes]
    count = len(arrays[0])
    size = next((size for size in sizes if size >= count), sizes[-1])
    parts = []
    for start in range(0, max(count, 1), size):
        part = [array[start : start + size] for array in arrays]
        missing = size - len(part[0])
        filled = [np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1)) for array in part]
        parts.append(jax.tree.map(np.asarray, step(*jax.device_put(filled, parallel.split_over_data(mesh)))))
    return jax.tree.map(lambda *pieces: np.concatenate(pieces)[:count], *parts)
