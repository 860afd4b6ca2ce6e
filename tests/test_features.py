"""Tests of brain_jax.features."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from brain_jax import features, models, parallel
from brain_jax.data import pipeline


def test_centered_learning_is_learning_on_centered_features():
    generator = np.random.default_rng(0)
    inputs = generator.gamma(2.0, 3.0, (40, 5)).astype(np.float32)
    labels = generator.integers(0, 3, 40)
    mean = inputs.mean(axis=0)
    kernel = generator.normal(size=(5, 3)).astype(np.float32)
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.1))

    def loss(params, inputs):
        logits = inputs @ params['predictions']['kernel'] + params['predictions']['bias']
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def learn(params, inputs, mean):
        state = tx.init(params)
        for _ in range(10):
            grads = features.center_gradients(jax.grad(loss)(params, inputs), mean)
            updates, state = tx.update(grads, state)
            params = features.center_update(params, optax.apply_updates(params, updates), mean)
        return params['predictions']

    # A mean of 0 changes nothing: this is plain learning, on centred features.
    expected = learn({'predictions': {'kernel': kernel, 'bias': mean @ kernel}}, inputs - mean, jnp.zeros(5))
    found = learn({'predictions': {'kernel': kernel, 'bias': jnp.zeros(3)}}, inputs, mean)
    np.testing.assert_allclose(found['kernel'], expected['kernel'], atol=1e-4)
    np.testing.assert_allclose(found['bias'] + mean @ found['kernel'], expected['bias'], atol=1e-3)
    assert np.abs(expected['kernel'] - kernel).max() > 0.1


def test_draw_view():
    views = jnp.arange(400.0).reshape(200, 2, 1)
    drawn = np.asarray(features.draw_view(jax.random.key(0), views))[:, 0]
    np.testing.assert_array_equal(drawn // 2, np.arange(200))
    assert 60 < np.sum(drawn % 2) < 140  # each view in about half of the images


def test_features_are_kept_where_they_can_be(tmp_path, caplog):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (5, 32, 32), np.uint8)
    examples = pipeline.Examples(
        images=images,
        index=np.array([1, 3], np.int32),
        labels=np.array([0, 1], np.int32),
        **dict.fromkeys(('file_names', 'sha256', 'groups', 'patients'), np.array(['a', 'b'])),
    )
    model = models._DenseNetTiny(num_classes=2)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    config = ml_collections.ConfigDict({'model': '_DenseNetTiny', 'dtype': 'float32', 'image_size': 32})
    config.update(eval_batch_size=4, augment={'flip_horizontal': True})
    expected = [
        model.apply(variables, models.normalize(view), return_features=True)[1]['pooled']
        for view in (images, images[:, :, ::-1])
    ]
    (tmp_path / 'file').write_text('')

    def load(folder):
        dataset = pipeline.Dataset('', folder, ('x', 'y'), examples, None, examples, '')
        return features.load_features(dataset, model, *variables.values(), config, parallel.make_mesh())

    for folder, kept, warned in ((tmp_path / 'folder', 2, False), (tmp_path / 'file', 0, True)):
        caplog.clear()
        found = load(folder)
        np.testing.assert_allclose(found, np.stack(expected, axis=1), rtol=1e-4, atol=1e-5)
        assert len(list(folder.glob('*'))) == kept
        assert ('cannot be kept' in caplog.text) == warned
    for path in (tmp_path / 'folder').iterdir():  # what is there is used
        np.save(path, np.load(path) + 1)
    np.testing.assert_allclose(load(tmp_path / 'folder'), np.stack(expected, axis=1) + 1, rtol=1e-4, atol=1e-5)
