"""Small valid files of every format that is read, from which tests and the fuzzer make damaged ones."""

import io
import pathlib
import tempfile
import zipfile

import flax.traverse_util
import h5py
import numpy as np
from PIL import Image

from brain_jax import pretrained

# A network of as few values as the reader knows for one: what `pretrained.load_pretrained` wants beside a file.
SHAPES = {
    'params/conv1_conv/kernel': (1, 1, 3, 2),
    'params/conv2_block1/0_bn/scale': (2,),
    'params/pool3_bn/scale': (2,),
    'params/pool4_bn/scale': (2,),
    'params/bn/scale': (2,),
    'batch_stats/bn/var': (2,),
    'params/predictions/kernel': (2, 3),
    'params/predictions/bias': (3,),
}
VARIABLES = flax.traverse_util.unflatten_dict({path: np.ones(shape) for path, shape in SHAPES.items()}, sep='/')
# The same arrays as older Keras names them.
KERAS_NAMES = {
    'params/conv1_conv/kernel': 'conv1/conv/kernel:0',
    'params/conv2_block1/0_bn/scale': 'conv2_block1_0_bn/conv2_block1_0_bn/gamma:0',
    'params/pool3_bn/scale': 'pool3_bn/pool3_bn/gamma:0',
    'params/pool4_bn/scale': 'pool4_bn/pool4_bn/gamma:0',
    'params/bn/scale': 'bn/bn/gamma:0',
    'batch_stats/bn/var': 'bn/bn/moving_variance:0',
    'params/predictions/kernel': 'predictions/predictions/kernel:0',
    'params/predictions/bias': 'predictions/predictions/bias:0',
}


def flatten(variables):
    """Returns {path: array} of nested variables."""
    return flax.traverse_util.flatten_dict(variables, sep='/')


def encode(image, file_format, **options):
    """Returns a Pillow image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def image_files():
    """Returns {name: bytes} of one small image in every format and the storages that differ most."""
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 20), np.uint8))
    colour, transparent = grey.convert('RGB'), grey.convert('RGBA')
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        'grey.png': encode(grey, 'PNG'),
        'palette.png': encode(grey.convert('P'), 'PNG', transparency=3, exif=exif.tobytes()),
        'deep.png': encode(Image.fromarray(np.asarray(grey).astype(np.uint16) * 16), 'PNG'),
        'colour.jpg': encode(colour, 'JPEG', exif=exif.tobytes(), comment='a head'),
        'progressive.jpg': encode(colour, 'JPEG', progressive=True),
        'grey.bmp': encode(grey, 'BMP'),
        'raw.tif': encode(colour, 'TIFF'),
        'packed.tif': encode(grey, 'TIFF', compression='tiff_lzw'),
        'big.tif': encode(grey, 'TIFF', big_tiff=True),
        'lossy.webp': encode(colour, 'WEBP', exif=exif.tobytes()),
        'lossless.webp': encode(transparent, 'WEBP', lossless=True),
    }


def write_keras(path, shapes=SHAPES):
    """Writes an HDF5 file with arrays of ones as older Keras does; returns its path."""
    with h5py.File(path, 'w') as file:
        for name, shape in shapes.items():
            file[KERAS_NAMES[name]] = np.ones(shape, np.float32)
    return path


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    """Writes a zip file of {name: bytes}; returns its path."""
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def weights_files():
    """Returns {name: bytes} of a tiny network in every format."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        keras = write_keras(folder / 'tiny.h5').read_bytes()
        pretrained.write_weights(folder / 'tiny.safetensors', VARIABLES, source='', source_sha256='')
        members = {'metadata.json': b'{}', 'model.weights.h5': keras}
        return {
            'tiny.h5': keras,
            'tiny.safetensors': (folder / 'tiny.safetensors').read_bytes(),
            'tiny.keras': write_zip(folder / 'tiny.keras', members).read_bytes(),
            'packed.keras': write_zip(folder / 'packed.keras', members, zipfile.ZIP_DEFLATED).read_bytes(),
        }
