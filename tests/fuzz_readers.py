"""Feeds damaged files to the readers of images, scans and weights until one fails otherwise than by an `InputError`.

    pip install -r requirements-fuzz.txt
    PYTHONPATH=. python tests/fuzz_readers.py CORPUS -max_total_time=600

CORPUS is a folder. It gets one small file of every format, then what the fuzzer finds worth keeping. The other
arguments are those of libFuzzer; a finding is left in the working directory as crash-*, oom-* or timeout-*, and
`python tests/fuzz_readers.py FINDING` repeats it.
"""

import os
import pathlib
import sys

import atheris

with atheris.instrument_imports(include=['PIL', 'brain_jax', 'nibabel', 'pydicom', 'zipfile']):
    import nibabel  # noqa: F401  # the readers of scans import these two only when they need them
    import pydicom.pixels.decoders  # noqa: F401
    import seeds

    from brain_jax import InputError, pretrained
    from brain_jax.data import images, scans


def read_scan(data, name):
    """Reads two slices of a scan of that name."""
    for _, image in scans.decode_slices(data, name=name, slices=2):
        images.pad_and_resize(image, 32)


def read_file(data, path):
    """Gives the bytes to all readers; raises for anything but arrays or an `InputError` of one line."""
    path.write_bytes(data)
    readers = (
        lambda: images.pad_and_resize(images.decode_image(data), 32),
        lambda: images.read_header(data),
        lambda: read_scan(data, 'scan.dcm'),
        lambda: read_scan(data, 'scan.nii'),
        lambda: pretrained.load_pretrained(path, seeds.VARIABLES),
    )
    for read in readers:
        try:
            read()
        except InputError as error:
            if '\n' in str(error):
                raise AssertionError(f'more than one line: {error}') from error


def main():
    """Writes the first files, then fuzzes until libFuzzer is told to stop."""
    for folder in filter(os.path.isdir, sys.argv[1:2]):
        for name, data in (seeds.image_files() | seeds.scan_files() | seeds.weights_files()).items():
            pathlib.Path(folder, name).write_bytes(data)
    path = pathlib.Path(f'/proc/self/fd/{os.memfd_create("file")}')  # leaves nothing behind: libFuzzer ends abruptly
    flags = ['-timeout=5', '-rss_limit_mb=2048', '-max_len=20000']  # of several with one name the last counts
    atheris.Setup([sys.argv[0], *flags, *sys.argv[1:]], lambda data: read_file(data, path))
    atheris.Fuzz()


if __name__ == '__main__':
    main()
