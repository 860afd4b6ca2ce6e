import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import h5py
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from brain_jax import InputError, models, pretrained

ROOT = pathlib.Path(__file__).parents[1]
PUBLISHED = 'weights/densenet121_weights_tf_dim_ordering_tf_kernels.h5'
TOLERANCE = 1e-4


def keras_densenet(name='DenseNet121', **options):
    """A Keras DenseNet with random weights and BatchNorm statistics far from 0 and 1."""
    model = getattr(keras.applications, name)(weights=None, **options)
    rng = np.random.default_rng(0)
    draw = {
        'kernel': lambda shape: rng.normal(0, (1 / np.prod(shape[:-1])) ** 0.5, shape),
        'bias': lambda shape: rng.normal(0, 1, shape),
        'gamma': lambda shape: rng.uniform(0.5, 1.5, shape),
        'beta': lambda shape: rng.normal(0, 0.5, shape),
        'moving_mean': lambda shape: rng.normal(0, 1, shape),
        'moving_variance': lambda shape: rng.uniform(0.1, 10, shape),
    }
    for weight in model.weights:
        weight.assign(draw[weight.name](weight.shape))
    return model


def keras_variables(backbone, head=None):
    """{path: array} of a Keras DenseNet, by Keras' own names of layers and weights."""
    leaves = {'gamma': 'scale', 'beta': 'bias', 'moving_mean': 'mean', 'moving_variance': 'var'}
    flat = {}
    for layer in [*backbone.layers, *([head] if head else [])]:
        module = 'predictions' if layer is head else re.sub(r'(block\d+)_', r'\1/', layer.name)
        for weight in layer.weights:
            collection = 'batch_stats' if weight.name.startswith('moving') else 'params'
            flat[f'{collection}/{module}/{leaves.get(weight.name, weight.name)}'] = weight.numpy()
    return flat


def assert_same(variables, expected):
    flat = flatten_dict(variables, sep='/')
    assert flat.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(flat[path], array, err_msg=path)


def fresh(model=models.DenseNet121, **options):
    """Variables of an untrained model, all ones."""
    shapes = jax.eval_shape(model(**options).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)


def flax_logits(name, variables, images):
    model = getattr(models, name)(num_classes=variables['params']['predictions']['bias'].shape[0])
    return np.asarray(jax.jit(model.apply)(variables, images))


def real_images(size):
    """The first training image of every class as Keras prepares it, float32 [4, size, size, 3]; none where absent."""
    folders = sorted((ROOT.parent / 'shared/brain-tumor-mri/Training').glob('*'))
    files = [min(folder.iterdir()) for folder in folders]
    images = [keras.utils.img_to_array(keras.utils.load_img(file, target_size=(size, size))) for file in files]
    return keras.applications.densenet.preprocess_input(np.reshape(images, (-1, size, size, 3)).astype(np.float32))


def error_of(source, variables=None):
    """The message of the error that reading `source` raises; it must be one line."""
    with pytest.raises(InputError) as info:
        if variables is None:
            pretrained.read_weights(source)
        else:
            pretrained.load_pretrained(source, variables)
    message = str(info.value)
    assert '\n' not in message
    return message


@pytest.fixture(scope='module')
def densenet121():
    return keras_densenet(classes=7, classifier_activation=None)


@pytest.fixture(scope='module')
def backbone():
    return keras_densenet(include_top=False, pooling='avg', input_shape=(64, 64, 3))


@pytest.fixture(scope='module')
def weights_file(densenet121, tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'model.weights.h5'
    densenet121.save_weights(path)
    return path


# The same logits as Keras and torchvision.


def test_published_weights(shared):
    source = shared / PUBLISHED
    weights = pretrained.read_weights(source)
    # 364 parameter arrays, 242 running statistics.
    leaves = jax.tree.leaves(weights.variables)
    assert (len(leaves), sum(leaf.size for leaf in leaves)) == (606, 8_062_504)
    reference = keras.applications.DenseNet121(weights=str(source), classifier_activation=None)
    assert reference.count_params() == 8_062_504

    noise = np.random.default_rng(0).normal(size=(2, 224, 224, 3))
    images = np.concatenate([real_images(224), noise]).astype(np.float32)
    expected = reference(images, training=False).numpy()
    difference = np.abs(flax_logits('DenseNet121', weights.variables, images) - expected).max(axis=1)
    print('real images', difference[:-2].max(), 'noise', difference[-2:].max())
    assert difference.max() <= TOLERANCE
    assert np.abs(expected).max() > 5  # no trivial agreement of small numbers


@pytest.mark.parametrize(
    ('name', 'suffix', 'num_values'),
    [
        ('DenseNet121', '.weights.h5', 8_062_504),
        ('DenseNet169', '.keras', 14_307_880),
        ('DenseNet201', '.h5', 20_242_984),
    ],
)
def test_random_weights(name, suffix, num_values, tmp_path):
    reference = keras_densenet(name, classifier_activation=None, input_shape=(64, 64, 3))
    path = tmp_path / f'model{suffix}'
    (reference.save_weights if suffix == '.weights.h5' else reference.save)(path)
    weights = pretrained.read_weights(path)
    assert sum(leaf.size for leaf in jax.tree.leaves(weights.variables)) == reference.count_params() == num_values

    images = np.random.default_rng(1).normal(size=(2, 64, 64, 3))
    images = np.concatenate([images, real_images(64)]).astype(np.float32)
    expected = reference(images, training=False).numpy()
    difference = np.abs(flax_logits(name, weights.variables, images) - expected).max()
    print(name, difference, 'of', np.abs(expected).max(), 'on', len(images), 'images')
    assert difference <= TOLERANCE
    assert np.abs(expected).max() > 1


# In a process of its own, because torch and TensorFlow crash in one (torch 2.14 with TensorFlow 2.21).
TORCHVISION_LOGITS = """
import sys
import numpy, safetensors.numpy, torch, torchvision
name, weights, images, logits = sys.argv[1:]
torch.manual_seed(0)
model = getattr(torchvision.models, name)().eval()
state = model.state_dict()
for key, tensor in state.items():
    if key.endswith('running_mean'):
        tensor.normal_()
    elif key.endswith('running_var'):
        tensor.uniform_(0.1, 10)
state['features.norm0.running_var'][:8] = 1e-30  # where a wrong epsilon shows
safetensors.numpy.save_file({key: tensor.numpy() for key, tensor in state.items()}, weights)
images = torch.from_numpy(numpy.load(images)).permute(0, 3, 1, 2)
with torch.no_grad():
    numpy.save(logits, model(images).numpy())
"""


@pytest.mark.skipif(importlib.util.find_spec('torchvision') is None, reason='torchvision is not installed')
@pytest.mark.parametrize('name', ['DenseNet121', 'DenseNet169', 'DenseNet201'])
def test_torchvision_weights(name, tmp_path):
    images = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32)
    np.save(tmp_path / 'images.npy', images)
    files = [tmp_path / file for file in ('model.safetensors', 'images.npy', 'logits.npy')]
    subprocess.run([sys.executable, '-c', TORCHVISION_LOGITS, name.lower(), *files], check=True)
    weights = pretrained.read_weights(files[0])
    expected = np.load(files[2])
    difference = np.abs(flax_logits(name, weights.variables, images) - expected).max()
    print(name, difference, 'of', np.abs(expected).max())
    assert difference <= TOLERANCE


def test_torch_layout(tmp_path):
    """The names of torchvision and timm, the older ones too, without torch."""
    variables = fresh(models.DenseNet, stage_sizes=(1, 1, 1, 2), growth_rate=2, num_classes=3)
    rng = np.random.default_rng(0)
    names = {
        'conv1_conv': 'features.conv0',
        'conv1_bn': 'features.norm0',
        'conv5_block2/0_bn': 'features.denseblock4.denselayer2.norm.1',
        'conv5_block2/1_conv': 'features.denseblock4.denselayer2.conv.1',
        'bn': 'features.norm5',
        'predictions': 'classifier',
    }
    for block in (1, 2, 3, 4):
        names |= {f'pool{block + 1}_{part}': f'features.transition{block}.{torch}' for part, torch in
                  (('bn', 'norm'), ('conv', 'conv'))}  # fmt: skip
        for layer in (1, 2):
            for part, torch in (('0_bn', 'norm1'), ('1_conv', 'conv1'), ('1_bn', 'norm2'), ('2_conv', 'conv2')):
                module = f'features.denseblock{block}.denselayer{layer}.{torch}'
                names.setdefault(f'conv{block + 1}_block{layer}/{part}', module)
    leaves = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}
    arrays, expected = {'features.norm0.num_batches_tracked': np.array(7)}, {}
    for path, leaf in flatten_dict(variables, sep='/').items():
        _, module, kind = re.fullmatch(r'(\w+)/(.+)/(\w+)', path).groups()
        array = rng.uniform(0.1, 9, leaf.shape).astype(np.float32)
        expected[path] = array
        # torch: [out, in, height, width] and [out, in].
        array = np.moveaxis(np.swapaxes(array, -1, -2), (-2, -1), (0, 1)) if kind == 'kernel' else array
        arrays[f'{names[module]}.{leaves[kind]}'] = np.ascontiguousarray(array)
    safetensors.numpy.save_file(arrays, tmp_path / 'timm.safetensors')
    loaded, _ = pretrained.load_pretrained(tmp_path / 'timm.safetensors', variables)
    loaded = flatten_dict(loaded, sep='/')
    for path, array in expected.items():
        if path.endswith('/var'):
            # torchvision adds 1e-5 to a variance, Keras 1.001e-5.
            np.testing.assert_allclose(loaded[path].astype(float) + 1.001e-5, array.astype(float) + 1e-5, rtol=1e-7)
        else:
            np.testing.assert_array_equal(loaded[path], array, err_msg=path)


# What users save.


@pytest.mark.parametrize('suffix', ['.keras', '.weights.h5', '.h5'])
def test_backbone_within_a_model(suffix, backbone, tmp_path):
    head = keras.layers.Dense(4)
    layers = [keras.Input((64, 64, 3)), keras.layers.RandomFlip(), backbone, keras.layers.Dropout(0.2), head]
    model = keras.Sequential(layers)
    path = tmp_path / f'model{suffix}'
    (model.save_weights if suffix == '.weights.h5' else model.save)(path)
    assert_same(pretrained.read_weights(path).variables, keras_variables(backbone, head))


def test_trained_model_with_own_head(backbone, tmp_path):
    head = keras.layers.Dense(4, name='tumour')
    model = keras.Model(backbone.input, head(backbone.output))
    model.compile('adam', 'mse')
    model.optimizer.build(model.trainable_variables)  # its state is saved, too
    model.save(tmp_path / 'model.keras')
    assert_same(pretrained.read_weights(tmp_path / 'model.keras').variables, keras_variables(backbone, head))


def test_head_of_several_layers_is_an_error(backbone, tmp_path):
    model = keras.Sequential([backbone, keras.layers.Dense(8, name='hidden'), keras.layers.Dense(4, name='out')])
    model.save(tmp_path / 'model.keras')
    message = error_of(tmp_path / 'model.keras')
    assert '4 unexpected: params/hidden/bias, params/hidden/kernel, params/out/bias, params/out/kernel' in message


def test_file_without_layer_names(densenet121, weights_file, tmp_path):
    """Keras 3.0 to 3.5 wrote the same groups without the names of the layers."""
    path = shutil.copy(weights_file, tmp_path / 'old.weights.h5')
    with h5py.File(path, 'r+') as file:
        for layer in file['layers'].values():
            del layer['vars'].attrs['name']
    assert_same(pretrained.read_weights(path).variables, keras_variables(densenet121))


def test_head_is_loaded_where_it_fits(densenet121, weights_file):
    variables, sha256 = pretrained.load_pretrained(weights_file, fresh(num_classes=7))
    assert_same(variables, keras_variables(densenet121))
    assert sha256 == pretrained.read_weights(weights_file).sha256


def test_head_of_other_classes_is_replaced(densenet121, weights_file, caplog):
    caplog.set_level('INFO')
    variables, _ = pretrained.load_pretrained(weights_file, fresh(num_classes=4))
    expected = keras_variables(densenet121)
    expected['params/predictions/kernel'], expected['params/predictions/bias'] = np.ones((1024, 4)), np.ones(4)
    assert_same(variables, expected)
    assert 'has a head of 7 classes on 1024 channels: replaced by a fresh one of 4 on 1024' in caplog.text


def test_narrow_and_wide_heads_replace_each_other(densenet121, weights_file, tmp_path, caplog):
    caplog.set_level('INFO')
    variables, _ = pretrained.load_pretrained(weights_file, fresh(num_classes=7, head='wide'))
    assert variables['params']['predictions']['kernel'].shape == (5120, 7)
    assert 'of 7 classes on 1024 channels: replaced by a fresh one of 7 on 5120' in caplog.text
    path = tmp_path / 'wide.safetensors'
    variables['params']['predictions']['kernel'] = np.full((5120, 7), 2, np.float32)
    pretrained.write_weights(path, variables, source='', source_sha256='')
    expected = keras_variables(densenet121)
    expected['params/predictions/kernel'], expected['params/predictions/bias'] = np.ones((1024, 7)), np.ones(7)
    assert_same(pretrained.load_pretrained(path, fresh(num_classes=7))[0], expected)
    again, _ = pretrained.load_pretrained(path, fresh(num_classes=7, head='wide'))
    np.testing.assert_array_equal(again['params']['predictions']['kernel'], 2)


def test_wide_head_sees_the_stages_of_keras(densenet121):
    variables = unflatten_dict(keras_variables(densenet121), sep='/')
    variables['params']['predictions'] = {'kernel': np.zeros((5120, 4)), 'bias': np.zeros(4)}
    images = np.random.default_rng(0).normal(size=(2, 224, 224, 3)).astype(np.float32)
    model = models.DenseNet121(num_classes=4, head='wide')
    _, found = jax.jit(lambda v: model.apply(v, images, return_features=True))(variables)
    ends = [densenet121.get_layer(name).output for name in ('pool3_relu', 'pool4_relu', 'relu')]
    means = []
    for x, middle in zip(keras.Model(densenet121.input, ends)(images), (12, 6, 3), strict=True):
        x = x.numpy()
        edge = (x.shape[1] - middle) // 2
        means += [x.mean(axis=(1, 2)), x[:, edge:-edge, edge:-edge].mean(axis=(1, 2))]
    np.testing.assert_allclose(found['pooled'], np.concatenate(means, axis=1), rtol=1e-3, atol=1e-4)


def test_file_without_head(backbone, tmp_path, caplog):
    caplog.set_level('INFO')
    backbone.save_weights(tmp_path / 'backbone.weights.h5')
    variables, _ = pretrained.load_pretrained(tmp_path / 'backbone.weights.h5', fresh(num_classes=4))
    expected = keras_variables(backbone)
    expected['params/predictions/kernel'], expected['params/predictions/bias'] = np.ones((1024, 4)), np.ones(4)
    assert_same(variables, expected)
    assert 'has no head' in caplog.text


def test_published_file_without_head(shared, tmp_path):
    path = tmp_path / 'densenet121_notop.h5'
    shutil.copyfile(shared / PUBLISHED, path)
    with h5py.File(path, 'r+') as file:
        expected = np.array(file['conv1/conv/conv1/conv/kernel:0'])
        file.attrs['layer_names'] = [name for name in file.attrs['layer_names'] if name != 'fc1000']
        del file['fc1000']
    variables, _ = pretrained.load_pretrained(path, fresh(num_classes=4))
    np.testing.assert_array_equal(variables['params']['conv1_conv']['kernel'], expected)
    np.testing.assert_array_equal(variables['params']['predictions']['kernel'], np.ones((1024, 4)))


# Conversion.


def convert(source, output):
    command = [sys.executable, ROOT / 'scripts' / 'convert_weights.py', f'--source={source}', f'--output={output}']
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={'PYTHONPATH': str(ROOT)})


def test_convert_weights(densenet121, weights_file, tmp_path):
    output = tmp_path / 'out' / 'model.safetensors'
    result = convert(weights_file, output)
    assert result.returncode == 0, result.stderr
    assert f'{densenet121.count_params()} values in 606 arrays' in result.stdout
    sha256 = pretrained.read_weights(weights_file).sha256
    with safetensors.safe_open(output, 'numpy') as file:
        header = {'layout': 'brain_jax-1', 'source': str(weights_file), 'source_sha256': sha256}
        assert file.metadata() == header
    variables, _ = pretrained.load_pretrained(output, fresh(num_classes=7))
    assert_same(variables, keras_variables(densenet121))


def test_failed_conversion_writes_nothing(weights_file, tmp_path):
    source = tmp_path / 'half.weights.h5'
    source.write_bytes(weights_file.read_bytes()[:10_000_000])
    result = convert(source, tmp_path / 'model.safetensors')
    assert result.returncode == 1
    assert re.fullmatch(r'error: .*half\.weights\.h5: damaged.*\n', result.stderr.splitlines(keepends=True)[-1])
    assert 'Traceback' not in result.stderr
    assert list(tmp_path.iterdir()) == [source]


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'folder.safetensors').mkdir()
    for path in (tmp_path / 'file' / 'x.safetensors', tmp_path / 'x.h5', tmp_path / 'folder.safetensors'):
        with pytest.raises(InputError, match='written'):
            pretrained.write_weights(path, {'params': {'a': np.ones(3)}}, source='', source_sha256='')
    assert {path.name for path in tmp_path.iterdir()} == {'file', 'folder.safetensors'}


# Bad files.


def test_other_architecture(tmp_path):
    path = tmp_path / 'other.safetensors'
    pretrained.write_weights(path, fresh(models.DenseNet169), source='', source_sha256='')
    assert 'holds a DenseNet169, the model is DenseNet121' in error_of(path, fresh())


@pytest.mark.parametrize('layout', ['.weights.h5', '.keras', '.safetensors'])
def test_truncated(layout, weights_file, tmp_path):
    path = tmp_path / f'model{layout}'
    if layout == '.keras':
        with zipfile.ZipFile(path, 'w') as archive:
            archive.write(weights_file, 'model.weights.h5')
    elif layout == '.safetensors':
        pretrained.write_weights(path, fresh(num_classes=4), source='', source_sha256='')
    else:
        shutil.copy(weights_file, path)
    pretrained.read_weights(path)
    whole = path.read_bytes()
    for size in (len(whole) - 1000, len(whole) // 2, 100, 4, 0):
        path.write_bytes(whole[:size])
        assert 'damaged' in error_of(path)


def test_all_faults_are_in_one_message(weights_file, tmp_path):
    path = shutil.copy(weights_file, tmp_path / 'model.weights.h5')
    with h5py.File(path, 'r+') as file:
        del file['layers/conv2d_7/vars/0']  # conv2_block4_1_conv
        del file['layers/batch_normalization/vars/3']  # conv1_bn
        del file['layers/dense/vars/1']
        file['layers/dense/vars/1'] = np.zeros(6, np.float32)
        file['layers/more/vars/0'] = np.zeros(5, np.float32)
    message = error_of(path)
    assert '2 missing: batch_stats/conv1_bn/var, params/conv2_block4/1_conv/kernel;' in message
    assert '1 unexpected: params/layers/more/kernel;' in message
    assert '1 of a wrong shape: params/predictions/bias [6] instead of [7]' in message


def test_values_that_are_no_numbers(tmp_path):
    variables = fresh(num_classes=4)
    variables['params']['bn']['scale'][3] = np.nan
    pretrained.write_weights(tmp_path / 'nan.safetensors', variables, source='', source_sha256='')
    assert 'not finite numbers: params/bn/scale' in error_of(tmp_path / 'nan.safetensors')


@pytest.mark.parametrize('trick', ['link', 'external', 'virtual', 'integers', 'chunk'])
def test_arrays_that_are_not_plain(trick, weights_file, tmp_path):
    """HDF5 can name other files, and can claim sizes that it does not hold."""
    path = shutil.copy(weights_file, tmp_path / 'model.weights.h5')
    (tmp_path / 'secret').write_bytes(bytes(256))
    with h5py.File(path, 'r+') as file:
        group = file['layers/batch_normalization/vars']  # conv1_bn
        del group['0']
        if trick == 'link':
            group['0'] = h5py.ExternalLink(str(weights_file), 'layers/batch_normalization/vars/0')
        elif trick == 'external':
            group.create_dataset('0', (64,), 'f4', external=[(str(tmp_path / 'secret'), 0, 256)])
        elif trick == 'virtual':
            layout = h5py.VirtualLayout((64,), 'f4')
            layout[:] = h5py.VirtualSource(weights_file, 'layers/batch_normalization/vars/0', (64,))
            group.create_virtual_dataset('0', layout)
        elif trick == 'integers':
            group['0'] = np.ones(64, np.int32)
        else:
            group.create_dataset('0', (64,), 'f4', chunks=(2**28,), maxshape=(None,), compression='gzip')
    message = error_of(path)
    assert ('1 missing: params/conv1_bn/scale' if trick == 'link' else 'not a plain array') in message


def test_no_weights_file(tmp_path):
    assert 'no such weights file' in error_of(tmp_path / 'nothing.h5')
    with zipfile.ZipFile(tmp_path / 'torch.pth', 'w') as archive:
        archive.writestr('archive/data.pkl', b'')
    assert 'only .safetensors' in error_of(tmp_path / 'torch.pth')
    (tmp_path / 'text.h5').write_text('404: not found')
    assert 'no Keras or safetensors weights file' in error_of(tmp_path / 'text.h5')
    safetensors.numpy.save_file({'a': np.ones(3)}, tmp_path / 'a.safetensors', metadata={'layout': 'brain_jax-9'})
    assert 'layout brain_jax-9 is unknown' in error_of(tmp_path / 'a.safetensors')
    safetensors.numpy.save_file({'a': np.ones(3)}, tmp_path / 'a.safetensors')
    assert 'holds none of DenseNet121, DenseNet169, DenseNet201' in error_of(tmp_path / 'a.safetensors')


# The published files.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('KERAS_HOME', str(tmp_path / 'keras'))
    return tmp_path / 'keras' / 'models'


def test_imagenet_is_downloaded_once(weights_file, cache, tmp_path, monkeypatch):
    # A folder stands in for the server, and its file for the published one.
    server = tmp_path / 'server'
    server.mkdir()
    served = shutil.copy(weights_file, server / pathlib.Path(PUBLISHED).name)
    monkeypatch.setattr(pretrained, 'PUBLISHED_ADDRESS', server.as_uri() + '/')
    assert 'its MD5 is' in error_of('imagenet')
    assert list(cache.iterdir()) == []

    md5 = pretrained._digest(served, 'md5')
    monkeypatch.setitem(pretrained.PUBLISHED_MD5, 'DenseNet121', (md5, md5))
    weights = pretrained.read_weights('imagenet')
    assert weights.source == str(cache / served.name)
    served.unlink()
    assert_same(pretrained.read_weights('imagenet').variables, flatten_dict(weights.variables, sep='/'))


def test_imagenet_without_network(cache, monkeypatch):
    monkeypatch.setattr(pretrained, 'PUBLISHED_ADDRESS', 'http://127.0.0.1:9/densenet/')
    message = error_of('imagenet', fresh(models.DenseNet169, num_classes=4))
    assert 'http://127.0.0.1:9/densenet/densenet169_weights_tf_dim_ordering_tf_kernels.h5' in message
    assert '--config.pretrained=FILE' in message
    assert '--source=FILE' in message
    odd = fresh(models.DenseNet, stage_sizes=(1, 1, 1, 1))
    assert 'published weights for DenseNet121' in error_of('imagenet', odd)


@pytest.mark.parametrize('name', pretrained.MODELS)
def test_checksums_are_those_of_keras(name):
    source = pathlib.Path(sys.modules[keras.applications.DenseNet121.__module__].__file__).read_text()
    assert pretrained.PUBLISHED_ADDRESS in source
    for md5 in pretrained.PUBLISHED_MD5[name]:
        assert f'file_hash="{md5}"' in source
