"""Slices of any medical file as grey uint8 arrays: DICOM, NIfTI, and pictures by way of `images`.

The kind is told by the bytes: a NIfTI header, packed by gzip or not, or DICOM's four letters; DICOM without them by the
name. Of a DICOM file nothing but what its pixels need is read, so that nothing about a patient can get into an answer,
a log or an error; errors quote no value of a file. A file may be made to be costly: what is bounded here keeps every
one below a gigabyte and a few seconds.

pydicom and nibabel are optional packages (requirements-serve.txt), so they are imported where they are needed.
"""

import importlib.util
import io
import logging
import pathlib
import re
import struct
import warnings
import zlib

import numpy as np
from scipy import special

from brain_jax import InputError
from brain_jax.data import images

PLANES = ('axial', 'coronal', 'sagittal')
SUFFIXES = ('.dcm', '.dicom', '.ima')  # of DICOM files that may lack the letters

_MAX_BYTES = 2**28  # a file's size, and what is unpacked of it
_MAX_DICOM_BYTES = 2**27  # pydicom makes up to two copies of the pixels
_MAX_READS = 2**18  # of a DICOM file's elements; pydicom walks through them one by one
_MAX_ELEMENT = 2**18  # bytes of an element other than pixels and sequences, of which pydicom may make a list
_MAX_SEQUENCE = 2**22  # bytes of a sequence of elements
_MAX_FRAGMENTS = 2**16  # of compressed pixels
_MAX_SCANS = 64  # of a JPEG, as in `images`
_MAX_TILES = 2**12  # of a JPEG 2000
_MAX_RUNS = 2**22  # bytes of a frame that is run-length encoded, which pydicom decodes one by one
_MAX_PIXELS = 2**24  # of a slice
_MAX_ALL_PIXELS = 2**26  # of the slices that are asked for
_MAX_DECODED = 2**24  # the same of compressed ones, with every colour counted
_MAX_SLICES = 2**12
_MAX_SIDE = 2**12  # of a slice whose pixels are made square
_MAX_MEMBERS = 2**14  # of a gzip file
_FRAME_HEADERS = {*range(0xFFC0, 0xFFD0), 0xFFF7} - {0xFFC4, 0xFFC8, 0xFFCC}  # markers of a JPEG, and JPEG-LS
_SAMPLE = 2**22  # voxels from which a volume's range of intensities is found

_TAIL = 0.1  # percent of the values that are taken for black, and as many for white
_HEAD = 0.1  # share of the range from which a voxel is bright, and of the fullest slice's bright voxels that is a head
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R 601, as in `images`

_PIXELS = ('PixelData', 'FloatPixelData', 'DoubleFloatPixelData')
_GROUPS = ('SharedFunctionalGroupsSequence', 'PerFrameFunctionalGroupsSequence')
_ELEMENTS = (
    *('Rows', 'Columns', 'NumberOfFrames', 'SamplesPerPixel', 'PhotometricInterpretation', 'PlanarConfiguration'),
    *('BitsAllocated', 'BitsStored', 'HighBit', 'PixelRepresentation', 'PixelSpacing', 'PixelAspectRatio'),
    *('RescaleSlope', 'RescaleIntercept', 'ModalityLUTSequence'),
    *('WindowCenter', 'WindowWidth', 'VOILUTFunction', 'VOILUTSequence'),
    *(
        f'{colour}PaletteColorLookupTable{part}'
        for colour in ('Red', 'Green', 'Blue')
        for part in ('Descriptor', 'Data')
    ),
    *_GROUPS,
    *_PIXELS,
)

# Warnings of these packages may quote what a file says. Reading switches them off, too, but that is undone when another
# thread leaves `warnings.catch_warnings`; this is not, as it stands before there are threads.
_READERS = ('pydicom', 'nibabel', 'pylibjpeg', 'libjpeg', 'openjpeg')
_READERS_PATTERN = rf'({"|".join(_READERS)})\b'
warnings.filterwarnings('ignore', module=_READERS_PATTERN)
for _reader in _READERS:
    logging.getLogger(_reader).addHandler(logging.NullHandler())
    logging.getLogger(_reader).propagate = False  # pydicom logs what it warns of, and the errors of its decoders


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
    return decode_slices(images.read_file(path, _MAX_BYTES), name=path, plane=plane, slices=slices)


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
                return _read_dicom(data, slices)
            if _nifti_version(_unpack(data, 348)):
                return _read_nifti(data, plane, slices)
    except InputError as error:
        raise InputError(f'{name}: {error}') from None
    except Exception as error:  # on hostile bytes the readers raise nearly anything, and may quote what they read
        raise InputError(f'{name}: cannot be decoded ({type(error).__name__}); it may be damaged') from None
    return [('', _read_picture(data, name))]


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


def _check_installed(package):
    """Raises `InputError` where a package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f'needs {package}: pip install -r requirements-serve.txt')


def _check_amount(count, height, width, limit=_MAX_ALL_PIXELS):
    """Refuses more slices, or larger ones, than should be decoded."""
    if min(height, width) < 2 or height * width > _MAX_PIXELS:
        raise InputError(f'slices of {width}x{height} pixels; 2x2 up to {_MAX_PIXELS >> 20} megapixels are read')
    if count > _MAX_SLICES or count * height * width > limit:
        raise InputError(f'{count:,} slices of {width}x{height} pixels are too many; ask for fewer')


def _squared(image, row_spacing, column_spacing):
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
    height, width = np.maximum(np.rint(extent * min(1, _MAX_SIDE / extent.max())), 1).astype(int)
    return images.resize(image, height, width)


def _scaled(values, black, white):
    """Maps black to 0, white to 255 and what is not a number to 0: float [height, width] -> uint8."""
    with np.errstate(all='ignore'):
        share = (values - black) / (white - black)
    return np.rint(np.clip(np.nan_to_num(share), 0, 1) * 255).astype(np.uint8)


def _range(values):
    """Returns the values, of a float array, that are black and white: percentiles of the finite ones."""
    finite = values[np.isfinite(values)]
    with np.errstate(all='ignore'):
        black, white = np.percentile(finite, [_TAIL, 100 - _TAIL]) if finite.size else (0, 0)
    if black == white and finite.size:  # nearly all is background
        black, white = finite.min(), finite.max()
    return black, white if white > black else black + 1


# DICOM.


class _CountedFile(io.BytesIO):
    """A file in memory that can be read so often only."""

    reads = 0

    def read(self, size=-1):
        """Reads as usual, and raises `InputError` when that was too often."""
        self.reads += 1
        if self.reads > _MAX_READS:
            raise InputError('made of too many small parts')
        return super().read(size)


def _read_dicom(data, slices):
    """Returns the chosen frames of a DICOM file; see `decode_slices`."""
    _check_installed('pydicom')
    if len(data) > _MAX_DICOM_BYTES:
        raise InputError(f'larger than {_MAX_DICOM_BYTES >> 20} MiB')
    dataset = _parse_dicom(data)
    if not any(keyword in dataset for keyword in _PIXELS):
        raise InputError('a DICOM file without a picture')
    count = max(int(dataset.get('NumberOfFrames') or 1), 1)
    wanted = choose_slices(count, slices)
    _check_amount(len(wanted), dataset.Rows, dataset.Columns)
    found = []
    for index, values, photometric in _decode_frames(dataset, count, wanted):
        grey = _frame_to_grey(values, photometric, dataset, index)
        found.append((f'frame {index + 1}' if count > 1 else '', _squared(grey, *_spacing(dataset, index))))
    return found


def _parse_dicom(data):
    """Returns the pydicom dataset of a file: its transfer syntax and what of it is needed to show its pixels.

    pydicom's own `dcmread` reads all there is, and unpacks a deflated file without a bound.
    """
    from pydicom import dataset, filereader, tag

    file = _CountedFile(data)
    file.seek(132 if data[128:132] == b'DICM' else 0)
    meta = filereader.read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    _check_elements(meta)
    syntax = _transfer_syntax(meta, data[file.tell() : file.tell() + 6])
    if syntax.is_deflated:
        file = _CountedFile(_inflate(data[file.tell() :], _MAX_DICOM_BYTES + 1, -zlib.MAX_WBITS))
        if len(file.getbuffer()) > _MAX_DICOM_BYTES:
            raise InputError(f'unpacks to more than {_MAX_DICOM_BYTES >> 20} MiB')
    tags = [tag.Tag(keyword) for keyword in _ELEMENTS]
    found = filereader.read_dataset(file, syntax.is_implicit_VR, syntax.is_little_endian, specific_tags=tags)
    _check_elements(found)
    found.file_meta = dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = syntax
    return found


def _transfer_syntax(meta, start):
    """Returns how a DICOM file is stored, where it does not say so told by the first six bytes of its elements."""
    from pydicom import uid

    syntax = meta.get('TransferSyntaxUID')
    if not syntax:
        group, kind = struct.unpack('<H2x2s', start)
        if not re.fullmatch(b'[A-Z]{2}', kind):
            return uid.ImplicitVRLittleEndian
        return uid.ExplicitVRBigEndian if group >= 2**10 else uid.ExplicitVRLittleEndian
    if not syntax.is_transfer_syntax:
        raise InputError('a DICOM file of an unknown transfer syntax')
    return syntax


def _check_elements(dataset):
    """Refuses a dataset with an element that is longer than it should be, before pydicom looks into it."""
    from pydicom import datadict

    for tag, element in dataset.items():  # as they were read; to iterate over the dataset itself decodes them
        length = getattr(element, 'length', 0)  # a sequence that was parsed at once has none
        limit = _MAX_SEQUENCE if datadict.keyword_for_tag(tag).endswith('Sequence') else _MAX_ELEMENT
        if length > limit and tag.group != 0x7FE0:  # that of the pixels
            raise InputError(f'the element ({tag.group:04x},{tag.element:04x}) is of {length:,} bytes')


def _decode_frames(dataset, count, wanted):
    """Yields index, values [rows, columns] or [rows, columns, colours], and what these mean, of the wanted frames."""
    from pydicom import encaps
    from pydicom.pixels.utils import as_pixel_options

    syntax = dataset.file_meta.TransferSyntaxUID
    decoder = _find_decoder(syntax)
    if not syntax.is_encapsulated:
        options = as_pixel_options(dataset)
        for index in wanted:
            values, properties = decoder.as_array(dataset, index=index, **options)
            yield index, values, properties['photometric_interpretation']
        return
    colours = dataset.SamplesPerPixel
    _check_amount(len(wanted), dataset.Rows, dataset.Columns * colours, _MAX_DECODED)
    if dataset.PixelData.count(b'\xfe\xff\x00\xe0') > _MAX_FRAGMENTS:
        raise InputError('made of too many small parts')
    options = as_pixel_options(dataset, number_of_frames=1)
    missing = set(wanted)
    for index, frame in enumerate(encaps.generate_frames(dataset.PixelData, number_of_frames=count)):
        if index in missing:
            frame = _checked_frame(frame, syntax, dataset.Rows, dataset.Columns, colours)
            values, properties = decoder.as_array(encaps.encapsulate([frame]), index=0, **options)
            yield index, values, properties['photometric_interpretation']
            missing.remove(index)
        if not missing:
            return
    raise InputError(f'holds fewer frames than the {count:,} that it claims')


def _find_decoder(syntax):
    """Returns pydicom's decoder of a transfer syntax.

    Raises:
      InputError: where there is none, or a package is missing for it.
    """
    from pydicom import pixels

    try:
        decoder = pixels.get_decoder(syntax)
    except NotImplementedError:
        raise InputError(f'stored as {syntax.name}, which is not read') from None
    if not decoder.is_available:
        raise InputError(f'stored as {syntax.name}, which needs pylibjpeg: pip install -r requirements-serve.txt')
    return decoder


def _checked_frame(frame, syntax, rows, columns, colours):
    """Returns a compressed frame, without a JP2 header, after a look for what would make its decoding costly.

    The decoders trust the size that the frame itself states, and may reserve memory for it.
    """
    from pydicom import uid

    if syntax == uid.RLELossless:
        if len(frame) > _MAX_RUNS:
            raise InputError(f'a run-length encoded frame of {len(frame):,} bytes')
        return frame
    if syntax in uid.JPEG2000TransferSyntaxes:
        frame = frame[max(frame.find(b'\xff\x4f\xff\x51'), 0) :]
        size = _jpeg2000_size(frame)
    else:
        size = _jpeg_size(frame)
    if size != (rows, columns, colours):
        raise InputError('a compressed frame is of another size than the file says')
    return frame


def _jpeg2000_size(frame):
    """Returns the height, width and number of colours that a JPEG 2000 codestream states (ISO 15444-1, A.5.1)."""
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top, colours = struct.unpack_from(
        '>8IH', frame, 8
    )
    tiles = -(-(right - tile_left) // tile_width) * -(-(bottom - tile_top) // tile_height)
    if tiles > _MAX_TILES:
        raise InputError(f'a JPEG 2000 of {tiles:,} tiles')
    return bottom - top, right - left, colours


def _jpeg_size(frame):
    """Returns the height, width and number of colours that a JPEG states; refuses one that holds several images."""
    size, place = None, 2
    for _ in range(_MAX_FRAGMENTS):
        marker, length = struct.unpack_from('>HH', frame, place)
        if marker == 0xFFFF:  # the first byte fills up
            place += 1
            continue
        if marker == 0xFFDA:  # a scan: what follows is image data, which never hold a marker, and more scans
            break
        if marker in _FRAME_HEADERS:
            if size:
                raise InputError('a JPEG of several sizes')
            size = struct.unpack_from('>HHB', frame, place + 5)
        if marker in (0xFFDE, 0xFFEB):  # hierarchical, or extended by further images
            raise InputError('a JPEG of several images')
        place += 2 + length
    scans = frame[place:]
    if scans.count(b'\xff\xda') > _MAX_SCANS:
        raise InputError(f'a JPEG of more than {_MAX_SCANS} scans')
    if re.search(rb'\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf\xde\xf7]', scans):
        raise InputError('a JPEG of several sizes')
    return size


def _frame_to_grey(values, photometric, dataset, index):
    """Turns what is stored in a frame into what it shows, as DICOM PS3.4 N.2 says.

    Args:
      values: [rows, columns] or [rows, columns, 3] array.
      photometric: what they mean, as DICOM names it.
      dataset: of the file.
      index: of the frame.

    Returns:
      uint8 [rows, columns].
    """
    if photometric == 'PALETTE COLOR':
        return _palette_to_grey(values, dataset)
    largest = 2.0 ** (dataset.get('BitsStored') or 8) - 1  # none of floating-point pixels
    if values.ndim == 3:
        if photometric != 'RGB' and not photometric.startswith('YBR'):
            raise InputError('colours of a kind that is not read')
        return _scaled(values @ _LUMA if photometric == 'RGB' else values[..., 0], 0, largest)
    if not photometric.startswith('MONOCHROME'):
        raise InputError('pixels of a kind that is not read')
    rescaled = _rescale(values, dataset, index)
    grey = _window(rescaled, dataset, index)
    if grey is None:
        is_plain = rescaled is values and values.dtype.kind == 'u' and dataset.BitsStored <= 8
        grey = (
            _scaled(rescaled, 0, largest) if is_plain else _scaled(rescaled, *_range(np.asarray(rescaled, np.float64)))
        )
    return 255 - grey if photometric == 'MONOCHROME1' else grey


def _palette_to_grey(values, dataset):
    """Looks colours up in a file's palette: [rows, columns] -> uint8 [rows, columns]."""
    from pydicom.pixels import processing

    if 'RedPaletteColorLookupTableData' not in dataset:
        raise InputError('colours without a palette, or with one in segments, which is not read')
    colours = processing.apply_color_lut(values, dataset)[..., :3]
    is_deep = colours.dtype.itemsize > 1 and colours.max() > 255  # tables of 8 bits may be stored in 16
    return _scaled(colours @ _LUMA, 0, 65535 if is_deep else 255)


def _group(dataset, index, keyword):
    """Returns the dataset that tells something about a frame: of the functional groups of that name, or the file's."""
    for groups, place in ((_GROUPS[1], index), (_GROUPS[0], 0)):
        items = dataset.get(groups) or []
        if place < len(items):
            _check_elements(items[place])
            if items[place].get(keyword):
                _check_elements(items[place].get(keyword)[0])
                return items[place].get(keyword)[0]
    return dataset


def _rescale(values, dataset, index):
    """Applies the modality lookup table or the rescaling; returns the same array where there is none."""
    if dataset.get('ModalityLUTSequence'):
        return _look_up(values, dataset.ModalityLUTSequence[0], dataset)[0]
    group = _group(dataset, index, 'PixelValueTransformationSequence')
    slope, intercept = group.get('RescaleSlope'), group.get('RescaleIntercept')
    if slope is None or intercept is None or (slope, intercept) == (1, 0):
        return values
    return values * float(slope) + float(intercept)


def _window(values, dataset, index):
    """Applies the first lookup table or window for display (DICOM PS3.3 C.11.2): uint8 [rows, columns], or None."""
    if dataset.get('VOILUTSequence'):
        found, largest = _look_up(values, dataset.VOILUTSequence[0], dataset)
        return _scaled(found, 0, largest)
    group = _group(dataset, index, 'FrameVOILUTSequence')
    center, width = (_first_number(group, keyword) for keyword in ('WindowCenter', 'WindowWidth'))
    if not (np.isfinite(center) and 0 < width < np.inf):
        return None
    function = group.get('VOILUTFunction') or 'LINEAR'
    if function == 'SIGMOID':
        return _scaled(special.expit(4 * (values - center) / width), 0, 1)
    if function == 'LINEAR':  # its window ends at the middle of the last grey value; a width of 1 is a step
        center, width = center - 0.5, max(width - 1, 1e-6)
    return _scaled(values, center - width / 2, center + width / 2)


def _first_number(dataset, keyword):
    """Returns the first of the numbers in an element; NaN where there is none."""
    value = dataset.get(keyword)
    return float(np.ravel([np.nan] if value is None else value)[0])


def _look_up(values, item, dataset):
    """Applies a lookup table (DICOM PS3.3 C.11.1): what the values map to, and the largest that they could map to."""
    _check_elements(item)
    _, first, bits = item.LUTDescriptor
    table = item.LUTData
    if isinstance(table, bytes):
        table = np.frombuffer(table, '<u2' if dataset.file_meta.TransferSyntaxUID.is_little_endian else '>u2')
    table = np.ravel(table)
    index = np.clip(np.floor(values.astype(np.float64)) - first, 0, len(table) - 1).astype(np.int64)
    return table[index], 2.0**bits - 1


def _spacing(dataset, index):
    """Returns the distances of a frame's rows and columns, in any unit."""
    group = _group(dataset, index, 'PixelMeasuresSequence')
    spacing = np.ravel(group.get('PixelSpacing') or dataset.get('PixelAspectRatio') or 1)
    return spacing if len(spacing) == 2 else (1, 1)


# NIfTI.


def _nifti_version(start):
    """Returns the version of a NIfTI header that the first 348 bytes of a file hold: 1 or 2, or None."""
    if len(start) == 348 and start[344:347] in (b'n+1', b'ni1'):
        return 1
    return 2 if start[4:7] in (b'n+2', b'ni2') else None


def _unpack(data, size):
    """Returns the first bytes of a file that may be packed by gzip; fewer where there are no more."""
    if data[:2] == b'\x1f\x8b':
        return _inflate(data, size, 16 + zlib.MAX_WBITS)
    return memoryview(data)[:size]


def _inflate(data, size, window):
    """Unpacks the first bytes of deflated data: raw where `window` is negative, else the members of a gzip file."""
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


def _read_nifti(data, plane, slices):
    """Returns the chosen slices of a NIfTI volume; see `decode_slices`."""
    _check_installed('nibabel')
    voxels, affine, sign, is_one = _parse_nifti(data)
    voxels, spacing = _canonical(voxels, affine)
    axis = {'sagittal': 0, 'coronal': 1, 'axial': 2}[plane]
    voxels = np.moveaxis(voxels, axis, 0)
    step = int(np.ceil(np.sqrt(voxels.size / _SAMPLE)))
    sample = _intensities(voxels[:, ::step, ::step], sign)
    black, white = _range(sample)
    with np.errstate(all='ignore'):
        bright = np.mean(sample > black + _HEAD * (white - black), axis=(1, 2))
    head = np.flatnonzero(bright >= _HEAD * bright.max())
    wanted = [int(head[0]) + index for index in choose_slices(int(head[-1] - head[0]) + 1, slices)]
    _check_amount(len(wanted), *voxels.shape[:0:-1])
    found = []
    for index in wanted:
        # [left to right or back to front, back to front or feet to head] -> both turned, and the latter down the rows.
        grey = _scaled(_intensities(voxels[index], sign).T[::-1, ::-1], black, white)
        name = f'{plane} {index + 1}' + ('' if is_one else ' of volume 1')
        found.append((name, _squared(grey, *np.delete(spacing, axis)[::-1])))
    return found


def _parse_nifti(data):
    """Returns the first volume of a NIfTI file.

    Returns:
      Its voxels as they are stored, [i, j, k] of any numbers or of R, G and B; its affine, float64 [4, 4]; 1, or -1
      where the file's scale turns the intensities round; and whether the volume is the only one.
    """
    from nibabel import nifti1, nifti2

    kind, size = {1: (nifti1.Nifti1Header, 348), 2: (nifti2.Nifti2Header, 540)}[_nifti_version(_unpack(data, 348))]
    # Not `from_fileobj`, which reads extensions too: they may hold the header of a DICOM file.
    header = kind(bytes(_unpack(data, size)))
    if not header['magic'].item().startswith(b'n+'):
        raise InputError('one file of a NIfTI pair; give a volume in one file, .nii or .nii.gz')
    dimensions = [int(n) for n in header['dim'][1 : 1 + max(header['dim'][0], 0)]]
    shape = [*dimensions, 1, 1, 1][:3]
    if min(dimensions, default=0) < 1 or max(shape) > _MAX_SIDE:
        raise InputError(f'a volume of {"x".join(map(str, shape))} voxels; up to {_MAX_SIDE} a side are read')
    dtype, offset = header.get_data_dtype(), int(header['vox_offset'])
    end = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if offset < size or end > _MAX_BYTES:
        raise InputError(f'a volume up to byte {end:,}; up to {_MAX_BYTES >> 20} MiB are read')
    held = _unpack(data, end)
    if len(held) < end:
        raise InputError('a NIfTI file that ends before its voxels do')
    voxels = np.frombuffer(held, dtype, offset=offset).reshape(shape, order='F')
    sign = -1 if (header.get_slope_inter()[0] or 1) < 0 else 1
    return voxels, header.get_best_affine(), sign, max(dimensions[3:], default=1) == 1


def _canonical(voxels, affine):
    """Turns voxels so that their axes run closest to right, front and head, as nibabel's `as_closest_canonical` does.

    Args:
      voxels: [i, j, k] array.
      affine: float [4, 4], from their indices to millimetres to the right, front and head.

    Returns:
      The same voxels [x, y, z], and their size, float64 [3], in this order.
    """
    from nibabel import affines, orientations

    axes = orientations.io_orientation(affine)
    if not np.isfinite(axes).all():
        raise InputError('a NIfTI file that does not tell how its axes lie')
    spacing = np.empty(3)
    spacing[axes[:, 0].astype(int)] = affines.voxel_sizes(affine)
    return orientations.apply_orientation(voxels, axes), spacing


def _intensities(voxels, sign):
    """Returns the intensities of voxels of any kind, float64: of complex ones the magnitude, of colours the luma."""
    with np.errstate(all='ignore'):
        if voxels.dtype.names:
            voxels = sum(weight * voxels[colour] for weight, colour in zip(_LUMA, 'RGB', strict=True))
        return sign * (np.abs(voxels) if voxels.dtype.kind == 'c' else voxels).astype(np.float64)
