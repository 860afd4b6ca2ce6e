"""Files that are made to harm: each is refused with one line, in bounded memory and time, and nothing is written.

With `-s` it tells the seconds of one core and the megabytes of each file, and the largest of all.
"""

import json
import os
import pathlib
import pickle
import struct
import sys
import zipfile
import zlib

import h5py
import numpy as np
import pytest
import safetensors.numpy
import seeds
from absl import flags
from ml_collections import config_flags
from PIL import Image

from brain_jax import InputError
from brain_jax.data import brain_tumor_mri

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='memory is measured as Linux counts it')
ROOT = pathlib.Path(__file__).parents[1]
GIGABYTE = 2**30
NOT_PLAIN = 'not a plain array of floating-point numbers'
SCALE = 'params/bn/scale'  # the array that most files below spoil


def tree(folder):
    """Returns what lies in a folder, without following links: paths and sizes."""
    return sorted((str(path), path.lstat().st_size) for path in folder.rglob('*'))


def check_refused(result, path, fragment):
    """Checks that a file was refused with one line that names it and what is wrong, in less than a gigabyte."""
    assert result['outcome'] == 'refused', result
    message = result['message']
    print(f'{result["seconds"]:.2f} s, {result["bytes"] / 1e6:.0f} MB: {message[:300]}')
    assert message.isprintable() and message.startswith(f'{path}: ') and fragment in message
    assert result['bytes'] < GIGABYTE


# Weights in HDF5.


def spoil(change, **options):
    """Returns a function (folder) -> path of a weights file in which `change`(file, name, folder) was done.

    The array `name` is taken out of the file before.
    """

    def make(folder):
        path = seeds.write_keras(folder / 'model.h5')
        with h5py.File(path, 'r+', **options) as file:
            name = seeds.KERAS_NAMES[SCALE]
            del file[name]
            change(file, name, folder)
        return path

    return make


def put(*args, **options):
    """Returns a change that puts another array in."""
    return spoil(lambda file, name, folder: file.create_dataset(name, *args, **options))


def external_storage(file, name, folder):
    (folder / 'secret').write_bytes(bytes(8))
    file.create_dataset(name, (2,), 'f4', external=[(str(folder / 'secret'), 0, 8)])


def virtual(file, name, folder):
    with h5py.File(folder / 'other.h5', 'w') as other:
        other['secret'] = np.ones(2, np.float32)
    layout = h5py.VirtualLayout((2,), 'f4')
    layout[:] = h5py.VirtualSource(folder / 'other.h5', 'secret', (2,))
    file.create_virtual_dataset(name, layout)


def external_link(file, name, folder):
    with h5py.File(folder / 'other.h5', 'w') as other:
        other['secret'] = np.ones(2, np.float32)
    file[name] = h5py.ExternalLink(str(folder / 'other.h5'), 'secret')


def soft_links_in_a_circle(file, name, folder):
    file[name] = h5py.SoftLink('/circle')
    file['circle'] = h5py.SoftLink(f'/{name}')


def deflated(size):
    """Returns that many zeros, whole megabytes of them, packed a thousand times smaller as zlib does."""
    packer = zlib.compressobj(9, wbits=-15)
    megabyte = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    adler = (size % 65521) << 16 | 1  # by its definition, of zeros
    return b'x\xda' + megabyte * (size >> 20) + b'\3\0' + struct.pack('>I', adler)


def test_a_bomb_is_one():
    assert zlib.decompress(deflated(2**22)) == bytes(2**22)
    assert len(deflated(2**31)) < 2**22


def chunked_head(chunks, classes, content=None, **options):
    """Returns a function that makes weights with a head, whose number of classes is free, in chunks."""

    def make(folder):
        path = seeds.write_keras(folder / 'model.h5')
        kernel, bias = (seeds.KERAS_NAMES[f'params/predictions/{leaf}'] for leaf in ('kernel', 'bias'))
        with h5py.File(path, 'r+') as file:
            del file[kernel], file[bias]
            file[bias] = np.ones(classes, np.float32)
            kernel = file.create_dataset(kernel, (2, classes), 'f4', chunks=chunks, **options)
            if content:
                kernel.id.write_direct_chunk((0, 0), content)
        return path

    return make


def deep_groups(file, name, folder):
    group = h5py.Group(h5py.h5g.create(file.id, None))
    for _ in range(3000):  # from the inside out: paths from the root would take for ever
        outer = h5py.Group(h5py.h5g.create(file.id, None))
        outer['g'] = group
        group = outer
    file['deep'] = group


def many_groups(file, name, folder):
    for i in range(21_000):
        file.create_group(f'many/{i}')


def values(*numbers, dtype='f4'):
    return put(data=np.array(numbers, dtype))


def control_characters(file, name, folder):
    file['one\ntwo \x1b[31mred/kernel'] = np.ones(3, np.float32)


def layer_name(file, name, folder):
    file['layers/bn/vars/0'] = np.ones(2, np.float32)
    file['layers/bn/vars'].attrs['name'] = np.zeros((3, 3))


def twice(file, name, folder):
    file[name] = file[f'again/{name}'] = np.ones(2, np.float32)
    file[f'more/{name}'] = np.ones(2, np.float32)


def wide_head(folder):
    """A head that no array stands for: its shape alone asks for 800 MB, and is never written."""
    shapes = {'params/predictions/kernel': (2, 10**8), 'params/predictions/bias': (10**8,)}
    path = seeds.write_keras(folder / 'model.h5', {k: v for k, v in seeds.SHAPES.items() if k not in shapes})
    with h5py.File(path, 'r+') as file:
        for name, shape in shapes.items():
            file.create_dataset(seeds.KERAS_NAMES[name], shape, 'f4')
    return path


def truncated(make):
    """Returns a function that makes a file and cuts it in half."""

    def cut(folder):
        path = make(folder)
        os.truncate(path, path.stat().st_size // 2)
        return path

    return cut


def sparse(start):
    """Returns a function that makes a file of a terabyte of which next to nothing is on the disk."""

    def make(folder):
        path = folder / 'large'
        path.write_bytes(start)
        os.truncate(path, 2**40)
        return path

    return make


def named_pipe(folder):
    os.mkfifo(folder / 'pipe.h5')
    return folder / 'pipe.h5'


def link_to(target):
    def make(folder):
        (folder / 'link').symlink_to(target)
        return folder / 'link'

    return make


HDF5 = {
    'external link': (spoil(external_link), f'1 missing: {SCALE}'),
    'soft links in a circle': (spoil(soft_links_in_a_circle), f'1 missing: {SCALE}'),
    'external storage': (spoil(external_storage), NOT_PLAIN),
    'virtual dataset': (spoil(virtual), NOT_PLAIN),
    'object references': (put((2,), h5py.ref_dtype), NOT_PLAIN),
    'strings': (put((2,), h5py.string_dtype()), NOT_PLAIN),
    'strings of one length': (put(data=np.array([b'a', b'b'])), NOT_PLAIN),
    'arrays in an array': (put((2,), h5py.vlen_dtype(np.float32)), NOT_PLAIN),
    'records': (put((2,), np.dtype([('a', 'f4')])), NOT_PLAIN),
    'complex numbers': (put(data=np.ones(2, np.complex64)), NOT_PLAIN),
    'integers': (put(data=np.ones(2, np.int32)), NOT_PLAIN),
    'no shape': (put(data=h5py.Empty('f4')), '1 of a wrong shape: params/bn/scale []'),
    'shape of four terabytes': (put((2**40,), 'f4'), '1 of a wrong shape: params/bn/scale [1099511627776]'),
    'array that was never written': (put((2,), 'f4'), NOT_PLAIN),
    'chunk of two gigabytes': (put((2,), 'f4', chunks=(2**29,), maxshape=(None,)), NOT_PLAIN),
    'bomb in a compressed chunk': (chunked_head((2, 1000), 1000, deflated(2**31), compression='gzip'), NOT_PLAIN),
    'a million chunks': (chunked_head((1, 1), 500_000), NOT_PLAIN),
    'head of 100 million classes': (wide_head, 'params/predictions/kernel [2, 100000000] instead of'),
    'groups 3,000 deep': (spoil(deep_groups), 'groups 32 deep'),
    'groups, 21,000': (spoil(many_groups), 'more than 20000 groups'),
    'not a number': (values(1, np.nan), f'not finite numbers: {SCALE}'),
    'infinite': (values(-np.inf, 1), f'not finite numbers: {SCALE}'),
    'beyond float32': (values(1e300, 1, dtype='f8'), f'not finite numbers: {SCALE}'),
    'control characters in a name': (spoil(control_characters), 'unexpected: params/one two [31mred/kernel'),
    'name of a layer that is an array': (spoil(layer_name), 'damaged, or no Keras'),
    'the same array twice': (spoil(twice), 'holds params/bn/scale twice'),
    'truncated HDF5': (truncated(lambda folder: seeds.write_keras(folder / 'a.h5')), 'damaged'),
    'HDF5 of a terabyte': (sparse(b'\x89HDF\r\n\x1a\n'), 'larger than 512 MiB'),
    'zip of a terabyte': (sparse(b'PK\3\4'), 'larger than 512 MiB'),
    'safetensors of a terabyte': (sparse(struct.pack('<Q', 2) + b'{}'), 'larger than 512 MiB'),
    'weights from a named pipe': (named_pipe, 'no such weights file'),
    'weights from a device': (link_to('/dev/zero'), 'no such weights file'),
}

# Weights in .keras files.


def zipped(members, compression=zipfile.ZIP_STORED, change=None):
    """Returns a function that makes a zip file, with some of its bytes replaced."""

    def make(folder):
        path = seeds.write_zip(folder / 'model.keras', members, compression)
        if change:
            path.write_bytes(path.read_bytes().replace(*change))
        return path

    return make


def zip_bomb(claim):
    """Returns a function that makes a .keras file of 2 GB, packed, that claims so many bytes."""

    def make(folder):
        path = seeds.write_zip(folder / 'bomb.keras', {WEIGHTS: deflated(2**31)[2:-4]})
        data = bytearray(path.read_bytes())
        for method, size in ((8, 22), (data.rindex(b'PK\1\2') + 10, data.rindex(b'PK\1\2') + 24)):
            struct.pack_into('<H', data, method, zipfile.ZIP_DEFLATED)
            struct.pack_into('<I', data, size, claim)
        path.write_bytes(data)
        return path

    return make


def link_in_zip(folder):
    member = zipfile.ZipInfo('model.weights.h5')
    member.create_system, member.external_attr = 3, 0o120777 << 16  # a symbolic link, on Unix
    return seeds.write_zip(folder / 'link.keras', {member: b'/etc/hostname'})


NOISE = np.random.default_rng(0).bytes(1000)
WEIGHTS = 'model.weights.h5'
ENCRYPTED = (b'PK\1\2\x14\3\x14\0\0\0', b'PK\1\2\x14\3\x14\0\1\0')
ZIPS = {
    'zip bomb': (zip_bomb(2**31), 'model.weights.h5 is larger than 512 MiB'),
    'zip bomb that claims 100 bytes': (zip_bomb(100), 'Bad CRC-32'),
    'names that lead out': (zipped({f'../../{WEIGHTS}': b'x', f'/tmp/{WEIGHTS}': b'x'}), 'without model.weights.h5'),
    'link in a zip file': (link_in_zip, 'file signature not found'),
    'members, 50,000': (zipped({str(i): b'' for i in range(50_000)}), 'too many members'),
    'encrypted': (zipped({WEIGHTS: NOISE}, change=ENCRYPTED), 'encrypted'),
    'packed by LZMA': (zipped({WEIGHTS: NOISE}, zipfile.ZIP_LZMA), 'compressed in an unusual way'),
    'broken zip member': (zipped({WEIGHTS: NOISE}, zipfile.ZIP_DEFLATED, (NOISE[500:510], bytes(10))), 'damaged'),
    'zip in a zip': (zipped({WEIGHTS: b'PK\3\4' + NOISE}), 'file signature not found'),
    'pickle in a zip': (zipped({'archive/data.pkl': pickle.dumps({})}), 'only .safetensors files are read'),
    'truncated zip': (truncated(zipped({WEIGHTS: NOISE})), 'truncated'),
}

# Weights in safetensors.


def tensors(header, body=b'', size=None):
    """Returns a function that makes a safetensors file with that header, which may claim another size."""

    def make(folder):
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = folder / 'model.safetensors'
        path.write_bytes(struct.pack('<Q', len(text) if size is None else size) + text + body)
        return path

    return make


def tensor(dtype='F32', shape=(1,), begin=0, end=4):
    return {'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]}


def not_finite(folder):
    arrays = {name: np.ones(shape, np.float32) for name, shape in seeds.SHAPES.items()}
    arrays[SCALE][1] = np.inf
    safetensors.numpy.save_file(arrays, folder / 'a.safetensors', {'layout': 'brain_jax-1'})
    return folder / 'a.safetensors'


def pickled(folder):
    (folder / 'model.pt').write_bytes(pickle.dumps({'weight': [1.0]}))
    return folder / 'model.pt'


SAFETENSORS = {
    'header of 2**63 bytes': (tensors({}, size=2**63), 'a header of 9,223,372,036,854,775,808 bytes'),
    'header of 99 MB': (tensors({}, size=99_000_000), 'a header of 99,000,000 bytes'),
    'header longer than the file': (tensors({}, size=1000), 'damaged'),
    'header of brackets': (tensors(b'{"a":' + b'[' * 1_000_000), 'recursion limit'),
    'header that is no JSON': (tensors(NOISE), 'damaged'),
    'tensor of four terabytes': (tensors({'a': tensor(shape=[2**40], end=2**42)}), 'not fully covered'),
    'tensor of more than 2**64 bytes': (tensors({'a': tensor(shape=[2**63, 2**63], end=0)}), 'overflow'),
    'negative shape': (tensors({'a': tensor(shape=[-1])}, bytes(4)), 'damaged'),
    'tensors that overlap': (tensors({'a': tensor(), 'b': tensor()}, bytes(4)), 'damaged'),
    'tensor of integers': (tensors({'a': tensor('I32')}, bytes(4)), 'a is of type I32'),
    'tensor of an unknown type': (tensors({'a': tensor('object')}, bytes(4)), 'damaged'),
    'control characters in a tensor': (tensors({'a\n\x1b[1mb': tensor()}, bytes(4)), '1 unexpected: params//a [1mb'),
    'layout of many lines': (tensors({'__metadata__': {'layout': 'a\n' * 10_000}}), 'layout a a a'),
    'infinite tensor': (not_finite, f'not finite numbers: {SCALE}'),
    'truncated tensors': (truncated(not_finite), 'damaged'),
    'pickle': (pickled, 'damaged, or no Keras or safetensors weights file'),
    'no weights at all': (sparse(b''), 'larger than 512 MiB'),
}

# Images.


def image(data, name='scan.jpg'):
    """Returns a function that writes an image file, of bytes or what a function returns."""

    def make(folder):
        (folder / name).write_bytes(data() if callable(data) else data)
        return folder / name

    return make


def chunk(kind, data):
    """Returns a chunk of a PNG."""
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(width=8, height=8, *chunks, pixels=None):
    """Returns a PNG of black grey pixels, with other chunks before its pixels."""
    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(height * (width + 1)), 9) if pixels is None else pixels
    parts = [chunk(b'IHDR', header), *chunks, chunk(b'IDAT', pixels), chunk(b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def tiff(*entries, width=8, height=8, rest=b''):
    """Returns a TIFF with other entries (tag, type, count, value or bytes) and then other bytes."""
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (262, 3, 1, 1), *entries]
    directory, data = b'', b''
    place = 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in sorted(entries, key=lambda entry: entry[0]):
        if isinstance(value, bytes):
            value, data = place + len(data), data + value
        directory += struct.pack('<HHII', tag, kind, count, value)
    return b'II*\0' + struct.pack('<IH', 8, len(entries)) + directory + bytes(4) + data + rest


SMALL = Image.new('L', (8, 8), 200)
JPEG, BMP, FLOOD = seeds.encode(SMALL, 'JPEG'), seeds.encode(SMALL, 'BMP'), 2**23
ALL = seeds.image_files()


def jpeg_claim(side):
    """Returns a JPEG whose header claims another size."""
    at = JPEG.index(b'\xff\xc0') + 5
    return JPEG[:at] + struct.pack('>HH', side, side) + JPEG[at + 4 :]


def many_scans():
    """Returns a small JPEG of 5,000 scans, each of which would be decoded over 16 million pixels."""
    data = seeds.encode(Image.new('L', (4096, 4096)), 'JPEG', progressive=True)
    last = data[data.rindex(b'\xff\xda') : -2]
    return data[:-2] + 5000 * last + data[-2:]


def tile_bomb():
    """Returns a TIFF of 100x100 pixels in a tile of 900 million."""
    data = deflated(2**30)
    entries = [(259, 3, 1, 8), (322, 4, 1, 30_000), (323, 4, 1, 30_000), (325, 4, 1, len(data))]
    return tiff(*entries, (324, 4, 1, 8 + 2 + 12 * 9 + 4), width=100, height=100, rest=data)


def webp_claim(width, height):
    """Returns a WebP whose header claims another size."""
    data = bytearray(seeds.encode(SMALL.convert('RGB'), 'WEBP', lossless=True))
    struct.pack_into('<I', data, 21, (width - 1) | (height - 1) << 14)
    return bytes(data)


IMAGES = {
    'PNG of 10 gigapixels': (image(png(100_000, 100_000, pixels=b'')), 'larger than 32 megapixels'),
    'PNG of 64 megapixels, whole': (image(lambda: png(8192, 8192)), '8192x8192, larger than 32 megapixels'),
    'JPEG of 4 gigapixels': (image(jpeg_claim(65_500)), 'larger than 32 megapixels'),
    'BMP of 4 gigapixels': (image(BMP[:18] + struct.pack('<ii', 65_000, 65_000) + BMP[26:]), 'larger than'),
    'TIFF of 4 gigapixels': (image(tiff((273, 4, 1, 8), width=65_000, height=65_000)), 'larger than'),
    'WebP of 134 megapixels': (image(webp_claim(16_383, 8191)), 'larger than 32 megapixels'),
    '30 million pixels by one': (image(tiff((273, 4, 1, 8), width=30_000_000, height=1)), 'a side longer than 16384'),
    'one by 16,385 pixels': (image(png(1, 16_385)), 'a side longer than 16384'),
    'no pixels': (image(png(0, 8)), 'scan.jpg: '),
    'tile of 900 megapixels': (image(tile_bomb), '30000x30000, larger than 32 megapixels'),
    'text that unpacks to 1 GB': (image(png(8, 8, chunk(b'zTXt', b'a\0\0' + deflated(2**30)))), 'too large'),
    'profile that unpacks to 1 GB': (image(png(8, 8, chunk(b'iCCP', b'a\0\0' + deflated(2**30)))), 'too large'),
    'chunks, 700,000': (image(png(8, 8, chunk(b'abCd', b'') * (FLOOD // 12))), 'too many small parts'),
    'segments, 2 million': (image(JPEG[:2] + b'\xff\xe5\0\2' * (FLOOD // 4) + JPEG[2:]), 'too many small parts'),
    'fill bytes, 8 million': (image(JPEG[:2] + b'\xff' * FLOOD + JPEG[2:]), 'too many small parts'),
    'scans, 5,000': (image(many_scans), 'a JPEG of more than 64 scans'),
    'strips, 8 million': (image(tiff((273, 1, FLOOD, b'\x08' * FLOOD), (278, 3, 1, 1))), 'claims 8,388,608 values'),
    'resolutions, a million': (image(tiff((273, 4, 1, 8), (282, 5, 2**20, bytes(FLOOD)))), 'claims 1,048,576 values'),
    'values, 4 billion': (image(tiff((273, 4, 1, 8), (282, 5, 2**32 - 1, 8))), 'claims 4,294,967,295 values'),
    'directory behind the end': (image(b'II*\0' + struct.pack('<I', 2**32 - 1)), 'scan.jpg: '),
    'directory in itself': (image(b'II*\0\4\0\0\0' + bytes(8)), 'scan.jpg: '),
    'floating-point pixels': (image(seeds.encode(Image.new('F', (8, 8)), 'TIFF')), 'floating-point pixels'),
    'PostScript': (image(b'%!PS-Adobe-3.0 EPSF-3.0\n(/etc/hostname) run\n'), 'not a JPEG, PNG'),
    'SVG': (image(b'<svg xmlns="http://www.w3.org/2000/svg"/>'), 'not a JPEG, PNG'),
    'GIF': (image(seeds.encode(SMALL, 'GIF')), 'not a JPEG, PNG'),
    'HTML': (image(b'<html><script>alert(1)</script>'), 'not a JPEG, PNG'),
    'zip file': (image(b'PK\3\4' + NOISE), 'not a JPEG, PNG'),
    'noise': (image(NOISE), 'not a JPEG, PNG'),
    'empty file': (image(b''), 'an empty file'),
    'image of a terabyte': (sparse(b'\xff\xd8\xff'), 'larger than 64 MiB'),
    'image from a named pipe': (named_pipe, 'not a file'),
    'image from a device': (link_to('/dev/zero'), 'not a file'),
    'link to nothing': (link_to('nothing'), 'not a file'),
    'link to itself': (link_to('link'), 'not a file'),
    'folder': (lambda folder: folder, 'not a file'),
} | {f'truncated {name}': (image(data[: len(data) // 2]), 'scan.jpg: ') for name, data in ALL.items()}

# Reference images of figshare.


def matlab(fill, patient='100'):
    """Returns a function that makes a MATLAB file whose cjdata/image is what `fill`(group, folder) makes of it."""

    def make(folder):
        with h5py.File(folder / 'a.mat', 'w') as file:
            group = file.create_group('cjdata')
            group['label'] = np.ones((1, 1))
            group['PID'] = np.array([[ord(letter)] for letter in patient], np.uint16)
            fill(group, folder)
        return folder / 'a.mat'

    return make


def matlab_bomb(group, folder):
    pixels = group.create_dataset('image', (64, 64), 'u1', chunks=(64, 64), compression='gzip')
    pixels.id.write_direct_chunk((0, 0), deflated(2**31))


def matlab_link(group, folder):
    with h5py.File(folder / 'other.h5', 'w') as other:
        other['image'] = np.ones((8, 8))
    group['image'] = h5py.ExternalLink(str(folder / 'other.h5'), 'image')


def pixels(*args, **options):
    return matlab(lambda group, folder: group.create_dataset('image', *args, **options))


MATLAB = {
    'reference of 10 gigapixels': (pixels((100_000, 100_000), 'u1', chunks=(64, 64)), 'is larger than 4096x4096'),
    'reference, one by 33 million': (pixels((1, 2**25), 'u1', chunks=(1, 2**12)), 'is larger than 4096x4096'),
    'reference in 16 million chunks': (pixels((4096, 4096), 'u1', chunks=(1, 1)), 'too many pieces'),
    'reference with a bomb in a chunk': (matlab(matlab_bomb), 'too large or too many pieces'),
    'reference behind a link': (matlab(matlab_link), 'there is no cjdata/image'),
    'reference that is not finite': (pixels(data=np.array([[np.nan, 1]])), 'not an image'),
    'reference with too wide a range': (pixels(data=np.array([[-1e308, 1e308]])), 'too far apart'),
    'reference of an endless patient': (
        matlab(lambda group, folder: group.create_dataset('image', data=np.eye(8)), 'x' * 4000),
        'not a text',
    ),
}

KINDS = {'HDF5': HDF5, 'zip': ZIPS, 'safetensors': SAFETENSORS, 'image': IMAGES, 'figshare': MATLAB}
HOSTILE = [
    pytest.param(kind, make, fragment, id=f'{kind}: {name}'.replace(' ', '-'))
    for kind, files in KINDS.items()
    for name, (make, fragment) in files.items()
]


@pytest.mark.parametrize(('kind', 'make', 'fragment'), HOSTILE)
def test_hostile_file_is_refused(kind, make, fragment, tmp_path, reader_process):
    reader = kind if kind in ('image', 'figshare') else 'weights'
    path = make(tmp_path)
    before = tree(tmp_path)
    check_refused(reader_process(reader, path), path, fragment)
    assert tree(tmp_path) == before


# Odd, but no harm: read.


def exif(data):
    """Returns a JPEG with that EXIF."""
    return seeds.encode(SMALL, 'JPEG', exif=b'Exif\0\0' + data)


ODD = {
    'JPEG with a zip file behind it': JPEG + b'PK\3\4' + NOISE,
    'PNG with a script behind it': png() + b'<script>alert(1)</script>',
    'BMP with a program behind it': BMP + b'\x7fELF' + NOISE,
    'JPEG with HTML in a comment': seeds.encode(SMALL, 'JPEG', comment='<script>alert(1)</script>'),
    'EXIF of noise': exif(NOISE),
    'EXIF that points to itself': exif(b'II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0\x08\0\0\0'),
    'EXIF that claims 4 billion values': exif(b'II*\0\x08\0\0\0\1\0\x12\1\5\0\xff\xff\xff\xff\x08\0\0\0\0\0\0\0'),
    'EXIF of 30 MB': lambda: png(8, 8, chunk(b'eXIf', tiff((0x0112, 5, 2**17, bytes(2**20)), rest=bytes(30 << 20)))),
    'profile of noise': seeds.encode(SMALL, 'JPEG', icc_profile=NOISE),
    'XMP of noise': seeds.encode(SMALL, 'JPEG', xmp=NOISE),
    'pixels that unpack to more than the image': lambda: png(pixels=deflated(2**30)),
    'largest PNG': lambda: seeds.encode(Image.new('RGBA', (5792, 5792)), 'PNG', compress_level=1),
    'largest JPEG': lambda: seeds.encode(Image.new('CMYK', (5792, 5792)), 'JPEG', progressive=True),
    'largest TIFF': lambda: tiff((273, 4, 1, 86), (278, 4, 1, 2048), width=16_384, height=2048, rest=bytes(2**25)),
    'largest WebP': webp_claim(16_383, 2048),
    'longest and thinnest': png(16_384, 1),
}


@pytest.mark.parametrize('data', [pytest.param(data, id=name.replace(' ', '-')) for name, data in ODD.items()])
def test_odd_image_is_read(data, tmp_path, reader_process):
    path = image(data)(tmp_path)
    result = reader_process('image', path)
    print(f'{result["seconds"]:.2f} s, {result["bytes"] / 1e6:.0f} MB')
    assert result['outcome'] == 'read', result
    assert result['bytes'] < GIGABYTE


def test_only_the_weights_of_a_zip_file_are_read(tmp_path, reader_process):
    keras = seeds.write_keras(tmp_path / 'model.h5').read_bytes()
    names = ['../out', '/tmp/out', 'C:\\out', '~/out', f'../../{WEIGHTS}']
    path = seeds.write_zip(tmp_path / 'model.keras', dict.fromkeys(names, b'x') | {WEIGHTS: keras})
    before = tree(tmp_path)
    assert reader_process('weights', path)['outcome'] == 'read'
    assert tree(tmp_path) == before


# Folders, as an unpacked archive may leave them.


def write_classes(folder):
    """Writes the smallest data folder."""
    for split in ('Training', 'Testing'):
        (folder / split / 'glioma').mkdir(parents=True)
        (folder / split / 'glioma' / 'a.png').write_bytes(png())
    return folder / 'Training' / 'glioma'


def test_links_in_a_data_folder(tmp_path, reader_process):
    """A link to an image is followed, as users link their data; what could block or never end is not read."""
    folder = tmp_path / 'data'
    glioma = write_classes(folder)
    (tmp_path / 'linked.png').write_bytes(png())
    (tmp_path / 'secret.txt').write_text('password')
    links = {'image': tmp_path / 'linked.png', 'text': tmp_path / 'secret.txt', 'device': '/dev/zero', 'self': 'self'}
    for name, target in links.items():
        (glioma / name).symlink_to(target)
    os.mkfifo(glioma / 'pipe')
    (glioma / 'parent').symlink_to('..')
    (folder / 'Training' / 'loop').symlink_to('.')
    with pytest.raises(InputError, match='loop: a class folder with only folders'):
        brain_tumor_mri.read_folder(folder)
    (folder / 'Training' / 'loop').unlink()
    names = [name for name, _ in brain_tumor_mri.read_folder(folder).files['train']]
    assert [pathlib.Path(name).name for name in names] == ['a.png', 'device', 'image', 'pipe', 'self', 'text']
    results = {pathlib.Path(name).name: reader_process('image', folder / name) for name in names}
    assert {name for name, result in results.items() if result['outcome'] == 'read'} == {'a.png', 'image'}
    for name, fragment in (('device', 'not a file'), ('pipe', 'not a file'), ('self', 'not a file'), ('text', 'not a')):
        check_refused(results[name], folder / 'Training' / 'glioma' / name, fragment)
        assert 'password' not in results[name]['message']


def test_control_characters_in_a_file_name(tmp_path):
    (write_classes(tmp_path) / 'a\x1b[2J\nerror: b.png').write_bytes(png())
    with pytest.raises(InputError, match='has control characters; rename the file') as error:
        brain_tumor_mri.read_folder(tmp_path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize('name', ['../out.png', '/out.png', 'Training/glioma/a.png'])
def test_archive_stays_packed(tmp_path, name):
    """Nothing is unpacked, so no name in an archive leads anywhere."""
    seeds.write_zip(tmp_path / 'archive.zip', {name: png()})
    with pytest.raises(InputError, match='there is no Training/ or train/ in it'):
        brain_tumor_mri.read_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['archive.zip']


# The command line.


def all_fields(config, prefix=''):
    """Returns the names of all fields of a configuration, with those of the parts in it."""
    fields = []
    for name in config:
        part = config.get_ref(name).get()
        fields += all_fields(part, f'{prefix}{name}.') if hasattr(part, 'get_ref') else [f'{prefix}{name}']
    return fields


@pytest.mark.filterwarnings('ignore:the load_module')  # ml_collections imports the file so
def test_values_on_the_command_line_are_not_executed(tmp_path):
    """A configuration file is code, as the README says; a value that replaces one of its own is not."""
    file = str(ROOT / 'configs' / 'densenet121.py')
    code = f'__import__("pathlib").Path({str(tmp_path / "executed")!r}).touch()'

    def parse(*arguments):
        values = flags.FlagValues()
        config_flags.DEFINE_config_file('config', None, flag_values=values)
        values(['main', *arguments])
        return values.config

    names = all_fields(parse(f'--config={file}'))
    assert {'seed', 'data_dir', 'augment.rotation'} <= set(names)
    for name in names:
        for value in (code, f'({code},)', f'!!python/object/apply:os.system ["touch {tmp_path}/executed"]'):
            try:
                found = parse(f'--config={file}', f'--config.{name}={value}')
            except (flags.Error, ValueError, SyntaxError, TypeError):
                continue
            assert value in str(found)  # taken as the text that it is
    with pytest.raises((flags.Error, ValueError)):
        parse(f'--config={file}:{code}').seed  # noqa: B018
    assert not any(tmp_path.iterdir())
