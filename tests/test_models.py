"""Tests of brain_jax.models: against Keras, and against a text-book DenseNet made of Flax' own layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from brain_jax import models
from brain_jax.benchmark.text_book import TextBookDenseNet

TINY = {'stage_sizes': (1, 2, 1, 1), 'growth_rate': 8, 'num_classes': 4}  # models._DenseNetTiny
MOMENTUM = 0.9


def flat_names(tree):
    """Joins the names of nested modules: {module: {leaf: array}} as the text-book network has them."""
    return unflatten_dict({('_'.join(path[:-1]), path[-1]): leaf for path, leaf in flatten_dict(tree).items()})


def make_tiny(**options):
    return models._DenseNetTiny(num_classes=4, momentum=MOMENTUM, **options)


def make_text_book(dtype):
    return TextBookDenseNet(**TINY, momentum=MOMENTUM, dtype=dtype)


@pytest.fixture(scope='module')
def variables():
    """Random variables of the tiny network, with statistics far from 0 and 1: float32 arrays of NumPy."""
    shapes = jax.eval_shape(make_tiny().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(0)
    draw = {
        'kernel': lambda shape: rng.normal(0, (2 / np.prod(shape[:-1])) ** 0.5, shape),
        'bias': lambda shape: rng.normal(0, 0.5, shape),
        'scale': lambda shape: rng.uniform(0.5, 1.5, shape),
        'mean': lambda shape: rng.normal(0, 1, shape),
        'var': lambda shape: rng.uniform(0.1, 10, shape),
    }
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: draw[path[-1].key](leaf.shape).astype(np.float32), shapes
    )


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(1).normal(size=(4, 75, 64, 3)).astype(np.float32)


def train_outputs(model, variables, images):
    """Returns logits, gradients and new running statistics of a training step, as NumPy arrays."""

    @jax.jit
    def compute(params, batch_stats):
        def loss(params):
            both = {'params': params, 'batch_stats': batch_stats}
            logits, updates = model.apply(both, images, train=True, mutable=['batch_stats'])
            return -jnp.mean(nn.log_softmax(logits)[:, 0]), (logits, updates['batch_stats'])

        grads, (logits, batch_stats_) = jax.grad(loss, has_aux=True)(params)
        return {'logits': logits, 'grads': grads, 'batch_stats': batch_stats_}

    return jax.tree.map(np.asarray, compute(variables['params'], variables['batch_stats']))


def to_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.fixture(scope='module')
def text_book(variables, images):
    """The training step of the text-book network, in float64."""
    flat = {collection: flat_names(tree) for collection, tree in variables.items()}
    with jax.enable_x64(True):
        return train_outputs(make_text_book(jnp.float64), to_float64(flat), images.astype(np.float64))


@pytest.mark.parametrize(
    ('remat', 'dtype', 'tolerance'),
    [
        ('none', 'float32', 1e-4),
        ('none', 'float64', 1e-10),
        ('dense_layers', 'float64', 1e-10),
        ('full', 'float64', 1e-10),
    ],
)
def test_training_is_that_of_the_text_book(remat, dtype, tolerance, variables, images, text_book):
    with jax.enable_x64(dtype == 'float64'):
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), (variables, images))
        outputs = train_outputs(make_tiny(dtype=jnp.dtype(dtype), remat=remat), *cast)
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {np.dtype(dtype)}
    for name in ('grads', 'batch_stats'):
        outputs[name] = flat_names(outputs[name])
    assert jax.tree.structure(outputs) == jax.tree.structure(text_book)
    for (path, leaf), expected in zip(
        jax.tree_util.tree_leaves_with_path(outputs), jax.tree.leaves(text_book), strict=True
    ):
        # Of the largest value of the array: its small ones are sums of large ones that cancel.
        scale = np.abs(expected).max()
        assert scale > 1e-4
        np.testing.assert_allclose(leaf / scale, expected / scale, atol=tolerance, rtol=tolerance, err_msg=str(path))


@pytest.fixture(scope='module')
def inference_logits(variables, images):
    """Of the text-book network, in float32."""
    flat = {collection: flat_names(tree) for collection, tree in variables.items()}
    return np.asarray(jax.jit(lambda: make_text_book(jnp.float32).apply(flat, images, train=False))())


def test_frozen_batch_norm(variables, images, inference_logits):
    model = make_tiny(batch_norm='frozen')
    logits, updates = jax.jit(lambda v: model.apply(v, images, train=True, mutable=['batch_stats']))(variables)
    np.testing.assert_allclose(logits, inference_logits, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, updates['batch_stats'], variables['batch_stats'])


def test_features(variables, images, inference_logits):
    """The logits without `train` are those of the running statistics, and follow from the features."""
    logits, features = jax.jit(lambda v: make_tiny().apply(v, images, return_features=True))(variables)
    np.testing.assert_allclose(logits, inference_logits, atol=1e-4)
    head = variables['params']['predictions']
    np.testing.assert_allclose(features['pooled'] @ head['kernel'] + head['bias'], logits, atol=1e-5)
    np.testing.assert_allclose(np.mean(features['feature_map'], axis=(1, 2)), features['pooled'], atol=1e-5)
    assert features['feature_map'].shape == (4, 2, 2, head['kernel'].shape[0])


def test_bfloat16(variables, images, inference_logits):
    model = make_tiny(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}
    (_, features), updates = jax.eval_shape(
        lambda v: model.apply(v, images, train=True, return_features=True, mutable=['batch_stats']), variables
    )
    assert features['feature_map'].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype('float32')}
    logits = jax.jit(lambda v: model.apply(v, images))(variables)
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - inference_logits).max() < 0.03 * np.abs(inference_logits).max()


def test_memory_of_training():
    """Where the text-book network keeps a joined map of every layer, ours keeps one, and less if it computes again."""
    images = jnp.zeros((4, 64, 64, 3))
    sizes = {'stage_sizes': (16, 1, 1, 1), 'growth_rate': 16, 'num_classes': 4}
    networks = {remat: models.DenseNet(**sizes, remat=remat) for remat in ('none', 'dense_layers')}
    networks['text-book'] = TextBookDenseNet(**sizes)
    # What LLVM makes of the loops does not change what they keep.
    quick = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
    kept = {}
    for name, network in networks.items():

        def loss(params, batch_stats, network=network):
            variables = {'params': params, 'batch_stats': batch_stats}
            return network.apply(variables, images, train=True, mutable=['batch_stats'])[0].sum()

        variables = jax.eval_shape(network.init, jax.random.key(0), images)
        compiled = jax.jit(jax.grad(loss)).lower(variables['params'], variables['batch_stats']).compile(quick)
        kept[name] = compiled.memory_analysis().temp_size_in_bytes
    assert kept['none'] < 0.5 * kept['text-book']
    assert kept['dense_layers'] < 0.45 * kept['text-book']


def test_unknown_remat():
    with pytest.raises(ValueError, match="remat is 'some': use 'none', 'dense_layers' or 'full'"):
        jax.eval_shape(make_tiny(remat='some').init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_unknown_batch_norm():
    with pytest.raises(ValueError, match="batch_norm is 'eval': use 'train' or 'frozen'"):
        jax.eval_shape(make_tiny(batch_norm='eval').init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_head_channels():
    # The shapes of DenseNet121: its stages 3, 4 and 5 end with 512, 1,024 and 1,024 channels.
    for head, channels in models.head_channels([512, 1024, 1024]).items():
        network = models.DenseNet121(head=head, num_classes=4)
        shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        assert shapes['params']['predictions']['kernel'].shape == (channels, 4)


def test_unknown_head():
    with pytest.raises(ValueError, match="head is 'narrow': use 'last' or 'wide'"):
        jax.eval_shape(make_tiny(head='narrow').init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_pool_widely():
    maps = [
        np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32) for size in ((7, 14), (1, 2), (3, 4))
    ]
    middles = [maps[0][:, 2:5, 4:10], maps[1], maps[2][:, 1:2, 1:3]]
    expected = [x.mean(axis=(1, 2)) for pair in zip(maps, middles, strict=True) for x in pair]
    np.testing.assert_allclose(models.pool_widely(maps), np.concatenate(expected, axis=1), atol=1e-6)


# Against Keras; the logits are compared in test_pretrained.py.


def test_names_and_odd_sizes_are_those_of_keras():
    reference = keras.applications.DenseNet121(weights=None, input_shape=(75, 61, 3), classes=4)
    model = models.DenseNet121(num_classes=4)
    images = jax.ShapeDtypeStruct((1, 75, 61, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    names = {'_'.join(path[1:-1]) for path in flatten_dict(variables)}
    assert names == {layer.name for layer in reference.layers if layer.weights}
    _, features = jax.eval_shape(lambda v, x: model.apply(v, x, return_features=True), variables, images)
    assert features['feature_map'].shape[1:] == reference.get_layer('relu').output.shape[1:] == (2, 2, 1024)


@pytest.mark.parametrize('dtype', [np.uint8, np.float32])
def test_normalize(dtype):
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 6)).astype(dtype)
    colour = np.repeat(images[..., None], 3, axis=-1).astype(np.float32)
    expected = keras.applications.densenet.preprocess_input(colour.copy())
    result = models.normalize(images)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, expected, atol=1e-6)
