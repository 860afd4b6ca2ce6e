"""A run as a Keras model: the DenseNet of keras.applications, layer by layer, and around it built-in layers alone.

So `keras.saving.load_model` opens it by itself, in safe mode.
"""

import keras
import numpy as np
from keras import layers

from brain_jax import models, train
from brain_jax.dense_block import BATCH_NORM_EPSILON

_LEAVES = ('kernel', 'scale', 'bias', 'mean', 'var')  # those that a layer has, in the order in which Keras keeps them


def make_model(network, outputs=None):
    """Makes the Keras model of a run.

    Args:
      network: an `export.Network`.
      outputs: names of several outputs, some of 'probabilities', 'logits' and 'features'; None: probabilities alone.

    Returns:
      A `keras.Model` from uint8 [batch, image_size, image_size] to float32 [batch, classes], or to the dictionary of
      the outputs. Its layer 'densenet' is the network from normalised images to logits and features.
    """
    size = network.config.image_size
    densenet = make_densenet(network.model, size)
    for name, arrays in network.layers().items():
        densenet.get_layer(name).set_weights([arrays[leaf] for leaf in _LEAVES if leaf in arrays])
    images = keras.Input((size, size), dtype='uint8', name='images')
    x = layers.Rescaling(1 / 255, name='scale')(images)
    x = layers.Reshape((size, size, 1), name='channel')(x)
    x = layers.Concatenate(name='channels')([x, x, x])
    variance = np.square(models.IMAGENET_STANDARD_DEVIATION).tolist()
    x = layers.Normalization(mean=list(models.IMAGENET_MEAN), variance=variance, name='normalization')(x)
    logits, features = densenet(x)
    if train.averages_flips(network.config):
        mirrored, _ = densenet(keras.ops.flip(x, axis=2))
        logits = layers.Average(name='logits')([logits, mirrored])
    calibrated = layers.Rescaling(1 / network.temperature, name='temperature')(logits)
    found = {'probabilities': layers.Softmax(name='probabilities')(calibrated), 'logits': logits, 'features': features}
    chosen = {name: found[name] for name in outputs} if outputs else found['probabilities']
    return keras.Model(images, chosen, name='brain_jax')


def make_densenet(model, size):
    """Makes keras.applications' DenseNet, also with a growth rate and a head that are not in Keras.

    Args:
      model: a `models.DenseNet`.
      size: side of the images in pixels.

    Returns:
      A `keras.Model` from normalised float32 [batch, size, size, 3] to logits [batch, classes] and what the head sees
      [batch, channels], with random weights.
    """
    images = keras.Input((size, size, 3))
    x = layers.ZeroPadding2D(((3, 3), (3, 3)), name='conv1_pad')(images)
    x = layers.Conv2D(2 * model.growth_rate, 7, strides=2, use_bias=False, name='conv1_conv')(x)
    x = _normalize(x, 'conv1')
    x = layers.ZeroPadding2D(((1, 1), (1, 1)), name='pool1_pad')(x)
    x = layers.MaxPooling2D(3, strides=2, name='pool1')(x)
    ends = []  # of the stages
    for stage, num_layers in enumerate(model.stage_sizes, start=2):
        for i in range(1, num_layers + 1):
            x = _dense_layer(x, model.growth_rate, f'conv{stage}_block{i}')
        if stage < len(model.stage_sizes) + 1:
            ends.append(_normalize(x, f'pool{stage}'))
            x = layers.Conv2D(x.shape[-1] // 2, 1, use_bias=False, name=f'pool{stage}_conv')(ends[-1])
            x = layers.AveragePooling2D(2, strides=2, name=f'pool{stage}_pool')(x)
    x = layers.BatchNormalization(axis=3, epsilon=BATCH_NORM_EPSILON, name='bn')(x)
    x = layers.Activation('relu', name='relu')(x)
    if model.head == 'last':
        pooled = layers.GlobalAveragePooling2D(name='avg_pool')(x)
    else:
        pooled = _pool_widely([*ends[-2:], x])
    logits = layers.Dense(model.num_classes, name='predictions')(pooled)
    return keras.Model(images, [logits, pooled], name='densenet')


def _normalize(x, name):
    x = layers.BatchNormalization(axis=3, epsilon=BATCH_NORM_EPSILON, name=f'{name}_bn')(x)
    return layers.Activation('relu', name=f'{name}_relu')(x)


def _dense_layer(x, growth_rate, name):
    y = layers.Conv2D(4 * growth_rate, 1, use_bias=False, name=f'{name}_1_conv')(_normalize(x, f'{name}_0'))
    y = _normalize(y, f'{name}_1')
    y = layers.Conv2D(growth_rate, 3, padding='same', use_bias=False, name=f'{name}_2_conv')(y)
    return layers.Concatenate(axis=3, name=f'{name}_concat')([x, y])


def _pool_widely(ends):
    """Returns `models.pool_widely` of maps."""
    means = []
    for name, end in zip(('stage3', 'stage4', 'stage5'), ends, strict=True):
        rows, columns = (min(round(2 * side / 7), (side - 1) // 2) for side in end.shape[1:3])
        middle = layers.Cropping2D((rows, columns), name=f'{name}_middle')(end)
        means.append(layers.GlobalAveragePooling2D(name=f'{name}_mean')(end))
        means.append(layers.GlobalAveragePooling2D(name=f'{name}_middle_mean')(middle))
    return layers.Concatenate(name='avg_pool')(means)
