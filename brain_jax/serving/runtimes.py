"""A run's ONNX export, served by ONNX Runtime or OpenVINO: on CPUs they are faster than XLA.

Beside an export stands a record, written by `export`: of which checkpoint it is, and how far its answers were from the
run's own. What was not proven there is not served.
"""

import hashlib
import json
import pathlib
import sys
import threading
from concurrent import futures

import numpy as np
import tqdm

from brain_jax import InputError

MAX_BATCH = 64  # images at once; bounds the memory
OUTPUTS = ('probabilities', 'logits', 'features')


def load_onnxruntime(path, threads=0):
    """Loads an ONNX export into ONNX Runtime.

    Args:
      path: of the file.
      threads: number of them; 0: as many as there are cores.

    Returns:
      A function from uint8 [n, image_size, image_size] to the dictionary of `OUTPUTS`, each float32 [n, ...].
    """
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # the builds for Windows have some
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    return lambda images: dict(zip(OUTPUTS, session.run(OUTPUTS, {'images': images}), strict=True))


def load_openvino(path, threads=0, precision='f32'):
    """Loads an ONNX export into OpenVINO.

    Args:
      path: of the file.
      threads: number of them; 0: as many as there are cores.
      precision: 'f32', or 'bf16' to compute in bfloat16.

    Returns:
      As `load_onnxruntime`.
    """
    openvino = import_openvino()
    properties = openvino_properties(threads, precision)
    # OpenVINO gives the thread that compiles a stack of its own for signals, smaller than Python's, and leaves it there
    # when it is freed: the next signal would end the process. So a thread compiles that ends with it.
    with futures.ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(openvino.Core().compile_model, str(path), 'CPU', properties).result()
    lock = threading.Lock()

    def compute(images):
        with lock:  # all calls share one memory
            found = compiled(images)
            return {name: np.array(found[name]) for name in OUTPUTS}

    return compute


def openvino_properties(threads, precision):
    """Returns how OpenVINO computes: in which precision, and one batch at a time on so many threads, 0: all cores."""
    return {
        'INFERENCE_PRECISION_HINT': precision,  # else the processor decides
        'PERFORMANCE_HINT': 'LATENCY',
        'INFERENCE_NUM_THREADS': threads,
    }


def import_openvino():
    """Returns the module `openvino`, which does not tell its makers of that.

    On import it sends an event unless a file in the home directory says no; without its package for that it has a
    stand-in that sends nothing.
    """
    if 'openvino' not in sys.modules:
        sys.modules.setdefault('openvino_telemetry', None)  # importing it fails from now on
    import openvino

    return openvino


LOADERS = {
    'onnxruntime': load_onnxruntime,
    'openvino': load_openvino,
    'openvino_bfloat16': lambda path, threads=0: load_openvino(path, threads, 'bf16'),
}


def in_batches(compute, images, description=None):
    """Applies a function to images, some at a time.

    Args:
      compute: function from uint8 [n, image_size, image_size] to a dictionary of arrays [n, ...].
      images: uint8 [n, image_size, image_size], one or more.
      description: of a progress bar; None: there is none.

    Returns:
      The dictionary of the joined arrays.
    """
    starts = range(0, len(images), MAX_BATCH)
    if description:
        starts = tqdm.tqdm(starts, description, unit=' batches', disable=None)
    parts = [compute(images[start : start + MAX_BATCH]) for start in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def record_path(path):
    """Returns the path of the record beside an export: model.onnx -> model.onnx.json."""
    return path.with_name(f'{path.name}.json')


def file_hash(path):
    """Returns the SHA-256 of a file's bytes, or of all names and bytes in a folder, hexadecimal."""
    if path.is_file():
        with path.open('rb') as file:
            return hashlib.file_digest(file, 'sha256').hexdigest()
    found = hashlib.sha256()
    for file in sorted(file for file in path.rglob('*') if file.is_file()):
        found.update(file.relative_to(path).as_posix().encode() + b'\0')
        found.update(bytes.fromhex(file_hash(file)))
    return found.hexdigest()


def load_answer(workdir, runtime, checkpoint_sha256):
    """Loads a run's ONNX export to answer in place of the run.

    Args:
      workdir: pathlib.Path, the run's folder; the export is `exports/model.onnx` in it.
      runtime: a name of `LOADERS`.
      checkpoint_sha256: of the run's parameters and running statistics.

    Returns:
      As `predictor.Predictor.answer`: function from uint8 [n, image_size, image_size] to logits float32 [n, classes]
      and what the head sees of the images, float32 [n, channels].

    Raises:
      InputError: where there is no export, or it is not proven to answer as the run does.
    """
    path = pathlib.Path(workdir, 'exports/model.onnx')
    again = f'run scripts/export.py --workdir {workdir} --format onnx'
    if runtime not in LOADERS:
        raise InputError(f'unknown runtime {runtime!r}: use jax, {", ".join(LOADERS)}')
    if not path.is_file() or not record_path(path).is_file():
        raise InputError(f'{runtime} serves {path} and its record, which are not there: {again}')
    record = json.loads(record_path(path).read_text())
    if record['checkpoint_sha256'] != checkpoint_sha256:
        raise InputError(f'{path} is of another checkpoint: {again}')
    if record['sha256'] != file_hash(path):
        raise InputError(f'{path} is not the file that was proven: {again}')
    proof = record['runtimes'].get(runtime)
    if proof is None or not proof['accepted']:
        reason = 'was never compared' if proof is None else describe(proof)
        raise InputError(f'{runtime} is not proven to answer as the run in {workdir} does ({reason}): use another')
    try:
        compute = LOADERS[runtime](path)
    except ImportError as error:
        raise InputError(f'{error.name} is not installed: pip install -r requirements-serve.txt') from error

    def answer(images):
        outputs = in_batches(compute, images if len(images) else np.zeros((1, *images.shape[1:]), np.uint8))
        return outputs['logits'][: len(images)], outputs['features'][: len(images)]

    return answer


def describe(proof):
    """Returns a line of a comparison that `export.compare` made."""
    ties = f', {proof["ties"]} of the others ties' if proof['ties'] else ''
    return (
        f'{proof["images"]:,} images: largest difference of a probability {proof["largest_difference"]:.1e}, labels '
        f'equal {proof["labels_equal"]:,} of {proof["images"]:,}{ties}'
    )
