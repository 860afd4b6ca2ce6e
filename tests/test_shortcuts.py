"""Tests of the probes for shortcuts."""

import io

import numpy as np
import pytest
from PIL import Image

from brain_jax.data import shortcuts

NUM = 40
LABELS = np.arange(NUM) % 2
IS_TEST = np.arange(NUM) >= 24
SINGLES = np.arange(NUM).astype(str)


def measure(image, file_format='PNG'):
    """Returns the features of an image, saved in a format."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, file_format)
    return shortcuts.measure_features(buffer.getvalue(), image if image.ndim == 2 else image[..., 0])


def noise(rng, shape=(40, 40), low=0, high=256):
    return rng.integers(low, high, shape, np.uint8)


def draw(shortcut):
    """Returns the features of NUM images of noise, whose label shows in one way only."""
    rng, found = np.random.default_rng(0), []
    for label in LABELS:
        if shortcut == 'width_height':
            found.append(measure(noise(rng, (40, 50 if label else 60))))
        elif shortcut == 'channels_format':
            found.append(measure(noise(rng), 'PNG' if label else 'BMP'))
        elif shortcut == 'border_background':
            image = noise(rng)
            image[0], image[-1] = 0, 0
            image[:, [0, -1]] = rng.permutation([0, 90]) if label else 45
            found.append(measure(image))
        elif shortcut == 'intensity_histogram':
            found.append(measure(noise(rng, high=[250, 200][label])))
        else:
            found.append(measure(noise(rng)))
    return found


@pytest.mark.parametrize('shortcut', ['width_height', 'channels_format', 'border_background', 'intensity_histogram'])
def test_a_shortcut_is_found(shortcut):
    for scores in shortcuts.score_probes(draw(shortcut), LABELS, IS_TEST, SINGLES):
        assert scores[shortcut] > 0.9
        assert scores['majority'] <= 0.5


def test_noise_has_no_shortcut():
    for scores in shortcuts.score_probes(draw(None), LABELS, IS_TEST, SINGLES):
        assert set(scores) == {'majority', *shortcuts.PROBES}
        assert max(scores.values()) < 0.8


def test_grouped_folds_do_not_know_the_copies():
    rng = np.random.default_rng(0)
    pictures = [measure(noise(rng)) for _ in range(12)]
    features = pictures[:6] * 3 + pictures[6:] * 3  # three copies each
    groups = np.array([f'{half}{i}' for half in (0, 1) for _ in range(3) for i in range(6)])
    labels = np.array([int(group) for group in groups]) % 2
    is_test = np.arange(36) % 18 >= 12
    standard, grouped = shortcuts.score_probes(features, labels, is_test, groups)
    assert standard['nearest_pixels'] == 1
    assert grouped['nearest_pixels'] < 0.8


def test_majority_is_that_of_what_was_fitted():
    labels = np.array([0] * 5 + [1] * 3 + [1, 1, 1, 0])
    features = [measure(np.zeros((8, 8), np.uint8))] * 12
    standard, grouped = shortcuts.score_probes(features, labels, np.arange(12) >= 8, np.arange(12).astype(str))
    assert standard['majority'] == 0.25
    assert 0 <= grouped['majority'] <= 1


def test_one_group_cannot_be_cross_validated():
    labels = np.array([0, 1] * 4)
    features = [measure(np.zeros((8, 8), np.uint8))] * 8
    groups = np.where(labels == 0, 'one', np.arange(8).astype(str))
    standard, grouped = shortcuts.score_probes(features, labels, np.arange(8) >= 4, groups)
    assert standard['majority'] == 0.5
    assert grouped is None


def test_features_of_small_images():
    for shape in ((1, 1), (1, 9), (3, 2)):
        found = measure(np.full(shape, 200, np.uint8))
        assert found['width_height'] == shape[::-1]
        assert found['nearest_pixels'].shape == (32 * 32,)
        np.testing.assert_allclose(found['intensity_histogram'], np.eye(32)[25])
        assert np.isfinite(found['border_background']).all()
    assert measure(np.zeros((4, 4, 3), np.uint8))['channels_format'] == (3, 'PNG')
