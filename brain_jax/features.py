"""Mode 'frozen': the backbone's features of every image, computed once and kept for the next run."""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging

from brain_jax import checkpoints, files, models, parallel
from brain_jax.data import pipeline


def use_features(dataset, model, params, batch_stats, config, mesh):
    """Puts the backbone's features in the place of the images, see `scale_features`.

    The factors go into the last BatchNorm, ahead of a ReLU and a mean that pass them on, so that the network stays a
    whole one which computes the scaled features itself.

    Args:
      dataset: a `pipeline.Dataset`; its images are those of the whole data set.
      model: a `DenseNet`.
      params: its parameters.
      batch_stats: its running statistics.
      config: the run's configuration.
      mesh: the devices.

    Returns:
      The `Dataset` with images float32 [views, channels], and the parameters with the last BatchNorm scaled.
    """
    pooled = load_features(dataset, model, params, batch_stats, config, mesh)
    dataset, factors = scale_features(dataset, pooled)
    last = jax.tree.map(lambda leaf: jax.device_put(leaf * factors, leaf.sharding), params['bn'])
    return dataset, params | {'bn': last}


def scale_features(dataset, pooled):
    """Scales features to standard deviation 1 over the training images.

    They differ in spread by seven orders of magnitude, and a head on them as they are hardly learns from the narrow
    ones.

    Args:
      dataset: a `pipeline.Dataset`.
      pooled: float32 [images, views, channels], of `load_features`.

    Returns:
      The `Dataset` with the scaled features for images, and the factors float32 [channels].
    """
    factors = 1 / np.maximum(pooled[dataset.train.index, 0].std(axis=0), 1e-6)
    scaled = pooled * factors
    splits = {
        split: dataclasses.replace(examples, images=scaled)
        for split in ('train', 'validation', 'test')
        if (examples := getattr(dataset, split)) is not None
    }
    return dataset._replace(**splits), factors


def draw_view(key, views):
    """Draws one of the views of each image for a training step: [batch, views, channels] -> [batch, channels]."""
    chosen = jax.random.randint(key, (views.shape[0], 1, 1), 0, views.shape[1])
    return jnp.take_along_axis(views, chosen, axis=1)[:, 0]


def center_gradients(grads, mean):
    """Returns the gradients as if the head saw features less their mean, see `center_update`."""
    head = grads['predictions']
    return grads | {'predictions': head | {'kernel': head['kernel'] - mean[:, None] * head['bias']}}


def center_update(old_params, new_params, mean):
    """Ends a training step with `center_gradients`: what the new kernel adds through the mean, the bias takes away.

    A head learns better on features of mean 0. With both functions it learns just as on those, and yet its parameters
    are for the features as they are, and as the whole network computes them.

    Args:
      old_params: parameters before the step.
      new_params: those after it.
      mean: float32 [channels], of the scaled features.

    Returns:
      The new parameters, with another bias of the head.
    """
    old, new = old_params['predictions'], new_params['predictions']
    bias = new['bias'] - mean @ (new['kernel'] - old['kernel'])
    return new_params | {'predictions': new | {'bias': bias}}


def load_features(dataset, model, params, batch_stats, config, mesh):
    """Returns the pooled features of every image of the data set, float32 [images, views, channels].

    The first view is the image as it is; with `config.augment.flip_horizontal` its mirror image is the second. The
    features stand beside the prepared records under a hash of the weights and of what is done to the images.
    """
    backbone = {name: variables for name, variables in params.items() if name != 'predictions'}
    key = {
        'variables': checkpoints.content_hash([backbone, batch_stats]),
        'model': config.model,
        'dtype': config.dtype,
        'image_size': config.image_size,
    }
    feature_step = make_feature_step(model, mesh)
    variables = {'params': params, 'batch_stats': batch_stats}
    views = []
    for mirrored in (False, True) if config.augment.flip_horizontal else (False,):
        name = hashlib.sha256(json.dumps(key | {'mirrored': mirrored}, sort_keys=True).encode()).hexdigest()[:16]
        path = dataset.folder / f'features_{name}.npy'
        if path.exists():
            logging.info('using the features that were computed before: %s', path)
            views.append(np.load(path))
            continue
        views.append(compute_features(feature_step, variables, dataset.train, config, mesh, mirrored=mirrored))
        if jax.process_index() == 0:
            _keep(path, views[-1])
    return np.stack(views, axis=1)


def make_feature_step(model, mesh):
    """Returns the compiled function (variables, batch, mirrored) -> pooled float32 [batch, channels], index."""

    def feature_step(variables, batch, mirrored):
        # Mirrored or not is known only when it runs, so that it is compiled once for both.
        images = jnp.where(mirrored, batch['image'][:, :, ::-1], batch['image'])
        _, outputs = model.apply(variables, models.normalize(images), return_features=True)
        return outputs['pooled'], batch['index']

    return jax.jit(feature_step, out_shardings=parallel.replicated(mesh))


def compute_features(feature_step, variables, examples, config, mesh, *, mirrored):
    """Computes the pooled features of all images, or of their mirror images: float32 [images, channels]."""
    everything = dataclasses.replace(
        examples,
        index=np.arange(len(examples.images), dtype=np.int32),
        labels=np.zeros(len(examples.images), np.int32),
    )
    batches = pipeline.sharded_eval_batches(everything, config.eval_batch_size, parallel.split_over_data(mesh))
    count = -(-len(everything) // config.eval_batch_size)
    description = 'Features of the mirror images' if mirrored else 'Features of the images'
    pooled = np.zeros((len(everything), variables['params']['predictions']['kernel'].shape[0]), np.float32)
    for batch in tqdm.tqdm(batches, description, total=count, unit=' batches', disable=None):
        values, index = jax.tree.map(np.asarray, feature_step(variables, batch, mirrored))
        pooled[index[index >= 0]] = values[index >= 0]
    logging.info('%s: %d', description.lower(), len(everything))
    return pooled


def _keep(path, pooled):
    """Writes features to a file that is whole or not there; where it cannot be written the run goes on without."""
    try:
        with files.replacing(path) as temporary:
            np.save(temporary, pooled)
    except OSError as error:
        reason = error.strerror or error  # NumPy's own, of a full disk, has none
        logging.warning('%s cannot be kept (%s): the next run computes the features anew', path, reason)
