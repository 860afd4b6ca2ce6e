"""The convolutions and the max pool of a DenseNet, with gradients that are fast on CPU as well.

All compute what `jax.lax.conv_general_dilated` and `flax.linen.max_pool` compute, and on accelerators the same way. On
CPU XLA's own gradients of them gather and transpose large arrays; here they are products and maxima of slices.

The functions take the arguments of `conv_general_dilated`, so that `flax.linen.Conv` can use them, and heed the first
two only.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp


def pointwise_convolution(x, kernel, *unused_args, **unused_kwargs):
    """A 1x1 convolution as the matrix product it is: on CPU XLA multiplies faster than it convolves.

    Args:
      x: float [batch, height, width, channels].
      kernel: float [1, 1, channels, features].

    Returns:
      float [batch, height, width, features].
    """
    return _multiply(x, kernel[0, 0])


def convolution_3x3(x, kernel, *unused_args, **unused_kwargs):
    """A 3x3 convolution of stride 1, filled up with zeros.

    Args:
      x: float [batch, height, width, channels].
      kernel: float [3, 3, channels, features].

    Returns:
      float [batch, height, width, features].
    """
    return _convolve_3x3(x, kernel)


def stem_convolution(x, kernel, *unused_args, **unused_kwargs):
    """A convolution of stride 2, filled up with zeros at the edges by half the size of the kernel.

    Args:
      x: float [batch, height, width, channels].
      kernel: float [size, size, channels, features], of an odd size.

    Returns:
      float [batch, (height + 1) // 2, (width + 1) // 2, features].
    """
    return _convolve_stem(x, kernel)


def max_pool(x):
    """Returns the largest of each 3x3 pixels, for every other row and column.

    Args:
      x: float [batch, height, width, channels].

    Returns:
      float [batch, (height + 1) // 2, (width + 1) // 2, channels].
    """

    def of_windows(x):
        # 'SAME' would pad even sizes on one side only and shift every feature by a pixel.
        return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))

    def of_slices(x):
        for axis in (1, 2):
            padding = [(1, 1) if i == axis else (0, 0) for i in range(4)]
            x = jnp.pad(x, padding, constant_values=-jnp.inf)
            parts = [_every_other(x, axis, start, (x.shape[axis] - 1) // 2) for start in range(3)]
            x = jnp.maximum(jnp.maximum(parts[0], parts[1]), parts[2])
        return x

    return jax.lax.platform_dependent(x, cpu=of_slices, default=of_windows)


def _every_other(x, axis, start, count):
    """Returns every other slice along an axis, `count` of them."""
    return jax.lax.slice_in_dim(x, start, start + 2 * count - 1, stride=2, axis=axis)


@jax.custom_vjp
def _multiply(x, matrix):
    return x @ matrix


def _multiply_backward(residuals, grad):
    # Of the product's own gradient XLA computes the transpose, and first copies the larger factor for it.
    x, matrix = residuals
    return grad @ matrix.T, _flatten(x).T @ _flatten(grad)


_multiply.defvjp(lambda x, matrix: (x @ matrix, (x, matrix)), _multiply_backward)


def _plain_3x3(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def _gradients_3x3(x, kernel, grad):
    """Returns the gradients of `_plain_3x3` as two products with the nine neighbours of every pixel of `grad`.

    `grad` has a quarter of the channels of `x` in a DenseNet, so this gathers less than patches of `x` do.
    """
    grad = _materialize(grad)
    channels, features = kernel.shape[2:]
    height, width = x.shape[1:3]
    padded = jnp.pad(grad, ((0, 0), (1, 1), (1, 1), (0, 0)))
    neighbours = [padded[:, 2 - i : 2 - i + height, 2 - j : 2 - j + width] for i in range(3) for j in range(3)]
    neighbours = jnp.concatenate(neighbours, axis=-1)
    x_grad = neighbours @ kernel.transpose(0, 1, 3, 2).reshape(9 * features, channels)
    kernel_grad = (_flatten(x).T @ _flatten(neighbours)).reshape(channels, 3, 3, features)
    return x_grad, kernel_grad.transpose(1, 2, 0, 3)


def _materialize(x):
    """Returns `x`, multiplied by the identity matrix.

    On CPU XLA computes what leads to an array anew for everything that is read from it, and drops
    `optimization_barrier` before it decides so; a matrix product it computes once.
    """
    return x @ jnp.eye(x.shape[-1], dtype=x.dtype)


def _plain_stem(x, kernel):
    reach = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (2, 2), ((reach, reach), (reach, reach)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )


def _gradients_stem(x, kernel, grad):
    """Returns the gradients of `_plain_stem`, that of the kernel as a product with patches of `x`."""
    size, reach = kernel.shape[0], kernel.shape[0] // 2
    height, width = grad.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    rows = [_every_other(padded, 1, i, height) for i in range(size)]
    patches = jnp.concatenate([_every_other(row, 2, j, width) for row in rows for j in range(size)], axis=-1)
    kernel_grad = _flatten(patches).T @ _flatten(grad)
    return _gradients_of(_plain_stem)(x, kernel, grad)[0], kernel_grad.reshape(kernel.shape)


def _gradients_of(convolve):
    """Returns the function (x, kernel, gradient of the result) -> gradients of a convolution as JAX has them."""
    return lambda x, kernel, grad: jax.vjp(convolve, x, kernel)[1](grad)


def _with_gradients(convolve, cpu_gradients):
    """Returns the convolution with other gradients on CPU."""

    def backward(residuals, grad):
        return jax.lax.platform_dependent(*residuals, grad, cpu=cpu_gradients, default=_gradients_of(convolve))

    function = jax.custom_vjp(convolve)
    function.defvjp(lambda x, kernel: (convolve(x, kernel), (x, kernel)), backward)
    return function


def _flatten(x):
    """Returns [pixels, channels] of [batch, height, width, channels]."""
    return x.reshape(-1, x.shape[-1])


_convolve_3x3 = _with_gradients(_plain_3x3, _gradients_3x3)
_convolve_stem = _with_gradients(_plain_stem, _gradients_stem)
