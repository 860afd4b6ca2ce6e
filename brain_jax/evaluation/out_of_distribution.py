"""How far images lie from those that a run learned from, in what its head sees of them.

A network names one of its classes whatever an image shows, and is often sure of it. What its head sees of a photograph
or of noise lies elsewhere than what it sees of the training images, though.
"""

import io
from typing import NamedTuple

import numpy as np
from sklearn import decomposition

from brain_jax import files

COMPONENTS = 128  # at most
FALSE_ALARMS = 0.05  # share of validation images that lie farther away than the threshold
_FILE = 'out_of_distribution.npz'


class Detector(NamedTuple):
    """A normal distribution over what the head sees of training images, each channel of it standardised.

    Its covariance has some principal components of their own variance, and one variance in all other directions
    (Tipping and Bishop, 1999): a sample covariance of so many channels could not be inverted. Channels differ in
    spread by seven orders of magnitude, and without standardising the wide ones would hide the others.

    Attributes:
      mean: float64 [channels].
      deviation: float64 [channels], standard deviations.
      components: float64 [components, channels], orthonormal.
      variance: float64 [components], along them.
      rest: variance in every other direction.
      threshold: distance of the validation images that lie farthest away, but for the share of false alarms.
    """

    mean: np.ndarray
    deviation: np.ndarray
    components: np.ndarray
    variance: np.ndarray
    rest: float
    threshold: float


def fit(train_pooled, validation_pooled, false_alarms=FALSE_ALARMS):
    """Fits a `Detector`.

    Args:
      train_pooled: float32 [n, channels], what the head sees of training images.
      validation_pooled: float32 [n, channels], the same of images that the run did not learn from.
      false_alarms: share of the latter that may lie beyond the threshold.

    Returns:
      A `Detector`.
    """
    count = min(COMPONENTS, len(train_pooled) - 1, train_pooled.shape[1] - 1)
    train_pooled = np.asarray(train_pooled, np.float64)
    mean, deviation = train_pooled.mean(axis=0), np.maximum(train_pooled.std(axis=0), 1e-6)
    found = decomposition.PCA(count, random_state=0).fit((train_pooled - mean) / deviation)
    detector = Detector(
        mean=mean,
        deviation=deviation,
        components=found.components_,
        variance=np.maximum(found.explained_variance_, 1e-12),
        rest=max(float(found.noise_variance_), 1e-12),
        threshold=np.nan,
    )
    return detector._replace(threshold=float(np.quantile(distances(detector, validation_pooled), 1 - false_alarms)))


def distances(detector, pooled):
    """Returns the Mahalanobis distances of what the head sees of images, float64 [n]."""
    standardised = (np.asarray(pooled, np.float64) - detector.mean) / detector.deviation
    along = standardised @ detector.components.T
    beside = standardised - along @ detector.components
    return np.sqrt(np.sum(along**2 / detector.variance, axis=1) + np.sum(beside**2, axis=1) / detector.rest)


def save(workdir, detector, checkpoint_sha256):
    """Writes a detector into a run's folder, with the hash of the checkpoint that it belongs to."""
    buffer = io.BytesIO()
    np.savez(buffer, checkpoint_sha256=checkpoint_sha256, **detector._asdict())
    files.write_whole(workdir / _FILE, buffer.getvalue())


def load(workdir, checkpoint_sha256):
    """Returns the detector of a run's folder; None where there is none, or it is of another checkpoint."""
    if not (workdir / _FILE).exists():
        return None
    with np.load(workdir / _FILE, allow_pickle=False) as held:
        if str(held['checkpoint_sha256']) != checkpoint_sha256:
            return None
        return Detector(*(held[name][()] for name in Detector._fields))
