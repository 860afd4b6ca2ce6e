"""Where in an image the evidence for a class lies: class-activation maps, Grad-CAM, and occlusion as a check.

The head is linear in the means of the maps that it sees, so a logit is the mean of a map, exactly: its class-activation
map. Grad-CAM looks into earlier stages, and has to approximate. Occlusion knows nothing of the network and asks what
changes when a part of the image is covered.

All three explain, unless told otherwise, a class's logit less the mean of the others' (see `contrast`). Probabilities
stay as they are when one number is added to all logits, so what the maps of all classes have in common explains no
answer; in this difference it cancels, in a plain logit it does not.

Where a run's answer is the mean of those to an image and to its mirror image, so is the map of its explanation.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from brain_jax import InputError, models, parallel, train
from brain_jax.evaluation import figures
from brain_jax.serving import predictor as predictor_lib

CELLS = {'pool2_relu': 4, 'pool3_relu': 8, 'pool4_relu': 16, 'relu': 32}  # Keras' layer: side of its cells in pixels
PREDICTED = -1  # in the place of a class: the one that is predicted
# Perceptually uniform, warm for a class and cold against it: Crameri's (2018) managua, and matplotlib's inferno.
_SIGNED, _POSITIVE = 'managua_r', 'inferno'
_OPACITY = 0.85  # of the largest value
_GRADIENT_BATCH_SIZES = (1, 8)  # gradients keep the maps of all layers behind theirs


def contrast(classes, num_classes):
    """Returns by how much each logit counts, float32 [n, num_classes]: the class by 1, the mean of the others by -1."""
    chosen = jax.nn.one_hot(classes, num_classes)
    return chosen - (1 - chosen) / (num_classes - 1)


def class_activation(predictor, batch, classes=None, *, weigh=contrast):
    """Maps what speaks for a class and against it, exactly: the map's mean is what is explained.

    The idea is that of Zhou et al. (2016), "Learning deep features for discriminative localization".

    Args:
      predictor: a `Predictor`.
      batch: uint8 [n, size, size], of `Predictor.preprocess`.
      classes: int [n], which class of each image to explain; None: the predicted one.
      weigh: which sum of logits to explain, as a function like `contrast`; `jax.nn.one_hot` for the plain logit.

    Returns:
      float32 [n, size, size], in units of the logits.

    Raises:
      InputError: for a class that is none.
    """
    return _explain(activation_step, predictor, batch, classes, predictor_lib.BATCH_SIZES, weigh=weigh)


def grad_cam(predictor, batch, classes=None, layer='pool4_relu', *, weigh=contrast):
    """Maps what speaks for a class at the end of a stage, after Selvaraju et al. (2017), "Grad-CAM".

    Channels are weighted by their mean gradient, as if what follows were linear. What speaks against is left out.

    Args:
      predictor: a `Predictor`.
      batch: uint8 [n, size, size], of `Predictor.preprocess`.
      classes: int [n], which class of each image to explain; None: the predicted one.
      layer: one of `CELLS`; the earlier, the finer.
      weigh: see `class_activation`.

    Returns:
      float32 [n, size, size], not negative; only its relative heights mean something.

    Raises:
      InputError: for a layer or a class that is none.
    """
    if layer not in CELLS:
        raise InputError(f'layer is {layer!r}: use one of {", ".join(CELLS)}')
    return _explain(grad_cam_step, predictor, batch, classes, _GRADIENT_BATCH_SIZES, layer=layer, weigh=weigh)


def occlusion(predictor, batch, classes=None, *, patch=None, stride=None, weigh=contrast):
    """Maps by how much a class loses when a square of the image is covered, after Zeiler and Fergus (2014).

    Args:
      predictor: a `Predictor`; only what it answers is used.
      batch: uint8 [n, size, size], of `Predictor.preprocess`.
      classes: int [n], which class of each image to explain; None: the predicted one.
      patch: side of the square in pixels; None: an eighth of the image's.
      stride: pixels from one square to the next, at most `patch`; None: half of it.
      weigh: see `class_activation`.

    Returns:
      float32 [n, size, size], in units of the logits: at each pixel the mean over the squares that cover it.

    Raises:
      InputError: for a square that is none, or a class that is none.
    """
    classes = _check_classes(predictor, batch, classes)
    size = batch.shape[1]
    patch = patch or max(1, size // 8)
    stride = stride or max(1, patch // 2)
    if not 1 <= stride <= patch <= size:
        raise InputError(f'patch is {patch} and stride {stride}: give 1 <= stride <= patch <= {size}')
    logits, _ = predictor.answer(batch)
    classes = np.where(classes == PREDICTED, logits.argmax(axis=1), classes)
    weights = np.asarray(weigh(classes, logits.shape[1]), np.float64)
    masks = _squares(size, patch, stride)
    heats = [_occlude(predictor.answer, *row, masks) for row in zip(batch, logits, weights, strict=True)]
    return np.stack(heats) if heats else np.zeros(batch.shape, np.float32)


def draw_overlay(image, heat, title, *, label='evidence (difference of logits)'):
    """Draws an image, and beside it the image under a map with a colour bar.

    Args:
      image: uint8 [size, size].
      heat: float [size, size], of this module.
      title: such as the class and its probability.
      label: what the numbers of the bar are.

    Returns:
      The bytes of a PNG file.
    """
    shades, limits = scale_of(heat)
    pixels = figures.draw_overlay(image, colour(heat), title, shades, limits, label)
    return figures.to_png(pixels)


def colour(heat):
    """Colours a map, to be laid over its image.

    Args:
      heat: float [size, size].

    Returns:
      uint8 [size, size, 4]: red, green, blue and opacity, which grows with the distance from 0.
    """
    shades, (low, high) = scale_of(heat)
    places = (np.asarray(heat, np.float64) - low) / (high - low)
    return np.round(255 * shades(places)).astype(np.uint8)


def scale_of(heat):
    """Returns the colours of a map and the values at their ends: symmetric where values have both signs.

    The colours are perceptually uniform. Opacity is part of them: nothing at 0, and most at the largest value.

    Args:
      heat: float array.

    Returns:
      A `matplotlib.colors.ListedColormap` and (low, high).
    """
    limit = float(np.max(np.abs(heat), initial=0)) or 1.0
    signed = np.min(heat, initial=0) < 0
    places = np.linspace(-1 if signed else 0, 1, 511)
    shades = matplotlib.colormaps[_SIGNED if signed else _POSITIVE](np.linspace(0, 1, len(places)))
    shades[:, 3] = _OPACITY * np.abs(places)
    return matplotlib.colors.ListedColormap(shades), (-limit if signed else 0.0, limit)


@functools.partial(jax.jit, static_argnames=('model', 'flips', 'weigh'))
def activation_step(model, variables, batch, classes, *, flips, weigh=contrast):
    """Computes class-activation maps; see `class_activation`.

    Args:
      model: a `DenseNet`.
      variables: its `params` and `batch_stats`.
      batch: uint8 [n, height, width].
      classes: int [n]; `PREDICTED` for the predicted one.
      flips: whether the answer is the mean over the image and its mirror image, see `train.averages_flips`.
      weigh: see `class_activation`.

    Returns:
      float32 [n, height, width].
    """
    views = _views(batch, flips)
    logits, outputs = model.apply(variables, models.normalize(views), return_features=True)
    weights = _weights(logits, classes, flips, weigh)
    head = variables['params']['predictions']
    by_channel = jnp.matmul(weights, head['kernel'].T, precision='highest')
    seen = outputs['stage_ends'][-1:] if model.head == 'last' else outputs['stage_ends'][-3:]
    seen = [maps.astype(jnp.float32) for maps in seen]
    # The head averages and sums: of what is linear the gradient is the factor of every value.
    factors = jax.grad(lambda seen: jnp.sum(by_channel * models.pool_stages(model.head, seen)))(seen)
    heat = jnp.matmul(weights, head['bias'], precision='highest')[:, None, None]
    for maps, factor, cell in zip(seen, factors, list(CELLS.values())[-len(seen) :], strict=True):
        shares = jnp.sum(maps * factor, axis=-1)
        heat = heat + _place(shares * shares[0].size, cell, batch.shape[1:])
    return _join_views(heat, flips)


@functools.partial(jax.jit, static_argnames=('model', 'flips', 'layer', 'weigh'))
def grad_cam_step(model, variables, batch, classes, *, flips, layer, weigh=contrast):
    """Computes Grad-CAM at the end of a stage; see `grad_cam` and, for the arguments, `activation_step`."""
    views = models.normalize(_views(batch, flips))
    stage, norm = list(CELLS).index(layer), layer.replace('relu', 'bn')

    def apply(offset):
        def add_offset(call, args, kwargs, context):
            is_end = context.module.name == norm and context.method_name == '__call__'
            return call(*args, **kwargs) + offset if is_end else call(*args, **kwargs)

        with nn.intercept_methods(add_offset):
            return model.apply(variables, views, return_features=True)

    def score(offset):
        logits, outputs = apply(offset)
        return jnp.sum(logits * _weights(logits, classes, flips, weigh)), outputs['stage_ends'][stage]

    shape = jax.eval_shape(apply, 0)[1]['stage_ends'][stage]
    gradients, maps = jax.grad(score, has_aux=True)(jnp.zeros(shape.shape, shape.dtype))
    maps, channel_weights = maps.astype(jnp.float32), models.mean_map(gradients)
    heat = jnp.einsum('nhwc,nc->nhw', maps, channel_weights, precision='highest')
    return jax.nn.relu(_join_views(_place(heat, CELLS[layer], batch.shape[1:]), flips))


def placement(cells, cell, side):
    """Returns how the values along a side of a map are spread over the image's pixels without changing their mean.

    Between the centres of cells values change linearly, and each pixel gets the mean over its width. Pixels beyond the
    last cell, which odd sizes leave over, get nothing, and the others so much more.

    A column sums to `side / cells`, therefore the mean over pixels is that over cells. For: the sum of linear
    interpolation is over whole cells that of the cells, since between two centres both have equal parts.

    Args:
      cells: their number.
      cell: pixels from one to the next. (Windows of the network are centred 1.5 pixels before the cells' centres; that
        is ignored, and cancels where mirror images are averaged.)
      side: of the image, in pixels.

    Returns:
      float32 [side, cells].
    """
    covered = min(cells * cell, side)
    places = (np.arange(covered * cells) + 0.5) / covered  # so many points a pixel as there are cells, in cells
    parts = np.stack([np.interp(places, np.arange(cells) + 0.5, row) for row in np.eye(cells)], axis=1)
    rows = parts.reshape(covered, cells, cells).mean(axis=1) * (side / covered)
    return np.pad(rows, ((0, side - covered), (0, 0))).astype(np.float32)


def _place(maps, cell, size):
    """Spreads maps [n, rows, columns] over images: float32 [n, height, width]."""
    rows, columns = (placement(cells, cell, side) for cells, side in zip(maps.shape[1:], size, strict=True))
    return jnp.einsum('hi,nij,wj->nhw', rows, maps, columns, precision='highest')


def _views(batch, flips):
    """Returns images, each followed by its mirror image if so wished."""
    return train.stack_views(batch, flips).reshape(-1, *batch.shape[1:])


def _join_views(maps, flips):
    """Returns the means of the maps of images and of the mirrored ones of their mirror images."""
    return (maps[0::2] + maps[1::2, :, ::-1]) / 2 if flips else maps


def _weights(logits, classes, flips, weigh):
    """Returns by how much each logit of each view counts: float32 [views, classes]."""
    answers = logits.reshape(len(classes), -1, logits.shape[-1]).mean(axis=1)
    classes = jnp.where(classes == PREDICTED, jnp.argmax(answers, axis=-1), classes)
    return jnp.repeat(weigh(classes, logits.shape[-1]), 2 if flips else 1, axis=0)


def _explain(step, predictor, batch, classes, sizes, **options):
    """Applies a step of this module to a batch of any size."""
    classes = _check_classes(predictor, batch, classes)
    step = functools.partial(
        step, predictor.model, predictor.variables, flips=train.averages_flips(predictor.config), **options
    )
    return predictor_lib.in_batches(step, parallel.make_mesh(), batch, classes, sizes=sizes)


def _check_classes(predictor, batch, classes):
    """Returns the classes as int32 [n]; raises `InputError` for one that is none."""
    if classes is None:
        return np.full(len(batch), PREDICTED, np.int32)
    classes, count = np.asarray(classes, np.int32), len(predictor.class_names)
    if np.any((classes < 0) | (classes >= count)):
        raise InputError(f'classes to explain are {classes.tolist()}: give numbers from 0 to {count - 1}')
    return classes


def _squares(size, patch, stride):
    """Returns squares that cover every pixel, bool [squares, size, size]."""
    starts = sorted({*range(0, size - patch, stride), size - patch})
    lines = np.zeros((len(starts), size), bool)
    for line, start in zip(lines, starts, strict=True):
        line[start : start + patch] = True
    return (lines[:, None, :, None] & lines[None, :, None, :]).reshape(-1, size, size)


def _occlude(answer, image, logits, weights, masks):
    """Returns what a weighted sum of logits loses where the image's mean covers it: float32 [size, size]."""
    covered, _ = answer(np.where(masks, np.uint8(np.round(image.mean())), image))
    lost = (logits - covered) @ weights
    return (np.tensordot(lost, masks, axes=1) / masks.sum(axis=0)).astype(np.float32)
