"""Sets of images whose patients are known, to which other images can be traced."""

import os
import pathlib
import re
import typing

import h5py
import numpy as np
import tqdm

from brain_jax import InputError
from brain_jax.data import groups, images

_FIGSHARE_CLASSES = {1: 'meningioma', 2: 'glioma', 3: 'pituitary'}
# A small HDF5 file can claim an array of any size, and hide one of any size in a compressed chunk.
_MAX_SIDE = 2**12  # of an array
_MAX_CHUNKS = 2**12
_MAX_CHUNK_BYTES = 2**19  # as stored; deflate makes at most a thousand times as much of them
_THUMBNAIL = 64


class Reference(typing.NamedTuple):
    """Images whose patients are known.

    Attributes:
      file_names: str [n], relative to the folder.
      patients: str [n], '' where the patient is not known.
      class_names: str [n], what each image shows, '' where the set does not tell.
      images: uint8 [n, 64, 64], padded to a square and resized.
    """

    file_names: np.ndarray
    patients: np.ndarray
    class_names: np.ndarray
    images: np.ndarray


def read_reference(folder, *, skip_unreadable=False):
    """Reads a reference set.

    Args:
      folder: holds either the unpacked .mat files of figshare 1512427 (J. Cheng, brain tumor dataset), in sub-folders
        or not, or images and one CSV file with the columns path and patient_id, and source_label if it is known.
      skip_unreadable: leave unreadable files out instead of stopping.

    Returns:
      A `Reference`, and the list of what was left out, a line each.

    Raises:
      InputError: when the folder holds neither, or files in it are unreadable.
    """
    folder = pathlib.Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise InputError(f'{folder}: no such folder of reference images')
    # cvind.mat, which comes with the figshare set, holds the folds of its authors.
    matlab = sorted(path for path in folder.rglob('*.mat') if path.is_file() and path.name != 'cvind.mat')
    tables = sorted(path for path in folder.glob('*.csv') if path.is_file())
    if matlab:
        files = [(path, lambda path=path: read_figshare(path)) for path in matlab]
    elif len(tables) == 1:
        files = _listed_images(folder, tables[0])
    else:
        found = f'there are {len(tables)} CSV files' if tables else 'there is neither'
        raise InputError(
            f'{folder}: a reference set holds .mat files (unpack the zip files first), or images and one CSV file with '
            f'the columns path and patient_id; {found}'
        )
    rows, unreadable = [], []
    for path, read in tqdm.tqdm(files, 'Reading the reference', unit=' images', leave=False, disable=None):
        try:
            image, patient, class_name = read()
        except InputError as error:
            unreadable.append(str(error))
            continue
        name = os.path.relpath(path, folder)
        rows.append((name, patient, class_name, images.pad_and_resize(image, _THUMBNAIL)))
    if not rows or (unreadable and not skip_unreadable):
        raise InputError(
            f'cannot read {len(unreadable):,} of {len(files):,} reference files (mend or remove them, or set '
            '--skip_unreadable):' + ('\n  ' if len(unreadable) > 1 else ' ').join(['', *unreadable])
        )
    file_names, patients, class_names, thumbnails = zip(*rows, strict=True)
    reference = Reference(np.array(file_names), np.array(patients), np.array(class_names), np.stack(thumbnails))
    return reference, unreadable


def _listed_images(folder, table):
    """Returns (path, function that reads image, patient and class) for each row of a reference table."""
    rows = groups.read_table(table)
    if not any(row.patient for row in rows.values()):
        raise InputError(f'reference table {table}: no row names a patient in a column patient_id')

    def read(path, row):
        return images.read_image(path), row.patient, row.source_label

    return [(folder / name, lambda path=folder / name, row=row: read(path, row)) for name, row in rows.items()]


def read_figshare(path):
    """Reads an image of the figshare brain tumor dataset (J. Cheng, doi.org/10.6084/m9.figshare.1512427).

    Args:
      path: a MATLAB 7.3 file, which is HDF5, with cjdata/image, cjdata/label and cjdata/PID.

    Returns:
      The image, uint8 [height, width], its range stretched to 0..255; the patient, str; and the class, str. A letter at
      the end of the patient id is left out: ids that differ in it alone may be of one patient.

    Raises:
      InputError: when the file is damaged or has not these arrays.
    """
    try:
        with h5py.File(path, 'r') as file:
            image, label, patient = (_read_array(file, name) for name in ('image', 'label', 'PID'))
    except InputError as error:
        raise InputError(f'{path}: {error}') from error
    except Exception as error:  # on hostile bytes h5py raises nearly anything
        reason = ' '.join(str(error).split())
        raise InputError(f'{path}: damaged, or no MATLAB 7.3 file ({reason})') from error
    if image.ndim != 2 or min(image.shape) < 1 or not np.isfinite(image).all():
        raise InputError(f'{path}: cjdata/image is not an image, its shape is {image.shape}')
    if label.size != 1 or label.item() not in _FIGSHARE_CLASSES:
        raise InputError(f'{path}: cjdata/label is not 1, 2 or 3')
    patient = patient.ravel()
    if not 0 < patient.size < 100 or not all(32 <= number <= 126 for number in patient):  # not so of NaN
        raise InputError(f'{path}: cjdata/PID is not a text')
    image = image.T.astype(np.float64)  # MATLAB stores columns first
    spread = float(image.max()) - float(image.min())
    if not np.isfinite(spread):
        raise InputError(f'{path}: cjdata/image has values too far apart')
    image = (image - image.min()) * (255 / (spread or 1))
    name = ''.join(map(chr, patient.astype(int))).strip()
    return np.round(image).astype(np.uint8), re.sub(r'(?<=\d)[A-Za-z]$', '', name), _FIGSHARE_CLASSES[label.item()]


def _read_array(file, name):
    """Reads cjdata/<name>, an array of numbers whose bytes lie in this very file."""
    parent = file
    for part in ('cjdata', name):
        if not isinstance(parent, h5py.Group) or not isinstance(parent.get(part, getlink=True), h5py.HardLink):
            raise InputError(f'there is no cjdata/{name} in it')
        parent = parent[part]
    array = parent
    if not isinstance(array, h5py.Dataset) or array.external or array.is_virtual or array.dtype.kind not in 'biuf':
        raise InputError(f'cjdata/{name} is not a plain array of numbers')
    if array.shape is None or array.size > _MAX_SIDE**2 or max(array.shape, default=0) > _MAX_SIDE:
        raise InputError(f'cjdata/{name} is larger than {_MAX_SIDE}x{_MAX_SIDE} numbers, or nothing')
    if array.chunks and not _has_plain_chunks(array):
        raise InputError(f'cjdata/{name} is compressed in an unusual way, or in too large or too many pieces')
    return array[()]


def _has_plain_chunks(array):
    """Tells whether chunks are few, small, and packed once by MATLAB's deflate, maybe shuffled or with a checksum."""
    properties = array.id.get_create_plist()
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    allowed = (h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32)
    if len(set(filters)) < len(filters) or not set(filters) <= set(allowed) or max(array.chunks) > _MAX_SIDE:
        return False
    if np.prod([-(-side // chunk) for side, chunk in zip(array.shape, array.chunks, strict=True)]) > _MAX_CHUNKS:
        return False
    stored = [array.id.get_chunk_info(i).size for i in range(array.id.get_num_chunks())]
    return max(stored, default=0) <= _MAX_CHUNK_BYTES
