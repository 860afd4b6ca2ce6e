"""Any image file as one grey uint8 array: the only module that opens image files.

Read are JPEG, PNG, BMP, TIFF and WebP, told apart by their bytes and not by the file's extension. Of several frames the
first counts. Every failure is an `InputError` of one line that names the file. A file may be made to be costly: what is
bounded here keeps every one below a gigabyte and a few seconds.
"""

import io
import os
import pathlib
import struct
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from brain_jax import InputError

_FORMATS = ('JPEG', 'PNG', 'BMP', 'TIFF', 'WEBP')
MAX_BYTES = 2**26  # a file's size
_MAX_PIXELS = 2**25  # width times height, checked before a pixel is decoded
_MAX_SIDE = 2**14  # pixels; bounds the square that pad_and_resize makes of a long, thin image
_MAX_READS = 2**17  # of a file's parts; Pillow walks through segments, chunks and tags one by one
_MAX_SCANS = 64  # of a JPEG; an encoder makes about 10, and each is decoded over the whole image
_MAX_VALUES = 2**17  # of a tag of a TIFF; Pillow makes lists of them
_MAX_EXIF = 2**20  # bytes; a JPEG segment, where EXIF belongs, has 2**16

# Tags of a TIFF.
_PHOTOMETRIC = 262  # tells whether 0 is black
_OFFSETS = (273, 324)  # of strips and tiles
_TILE_SIDES = (322, 323)

_UPRIGHT = {  # from the EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_file(path, max_bytes=MAX_BYTES):
    """Returns the bytes of a file that may be an image.

    Args:
      path: the file.
      max_bytes: how large it may be.

    Returns:
      bytes.

    Raises:
      InputError: when it is not a regular file, too large, or cannot be read.
    """
    path = pathlib.Path(path)
    try:
        if not path.is_file():
            raise InputError(f'{path}: not a file')
        if path.stat().st_size > max_bytes:
            raise InputError(f'{path}: larger than {max_bytes >> 20} MiB')
        return path.read_bytes()
    except OSError as error:
        raise InputError(f'{path}: {os.strerror(error.errno)}') from error


def read_image(path):
    """Returns the image in a file; see `decode_image`.

    Args:
      path: the file.

    Returns:
      uint8 [height, width] array of grey values.

    Raises:
      InputError: when the file cannot be read or is no valid image.
    """
    return decode_image(read_file(path), name=path)


def decode_image(data, *, name='image'):
    """Decodes an image file that is held in memory to grey values.

    The EXIF orientation is applied, transparency is laid on black, and colour becomes luma (ITU-R 601). Grey values of
    more than 8 bits are shifted down from the smallest depth of 8 to 16 bits that holds the largest of them, so 12-bit
    data in a 16-bit file is not near black.

    Args:
      data: bytes of the file.
      name: what to call it in an error.

    Returns:
      uint8 [height, width] array of grey values.

    Raises:
      InputError: when the data is no valid image, truncated, too large, or has float or over 16-bit pixels.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata, which is not used, and of sizes, which are checked here. This context is not
            # thread-safe, but all that threads could leave behind is this one filter.
            warnings.filterwarnings('ignore', module=r'PIL\.')
            with _open(data) as image:
                _check_size(*image.size)
                if image.format == 'TIFF':
                    _check_size(*(image.tag_v2.get(tag, 1) for tag in _TILE_SIDES))  # a tile is decoded as a whole
                image.load()
                grey = _to_grey(_upright(image))
                return 255 - grey if _is_inverted(image) else grey
    except InputError as error:
        raise InputError(f'{name}: {error}') from error
    except UnidentifiedImageError as error:
        reason = 'not a JPEG, PNG, BMP, TIFF or WebP image, or its header is damaged' if data else 'an empty file'
        raise InputError(f'{name}: {reason}') from error
    except Image.DecompressionBombError as error:
        raise InputError(f'{name}: larger than {_MAX_PIXELS >> 20} megapixels') from error
    except Exception as error:  # on hostile bytes Pillow's decoders raise nearly anything, SyntaxError included
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise InputError(f'{name}: cannot be decoded ({reason})') from error


def read_header(data, *, name='image'):
    """Tells how an image file is stored, without decoding its pixels.

    Args:
      data: bytes of the file.
      name: what to call it in an error.

    Returns:
      (width in pixels, height in pixels, number of channels, format as Pillow names it), before any EXIF orientation.

    Raises:
      InputError: when the data does not start like an image.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', module=r'PIL\.')  # as in decode_image
            with _open(data) as image:
                return *image.size, len(image.getbands()), image.format
    except Exception as error:  # on hostile bytes Pillow raises nearly anything
        raise InputError(f'{name}: not a JPEG, PNG, BMP, TIFF or WebP image, or its header is damaged') from error


def encode_png(image):
    """Returns an image as the bytes of a PNG file, without loss.

    Args:
      image: uint8 [height, width] array.

    Returns:
      bytes.
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format='PNG', compress_level=1)
    return buffer.getvalue()


def pad_and_resize(image, size):
    """Pads an image with zeros to a centred square and resizes that with antialiasing.

    Args:
      image: uint8 [height, width] array.
      size: side of the result in pixels.

    Returns:
      uint8 [size, size] array.
    """
    height, width = image.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.pad(image, ((top, side - height - top), (left, side - width - left)))
    return np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BILINEAR))


def resize(image, height, width):
    """Resizes an image with antialiasing.

    Args:
      image: uint8 [height, width] array.
      height: of the result in pixels.
      width: the same.

    Returns:
      uint8 [height, width] array.
    """
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


class CountedFile(io.BytesIO):
    """A file in memory that can be read `max_reads` times only."""

    max_reads, complaint = _MAX_READS, 'made of too many small parts; save the image anew'
    reads = 0

    def read(self, size=-1):
        """Reads as usual, and raises `InputError` when that was too often."""
        self.reads += 1
        if self.reads > self.max_reads:
            raise InputError(self.complaint)
        return super().read(size)


def _open(data):
    """Opens an image with Pillow after a look for what would make that slow."""
    if data.startswith(b'\xff\xd8') and data.count(b'\xff\xda') > _MAX_SCANS:  # image data never hold these two bytes
        raise InputError(f'a JPEG of more than {_MAX_SCANS} scans; save the image anew')
    if data[:2] in (b'II', b'MM'):
        _check_tags(data)
    return Image.open(CountedFile(data), formats=_FORMATS)


def _check_tags(data):
    """Refuses a TIFF with a tag of very many values, of which Pillow would make a list."""
    order = '<' if data[:2] == b'II' else '>'
    big = data[2:3] == b'+'  # BigTIFF, as Pillow tells it
    (start,) = struct.unpack_from(order + ('Q' if big else 'I'), data, 8 if big else 4)
    (number,) = struct.unpack_from(order + ('Q' if big else 'H'), data, start)
    entry = struct.Struct(order + ('HHQ8x' if big else 'HHI4x'))
    start += 8 if big else 2
    held = max(len(data) - start, 0) // entry.size
    for tag, kind, count in entry.iter_unpack(data[start : start + entry.size * min(number, held)]):
        is_text = kind in (1, 2, 7) and tag not in _OFFSETS  # bytes, which stay what they are
        if count > _MAX_VALUES and not is_text:
            raise InputError(f'tag {tag} claims {count:,} values; save the image anew')


def _check_size(width, height):
    """Refuses an image that would take too much memory, or has no pixels."""
    if width * height > _MAX_PIXELS:
        raise InputError(f'{width}x{height}, larger than {_MAX_PIXELS >> 20} megapixels')
    if max(width, height) > _MAX_SIDE:
        raise InputError(f'{width}x{height}, a side longer than {_MAX_SIDE} pixels')
    if min(width, height) < 1:
        raise InputError(f'{width}x{height}, no pixels')


def _upright(image):
    """Applies the EXIF orientation; damaged EXIF is taken for none."""
    if len(image.info.get('exif', b'')) > _MAX_EXIF:
        return image
    try:
        # Not ImageOps.exif_transpose, which writes all other EXIF anew.
        method = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # the pixels are loaded, so this can only be the metadata
        return image
    return image if method is None else image.transpose(method)


def _is_inverted(image):
    """Tells whether 0 is white in a TIFF of 16 bits; in others Pillow takes care of it."""
    return image.format == 'TIFF' and image.mode.startswith('I;16') and image.tag_v2.get(_PHOTOMETRIC) == 0


def _to_grey(image):
    """Reduces a loaded Pillow image of any mode to a uint8 [height, width] array."""
    if image.mode.startswith('I'):
        values = np.asarray(image)
        transparent = image.info.get('transparency')  # of a PNG: the grey value that stands for nothing
        return _to_eight_bits(values if transparent is None else np.where(values == transparent, 0, values))
    if image.mode == 'F':
        raise InputError('floating-point pixels; save it as 8- or 16-bit grey')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        black = Image.new('RGB', image.size)
        black.paste(image, mask=image.getchannel('A'))
        image = black
    elif image.mode not in ('1', 'L'):
        image = image.convert('RGB')  # palettes, CMYK and YCbCr have no direct way to grey
    return np.array(image.convert('L'))


def _to_eight_bits(values):
    """Shifts unsigned values of up to 16 bits into uint8 by the depth that their maximum needs."""
    largest = int(values.max())
    if values.min() < 0 or largest >= 2**16:
        raise InputError('pixels outside 0..65535; save it as 8- or 16-bit grey')
    return (values >> max(largest.bit_length() - 8, 0)).astype(np.uint8)
