"""Exports of a run for other runtimes, each proven to answer as the run does before it is there.

An export is the whole function of a run but for reading and resizing: images as bytes in; scale, normalisation,
network, mean over mirror images, temperature and softmax inside; probabilities out. Reading, padding and resizing stay
outside: Pillow's antialiased resize is part of no runtime, and another resize gives other answers.
"""

import functools
import json
import pathlib
from typing import NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import safetensors
from absl import logging
from scipy import special

from brain_jax import InputError, files, finished_run, models, parallel, pretrained, train
from brain_jax.serving import predictor, runtimes

SUFFIXES = {
    'keras': '.keras',
    'onnx': '.onnx',
    'safetensors': '.safetensors',
    'saved_model': '',
    'stablehlo': '.stablehlo',
}
PLATFORMS = ('cpu', 'cuda', 'tpu')  # that the StableHLO of an export is for
TOLERANCE = 1e-5  # of a probability
FEATURE_TOLERANCE = 1e-4  # of logits and features, over the largest
# OpenVINO opens the ONNX file as well, and rounds otherwise: of a probability, and the share of labels that may differ.
OPENVINO_TOLERANCES = {'openvino': (1e-4, 0.0), 'openvino_bfloat16': (0.1, 0.005)}
NOTICE = 'For research and teaching. Not a medical device: no diagnosis may rest on it.'

_CALLS = {
    'keras': 'keras.saving.load_model(FILE).predict(images)',
    'onnx': "onnxruntime.InferenceSession(FILE).run(['probabilities', 'logits', 'features'], {'images': images})",
    'safetensors': 'weights alone: brain_jax.pretrained.read_weights(FILE), or --config.pretrained=FILE',
    'saved_model': "tf.saved_model.load(FOLDER).signatures['serving_default'](images=images)",
    'stablehlo': "jax.export.deserialize(bytearray(open(FILE, 'rb').read())).call(images)",
}


class Network(NamedTuple):
    """What an export computes.

    Attributes:
      model: a `DenseNet`, computing in float32.
      variables: its `params` and `batch_stats`.
      config: the run's configuration.
      class_names: of the classes.
      temperature: by which logits are divided.
      hashes: dictionary of SHA-256 that tell which run it is.
    """

    model: models.DenseNet
    variables: dict
    config: ml_collections.ConfigDict
    class_names: tuple[str, ...]
    temperature: float
    hashes: dict

    def layers(self):
        """Returns the variables by the names of Keras' layers: {layer: {'kernel', 'bias', ...: float32 array}}."""
        layers = {}
        for collection in self.variables.values():
            for (*path, leaf), array in flax.traverse_util.flatten_dict(collection).items():
                layers.setdefault('_'.join(path), {})[leaf] = np.asarray(array, np.float32)
        return layers

    def make_answer(self, variables=None):
        """Returns the function that computes `runtimes.OUTPUTS` of uint8 [n, image_size, image_size] as a run does."""
        with jax.default_matmul_precision('highest'):  # accelerators round factors otherwise
            answer = predictor.make_answer(self.model, self.config, variables or self.variables, parallel.make_mesh())

        def compute(images):
            with jax.default_matmul_precision('highest'):
                logits, features = answer(images)
            probabilities = special.softmax(logits.astype(np.float64) / self.temperature, axis=1)
            return {'probabilities': probabilities, 'logits': logits, 'features': features}

        return compute


def export_run(workdir, form, output=None, *, data_dir=None, groups=None):
    """Exports a run, proves the export on all test images, and only then puts it where it belongs, with a record.

    Args:
      workdir: the run's folder.
      form: a name of `SUFFIXES`.
      output: the file to write, for 'saved_model' the folder; None: `exports/model` in the workdir, with its suffix.
      data_dir: where the images are now; None: where the run found them.
      groups: another group table, '' for none; None: that of the run.

    Returns:
      The path, and the record that is written beside it: metadata, hash, and a comparison for every runtime.

    Raises:
      InputError: where the run cannot be exported, or the export does not answer as it does.
    """
    workdir = pathlib.Path(workdir)
    output = pathlib.Path(output or workdir / f'exports/model{SUFFIXES[form]}')
    check_output(output, form)
    network = load_network(workdir)
    test = finished_run.load_dataset(workdir, network.config, network.class_names, data_dir, groups).test
    images = test.batch(np.arange(len(test)))['image']
    expected = runtimes.in_batches(network.make_answer(), images, description='Answers of the run')
    try:
        with files.replacing(output) as temporary:
            metadata = describe(network, form)
            WRITERS[form](temporary, network, metadata)
            proofs = prove(temporary, network, form, images, expected)
            record = metadata | {'sha256': runtimes.file_hash(temporary), 'runtimes': proofs}
    except ImportError as error:
        raise InputError(f'{error.name} is not installed: pip install -r requirements-serve.txt') from error
    except OSError as error:
        raise InputError(f'{output} cannot be written: {error.strerror or error}') from error
    files.write_whole(runtimes.record_path(output), json.dumps(record, indent=2) + '\n')
    return output, record


def check_output(output, form):
    """Raises `InputError` where an export cannot be written to a path."""
    if SUFFIXES[form] and output.suffix != SUFFIXES[form]:
        raise InputError(f'{output}: the name of an export to {form} must end in {SUFFIXES[form]}')
    if output.is_dir() or (output.exists() and form == 'saved_model'):
        raise InputError(f'{output} exists already: remove it or give another --output')


def load_network(workdir):
    """Returns the `Network` of a finished and evaluated run.

    Raises:
      InputError: where there is none.
    """
    loaded = predictor.Predictor.from_workdir(workdir)
    if loaded.model.dtype != jnp.float32:
        logging.warning('the run computes in %s; exports compute in float32', loaded.config.dtype)
    return Network(
        model=loaded.model.clone(dtype=jnp.float32),
        variables=loaded.variables,
        config=loaded.config,
        class_names=loaded.class_names,
        temperature=loaded.temperature,
        hashes={
            'checkpoint_sha256': loaded.checkpoint_sha256,
            'split_sha256': loaded.run['split_sha256'],
            'weights_sha256': loaded.run['weights_sha256'],
        },
    )


def describe(network, form):
    """Returns what an export tells of itself: a dictionary of str, numbers and lists."""
    size = network.config.image_size
    return {
        'format': form,
        'call': _CALLS[form],
        'model': network.config.model,
        'class_names': list(network.class_names),
        'image_size': size,
        'temperature': network.temperature,
        'averages_mirror_images': train.averages_flips(network.config),
        'images': (
            f'uint8 [batch, {size}, {size}]: grey, padded with black to a centred square and resized to {size} pixels '
            'with antialiasing (bilinear, Pillow). This is left to the caller: another resize gives other answers'
        ),
        'probabilities': 'float32 [batch, classes]: softmax of logits over temperature',
        'logits': 'float32 [batch, classes]: where averages_mirror_images, of an image and its mirror image',
        'features': 'float32 [batch, channels]: what the last layer sees of the image itself',
        'notice': NOTICE,
        **network.hashes,
    }


def prove(path, network, form, images, expected):
    """Loads an export in every runtime that it is for and compares its answers with those of the run.

    Args:
      path: of the export.
      network: the `Network`.
      form: a name of `SUFFIXES`.
      images: uint8 [n, image_size, image_size].
      expected: dictionary of `runtimes.OUTPUTS`, what the run answers.

    Returns:
      {runtime: what `compare` returned}.

    Raises:
      InputError: where answers differ. In OpenVINO they may: whether as little as stated is told in the comparison.
    """
    proofs = {}
    for runtime, load in list_loaders(form, network).items():
        compute = load(path)
        parts = [
            compute(images[:1]),  # alone, the first; then full batches and the rest: the size of a batch is free
            runtimes.in_batches(compute, images[1:], description=f'Answers of {runtime}'),
        ]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        proofs[runtime] = compare(expected, found, *OPENVINO_TOLERANCES.get(runtime, ()))
        if runtime not in OPENVINO_TOLERANCES and not proofs[runtime]['accepted']:
            raise InputError(
                f'the export to {form} is not written, {runtime} answers otherwise than the run: '
                f'{runtimes.describe(proofs[runtime])}; please report it'
            )
    return proofs


def compare(expected, found, tolerance=TOLERANCE, other_labels=0.0):
    """Compares the answers of an export with those of the run.

    A label may differ where the two best probabilities are closer than the tolerance: a tie.

    Args:
      expected: dictionary of `runtimes.OUTPUTS`, what the run answers.
      found: dictionary of some of them, what the export does.
      tolerance: of a probability.
      other_labels: share of labels that may differ; where some may, logits and features may, too.

    Returns:
      A dictionary: images, largest_difference (of a probability), labels_equal, ties (among those that are not), the
      largest differences of logits and features over the largest of these, tolerance, and whether it is accepted.
    """
    probabilities = expected['probabilities']
    difference = np.abs(found['probabilities'] - probabilities).max()
    equal = found['probabilities'].argmax(axis=1) == probabilities.argmax(axis=1)
    second, best = np.sort(probabilities, axis=1)[:, -2:].T
    ties = int(np.sum(~equal & (best - second < TOLERANCE)))
    relative = {}
    for name in ('logits', 'features'):
        if name in found:
            largest = np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max()
            relative[f'largest_difference_of_{name}'] = float(largest)
    different = len(equal) - int(equal.sum()) - ties
    accepted = difference <= tolerance and different <= other_labels * len(equal)
    if not other_labels:
        accepted &= all(x <= FEATURE_TOLERANCE for x in relative.values())
    return {
        'images': len(equal),
        'largest_difference': float(difference),
        'labels_equal': int(equal.sum()),
        'ties': ties,
        **relative,
        'tolerance': tolerance,
        'accepted': bool(accepted),
    }


def write_keras(path, network, unused_metadata):
    """Writes a `.keras` file, which has no place for metadata."""
    from brain_jax.serving import keras_graph

    keras_graph.make_model(network).save(path)


def load_keras(path):
    """Returns the function that computes the probabilities as a `.keras` file says, loaded in safe mode."""
    import keras

    model = keras.saving.load_model(path, safe_mode=True)
    return lambda images: {'probabilities': model.predict_on_batch(images)}


def write_onnx(path, network, metadata):
    """Writes an ONNX file with metadata."""
    from brain_jax.serving import onnx_graph

    path.write_bytes(onnx_graph.make_model(network, metadata).SerializeToString())


def write_stablehlo(path, network, unused_metadata):
    """Writes StableHLO as `jax.export` serializes it, for all `PLATFORMS`; it has no place for metadata."""

    def compute(images):
        logits, features = predictor.compute_answer(network.model, network.config, network.variables, images)
        probabilities = jax.nn.softmax(logits / network.temperature)
        return {'probabilities': probabilities, 'logits': logits, 'features': features}

    size = network.config.image_size
    shape = jax.export.symbolic_shape(f'batch, {size}, {size}')
    with jax.default_matmul_precision('highest'):
        exported = jax.export.export(jax.jit(compute), platforms=PLATFORMS)(jax.ShapeDtypeStruct(shape, np.uint8))
    path.write_bytes(exported.serialize())


def load_stablehlo(path):
    """Returns the function that serialized StableHLO computes."""
    compute = jax.jit(jax.export.deserialize(bytearray(path.read_bytes())).call)
    return lambda images: jax.tree.map(np.asarray, compute(images))


def write_saved_model(path, network, metadata):
    """Writes the folder of a TensorFlow SavedModel, its metadata as `assets.extra/brain_jax.json`."""
    from brain_jax.serving import keras_graph

    keras_graph.make_model(network, runtimes.OUTPUTS).export(path, format='tf_saved_model', verbose=False)
    (path / 'assets.extra').mkdir()
    (path / 'assets.extra/brain_jax.json').write_text(json.dumps(metadata, indent=2) + '\n')


def load_saved_model(path):
    """Returns the function that a TensorFlow SavedModel computes."""
    import tensorflow as tf

    model = tf.saved_model.load(str(path))

    def compute(images):
        found = model.signatures['serving_default'](images=tf.constant(images))
        return {name: array.numpy() for name, array in found.items()}

    return compute


def write_safetensors(path, network, metadata):
    """Writes the weights as `--config.pretrained` reads them, with metadata."""
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    sha256 = network.hashes['checkpoint_sha256']
    pretrained.write_weights(path, network.variables, source='a run of brain_jax', source_sha256=sha256, metadata=texts)


def load_safetensors(path, network):
    """Returns the function that the run computes with the weights and the temperature of a file."""
    nothing = jax.tree.map(np.zeros_like, network.variables)
    variables, _ = pretrained.load_pretrained(path, nothing)
    with safetensors.safe_open(path, 'numpy') as file:
        temperature = json.loads(file.metadata()['temperature'])
    return network._replace(temperature=temperature).make_answer(variables)


WRITERS = {
    'keras': write_keras,
    'onnx': write_onnx,
    'safetensors': write_safetensors,
    'saved_model': write_saved_model,
    'stablehlo': write_stablehlo,
}


def list_loaders(form, network):
    """Returns the runtimes that an export is proven in, {name: function from a path to the function it computes}."""
    return {
        'keras': {'keras': load_keras},
        'onnx': runtimes.LOADERS,
        'safetensors': {'brain_jax': functools.partial(load_safetensors, network=network)},
        'saved_model': {'tensorflow': load_saved_model},
        'stablehlo': {'jax': load_stablehlo},
    }[form]
