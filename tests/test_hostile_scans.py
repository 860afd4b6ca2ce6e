"""Scans that are made to harm: as test_hostile.py, for DICOM and NIfTI."""

import gzip
import struct
import zlib

import numpy as np
import pytest
import seeds
from PIL import Image
from test_hostile import (
    FLOOD,
    GIGABYTE,
    JPEG,
    NOISE,
    check_refused,
    deflated,
    image,
    jpeg_claim,
    link_to,
    many_scans,
    named_pipe,
    pytestmark,  # noqa: F401
    sparse,
    tree,
)

for _package in ('pydicom', 'nibabel', 'pylibjpeg', 'libjpeg', 'openjpeg'):
    pytest.importorskip(_package)

# DICOM, byte by byte.


def element(tag, kind, value, length=None):
    """Returns an element of a DICOM file, which may claim another length."""
    head = struct.pack('<HH2s', tag >> 16, tag & 0xFFFF, kind)
    length = len(value) if length is None else length
    is_long = kind in (b'OB', b'OW', b'SQ', b'UN', b'UT')
    return head + (struct.pack('<xxI', length) if is_long else struct.pack('<H', length)) + value


def dicom(*others, syntax=b'1.2.840.10008.1.2.1', rows=8, columns=8, frames=b'1 ', pixels=bytes(64), packed=False):
    """Returns a DICOM file of 8-bit grey pixels with other elements, which come first and must be of lower tags."""
    meta = element(0x00020010, b'UI', syntax + bytes(len(syntax) % 2))
    numbers = {0x00280002: 1, 0x00280010: rows, 0x00280011: columns, 0x00280100: 8, 0x00280101: 8, 0x00280102: 7}
    numbers |= {0x00280103: 0}
    elements = {tag: element(tag, b'US', struct.pack('<H', number)) for tag, number in numbers.items()}
    elements |= {
        0x00280004: element(0x00280004, b'CS', b'MONOCHROME2 '),
        0x00280008: element(0x00280008, b'IS', frames),
    }
    body = b''.join(others) + b''.join(elements[tag] for tag in sorted(elements))
    body += element(0x7FE00010, b'OB', pixels, UNDEFINED if packed else None)
    return bytes(128) + b'DICM' + meta + body


UNDEFINED = 2**32 - 1
ITEM, END_OF_ITEM, END = (struct.pack('<HHI', 0xFFFE, tag, 0) for tag in (0xE000, 0xE00D, 0xE0DD))
OPEN_ITEM = struct.pack('<HHI', 0xFFFE, 0xE000, UNDEFINED)
JPEG_SYNTAX, JPEG_2000, RUNS = (b'1.2.840.10008.1.2.' + end for end in (b'4.50', b'4.90', b'5'))


def fragments(*parts):
    """Returns compressed pixels of DICOM: an empty table of offsets, then the fragments."""
    return ITEM + b''.join(struct.pack('<HHI', 0xFFFE, 0xE000, len(part)) + part for part in parts) + END


def compressed(frame, syntax=JPEG_SYNTAX, **options):
    """Returns a function that makes a DICOM file of one compressed frame."""

    def make(folder):
        content = frame() if callable(frame) else frame
        content += bytes(len(content) % 2)
        return scan(dicom(syntax=syntax, pixels=fragments(content), packed=True, **options))(folder)

    return make


def scan(data, name='scan.dcm'):
    return image(data, name)


def deep_sequences(depth):
    start = element(0x00081140, b'SQ', OPEN_ITEM, UNDEFINED)
    return dicom(start * depth + (END_OF_ITEM + END) * depth)


def deflated_dicom():
    """Returns a DICOM file whose elements, of a gigabyte, are packed."""
    packed = deflated(2**30)[2:-4]
    return bytes(128) + b'DICM' + element(0x00020010, b'UI', b'1.2.840.10008.1.2.1.99') + packed


def implicit(tag, value):
    return struct.pack('<HHI', tag >> 16, tag & 0xFFFF, len(value)) + value


def many_centers():
    """Returns a DICOM file with the centers of 16 million windows."""
    meta = element(0x00020010, b'UI', b'1.2.840.10008.1.2\0')
    return bytes(128) + b'DICM' + meta + implicit(0x00281050, b'1\\' * (FLOOD * 2)) + implicit(0x7FE00010, bytes(64))


def jpeg_2000(width=8, height=8, tile=8, colours=1):
    """Returns a JPEG 2000 that claims such a size; nothing but its header."""
    size = struct.pack('>HHHIIIIIIIIH', 0xFF51, 38 + 3 * colours, 0, width, height, 0, 0, tile, tile, 0, 0, colours)
    return b'\xff\x4f' + size + b'\x07\1\1' * colours


def run_length(size):
    """Returns a frame in one run-length encoded segment of so many bytes, each two of which stand for 128 zeros."""
    return struct.pack('<II56x', 1, 64) + b'\x81\0' * (size // 2)


def large_palette():
    """Returns a DICOM file with a palette in segments, which would unpack to 700 million entries."""
    colours = []
    for tag in (0x00281221, 0x00281222, 0x00281223):
        colours.append(element(tag, b'OW', struct.pack('<HHH', 1, 65535, 9) * 10_000))
    data = dicom().replace(b'MONOCHROME2 ', b'PALETTE COLOR ').replace(b'CS\x0c\0', b'CS\x0e\0')
    end = data.index(struct.pack('<HH', 0x7FE0, 0x10))
    return data[:end] + b''.join(colours) + data[end:]


DICOM = {
    'frame of 3.6 gigapixels': (scan(dicom(rows=60_000, columns=60_000)), 'slices of 60000x60000 pixels'),
    'frame of 64 megapixels, whole': (
        scan(lambda: dicom(rows=8192, columns=8192, pixels=bytes(2**26))),
        'slices of 8192x8192 pixels',
    ),
    'frames, 2 billion': (scan(dicom(frames=b'2147483647')), '2,147,483,647 slices of 8x8 pixels are too many'),
    'frames, 4,000 that are not there': (scan(dicom(frames=b'4000')), 'cannot be decoded'),
    'frames, a negative number': (scan(dicom(frames=b'-3', pixels=b'')), 'cannot be decoded'),
    'no rows': (scan(dicom(rows=0)), 'slices of 8x0 pixels'),
    'pixels of 4 gigabytes': (scan(dicom()[:-76] + element(0x7FE00010, b'OB', b'', 2**32 - 2)), 'cannot be decoded'),
    'sequences 20,000 deep': (scan(deep_sequences(20_000)), 'cannot be decoded (RecursionError)'),
    'sequences 500,000 deep': (scan(lambda: deep_sequences(500_000)), 'cannot be decoded (RecursionError)'),
    'elements, a million': (scan(lambda: dicom(element(0x00080008, b'CS', b'') * 2**20)), 'too many small parts'),
    'items, 4 million': (
        scan(lambda: dicom(element(0x00081140, b'SQ', ITEM * 2**22, UNDEFINED))),
        'cannot be decoded',
    ),
    'items, 4 million, in a sequence that states its length': (
        scan(lambda: dicom()[:-76] + element(0x52009230, b'SQ', ITEM * 2**22)),
        'the element (5200,9230) is of 33,554,432 bytes',
    ),
    'windows, 16 million': (scan(many_centers), 'the element (0028,1050) is of 33,554,432 bytes'),
    'elements that unpack to 1 GB': (scan(deflated_dicom), 'unpacks to more than 128 MiB'),
    'unfinished deflate': (scan(lambda: deflated_dicom()[:500]), 'without a picture'),
    'deflate of noise': (scan(lambda: deflated_dicom()[:170] + NOISE), 'packed data that are damaged'),
    'fragments, 2 million': (
        scan(lambda: dicom(syntax=RUNS, pixels=ITEM * 2**21 + END, packed=True)),
        'too many small parts',
    ),
    'run-length bomb': (compressed(lambda: run_length(2**24), RUNS), 'run-length encoded frame of 16,777,280 bytes'),
    'run-length noise': (compressed(NOISE, RUNS), 'cannot be decoded'),
    'JPEG of 4 gigapixels in it': (compressed(jpeg_claim(65_500)), 'of another size'),
    'JPEG of another size in it': (compressed(jpeg_claim(9)), 'of another size'),
    'JPEG of two sizes': (compressed(JPEG[:-2] + jpeg_claim(65_500)[2:]), 'of several sizes'),
    'JPEG of two sizes at first': (compressed(JPEG[:2] + JPEG[2 : JPEG.index(b'\xff\xda')] * 2), 'of several sizes'),
    'hierarchical JPEG': (compressed(JPEG[:2] + b'\xff\xde\0\2' + JPEG[2:]), 'of several images'),
    'scans of a JPEG, 5,000': (compressed(lambda: many_scans(), rows=4096, columns=4096), 'more than 64 scans'),
    'JPEG that is cut': (compressed(JPEG[:100]), 'cannot be decoded'),
    'JPEG of noise': (compressed(JPEG[:3] + NOISE), 'cannot be decoded'),
    'JPEG 2000 of 4 gigapixels': (compressed(jpeg_2000(60_000, 60_000, 60_000), JPEG_2000), 'of another size'),
    'JPEG 2000 of 16,000 colours': (compressed(jpeg_2000(colours=16_000), JPEG_2000), 'of another size'),
    'JPEG 2000 of 16 million tiles': (
        compressed(jpeg_2000(4096, 4096, 1), JPEG_2000, rows=4096, columns=4096),
        '16,777,216 tiles',
    ),
    'JPEG 2000 of a header': (compressed(jpeg_2000(), JPEG_2000), 'cannot be decoded'),
    'JPEG 2000 of noise': (compressed(NOISE, JPEG_2000), 'scan.dcm: '),
    'compressed frames that are too many': (
        scan(lambda: dicom(syntax=RUNS, frames=b'4000', rows=512, columns=512, pixels=fragments(b'xx'), packed=True)),
        '4,000 slices of 512x512 pixels are too many',
    ),
    'palette of 700 million entries': (scan(large_palette), 'a palette, or with one in segments'),
    'lookup table that is not there': (
        scan(lambda: dicom()[:-76] + element(0x00283010, b'SQ', ITEM) + dicom()[-76:]),
        'cannot be decoded',
    ),
    'directory of other files': (
        scan(dicom()[:-76] + element(0x00041500, b'CS', b'..\\..\\etc\\passwd')),
        'without a picture',
    ),
    'unknown transfer syntax': (scan(dicom(syntax=b'1.2.3.4')), 'of an unknown transfer syntax'),
    'DICM and noise': (scan(bytes(128) + b'DICM' + NOISE), 'scan.dcm: '),
    'DICM and nothing': (scan(bytes(128) + b'DICM'), 'cannot be decoded'),
    'text': (scan(b'hello'), 'cannot be decoded'),
    'empty DICOM': (scan(b''), 'cannot be decoded'),
    'DICOM of a terabyte': (sparse(bytes(128) + b'DICM'), 'larger than 256 MiB'),
    'DICOM of 200 MB': (scan(lambda: dicom(pixels=bytes(200_000_000))), 'larger than 128 MiB'),
    'DICOM from a named pipe': (named_pipe, 'not a file'),
    'DICOM from a device': (link_to('/dev/zero'), 'not a file'),
} | {f'DICOM cut at {size}': (scan(dicom()[:size]), 'scan.dcm: ') for size in (133, 150, 170, 200, 250, 310)}


# NIfTI.


def nifti(shape=(8, 8, 8), kind=2, bits=8, offset=352, affine=1.0, voxels=None, pixel=1.0, dimensions=None):
    """Returns a NIfTI file of 8-bit voxels, of zeros where none are given."""
    dimensions = len(shape) if dimensions is None else dimensions
    header = struct.pack('<i36x8h', 348, dimensions, *[*shape, *[1] * 7][:7])
    header += struct.pack('<14xhh2x8f', kind, bits, 1, *[pixel, 1, 1], 1, 1, 1, 1)
    header += struct.pack('<fff', offset, 1, 0) + bytes(348 - 120)
    header = bytearray(header)
    struct.pack_into('<hh', header, 252, 0, 1)
    for row in range(3):
        struct.pack_into('<f', header, 280 + 20 * row, affine if row else affine * pixel)
    header[344:348] = b'n+1\0'
    return bytes(header) + bytes(4) + (bytes(int(np.prod(shape))) if voxels is None else voxels)


def gzipped(data):
    return gzip.compress(data, 1, mtime=0)


def gzip_bomb():
    """Returns a gzip file of a NIfTI header and a gigabyte of zeros, packed a thousand times smaller."""
    packer = zlib.compressobj(9, wbits=-15)
    start = nifti((1000, 1000, 1000), voxels=b'')
    packed = packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH) + deflated(2**30)[2:-4]
    return b'\x1f\x8b\x08' + bytes(7) + packed


NIFTI = {
    'volume of 35 teravoxels': (scan(nifti((32767,) * 3, voxels=b''), 'scan.nii'), 'voxels; up to 4096 a side'),
    'volume of 64 gigavoxels': (scan(nifti((4000,) * 3, voxels=b''), 'scan.nii'), 'up to byte 64,000,000,352'),
    'gzip bomb': (scan(gzip_bomb, 'scan.nii.gz'), 'up to byte 1,000,000,352'),
    'gzip of a million members': (scan(lambda: gzipped(b'') * 2**20, 'scan.nii.gz'), 'no JPEG'),
    'voxels that are not there': (scan(nifti(voxels=b''), 'scan.nii'), 'ends before its voxels do'),
    'voxels that are not there, packed': (scan(gzipped(nifti(voxels=b'')), 'scan.nii.gz'), 'ends before'),
    'damaged gzip': (scan(gzipped(nifti())[:40] + NOISE, 'scan.nii.gz'), 'scan.nii.gz: '),
    'gzip of noise': (scan(b'\x1f\x8b' + NOISE, 'scan.nii.gz'), 'packed data that are damaged'),
    'no dimensions': (scan(nifti(dimensions=0), 'scan.nii'), 'scan.nii: '),
    'dimensions, -5': (scan(nifti(dimensions=-5), 'scan.nii'), 'scan.nii: '),
    'dimensions, 30,000': (scan(nifti(dimensions=30_000), 'scan.nii'), 'scan.nii: '),
    'negative side': (scan(nifti((8, -8, 8), voxels=b''), 'scan.nii'), 'scan.nii: '),
    'voxels of no known kind': (scan(nifti(kind=999), 'scan.nii'), 'cannot be decoded'),
    'voxels of single bits': (scan(nifti(kind=1, bits=1), 'scan.nii'), 'cannot be decoded'),
    'voxels before the file': (scan(nifti(offset=-1e9), 'scan.nii'), 'scan.nii: '),
    'voxels far behind the file': (scan(nifti(offset=1e30), 'scan.nii'), 'scan.nii: '),
    'voxels at no number': (scan(nifti(offset=np.nan), 'scan.nii'), 'scan.nii: '),
    'axes of no length': (scan(nifti(affine=0.0), 'scan.nii'), 'does not tell how its axes lie'),
    'axes of no number': (scan(nifti(affine=np.nan), 'scan.nii'), 'cannot be decoded'),
    'slices of one pixel': (scan(nifti((1, 1, 100)), 'scan.nii'), 'slices of 1x1 pixels'),
    'NIfTI of a terabyte': (sparse(nifti()), 'larger than 256 MiB'),
} | {f'NIfTI cut at {size}': (scan(nifti()[:size], 'scan.nii'), 'scan.nii: ') for size in (100, 347, 348, 353, 800)}

HOSTILE = [
    pytest.param(make, fragment, id=name.replace(' ', '-')) for name, (make, fragment) in (DICOM | NIFTI).items()
]


@pytest.mark.parametrize(('make', 'fragment'), HOSTILE)
def test_hostile_scan_is_refused(make, fragment, tmp_path, reader_process):
    path = make(tmp_path)
    before = tree(tmp_path)
    check_refused(reader_process('scan', path), path, fragment)
    assert tree(tmp_path) == before


# Odd or large, but no harm: read.


ODD_SCANS = {
    'run-length frame that unpacks to 268 MB': compressed(lambda: run_length(2**22 - 64), RUNS),
    'largest DICOM frame': scan(lambda: dicom(rows=4096, columns=4096, pixels=bytes(2**24))),
    'DICOM of as many frames as may be': scan(
        lambda: dicom(rows=128, columns=128, frames=b'4096', pixels=bytes(2**26))
    ),
    'largest JPEG in DICOM': compressed(
        lambda: seeds.encode(Image.effect_noise((4096, 4096), 99), 'JPEG', progressive=True), rows=4096, columns=4096
    ),
    'largest JPEG 2000 in DICOM': compressed(
        lambda: seeds.encode(Image.effect_noise((4096, 4096), 99), 'JPEG2000', no_jp2=True),
        JPEG_2000,
        rows=4096,
        columns=4096,
    ),
    'largest NIfTI': scan(lambda: nifti((406, 406, 406)), 'scan.nii'),
    'largest NIfTI of float64': scan(lambda: nifti((322, 322, 322), 64, 64, voxels=bytes(8 * 322**3)), 'scan.nii'),
    'flattest NIfTI': scan(lambda: nifti((4096, 4096, 2)), 'scan.nii'),
    'largest NIfTI, packed': scan(lambda: gzipped(nifti((406, 406, 406))), 'scan.nii.gz'),
    'NIfTI of long voxels': scan(lambda: nifti((2, 4096, 4), pixel=1e9), 'scan.nii'),
}


def odd_scans():
    for name, make in ODD_SCANS.items():
        marks = pytest.mark.soak if 'JPEG 2000' in name else ()  # to make it takes half a minute
        yield pytest.param(make, id=name.replace(' ', '-'), marks=marks)


@pytest.mark.parametrize('make', list(odd_scans()))
def test_odd_scan_is_read(make, tmp_path, reader_process):
    result = reader_process('scan', make(tmp_path))
    print(f'{result["seconds"]:.2f} s, {result["bytes"] / 1e6:.0f} MB')
    assert result['outcome'] == 'read', result
    assert result['bytes'] < GIGABYTE
