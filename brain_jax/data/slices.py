"""What readers of scans share: which slices are wanted, how many may be, and how their values become grey."""

import importlib.util
import zlib

import numpy as np

from brain_jax import InputError
from brain_jax.data import images

LUMA = np.array([0.299, 0.587, 0.114])  # of red, green and blue: ITU-R 601, as in `images`
MAX_SIDE = 2**12  # of a volume, and of a slice whose pixels are made square
MAX_PIXELS = 2**26  # of all slices that are asked for

_MAX_SLICES = 2**12
_MAX_SLICE_PIXELS = 2**24
_MAX_MEMBERS = 2**14  # of a gzip file
_TAIL = 0.1  # percent of the values that are taken for black, and as many for white


def choose_slices(count, slices):
    """Returns the indices of the wanted slices, evenly spread.

    Args:
      count: how many there are.
      slices: 'all', 'middle', or how many are wanted.

    Returns:
      A range, or a list of int.

    Raises:
      InputError: for anything else.
    """
    if slices == 'all':
        return range(count)
    wanted = 1 if slices == 'middle' else slices
    if not isinstance(wanted, int) or wanted < 1:
        raise InputError(f"slices is {slices!r}: it must be 'all', 'middle', or a number from 1")
    wanted = min(wanted, count)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(min(wanted, _MAX_SLICES + 1))]


def check_installed(package):
    """Raises `InputError` where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f'needs {package}: pip install -r requirements-serve.txt')


def check_amount(count, height, width, max_pixels=MAX_PIXELS):
    """Raises `InputError` for more slices than should be decoded, or for too large or too small ones."""
    if min(height, width) < 2 or height * width > _MAX_SLICE_PIXELS:
        raise InputError(f'slices of {width}x{height} pixels; 2x2 up to {_MAX_SLICE_PIXELS >> 20} megapixels are read')
    if count > _MAX_SLICES or count * height * width > max_pixels:
        raise InputError(f'{count:,} slices of {width}x{height} pixels are too many; ask for fewer')


def squared(image, row_spacing, column_spacing):
    """Makes the pixels of an image square, as large as their shorter side.

    Args:
      image: uint8 [height, width].
      row_spacing: distance between the middles of rows, in any unit.
      column_spacing: the same of columns.

    Returns:
      uint8 [height, width]; the same image where the spacing is even, or none.
    """
    spacing = np.array([row_spacing, column_spacing], np.float64)
    if not np.all(np.isfinite(spacing) & (spacing > 0)) or spacing.max() / spacing.min() < 1.01:
        return image
    extent = np.array(image.shape) * (spacing / spacing.min())
    height, width = np.maximum(np.rint(extent * min(1, MAX_SIDE / extent.max())), 1).astype(int)
    return images.resize(image, height, width)


def scaled(values, black, white):
    """Maps black to 0, white to 255, what lies beyond to these, and what is not a number to 0.

    Args:
      values: float or int [height, width].
      black: of the values.
      white: of the values.

    Returns:
      uint8 [height, width].
    """
    with np.errstate(all='ignore'):
        share = np.subtract(values, black, dtype=np.float64)
        share /= white - black
    np.nan_to_num(share, copy=False)  # in place, as slices may be large
    np.clip(share, 0, 1, out=share)
    share *= 255
    return np.rint(share, out=share).astype(np.uint8)


def find_range(values):
    """Returns the values that are black and white: the percentiles 0.1 and 99.9 of the finite ones.

    Args:
      values: float array.

    Returns:
      Two numbers, the second larger than the first.
    """
    finite = values[np.isfinite(values)]
    with np.errstate(all='ignore'):
        black, white = np.percentile(finite, [_TAIL, 100 - _TAIL]) if finite.size else (0, 0)
    if black == white and finite.size:  # nearly all is background
        black, white = finite.min(), finite.max()
    return black, white if white > black else black + 1


def inflate(data, size, window):
    """Unpacks the first bytes of deflated data.

    Args:
      data: bytes.
      size: how many to unpack at most.
      window: as `zlib.decompressobj` takes it; raw data where negative, else the members of a gzip file.

    Returns:
      A bytearray; shorter than `size` where there is no more.

    Raises:
      InputError: for damaged data.
    """
    unpacker, found, place, members = zlib.decompressobj(window), bytearray(), 0, 1
    while len(found) < size and place < len(data):
        chunk = data[place : place + 2**16]
        try:
            found += unpacker.decompress(chunk, size - len(found))
        except zlib.error:
            raise InputError('packed data that are damaged') from None
        place += len(chunk) - len(unpacker.unconsumed_tail) - len(unpacker.unused_data)
        if unpacker.eof and (window < 0 or members == _MAX_MEMBERS):
            break
        if unpacker.eof:
            unpacker, members = zlib.decompressobj(window), members + 1
    return found
