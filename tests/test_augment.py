"""Tests of brain_jax.augment: what it did to an image is measured on the result, or found with SciPy."""

import itertools

import jax
import numpy as np
import pytest
import scipy.ndimage
import scipy.optimize

from brain_jax import augment
from configs import densenet121

SIZE = 32
NUM_DRAWS = 256
INDEX = np.arange(NUM_DRAWS, dtype=np.int32)
NOISE = np.random.default_rng(0).integers(0, 256, (8, SIZE, SIZE), np.uint8)
ROWS, COLUMNS = np.indices((SIZE, SIZE)) - (SIZE - 1) / 2
BLOB = 200 * np.exp(-(ROWS**2) / (2 * 1.5**2) - COLUMNS**2 / (2 * 3**2))  # in the centre, twice as wide as high


def make_config(**changes):
    """The ranges of augmentation, all zero but for the changes."""
    config = densenet121.get_config().augment
    zero = {name: type(value)(0) for name, value in config.items()}
    assert {'flip_horizontal', 'rotation', 'zoom', 'shift', 'brightness', 'contrast'} < zero.keys()
    config.update(zero)
    config.update(changes)
    return config


def draw(image, seed=0, **changes):
    """Returns `NUM_DRAWS` variants of an image: float32 [draws, height, width]."""
    config = make_config(**changes)
    augment_batch = jax.jit(lambda images: augment.augment_batch(jax.random.key(seed), images, INDEX, config))
    return np.asarray(augment_batch(np.broadcast_to(image, (NUM_DRAWS, *image.shape))))


def assert_fills(values, low, high):
    """Checks that values lie in a range, and spread over it as even ones do."""
    assert low - 1e-3 * (high - low) <= min(values)
    assert max(values) <= high + 1e-3 * (high - low)
    # For even values the chance of a miss is below 1e-5.
    assert np.histogram(values, 20, (low, high))[0].min() > 0
    assert abs(np.mean(values) - (low + high) / 2) < 0.1 * (high - low)


def test_zero_ranges_change_nothing():
    np.testing.assert_array_equal(draw(NOISE[0]), np.broadcast_to(NOISE[0], (NUM_DRAWS, SIZE, SIZE)))


@pytest.mark.parametrize('axes', [(2,), (1,), (1, 2)])
def test_flips(axes):
    results = draw(NOISE[0], flip_vertical=1 in axes, flip_horizontal=2 in axes)
    variants = [NOISE[0]]
    for axis in axes:
        variants += [np.flip(variant, axis - 1) for variant in variants]
    differences = np.array([np.abs(results - variant).max(axis=(1, 2)) for variant in variants])
    counts = np.bincount(differences.argmin(axis=0), minlength=len(variants))
    assert differences.min(axis=0).max() == 0
    assert min(counts) > 0.6 * NUM_DRAWS / len(variants)


def test_rotation():
    results = draw(BLOB, rotation=15.0)
    # The long axis of the blob, from its second moments.
    angles = []
    for result in results:
        row_row, column_column, row_column = (
            np.sum(result * product) for product in (ROWS**2, COLUMNS**2, ROWS * COLUMNS)
        )
        angles.append(np.rad2deg(np.arctan2(2 * row_column, column_column - row_row) / 2))
    assert_fills(angles, -15, 15)

    # Every pixel is where SciPy turns it, at the angle that fits best.
    for result in results[:4]:
        fit = scipy.optimize.minimize_scalar(
            lambda angle, result=result: np.abs(rotate(angle) - result).max(), bounds=(-16, 16), method='bounded'
        )
        assert fit.fun < 0.02
        assert abs(fit.x) > 0.5


def rotate(angle):
    return scipy.ndimage.rotate(BLOB, angle, reshape=False, order=1)


def test_zoom():
    # From the area that a wide blob covers: interpolation between pixels hardly changes it.
    wide = 200 * np.exp(-(ROWS**2 + COLUMNS**2) / (2 * 3**2))
    assert_fills(np.sqrt(draw(wide, zoom=0.2).sum(axis=(1, 2)) / wide.sum()), 0.8, 1.2)


def test_shift():
    """By fractions of the side, in both directions and independently."""
    results = draw(BLOB[:, 4:-4], shift=0.1)
    centres = np.array([scipy.ndimage.center_of_mass(result) for result in results])
    rows, columns = (centres - (np.array([SIZE, SIZE - 8]) - 1) / 2).T
    assert_fills(rows, -0.1 * SIZE, 0.1 * SIZE)
    assert_fills(columns, -0.1 * (SIZE - 8), 0.1 * (SIZE - 8))
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.2


def test_brightness():
    results = draw(NOISE[0] / 2, brightness=0.15)
    factors = results.mean(axis=(1, 2)) / (NOISE[0] / 2).mean()
    assert_fills(factors, 0.85, 1.15)
    np.testing.assert_allclose(results, factors[:, None, None] * (NOISE[0] / 2), atol=1e-3)


def test_contrast():
    image = 64 + NOISE[0] / 2
    results = draw(image, contrast=0.3)
    factors = results.std(axis=(1, 2)) / image.std()
    assert_fills(factors, 0.7, 1.3)
    expected = image.mean() + factors[:, None, None] * (image - image.mean())
    np.testing.assert_allclose(results, expected, atol=1e-3)


def test_geometry_is_that_of_scipy():
    """All of it together on noise, where every neighbour counts."""
    config = make_config(rotation=40.0, zoom=0.2, shift=0.1, flip_horizontal=True, flip_vertical=True)
    key = jax.random.key(0)
    image = np.pad(NOISE[0, 8:-8, 8:-8], 8)  # SciPy does not blend pixels at the edge with what lies outside
    result = jax.jit(lambda: augment.augment_image(key, image.astype(np.float32), config))()
    matrix, offset = augment.draw_transform(jax.random.split(key, 3)[0], config)
    matrix, offset = np.asarray(matrix, float), np.asarray(offset, float)
    centre = np.full(2, (SIZE - 1) / 2)
    expected = scipy.ndimage.affine_transform(
        image.astype(float), matrix, centre - matrix @ centre + SIZE * offset, order=1
    )
    np.testing.assert_allclose(result, expected, atol=0.02)
    # A similarity, up to a mirror.
    np.testing.assert_allclose(matrix.T @ matrix, abs(np.linalg.det(matrix)) * np.eye(2), atol=1e-6)


def test_products_interpolate_as_scipy_does():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (24, 31)).astype(np.float32)
    rows, columns = rng.uniform(-3, 26, (40, 50)).astype(np.float32), rng.uniform(-3, 33, (40, 50)).astype(np.float32)
    rows[0], columns[0] = np.arange(-2, 48) / 2, np.arange(-2, 48) / 2  # on the pixels, on the edge, just outside
    expected = scipy.ndimage.map_coordinates(np.pad(image, 4), [rows + 4, columns + 4], order=1)
    products = augment._interpolate_by_products(image, rows, columns)  # what a TPU computes
    np.testing.assert_allclose(products, expected, atol=1e-3)
    np.testing.assert_allclose(augment.interpolate(image, rows, columns), expected, atol=1e-3)


def test_values_stay_in_range():
    results = draw(NOISE[0], brightness=0.9, contrast=0.9, rotation=15.0)
    assert results.dtype == np.float32
    assert (results.min(), results.max()) == (0, 255)  # both limits are met


def test_place_and_batch_do_not_matter():
    """Same key and index, same pixels; another key or index, others."""
    config = make_config(flip_horizontal=True, rotation=15.0, zoom=0.1, shift=0.05, brightness=0.15, contrast=0.2)
    augment_batch = jax.jit(lambda *args: augment.augment_batch(*args, config))
    key, index = jax.random.key(7), np.array([5, 3, 900, 4, 0, 1, 2, 77], np.int32)
    results = np.asarray(augment_batch(key, NOISE, index))
    order = [6, 2, 7, 0, 1, 5, 3, 4]
    np.testing.assert_array_equal(augment_batch(key, NOISE[order], index[order]), results[order])
    # For another size XLA compiles another program, which may round otherwise.
    np.testing.assert_allclose(augment_batch(key, NOISE[3:6], index[3:6]), results[3:6], atol=5e-3)

    same = np.broadcast_to(NOISE[0], NOISE.shape)
    steps = [np.asarray(augment_batch(jax.random.fold_in(key, step), same, index)) for step in (0, 1)]
    for one, other in itertools.combinations(np.concatenate(steps), 2):
        assert np.abs(one - other).max() > 1


# Mixup.

IMAGES = np.stack([np.full((2, 2), value, np.float32) for value in (0, 50, 100)])
TARGETS = np.array([[1, 0, 0], [0, 1, 0], [0, 0.25, 0.75]], np.float32)


@pytest.mark.parametrize(
    ('alpha', 'values', 'targets'),
    [
        # Shares near 1/2: halves of the first and the last; the one in the middle meets itself.
        (1e7, (50, 50, 50), [[0.5, 0.125, 0.375], [0, 1, 0], [0.5, 0.125, 0.375]]),
        # Shares near 0 and 1: all stays.
        (1e-3, (0, 50, 100), TARGETS),
    ],
)
def test_mixup_limits(alpha, values, targets):
    mixed, mixed_targets = augment.mixup(jax.random.key(0), IMAGES, TARGETS, alpha)
    np.testing.assert_allclose(mixed, np.broadcast_to(np.reshape(values, (3, 1, 1)), (3, 2, 2)), atol=0.1)
    np.testing.assert_allclose(mixed_targets, targets, atol=1e-3)


def test_mixup_shares():
    keys = jax.random.split(jax.random.key(0), NUM_DRAWS)
    mixed, targets = jax.vmap(lambda key: augment.mixup(key, IMAGES, TARGETS, 1.0))(keys)
    shares = np.asarray(targets[:, 0, 0])  # of the first image; Beta(1, 1) is even
    assert_fills(shares, 0.5, 1)
    np.testing.assert_allclose(targets.sum(axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(mixed[:, 0, 0, 0], 100 * (1 - shares), atol=1e-4)
    np.testing.assert_allclose(mixed[:, 2, 1, 1], 100 * shares, atol=1e-4)
    np.testing.assert_allclose(targets[:, 2, 2], 0.75 * shares, atol=1e-6)
