"""Whatever bytes a reader is given, it returns what it promises or raises an `InputError` of one line."""

import importlib.util
import os

import hypothesis
import numpy as np
import pytest
import seeds
from hypothesis import strategies

from brain_jax import InputError, pretrained
from brain_jax.data import images, scans

# The same examples in every run. No deadline: it would be a test of the machine.
SETTINGS = hypothesis.settings(derandomize=True, deadline=None, max_examples=300, database=None)
IMAGES, WEIGHTS = list(seeds.image_files().values()), list(seeds.weights_files().values())
HAS_SCANS = all(map(importlib.util.find_spec, ('pydicom', 'nibabel', 'pylibjpeg', 'libjpeg', 'openjpeg')))  # optional
DICOM, NIFTI = (seeds.dicom_files(), seeds.nifti_files()) if HAS_SCANS else ({}, {})
needs_scans = pytest.mark.skipif(not HAS_SCANS, reason='needs requirements-serve.txt')


@strategies.composite
def damaged(draw, files):
    """Draws one of the files with some bytes changed, left out or put in, or its end cut off."""
    data = bytearray(draw(strategies.sampled_from(files)))
    for _ in range(draw(strategies.integers(1, 4))):
        # Headers stand at the start, the directory of a zip file at the end.
        place = draw(strategies.integers(0, 100) | strategies.integers(-100, -1) | strategies.integers(0, len(data)))
        place %= len(data) + 1
        new = draw(strategies.binary(max_size=8))
        kind = draw(strategies.sampled_from(['change', 'insert', 'leave out', 'cut']))
        end = {'change': place + len(new), 'insert': place, 'leave out': place + 8, 'cut': len(data)}[kind]
        data[place:end] = b'' if kind in ('leave out', 'cut') else new
    return bytes(data)


def check_image(data):
    """Checks that the bytes are read as an image, or refused with one line."""
    try:
        grey = images.decode_image(data, name='scan')
    except InputError as error:
        assert str(error).startswith('scan: ') and '\n' not in str(error)
    else:
        assert grey.dtype == np.uint8 and grey.ndim == 2 and min(grey.shape) > 0
        assert images.pad_and_resize(grey, 32).shape == (32, 32)
        width, height, channels, _ = images.read_header(data)
        assert {width, height} == set(grey.shape) and 1 <= channels <= 4


@SETTINGS
@hypothesis.given(strategies.binary(max_size=200))
def test_any_bytes_as_an_image(data):
    check_image(data)


@SETTINGS
@hypothesis.given(damaged(IMAGES))
def test_damaged_image(data):
    check_image(data)


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    return tmp_path_factory.mktemp('weights') / 'file'


def check_weights(data, path):
    """Checks that the bytes are read as weights with the shapes of the network, or refused with one line."""
    path.write_bytes(data)
    try:
        variables, sha256 = pretrained.load_pretrained(path, seeds.VARIABLES)
    except InputError as error:
        assert str(error).startswith(f'{path}: ') and str(error).isprintable()
    else:
        assert len(sha256) == 64
        found = seeds.flatten(variables)
        assert {name: array.shape for name, array in found.items()} == seeds.SHAPES
        assert all(np.isfinite(array).all() for array in found.values())
    assert os.listdir(path.parent) == ['file']


@SETTINGS
@hypothesis.given(strategies.binary(max_size=200))
def test_any_bytes_as_weights(path, data):
    check_weights(data, path)


@SETTINGS
@hypothesis.given(damaged(WEIGHTS))
def test_damaged_weights(path, data):
    check_weights(data, path)


def check_scan(data, name):
    """Checks that the bytes are read as slices, or refused with one line."""
    try:
        found = scans.decode_slices(data, name=name, slices=2)
    except InputError as error:
        assert str(error).startswith(f'{name}: ') and str(error).isprintable()
    else:
        assert 1 <= len(found) <= 2 and all(label.isprintable() for label, _ in found)
        assert all(grey.dtype == np.uint8 and grey.ndim == 2 and min(grey.shape) > 0 for _, grey in found)


@needs_scans
@SETTINGS
@hypothesis.given(strategies.binary(max_size=200))
def test_any_bytes_as_dicom(data):
    check_scan(data, 'scan.dcm')


@needs_scans
@SETTINGS
@hypothesis.given(strategies.binary(max_size=344), strategies.binary(max_size=200))
def test_any_bytes_as_nifti(header, voxels):
    check_scan(header.ljust(344, b'\0') + b'n+1\0' + voxels, 'scan.nii')


@needs_scans
@SETTINGS
@hypothesis.given(damaged([data.removeprefix(bytes(128) + b'DICM') for data in DICOM.values()]))  # read just as well
def test_damaged_dicom(data):
    check_scan(data, 'scan.dcm')


@needs_scans
@SETTINGS
@hypothesis.given(damaged(list(NIFTI.values())))
def test_damaged_nifti(data):
    check_scan(data, 'scan.nii')


@pytest.mark.parametrize('data', IMAGES, ids=seeds.image_files())
def test_image_to_damage_is_whole(data):
    assert sorted(images.decode_image(data).shape) == [20, 24]


@pytest.mark.parametrize('data', WEIGHTS, ids=seeds.weights_files())
def test_weights_to_damage_are_whole(data, path):
    path.write_bytes(data)
    variables, _ = pretrained.load_pretrained(path, seeds.VARIABLES)
    assert all((array == 1).all() for array in seeds.flatten(variables).values())


@needs_scans
@pytest.mark.parametrize('name', DICOM | NIFTI)
def test_scan_to_damage_is_whole(name):
    found = scans.decode_slices((DICOM | NIFTI)[name], name=name, slices='all')
    assert len(found) == (3 if name in ('frames.dcm', 'runs.dcm', *NIFTI) else 1)
    assert all(grey.shape == (12, 10) and len(np.unique(grey)) > 60 for _, grey in found)
