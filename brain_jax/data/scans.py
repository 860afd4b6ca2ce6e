"""Slices of any medical file as grey uint8 arrays: DICOM, NIfTI, and pictures by way of `images`.

The kind is told by the bytes: a NIfTI header, packed by gzip or not, or DICOM's four letters; DICOM without them by the
name. Errors quote no value of a file. A file may be made to be costly: what is bounded here and in the readers keeps
every one below a gigabyte and a few seconds.
"""

import logging
import pathlib
import warnings

from brain_jax import InputError
from brain_jax.data import dicom, images, nifti

PLANES = nifti.PLANES
SUFFIXES = dicom.SUFFIXES

# Warnings of these packages may quote what a file says. Reading switches them off, too, but that is undone when another
# thread leaves `warnings.catch_warnings`; this is not, as it stands before there are threads.
_READERS = ('pydicom', 'nibabel', 'pylibjpeg', 'libjpeg', 'openjpeg')
_READERS_PATTERN = rf'({"|".join(_READERS)})\b'
warnings.filterwarnings('ignore', module=_READERS_PATTERN)
for _reader in _READERS:
    logging.getLogger(_reader).addHandler(logging.NullHandler())
    logging.getLogger(_reader).propagate = False  # pydicom logs what it warns of, and the errors of its decoders
logging.getLogger('nibabel.global').setLevel(logging.CRITICAL + 1)  # has a handler of its own, which prints


def read_slices(path, *, plane='axial', slices='middle'):
    """Returns the slices in a file; see `decode_slices`.

    Args:
      path: the file.
      plane: of a NIfTI volume, one of `PLANES`.
      slices: 'all', 'middle', or how many.

    Returns:
      A list of (name, uint8 [height, width]).

    Raises:
      InputError: when the file cannot be read, or holds no picture.
    """
    return decode_slices(images.read_file(path, nifti.MAX_BYTES), name=path, plane=plane, slices=slices)


def decode_slices(data, *, name='image', plane='axial', slices='middle'):
    """Decodes slices of a file that is held in memory to grey values.

    A picture is one slice without a name. So is a DICOM file of one frame; of several, `slices` are spread evenly over
    all, named by their number. Of a NIfTI volume they are spread evenly over the part that holds the head, and named by
    the plane and the number along it, from the feet, the back or the patient's left; of several volumes the first
    counts. They lie as a radiologist sees them: front or top of the patient up; the patient's left at the right of
    axial and coronal slices, the face at the left of sagittal ones. Where pixels are not square, they are made so.

    Grey values of DICOM are rescaled and windowed as the file says, and inverted where it says that white is 0. Without
    a window, and in NIfTI, whose intensities mean nothing by themselves, black and white are the percentiles 0.1 and
    99.9, of a DICOM frame or of the NIfTI volume, so that a few voxels brighter than any tissue do not darken the rest.
    Grey values of at most 8 bits in DICOM without a window or rescaling stay what they are.

    Args:
      data: bytes of the file.
      name: what to call it in an error; its ending tells DICOM that lacks the letters.
      plane: of a NIfTI volume, one of `PLANES`.
      slices: 'all', 'middle', or how many.

    Returns:
      A list of (name, uint8 [height, width]).

    Raises:
      InputError: when the data is damaged, too large, of a kind that is not read, or holds no picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', module=_READERS_PATTERN)
            if data[128:132] == b'DICM' or pathlib.Path(name).suffix.lower() in SUFFIXES:
                return dicom.read_dicom(data, slices)
            if nifti.is_nifti(data):
                return nifti.read_nifti(data, plane, slices)
    except InputError as error:
        raise InputError(f'{name}: {error}') from None
    except Exception as error:  # on hostile bytes the readers raise nearly anything, and may quote what they read
        raise InputError(f'{name}: cannot be decoded ({type(error).__name__}); it may be damaged') from None
    return [('', _read_picture(data, name))]


def _read_picture(data, name):
    """Decodes a picture, whose size is bounded as `images` does it."""
    if len(data) > images.MAX_BYTES:
        raise InputError(f'{name}: larger than {images.MAX_BYTES >> 20} MiB')
    try:
        images.read_header(data, name=name)
    except InputError:
        reason = 'no JPEG, PNG, BMP, TIFF, WebP, DICOM or NIfTI file, or its header is damaged'
        raise InputError(f'{name}: {reason if data else "an empty file"}') from None
    return images.decode_image(data, name=name)
