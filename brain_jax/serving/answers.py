"""The answers of a finished run to files and folders of pictures and scans, one file after the other."""

import collections
import csv
import glob
import json
import os
import pathlib
import re
from concurrent import futures
from typing import NamedTuple

import numpy as np
from scipy import special

from brain_jax import InputError, files
from brain_jax.data import scans
from brain_jax.serving import explain
from brain_jax.serving.predictor import BATCH_SIZES, Prediction

_THREADS = 4  # that decode and resize while the network computes
_FORMULA = ('=', '+', '-', '@', '\t', '\r')  # what starts a formula in a spreadsheet


class Answer(NamedTuple):
    """The answer to a file.

    Attributes:
      path: as it was given or found.
      prediction: a `Prediction`; None where the file could not be read.
      slices: names of the slices of a volume and a `Prediction` for each; none where the file is one image.
      images: uint8 [n, image_size, image_size], what the network saw.
      error: why it could not be read, or ''.
    """

    path: str
    prediction: Prediction | None
    slices: tuple[tuple[str, Prediction], ...]
    images: np.ndarray
    error: str


def find_files(arguments, listed=()):
    """Returns the files that are meant on a command line.

    Args:
      arguments: paths of files; of folders, for all files below them in the order of their names, but hidden ones;
        patterns with *, ? or []; and '-' for `listed`.
      listed: an iterable of lines, a path each.

    Returns:
      A list of str. What is not there stays in it, for `answer_files` to tell.
    """
    found = []
    for argument in arguments:
        if argument == '-':
            found += [line.rstrip('\n') for line in listed if line.strip()]
        elif os.path.isdir(argument):
            found += _walk(argument)
        elif os.path.exists(argument):
            found.append(argument)
        else:
            for match in sorted(glob.glob(argument, recursive=True)) or [argument]:
                found += _walk(match) if os.path.isdir(match) else [match]
    return found


def _walk(folder):
    """Returns the files below a folder, without following links to folders."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        found += [os.path.join(parent, name) for name in sorted(names) if not name.startswith('.')]
    return found


def answer_files(predictor, paths, *, plane='axial', slices='middle'):
    """Answers to files: pictures, DICOM and NIfTI, as `scans.read_slices` reads them.

    The slices of a volume are answered each, and `combine` makes one answer of them. Files are decoded ahead by a few
    threads, so that as many lie in memory as two batches need.

    Args:
      predictor: a `Predictor`.
      paths: iterable of the files.
      plane: of NIfTI volumes, one of `scans.PLANES`.
      slices: of volumes: 'all', 'middle', or how many.

    Yields:
      An `Answer` for each file, in their order.
    """
    held, count, size = [], 0, BATCH_SIZES[-1]
    for file in _read_ahead(predictor, paths, plane, slices):
        held.append(file)
        count += len(file.images)
        if count >= size or len(held) >= size:
            yield from _answer(predictor, held)
            held, count = [], 0
    yield from _answer(predictor, held)


def combine(predictor, predictions):
    """Makes one answer of those to the slices of a volume.

    The probabilities are the mean of their logarithms, normalised again, as `scores.combine_patients` does it with the
    images of a patient. The distance to the training images is the median of the slices', so the volume counts as out
    of distribution where most of its slices do. Else it abstains where the combined probability is too low.

    Args:
      predictor: a `Predictor`.
      predictions: a `Prediction` for each slice.

    Returns:
      A `Prediction`.
    """
    probabilities = np.array([prediction.probabilities for prediction in predictions])
    combined = special.softmax(np.log(np.maximum(probabilities, np.finfo(float).tiny)).mean(axis=0))
    distances = [prediction.out_of_distribution for prediction in predictions]
    return predictor.decide(combined, None if distances[0] is None else float(np.median(distances)))


class _File(NamedTuple):
    """A file that was read: its path, the names of its slices, the images for the network, and what went wrong."""

    path: str
    names: list[str]
    images: np.ndarray
    error: str


def _read(predictor, path, plane, slices):
    """Reads a file for the network: a `_File`."""
    try:
        found = scans.read_slices(path, plane=plane, slices=slices)
    except InputError as error:
        reason = str(error).removeprefix(f'{path}: ').removeprefix(f'{pathlib.Path(path)}: ')
        return _File(path, [], predictor.preprocess([]), reason)
    return _File(path, [name for name, _ in found], predictor.preprocess([image for _, image in found]), '')


def _read_ahead(predictor, paths, plane, slices):
    """Yields a `_File` for each path, in their order, while threads read those that follow."""
    a_file = BATCH_SIZES[-1] if slices == 'all' else 1 if slices == 'middle' else slices
    ahead = max(BATCH_SIZES[-1] // a_file, _THREADS)  # files; those of a batch while another is answered
    waiting = collections.deque()
    with futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        try:
            for path in paths:
                waiting.append(pool.submit(_read, predictor, path, plane, slices))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _answer(predictor, held):
    """Yields an `Answer` for each `_File`."""
    if not held:
        return
    predictions = iter(predictor.judge(*predictor.answer(np.concatenate([file.images for file in held]))))
    for path, names, images, error in held:
        found = [next(predictions) for _ in names]
        if error:
            yield Answer(path, None, (), images, error)
        elif names == ['']:
            yield Answer(path, found[0], (), images, '')
        else:
            yield Answer(path, combine(predictor, found), tuple(zip(names, found, strict=True)), images, '')


def explain_answers(predictor, given, folder):
    """Passes answers on, and writes a picture of what speaks for each and against it (`explain.class_activation`).

    Slices of a volume are explained each, for the class of the volume.

    Args:
      predictor: a `Predictor`.
      given: iterable of `Answer`.
      folder: to write to: `NUMBER_NAME.png`, by the number of the answer, from 1, and the file's name, or
        `NUMBER_NAME_SLICE.png`.

    Yields:
      The same answers.

    Raises:
      InputError: where a picture cannot be written.
    """
    for number, answer in enumerate(given, 1):
        if answer.prediction is not None:
            best = predictor.class_names.index(answer.prediction.predicted)
            heats = explain.class_activation(predictor, answer.images, np.full(len(answer.images), best))
            slices = answer.slices or [('', answer.prediction)]
            for image, heat, (name, prediction) in zip(answer.images, heats, slices, strict=True):
                title = f'{predictor.class_names[best]}, probability {prediction.probabilities[best]:.3f}'
                title, end = (f'{name}: {title}', f'_{name}') if name else (title, '')
                file = re.sub(r'[^\w.-]+', '_', f'{number:05d}_{os.path.basename(answer.path)[:100]}{end}.png')
                files.write_whole(pathlib.Path(folder, file), explain.draw_overlay(image, heat, title))
        yield answer


def write_answers(answers, file, form, class_names):
    """Writes answers as they come.

    A path that a spreadsheet would take for a formula gets ./ before it in CSV: the same file, and none.

    Args:
      answers: iterable of `Answer`.
      file: a text file.
      form: 'csv', 'jsonl', or 'table', of which the path is the last column.
      class_names: of the run.

    Returns:
      How many of the files could not be read.
    """
    write = {'csv': _csv_writer, 'jsonl': _json_writer, 'table': _table_writer}[form](file, class_names)
    unread = 0
    for answer in answers:
        write(answer)
        unread += answer.prediction is None
    return unread


def _fields(prediction, class_names):
    """Returns what is told of a `Prediction`, or of None, as a dictionary."""
    if prediction is None:
        probabilities, prediction = [None] * len(class_names), Prediction(None, None, None, None, None)
    else:
        probabilities = [round(float(value), 6) for value in prediction.probabilities]
    distance = prediction.out_of_distribution
    return {
        'predicted': prediction.predicted,
        **{f'probability_{name}': value for name, value in zip(class_names, probabilities, strict=True)},
        'abstain': prediction.abstain,
        'reason': prediction.reason,
        'out_of_distribution': None if distance is None else round(distance, 4),
    }


def _csv_writer(file, class_names):
    writer = csv.DictWriter(file, ['path', *_fields(None, class_names), 'error'], lineterminator='\n')
    writer.writeheader()

    def write(answer):
        path = f'./{answer.path}' if answer.path.startswith(_FORMULA) else answer.path
        writer.writerow({'path': path} | _fields(answer.prediction, class_names) | {'error': answer.error})

    return write


def _json_writer(file, class_names):
    def write(answer):
        fields = {'path': answer.path} | _fields(answer.prediction, class_names) | {'error': answer.error}
        if answer.slices:
            fields['slices'] = [{'slice': name} | _fields(found, class_names) for name, found in answer.slices]
        file.write(json.dumps(fields) + '\n')

    return write


def _table_writer(file, class_names):
    widths = (max(map(len, ('predicted', *class_names))), len('probability'), len('abstains: out of distribution'))

    def write_row(*cells):
        file.write('  '.join(cell.ljust(width) for cell, width in zip(cells, (*widths, 0), strict=True)) + '\n')

    def write(answer):
        path = ''.join(letter if letter.isprintable() else '?' for letter in answer.path)  # a terminal obeys some
        if answer.prediction is None:
            write_row('', '', f'error: {answer.error}', path)
            return
        reason = answer.prediction.reason.replace('_', ' ')
        probability = f'{answer.prediction.probabilities.max():.3f}'
        write_row(answer.prediction.predicted, probability, f'abstains: {reason}' if reason else '', path)

    write_row('predicted', 'probability', 'note', 'path')
    return write
