"""Slices of DICOM and NIfTI files; the expected grey values are worked out by hand or with numpy."""

import io
import logging
import pathlib
import re
import warnings

import numpy as np
import pytest
from PIL import Image
from seeds import compress_dicom, make_dicom, make_encoded, make_nifti, make_palette, make_sequence, write_dicom

from brain_jax import InputError
from brain_jax.data import scans

nibabel = pytest.importorskip('nibabel')
pydicom = pytest.importorskip('pydicom')
for _package in ('libjpeg', 'openjpeg'):
    pytest.importorskip(_package)

# DICOM.

NOISE = np.random.default_rng(0).integers(0, 4096, (12, 10)).astype(np.uint16)


def decode(data, **options):
    """Returns the one slice of a file."""
    ((name, image),) = scans.decode_slices(data, **options)
    assert name == '' and image.dtype == np.uint8
    return image


STEPS = np.array([[0, 100, 200], [300, 400, 65535]], np.uint16)


@pytest.mark.parametrize(
    ('elements', 'expected'),
    [
        # From center - 0.5 - (width - 1) / 2 = 149.5, which is black, to 349.5; 200 is a share of 0.2525 above it.
        ({'WindowCenter': 250, 'WindowWidth': 201}, [[0, 0, 64], [192, 255, 255]]),
        ({'WindowCenter': [250, 0], 'WindowWidth': [201, 1]}, [[0, 0, 64], [192, 255, 255]]),
        ({'WindowCenter': 200.5, 'WindowWidth': 1}, [[0, 0, 128], [255, 255, 255]]),
        # From 100 to 300.
        ({'WindowCenter': 200, 'WindowWidth': 200, 'VOILUTFunction': 'LINEAR_EXACT'}, [[0, 0, 128], [255, 255, 255]]),
        # 255 / (1 + exp(-4 (x - 200) / 200))
        ({'WindowCenter': 200, 'WindowWidth': 200, 'VOILUTFunction': 'SIGMOID'}, [[5, 30, 128], [225, 250, 255]]),
        # 2 x - 100 is -100, 100, 300, 500, ...; the window goes from 0 to 400.
        (
            {'WindowCenter': 200.5, 'WindowWidth': 401, 'RescaleSlope': 2, 'RescaleIntercept': -100},
            [[0, 64, 191], [255, 255, 255]],
        ),
        # A center of 0 is one.
        (
            {'WindowCenter': 0, 'WindowWidth': 401, 'RescaleSlope': 1, 'RescaleIntercept': -200},
            [[0, 64, 128], [192, 255, 255]],
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize('photometric', ['MONOCHROME2', 'MONOCHROME1'])
def test_window(elements, expected, photometric):
    expected = np.array(expected) if photometric == 'MONOCHROME2' else 255 - np.array(expected)
    np.testing.assert_allclose(decode(make_dicom(STEPS, photometric=photometric, **elements)), expected, atol=0)


def test_window_of_signed_pixels():
    pixels = np.array([[-1000, -50], [0, 50]], np.int16)
    found = decode(make_dicom(pixels, WindowCenter=0.5, WindowWidth=101))
    np.testing.assert_array_equal(found, [[0, 0], [128, 255]])


@pytest.mark.parametrize('syntax', ['ExplicitVRLittleEndian', 'ImplicitVRLittleEndian', 'ExplicitVRBigEndian'])
def test_lookup_tables(syntax):
    """Values 1 to 4 are looked up first as 0, 10, 20, 30, and these for display as 200, 100, 50, 0 of 0 to 1023."""
    order = '>u2' if syntax == 'ExplicitVRBigEndian' else '<u2'
    table = np.zeros(31, order)
    table[[0, 10, 20, 30]] = 200, 100, 50, 0
    modality = make_sequence(LUTDescriptor=[4, 1, 16], LUTData=np.array([0, 10, 20, 30], order).tobytes())
    display = make_sequence(LUTDescriptor=[31, 0, 10], LUTData=table.tobytes())
    pixels = np.array([[0, 1, 2], [3, 4, 9]], np.uint16)
    data = make_dicom(pixels, syntax=syntax, ModalityLUTSequence=modality, VOILUTSequence=display)
    np.testing.assert_array_equal(decode(data), np.rint(np.array([[200, 200, 100], [50, 0, 0]]) * 255 / 1023))


def test_without_a_window():
    dark = np.random.default_rng(1).integers(0, 60, (12, 10)).astype(np.uint8)
    np.testing.assert_array_equal(decode(make_dicom(dark)), dark)  # 8 bits are never stretched
    np.testing.assert_array_equal(decode(make_dicom(dark % 2, bits=1)), dark % 2 * 255)
    black, white = np.percentile(NOISE, [0.1, 99.9])
    expected = np.rint(np.clip((NOISE - black) / (white - black), 0, 1) * 255)
    np.testing.assert_array_equal(decode(make_dicom(NOISE, bits=12)), expected)
    np.testing.assert_array_equal(decode(make_dicom(NOISE, bits=12, WindowCenter=9, WindowWidth=0)), expected)
    np.testing.assert_array_equal(decode(make_dicom(np.full((4, 4), 700, np.uint16))), 0)


@pytest.mark.parametrize(
    'syntax',
    ['ImplicitVRLittleEndian', 'ExplicitVRBigEndian', 'DeflatedExplicitVRLittleEndian'],
)
def test_storage_does_not_matter(syntax):
    window = {'WindowCenter': 2000, 'WindowWidth': 3000}
    expected = decode(make_dicom(NOISE, bits=12, **window))
    assert len(np.unique(expected)) > 50
    np.testing.assert_array_equal(decode(make_dicom(NOISE, syntax=syntax, bits=12, **window)), expected)


@pytest.mark.parametrize('syntax', ['RLELossless', 'JPEG2000Lossless', 'JPEGLSLossless'])
@pytest.mark.parametrize('frames', [1, 3])
def test_compression_does_not_matter(syntax, frames):
    if syntax == 'JPEGLSLossless':
        pytest.importorskip('jpeg_ls')  # only to encode
    large = np.tile(NOISE, (3, 4))
    pixels = large if frames == 1 else np.stack([large, large[::-1], large // 2])
    plain = make_dicom(pixels, bits=12, WindowCenter=2000, WindowWidth=3000)
    packed = compress_dicom(plain, syntax)
    for slices in ('all', 'middle'):
        found = scans.decode_slices(packed, slices=slices)
        expected = scans.decode_slices(plain, slices=slices)
        assert [name for name, _ in found] == [name for name, _ in expected]
        for (_, image), (_, original) in zip(found, expected, strict=True):
            np.testing.assert_array_equal(image, original)


def test_jpeg():
    ramp = np.add.outer(np.arange(0, 240, 10), np.arange(16)).astype(np.uint8)
    np.testing.assert_allclose(decode(make_encoded(ramp, 'JPEGBaseline8Bit', 'JPEG', quality=95)), ramp, atol=4)


def test_colours():
    colours = np.random.default_rng(2).integers(0, 256, (6, 8, 3), np.uint8)
    luma = colours @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(decode(make_dicom(colours, photometric='RGB')), luma, atol=1)
    red, green, blue = np.moveaxis(colours / 4 + 90.0, -1, 0)  # ITU-R 601, of colours whose values all fit
    brightness = 0.299 * red + 0.587 * green + 0.114 * blue
    stored = np.stack([brightness, (blue - brightness) / 1.772 + 128, (red - brightness) / 1.402 + 128], axis=-1)
    stored = np.rint(stored).astype(np.uint8)
    np.testing.assert_allclose(decode(make_dicom(stored, photometric='YBR_FULL')), brightness, atol=2)


@pytest.mark.parametrize('bits', [8, 16])
def test_palette(bits):
    table = np.random.default_rng(3).integers(0, 2**bits, (3, 256)).astype(f'<u{bits // 8}')
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = (table.T @ np.array([0.299, 0.587, 0.114]) * 255 / (2**bits - 1)).reshape(16, 16)
    data = make_dicom(pixels, photometric='PALETTE COLOR', **make_palette(table))
    np.testing.assert_allclose(decode(data), expected, atol=1)


def test_frames():
    frames = np.arange(10, dtype=np.uint8)[:, None, None] + np.zeros((10, 4, 4), np.uint8)
    data = make_dicom(frames)
    every = scans.decode_slices(data, slices='all')
    assert [name for name, _ in every] == [f'frame {i + 1}' for i in range(10)]
    for (_, image), frame in zip(every, frames, strict=True):
        np.testing.assert_array_equal(image, frame)
    assert [name for name, _ in scans.decode_slices(data)] == ['frame 6']
    # The middles of two and of five equal parts.
    assert [name for name, _ in scans.decode_slices(data, slices=2)] == ['frame 3', 'frame 8']
    assert [image[0, 0] for _, image in scans.decode_slices(data, slices=5)] == [1, 3, 5, 7, 9]
    assert len(scans.decode_slices(data, slices=11)) == 10


def test_functional_groups():
    """Window and rescaling of an enhanced file stand with every frame, the spacing with all of them."""
    frames = np.stack([STEPS, STEPS])
    groups = pydicom.Sequence()
    for slope, center in ((1, 250), (2, 500)):
        group = pydicom.Dataset()
        group.PixelValueTransformationSequence = make_sequence(RescaleSlope=slope, RescaleIntercept=0)
        group.FrameVOILUTSequence = make_sequence(WindowCenter=center, WindowWidth=201)
        groups.append(group)
    shared = make_sequence(PixelMeasuresSequence=make_sequence(PixelSpacing=[0.5, 0.25]))
    data = make_dicom(frames, PerFrameFunctionalGroupsSequence=groups, SharedFunctionalGroupsSequence=shared)
    (_, first), (_, second) = scans.decode_slices(data, slices='all')
    assert first.shape == second.shape == (4, 3)
    # Outer rows of a picture that is made twice as high are those it had.
    np.testing.assert_array_equal(first[[0, -1]], [[0, 0, 64], [192, 255, 255]])
    # 2 x is 400 where x is 200: (400 - 499.5) / 200 + 0.5 is a share of 0.0025.
    np.testing.assert_array_equal(second[[0, -1]], [[0, 0, 1], [255, 255, 255]])


@pytest.mark.parametrize(('keyword', 'value'), [('PixelSpacing', [0.3, 0.9]), ('PixelAspectRatio', [1, 3])])
def test_pixels_that_are_not_square(keyword, value):
    pixels = np.repeat(np.array([[10, 200]], np.uint8), 6, axis=0)
    image = decode(make_dicom(pixels, **{keyword: value}))
    assert image.shape == (6, 6)
    np.testing.assert_array_equal(image[:, [0, -1]], pixels)


def test_dicom_is_told_by_its_bytes_or_its_name(tmp_path):
    data = make_dicom(NOISE.astype(np.uint8))
    (tmp_path / 'IM0001').write_bytes(data)
    (tmp_path / 'bare.DCM').write_bytes(data[132:])
    (tmp_path / 'bare').write_bytes(data[132:])
    for name in ('IM0001', 'bare.DCM'):
        np.testing.assert_array_equal(scans.read_slices(tmp_path / name)[0][1], NOISE.astype(np.uint8))
    with pytest.raises(InputError, match='no JPEG, PNG, BMP, TIFF, WebP, DICOM or NIfTI file'):
        scans.read_slices(tmp_path / 'bare')


def test_pictures_are_read_too(tmp_path):
    Image.fromarray(NOISE.astype(np.uint8)).save(tmp_path / 'picture.png')
    ((name, image),) = scans.read_slices(tmp_path / 'picture.png', plane='coronal', slices=7)
    assert name == ''
    np.testing.assert_array_equal(image, NOISE.astype(np.uint8))


# NIfTI.


def make_corners():
    """Returns voxels [right, front, head] of 4 x 6 x 8 whose value is 100, and more in the halves: +20, +40, +80."""
    x, y, z = np.indices((4, 6, 8))
    return (100 + 20 * (x >= 2) + 40 * (y >= 3) + 80 * (z >= 4)).astype(np.int16)


def grey(value):
    """Returns the grey value of a corner: 100 is black, 240 is white."""
    return round((value - 100) * 255 / 140)


@pytest.mark.parametrize('axes', ['RAS', 'LAS', 'LPS', 'RSA', 'PIR', 'SLP', 'ASL', 'IPL'])
def test_patient_lies_as_a_radiologist_sees_it(axes):
    image = nibabel.Nifti1Image(make_corners(), np.diag([1, 1, 1, 1]))
    target = nibabel.orientations.axcodes2ornt(axes)
    stored = image.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(image.affine), target))
    assert ''.join(nibabel.aff2axcodes(stored.affine)) == axes
    data = stored.to_bytes()
    # The patient's right (+20) at the left, the front (+40) up; the slice is that above the middle (+80).
    ((name, axial),) = scans.decode_slices(data)
    assert name == 'axial 5' and axial.shape == (6, 4)
    assert axial[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [grey(240), grey(220), grey(200), grey(180)]
    # The head (+80) up; the slice is in front of the middle (+40).
    ((name, coronal),) = scans.decode_slices(data, plane='coronal')
    assert name == 'coronal 4' and coronal.shape == (8, 4)
    assert coronal[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [grey(240), grey(220), grey(160), grey(140)]
    # The face (+40) at the left; the slice is right of the middle (+20).
    ((name, sagittal),) = scans.decode_slices(data, plane='sagittal')
    assert name == 'sagittal 3' and sagittal.shape == (8, 6)
    assert sagittal[[0, 0, -1, -1], [0, -1, 0, -1]].tolist() == [grey(240), grey(200), grey(160), grey(120)]


def test_oblique_axes_are_those_that_lie_closest():
    angle = np.deg2rad(20)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    straight = scans.decode_slices(make_nifti(make_corners()))[0][1]
    np.testing.assert_array_equal(scans.decode_slices(make_nifti(make_corners(), affine))[0][1], straight)


def test_voxel_size():
    """4 x 6 x 8 voxels of 1 x 2 x 3 mm are 4 x 12 x 24 mm."""
    data = make_nifti(make_corners(), np.diag([1, 2, 3, 1]))
    shapes = [scans.decode_slices(data, plane=plane)[0][1].shape for plane in ('axial', 'coronal', 'sagittal')]
    assert shapes == [(12, 4), (24, 4), (12, 6)]


def make_head():
    """Returns voxels of 20 axial slices, of which those from the 7th to the 16th hold a bright square."""
    voxels = np.zeros((10, 10, 20), np.int16)
    voxels[2:8, 2:8, 6:16] = 1000
    voxels[0, 0] = 5  # noise that is no head
    return voxels


@pytest.mark.parametrize(
    ('slices', 'numbers'),
    [('all', range(7, 17)), ('middle', [12]), (1, [12]), (2, [9, 14]), (5, [8, 10, 12, 14, 16]), (99, range(7, 17))],
)
def test_slices_are_those_of_the_head(slices, numbers):
    found = scans.decode_slices(make_nifti(make_head()), slices=slices)
    assert [name for name, _ in found] == [f'axial {number}' for number in numbers]
    assert all(image[5, 5] == 255 and image[0, 0] == 0 for _, image in found)


def test_intensities_of_a_volume():
    voxels = np.random.default_rng(4).gamma(2, 300, (16, 18, 12))
    voxels[3, 4, 5] = 1e6  # one voxel that would make all others black
    black, white = np.percentile(voxels, [0.1, 99.9])
    every = np.stack([image for _, image in scans.decode_slices(make_nifti(voxels), slices='all')], axis=-1)
    expected = np.rint(np.clip((voxels - black) / (white - black), 0, 1) * 255)
    assert every.shape == (18, 16, 12)
    np.testing.assert_array_equal(every, expected.transpose(1, 0, 2)[::-1, ::-1])


def turn_round(header):
    header.set_slope_inter(-2, 7)


KINDS = {
    'stored from white to black': make_nifti(-make_corners(), change=turn_round),
    'scaled': make_nifti(make_corners(), change=lambda header: header.set_slope_inter(0.5, -3)),
    'NIfTI-2': make_nifti(make_corners(), kind='Nifti2Image'),
    'big-endian': make_nifti(make_corners(), order='>'),
    'float32': make_nifti(make_corners().astype(np.float32)),
    'complex': make_nifti(make_corners() * np.complex64(1j)),
    'several volumes': make_nifti(np.stack([make_corners(), make_corners()[::-1]], axis=-1)),
    'colours': make_nifti(
        np.repeat(make_corners().astype(np.uint8), 3).view([(name, 'u1') for name in 'RGB']).reshape(4, 6, 8)
    ),
}  # fmt: skip


@pytest.mark.parametrize('kind', KINDS)
def test_storage_of_voxels_does_not_matter(kind):
    ((_, expected),) = scans.decode_slices(make_nifti(make_corners()))
    assert len(np.unique(expected)) == 4
    ((name, image),) = scans.decode_slices(KINDS[kind])
    assert name == ('axial 5 of volume 1' if kind == 'several volumes' else 'axial 5')
    np.testing.assert_array_equal(image, expected)


def test_packed_volume(tmp_path):
    image = nibabel.Nifti1Image(make_corners(), np.eye(4))
    nibabel.save(image, tmp_path / 'volume.nii.gz')
    (tmp_path / 'volume').write_bytes((tmp_path / 'volume.nii.gz').read_bytes())  # told by its bytes
    expected = scans.decode_slices(image.to_bytes())[0][1]
    for name in ('volume.nii.gz', 'volume'):
        np.testing.assert_array_equal(scans.read_slices(tmp_path / name)[0][1], expected)


def test_voxels_that_are_no_numbers():
    voxels = make_corners().astype(np.float32)
    voxels[0, 0, 4], voxels[1, 0, 4] = np.nan, np.inf
    ((_, image),) = scans.decode_slices(make_nifti(voxels))
    ((_, expected),) = scans.decode_slices(make_nifti(make_corners()))
    assert image[-1, -1] == 0 and image[-1, -2] == 255  # at the back of the patient's left
    np.testing.assert_array_equal(image[:-1], expected[:-1])
    ((_, nothing),) = scans.decode_slices(make_nifti(np.full((4, 4, 4), np.nan, np.float32)))
    assert not nothing.any()


# What is refused.


@pytest.mark.parametrize('slices', ['some', 0, -1, 1.5, None])
def test_slices_that_cannot_be(slices):
    with pytest.raises(InputError, match="it must be 'all', 'middle', or a number from 1"):
        scans.decode_slices(make_dicom(STEPS), slices=slices)


def test_plane_that_cannot_be():
    with pytest.raises(InputError, match=r"image: plane is 'oblique': it must be one of axial, coronal, sagittal"):
        scans.decode_slices(make_nifti(make_corners()), plane='oblique')


@pytest.mark.parametrize(('package', 'data'), [('pydicom', make_dicom(STEPS)), ('nibabel', make_nifti(make_corners()))])
def test_package_that_is_not_installed(package, data, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, package, None)  # as Python does where an import is to fail
    with pytest.raises(InputError, match=f'needs {package}: pip install -r requirements-serve.txt'):
        scans.decode_slices(data)


def without_pixels():
    dataset = pydicom.dcmread(io.BytesIO(make_dicom(STEPS)))
    del dataset.PixelData
    return write_dicom(dataset)


def video():
    dataset = pydicom.dcmread(io.BytesIO(make_dicom(STEPS, PixelData=pydicom.encaps.encapsulate([b'film' * 9]))))
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
    dataset['PixelData'].is_undefined_length = True
    return write_dicom(dataset)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (without_pixels, 'a DICOM file without a picture'),
        (video, 'stored as MPEG2 Main Profile'),
        (lambda: make_dicom(STEPS)[:-3], 'cannot be decoded .* it may be damaged'),
        (lambda: make_dicom(STEPS)[:140], 'a DICOM file without a picture|cannot be decoded'),
        (lambda: make_nifti(make_corners())[:-1], 'a NIfTI file that ends before its voxels do'),
        (lambda: nibabel.Nifti1Pair(make_corners(), np.eye(4)).header.binaryblock, 'one file of a NIfTI pair'),
        (lambda: make_nifti(np.ones((1, 1, 9), np.int16)), 'slices of 1x1 pixels'),
        (lambda: b'', 'an empty file'),
    ],
)
def test_refused(make, message):
    with pytest.raises(InputError, match=rf'^scan: ({message})') as error:
        scans.decode_slices(make(), name='scan')
    assert str(error.value).isprintable()


# Patients.

# Values that every element about patient, study and equipment holds below, by what DICOM calls its representation.
MARKS = {
    'DA': '17770704',
    'TM': '077707',
    'DT': '17770704077707',
    'AS': '077Y',
    'UI': '1.2.777',
    'IS': '7770',
    'DS': '7770',
}
MARK = re.compile('|'.join(['SECRET', *MARKS.values()]))
TEXTS = ('AE', 'CS', 'LO', 'LT', 'PN', 'SH', 'ST', 'UC', 'UR', 'UT', *MARKS)


def make_marked(**elements):
    """Returns a DICOM file in which every element of the groups of patient, study and equipment holds a mark."""
    dataset = pydicom.dcmread(io.BytesIO(make_dicom(NOISE)))
    marked = 0
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of values that are not as they should be
        for tag, (kind, _, _, _, keyword) in pydicom.datadict.DicomDictionary.items():
            if kind in TEXTS and keyword and tag >> 16 in (0x08, 0x10, 0x18, 0x20, 0x32, 0x38, 0x40):
                setattr(dataset, keyword, MARKS.get(kind, 'SECRET'))
                marked += 1
        dataset.SpecificCharacterSet = 'ISO_IR 100'
        for keyword, value in elements.items():
            dataset[keyword] = pydicom.DataElement(keyword, 'LO', value, validation_mode=pydicom.config.IGNORE)
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.file_meta.SourceApplicationEntityTitle = 'SECRET'
        assert marked > 500 and dataset.PatientName == dataset.InstitutionName == 'SECRET'
        return write_dicom(dataset)


def marked_files():
    """Returns {name: bytes} of marked files: whole, and spoiled in ways that pydicom tells of by quoting values."""
    whole = make_marked()
    spoiled = {
        keyword: make_marked(**{keyword: 'SECRET\\SECRET'})
        for keyword in (
            *('WindowCenter', 'PixelSpacing', 'RescaleSlope', 'NumberOfFrames', 'PhotometricInterpretation'),
            *('SpecificCharacterSet', 'BitsStored', 'Rows', 'PixelData', 'SharedFunctionalGroupsSequence'),
        )
    }
    return spoiled | {
        'whole': whole,
        'cut': whole[:-20],
        'in the middle of the patient': whole[: whole.index(b'SECRET', 1000) + 3],
        'syntax': whole.replace(b'1.2.840.10008.1.2.1\0', b'SECRET.1.10008.1.2\0\0'),
        'another syntax': whole.replace(b'1.2.840.10008.1.2.1\0', b'1.2.840.10008.1.2.5\0'),
        'implicit': whole.replace(b'1.2.840.10008.1.2.1\0', b'1.2.840.10008.1.2\0\0\0'),
        'without the letters': whole[132:],
    }


def test_nothing_about_the_patient_gets_out(capfd):
    files, outcomes = marked_files(), {}
    log = logging.StreamHandler(io.StringIO())  # what a program that logs everything would show
    logging.getLogger().addHandler(log)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for name, data in files.items():
            assert MARK.search(data.decode('latin-1'))
            try:
                told = [name for name, _ in scans.decode_slices(data, name='scan.dcm')]
                outcomes[name] = 'read'
            except InputError as error:
                told = outcomes[name] = str(error)
            assert not MARK.search(str(told)), told
    logging.getLogger().removeHandler(log)
    told = [*capfd.readouterr(), log.stream.getvalue(), *(str(warning.message) for warning in caught)]
    assert not [text for text in told if MARK.search(text)]
    print(*(f'{name}: {outcome}' for name, outcome in outcomes.items()), sep='\n')
    assert outcomes['whole'] == 'read' and list(outcomes.values()).count('read') < len(outcomes) - 5


def test_odd_header_of_nifti_is_not_told_of():
    """nibabel, which puts it right, prints what stands there."""
    lines = logging.StreamHandler(io.StringIO())
    logger = logging.getLogger('nibabel.global')
    logger.addHandler(lines)
    data = make_nifti(make_corners(), change=lambda header: header.structarr.__setitem__('sform_code', 512))
    found = scans.decode_slices(data)
    logger.removeHandler(lines)
    assert len(found) == 1 and lines.stream.getvalue() == ''


# The files that the packages bring for their own tests.


def own_files(package, folder):
    return [path for path in sorted((pathlib.Path(package.__file__).parent / folder).rglob('*')) if path.is_file()]


def pydicom_reads(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return pydicom.dcmread(path, force=True).pixel_array.size > 0
    except Exception:
        return False


def test_files_of_the_packages_themselves():
    """Each is read or refused with a line; read are, of DICOM, just those of which pydicom itself shows pixels."""
    files = own_files(pydicom, 'data/test_files') + own_files(nibabel, 'tests/data')
    outcomes = {}
    for path in files:
        try:
            found = scans.read_slices(path, slices=3)
        except InputError as error:
            assert str(error).isprintable() and str(error).startswith(f'{path}: ')
            outcomes[path] = f'refused, {str(error).removeprefix(f"{path}: ")}'
        else:
            assert 1 <= len(found) <= 3
            assert all(image.dtype == np.uint8 and image.ndim == 2 for _, image in found)
            outcomes[path] = ', '.join(f'{name} {image.shape[1]}x{image.shape[0]}'.strip() for name, image in found)
        is_volume = path.name.endswith(('.nii', '.nii.gz')) and path.name != 'row_major.dconn.nii'  # a matrix
        assert outcomes[path].startswith('refused') != (pydicom_reads(path) or is_volume)
    print('', *(f'{path.name}: {outcome}' for path, outcome in outcomes.items()), sep='\n')
    read = sum(not outcome.startswith('refused') for outcome in outcomes.values())
    print(f'{len(outcomes)} of {len(files)}: {read} read, {len(outcomes) - read} refused')
    assert len(files) > 200 and read > 80
