"""DenseNet in Flax: the network of Huang et al. (2017), as keras.applications builds it.

Every module carries the name of its Keras layer, so that `'_'.join(path)` of a parameter is the name under which the
published weights know it: `conv2_block1/0_bn/scale` is `gamma` of `conv2_block1_0_bn`.

Two things are done differently from the text-book, with equal results. A dense block lies in one array and shares batch
statistics, see `dense_block`. A transition averages before its 1x1 convolution: both are linear and act on different
axes, so they commute, and the convolution sees a quarter of the pixels.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from brain_jax import convolutions
from brain_jax.dense_block import FeatureMap, Moments, apply_dense_block, batch_moments, batch_norm_relu

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


class BatchNorm(nn.Module):
    """Batch normalisation with given moments, followed by ReLU.

    Attributes:
      channels: of what is normalised.
      momentum: share of the old running statistics that a training step keeps.
    """

    channels: int
    momentum: float

    def setup(self):
        self.scale = self.param('scale', nn.initializers.ones, (self.channels,))
        self.bias = self.param('bias', nn.initializers.zeros, (self.channels,))
        self.mean = self.variable('batch_stats', 'mean', jnp.zeros, (self.channels,))
        self.var = self.variable('batch_stats', 'var', jnp.ones, (self.channels,))

    def parameters(self):
        """Returns {'scale': float32 [channels], 'bias': float32 [channels]}."""
        return {'scale': self.scale, 'bias': self.bias}

    def running_moments(self):
        """Returns the running statistics as `Moments`."""
        return Moments(self.mean.value, self.var.value)

    def update(self, moments):
        """Lets the moments of a batch enter the running statistics."""
        if not self.is_initializing():
            self.mean.value = self.momentum * self.mean.value + (1 - self.momentum) * moments.mean
            self.var.value = self.momentum * self.var.value + (1 - self.momentum) * moments.var

    def __call__(self, x):
        """Normalises a feature map.

        Args:
          x: `FeatureMap`; its moments are used and enter the running statistics. Where they are None the running
            statistics are used and stay as they are.

        Returns:
          float [batch, height, width, channels].
        """
        if x.moments is not None:
            self.update(x.moments)
        return batch_norm_relu(self.parameters(), x.value, x.moments or self.running_moments())


class Kernel(nn.Module):
    """The kernel of a convolution, float32 of the given shape."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self):
        return self.param('kernel', nn.initializers.he_normal(), self.shape)


class DenseLayer(nn.Module):
    """Parameters and running statistics of a dense layer, which `dense_block.apply_dense_block` applies.

    Attributes:
      channels: of all maps before it.
      growth_rate: number of channels that it adds.
      momentum: see `BatchNorm`.
    """

    channels: int
    growth_rate: int
    momentum: float

    def setup(self):
        width = 4 * self.growth_rate
        self.norms = [
            BatchNorm(channels, self.momentum, name=f'{i}_bn') for i, channels in enumerate((self.channels, width))
        ]
        self.kernels = [
            Kernel((1, 1, self.channels, width), name='1_conv'),
            Kernel((3, 3, width, self.growth_rate), name='2_conv'),
        ]

    def parameters(self):
        """Returns the parameters by the names of Keras' layers."""
        norms = {norm.name: norm.parameters() for norm in self.norms}
        return norms | {kernel.name: {'kernel': kernel()} for kernel in self.kernels}

    def running_moments(self):
        """Returns the running `Moments` of both normalisations."""
        return tuple(norm.running_moments() for norm in self.norms)

    def update(self, *moments):
        """Lets the moments of a batch, one for each normalisation, enter the running statistics."""
        for norm, new in zip(self.norms, moments, strict=True):
            norm.update(new)


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


def pool_stages(head, stage_ends):
    """Returns what a head sees, linear in the maps: channel means, float32 [batch, channels].

    Args:
      head: 'last' or 'wide', see `DenseNet`.
      stage_ends: list of the maps at the ends of the stages, the last one last: float [batch, height, width, channels].
    """
    return mean_map(stage_ends[-1]) if head == 'last' else pool_widely(stage_ends[-3:])


def head_channels(stage_channels):
    """Returns how many channels each kind of head sees, {name: count}, by the channels of the last three stages."""
    return {'last': stage_channels[-1], 'wide': 2 * sum(stage_channels)}


def mean_map(x):
    """Returns the means of the channels: [batch, height, width, channels] -> float32 [batch, channels]."""
    return jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))


class DenseNet(nn.Module):
    """DenseNet-BC with compression 1/2.

    Attributes:
      stage_sizes: number of dense layers in each of the four blocks.
      growth_rate: channels that a dense layer adds.
      num_classes: width of the head.
      dtype: type of the computation; parameters, statistics and logits are float32.
      batch_norm: 'train' normalises with batch statistics while training, 'frozen' always with the running ones.
      momentum: of the running statistics.
      remat: what is computed again for the gradients instead of kept, beside normalised maps, which never are: 'none';
        'dense_layers': the map in the middle of every dense layer; 'full': those of the stem and of transitions as well
        (but for CPU, where XLA finds them equal and keeps them).
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

    def setup(self):
        if self.batch_norm not in ('train', 'frozen'):
            raise ValueError(f"batch_norm is {self.batch_norm!r}: use 'train' or 'frozen'")
        if self.remat not in ('none', 'dense_layers', 'full'):
            raise ValueError(f"remat is {self.remat!r}: use 'none', 'dense_layers' or 'full'")
        if self.head not in ('last', 'wide'):
            raise ValueError(f"head is {self.head!r}: use 'last' or 'wide'")
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=nn.initializers.he_normal())
        pointwise = partial(conv, kernel_size=(1, 1), conv_general_dilated=convolutions.pointwise_convolution)
        norm = partial(BatchNorm, momentum=self.momentum)
        channels, growth = 2 * self.growth_rate, self.growth_rate
        self.conv1 = conv(channels, (7, 7), conv_general_dilated=convolutions.stem_convolution, name='conv1_conv')
        self.conv1_bn = norm(channels)
        blocks, transitions = [], []
        for stage, num_layers in enumerate(self.stage_sizes, start=2):
            block = []
            for i in range(1, num_layers + 1):
                block.append(DenseLayer(channels, growth, self.momentum, name=f'conv{stage}_block{i}'))
                channels += growth
            blocks.append(block)
            if stage < len(self.stage_sizes) + 1:
                end = norm(channels, name=f'pool{stage}_bn')
                channels //= 2
                transitions.append((end, pointwise(channels, name=f'pool{stage}_conv')))
        self.blocks, self.transitions = blocks, transitions
        self.bn = norm(channels)
        self.predictions = nn.Dense(self.num_classes)

    def __call__(self, images, *, train=False, return_features=False):
        """Classifies images.

        Args:
          images: float [batch, height, width, 3], normalised; at least 32 pixels a side.
          train: whether a training step is under way.
          return_features: whether to return what the head saw, too.

        Returns:
          logits: float32 [batch, num_classes]; with `return_features` a tuple of them and the dictionary
            `stage_ends`: of every stage the map at its end, normalised and not yet averaged, with a cell for 4, 8, 16
            and 32 pixels: Keras' layers pool2_relu, pool3_relu, pool4_relu and relu;
            `feature_map`: the last of them, [batch, (height + 3) // 32, (width + 3) // 32, channels]; and
            `pooled`: float32 [batch, channels], see `pool_stages`.
        """
        stem, transition = DenseNet._stem, DenseNet._transition
        if self.remat == 'full':
            stem, transition = nn.remat(stem, static_argnums=2), nn.remat(transition, static_argnums=(2, 3))
        x = stem(self, images, train)
        ends = []
        for i, block in enumerate(self.blocks):
            x = self._dense_block(x, block)
            if i < len(self.transitions):
                x, end = transition(self, x, i, train)
                ends.append(end)
        ends.append(self.bn(x))
        pooled = pool_stages(self.head, ends)
        logits = self.predictions(pooled)
        outputs = {'stage_ends': ends, 'feature_map': ends[-1], 'pooled': pooled}
        return (logits, outputs) if return_features else logits

    def _feature_map(self, x, train):
        return FeatureMap(x, batch_moments(x) if train and self.batch_norm == 'train' else None)

    def _stem(self, images, train):
        x = self.conv1_bn(self._feature_map(self.conv1(images.astype(self.dtype)), train))
        return self._feature_map(convolutions.max_pool(x), train)

    def _dense_block(self, x, layers):
        parameters = [layer.parameters() for layer in layers]
        running = [layer.running_moments() for layer in layers]
        x, squeezed_moments = apply_dense_block(parameters, x, running, keep=self.remat == 'none')
        if x.moments is not None:
            for layer, moments in zip(layers, squeezed_moments, strict=True):
                layer.update(Moments(*(m[: layer.channels] for m in x.moments)), moments)
        return x

    def _transition(self, x, index, train):
        """Returns the input of the next stage, and the end of this one: normalised and not yet averaged."""
        norm, conv = self.transitions[index]
        end = norm(x)
        return self._feature_map(conv(average_pool(end)), train), end


DenseNet121 = partial(DenseNet, stage_sizes=(6, 12, 24, 16))
DenseNet169 = partial(DenseNet, stage_sizes=(6, 12, 32, 32))
DenseNet201 = partial(DenseNet, stage_sizes=(6, 12, 48, 32))

# Used for testing only.
_DenseNetTiny = partial(DenseNet, stage_sizes=(1, 2, 1, 1), growth_rate=8)
