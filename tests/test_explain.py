"""Tests of brain_jax.serving.explain: against sums by hand, other gradients, and spots that were planted."""

import functools
import io
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats
from sklearn.linear_model import LogisticRegression

from brain_jax import InputError, models, parallel, train
from brain_jax.serving import explain, predictor

get_config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / 'configs/densenet121.py'))['get_config']
CLASSES = np.array([0, 3, 1], np.int32)


def make_variables(model, seed=0):
    """Returns random variables with statistics far from 0 and 1."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    rng = np.random.default_rng(seed)
    draw = {
        'kernel': lambda shape: rng.normal(0, (2 / np.prod(shape[:-1])) ** 0.5, shape),
        'bias': lambda shape: rng.normal(0, 0.5, shape),
        'scale': lambda shape: rng.uniform(0.5, 1.5, shape),
        'mean': lambda shape: rng.normal(0, 0.3, shape),
        'var': lambda shape: rng.uniform(0.5, 2, shape),
    }
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: draw[path[-1].key](leaf.shape).astype(np.float32), shapes
    )


def make_predictor(head='last', image_size=64, num_classes=4, flips=True):
    """Returns a `Predictor` of a tiny network with random weights, as if it were a run's."""
    config = get_config('scratch')
    config.update(model='_DenseNetTiny', head=head, image_size=image_size, average_flips=flips)
    model = train.create_model(config, num_classes)
    return with_variables(
        predictor.Predictor(
            workdir=pathlib.Path('run'), run={}, config=config, class_names=tuple('abcd')[:num_classes], model=model,
            variables={}, step=0, checkpoint_sha256='', temperature=1.0, threshold=0.0, detector=None, answer=None,
        ),
        make_variables(model),
    )  # fmt: skip


def with_variables(loaded, variables):
    answer = predictor.make_answer(loaded.model, loaded.config, variables, parallel.make_mesh())
    return loaded._replace(variables=variables, answer=answer)


def draw_images(size, count=3, seed=0):
    """Draws smooth random images, uint8 [count, size, size], with nothing alike in their halves."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, size // 8, size // 8), np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size))) for image in coarse])


def corners(maps):
    """Returns the four corners of maps [n, height, width], where interpolation leaves the cells as they are."""
    return maps[:, [0, 0, -1, -1], [0, -1, 0, -1]]


# How cells lie in the image.


def test_placement_by_hand():
    # Two cells of two pixels, centres at 1 and 3: the second's part is 0 before 1, x/2 - 1/2 between, 1 from 3 on. Its
    # means over the four pixels are 0, 1/4, 3/4 and 1.
    np.testing.assert_allclose(explain.placement(2, 2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]], atol=1e-6)
    # A fifth pixel that no cell covers: the others get 5/4 of it.
    expected = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1], [0, 0]]) * 1.25
    np.testing.assert_allclose(explain.placement(2, 2, 5), expected, atol=1e-6)


@pytest.mark.parametrize('cells, cell, side', [(2, 32, 64), (3, 32, 112), (7, 16, 112), (7, 32, 224), (19, 4, 75)])
def test_placement_keeps_means(cells, cell, side):
    rows = explain.placement(cells, cell, side)
    values = np.random.default_rng(0).normal(size=cells)
    assert (rows @ values).mean() == pytest.approx(values.mean(), abs=1e-6)
    covered = min(cells * cell, side)
    np.testing.assert_allclose(rows[:covered] @ np.ones(cells), side / covered, rtol=1e-5)
    assert not rows[covered:].any()
    # Where a cell is the only one that is not 0, the map is highest in it.
    for i, column in enumerate(rows.T):
        assert i * covered / cells <= column.argmax() < (i + 1) * covered / cells


# Class-activation maps.


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, batch):
    """Returns logits and outputs of the network for the images themselves."""
    return model.apply(variables, models.normalize(batch), return_features=True)


@pytest.mark.parametrize(
    'size, head, flips',
    [(64, 'last', False), (64, 'wide', True), (96, 'wide', False), (112, 'last', True), (112, 'wide', True)],
)
def test_mean_of_the_map_is_the_logit(size, head, flips):
    loaded, batch = make_predictor(head, size, flips=flips), draw_images(size)
    views = [batch, batch[:, :, ::-1]] if flips else [batch]
    logits = np.mean([apply(loaded.model, loaded.variables, view)[0] for view in views], axis=0)
    heat = explain.class_activation(loaded, batch, CLASSES, weigh=jax.nn.one_hot)
    assert heat.shape == (3, size, size) and heat.dtype == np.float32
    expected = logits[np.arange(3), CLASSES]
    np.testing.assert_allclose(heat.mean(axis=(1, 2), dtype=np.float64), expected, rtol=1e-4, atol=1e-4)


def test_unless_told_otherwise_the_predicted_class_is_compared_with_the_others():
    loaded, batch = make_predictor(), draw_images(64)
    logits, _ = loaded.answer(batch)
    best = logits.max(axis=1)
    expected = best - (logits.sum(axis=1) - best) / 3
    heat = explain.class_activation(loaded, batch)
    np.testing.assert_allclose(heat.mean(axis=(1, 2), dtype=np.float64), expected, rtol=1e-4, atol=1e-4)


def test_map_of_the_last_head_is_a_product():
    loaded, batch = make_predictor(flips=False), draw_images(64)
    _, outputs = apply(loaded.model, loaded.variables, batch)
    head = loaded.variables['params']['predictions']
    expected = np.asarray(outputs['feature_map']) @ head['kernel'] + head['bias']  # [3, 2, 2, 4]
    heat = explain.class_activation(loaded, batch, CLASSES, weigh=jax.nn.one_hot)
    cells = np.stack([expected[i, :, :, c] for i, c in enumerate(CLASSES)])
    np.testing.assert_allclose(corners(heat), corners(cells), rtol=1e-4, atol=1e-4)


def test_map_of_the_wide_head_by_hand():
    loaded, batch = make_predictor('wide', flips=False), draw_images(64)
    _, outputs = apply(loaded.model, loaded.variables, batch)
    ends = [np.asarray(maps) for maps in outputs['stage_ends'][-3:]]
    assert [maps.shape[1] for maps in ends] == [8, 4, 2]
    # The head sees, of each stage, the means of the whole and of the middle: of 2x2 cells all are the middle.
    parts = np.split(
        np.asarray(loaded.variables['params']['predictions']['kernel']),
        np.cumsum(np.repeat([maps.shape[-1] for maps in ends], 2))[:-1],
    )
    shares = [ends[0] @ parts[0], ends[1] @ parts[2], ends[2] @ (parts[4] + parts[5])]
    bias = loaded.variables['params']['predictions']['bias']
    expected = sum(corners(maps) for maps in shares) + bias  # [3, corners, 4]
    heat = explain.class_activation(loaded, batch, CLASSES, weigh=jax.nn.one_hot)
    np.testing.assert_allclose(corners(heat), expected[np.arange(3), :, CLASSES], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('head', ['last', 'wide'])
def test_map_of_the_mirror_image_is_mirrored(head):
    loaded, batch = make_predictor(head), draw_images(64)
    heat, mirrored = (explain.class_activation(loaded, x, CLASSES) for x in (batch, batch[:, :, ::-1]))
    np.testing.assert_allclose(heat, mirrored[:, :, ::-1], atol=1e-4)
    assert np.abs(heat - mirrored).max() > 0.1


def test_contrast_is_free_of_what_all_classes_share():
    loaded, batch = make_predictor(), draw_images(64)
    head = loaded.variables['params']['predictions']
    shared = np.random.default_rng(0).normal(size=(len(head['kernel']), 1)).astype(np.float32)
    moved = with_variables(
        loaded, loaded.variables | {'params': loaded.variables['params'] | {'predictions': {
            'kernel': head['kernel'] + shared, 'bias': head['bias'] + 3
        }}}
    )  # fmt: skip
    before, after = (explain.class_activation(x, batch, CLASSES) for x in (loaded, moved))
    np.testing.assert_allclose(after, before, atol=1e-4)
    before, after = (explain.class_activation(x, batch, CLASSES, weigh=jax.nn.one_hot) for x in (loaded, moved))
    assert np.abs(after - before).min() > 0.1


def test_compiled_once_for_each_size_of_batch():
    loaded = make_predictor()
    explain.class_activation(loaded, draw_images(64))
    explain.grad_cam(loaded, draw_images(64))
    counts = [step._cache_size() for step in (explain.activation_step, explain.grad_cam_step)]
    for count in (2, 8, 10):
        images = draw_images(64, count, seed=count)
        assert explain.class_activation(loaded, images, np.zeros(count)).shape == images.shape
    explain.grad_cam(make_predictor(), draw_images(64, 10), np.ones(10))  # loaded anew
    # 10 images are more than 8, so that those for 64 are compiled as well.
    assert explain.activation_step._cache_size() == counts[0] + 1
    assert explain.grad_cam_step._cache_size() == counts[1]


# Grad-CAM.


@pytest.mark.parametrize('weigh', [explain.contrast, jax.nn.one_hot])
def test_grad_cam_at_the_last_map_is_the_positive_part_of_the_exact_map(weigh):
    loaded, batch = make_predictor(image_size=96), draw_images(96)
    exact = explain.class_activation(loaded, batch, CLASSES, weigh=weigh)
    bias = np.asarray(weigh(CLASSES, 4)) @ loaded.variables['params']['predictions']['bias']
    found = explain.grad_cam(loaded, batch, CLASSES, layer='relu', weigh=weigh)
    expected = np.maximum(exact - bias[:, None, None], 0) / 9  # 3 x 3 cells: the gradient is that of their mean
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert (found > 0).any() and (found == 0).any()


@pytest.mark.parametrize('head', ['last', 'wide'])
def test_grad_cam_of_an_inner_layer_by_gradients_of_its_offsets(head):
    # Where a ReLU lets everything pass, the gradient of an offset before it is the sum of the map's over all cells.
    loaded, batch = make_predictor(head, flips=False), draw_images(64, 1)
    params = jax.tree.map(jnp.asarray, loaded.variables['params'])
    params['pool4_bn']['bias'] += 20
    loaded = with_variables(loaded, loaded.variables | {'params': params})

    def logit(bias):  # differentiates with respect to a parameter, not to a map
        changed = params | {'pool4_bn': params['pool4_bn'] | {'bias': bias}}
        variables = loaded.variables | {'params': changed}
        logits, outputs = loaded.model.apply(variables, models.normalize(batch), return_features=True)
        return logits[0, 2], outputs['stage_ends'][2]

    gradients, maps = jax.jit(jax.grad(logit, has_aux=True))(params['pool4_bn']['bias'])
    assert maps.shape[1:3] == (4, 4) and maps.min() > 0
    expected = np.maximum(np.asarray(maps) @ np.asarray(gradients) / 16, 0)
    found = explain.grad_cam(loaded, batch, np.array([2]), weigh=jax.nn.one_hot)
    np.testing.assert_allclose(corners(found), corners(expected), rtol=1e-3, atol=1e-4)
    assert expected.max() > 0.1


# Occlusion.


def test_occlusion_of_a_network_that_is_a_weighted_sum():
    factors = np.random.default_rng(0).normal(size=(32, 32, 4)) / 1000
    loaded = make_predictor(image_size=32)
    loaded = loaded._replace(answer=lambda images: (np.einsum('nhw,hwc->nc', images, factors), None))
    batch = draw_images(32)
    found = explain.occlusion(loaded, batch, CLASSES, patch=8, stride=8)
    mean = np.round(batch.mean(axis=(1, 2), keepdims=True))
    for i, label in enumerate(CLASSES):
        weights = factors[..., label] - (factors.sum(axis=-1) - factors[..., label]) / 3
        lost = ((batch[i] - mean[i]) * weights).reshape(4, 8, 4, 8).sum(axis=(1, 3))
        np.testing.assert_allclose(found[i], lost.repeat(8, axis=0).repeat(8, axis=1), rtol=1e-4, atol=1e-5)


def test_squares_that_overlap_cover_every_pixel():
    masks = explain._squares(10, 4, 3)  # from 0, 3 and 6
    assert masks.shape == (9, 10, 10) and np.all(masks.sum(axis=(1, 2)) == 16)
    # Rows 0 to 2 are covered once, row 3 twice, rows 4 and 5 once, and so on.
    once = [1, 1, 1, 2, 1, 1, 2, 1, 1, 1]
    np.testing.assert_array_equal(masks.sum(axis=0), np.outer(once, once))
    np.testing.assert_array_equal(np.unique(np.argwhere(explain._squares(10, 4, 4))[:, 1]), range(10))


def test_what_cannot_be_explained():
    loaded, batch = make_predictor(image_size=32), draw_images(32, 2)
    with pytest.raises(InputError, match="layer is 'conv1': use one of pool2_relu, pool3_relu, pool4_relu, relu"):
        explain.grad_cam(loaded, batch, layer='conv1')
    with pytest.raises(InputError, match=r'classes to explain are \[0, 4\]: give numbers from 0 to 3'):
        explain.class_activation(loaded, batch, [0, 4])
    with pytest.raises(InputError, match='patch is 4 and stride 5: give 1 <= stride <= patch <= 32'):
        explain.occlusion(loaded, batch, patch=4, stride=5)


# A network that knows bright spots: random but for its head, which is fitted to tell images with a spot from others.


def plant(count, seed, size=128):
    """Draws noise, every other image with a bright spot of 20 pixels: images, masks, labels."""
    rng = np.random.default_rng(seed)
    batch = rng.normal(80, 20, (count, size, size))
    masks = np.zeros(batch.shape, bool)
    for mask in masks[1::2]:
        row, column = rng.integers(0, size - 20, 2)
        mask[row : row + 20, column : column + 20] = True
    batch[masks] += 120
    return np.clip(batch, 0, 255).astype(np.uint8), masks, masks.any(axis=(1, 2)).astype(int)


@pytest.fixture(scope='module')
def spotter():
    """A `Predictor` that finds spots."""
    loaded = make_predictor('wide', image_size=128, num_classes=2)
    batch, _, labels = plant(160, seed=1)
    _, pooled = loaded.answer(batch)
    mean, deviation = pooled.mean(axis=0), pooled.std(axis=0) + 1e-6
    fitted = LogisticRegression(C=0.1, max_iter=1000).fit((pooled - mean) / deviation, labels)
    column = fitted.coef_[0] / deviation
    offset = fitted.intercept_[0] - mean @ column
    head = {
        'kernel': np.stack([-column, column], axis=1).astype(np.float32) / 2,
        'bias': np.array([-offset, offset], np.float32) / 2,
    }
    return with_variables(loaded, loaded.variables | {'params': loaded.variables['params'] | {'predictions': head}})


METHODS = {
    'class_activation': explain.class_activation,
    'grad_cam': functools.partial(explain.grad_cam, layer='pool3_relu'),
    'occlusion': functools.partial(explain.occlusion, patch=32, stride=16),
}


@pytest.mark.parametrize('method', METHODS)
def test_planted_spots_are_found(spotter, method):
    batch, masks, labels = (x[1::2] for x in plant(32, seed=2))
    logits, _ = spotter.answer(batch)
    assert np.mean(logits.argmax(axis=1) == labels) > 0.9
    heat = METHODS[method](spotter, batch, labels)
    points = heat.reshape(len(heat), -1).argmax(axis=1)
    distances = np.stack([ndimage.distance_transform_edt(~mask) for mask in masks]).reshape(len(heat), -1)
    assert np.mean(distances <= 12) < 0.15  # what a random point hits
    assert np.mean(distances[np.arange(len(heat)), points] <= 12) > 0.8


def test_random_weights_destroy_the_map(spotter):
    """The check of Adebayo et al. (2018): rank correlation of the pixels, mean over images."""
    batch, _, labels = (x[1::2] for x in plant(16, seed=3))

    def correlation(variables):
        maps = [
            explain.class_activation(with_variables(spotter, v), batch, labels) for v in (spotter.variables, variables)
        ]
        return np.mean([stats.spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(*maps, strict=True)])

    rng = np.random.default_rng(0)
    nearly = jax.tree.map(lambda x: (x * rng.normal(1, 0.001, x.shape)).astype(np.float32), spotter.variables)
    assert correlation(nearly) > 0.9
    head = spotter.variables['params']['predictions']
    other_backbone = make_variables(spotter.model, seed=5)
    assert correlation(other_backbone | {'params': other_backbone['params'] | {'predictions': head}}) < 0.5


# Pictures.


def test_colours():
    signed = np.array([[-2.0, -1.0], [0.0, 1.0]])
    found = explain.colour(signed)
    assert found.shape == (2, 2, 4) and found.dtype == np.uint8
    opacity = found[..., 3].astype(int)
    assert opacity[1, 0] <= 2 and opacity[0, 0] > 200 and abs(opacity[0, 1] - opacity[1, 1]) <= 2
    assert opacity[0, 1] == pytest.approx(opacity[0, 0] / 2, abs=2)
    red, blue = found[..., 0].astype(int), found[..., 2].astype(int)
    assert red[1, 1] > blue[1, 1] and red[0, 1] < blue[0, 1]  # warm for the class, cold against it
    assert not explain.colour(np.zeros((2, 2)))[..., 3].any()
    assert explain.scale_of(signed)[1] == (-2, 2) and explain.scale_of(np.abs(signed))[1] == (0, 2)


@pytest.mark.parametrize('scale', [1, 0, 1e-8])
def test_overlay(scale):
    image = np.full((64, 64), 100, np.uint8)
    heat = np.zeros((64, 64))
    heat[16:32, 8:24] = scale
    drawn = {}
    for name, title in (('with', 'glioma 93.4 %'), ('without', '')):
        with Image.open(io.BytesIO(explain.draw_overlay(image, heat, title))) as picture:
            assert picture.format == 'PNG'
            drawn[name] = np.asarray(picture.convert('RGB')).astype(int)
    assert drawn['with'].shape[1] > 600
    saturation = np.ptp(drawn['without'], axis=2)
    half = saturation.shape[1] // 2
    assert saturation[:, : half - 60].max() == 0  # the image itself is grey
    assert (saturation[:, half - 60 : -150].max() > 50) == (scale > 0)  # and what lies on it is not
