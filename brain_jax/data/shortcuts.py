"""Probes for shortcuts: how far the class can be told from what has nothing to do with the disease.

Each probe is a plain classifier on a few numbers an image. What it gets right, a network may get right in the same way.
"""

import typing
from collections.abc import Callable

import numpy as np
from sklearn import dummy, model_selection, neighbors, pipeline, preprocessing, tree

from brain_jax.data import images

FOLDS = 5
_TINY = 32  # side of the tiny images, in pixels
_DARK = 16  # grey values below are taken for background


class Probe(typing.NamedTuple):
    """A probe: what it looks at, its classifier, and what to do where it scores well."""

    title: str
    make_classifier: Callable
    advice: str


PROBES = {
    'nearest_pixels': Probe(
        f'nearest neighbour on {_TINY}x{_TINY} grey pixels',
        lambda: neighbors.KNeighborsClassifier(1),
        'Split by patient and copy, and hold every score against this one: it is what looking alike gives without any '
        'learning.',
    ),
    'width_height': Probe(
        'width and height of the file',
        lambda: tree.DecisionTreeClassifier(random_state=0),  # grown to the end it is a table of what was seen
        'Pad every image to a square and resize all alike before a network sees them, as brain_jax does, and never '
        'feed size or aspect.',
    ),
    'channels_format': Probe(
        'channels and format of the file',
        lambda: pipeline.make_pipeline(
            preprocessing.OneHotEncoder(handle_unknown='ignore'), tree.DecisionTreeClassifier(random_state=0)
        ),
        'Make every image grey, as brain_jax does, and save all in one format at one quality.',
    ),
    'border_background': Probe(
        'grey values of border, corners and background',
        lambda: tree.DecisionTreeClassifier(min_samples_leaf=5, random_state=0),
        'The classes may come from different sources. Mask the background or crop to the head, and test on images of '
        'another hospital.',
    ),
    'intensity_histogram': Probe(
        'histogram of grey values, 32 bins',
        lambda: tree.DecisionTreeClassifier(min_samples_leaf=5, random_state=0),
        'The classes differ in brightness and contrast. Vary both in augmentation, and compare classes only within one '
        'sequence and scanner.',
    ),
}


def measure_features(data, image):
    """Measures what the probes look at.

    Args:
      data: bytes of an image file.
      image: uint8 [height, width], the decoded image.

    Returns:
      A dict from the name of each probe to a vector; `channels_format` has the format as a string.
    """
    width, height, channels, file_format = images.read_header(data)
    return {
        'nearest_pixels': images.pad_and_resize(image, _TINY).ravel(),
        'width_height': (width, height),
        'channels_format': (channels, file_format),
        'border_background': _describe_background(image),
        'intensity_histogram': np.bincount(image.ravel() >> 3, minlength=32) / image.size,
    }


def _describe_background(image):
    """Returns statistics of the outer frame, of the four corners, and of all dark pixels of an image."""
    depth = max(min(image.shape) // 32, 1)
    frame = np.concatenate(
        [part.ravel() for part in (image[:depth], image[-depth:], image[:, :depth], image[:, -depth:])]
    )
    side = max(min(image.shape) // 8, 1)
    corners = [
        image[rows, columns]
        for rows in (slice(side), slice(-side, None))
        for columns in (slice(side), slice(-side, None))
    ]
    dark = image[image < _DARK]
    return np.array(
        [
            *(frame.mean(), frame.std(), frame.min(), frame.max(), np.mean(frame == 0)),
            *(corner.mean() for corner in corners),
            *(
                dark.size / image.size,
                np.mean(image == 0),
                dark.mean() if dark.size else 0,
                dark.std() if dark.size else 0,
            ),
        ],
        np.float32,
    )


def score_probes(features, labels, is_test, groups):
    """Scores every probe on the split as it is, and across folds that no group straddles.

    Args:
      features: a list of n dicts of `measure_features`.
      labels: int [n].
      is_test: bool [n], where the standard split has its test images.
      groups: str [n].

    Returns:
      Two dicts from the name of a probe, and from 'majority', to an accuracy: fitted on Training and scored on Testing,
      and over all images, each predicted by the fold that has not seen its group. The second is None where a class has
      only one group. 'majority' always answers the most frequent class of what it was fitted on.
    """
    standard = [(np.flatnonzero(~is_test), np.flatnonzero(is_test))]
    folds = _grouped_folds(labels, groups)
    scores = {'majority': _accuracies(dummy.DummyClassifier, np.zeros((len(labels), 1)), labels, standard, folds)}
    for name, probe in PROBES.items():
        matrix = np.array([row[name] for row in features])
        matrix = matrix if matrix.dtype.kind == 'U' else matrix.astype(np.float32)  # differences of uint8 would wrap
        scores[name] = _accuracies(probe.make_classifier, matrix, labels, standard, folds)
    return (
        {name: accuracy for name, (accuracy, _) in scores.items()},
        {name: accuracy for name, (_, accuracy) in scores.items()} if folds else None,
    )


def _grouped_folds(labels, groups):
    """Returns (training rows, test rows) of up to FOLDS folds; none where a class has only one group."""
    num_folds = min(FOLDS, *(len(np.unique(groups[labels == label])) for label in np.unique(labels)))
    if num_folds < 2:
        return []
    splitter = model_selection.StratifiedGroupKFold(num_folds, shuffle=True, random_state=0)
    return list(splitter.split(labels, labels, groups))


def _accuracies(make_classifier, matrix, labels, *splits):
    """Returns an accuracy for each of several lists of (training rows, test rows), over all its test rows."""
    accuracies = []
    for rows in splits:
        correct = [
            make_classifier().fit(matrix[a], labels[a]).predict(matrix[b]) == labels[b] for a, b in rows if len(b)
        ]
        accuracies.append(float(np.concatenate(correct).mean()) if correct else None)
    return accuracies
