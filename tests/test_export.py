"""Exports of small runs, opened by their own runtimes and compared with the evaluation, and with Keras' DenseNet121."""

import csv
import importlib.util
import json
import os
import pathlib
import runpy
import shutil
import subprocess
import sys

import flax.traverse_util
import jax
import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import special

from brain_jax import InputError, models, pretrained, train
from brain_jax.data import images
from brain_jax.evaluation import evaluate
from brain_jax.serving import export, keras_graph, predictor, runtimes

REPOSITORY = pathlib.Path(__file__).parents[1]
get_config = runpy.run_path(str(REPOSITORY / 'configs/densenet121.py'))['get_config']


@pytest.fixture(scope='module')
def workdir(data, tmp_path_factory):
    """The folder of an evaluated run with a wide head, which averages over mirror images."""
    workdir = tmp_path_factory.mktemp('runs') / 'run'
    config = get_config('frozen')  # of random weights: the least to compile
    config.update(
        model='_DenseNetTiny', pretrained='', image_size=32, batch_size=16, eval_batch_size=24, num_epochs=40.0,
        learning_rate=0.03, weight_decay=0.0, mixup=0.0, eval_every_epochs=40.0, validation_fraction=0.25, head='wide',
        average_flips=True, **data,
    )  # fmt: skip
    train.train_and_evaluate(config.lock(), workdir)
    evaluate.evaluate_run(workdir, workdir / 'evaluation_test')
    return workdir


@pytest.fixture(scope='module')
def expected(workdir, data):
    """The test images as a caller of an export prepares them, and their probabilities in the evaluation's table."""
    folder = pathlib.Path(data['data_dir'])
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.glob('Testing/*/*.png'))
    with open(workdir / 'evaluation_test/predictions.csv', newline='') as file:
        rows = {row['path']: row for row in csv.DictReader(file)}
    names = json.loads((workdir / 'run.json').read_text())['class_names']
    probabilities = [[float(rows[path][f'calibrated_{name}']) for name in names] for path in paths]
    assert np.ptp(probabilities, axis=0).min() > 0.05  # not all the same
    pictures = [images.pad_and_resize(images.read_image(folder / path), 32) for path in paths]
    return np.stack(pictures), np.array(probabilities)


def skip_without(package):
    """Skips a test where a package is not installed. It is not imported: OpenVINO tells its makers of that."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f'no {package}')


def run_onnx(path, batch):
    onnxruntime = pytest.importorskip('onnxruntime')
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    return dict(zip(runtimes.OUTPUTS, session.run(runtimes.OUTPUTS, {'images': batch}), strict=True))


def run_keras(path, batch):
    return {'probabilities': keras.saving.load_model(path, safe_mode=True).predict(batch, verbose=0)}


def run_saved_model(path, batch):
    model = tf.saved_model.load(str(path))
    return {name: x.numpy() for name, x in model.signatures['serving_default'](images=tf.constant(batch)).items()}


def run_stablehlo(path, batch):
    return jax.export.deserialize(bytearray(path.read_bytes())).call(batch)


RUN = {'keras': run_keras, 'onnx': run_onnx, 'saved_model': run_saved_model, 'stablehlo': run_stablehlo}


@pytest.mark.parametrize('form', RUN)
def test_answers_are_those_of_the_evaluation(workdir, expected, tmp_path, form):
    if form == 'onnx':
        skip_without('openvino')
    path, record = export.export_run(workdir, form, tmp_path / f'model{export.SUFFIXES[form]}')
    batch, probabilities = expected
    for start, end in ((0, 20), (0, 1), (17, 20)):  # the size of a batch is free
        outputs = RUN[form](path, batch[start:end])
        np.testing.assert_allclose(outputs['probabilities'], probabilities[start:end], atol=1e-5)
    if form != 'keras':
        logits, features = predictor.Predictor.from_workdir(workdir).answer(batch)
        np.testing.assert_allclose(outputs['logits'], logits[start:end], atol=1e-4)
        np.testing.assert_allclose(outputs['features'], features[start:end], atol=1e-4)
    for runtime, proof in record['runtimes'].items():
        assert proof['images'] == proof['labels_equal'] + proof['ties'] == 20 or runtime == 'openvino_bfloat16'
        assert proof['largest_difference'] <= 1e-5 or runtime == 'openvino_bfloat16'
    assert json.loads((tmp_path / f'{path.name}.json').read_text()) == record
    assert {file.name for file in tmp_path.iterdir()} == {path.name, f'{path.name}.json'}


def test_weights_train_on(workdir, tmp_path):
    path, record = export.export_run(workdir, 'safetensors', tmp_path / 'weights.safetensors')
    loaded = predictor.Predictor.from_workdir(workdir)
    variables, _ = pretrained.load_pretrained(path, jax.tree.map(np.zeros_like, loaded.variables))
    jax.tree.map(np.testing.assert_array_equal, variables, jax.tree.map(np.asarray, loaded.variables))
    with pretrained.safetensors.safe_open(path, 'numpy') as file:
        metadata = file.metadata()
    assert json.loads(metadata['class_names']) == list(loaded.class_names)
    assert float(metadata['temperature']) == loaded.temperature == record['temperature']


def test_keras_file_trains_on(workdir, tmp_path):
    path, _ = export.export_run(workdir, 'keras', tmp_path / 'model.keras')
    loaded = predictor.Predictor.from_workdir(workdir)
    variables, _ = pretrained.load_pretrained(path, jax.tree.map(np.zeros_like, loaded.variables))
    jax.tree.map(np.testing.assert_array_equal, variables, jax.tree.map(np.asarray, loaded.variables))


def test_files_tell_what_they_are(workdir, tmp_path):
    onnx = pytest.importorskip('onnx')
    network = export.load_network(workdir)
    names = json.loads((workdir / 'run.json').read_text())['class_names']
    for form in ('onnx', 'saved_model'):
        path = tmp_path / f'model{export.SUFFIXES[form]}'
        export.WRITERS[form](path, network, export.describe(network, form))
    properties = {item.key: item.value for item in onnx.load(tmp_path / 'model.onnx').metadata_props}
    extra = json.loads((tmp_path / 'model/assets.extra/brain_jax.json').read_text())
    assert json.loads(properties['class_names']) == extra['class_names'] == names
    assert properties['checkpoint_sha256'] == extra['checkpoint_sha256'] == network.hashes['checkpoint_sha256']
    for text in (properties, extra):
        assert 'Not a medical device' in text['notice'] and 'left to the caller' in text['images']


def keras_network(size):
    """keras.applications' DenseNet121 of random weights and statistics, and the `Network` of the same."""
    model = keras.applications.DenseNet121(
        weights=None, input_shape=(size, size, 3), classes=4, classifier_activation=None
    )
    rng = np.random.default_rng(0)
    variables = {}
    leaves = {'gamma': 'scale', 'beta': 'bias', 'moving_mean': 'mean', 'moving_variance': 'var'}
    for layer in model.layers:
        for weight in layer.weights:
            scale = np.prod(weight.shape[:-1]) ** -0.5 if weight.name == 'kernel' else 1
            drawn = rng.normal(0, scale, weight.shape)
            weight.assign(np.exp(drawn / 4) if weight.name in ('gamma', 'moving_variance') else drawn)
            collection = 'batch_stats' if weight.name.startswith('moving') else 'params'
            variables[collection, layer.name, leaves.get(weight.name, weight.name)] = weight.numpy()
    config = get_config()
    config.update(image_size=size, average_flips=False)
    variables = flax.traverse_util.unflatten_dict(variables)
    return model, export.Network(models.DenseNet121(num_classes=4), variables, config, tuple('abcd'), 1.7, {})


@pytest.mark.parametrize('form', ['onnx', 'keras'])
def test_densenet121_is_that_of_keras(tmp_path, form):
    """The usual head, and no mirror images."""
    skip_without('onnx')
    model, network = keras_network(96)
    network = network._replace(temperature=0.2)  # random weights make little difference between images
    batch = np.random.default_rng(1).integers(0, 256, (3, 96, 96), np.uint8)
    batch = batch // np.array([1, 3, 60], np.uint8)[:, None, None]
    path = tmp_path / f'model{export.SUFFIXES[form]}'
    export.WRITERS[form](path, network, export.describe(network, form))
    probabilities = RUN[form](path, batch)['probabilities']
    colour = np.repeat(batch[..., None], 3, axis=3).astype(np.float32)
    logits = model.predict(keras.applications.densenet.preprocess_input(colour), verbose=0)
    np.testing.assert_allclose(probabilities, special.softmax(logits / network.temperature, axis=1), atol=1e-5)
    assert np.ptp(probabilities, axis=0).max() > 0.01  # not all the same


@pytest.mark.parametrize('name', ['DenseNet121', 'DenseNet169', 'DenseNet201'])
def test_layers_are_those_of_keras(name):
    theirs = getattr(keras.applications, name)(
        weights=None, input_shape=(64, 64, 3), classes=4, classifier_activation=None
    )
    ours = keras_graph.make_densenet(getattr(models, name)(num_classes=4), 64)
    assert len(ours.layers) == len(theirs.layers)
    for layer, reference in zip(ours.layers, theirs.layers, strict=True):
        described, wanted = layer.get_config(), reference.get_config()
        if not reference.name.startswith(('input_layer', 'zero_padding2d')):  # which Keras numbers
            assert described['name'] == wanted['name']
        assert type(layer) is type(reference) and {**described, 'name': ''} == {**wanted, 'name': ''}
        sources = [
            [x._keras_history.operation for x in of._inbound_nodes[0].input_tensors] for of in (layer, reference)
        ]
        places = [[model.layers.index(x) for x in s] for model, s in zip((ours, theirs), sources, strict=True)]
        assert places[0] == places[1]


def test_another_network_is_refused(workdir, expected, tmp_path):
    skip_without('onnx')
    skip_without('onnxruntime')
    network = export.load_network(workdir)
    batch, _ = expected
    answers = network.make_answer()(batch)
    changed = jax.tree.map(np.array, network.variables)
    changed['params']['conv5_block1']['2_conv']['kernel'][1, 1] *= 1.01
    export.write_onnx(tmp_path / 'model.onnx', network._replace(variables=changed), export.describe(network, 'onnx'))
    with pytest.raises(InputError, match='is not written, onnxruntime answers otherwise than the run: 20 images'):
        export.prove(tmp_path / 'model.onnx', network, 'onnx', batch, answers)


def test_comparison():
    probabilities = np.array([[0.7, 0.2, 0.1], [0.400004, 0.399998, 0.199998], [0.1, 0.5, 0.4]])
    expected = {'probabilities': probabilities}
    swapped = probabilities[:, [1, 0, 2]]
    tie = np.where([[False], [True], [False]], swapped, probabilities)
    found = export.compare(expected, {'probabilities': tie})
    assert found['accepted'] and found['labels_equal'] == 2 and found['ties'] == 1 and found['images'] == 3
    assert found['largest_difference'] == pytest.approx(6e-6)
    for row, change in ((0, 0.5), (2, 2e-5), (0, np.nan)):
        changed = probabilities.copy()
        changed[row, 1] += change
        found = export.compare(expected, {'probabilities': changed})
        assert not found['accepted']
    assert not export.compare(expected, {'probabilities': swapped}, *export.OPENVINO_TOLERANCES['openvino_bfloat16'])[
        'accepted'
    ]


@pytest.fixture(scope='module')
def served(workdir):
    """The run, its ONNX export beside it."""
    skip_without('onnxruntime')
    skip_without('openvino')
    export.export_run(workdir, 'onnx')
    return workdir


@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_runtimes_answer_for_the_run(served, expected, runtime):
    batch, probabilities = expected
    loaded = predictor.Predictor.from_workdir(served, runtime=runtime)
    predictions = loaded.predict(batch)
    np.testing.assert_allclose([row.probabilities for row in predictions], probabilities, atol=1e-5)
    distances = [row.out_of_distribution for row in predictor.Predictor.from_workdir(served).predict(batch)]
    np.testing.assert_allclose([row.out_of_distribution for row in predictions], distances, rtol=1e-3)
    assert loaded.predict([]) == []


def test_what_is_not_proven_is_not_served(served, tmp_path):
    copy = shutil.copytree(served, tmp_path / 'run')
    path = copy / 'exports/model.onnx'
    record = json.loads(runtimes.record_path(path).read_text())
    refused = dict(record['runtimes']['openvino'], accepted=False)
    for changes, message in (
        ({'checkpoint_sha256': '0'}, r'model\.onnx is of another checkpoint: run scripts/export\.py --workdir'),
        ({'sha256': '0'}, r'is not the file that was proven: run scripts/export\.py'),
        ({'runtimes': {}}, r'openvino is not proven to answer as the run .* \(was never compared\)'),
        ({'runtimes': {'openvino': refused}}, r'openvino is not proven .* \(20 images: largest difference'),
    ):
        runtimes.record_path(path).write_text(json.dumps(record | changes))
        with pytest.raises(InputError, match=message):
            predictor.Predictor.from_workdir(copy, runtime='openvino')
    path.unlink()
    with pytest.raises(InputError, match=r'which are not there: run scripts/export\.py --workdir .* --format onnx'):
        predictor.Predictor.from_workdir(copy, runtime='openvino')
    with pytest.raises(InputError, match="unknown runtime 'torch': use jax, onnxruntime, openvino"):
        predictor.Predictor.from_workdir(copy, runtime='torch')


def test_openvino_sends_no_event():
    skip_without('openvino')
    code = (
        'from brain_jax.serving import runtimes; runtimes.import_openvino();'
        'from openvino.tools.ovc import telemetry_utils; print(telemetry_utils.tm.__name__)'
    )
    done = subprocess.run([sys.executable, '-c', code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == 'openvino.tools.ovc.telemetry_stub', done.stderr


def test_openvino_leaves_signals_alone(served):
    program = """if True:
        import faulthandler, pathlib, signal, sys
        import numpy as np
        from brain_jax.serving import runtimes
        faulthandler.enable()  # gives the main thread a stack for signals, as pytest and absl do
        for _ in range(2):
            compute = runtimes.load_openvino(pathlib.Path(sys.argv[1]), threads=1)
            compute(np.zeros((1, 32, 32), np.uint8))
        del compute
        signal.signal(signal.SIGTERM, lambda *_: print('still there'))
        signal.raise_signal(signal.SIGTERM)
    """
    command = [sys.executable, '-c', program, str(served / 'exports/model.onnx')]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout) == (0, 'still there\n'), found.stderr


def test_bad_output_leaves_nothing(workdir, tmp_path):
    (tmp_path / 'folder').mkdir()
    for form, output, message in (
        ('keras', 'model.h5', r'must end in \.keras'),
        ('saved_model', 'folder', 'exists already: remove it'),
    ):
        with pytest.raises(InputError, match=message):
            export.export_run(workdir, form, tmp_path / output)
    with pytest.raises(InputError, match='/nowhere'):
        export.export_run(workdir, 'safetensors', tmp_path / 'a.safetensors', data_dir='/nowhere')
    assert [path.name for path in tmp_path.iterdir()] == ['folder']


def test_command_line_tells_in_one_line_what_is_wrong(tmp_path):
    command = [sys.executable, REPOSITORY / 'scripts/export.py', '--workdir', tmp_path, '--format', 'onnx']
    environment = os.environ | {'PYTHONPATH': str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith('error: ') and 'run.json' in line]
