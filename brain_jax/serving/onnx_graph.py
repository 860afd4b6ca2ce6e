"""A run as an ONNX graph, made from its variables.

Tensors are [batch, channels, height, width]. A normalisation right behind a convolution is folded into it; the others,
which come before one, stay. As in `models`, a transition averages before its 1x1 convolution.
"""

import json

import numpy as np
import onnx
from onnx import helper, numpy_helper

from brain_jax import models, train
from brain_jax.dense_block import BATCH_NORM_EPSILON

OPSET, IR_VERSION = 17, 8  # of 2022: whatever runtime is newer reads them


class _Graph:
    """Nodes and constants in the making; a tensor is known by its name, which is that of the node that makes it."""

    def __init__(self, layers):
        self.layers, self.nodes, self.constants = layers, [], []

    def add(self, operator, inputs, name, **attributes):
        """Adds a node; what is no name among its inputs becomes a constant. Returns its name."""
        inputs = [x if isinstance(x, str) else self._constant(f'{name}/{i}', x) for i, x in enumerate(inputs)]
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def _constant(self, name, values):
        values = np.asarray(values)
        values = values.astype(np.float32) if values.dtype.kind == 'f' else values
        self.constants.append(numpy_helper.from_array(np.asarray(values, order='C'), name))  # a scalar stays one
        return name

    def convolve(self, x, name, norm=None, **attributes):
        """Adds a convolution, with the normalisation and ReLU behind it where there is one."""
        kernel = self.layers[name]['kernel'].transpose(3, 2, 0, 1)
        attributes['kernel_shape'] = kernel.shape[2:]
        if norm is None:
            return self.add('Conv', [x, kernel], name, **attributes)
        scale, bias, mean, var = (np.float64(self.layers[norm][leaf]) for leaf in ('scale', 'bias', 'mean', 'var'))
        multiplier = scale / np.sqrt(var + BATCH_NORM_EPSILON)
        kernel = kernel * multiplier[:, None, None, None]
        return self.add('Relu', [self.add('Conv', [x, kernel, bias - mean * multiplier], name, **attributes)], norm)

    def normalize(self, x, name):
        """Adds a normalisation that follows no convolution, and its ReLU."""
        inputs = [x, *(self.layers[name][leaf] for leaf in ('scale', 'bias', 'mean', 'var'))]
        x = self.add('BatchNormalization', inputs, f'{name}/line', epsilon=BATCH_NORM_EPSILON)
        return self.add('Relu', [x], name)

    def average(self, x, name):
        """Adds the means of the channels, [batch, channels]."""
        return self.add('Flatten', [self.add('GlobalAveragePool', [x], f'{name}/map')], name, axis=1)


def make_model(network, metadata):
    """Makes the ONNX model of a run.

    Args:
      network: an `export.Network`.
      metadata: dictionary of what to keep in the file beside the graph; what is no str is kept as JSON.

    Returns:
      A checked `onnx.ModelProto`: `images` uint8 [batch, image_size, image_size] to `probabilities` and `logits`
      float32 [batch, classes] and `features` float32 [batch, channels].
    """
    graph, size = _Graph(network.layers()), network.config.image_size
    pooled = _add_network(graph, _add_views(graph, network.config), network.model, size)
    head = graph.layers['predictions']
    logits = graph.add('Gemm', [pooled, head['kernel'], head['bias']], 'predictions')
    _add_outputs(graph, logits, pooled, network)
    channels, classes = head['kernel'].shape
    outputs = {'probabilities': classes, 'logits': classes, 'features': channels}
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            'brain_jax',
            [helper.make_tensor_value_info('images', onnx.TensorProto.UINT8, ['batch', size, size])],
            [
                helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ['batch', width])
                for name, width in outputs.items()
            ],
            graph.constants,
        ),
        producer_name='brain_jax',
        opset_imports=[helper.make_opsetid('', OPSET)],
        ir_version=IR_VERSION,
        doc_string=metadata['notice'],
    )
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    helper.set_model_props(model, texts)
    onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def _add_views(graph, config):
    """Adds what makes the network's input of grey images: three normalised channels, then all mirror images."""
    x = graph.add('Cast', ['images'], 'pixels', to=onnx.TensorProto.FLOAT)
    x = graph.add('Unsqueeze', [x, np.int64([1])], 'channel')
    if train.averages_flips(config):
        every = [np.int64([value]) for value in (-1, np.iinfo(np.int64).min, 3, -1)]  # start, end, axis, step
        x = graph.add('Concat', [x, graph.add('Slice', [x, *every], 'mirrored')], 'views', axis=0)
    deviation = np.reshape(models.IMAGENET_STANDARD_DEVIATION, (1, 3, 1, 1))
    x = graph.add('Mul', [x, 1 / (255 * deviation)], 'scaled')
    return graph.add('Add', [x, -np.reshape(models.IMAGENET_MEAN, (1, 3, 1, 1)) / deviation], 'normalized')


def _add_network(graph, x, model, size):
    """Adds the network up to what its head sees."""
    x = graph.convolve(x, 'conv1_conv', 'conv1_bn', strides=[2, 2], pads=[3] * 4)
    x = graph.add('MaxPool', [x], 'pool1', kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    ends, side = [], (size + 3) // 4
    for stage, num_layers in enumerate(model.stage_sizes, start=2):
        for i in range(1, num_layers + 1):
            name = f'conv{stage}_block{i}'
            y = graph.convolve(graph.normalize(x, f'{name}_0_bn'), f'{name}_1_conv', f'{name}_1_bn')
            y = graph.convolve(y, f'{name}_2_conv', pads=[1] * 4)
            x = graph.add('Concat', [x, y], f'{name}_concat', axis=1)
        if stage == len(model.stage_sizes) + 1:
            break
        end = graph.normalize(x, f'pool{stage}_bn')
        ends.append((end, side))
        x = graph.add('AveragePool', [end], f'pool{stage}_pool', kernel_shape=[2, 2], strides=[2, 2])
        x, side = graph.convolve(x, f'pool{stage}_conv'), side // 2
    end = graph.normalize(x, 'bn')
    if model.head == 'last':
        return graph.average(end, 'pooled')
    return _pool_widely(graph, [*ends[-2:], (end, side)])


def _pool_widely(graph, ends):
    """Adds `models.pool_widely` of maps and their sides."""
    means = []
    for end, side in ends:
        edge = min(round(2 * side / 7), (side - 1) // 2)
        bounds = [np.int64([value] * 2) for value in (edge, side - edge)]
        middle = graph.add('Slice', [end, *bounds, np.int64([2, 3])], f'{end}_middle')
        means += [graph.average(end, f'{end}_mean'), graph.average(middle, f'{end}_middle_mean')]
    return graph.add('Concat', means, 'pooled', axis=1)


def _add_outputs(graph, logits, pooled, network):
    """Adds the mean over mirror images, the temperature and the softmax."""
    if train.averages_flips(network.config):
        pairs = graph.add('Reshape', [logits, np.int64([2, -1, network.model.num_classes])], 'pairs_of_logits')
        graph.add('ReduceMean', [pairs], 'logits', axes=[0], keepdims=0)
        channels = len(graph.layers['predictions']['kernel'])
        pairs = graph.add('Reshape', [pooled, np.int64([2, -1, channels])], 'pairs_of_features')
        graph.add('Gather', [pairs, np.int64(0)], 'features', axis=0)
    else:
        graph.add('Identity', [logits], 'logits')
        graph.add('Identity', [pooled], 'features')
    calibrated = graph.add('Div', ['logits', np.float64(network.temperature)], 'calibrated')
    graph.add('Softmax', [calibrated], 'probabilities', axis=1)
