"""The contenders: for each a function that makes one step of the same DenseNet, ready to be called and timed.

A step returns when its result is there. Every function imports its own libraries: the process of one contender should
load no others. Weights are random and images are noise: neither changes the time.
"""

import functools
import os
import pathlib
import tempfile

import numpy as np

NUM_CLASSES = 4
NUM_IMAGES = 5712  # of the data set that the schedule is made for
PACKAGES = {  # to import, beside those of brain_jax itself
    'brain_jax': (),
    'flax': (),
    'keras_tensorflow': ('keras', 'tensorflow'),
    'keras_jax': ('keras',),
    'torch': ('torch', 'torchvision'),
    'torch_channels_last': ('torch', 'torchvision'),
    'torch_bfloat16': ('torch', 'torchvision'),
    'onnxruntime': ('torch', 'torchvision', 'onnx', 'onnxruntime'),
    'openvino': ('torch', 'torchvision', 'onnx', 'openvino'),
    'openvino_bfloat16': ('torch', 'torchvision', 'onnx', 'openvino'),
    'export_keras': ('keras', 'tensorflow'),
    'export_saved_model': ('keras', 'tensorflow'),
    'export_stablehlo': (),
    'export_onnxruntime': ('onnx', 'onnxruntime'),
    'export_openvino': ('onnx', 'openvino'),
    'export_openvino_bfloat16': ('onnx', 'openvino'),
}


def make_batch(config, mesh):
    """Returns a batch of noise on the devices, as a training run or a prediction gets it."""
    from brain_jax import parallel
    from brain_jax.data import pipeline

    count, size = config.batch_size, config.image_size
    batch = {
        'image': np.random.default_rng(0).integers(0, 256, (count, size, size), np.uint8),
        'label': np.arange(count, dtype=np.int32) % NUM_CLASSES,
        'mask': np.ones(count, bool),
        'index': np.arange(count, dtype=np.int32),
    }
    return next(pipeline.prefetch([batch], parallel.split_over_data(mesh)))


def prepare_brain_jax(config, contender='brain_jax'):
    """Returns the devices, the network and the state of step 0, of the length and schedule of a whole run.

    The network is ours or, where the contender is 'flax', that of `text_book`, made of Flax' own layers.
    """
    from brain_jax import parallel, train
    from brain_jax.benchmark import text_book

    mesh = parallel.make_mesh()
    parallel.check_batch_sizes(config, mesh)
    model = {'brain_jax': train, 'flax': text_book}[contender].create_model(config, NUM_CLASSES)
    steps_per_epoch = NUM_IMAGES / config.batch_size
    total_steps = round(config.num_epochs * steps_per_epoch)
    state, _, _ = train.create_train_state(
        config, model, mesh, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    return mesh, model, state


def prepare_training(config, contender='brain_jax'):
    """Returns the training step that a run makes, and what it is called with: (train_step, state, batch)."""
    from brain_jax import train

    mesh, model, state = prepare_brain_jax(config, contender)
    train_step = train.make_train_step(model, config, np.ones(NUM_CLASSES), mesh)
    return train_step, state, make_batch(config, mesh)


def repeat_training(train_step, state, batch):
    """Returns a function that runs the next training step of brain_jax at every call."""
    import jax

    def step():
        nonlocal state
        state, _ = jax.block_until_ready(train_step(state, batch))

    return step


def train_brain_jax(settings, contender='brain_jax'):
    """Makes a training step of brain_jax: augmentation, forward and backward pass, clipping, AdamW, statistics."""
    return repeat_training(*prepare_training(settings.config, contender))


def infer_brain_jax(settings, contender='brain_jax'):
    """Makes the step that answers for a finished run of brain_jax, from grey bytes to logits."""
    import jax

    from brain_jax import finished_run

    mesh, model, state = prepare_brain_jax(settings.config, contender)
    logits_step = finished_run.make_logits_step(model, settings.config, mesh)
    variables = {'params': state.eval_params, 'batch_stats': state.batch_stats}
    batch = make_batch(settings.config, mesh)
    return lambda: jax.tree.map(np.asarray, logits_step(variables, batch))


def evaluate_brain_jax(settings, contender='brain_jax'):
    """Makes the step that scores the validation and test images of a run, from grey bytes to metrics."""
    import jax

    from brain_jax import train

    mesh, model, state = prepare_brain_jax(settings.config, contender)
    eval_step = train.make_eval_step(model, settings.config, mesh)
    batch = make_batch(settings.config, mesh)
    return lambda: jax.block_until_ready(eval_step(state.eval_params, state.batch_stats, batch))


def make_inputs(config):
    """Returns float32 [batch, height, width, 3] noise, as normalised images are, and int32 [batch] labels."""
    shape = (config.batch_size, config.image_size, config.image_size, 3)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    return images, np.arange(config.batch_size, dtype=np.int32) % NUM_CLASSES


def make_keras(settings):
    """Returns the network of keras.applications; its backend is that of KERAS_BACKEND."""
    from keras.src.applications import densenet  # public are only the three published sizes

    size = settings.config.image_size
    return densenet.DenseNet(list(settings.stage_sizes), weights=None, input_shape=(size, size, 3), classes=NUM_CLASSES)


def train_keras(settings):
    """Makes a training step of Keras: forward and backward pass, AdamW, statistics."""
    import keras

    model = make_keras(settings)
    model.compile(keras.optimizers.AdamW(1e-4, weight_decay=1e-4), 'sparse_categorical_crossentropy')
    images, labels = make_inputs(settings.config)
    return lambda: model.train_on_batch(images, labels)


def infer_keras(settings):
    """Makes a prediction step of Keras."""
    model = make_keras(settings)
    images, _ = make_inputs(settings.config)
    return lambda: model.predict_on_batch(images)


def make_torch(settings, channels_last=False):
    """Returns the network of torchvision and its inputs: float32 [batch, 3, height, width] and labels."""
    import torch
    import torchvision

    torch.set_num_threads(settings.cores)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    growth_rate = settings.growth_rate
    model = torchvision.models.DenseNet(
        growth_rate, tuple(settings.stage_sizes), 2 * growth_rate, num_classes=NUM_CLASSES
    )
    images, labels = make_inputs(settings.config)
    images = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    return model.to(memory_format=layout), images, torch.from_numpy(labels).long()


def train_torch(settings, channels_last=False, bfloat16=False):
    """Makes a training step of torch: forward and backward pass, AdamW, statistics."""
    import torch

    model, images, labels = make_torch(settings, channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4, fused=True)

    def step():
        optimizer.zero_grad()
        with torch.autocast('cpu', torch.bfloat16, enabled=bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def infer_torch(settings, channels_last=False, bfloat16=False):
    """Makes a prediction step of torch."""
    import torch

    model, images, _ = make_torch(settings, channels_last)
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    model, images = model.eval().to(dtype), images.to(dtype)

    def step():
        with torch.inference_mode():
            return model(images).float().numpy()

    return step


def export_onnx(settings, path):
    """Writes torchvision's network as an ONNX file and returns its inputs, float32 [batch, 3, height, width]."""
    import torch

    model, images, _ = make_torch(settings)
    torch.onnx.export(model.eval(), (images,), path, dynamo=False, input_names=['images'])  # the other needs onnxscript
    return images.numpy()


def infer_onnxruntime(settings):
    """Makes a prediction step of ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = settings.cores
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'densenet.onnx')
        images = export_onnx(settings, path)
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda: session.run(None, {'images': images})


def infer_openvino(settings, precision='f32'):
    """Makes a prediction step of OpenVINO, one batch at a time on all cores."""
    from brain_jax.serving import runtimes

    properties = runtimes.openvino_properties(settings.cores, precision)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'densenet.onnx')
        images = export_onnx(settings, path)
        compiled = runtimes.import_openvino().Core().compile_model(path, 'CPU', properties)
    return lambda: compiled(images)


def infer_export(settings, form, runtime):
    """Makes the step that answers with an export of a run, from grey bytes to probabilities."""
    from brain_jax import train
    from brain_jax.serving import export

    config = settings.config
    model = train.create_model(config, NUM_CLASSES)
    names = tuple(f'class {i}' for i in range(NUM_CLASSES))
    network = export.Network(model, train.init_variables(config, model), config, names, 1.0, {})
    shape = (config.batch_size, config.image_size, config.image_size)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, f'model{export.SUFFIXES[form]}')
        export.WRITERS[form](path, network, export.describe(network, form))
        compute = export.list_loaders(form, network)[runtime](path)
    return lambda: compute(images)


STEPS = {
    'inference': {
        'brain_jax': infer_brain_jax,
        'flax': functools.partial(infer_brain_jax, contender='flax'),
        'keras_tensorflow': infer_keras,
        'keras_jax': infer_keras,
        'torch': infer_torch,
        'torch_channels_last': functools.partial(infer_torch, channels_last=True),
        'torch_bfloat16': functools.partial(infer_torch, channels_last=True, bfloat16=True),
        'onnxruntime': infer_onnxruntime,
        'openvino': infer_openvino,
        'openvino_bfloat16': functools.partial(infer_openvino, precision='bf16'),
    },
    'train': {
        'brain_jax': train_brain_jax,
        'flax': functools.partial(train_brain_jax, contender='flax'),
        'keras_tensorflow': train_keras,
        'keras_jax': train_keras,
        'torch': train_torch,
        'torch_channels_last': functools.partial(train_torch, channels_last=True),
        'torch_bfloat16': functools.partial(train_torch, channels_last=True, bfloat16=True),
    },
    'evaluation': {
        'brain_jax': evaluate_brain_jax,
        'flax': functools.partial(evaluate_brain_jax, contender='flax'),
    },
    'export': {
        'brain_jax': infer_brain_jax,
        'export_keras': functools.partial(infer_export, form='keras', runtime='keras'),
        'export_saved_model': functools.partial(infer_export, form='saved_model', runtime='tensorflow'),
        'export_stablehlo': functools.partial(infer_export, form='stablehlo', runtime='jax'),
        'export_onnxruntime': functools.partial(infer_export, form='onnx', runtime='onnxruntime'),
        'export_openvino': functools.partial(infer_export, form='onnx', runtime='openvino'),
        'export_openvino_bfloat16': functools.partial(infer_export, form='onnx', runtime='openvino_bfloat16'),
    },
}
