"""Splits, order and batches: from prepared records to arrays on the devices.

Images that belong together, as slices of a patient or copies, form a group, and no group stands on two sides of a
split. A batch is a pure function of the seed and the step, so a resumed run needs no saved iterator: it asks for the
steps that are left.
"""

import collections
import concurrent.futures
import csv
import dataclasses
import hashlib
import itertools
import os
import pathlib
import time
import typing
from collections.abc import Sequence

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging
from sklearn import model_selection

from brain_jax import InputError, files, parallel
from brain_jax.data import brain_tumor_mri, groups, images, leakage

# Each thread makes a whole batch, ahead of its use: this hides the decoding of images that are not held in memory.
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """Labelled images with random access.

    Attributes:
      images: uint8 [size, size] each, of the whole data set: an array, or a sequence that decodes on access.
      index: int32 [n], where in `images` an example is. The order is that of the file names, Training's first, whatever
        the split, so this names an image in every run.
      labels: int32 [n].
      file_names: str [n], relative to the data folder.
      sha256: str [n], of the image files.
      groups: str [n]; examples of one group must stay on the same side of any split.
      patients: str [n], '' where the patient is not known.
    """

    images: Sequence[np.ndarray]
    index: np.ndarray
    labels: np.ndarray
    file_names: np.ndarray
    sha256: np.ndarray
    groups: np.ndarray
    patients: np.ndarray

    def __len__(self):
        return len(self.labels)

    def batch(self, rows):
        """Returns the examples at `rows`, int [b], as a dict of arrays; see `train_batches`."""
        index = self.index[rows]
        in_memory = isinstance(self.images, np.ndarray)
        return {
            'image': self.images[index] if in_memory else np.stack([self.images[i] for i in index]),
            'label': self.labels[rows],
            'mask': np.ones(len(rows), bool),
            'index': index,
        }

    def subset(self, rows):
        """Returns the examples at `rows`, an integer array; the images are shared, not copied."""
        arrays = ('index', 'labels', 'file_names', 'sha256', 'groups', 'patients')
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in arrays})


class Images(typing.NamedTuple):
    """A data set, not split yet.

    Attributes:
      name: name, variant and version of the prepared records.
      folder: pathlib.Path of the prepared records.
      class_names: the classes in the order of their labels.
      examples: all of Training, then all of Testing.
      is_test: bool [n], of the folder Testing.
    """

    name: str
    folder: pathlib.Path
    class_names: tuple[str, ...]
    examples: Examples
    is_test: np.ndarray


class Dataset(typing.NamedTuple):
    """A data set, split.

    Attributes:
      name: name, variant and version of the prepared records.
      folder: pathlib.Path of the prepared records.
      class_names: the classes in the order of their labels.
      train: what is learned from.
      validation: chooses the checkpoint; None when config.validation_fraction is 0.
      test: read once, at the end.
      split_sha256: hexadecimal hash of which file, with which content and class, lies in which split.
    """

    name: str
    folder: pathlib.Path
    class_names: tuple[str, ...]
    train: Examples
    validation: Examples | None
    test: Examples
    split_sha256: str


class _DecodedOnAccess:
    """The resized images of record sources, one after the other, each decoded when it is asked for."""

    def __init__(self, sources, size):
        self._rows = [(source, i) for source in sources for i in range(len(source))]
        self._size = size

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, i):
        source, row = self._rows[int(i)]
        return images.pad_and_resize(images.decode_image(source[row]['image']), self._size)


def load_dataset(config):
    """Loads the images and splits them, see `load_images` and `split_images`."""
    return split_images(load_images(config), config)


def load_images(config):
    """Prepares the records if need be, reads them, and finds out which images belong together.

    Args:
      config: the run's configuration; used are data_dir, dataset, prepared_dir, skip_unreadable, groups,
        skip_mislabelled, image_size and cache_images.

    Returns:
      `Images`.

    Raises:
      InputError: for unusable data, or a bad group table.
    """
    table = groups.read_table(config.groups) if config.groups else {}
    builder = brain_tumor_mri.prepare(
        config.data_dir,
        dataset=config.dataset,
        prepared_dir=config.prepared_dir,
        skip_unreadable=config.skip_unreadable,
    )
    class_names = tuple(builder.info.features['label'].names)
    in_memory = _fits_in_memory(config.cache_images, builder.info.splits.total_num_examples * config.image_size**2)
    # The PNG stays encoded here: images.decode_image is the only decoder.
    sources = builder.as_data_source(decoders={'image': tfds.decode.SkipDecoding()})
    sources = [sources['train'], sources['test']]
    folder = pathlib.Path(builder.data_path)
    examples, pixels = _read_examples(sources, config.image_size, in_memory)
    copies = _find_copies(folder, sources, examples.file_names, pixels)
    joined, patients = groups.join_table(examples.file_names, table, copies)
    examples = dataclasses.replace(examples, groups=joined, patients=patients)
    images_ = Images(
        name=builder.info.full_name,
        folder=folder,
        class_names=class_names,
        examples=examples,
        is_test=np.arange(len(examples)) >= len(sources[0]),
    )
    wrong = groups.find_mislabelled(examples.file_names, [class_names[label] for label in examples.labels], table)
    if not config.skip_mislabelled or not wrong.any():
        return images_
    logging.warning('left out %d mislabelled images', wrong.sum())
    rows = np.flatnonzero(~wrong)
    return images_._replace(examples=examples.subset(rows), is_test=images_.is_test[rows])


def _fits_in_memory(cache_images, num_bytes):
    """Decides whether to hold the images in memory; 'auto' takes at most a quarter of what the machine has."""
    if cache_images not in ('always', 'never', 'auto'):
        raise InputError(f"cache_images is {cache_images!r}: use 'always', 'never' or 'auto'")
    physical = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return cache_images == 'always' or (cache_images == 'auto' and num_bytes < physical / 4)


def _map_images(function, sources, description):
    """Returns function(position, row of its source, image uint8 [height, width]) of every record, in order."""
    rows = [(source, i) for source in sources for i in range(len(source))]

    def call(position):
        source, i = rows[position]
        row = source[i]
        return function(position, row, images.decode_image(row['image']))

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(call, range(len(rows)))
        hidden = parallel.hides_progress()
        return list(tqdm.tqdm(results, description, len(rows), unit=' images', leave=False, disable=hidden))


def _read_examples(sources, size, in_memory):
    """Reads every record once; returns examples, whose groups are still empty, and a hash of each one's pixels."""
    resized = np.empty((sum(map(len, sources)), size, size), np.uint8) if in_memory else _DecodedOnAccess(sources, size)

    def read(position, row, image):
        if in_memory:
            resized[position] = images.pad_and_resize(image, size)
        pixels = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
        return row['label'], row['file_name'].decode(), row['sha256'].decode(), pixels

    rows = _map_images(read, sources, 'Reading the images')
    labels, file_names, sha256, pixels = zip(*rows, strict=True)
    examples = Examples(
        images=resized,
        index=np.arange(len(rows), dtype=np.int32),
        labels=np.array(labels, np.int32),
        file_names=np.array(file_names),
        sha256=np.array(sha256),
        groups=np.full(len(rows), ''),
        patients=np.full(len(rows), ''),
    )
    return examples, pixels


def _find_copies(folder, sources, file_names, pixels):
    """Returns the groups that copies form, str [n]; found once and kept as a table beside the prepared records."""
    path = folder / f'copies_{leakage.NEAR_COPY:g}.csv'
    if not path.exists():
        thumbnails = _map_images(
            lambda position, row, image: images.pad_and_resize(image, 64), sources, 'Comparing the images'
        )
        copies = leakage.copy_groups(file_names, leakage.thumbnails(thumbnails), pixels)
        try:
            with files.replacing(path) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as file:
                csv.writer(file).writerows([('path', 'group'), *zip(file_names, copies, strict=True)])
        except OSError as error:
            logging.warning('%s cannot be kept (%s): the copies are searched again next time', path, error.strerror)
        return copies
    table = groups.read_table(path)
    return np.array([table[name].group for name in file_names])


def split_images(images_, config):
    """Splits a data set into train, validation and test.

    Args:
      images_: `Images`.
      config: the run's configuration; used are split, folds, fold, validation_fraction and seed.
        'standard': the test split is the folder Testing. 'grouped': one of `folds` parts of all images, of whole groups
        and with the classes in equal shares. 'random': the same of single images, which tells how much a split that
        does not know of groups flatters.

    Returns:
      A `Dataset`; no group is in both train and validation and, but for 'standard' and 'random', in test.

    Raises:
      InputError: for a fold that is none, or a class with too few groups.
    """
    examples, class_names = images_.examples, images_.class_names
    if not 0 <= config.validation_fraction < 0.5:
        raise InputError(f'validation_fraction is {config.validation_fraction}: give at least 0 and less than 0.5')
    if config.split == 'standard':
        train_rows, test_rows = np.flatnonzero(~images_.is_test), np.flatnonzero(images_.is_test)
    elif config.split in ('grouped', 'random'):
        if config.folds < 2 or not 0 <= config.fold < config.folds:
            raise InputError(f'fold is {config.fold} of {config.folds} folds: count from 0, and take 2 folds or more')
        units = examples.groups if config.split == 'grouped' else examples.file_names
        train_rows, test_rows = split_by_group(
            examples.labels, units, class_names, folds=config.folds, fold=config.fold, seed=config.seed
        )
    else:
        raise InputError(f"split is {config.split!r}: use 'standard', 'grouped' or 'random'")
    splits = {'train': examples.subset(train_rows), 'test': examples.subset(test_rows)}
    if config.validation_fraction:
        rest = splits['train']
        # Of 1/2, 1/3, 1/4, ... the nearest is taken.
        train_rows, validation_rows = split_by_group(
            rest.labels, rest.groups, class_names, folds=round(1 / config.validation_fraction), fold=0, seed=config.seed
        )
        splits['train'], splits['validation'] = rest.subset(train_rows), rest.subset(validation_rows)
    return Dataset(
        name=images_.name,
        folder=images_.folder,
        class_names=class_names,
        train=splits['train'],
        validation=splits.get('validation'),
        test=splits['test'],
        split_sha256=_describe_splits(splits, class_names),
    )


def split_by_group(labels, units, class_names, *, folds, fold, seed):
    """Draws whole groups for one of several parts, with the classes in the same shares as nearly as the groups allow.

    Args:
      labels: int32 [n].
      units: str [n], the groups.
      class_names: names of the labels, for messages.
      folds: number of parts.
      fold: which of them, from 0.
      seed: another one draws other groups.

    Returns:
      The rows outside of the part and those in it, rising integer arrays.

    Raises:
      InputError: when a class has too few groups.
    """
    for label, name in enumerate(class_names):
        num_groups = len(np.unique(units[labels == label]))
        if num_groups < folds:
            raise InputError(
                f'class {name} has only {num_groups} group{"s" * (num_groups != 1)} of images, a split into {folds} '
                'parts needs as many: take fewer folds, a larger validation_fraction, or 0 to train without validation'
            )
    splitter = model_selection.StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    return next(itertools.islice(splitter.split(labels, labels, units), fold, None))


def _describe_splits(splits, class_names):
    """Logs the size of each split and returns a hash of them all: of sorted lines 'split path sha256 class'."""
    lines = []
    for split, examples in splits.items():
        counts = np.bincount(examples.labels, minlength=len(class_names))
        shares = ', '.join(f'{name} {count}' for name, count in zip(class_names, counts, strict=True))
        logging.info('%s: %d images, %d groups (%s)', split, len(examples), len(set(examples.groups)), shares)
        for name, sha256, label in zip(examples.file_names, examples.sha256, examples.labels, strict=True):
            lines.append(f'{split} {name} {sha256} {class_names[label]}\n')
    return hashlib.sha256(''.join(sorted(lines)).encode()).hexdigest()


def train_batches(examples, *, batch_size, seed, start_step=0, num_steps, process_index=0, process_count=1):
    """Returns the training batches of the steps start_step to num_steps - 1.

    The epochs follow one another without a gap, each with every image once, in an order that depends on the seed and
    the epoch alone. Step k takes the k-th `batch_size` images and each process its part of them. So a run that starts
    at step k sees what it would have seen there, and several processes see together what one would see.

    Args:
      examples: an `Examples`.
      batch_size: images a step, over all processes.
      seed: an integer in [0, 2**32).
      start_step: the first step, 0 but for a resumed run.
      num_steps: number of steps of the whole run.
      process_index: this process.
      process_count: number of processes.

    Returns:
      An iterator over dicts of arrays, with b = batch_size / process_count: image uint8 [b, size, size], label int32
      [b], mask bool [b], index int32 [b].

    Raises:
      InputError: when the processes cannot share a batch evenly.
    """
    local_size = _local_size(batch_size, process_count)
    rows = grain.MapDataset.range(len(examples)).seed(seed).shuffle().repeat()
    batches = rows.batch(local_size).map(examples.batch)
    mine = batches[process_index::process_count]
    return iter(mine[start_step:num_steps].to_iter_dataset(_READ_OPTIONS))


def eval_batches(examples, *, batch_size, process_index=0, process_count=1):
    """Returns batches with every image once, in order; the last is filled up with black images, their mask false.

    Args:
      examples: an `Examples`.
      batch_size: images a batch, over all processes.
      process_index: this process.
      process_count: number of processes; each gets the same number of batches.

    Returns:
      An iterator like that of `train_batches`. Filling has label 0 and index -1.

    Raises:
      InputError: when the processes cannot share a batch evenly.
    """
    local_size = _local_size(batch_size, process_count)
    num_rows = -(-len(examples) // batch_size) * batch_size

    def fill(rows):
        inside = rows < len(examples)
        batch = examples.batch(np.where(inside, rows, 0))
        batch['image'][~inside], batch['label'][~inside], batch['index'][~inside] = 0, 0, -1
        return batch | {'mask': inside}

    batches = grain.MapDataset.range(num_rows).batch(local_size).map(fill)
    return iter(batches[process_index::process_count].to_iter_dataset(_READ_OPTIONS))


def sharded_eval_batches(examples, batch_size, sharding):
    """Returns the batches of `eval_batches` on the devices, each the whole batch of all processes."""
    batches = eval_batches(
        examples, batch_size=batch_size, process_index=jax.process_index(), process_count=jax.process_count()
    )
    return prefetch(batches, sharding)


def _local_size(batch_size, process_count):
    """Returns how many images of a batch each process handles."""
    if batch_size < 1 or batch_size % process_count:
        raise InputError(f'a batch of {batch_size} images cannot be shared evenly by {process_count} processes')
    return batch_size // process_count


class Timed:
    """An iterator that knows how long it was waited for."""

    def __init__(self, iterable):
        self._iterator = iter(iterable)
        self._seconds = 0.0

    def __iter__(self):
        return self

    def __next__(self):
        start = time.monotonic()
        try:
            return next(self._iterator)
        finally:
            self._seconds += time.monotonic() - start

    def take_seconds(self):
        """Returns the seconds spent in `next` since this was last asked."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


def prefetch(batches, sharding, size=2):
    """Puts batches on the devices ahead of their use, so that the transfer runs beside the computation.

    Args:
      batches: dicts of arrays, this process' rows of each batch.
      sharding: a `jax.sharding.Sharding`: how the rows of the whole batch lie on the devices of all processes.
      size: number of batches on their way.

    Yields:
      Dicts of `jax.Array`, each the whole batch.
    """
    queue = collections.deque()
    for batch in batches:
        queue.append({name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()})
        if len(queue) > size:
            yield queue.popleft()
    yield from queue
