"""Frames of DICOM files as grey uint8 arrays.

Of a file nothing but what its pixels need is read, so that nothing about a patient can get anywhere. A file may be made
to be costly: lengths, sizes and counts are looked at before pydicom or its decoders act on them.

pydicom is an optional package (requirements-serve.txt), so it is imported where it is needed.
"""

import re
import struct
import zlib

import numpy as np
from scipy import special

from brain_jax import InputError
from brain_jax.data import images
from brain_jax.data import slices as slices_lib

SUFFIXES = ('.dcm', '.dicom', '.ima')  # of files that may lack the letters that tell DICOM

_MAX_BYTES = 2**27  # of a file, packed or not; pydicom makes up to two copies of the pixels
_MAX_READS = 2**18  # of a file's elements; pydicom walks through them one by one
_MAX_ELEMENT = 2**18  # bytes of an element other than pixels and sequences, of which pydicom may make a list
_MAX_SEQUENCE = 2**22  # bytes of a sequence of elements
_MAX_FRAGMENTS = 2**16  # of compressed pixels
_MAX_SCANS = 64  # of a JPEG, as in `images`
_MAX_TILES = 2**12  # of a JPEG 2000
_MAX_RUNS = 2**22  # bytes of a run-length encoded frame, which pydicom decodes one by one
_MAX_COMPRESSED = 2**24  # pixels of all compressed frames that are asked for, with every colour counted
_FRAME_HEADERS = {*range(0xFFC0, 0xFFD0), 0xFFF7} - {0xFFC4, 0xFFC8, 0xFFCC}  # markers of a JPEG, and of JPEG-LS

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


class _CountedFile(images.CountedFile):
    max_reads, complaint = _MAX_READS, 'made of too many small parts'


def read_dicom(data, slices):
    """Returns frames of a DICOM file; see `scans.decode_slices`.

    Args:
      data: bytes of the file.
      slices: 'all', 'middle', or how many.

    Returns:
      A list of (name, uint8 [height, width]).

    Raises:
      InputError: when the file holds no picture, or one that is too large or of a kind that is not read. Of damaged
        ones pydicom raises nearly anything.
    """
    slices_lib.check_installed('pydicom')
    if len(data) > _MAX_BYTES:
        raise InputError(f'larger than {_MAX_BYTES >> 20} MiB')
    dataset = _parse_dicom(data)
    if not any(keyword in dataset for keyword in _PIXELS):
        raise InputError('a DICOM file without a picture')
    count = max(int(dataset.get('NumberOfFrames') or 1), 1)
    wanted = slices_lib.choose_slices(count, slices)
    slices_lib.check_amount(len(wanted), dataset.Rows, dataset.Columns)
    found = []
    for index, values, photometric in _decode_frames(dataset, count, wanted):
        grey = _frame_to_grey(values, photometric, dataset, index)
        found.append((f'frame {index + 1}' if count > 1 else '', slices_lib.squared(grey, *_spacing(dataset, index))))
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
        file = _CountedFile(slices_lib.inflate(data[file.tell() :], _MAX_BYTES + 1, -zlib.MAX_WBITS))
        if len(file.getbuffer()) > _MAX_BYTES:
            raise InputError(f'unpacks to more than {_MAX_BYTES >> 20} MiB')
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
    slices_lib.check_amount(len(wanted), dataset.Rows, dataset.Columns * colours, _MAX_COMPRESSED)
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
        return slices_lib.scaled(values @ slices_lib.LUMA if photometric == 'RGB' else values[..., 0], 0, largest)
    if not photometric.startswith('MONOCHROME'):
        raise InputError('pixels of a kind that is not read')
    rescaled = _rescale(values, dataset, index)
    grey = _window(rescaled, dataset, index)
    if grey is None:
        is_plain = rescaled is values and values.dtype.kind == 'u' and dataset.BitsStored <= 8
        grey = (
            slices_lib.scaled(rescaled, 0, largest)
            if is_plain
            else slices_lib.scaled(rescaled, *slices_lib.find_range(np.asarray(rescaled, np.float64)))
        )
    return 255 - grey if photometric == 'MONOCHROME1' else grey


def _palette_to_grey(values, dataset):
    """Looks colours up in a file's palette: [rows, columns] -> uint8 [rows, columns]."""
    from pydicom.pixels import processing

    if 'RedPaletteColorLookupTableData' not in dataset:
        raise InputError('colours without a palette, or with one in segments, which is not read')
    colours = processing.apply_color_lut(values, dataset)[..., :3]
    is_deep = colours.dtype.itemsize > 1 and colours.max() > 255  # tables of 8 bits may be stored in 16
    return slices_lib.scaled(colours @ slices_lib.LUMA, 0, 65535 if is_deep else 255)


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
        return slices_lib.scaled(found, 0, largest)
    group = _group(dataset, index, 'FrameVOILUTSequence')
    center, width = (_first_number(group, keyword) for keyword in ('WindowCenter', 'WindowWidth'))
    if not (np.isfinite(center) and 0 < width < np.inf):
        return None
    function = group.get('VOILUTFunction') or 'LINEAR'
    if function == 'SIGMOID':
        return slices_lib.scaled(special.expit(4 * (values - center) / width), 0, 1)
    if function == 'LINEAR':  # its window ends at the middle of the last grey value; a width of 1 is a step
        center, width = center - 0.5, max(width - 1, 1e-6)
    return slices_lib.scaled(values, center - width / 2, center + width / 2)


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
