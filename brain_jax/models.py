"""DenseNet in Flax: the network of Huang et al. (2017), as keras.applications builds it.

Every module carries the name of its Keras layer, so that `'_'.join(path)` of a parameter is the name under which the
published weights know it: `conv2_block1/0_bn/scale` is `gamma` of `conv2_block1_0_bn`.

Two things are done differently from the text-book, with equal results:

* Batch statistics are computed once, when a feature map is born. All later layers of a dense block normalise the same
  channels over the same batch, so they share one mean and one variance and differ in scale and offset only.
* A transition averages before its 1x1 convolution. Both are linear and act on different axes, so they commute, and the
  convolution sees a quarter of the pixels.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from brain_jax import convolutions

BATCH_NORM_EPSILON = 1.001e-5  # keras.applications.densenet
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of pixels in 0..1; mode 'torch' of Keras' preprocess_input
IMAGENET_STANDARD_DEVIATION = (0.229, 0.224, 0.225)


def normalize(images):
    """Turns grey images into what the ImageNet weights were trained on.

    Args:
      images: uint8 or float [batch, height, width] in 0..255.

    Returns:
      float32 [batch, height, width, 3], three equal channels less the ImageNet mean, over its standard deviation.
    """
    images = images[..., None].astype(jnp.float32) / 255
    return (images - jnp.array(IMAGENET_MEAN)) / jnp.array(IMAGENET_STANDARD_DEVIATION)


class Moments(NamedTuple):
    """Mean and (biased) variance of a batch, per channel: float32 [channels]."""

    mean: jax.Array
    var: jax.Array


class FeatureMap(NamedTuple):
    """A feature map [batch, height, width, channels] and, in training, its batch moments."""

    value: jax.Array
    moments: Moments | None


def batch_moments(x):
    """Returns the `Moments` of `x` over batch, height and width, accumulated in float32 or better."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(x, axis=(0, 1, 2))
    mean_of_squares = jnp.mean(jnp.square(x), axis=(0, 1, 2))
    return Moments(mean, jnp.maximum(mean_of_squares - jnp.square(mean), 0))


class BatchNormRelu(nn.Module):
    """Batch normalisation with given moments, followed by ReLU.

    Attributes:
      dtype: type of the result; parameters and statistics are float32.
      momentum: share of the old running statistics that a training step keeps.
    """

    dtype: Any
    momentum: float

    @nn.compact
    def __call__(self, x):
        """Normalises a feature map.

        Args:
          x: `FeatureMap`; its moments are used and enter the running statistics. Where they are None the running
            statistics are used and stay as they are.

        Returns:
          float [batch, height, width, channels].
        """
        channels = (x.value.shape[-1],)
        scale = self.param('scale', nn.initializers.ones, channels)
        bias = self.param('bias', nn.initializers.zeros, channels)
        mean = self.variable('batch_stats', 'mean', jnp.zeros, channels)
        var = self.variable('batch_stats', 'var', jnp.ones, channels)
        moments = x.moments
        if moments is None:
            moments = Moments(mean.value, var.value)
        elif not self.is_initializing():
            mean.value = self.momentum * mean.value + (1 - self.momentum) * moments.mean
            var.value = self.momentum * var.value + (1 - self.momentum) * moments.var
        multiplier = scale * jax.lax.rsqrt(moments.var + BATCH_NORM_EPSILON)
        offset = bias - moments.mean * multiplier
        return nn.relu(x.value * multiplier.astype(self.dtype) + offset.astype(self.dtype))


class DenseLayer(nn.Module):
    """BN-ReLU-1x1 convolution-BN-ReLU-3x3 convolution: `growth_rate` new channels from all earlier ones.

    It joins the earlier feature maps itself: what is recomputed for the gradients is then the joined map as well, and
    only the new channels of each layer are kept. The joined maps grow with the square of the depth.
    """

    growth_rate: int
    conv: Any
    norm: Any
    feature_map: Any

    @nn.compact
    def __call__(self, feature_maps):
        x = concatenate(feature_maps)
        bottleneck = self.conv(
            4 * self.growth_rate, (1, 1), conv_general_dilated=convolutions.pointwise_convolution, name='1_conv'
        )
        grow = self.conv(self.growth_rate, (3, 3), conv_general_dilated=convolutions.convolution_3x3, name='2_conv')
        y = self.feature_map(bottleneck(self.norm(name='0_bn')(x)))
        return self.feature_map(grow(self.norm(name='1_bn')(y)))


def recompute_for_gradients(layer, feature_maps):
    """Applies a dense layer and keeps nothing of its inside: for the gradients it is computed again.

    That is `flax.linen.remat`, but for this: there a barrier alone tells XLA that the second time is not the first. On
    CPU XLA drops barriers, finds both equal, and keeps everything. Here the second time takes a zero from the gradients
    that come in, so that it cannot begin before they are there.

    Args:
      layer: a `DenseLayer`.
      feature_maps: list of `FeatureMap`.

    Returns:
      The new `FeatureMap`.
    """
    unbound = layer.clone(parent=None)

    def forward(layer, feature_maps):
        return layer(feature_maps), (layer.variables, feature_maps)

    def backward(residuals, grad):
        variables, feature_maps = residuals
        # XLA does not see that this is 0; where the gradient is no number, nothing is worth saving.
        zero = jnp.minimum(jnp.maximum(grad.value[0, 0, 0, 0], 0), 0)
        last = feature_maps[-1]
        feature_maps = [*feature_maps[:-1], last._replace(value=last.value + zero)]

        def apply(params, feature_maps):
            new, _ = unbound.apply({**variables, 'params': params}, feature_maps, mutable=['batch_stats'])
            return new

        _, pull_back = jax.vjp(apply, variables['params'], feature_maps)
        params_grad, maps_grad = pull_back(grad)
        return {'params': params_grad}, maps_grad

    return nn.custom_vjp(DenseLayer.__call__, forward_fn=forward, backward_fn=backward)(layer, feature_maps)


def average_pool(x):
    """Returns the means of 2x2 squares; an odd last row or column is dropped, as Keras does."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return jnp.mean(x.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


def pool_widely(feature_maps):
    """Returns the channel means of several maps, each over the whole image and over its middle.

    The middle is three sevenths of the side, so that of a map of 7x7 it is 3x3. Where a tumour lies tells much about
    what it is, and what tells tumours apart is textures more than the objects of ImageNet's last stage.

    Args:
      feature_maps: list of float [batch, height, width, channels], heights and widths their own.

    Returns:
      float32 [batch, twice the sum of the channels].
    """
    means = []
    for x in feature_maps:
        rows, columns = (min(round(2 * side / 7), (side - 1) // 2) for side in x.shape[1:3])
        middle = x[:, rows : x.shape[1] - rows, columns : x.shape[2] - columns]
        means += [mean_map(x), mean_map(middle)]
    return jnp.concatenate(means, axis=-1)


def head_channels(stage_channels):
    """Returns how many channels each kind of head sees, {name: count}, by the channels of the last three stages."""
    return {'last': stage_channels[-1], 'wide': 2 * sum(stage_channels)}


def mean_map(x):
    """Returns the means of the channels: [batch, height, width, channels] -> float32 [batch, channels]."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


def concatenate(feature_maps):
    """Returns one `FeatureMap` with the channels, and the moments, of all."""
    values, moments = zip(*feature_maps, strict=True)
    moments = None if moments[0] is None else jax.tree.map(lambda *m: jnp.concatenate(m), *moments)
    # The barrier keeps XLA from fusing each layer's concatenation into those of all later ones, which doubles the time
    # to compile.
    return FeatureMap(jax.lax.optimization_barrier(jnp.concatenate(values, axis=-1)), moments)


class DenseNet(nn.Module):
    """DenseNet-BC with compression 1/2.

    Attributes:
      stage_sizes: number of dense layers in each of the four blocks.
      growth_rate: channels that a dense layer adds.
      num_classes: width of the head.
      dtype: type of the computation; parameters, statistics and logits are float32.
      batch_norm: 'train' normalises with batch statistics while training, 'frozen' always with the running ones.
      momentum: of the running statistics.
      remat: what is computed again for the gradients instead of kept: 'none'; 'dense_layers': the inside of every dense
        layer; 'full': that of the stem and of transitions as well (but for CPU, where XLA finds them equal and keeps
        them).
      head: what it sees, 'last': the means of the last map, as Keras' head does; 'wide': those of the last three
        stages, see `pool_widely`.
    """

    stage_sizes: tuple[int, ...]
    growth_rate: int = 32
    num_classes: int = 1000
    dtype: Any = jnp.float32
    batch_norm: str = 'train'
    momentum: float = 0.99
    remat: str = 'none'
    head: str = 'last'

    @nn.compact
    def __call__(self, images, *, train=False, return_features=False):
        """Classifies images.

        Args:
          images: float [batch, height, width, 3], normalised; at least 32 pixels a side.
          train: whether a training step is under way.
          return_features: whether to return what the head saw, too.

        Returns:
          logits: float32 [batch, num_classes]; with `return_features` a tuple of them and the dictionary
            `feature_map`: [batch, (height + 3) // 32, (width + 3) // 32, channels] and
            `pooled`: float32 [batch, channels].
        """
        if self.batch_norm not in ('train', 'frozen'):
            raise ValueError(f"batch_norm is {self.batch_norm!r}: use 'train' or 'frozen'")
        if self.remat not in ('none', 'dense_layers', 'full'):
            raise ValueError(f"remat is {self.remat!r}: use 'none', 'dense_layers' or 'full'")
        if self.head not in ('last', 'wide'):
            raise ValueError(f"head is {self.head!r}: use 'last' or 'wide'")
        use_batch_moments = train and self.batch_norm == 'train'
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.he_normal())
        norm = partial(BatchNormRelu, dtype=self.dtype, momentum=self.momentum)

        def feature_map(x):
            return FeatureMap(x, batch_moments(x) if use_batch_moments else None)

        def stem(_, images):
            convolve = conv(
                2 * self.growth_rate, (7, 7), conv_general_dilated=convolutions.stem_convolution, name='conv1_conv'
            )
            x = norm(name='conv1_bn')(feature_map(convolve(images.astype(self.dtype))))
            return feature_map(convolutions.max_pool(x))

        def dense_layer(feature_maps, name):
            layer = DenseLayer(self.growth_rate, conv, norm, feature_map, name=name)
            return layer(feature_maps) if self.remat == 'none' else recompute_for_gradients(layer, feature_maps)

        def transition(_, x, stage):
            end = norm(name=f'pool{stage}_bn')(x)
            y = average_pool(end)
            squeeze = conv(
                y.shape[-1] // 2,
                (1, 1),
                conv_general_dilated=convolutions.pointwise_convolution,
                name=f'pool{stage}_conv',
            )
            return feature_map(squeeze(y)), end

        if self.remat == 'full':
            stem, transition = nn.remat(stem), nn.remat(transition, static_argnums=2)
        x = stem(self, images)
        ends = []  # of the stages
        for stage, num_layers in enumerate(self.stage_sizes, start=2):
            feature_maps = [x]
            for layer in range(1, num_layers + 1):
                feature_maps.append(dense_layer(feature_maps, f'conv{stage}_block{layer}'))
            x = concatenate(feature_maps)
            if stage < len(self.stage_sizes) + 1:
                x, end = transition(self, x, stage)
                ends.append(end)
        features = norm(name='bn')(x)
        pooled = mean_map(features) if self.head == 'last' else pool_widely([*ends[-2:], features])
        logits = nn.Dense(self.num_classes, name='predictions')(pooled)
        return (logits, {'feature_map': features, 'pooled': pooled}) if return_features else logits


DenseNet121 = partial(DenseNet, stage_sizes=(6, 12, 24, 16))
DenseNet169 = partial(DenseNet, stage_sizes=(6, 12, 32, 32))
DenseNet201 = partial(DenseNet, stage_sizes=(6, 12, 48, 32))

# Used for testing only.
_DenseNetTiny = partial(DenseNet, stage_sizes=(1, 2, 1, 1), growth_rate=8)
