"""A dense block whose feature maps lie in one array, with a gradient that reads them there.

Every layer of a dense block sees the channels of all earlier ones. Where each joins them anew and keeps what it joined,
memory and traffic grow with the square of the depth. Here a layer writes its new channels behind the others, into one
array for the whole block, and reads the channels before them. The gradient finds in the finished array what every
layer has read, so that it needs only this array and the narrow map in the middle of each layer. This is what Pleiss et
al. (2017), "Memory-efficient implementation of DenseNets", do with shared storage and pointers, without computing any
convolution twice.

Batch statistics are computed once, when a feature map is born. All later layers normalise the same channels over the
same batch, so they share one mean and one variance and differ in scale and offset only.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from brain_jax import convolutions

BATCH_NORM_EPSILON = 1.001e-5  # keras.applications.densenet


class Moments(NamedTuple):
    """Mean and (biased) variance of a batch, per channel: float32 [channels]."""

    mean: jax.Array
    var: jax.Array


class FeatureMap(NamedTuple):
    """A feature map [batch, height, width, channels] and, in training, its batch moments."""

    value: jax.Array
    moments: Moments | None


@jax.jit
def batch_moments(x):
    """Returns the `Moments` of `x` over batch, height and width, accumulated in float32 or better."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(x, axis=(0, 1, 2))
    mean_of_squares = jnp.mean(jnp.square(x), axis=(0, 1, 2))
    return Moments(mean, jnp.maximum(mean_of_squares - jnp.square(mean), 0))


def batch_norm_relu(parameters, x, moments):
    """Normalises with the given moments, scales, shifts, and takes the positive part.

    Args:
      parameters: {'scale': [channels], 'bias': [channels]}, float32.
      x: float [batch, height, width, channels].
      moments: `Moments`.

    Returns:
      Like `x`.
    """
    multiplier, offset = _as_line(parameters, moments)
    return jax.nn.relu(x * multiplier.astype(x.dtype) + offset.astype(x.dtype))


def _as_line(parameters, moments):
    """Returns the multiplier and the offset of a normalisation, float32 [channels]."""
    multiplier = parameters['scale'] * jax.lax.rsqrt(moments.var + BATCH_NORM_EPSILON)
    return multiplier, parameters['bias'] - moments.mean * multiplier


def apply_dense_block(layers, x, running, keep):
    """Applies the layers of a dense block: BN-ReLU-1x1 convolution-BN-ReLU-3x3 convolution, each on all maps before it.

    Args:
      layers: list of the parameters of the layers, as `models.DenseLayer` has them.
      x: `FeatureMap`. Its moments and those of all new maps are used; where they are None, the running ones.
      running: list of the running `Moments` of the two normalisations of each layer, ((of '0_bn', of '1_bn'), ...).
      keep: whether the map in the middle of each layer is kept for the gradients or computed again.

    Returns:
      The `FeatureMap` of the channels of `x` and all new ones, and the list of the moments in the middle of each layer.
    """
    return _apply_dense_block(keep, layers, x, running)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply_dense_block(keep, layers, x, running):
    return _forward(keep, layers, x, running)[0]


@partial(jax.jit, static_argnums=0)
def _half_layer(convolve, norm, conv, x, moments):
    """Applies BN-ReLU-convolution, one half of a layer."""
    return convolve(batch_norm_relu(norm, x, moments), conv['kernel'].astype(x.dtype))


@partial(jax.jit, static_argnums=0)
def _half_layer_gradients(convolve, norm, conv, x, moments, grad):
    """Returns the gradients of `norm`, `conv`, `x` and `moments` from that of the result of `_half_layer`.

    All are float32 or better. So that of `x` is rounded once, when it has been added to others, and XLA for TPU adds it
    where it is computed: in the type of `x` it would write it, to read it again.
    """
    activated = batch_norm_relu(norm, x, moments)
    grad, kernel_grad = jax.vjp(convolve, activated, conv['kernel'].astype(x.dtype))[1](grad)
    line, pull_back = jax.vjp(_as_line, norm, moments)
    grad = jnp.where(activated > 0, grad, 0).astype(line[0].dtype)
    norm_grad, moments_grad = pull_back((jnp.sum(grad * x, axis=(0, 1, 2)), jnp.sum(grad, axis=(0, 1, 2))))
    return norm_grad, {'kernel': kernel_grad.astype(grad.dtype)}, grad * line[0], moments_grad


_squeeze = partial(_half_layer, convolutions.pointwise_convolution)
_squeeze_gradients = partial(_half_layer_gradients, convolutions.pointwise_convolution)
_grow = partial(_half_layer, convolutions.convolution_3x3)
_grow_gradients = partial(_half_layer_gradients, convolutions.convolution_3x3)


def _forward(keep, layers, x, running):
    new_channels = sum(layer['2_conv']['kernel'].shape[-1] for layer in layers)
    value, moments = jnp.pad(x.value, [(0, 0)] * 3 + [(0, new_channels)]), x.moments
    squeezed = []
    for layer, (running_0, running_1) in zip(layers, running, strict=True):
        channels = layer['0_bn']['scale'].size
        y = _squeeze(layer['0_bn'], layer['1_conv'], value[..., :channels], moments or running_0)
        y = FeatureMap(y, moments and batch_moments(y))
        new = _grow(layer['1_bn'], layer['2_conv'], y.value, y.moments or running_1)
        value = jax.lax.dynamic_update_slice_in_dim(value, new, channels, axis=-1)
        moments = moments and jax.tree.map(lambda *parts: jnp.concatenate(parts), moments, batch_moments(new))
        squeezed.append(y)
    block = FeatureMap(value, moments)
    kept = squeezed if keep else [y._replace(value=None) for y in squeezed]
    return (block, [y.moments for y in squeezed]), (layers, block, kept, running)


def _backward(keep, residuals, grads):
    layers, block, squeezed, running = residuals
    grad, _ = grads  # the moments in the middle only enter the running statistics
    layer_grads = []
    for layer, y, (running_0, running_1) in reversed(list(zip(layers, squeezed, running, strict=True))):
        block, new = _split(block, layer['0_bn']['scale'].size)
        grad, new_grad = _split(grad, layer['0_bn']['scale'].size)
        # XLA for CPU does not see that these are 0, one an image, so it cannot take what it computed before the
        # gradient was there for what is computed now, and keep it. Where the gradient is no number, nothing is worth
        # saving. Elsewhere XLA computes again by itself, and with less traffic.
        zero = jax.lax.platform_dependent(
            new_grad.value[:, :1, :1, :1], cpu=lambda grad: jnp.minimum(jnp.maximum(grad, 0), 0), default=jnp.zeros_like
        )
        x, moments = block.value + zero, block.moments or running_0
        if not keep:
            y = y._replace(value=_squeeze(layer['0_bn'], layer['1_conv'], x, moments))

        norm_1, conv_2, *y_grad = _grow_gradients(
            layer['1_bn'],
            layer['2_conv'],
            y.value + zero,
            y.moments or running_1,
            _add_moments_grad(new, *new_grad),
        )
        norm_0, conv_1, x_grad, moments_grad = _squeeze_gradients(
            layer['0_bn'], layer['1_conv'], x, moments, _add_moments_grad(y, *y_grad)
        )
        layer_grads.append({'0_bn': norm_0, '1_conv': conv_1, '1_bn': norm_1, '2_conv': conv_2})
        value = (grad.value + x_grad).astype(grad.value.dtype)
        grad = FeatureMap(value, grad.moments and jax.tree.map(jnp.add, grad.moments, moments_grad))
    return layer_grads[::-1], grad, None


def _split(x, channels):
    """Returns the first channels of a `FeatureMap`, and the others."""
    return jax.tree.map(lambda leaf: leaf[..., :channels], x), jax.tree.map(lambda leaf: leaf[..., channels:], x)


@jax.jit
def _add_moments_grad(x, grad, moments_grad):
    """Returns the gradient of the values of a `FeatureMap`, with what comes from the moments computed from them.

    With n values a channel, d mean / d x = 1 / n and d var / d x = 2 (x - mean) / n.
    """
    if x.moments is None:
        return grad.astype(x.value.dtype)
    count = x.value.size // x.value.shape[-1]
    slope = 2 / count * moments_grad.var
    offset = moments_grad.mean / count - slope * x.moments.mean
    return (grad + x.value * slope + offset).astype(x.value.dtype)


_apply_dense_block.defvjp(_forward, _backward)
