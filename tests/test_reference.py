"""Tests of the sets of images whose patients are known."""

import csv

import h5py
import numpy as np
import pytest
from PIL import Image

from brain_jax import InputError
from brain_jax.data import images, reference

PICTURE = np.random.default_rng(0).integers(0, 3000, (40, 30)).astype(np.int16)


def write_mat(path, *, image=PICTURE, label=2, patient='MR012345', without=()):
    """Writes a file as MATLAB 7.3 writes the figshare set: HDF5 behind 512 bytes, columns first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, 'w', userblock_size=512) as file:
        data = file.create_group('cjdata')
        data['image'] = np.asarray(image).T
        data['label'] = np.array([[float(label)]])
        data['PID'] = np.array([[ord(letter)] for letter in patient], np.uint16)
        data['tumorMask'] = np.zeros((30, 40), np.uint8)
        for name in without:
            del data[name]
    with open(path, 'r+b') as file:
        file.write(b'MATLAB 7.3 MAT-file')


def test_figshare_file(tmp_path):
    write_mat(tmp_path / '1.mat', patient='MR012345C')
    image, patient, class_name = reference.read_figshare(tmp_path / '1.mat')
    expected = (PICTURE - PICTURE.min()) * (255 / (PICTURE.max() - PICTURE.min()))
    np.testing.assert_allclose(image, expected, atol=0.5)
    assert (image.dtype, patient, class_name) == (np.uint8, 'MR012345', 'glioma')


def test_figshare_folder(tmp_path):
    write_mat(tmp_path / '1-2' / '1.mat', label=1)
    write_mat(tmp_path / '1-2' / '2.mat', label=3, patient='100360', image=PICTURE[:20])
    (tmp_path / 'cvind.mat').write_bytes(b'the folds of the authors')
    (tmp_path / 'README.txt').write_text('figshare')
    found, unreadable = reference.read_reference(tmp_path)
    assert found.file_names.tolist() == ['1-2/1.mat', '1-2/2.mat']
    assert found.patients.tolist() == ['MR012345', '100360']
    assert found.class_names.tolist() == ['meningioma', 'pituitary']
    assert (found.images.dtype, found.images.shape, unreadable) == (np.uint8, (2, 64, 64), [])
    image, _, _ = reference.read_figshare(tmp_path / '1-2' / '2.mat')
    np.testing.assert_array_equal(found.images[1], images.pad_and_resize(image, 64))


def write_linked(path):
    """Writes a file whose image would be read from another file."""
    write_mat(path.with_name('other.h5'))
    write_mat(path, without=['image'])
    with h5py.File(path, 'r+') as file:
        file['cjdata']['image'] = h5py.ExternalLink('other.h5', '/cjdata/image')


def write_outside(path):
    """Writes a file whose image lies in any file of the machine."""
    write_mat(path, without=['image'])
    with h5py.File(path, 'r+') as file:
        file['cjdata'].create_dataset('image', (4, 4), 'u1', external=[('/etc/passwd', 0, 16)])


def write_claim(path):
    """Writes a small file that claims a huge image."""
    write_mat(path, without=['image'])
    with h5py.File(path, 'r+') as file:
        file['cjdata'].create_dataset('image', (100_000, 100_000), 'u1', chunks=(100, 100))


@pytest.mark.parametrize(
    ('write', 'message'),
    [
        (lambda path: path.write_bytes(b''), 'damaged, or no MATLAB 7.3 file'),
        (lambda path: path.write_bytes(b'MATLAB 5.0 MAT-file' + bytes(600)), 'damaged, or no MATLAB 7.3 file'),
        (lambda path: write_mat(path, without=['PID']), 'there is no cjdata/PID in it'),
        (lambda path: write_mat(path, label=4), 'cjdata/label is not 1, 2 or 3'),
        (lambda path: write_mat(path, image=np.zeros((2, 3, 4))), 'cjdata/image is not an image'),
        (lambda path: write_mat(path, image=np.full((4, 4), np.nan)), 'cjdata/image is not an image'),
        (lambda path: write_mat(path, patient='\0\0'), 'cjdata/PID is not a text'),
        (write_linked, 'there is no cjdata/image in it'),
        (write_outside, 'cjdata/image is not a plain array of numbers'),
        (write_claim, 'cjdata/image is larger than 4096x4096 numbers'),
    ],
)
def test_broken_file(tmp_path, write, message):
    write(tmp_path / 'a.mat')
    write_mat(tmp_path / 'b.mat')
    with pytest.raises(InputError) as error:
        reference.read_reference(tmp_path)
    assert str(error.value).startswith('cannot read 1 of 2 reference files') and '\n' not in str(error.value)
    assert f'{tmp_path / "a.mat"}: {message}' in str(error.value)
    found, unreadable = reference.read_reference(tmp_path, skip_unreadable=True)
    assert (found.file_names.tolist(), len(unreadable)) == (['b.mat'], 1)


def test_truncated_file(tmp_path):
    write_mat(tmp_path / 'a.mat')
    data = (tmp_path / 'a.mat').read_bytes()
    (tmp_path / 'a.mat').write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r'a\.mat: damaged'):
        reference.read_figshare(tmp_path / 'a.mat')


def test_folder_with_a_table(tmp_path):
    (tmp_path / 'scans').mkdir()
    grey = np.random.default_rng(1).integers(0, 256, (20, 20), np.uint8)
    Image.fromarray(grey).save(tmp_path / 'scans' / 'one.png')
    Image.fromarray(grey.T).save(tmp_path / 'scans' / 'two.png')
    rows = [('path', 'patient_id', 'source_label'), ('scans/one.png', 'p1', 'glioma'), ('scans/two.png', '', '')]
    with open(tmp_path / 'patients.csv', 'w', newline='') as file:
        csv.writer(file).writerows(rows)
    found, unreadable = reference.read_reference(tmp_path)
    assert (found.patients.tolist(), found.class_names.tolist(), unreadable) == (['p1', ''], ['glioma', ''], [])
    np.testing.assert_array_equal(found.images[0], images.pad_and_resize(grey, 64))
    (tmp_path / 'scans' / 'two.png').unlink()
    with pytest.raises(InputError, match=r'two\.png: not a file'):
        reference.read_reference(tmp_path)


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        ({}, r'a reference set holds \.mat files .* there is neither'),
        ({'a.csv': '', 'b.csv': ''}, 'there are 2 CSV files'),
        ({'a.csv': 'path,group\nx.png,1\n'}, 'no row names a patient'),
        ({'a.csv': 'file,patient_id\nx.png,1\n'}, 'its first line must name the columns path'),
    ],
)
def test_folder_that_is_no_reference(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        reference.read_reference(tmp_path)
    with pytest.raises(InputError, match='no such folder'):
        reference.read_reference(tmp_path / 'absent')
