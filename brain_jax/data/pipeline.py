"""Splits, order and batches: from prepared records to arrays on the devices.

A batch is a pure function of the seed and the step, so a resumed run needs no saved iterator: it asks for the steps
that are left.
"""

import collections
import concurrent.futures
import csv
import dataclasses
import hashlib
import os
import typing
from collections.abc import Sequence

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging
from scipy import sparse
from sklearn import model_selection

from brain_jax import InputError
from brain_jax.data import brain_tumor_mri, images

# Each thread makes a whole batch, ahead of its use: this hides the decoding of images that are not held in memory.
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Examples:
    """Labelled images with random access, a Grain data source.

    Attributes:
      images: uint8 [size, size] each, all of the split's folder: an array, or a sequence that decodes on access.
      index: int32 [n], where in `images` an example is. The order is that of the file names and validation is a part of
        Training's images, so this names an image in every run.
      labels: int32 [n].
      file_names: str [n], relative to the data folder.
      sha256: str [n], of the image files.
      groups: str [n]; examples of one group must stay on the same side of any split.
    """

    images: Sequence[np.ndarray]
    index: np.ndarray
    labels: np.ndarray
    file_names: np.ndarray
    sha256: np.ndarray
    groups: np.ndarray

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        """Returns image uint8 [size, size], label int32, mask bool (true) and index int32 of example i."""
        image = self.images[self.index[i]]
        return {'image': image, 'label': self.labels[i], 'mask': np.bool_(True), 'index': self.index[i]}

    def subset(self, rows):
        """Returns the examples at `rows`, an integer array; the images are shared, not copied."""
        arrays = ('index', 'labels', 'file_names', 'sha256', 'groups')
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in arrays})


class Dataset(typing.NamedTuple):
    """A data set, split.

    Attributes:
      name: name, variant and version of the prepared records.
      class_names: the classes in the order of their labels.
      train: what is learned from.
      validation: chooses the checkpoint; None when config.validation_fraction is 0.
      test: read once, at the end.
      split_sha256: hexadecimal hash of which file, with which content and class, lies in which split.
    """

    name: str
    class_names: tuple[str, ...]
    train: Examples
    validation: Examples | None
    test: Examples
    split_sha256: str


class _DecodedOnAccess:
    """The resized images of a record source, each decoded when it is asked for."""

    def __init__(self, source, size):
        self._source = source
        self._size = size

    def __len__(self):
        return len(self._source)

    def __getitem__(self, i):
        return images.pad_and_resize(images.decode_image(self._source[int(i)]['image']), self._size)


def load_dataset(config):
    """Prepares the records if need be, reads them and carves the validation split from Training.

    Args:
      config: the run's configuration; used are data_dir, dataset, prepared_dir, skip_unreadable, groups,
        validation_fraction, image_size, cache_images and seed.

    Returns:
      A `Dataset`.

    Raises:
      InputError: for unusable data, a bad group table, or a validation fraction that the data cannot give.
    """
    if not 0 <= config.validation_fraction < 0.5:
        raise InputError(f'validation_fraction is {config.validation_fraction}: give at least 0 and less than 0.5')
    table = read_groups(config.groups) if config.groups else {}
    builder = brain_tumor_mri.prepare(
        config.data_dir,
        dataset=config.dataset,
        prepared_dir=config.prepared_dir,
        skip_unreadable=config.skip_unreadable,
    )
    class_names = tuple(builder.info.features['label'].names)
    # The PNG stays encoded here: images.decode_image is the only decoder.
    sources = builder.as_data_source(decoders={'image': tfds.decode.SkipDecoding()})
    in_memory = _fits_in_memory(config.cache_images, builder.info.splits.total_num_examples * config.image_size**2)
    train, train_pixels = _read_examples(sources['train'], config.image_size, in_memory, 'Reading the training images')
    test, test_pixels = _read_examples(sources['test'], config.image_size, in_memory, 'Reading the test images')

    # Over both folders, as two training images can be related through a test image.
    file_names = np.concatenate([train.file_names, test.file_names])
    groups = find_groups(file_names, train_pixels + test_pixels, table)
    splits = {
        'train': dataclasses.replace(train, groups=groups[: len(train)]),
        'test': dataclasses.replace(test, groups=groups[len(train) :]),
    }
    if config.validation_fraction:
        train_rows, validation_rows = split_validation(
            train.labels, splits['train'].groups, class_names, fraction=config.validation_fraction, seed=config.seed
        )
        splits['validation'] = splits['train'].subset(validation_rows)
        splits['train'] = splits['train'].subset(train_rows)
    return Dataset(
        name=builder.info.full_name,
        class_names=class_names,
        train=splits['train'],
        validation=splits.get('validation'),
        test=splits['test'],
        split_sha256=_describe_splits(splits, class_names),
    )


def _fits_in_memory(cache_images, num_bytes):
    """Decides whether to hold the images in memory; 'auto' takes at most a quarter of what the machine has."""
    if cache_images not in ('always', 'never', 'auto'):
        raise InputError(f"cache_images is {cache_images!r}: use 'always', 'never' or 'auto'")
    physical = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return cache_images == 'always' or (cache_images == 'auto' and num_bytes < physical / 4)


def _read_examples(source, size, in_memory, description):
    """Reads every record once; returns examples, whose groups are still empty, and a hash of each one's pixels."""
    resized = np.empty((len(source), size, size), np.uint8) if in_memory else _DecodedOnAccess(source, size)

    def read(i):
        row = source[i]
        image = images.decode_image(row['image'])
        if in_memory:
            resized[i] = images.pad_and_resize(image, size)
        pixels = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
        return row['label'], row['file_name'].decode(), row['sha256'].decode(), pixels

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = pool.map(read, range(len(source)))
        rows = list(tqdm.tqdm(rows, description, len(source), unit=' images', leave=False, disable=None))
    labels, file_names, sha256, pixels = zip(*rows, strict=True)
    examples = Examples(
        images=resized,
        index=np.arange(len(rows), dtype=np.int32),
        labels=np.array(labels, np.int32),
        file_names=np.array(file_names),
        sha256=np.array(sha256),
        groups=np.full(len(rows), ''),
    )
    return examples, pixels


def read_groups(path):
    """Reads a table of images that belong together, such as all slices of a patient.

    Args:
      path: a CSV file with the columns path (as in `Examples.file_names`) and group; others are ignored.

    Returns:
      A dict from path to group.

    Raises:
      InputError: for a file that cannot be read, a missing column or value, or a path in two groups.
    """
    table = {}
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            reader = csv.DictReader(file)
            for column in {'path', 'group'}.difference(reader.fieldnames or ()):
                raise InputError(f'group table {path}: its first line names no column {column!r}')
            for row in reader:
                name, group = row['path'], row['group']
                if not name or not group:
                    raise InputError(f'group table {path}: line {reader.line_num} has no path or no group')
                if table.setdefault(name, group) != group:
                    raise InputError(f'group table {path}: {name} is in two groups, {table[name]} and {group}')
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f'group table {path} cannot be read: {error}') from error
    return table


def find_groups(file_names, pixels, table):
    """Joins the images that share a group of the table or their pixels, also where it is through other images.

    Args:
      file_names: str [n].
      pixels: str [n], equal where the decoded images are; files of equal bytes are among them.
      table: a dict from file name to group, may be empty.

    Returns:
      str [n], the name of each image's group: its first group in the table, else its first file.

    Raises:
      InputError: when a table names none of the images.
    """
    size = len(file_names)
    tabled = [i for i, name in enumerate(file_names) if name in table]
    if table:
        if not tabled:
            raise InputError(f'the group table names none of the images: its paths must look like {file_names[0]}')
        if len(tabled) < len(table):
            logging.warning('group table: %d of %d paths are not in the data', len(table) - len(tabled), len(table))
        if len(tabled) < size:
            logging.warning('group table: %d images are not in it; only copies join them', size - len(tabled))
    # A graph that links every image to its pixels and its group in the table; what is connected belongs together.
    keys = [f'pixels {key}' for key in pixels] + [f'group {table[file_names[i]]}' for i in tabled]
    _, nodes = np.unique(keys, return_inverse=True)
    links = (np.ones(len(keys)), ([*range(size), *tabled], size + nodes))
    graph = sparse.coo_array(links, shape=(size + len(keys), size + len(keys)))
    _, components = sparse.csgraph.connected_components(graph, directed=False)
    names = {}
    for name, component in zip(file_names, components[:size], strict=True):
        candidate = (0, table[name]) if name in table else (1, f'image {name}')
        names[component] = min(names.get(component, candidate), candidate)
    return np.array([names[component][1] for component in components[:size]])


def split_validation(labels, groups, class_names, *, fraction, seed):
    """Draws whole groups for validation, with the classes in the same shares as nearly as the groups allow.

    Args:
      labels: int32 [n].
      groups: str [n].
      class_names: names of the labels, for messages.
      fraction: part of the images to draw, in (0, 0.5); of 1/2, 1/3, 1/4, ... the nearest is taken.
      seed: another one draws other groups.

    Returns:
      The rows to train on and those to validate on, rising integer arrays.

    Raises:
      InputError: when a class has too few groups for the fraction.
    """
    num_folds = round(1 / fraction)
    for label, name in enumerate(class_names):
        num_groups = len(np.unique(groups[labels == label]))
        if num_groups < num_folds:
            raise InputError(
                f'class {name} has only {num_groups} groups of training images, validation_fraction={fraction:g} needs '
                f'{num_folds}: give a larger fraction, or 0 to train without validation'
            )
    folds = model_selection.StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed)
    return next(folds.split(labels, labels, groups))


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
    batches = grain.MapDataset.source(examples).seed(seed).shuffle().repeat().batch(local_size)
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
    black = np.zeros_like(examples[0]['image'])
    filling = {'image': black, 'label': np.int32(0), 'mask': np.bool_(False), 'index': np.int32(-1)}
    num_rows = -(-len(examples) // batch_size) * batch_size
    rows = grain.MapDataset.range(num_rows).map(lambda i: examples[i] if i < len(examples) else filling)
    return iter(rows.batch(local_size)[process_index::process_count].to_iter_dataset(_READ_OPTIONS))


def _local_size(batch_size, process_count):
    """Returns how many images of a batch each process handles."""
    if batch_size < 1 or batch_size % process_count:
        raise InputError(f'a batch of {batch_size} images cannot be shared evenly by {process_count} processes')
    return batch_size // process_count


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
