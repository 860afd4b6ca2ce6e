"""Small valid files of every format that is read, from which tests and the fuzzer make damaged ones.

pydicom and nibabel are optional packages (requirements-serve.txt), so they are imported where they are needed.
"""

import gzip
import io
import pathlib
import tempfile
import warnings
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


def make_dicom(pixels, *, syntax='ExplicitVRLittleEndian', photometric='MONOCHROME2', bits=None, **elements):
    """Returns a DICOM file, as bytes, of uint or int pixels [rows, columns], [frames, rows, columns] or [..., 3]."""
    import pydicom

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = pydicom.uid.MRImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = '1.2.3'
    colours = 1 if photometric.startswith(('MONO', 'PALETTE')) else 3
    shape = pixels.shape[: pixels.ndim - (colours > 1)]
    dataset.Rows, dataset.Columns = shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = colours, photometric
    dataset.BitsAllocated = 8 * pixels.itemsize
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, int(pixels.dtype.kind == 'i')
    if colours > 1:
        dataset.PlanarConfiguration = 0
    if len(shape) == 3:
        dataset.NumberOfFrames = shape[0]
    order = '>' if syntax == 'ExplicitVRBigEndian' else '<'
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    dataset['PixelData'].VR = 'OW'
    for keyword, value in elements.items():
        setattr(dataset, keyword, value)
    return write_dicom(dataset)


def write_dicom(dataset):
    """Returns a pydicom dataset as the bytes of a file."""
    import pydicom

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of values that are not as they should be
        pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def make_sequence(**elements):
    """Returns a DICOM sequence of one item."""
    import pydicom

    item = pydicom.Dataset()
    for keyword, value in elements.items():
        setattr(item, keyword, value)
    return pydicom.Sequence([item])


def make_palette(table):
    """Returns the elements of a DICOM file's palette: {keyword: value} of uint8 or uint16 [3, colours]."""
    palette = {}
    for name, values in zip(('Red', 'Green', 'Blue'), table, strict=True):
        palette[f'{name}PaletteColorLookupTableDescriptor'] = [len(values), 0, 8 * values.itemsize]
        palette[f'{name}PaletteColorLookupTableData'] = values.tobytes()
    return palette


def compress_dicom(data, syntax):
    """Returns a DICOM file with its pixels compressed as pydicom calls that transfer syntax."""
    import pydicom

    dataset = pydicom.dcmread(io.BytesIO(data))
    dataset.compress(getattr(pydicom.uid, syntax), generate_instance_uid=False)
    return write_dicom(dataset)


def make_encoded(pixels, syntax, file_format, **options):
    """Returns a DICOM file of uint8 [rows, columns] pixels in a frame that Pillow compresses."""
    import pydicom

    frame = encode(Image.fromarray(pixels), file_format, **options)
    dataset = pydicom.dcmread(io.BytesIO(make_dicom(pixels, PixelData=pydicom.encaps.encapsulate([frame]))))
    dataset.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    dataset['PixelData'].VR, dataset['PixelData'].is_undefined_length = 'OB', True
    return write_dicom(dataset)


def make_nifti(voxels, affine=None, kind='Nifti1Image', order='<', change=None):
    """Returns a NIfTI file, as bytes; its axes run to the right, front and head where no affine tells otherwise."""
    import nibabel

    kind = getattr(nibabel, kind)
    header = kind.header_class(endianness=order)
    header.set_data_dtype(voxels.dtype)
    image = kind(voxels, np.eye(4) if affine is None else affine, header)
    if change:
        change(image.header)
    return image.to_bytes()


def dicom_files():
    """Returns {name: bytes} of one small DICOM file of 12 x 10 pixels in each of the storages that differ most."""
    deep = np.random.default_rng(0).integers(0, 4096, (12, 10)).astype(np.uint16)
    grey, frames = (deep // 16).astype(np.uint8), np.stack([deep, deep[::-1], deep // 2])
    window = {'WindowCenter': 2000, 'WindowWidth': 3000}
    tables = {
        'ModalityLUTSequence': make_sequence(LUTDescriptor=[256, 0, 16], LUTData=np.arange(256, dtype='<u2').tobytes()),
        'VOILUTSequence': make_sequence(LUTDescriptor=[256, 0, 8], LUTData=np.arange(256, dtype='<u2').tobytes()),
    }
    groups = {
        'SharedFunctionalGroupsSequence': make_sequence(
            PixelMeasuresSequence=make_sequence(PixelSpacing=[1, 1]), FrameVOILUTSequence=make_sequence(**window)
        )
    }
    palette = make_palette(np.random.default_rng(1).integers(0, 256, (3, 256), np.uint8))
    return {
        'grey.dcm': make_dicom(grey),
        'bare.dcm': make_dicom(grey)[132:],  # without the letters that tell DICOM
        'window.dcm': make_dicom(deep, bits=12, RescaleSlope=0.5, RescaleIntercept=1000, **window),
        'white.dcm': make_dicom(
            grey, photometric='MONOCHROME1', VOILUTFunction='SIGMOID', WindowCenter=128, WindowWidth=200
        ),
        'signed.dcm': make_dicom(deep.astype(np.int16) - 2048, PixelAspectRatio=[1, 1]),
        'tables.dcm': make_dicom(grey, **tables),
        'colours.dcm': make_dicom(np.stack([grey, grey.T.reshape(12, 10), grey // 2], axis=-1), photometric='RGB'),
        'palette.dcm': make_dicom(grey, photometric='PALETTE COLOR', **palette),
        'frames.dcm': make_dicom(frames, **groups),
        'implicit.dcm': make_dicom(deep, syntax='ImplicitVRLittleEndian'),
        'big_endian.dcm': make_dicom(deep, syntax='ExplicitVRBigEndian'),
        'deflated.dcm': make_dicom(deep, syntax='DeflatedExplicitVRLittleEndian'),
        'runs.dcm': compress_dicom(make_dicom(frames), 'RLELossless'),
        'jpeg.dcm': make_encoded(grey, 'JPEGBaseline8Bit', 'JPEG'),
        'jpeg_2000.dcm': make_encoded(grey, 'JPEG2000Lossless', 'JPEG2000', no_jp2=True, num_resolutions=1),
    }


def nifti_files():
    """Returns {name: bytes} of one small NIfTI file of 10 x 12 x 3 voxels in each of the storages that differ most."""
    voxels = np.random.default_rng(0).integers(0, 256, (10, 12, 3)).astype(np.int16)
    colours = np.repeat(voxels.astype(np.uint8), 3).view([(name, 'u1') for name in 'RGB']).reshape(voxels.shape)
    return {
        'volume.nii': make_nifti(voxels, change=lambda header: header.set_slope_inter(2, -3)),
        'two.nii': make_nifti(voxels, kind='Nifti2Image'),
        'big_endian.nii': make_nifti(voxels, order='>'),
        'float.nii': make_nifti(voxels.astype(np.float32)),
        'complex.nii': make_nifti(voxels.astype(np.complex64)),
        'colours.nii': make_nifti(colours),
        'several.nii': make_nifti(np.stack([voxels, voxels[::-1]], axis=-1)),
        'packed.nii.gz': gzip.compress(make_nifti(voxels), mtime=0),
    }


def scan_files():
    """Returns {name: bytes} of small DICOM and NIfTI files, whose slices are all of 12 x 10 pixels."""
    return dicom_files() | nifti_files()
