"""Tests of brain_jax.evaluation.out_of_distribution."""

import numpy as np
import pytest
from sklearn import decomposition, preprocessing

from brain_jax.evaluation import out_of_distribution


@pytest.fixture
def pooled():
    """Features of 300 training and 100 validation images, of unequal spread and not centred: float32 [n, 12]."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((12, 12)) * np.logspace(-2, 1, 12)
    return np.split((rng.standard_normal((400, 12)) @ mixing + 5).astype(np.float32), [300])


@pytest.mark.parametrize('components', [3, 11])
def test_distances_are_those_of_a_normal_distribution(pooled, monkeypatch, components):
    train, validation = pooled
    monkeypatch.setattr(out_of_distribution, 'COMPONENTS', components)
    detector = out_of_distribution.fit(train, validation)
    # scikit-learn's own covariance of probabilistic principal components.
    scaler = preprocessing.StandardScaler().fit(train.astype(np.float64))
    model = decomposition.PCA(components).fit(scaler.transform(train.astype(np.float64)))
    centred = scaler.transform(validation.astype(np.float64))
    expected = np.sqrt(np.einsum('ni,ij,nj->n', centred, np.linalg.inv(model.get_covariance()), centred))
    np.testing.assert_allclose(out_of_distribution.distances(detector, validation), expected, rtol=1e-6)


@pytest.mark.parametrize('false_alarms', [0.05, 0.2])
def test_threshold_is_passed_by_the_wanted_share(pooled, false_alarms):
    train, validation = pooled
    detector = out_of_distribution.fit(train, validation, false_alarms)
    beyond = out_of_distribution.distances(detector, validation) > detector.threshold
    assert beyond.mean() == pytest.approx(false_alarms, abs=0.01)
    # What lies off in a direction in which training images hardly differ is farther away than what lies off as far in
    # one in which they do.
    standardised = (train - train.mean(axis=0)) / train.std(axis=0)
    directions = np.linalg.svd(standardised, full_matrices=False)[2]
    usual, unusual = train.mean(axis=0) + 2 * directions[[0, -1]] * train.std(axis=0)
    near, far = out_of_distribution.distances(detector, np.stack([usual, unusual]))
    assert near < detector.threshold < far


def test_fewer_images_than_channels():
    rng = np.random.default_rng(0)
    train, validation = np.split(rng.standard_normal((30, 64)).astype(np.float32), [20])
    detector = out_of_distribution.fit(train, validation)
    distances = out_of_distribution.distances(detector, np.concatenate([validation, 100 * validation]))
    assert np.all(np.isfinite(distances)) and np.all(distances[10:] > detector.threshold)


def test_kept_with_the_run(pooled, tmp_path):
    assert out_of_distribution.load(tmp_path, 'a' * 64) is None
    detector = out_of_distribution.fit(*pooled)
    out_of_distribution.save(tmp_path, detector, 'a' * 64)
    assert out_of_distribution.load(tmp_path, 'b' * 64) is None
    loaded = out_of_distribution.load(tmp_path, 'a' * 64)
    distances = out_of_distribution.distances(loaded, pooled[1])
    np.testing.assert_array_equal(distances, out_of_distribution.distances(detector, pooled[1]))
    assert loaded.threshold == detector.threshold
