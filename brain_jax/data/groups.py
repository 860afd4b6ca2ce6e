"""Which images belong together: what a table says, and what is connected through it or through copies."""

import csv
import os
import typing

import numpy as np
from absl import logging
from scipy import sparse

from brain_jax import InputError


class GroupRow(typing.NamedTuple):
    """What a table tells of an image; '' where it tells nothing."""

    group: str
    patient: str
    source_label: str


def read_table(path):
    """Reads a table of images that belong together, such as all slices of a patient.

    Args:
      path: a CSV file with the columns path (as in `Examples.file_names`) and group or patient_id, or both; a missing
        value joins nothing. A column source_label names the class that an image has where it comes from.

    Returns:
      A dict from path to `GroupRow`.

    Raises:
      InputError: for a file that cannot be read, a missing column or path, or a path with two answers.
    """
    if not os.path.isfile(path):  # a named pipe would be waited for, and a device never ends
        raise InputError(f'group table {path} cannot be read: not a file')
    table, repeated = {}, []
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or ()
            if 'path' not in columns or not {'group', 'patient_id'} & set(columns):
                raise InputError(
                    f'group table {path}: its first line must name the columns path and group or patient_id'
                )
            for line in reader:
                name = line['path']
                row = GroupRow(*(known(line.get(column)) for column in ('group', 'patient_id', 'source_label')))
                if not name:
                    raise InputError(f'group table {path}: line {reader.line_num} has no path')
                if name in table:
                    repeated.append(name)
                if table.setdefault(name, row) != row:
                    raise InputError(
                        f'group table {path}: {name} stands there twice, in {_describe_row(table[name])} and in '
                        f'{_describe_row(row)}'
                    )
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f'group table {path} cannot be read: {error}') from error
    if repeated:
        logging.warning('group table %s: %d rows stand there twice: %s', path, len(repeated), _some(repeated))
    return table


def known(value):
    """Returns a value of a table, '' if it is one of the words that stand for none: they must not join anything."""
    value = (value or '').strip()
    return '' if value.lower() in ('nan', 'none', 'null', 'na', 'n/a', 'unknown', '?', '-') else value


def _describe_row(row):
    """Returns what a row of a table says, for messages."""
    return ', '.join(f'{name} {value!r}' for name, value in row._asdict().items() if value) or 'no group'


def join_table(file_names, table, copies):
    """Groups images by a table, and by which are copies of one another: a table of patients does not know of all.

    Args:
      file_names: str [n].
      table: of `read_table`; empty where there is none.
      copies: str [n], equal where images are copies.

    Returns:
      The groups and the patients, str [n] each; a patient is '' where the table names none.

    Raises:
      InputError: when the table names none of the images.
    """
    rows = [table.get(name, GroupRow('', '', '')) for name in file_names]
    if not table:
        return copies, np.array([row.patient for row in rows])
    unknown = sorted(table.keys() - set(file_names))
    if len(unknown) == len(table):
        raise InputError(f'the group table names none of the images: its paths must look like {file_names[0]}')
    if unknown:
        logging.warning('group table: %d of %d paths are not in the data: %s', len(unknown), len(table), _some(unknown))
    if missing := sum(name not in table for name in file_names):
        logging.warning('group table: %d images are not in it; only copies join them', missing)
    patients = np.array([row.patient for row in rows])
    classes = {}
    for name, patient in zip(file_names, patients, strict=True):
        classes.setdefault(patient, set()).add(os.path.basename(os.path.dirname(name)))
    for patient, names in classes.items():
        if patient and len(names) > 1:
            logging.warning('group table: patient %s has images of %s', patient, ' and '.join(sorted(names)))
    return find_groups(file_names, [row.group for row in rows], patients, copies), patients


def find_mislabelled(file_names, class_names, table):
    """Lists the images whose class is not that of their source.

    Args:
      file_names: str [n].
      class_names: str [n], the class of each image.
      table: of `read_table`.

    Returns:
      bool [n].
    """
    sources = [table[name].source_label if name in table else '' for name in file_names]
    wrong = np.array([source not in ('', name) for source, name in zip(sources, class_names, strict=True)])
    if wrong.any():
        images = [f'{file_names[i]} ({sources[i]} there)' for i in np.flatnonzero(wrong)]
        logging.warning(
            '%d images have another class than their source; config.skip_mislabelled leaves them out: %s',
            *(len(images), _some(images)),
        )
    return wrong


def find_groups(file_names, *keys):
    """Joins the images that share a key, also where it is through other images.

    Args:
      file_names: str [n].
      *keys: str [n] each, such as groups of a table, patients, or hashes of the pixels. '' joins nothing.

    Returns:
      str [n], the name of each image's group: its first key of the first kind, else its first file.
    """
    size = len(file_names)
    # A graph that links every image to its keys; what is connected belongs together.
    links = [(i, f'{kind} {key}') for kind, column in enumerate(keys) for i, key in enumerate(column) if key]
    _, nodes = np.unique([key for _, key in links], return_inverse=True)
    edges = ([i for i, _ in links], size + nodes)
    graph = sparse.coo_array((np.ones(len(links)), edges), shape=(size + len(links), size + len(links)))
    _, components = sparse.csgraph.connected_components(graph, directed=False)
    names = {}
    for i, component in enumerate(components[:size]):
        candidate = (0, keys[0][i]) if keys[0][i] else (1, f'image {file_names[i]}')
        names[component] = min(names.get(component, candidate), candidate)
    return np.array([names[component][1] for component in components[:size]])


def _some(names, count=10):
    """Returns the first of many names as a text."""
    return ', '.join(names[:count]) + (f' and {len(names) - count} more' if len(names) > count else '')
