"""Answers to pictures, DICOM files and NIfTI volumes with a run that was trained and evaluated.

    python scripts/predict.py --workdir runs/first scan.dcm volume.nii.gz pictures/
    python scripts/predict.py --workdir runs/first --output answers.csv 'scans/*.jpg'
    find scans -newer answers.csv | python scripts/predict.py --workdir runs/first --format jsonl -

Ends with status 0 when all files were answered, and with 1 when some could not be read: those are rows with their
error. The same status and a line that starts with "error: " on stderr mean that nothing was written.
"""

import contextlib
import os
import re
import sys

# Read by the compiler of JAX when it is imported: it has nothing to tell the user.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import tqdm
from absl import app, flags, logging

from brain_jax import InputError, files
from brain_jax.data import scans
from brain_jax.serving import answers, predictor, runtimes

_FORMATS = ('csv', 'jsonl', 'table')
_WORKDIR = flags.DEFINE_string('workdir', None, "The run's folder.", required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'File to write, whole or not at all. Default: standard output.')
_FORMAT = flags.DEFINE_enum(
    'format', None, _FORMATS, "Default: the output's extension; a table on a terminal, and else csv."
)
_RUNTIME = flags.DEFINE_enum(
    'runtime', 'jax', ('jax', *runtimes.LOADERS), "What computes: JAX, or another runtime with the run's ONNX export."
)
_PLANE = flags.DEFINE_enum('plane', 'axial', scans.PLANES, 'How NIfTI volumes are cut.')
_SLICES = flags.DEFINE_string(
    'slices', 'middle', 'Of the head in a NIfTI volume, or of the frames of a DICOM file: all, middle, or how many.'
)
_WANTED_ERROR = flags.DEFINE_float(
    'wanted_error',
    None,
    'Share of wrong answers among those given; for others it abstains. Default: the largest known.',
)
_EXPLAIN = flags.DEFINE_string(
    'explain', None, 'Folder for a picture of every answer: where in the image the evidence for the class lies.'
)
flags.register_validator(
    'slices', re.compile(r'all|middle|[1-9]\d{0,3}').fullmatch, 'must be all, middle, or a number up to 9999'
)


def choose_format():
    """Returns the form of the answers, by the flags or where they go."""
    extension = os.path.splitext(_OUTPUT.value or '')[1].lstrip('.')
    if _FORMAT.value or extension in _FORMATS:
        return _FORMAT.value or extension
    return 'table' if sys.stdout.isatty() and not _OUTPUT.value else 'csv'


@contextlib.contextmanager
def open_output():
    """Yields the text file to write to; one that is not standard output is there when all went well only."""
    options = {'newline': '', 'encoding': 'utf-8', 'errors': 'surrogateescape'}  # names of files are any bytes
    if not _OUTPUT.value:
        with open(sys.stdout.fileno(), 'w', closefd=False, **options) as file:
            yield file
        return
    try:
        with files.replacing(_OUTPUT.value) as temporary, open(temporary, 'w', **options) as file:
            yield file
    except OSError as error:
        raise InputError(f'{_OUTPUT.value} cannot be written: {error.strerror}') from error


def answer(paths):
    """Answers to files; returns how many could not be read."""
    run = predictor.Predictor.from_workdir(_WORKDIR.value, runtime=_RUNTIME.value, wanted_error=_WANTED_ERROR.value)
    slices = _SLICES.value if _SLICES.value in ('all', 'middle') else int(_SLICES.value)
    given = answers.answer_files(run, paths, plane=_PLANE.value, slices=slices)
    if _EXPLAIN.value:
        given = answers.explain_answers(run, given, _EXPLAIN.value)
    shown = sys.stdout.isatty() and not _OUTPUT.value  # the answers themselves are; they are progress enough
    given = tqdm.tqdm(given, total=len(paths), unit=' files', disable=shown or None)
    with open_output() as file:
        return answers.write_answers(given, file, choose_format(), run.class_names)


def main(argv):
    logging.set_verbosity(logging.WARNING)
    try:
        paths = answers.find_files(argv[1:], sys.stdin)
        if not paths:
            raise InputError('no files: give paths of files or folders, or - and their list on standard input')
        unread = answer(paths)
    except InputError as error:
        sys.exit(f'error: {error}')
    except BrokenPipeError:  # whoever read the answers has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(1 if unread else 0)


if __name__ == '__main__':
    flags.FLAGS.set_gnu_getopt()  # flags may stand behind the paths
    app.run(main)
