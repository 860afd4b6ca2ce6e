"""Slices of NIfTI volumes as grey uint8 arrays.

nibabel is an optional package (requirements-serve.txt), so it is imported where it is needed.
"""

import zlib

import numpy as np

from brain_jax import InputError
from brain_jax.data import slices as slices_lib

PLANES = ('axial', 'coronal', 'sagittal')  # across the axis to the head, to the front, to the right
MAX_BYTES = 2**28  # of a file, packed or not

_SAMPLE = 2**22  # voxels from which a volume's range of intensities is found
_HEAD = 0.1  # share of the range from which a voxel is bright, and of the fullest slice's bright voxels that is a head


def is_nifti(data):
    """Tells whether a file, its bytes, starts with a NIfTI header, packed or not."""
    return _nifti_version(_unpack(data, 348)) is not None


def read_nifti(data, plane, slices):
    """Returns slices of a NIfTI volume; see `scans.decode_slices`.

    Args:
      data: bytes of the file.
      plane: one of `PLANES`.
      slices: 'all', 'middle', or how many.

    Returns:
      A list of (name, uint8 [height, width]).

    Raises:
      InputError: when the file holds no volume, or one that is too large or cut off. Of damaged headers nibabel raises
        errors of its own.
    """
    if plane not in PLANES:
        raise InputError(f'plane is {plane!r}: it must be one of {", ".join(PLANES)}')
    slices_lib.check_installed('nibabel')
    voxels, affine, sign, is_one = _parse_nifti(data)
    voxels, spacing = _canonical(voxels, affine)
    axis = 2 - PLANES.index(plane)
    voxels = np.moveaxis(voxels, axis, 0)
    step = int(np.ceil(np.sqrt(voxels.size / _SAMPLE)))
    sample = _intensities(voxels[:, ::step, ::step], sign)
    black, white = slices_lib.find_range(sample)
    with np.errstate(all='ignore'):
        bright = np.mean(sample > black + _HEAD * (white - black), axis=(1, 2))
    head = np.flatnonzero(bright >= _HEAD * bright.max())
    wanted = [int(head[0]) + index for index in slices_lib.choose_slices(int(head[-1] - head[0]) + 1, slices)]
    slices_lib.check_amount(len(wanted), *voxels.shape[:0:-1])
    found = []
    for index in wanted:
        # [left to right or back to front, back to front or feet to head] -> both turned, and the latter down the rows.
        grey = slices_lib.scaled(_intensities(voxels[index], sign).T[::-1, ::-1], black, white)
        name = f'{plane} {index + 1}' + ('' if is_one else ' of volume 1')
        found.append((name, slices_lib.squared(grey, *np.delete(spacing, axis)[::-1])))
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
    if min(dimensions, default=0) < 1 or max(shape) > slices_lib.MAX_SIDE:
        raise InputError(f'a volume of {"x".join(map(str, shape))} voxels; up to {slices_lib.MAX_SIDE} a side are read')
    dtype, offset = header.get_data_dtype(), int(header['vox_offset'])
    end = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if offset < size or end > MAX_BYTES:
        raise InputError(f'a volume up to byte {end:,}; up to {MAX_BYTES >> 20} MiB are read')
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
            voxels = sum(weight * voxels[colour] for weight, colour in zip(slices_lib.LUMA, 'RGB', strict=True))
        return sign * (np.abs(voxels) if voxels.dtype.kind == 'c' else voxels).astype(np.float64)


def _nifti_version(start):
    """Returns the version of a NIfTI header that the first 348 bytes of a file hold: 1 or 2, or None."""
    if len(start) == 348 and start[344:347] in (b'n+1', b'ni1'):
        return 1
    return 2 if start[4:7] in (b'n+2', b'ni2') else None


def _unpack(data, size):
    """Returns the first bytes of a file that may be packed by gzip; fewer where there are no more."""
    if data[:2] == b'\x1f\x8b':
        return slices_lib.inflate(data, size, 16 + zlib.MAX_WBITS)
    return memoryview(data)[:size]
