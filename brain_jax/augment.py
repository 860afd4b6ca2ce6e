"""Random changes of training images, in JAX, as part of the compiled step.

What happens to an image depends on the key, the step and the image's index alone: not on its place in the batch, nor,
but for rounding, on the size of the batch or the number of devices.
"""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates


def draw_transform(key, config):
    """Draws a flip, rotation, zoom and shift.

    Args:
      key: random key.
      config: `config.augment`: `rotation` in degrees, `zoom` and `shift` as fractions.

    Returns:
      matrix: float32 [2, 2], from output to input coordinates (rows, columns) around the centre.
      offset: float32 [2], as a fraction of the side.
    """
    vertical, horizontal, turn, scale, move = jax.random.split(key, 5)
    limit = jnp.deg2rad(config.rotation)
    angle = jax.random.uniform(turn, minval=-limit, maxval=limit)
    zoom = jax.random.uniform(scale, minval=1 - config.zoom, maxval=1 + config.zoom)
    offset = jax.random.uniform(move, (2,), minval=-config.shift, maxval=config.shift)
    flip = jnp.stack(
        [
            jnp.where(config.flip_vertical & jax.random.bernoulli(vertical), -1.0, 1.0),
            jnp.where(config.flip_horizontal & jax.random.bernoulli(horizontal), -1.0, 1.0),
        ]
    )
    rotation = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
    return rotation * flip[None, :] / zoom, offset


def interpolate(image, rows, columns):
    """Returns an image at fractional coordinates, bilinearly interpolated, 0 outside.

    Args:
      image: float32 [height, width], whole numbers in 0..255.
      rows: float32 [...].
      columns: float32 [...].

    Returns:
      float32 [...].
    """
    # A TPU fetches a whole tile of memory, 4 KB, for every pixel that it gathers: for an image more than the network
    # moves. Its matrix products cost next to nothing beside that, and all of this becomes one.
    return jax.lax.platform_dependent(image, rows, columns, tpu=_interpolate_by_products, default=_interpolate)


def _interpolate(image, rows, columns):
    return map_coordinates(image, [rows, columns], order=1, mode='constant', cval=0.0)


def _interpolate_by_products(image, rows, columns):
    # One row of weights a pixel, and a barrier behind the sum: else XLA keeps the products of a large batch in memory,
    # 45 MB an image.
    row_weights, column_weights = (
        jnp.maximum(1 - jnp.abs(source.reshape(-1, 1) - jnp.arange(size, dtype=jnp.float32)), 0)
        for source, size in zip((rows, columns), image.shape, strict=True)
    )
    # 'high' splits the factors into two bfloat16 each: all there is of 8-bit pixels, and of weights 16 bits.
    products = jnp.matmul(row_weights, image, precision='high') * column_weights
    return jax.lax.optimization_barrier(jnp.sum(products, axis=-1)).reshape(rows.shape)


def augment_image(key, image, config):
    """Returns a random variant of one image: float32 [height, width] in 0..255, like `image`."""
    geometry, brightness, contrast = jax.random.split(key, 3)
    matrix, offset = draw_transform(geometry, config)
    size = jnp.array(image.shape, jnp.float32)
    centre = (size - 1) / 2
    rows, columns = jnp.meshgrid(*[jnp.arange(n, dtype=jnp.float32) for n in image.shape], indexing='ij')
    rows, columns = rows - centre[0], columns - centre[1]
    # Spelt out: accelerators round the factors of a matrix product to 11 bits or fewer, and would miss the pixel.
    source = [m[0] * rows + m[1] * columns + c for m, c in zip(matrix, centre + offset * size, strict=True)]
    image = interpolate(image, *source)
    mean = jnp.mean(image)
    share = jax.random.uniform(contrast, minval=1 - config.contrast, maxval=1 + config.contrast)
    image = share * image + (1 - share) * mean  # the image itself, to the bit, where the share is 1
    factor = jax.random.uniform(brightness, minval=1 - config.brightness, maxval=1 + config.brightness)
    return jnp.clip(image * factor, 0, 255)


def augment_batch(key, images, index, config):
    """Augments every image of a batch by itself.

    Args:
      key: random key of the step.
      images: uint8 or float [batch, height, width] in 0..255.
      index: int32 [batch], what tells an image from the others.
      config: `config.augment`.

    Returns:
      float32 [batch, height, width] in 0..255.
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    return jax.vmap(lambda k, image: augment_image(k, image, config))(keys, images.astype(jnp.float32))


def mixup(key, images, targets, alpha):
    """Blends every image, and its target, with its mirror place in the batch (Zhang et al., 2018).

    Args:
      key: random key of the step.
      images: float [batch, height, width].
      targets: float [batch, classes], rows of probabilities.
      alpha: both parameters of the Beta distribution of the share.

    Returns:
      The blended images and targets.
    """
    share = jax.random.beta(key, alpha, alpha)
    share = jnp.maximum(share, 1 - share)  # the image stays the larger part, so its label stays the best answer
    return share * images + (1 - share) * images[::-1], share * targets + (1 - share) * targets[::-1]
