"""Weights files of DenseNets: reads those of Keras, torchvision and timm, and reads and writes brain_jax's own.

A file is data. Only its arrays are read, each after its name, type and shape were found right; no Keras model is built
from a file and nothing is unpickled. Array names here are paths into the Flax variables, such as
`params/conv2_block1/0_bn/scale`.

What differs between the layouts:

* Keras: the published files and older full models name arrays (`conv2_block1_0_bn/gamma`); Keras 3 numbers them
  (`layers/batch_normalization_1/vars/0`) and, since 3.6, notes the layer's name beside them.
* torchvision and timm: other names, convolutions [out, in, height, width], dense kernels [out, in], and a BatchNorm
  epsilon of 1e-5 instead of 1.001e-5. The difference is added to the variances, so that variance plus epsilon, the
  only place where either counts, is the same.
* brain_jax: a safetensors file whose names are the paths.
"""

import contextlib
import dataclasses
import hashlib
import http.client
import io
import itertools
import os
import pathlib
import re
import shutil
import urllib.request
import zipfile
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.traverse_util
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from brain_jax import InputError, dense_block, files, models

LAYOUT = 'brain_jax-1'
MODELS = ('DenseNet121', 'DenseNet169', 'DenseNet201')
STAGE_SIZES = {name: getattr(models, name).keywords['stage_sizes'] for name in MODELS}

# Address and MD5 (with the head, without it) of the published files, from keras/src/applications/densenet.py.
PUBLISHED_ADDRESS = 'https://storage.googleapis.com/tensorflow/keras-applications/densenet/'
PUBLISHED_MD5 = {
    'DenseNet121': ('9d60b8095a5708f2dcce2bca79d332c7', '30ee3e1110167f948a6b9946edeeb738'),
    'DenseNet169': ('d699b8f76981ab1b30698df4c175e90b', 'b8c4d4c20dd625c148057b9ff1c1176b'),
    'DenseNet201': ('1ceb130c1ea1b78c3bf6114dbdfd8807', 'c13680b51ded0fb44dff2d8f86ac8bb1'),
}

TORCH_EPSILON = 1e-5
# What a file may claim. DenseNet201 with the state of Adam takes 250 MB and has 3,600 groups and arrays.
MAX_BYTES = 2**29  # of a file, and of model.weights.h5 in a .keras file
MAX_OBJECTS = 20_000  # groups and arrays
MAX_DEPTH = 32  # of groups in groups
MAX_HEADER = 2**20  # bytes of the header of a safetensors file (2**17 for DenseNet201), or of a zip file's directory
MAX_HEAD = 2**25  # values of the head's kernel: 32,768 classes on 1024 channels
MAX_MESSAGE = 100_000  # characters; the names of all arrays of DenseNet201 fit in

BATCH_NORM_LEAVES = ('scale', 'bias', 'mean', 'var')  # in the order in which Keras keeps them
KERAS_LEAVES = {'gamma': 'scale', 'beta': 'bias', 'moving_mean': 'mean', 'moving_variance': 'var'}
TORCH_LEAVES = {'weight': 'scale', 'bias': 'bias', 'running_mean': 'mean', 'running_var': 'var'}
TORCH_PARTS = {'norm1': '0_bn', 'conv1': '1_conv', 'norm2': '1_bn', 'conv2': '2_conv'}
TORCH_TOP = {
    'features.conv0': 'conv1_conv',
    'features.norm0': 'conv1_bn',
    'features.norm5': 'bn',
    'classifier': 'predictions',
}
HEAD = ('params/predictions/kernel', 'params/predictions/bias')


@dataclasses.dataclass(frozen=True)
class Weights:
    """The weights of one file.

    Attributes:
      variables: {'params': ..., 'batch_stats': ...}, nested as in `models.DenseNet`, float32 numpy arrays; without
        `predictions` where the file has no head.
      source: path of the file.
      sha256: of the file's bytes, hexadecimal.
      layout: 'keras', 'keras-3', 'torch' or 'brain_jax-1'.
    """

    variables: dict
    source: str
    sha256: str
    layout: str


class _Array(NamedTuple):
    """One array of an open file, not yet read: its shape in Flax order and what reads it."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def read_weights(source, model=None):
    """Reads a weights file.

    Args:
      source: path of a Keras `.h5`, `.weights.h5` or `.keras` file or of a `.safetensors` file in the layout of
        torchvision, timm or brain_jax; or 'imagenet', the published Keras file, downloaded once to Keras' own cache.
      model: 'DenseNet121', 'DenseNet169' or 'DenseNet201', which the file must then hold; None: whichever it holds
        (with 'imagenet': DenseNet121).

    Returns:
      `Weights`.

    Raises:
      InputError: the file is unreadable, damaged or of another architecture, or the download failed; for arrays that
        are missing, unexpected or of a wrong shape, one message names them all.
    """
    if model not in (None, *MODELS):
        raise InputError(f'unknown model {model!r}: use one of {", ".join(MODELS)}')
    if model is None and source == 'imagenet':
        model = 'DenseNet121'
    return _read_weights(source, model and _model_shapes(model))


def load_pretrained(source, variables):
    """Puts pretrained weights into a model's variables.

    Args:
      source: as for `read_weights`.
      variables: {'params': ..., 'batch_stats': ...} of a `models.DenseNet`, any arrays; below the head shapes will do.

    Returns:
      variables: the same tree with the arrays of the file (float32 numpy). A head that the file does not have, or has
        for another number of classes or channels, stays as it was, and the log says so.
      sha256: of the file, hexadecimal.

    Raises:
      InputError: as for `read_weights`.
    """
    old = flax.traverse_util.flatten_dict(variables, sep='/')
    weights = _read_weights(source, {path: tuple(leaf.shape) for path, leaf in old.items()})
    new = flax.traverse_util.flatten_dict(weights.variables, sep='/')
    channels, classes = old[HEAD[0]].shape
    if HEAD[0] not in new:
        logging.info('%s has no head: the head of %d classes starts afresh', weights.source, classes)
    elif new[HEAD[0]].shape != (channels, classes):
        logging.info(
            '%s has a head of %d classes on %d channels: replaced by a fresh one of %d on %d',
            *(weights.source, *new[HEAD[0]].shape[::-1], classes, channels),
        )
        new = {path: array for path, array in new.items() if path not in HEAD}
    return flax.traverse_util.unflatten_dict(old | new, sep='/'), weights.sha256


def write_weights(path, variables, *, source, source_sha256, metadata=None):
    """Writes variables as a safetensors file, whole or not at all.

    Args:
      path: of the file, ending in `.safetensors`; an older one is replaced.
      variables: {'params': ..., 'batch_stats': ...} of a `models.DenseNet`; written as float32.
      source: where the weights come from; kept in the header beside the layout's version.
      source_sha256: SHA-256 of that source, hexadecimal.
      metadata: dictionary of str that the header holds as well.

    Returns:
      The number of arrays and the number of values written.

    Raises:
      InputError: the path ends otherwise or cannot be written.
    """
    path = pathlib.Path(path)
    if path.suffix != '.safetensors':
        raise InputError(f'{path}: the name of a written weights file must end in .safetensors')
    # safetensors writes the memory as it lies, so that a transposed view would come back wrong.
    arrays = {
        name: np.ascontiguousarray(leaf, np.float32)
        for name, leaf in flax.traverse_util.flatten_dict(variables, sep='/').items()
    }
    metadata = {**(metadata or {}), 'layout': LAYOUT, 'source': str(source), 'source_sha256': source_sha256}
    try:
        with files.replacing(path) as temporary:
            safetensors.numpy.save_file(arrays, temporary, metadata)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f'{path}: cannot be written ({error})') from error
    return len(arrays), sum(array.size for array in arrays.values())


def _read_weights(source, expected):
    """Reads a file whose arrays must be as `expected`, {path: shape}; None: as in the model that the file holds."""
    path = _published_file(expected) if source == 'imagenet' else pathlib.Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"{path}: no such weights file; give a .h5, .keras or .safetensors file, or 'imagenet'")
    with _open_arrays(path) as (arrays, layout):
        expected = expected or _model_shapes(_model_name(arrays))
        arrays = _name_head(arrays, expected)
        _check(arrays, expected)
        with np.errstate(over='ignore'):  # what float32 cannot hold becomes infinite
            flat = {name: array.read().astype(np.float32, copy=False) for name, array in sorted(arrays.items())}
        bad = [name for name, array in flat.items() if not np.isfinite(array).all()]
        if bad:
            raise InputError(f'{len(bad)} arrays hold values that are not finite numbers: {", ".join(bad)}')
    published = _published_names().get(path.name)
    if published and _digest(path, 'md5') != published:
        logging.warning('%s is not byte for byte the published file of this name (MD5 %s)', path, published)
    weights = Weights(flax.traverse_util.unflatten_dict(flat, sep='/'), str(path), _digest(path, 'sha256'), layout)
    values = sum(array.size for array in flat.values())
    logging.info('read %d values in %d arrays from %s (layout %s)', values, len(flat), path, layout)
    return weights


def _digest(path, algorithm):
    """Returns the digest of a file, hexadecimal."""
    with path.open('rb') as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


# What a model needs, and whether a file has it.


def _model_shapes(model):
    """Returns {path: shape} of all variables of a model with 1000 classes."""
    variables = jax.eval_shape(getattr(models, model)().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(variables, sep='/').items()}


def _stage_sizes(paths):
    """Returns the number of dense layers in each of the four blocks, from the names of arrays."""
    sizes = [0, 0, 0, 0]
    for path in paths:
        match = re.match(r'\w+/conv([2-5])_block(\d{1,3})/', path)
        if match:
            stage, layer = int(match[1]) - 2, int(match[2])
            sizes[stage] = max(sizes[stage], layer)
    return tuple(sizes)


def _known_model(paths):
    """Returns the name of the model with such arrays, or None."""
    sizes = _stage_sizes(paths)
    return next((name for name in MODELS if STAGE_SIZES[name] == sizes), None)


def _model_name(arrays):
    """Returns the name of the model that a file holds; raises `InputError` for any other."""
    name = _known_model(arrays)
    if name is None:
        raise InputError(f'holds none of {", ".join(MODELS)} (layers in its blocks: {_stage_sizes(arrays)})')
    return name


def _name_head(arrays, expected):
    """Returns `arrays` with the only dense layer that is not `expected` as `predictions`: its name is the user's."""
    dense = [path for path, array in arrays.items() if path.endswith('/kernel') and len(array.shape) == 2]
    dense = [path.removesuffix('/kernel') for path in dense if path not in expected]
    if len(dense) != 1 or HEAD[0] in arrays:
        return arrays
    return {re.sub(f'^{re.escape(dense[0])}(?=/)', 'params/predictions', path): array for path, array in arrays.items()}


def _check(arrays, expected):
    """Raises one `InputError` with all that is wrong with the names and shapes of `arrays`."""
    held, wanted = _known_model(arrays), _known_model(expected)
    if held and wanted and held != wanted:
        raise InputError(f'holds a {held}, the model is {wanted}')
    expected = dict(expected)
    if not any(name in arrays for name in HEAD):
        expected = {name: shape for name, shape in expected.items() if name not in HEAD}
    elif HEAD[0] in arrays and len(arrays[HEAD[0]].shape) == 2:
        # The number of classes is free, and the head is narrow or wide.
        rows, classes = arrays[HEAD[0]].shape
        ends = [expected[f'params/{name}/scale'][0] for name in ('pool3_bn', 'pool4_bn', 'bn')]
        channels = rows if rows in models.head_channels(ends).values() else expected[HEAD[0]][0]
        classes = min(classes, MAX_HEAD // channels)
        expected |= {HEAD[0]: (channels, classes), HEAD[1]: (classes,)}
    problems = {
        'missing': sorted(expected.keys() - arrays.keys()),
        'unexpected': sorted(arrays.keys() - expected.keys()),
        'of a wrong shape': [
            f'{name} {list(arrays[name].shape)} instead of {list(shape)}'
            for name, shape in sorted(expected.items())
            if name in arrays and arrays[name].shape != shape
        ],
    }
    text = '; '.join(f'{len(names)} {kind}: {", ".join(names)}' for kind, names in problems.items() if names)
    if text:
        raise InputError(f'arrays do not fit the {wanted or "model"}: {text}')


# The files.


@contextlib.contextmanager
def _open_arrays(path):
    """Yields ({path: `_Array`}, layout) of an open file; whatever is wrong with its bytes becomes an `InputError`."""
    try:
        with path.open('rb') as file:
            start = file.read(8)
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f'larger than {MAX_BYTES >> 20} MiB, which no file of a DenseNet is')
        if start == b'\x89HDF\r\n\x1a\n':
            with h5py.File(path, 'r') as file:
                yield _keras_arrays(file)
        elif start.startswith(b'PK'):
            with h5py.File(_zipped_weights(path), 'r') as file:
                yield _keras_arrays(file)
        else:
            if (size := int.from_bytes(start, 'little')) > MAX_HEADER:
                raise ValueError(f'as safetensors it would have a header of {size:,} bytes')
            with safetensors.safe_open(path, 'numpy') as file:
                yield _safetensors_arrays(file)
    except InputError as error:
        raise InputError(f'{path}: {_printable(error)}') from error
    except Exception as error:  # on hostile bytes the libraries raise nearly anything
        reason = _printable(error) or type(error).__name__
        raise InputError(
            f'{path}: damaged, or no Keras or safetensors weights file ({reason}); fetch or save it again'
        ) from error


def _printable(error):
    """Returns an error's message as one line: the names in it come from the file."""
    text = ' '.join(''.join(letter if letter.isprintable() else ' ' for letter in str(error)).split())
    return text if len(text) <= MAX_MESSAGE else f'{text[:MAX_MESSAGE]} ... and more'


def _zipped_weights(path):
    """Returns the HDF5 file inside a `.keras` file, in memory; no other member is read, whatever its name."""
    with path.open('rb') as file:
        # The directory stands at the end. zipfile reads all of it first, however long.
        file.seek(max(path.stat().st_size - 42, 0))
        tail = file.read().rjust(42)
    if tail[20:24] != b'PK\5\6':
        raise zipfile.BadZipFile('truncated, or with a comment at the end')
    if int.from_bytes(tail[32:36], 'little') > MAX_HEADER or tail.startswith(b'PK\6\7'):
        raise InputError('a zip file of too many members')
    with zipfile.ZipFile(path) as archive:
        if 'model.weights.h5' not in archive.namelist():
            raise InputError('a zip file without model.weights.h5; of PyTorch only .safetensors files are read')
        member = archive.getinfo('model.weights.h5')
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError('model.weights.h5 is compressed in an unusual way; zip it again')
        if member.file_size > MAX_BYTES:  # zipfile reads no more than that
            raise InputError(f'model.weights.h5 is larger than {MAX_BYTES >> 20} MiB')
        content = io.BytesIO()
        with archive.open(member) as file:
            shutil.copyfileobj(file, content)
    return content


def _unique(pairs):
    """Returns a dictionary of (path, `_Array`) pairs; a path that comes twice raises `InputError`."""
    arrays = {}
    for path, array in pairs:
        if path in arrays:
            raise InputError(f'holds {path} twice')
        arrays[path] = array
    return arrays


def _path(layer, leaf):
    """Returns the path of a Keras layer's array: conv2_block1_0_bn, mean -> batch_stats/conv2_block1/0_bn/mean."""
    collection = 'batch_stats' if leaf in ('mean', 'var') else 'params'
    module = re.sub(r'^(conv[2-5]_block\d+)_', r'\1/', layer)
    return f'{collection}/{module}/{leaf}'


def _keras_arrays(file):
    """Returns ({path: `_Array`}, layout) of an HDF5 file that Keras wrote."""
    datasets, visited = {}, itertools.count(1)

    def collect(name, item):
        if next(visited) > MAX_OBJECTS or name.count('/') > MAX_DEPTH:
            raise InputError(f'holds more than {MAX_OBJECTS} groups and arrays, or groups {MAX_DEPTH} deep')
        # The optimizer's and the random generators' state is no weight of the network.
        if isinstance(item, h5py.Dataset) and not re.match(r'(.*/)?(optimizer\w*|seed_generator\w*)/', name):
            datasets[name] = item

    file.visititems(collect)  # does not follow soft or external links
    # Keras 3 numbers the arrays of a layer, all else names them.
    numbered = any(re.search(r'(^|/)vars/\d+$', name) for name in datasets)
    names = _keras3_paths(datasets) if numbered else {name: _legacy_path(name) for name in datasets}
    pairs = ((names[name], _Array(item.shape or (), partial(_read_dataset, item))) for name, item in datasets.items())
    return _unique(pairs), 'keras-3' if numbered else 'keras'


def _read_dataset(dataset):
    """Reads an HDF5 dataset whose bytes lie in its own file, as many as it has values, in one piece.

    Chunks, which Keras does not write, would be another matter: they can be compressed, and then hold any size.
    """
    is_own = not (dataset.external or dataset.is_virtual or dataset.chunks)
    if not is_own or dataset.dtype.kind != 'f' or dataset.id.get_storage_size() != dataset.nbytes:
        raise InputError(
            f'{dataset.name}: not a plain array of floating-point numbers, uncompressed and complete; save it so'
        )
    return dataset[()]


def _legacy_path(name):
    """Returns the path for a name such as conv1/conv/conv1/conv/kernel:0 or model_weights/bn/bn/gamma."""
    *_, outer, layer, leaf = ('', '', *name.split('/'))
    leaf = leaf.removesuffix(':0')
    if outer == 'conv1' and layer in ('conv', 'bn'):
        layer = f'conv1_{layer}'
    return _path(layer, KERAS_LEAVES.get(leaf, leaf))


def _keras3_paths(datasets):
    """Returns {name: path} for names such as layers/functional/layers/conv2d_7/vars/0."""
    groups = {name: name.rpartition('/')[0] for name in datasets}
    layers = {groups[name]: item.parent.attrs.get('name') for name, item in datasets.items()}
    if not any(layers.values()):
        layers = _numbered_layers(layers)
    paths = {}
    for name, group in groups.items():
        layer, number = str(layers[group] or group.removesuffix('/vars')), name.rpartition('/')[2]
        leaves = BATCH_NORM_LEAVES if layer.endswith('bn') else ('kernel', 'bias')
        known = number.isdigit() and int(number) < len(leaves)
        paths[name] = _path(layer, leaves[int(number)] if known else number)
    return paths


def _numbered_layers(groups):
    """Returns {group: layer or None} by the numbers of the layers, for Keras 3.0 to 3.5, which kept no names."""
    matches = {group: re.search(r'(conv2d|batch_normalization)(?:_(\d+))?/vars$', group) for group in groups}
    places = {group: (match[1], int(match[2] or 0)) for group, match in matches.items() if match}
    num_convs = 1 + max((place for kind, place in places.values() if kind == 'conv2d'), default=0)
    layers = dict.fromkeys(groups)
    for stage_sizes in STAGE_SIZES.values():
        order = _keras_order(stage_sizes)
        if len(order['conv2d']) == num_convs:
            layers |= {group: order[kind][place] for group, (kind, place) in places.items() if place < len(order[kind])}
    return layers


def _keras_order(stage_sizes):
    """Returns the names of the convolutions and BatchNorms of a model, each in the order of its layers."""
    names = ['conv1_conv', 'conv1_bn']
    for stage, num_layers in enumerate(stage_sizes, start=2):
        for layer in range(1, num_layers + 1):
            names += [f'conv{stage}_block{layer}_{part}' for part in TORCH_PARTS.values()]
        names += [f'pool{stage}_bn', f'pool{stage}_conv'] if stage < 5 else ['bn']
    return {
        'conv2d': [name for name in names if name.endswith('conv')],
        'batch_normalization': [name for name in names if name.endswith('bn')],
    }


def _safetensors_arrays(file):
    """Returns ({path: `_Array`}, layout) of an open safetensors file."""
    metadata = file.metadata() or {}
    layout = metadata.get('layout', 'torch')
    if layout not in (LAYOUT, 'torch'):
        raise InputError(f'layout {layout} is unknown, this version reads {LAYOUT}')
    pairs = []
    for name in file.keys():  # noqa: SIM118 (a safetensors file is no dictionary)
        part = file.get_slice(name)
        if part.get_dtype() not in ('F16', 'F32', 'F64') and not name.endswith('num_batches_tracked'):
            raise InputError(f'{name} is of type {part.get_dtype()}, not F16, F32 or F64')
        array = _Array(tuple(part.get_shape()), partial(file.get_tensor, name))
        if layout == LAYOUT:
            pairs.append((name, array))
        elif not name.endswith('num_batches_tracked'):
            pairs.append(_torch_array(name, array))
    return _unique(pairs), layout


def _torch_array(name, array):
    """Returns (path, `_Array`) of an array of torchvision or timm."""
    module, _, leaf = name.rpartition('.')
    # Torch files before 2017 wrote norm.1 for norm1.
    module = re.sub(r'(denselayer\d+)\.(norm|conv)\.([12])$', r'\1.\2\3', module)
    layer = TORCH_TOP.get(module, module)
    if match := re.fullmatch(r'features\.denseblock(\d+)\.denselayer(\d+)\.(norm1|conv1|norm2|conv2)', module):
        layer = f'conv{int(match[1]) + 1}_block{match[2]}_{TORCH_PARTS[match[3]]}'
    elif match := re.fullmatch(r'features\.transition(\d+)\.(norm|conv)', module):
        layer = f'pool{int(match[1]) + 1}_{"bn" if match[2] == "norm" else "conv"}'
    if layer.endswith('bn'):
        array = array._replace(read=partial(_shift_variance, array.read)) if leaf == 'running_var' else array
        return _path(layer, TORCH_LEAVES.get(leaf, leaf)), array
    if leaf == 'weight':
        axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(len(array.shape), tuple(range(len(array.shape))))
        shape = tuple(array.shape[axis] for axis in axes)
        return _path(layer, 'kernel'), _Array(shape, lambda: np.transpose(array.read(), axes))
    return _path(layer, leaf), array


def _shift_variance(read):
    """Returns a variance of torch that gives the same sum with Keras' epsilon; it can be as low as -1e-8."""
    return read().astype(np.float64) + (TORCH_EPSILON - dense_block.BATCH_NORM_EPSILON)


# The published files.


def _published_names():
    """Returns {file name: MD5} of the published files."""
    names = {}
    for model, (with_head, without_head) in PUBLISHED_MD5.items():
        stem = f'{model.lower()}_weights_tf_dim_ordering_tf_kernels'
        names |= {f'{stem}.h5': with_head, f'{stem}_notop.h5': without_head}
    return names


def _published_file(expected):
    """Returns the published file for the model with arrays `expected` in Keras' cache, downloading it if need be."""
    model = _known_model(expected)
    if model is None:
        raise InputError(f"'imagenet': there are published weights for {', '.join(MODELS)} only")
    folder = pathlib.Path(os.environ.get('KERAS_HOME') or '~/.keras').expanduser() / 'models'
    path, without_head = (folder / name for name in _published_names() if name.startswith(model.lower()))
    if path.is_file() and _digest(path, 'md5') == PUBLISHED_MD5[model][0]:
        return path
    address = PUBLISHED_ADDRESS + path.name
    try:
        _download(address, path, PUBLISHED_MD5[model][0])
    except (OSError, http.client.HTTPException, InputError) as error:
        if without_head.is_file() and _digest(without_head, 'md5') == PUBLISHED_MD5[model][1]:
            return without_head
        raise InputError(
            f'the ImageNet weights of {model} could not be downloaded from {address} ({error}); fetch this file by '
            "other means and give its path instead of 'imagenet': --config.pretrained=FILE in training, --source=FILE "
            'in scripts/convert_weights.py'
        ) from error
    return path


def _download(address, path, md5):
    """Downloads a file, which must have the given MD5."""
    logging.info('downloading %s to %s', address, path)
    with files.replacing(path) as temporary:
        with urllib.request.urlopen(address, timeout=30) as response, temporary.open('wb') as file:
            shutil.copyfileobj(response, file)
        found = _digest(temporary, 'md5')
        if found != md5:
            raise InputError(f'its MD5 is {found} instead of {md5}')
