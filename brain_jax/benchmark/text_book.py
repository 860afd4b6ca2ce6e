"""A DenseNet made of Flax' own layers, as the paper and Keras draw it: what that of `models.py` is measured against.

Every BatchNorm computes moments of its own, every layer joins all maps before it anew, and transitions pool last.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from brain_jax import models


class TextBookDenseNet(nn.Module):
    """`models.DenseNet` without its shortcuts; a module's name is the path of ours, joined: 'conv2_block1_0_bn'."""

    stage_sizes: tuple[int, ...]
    growth_rate: int = 32
    num_classes: int = 1000
    dtype: Any = jnp.float32
    momentum: float = 0.99

    @nn.compact
    def __call__(self, images, *, train=False):
        """Returns logits, float [batch, num_classes], of normalised images, float [batch, height, width, 3]."""

        def conv(x, channels, size, strides, name):
            options = {'padding': size // 2, 'use_bias': False, 'dtype': self.dtype, 'name': f'{name}_conv'}
            return nn.Conv(channels, (size, size), strides, **options)(x)

        def bn_relu(x, name):
            options = {'momentum': self.momentum, 'epsilon': 1.001e-5, 'dtype': self.dtype, 'name': name}
            return nn.relu(nn.BatchNorm(use_running_average=not train, **options)(x))

        x = bn_relu(conv(images, 2 * self.growth_rate, 7, 2, 'conv1'), 'conv1_bn')
        x = nn.max_pool(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (2, 2))
        for stage, num_layers in enumerate(self.stage_sizes, start=2):
            for layer in range(1, num_layers + 1):
                name = f'conv{stage}_block{layer}'
                y = conv(bn_relu(x, f'{name}_0_bn'), 4 * self.growth_rate, 1, 1, f'{name}_1')
                y = conv(bn_relu(y, f'{name}_1_bn'), self.growth_rate, 3, 1, f'{name}_2')
                x = jnp.concatenate([x, y], axis=-1)
            if stage < len(self.stage_sizes) + 1:
                x = conv(bn_relu(x, f'pool{stage}_bn'), x.shape[-1] // 2, 1, 1, f'pool{stage}')
                x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(self.num_classes, name='predictions')(models.mean_map(bn_relu(x, 'bn')))


def create_model(config, num_classes):
    """Returns the text-book network of the sizes of the configuration's."""
    sizes = getattr(models, config.model).keywords
    return TextBookDenseNet(
        **sizes, num_classes=num_classes, dtype=jnp.dtype(config.dtype), momentum=config.batch_norm_momentum
    )
