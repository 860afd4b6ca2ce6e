"""Tests of brain_jax.features."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from sklearn import preprocessing

from brain_jax import features, models, parallel
from brain_jax.data import pipeline


def test_standardized_head_answers_alike():
    generator = np.random.default_rng(0)
    inputs = generator.gamma(2.0, 3.0, (40, 5)) * [1e-3, 0.1, 1, 10, 100]
    mean, deviation = inputs.mean(axis=0), inputs.std(axis=0)
    kernel, bias = generator.normal(size=(5, 3)), generator.normal(size=3)
    params = {'predictions': {'kernel': kernel, 'bias': bias}, 'bn': {'scale': np.ones(5)}}
    found = features.standardize_head(params, mean, deviation)
    standardized = preprocessing.StandardScaler().fit_transform(inputs)
    answers = standardized @ found['predictions']['kernel'] + found['predictions']['bias']
    np.testing.assert_allclose(answers, inputs @ kernel + bias, rtol=1e-4, atol=1e-3)
    assert np.abs(found['predictions']['kernel'] - kernel).max() > 1
    back = features.restore_head(found, mean, deviation)
    assert back['bn'] is params['bn']
    np.testing.assert_allclose(back['predictions']['kernel'], kernel, rtol=1e-5)
    np.testing.assert_allclose(back['predictions']['bias'], bias, atol=1e-3)


def test_moments_are_those_of_the_training_images():
    views = np.random.default_rng(0).normal(3.0, 2.0, (6, 2, 4)).astype(np.float32)
    views[:, :, 3] = 7  # a channel that never varies
    index = np.array([1, 4, 5], np.int32)
    nothing = dict.fromkeys(('labels', 'file_names', 'sha256', 'groups', 'patients'))
    mean, deviation = features.measure_moments(pipeline.Examples(images=views, index=index, **nothing))
    scaler = preprocessing.StandardScaler().fit(views[index].reshape(6, 4))
    np.testing.assert_allclose(mean, scaler.mean_, rtol=1e-5)
    np.testing.assert_allclose(deviation[:3], scaler.scale_[:3], rtol=1e-5)
    assert deviation[3] == np.float32(1e-6)


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
    config = ml_collections.ConfigDict({'model': '_DenseNetTiny', 'head': 'last', 'dtype': 'float32', 'image_size': 32})
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
