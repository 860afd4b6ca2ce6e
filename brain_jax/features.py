"""Mode 'frozen': the backbone's features of every image, computed once and kept for the next run."""

import dataclasses
import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import logging
from jax.experimental import multihost_utils

from brain_jax import checkpoints, files, models, parallel
from brain_jax.data import pipeline


def use_features(dataset, pooled):
    """Returns a `pipeline.Dataset` with features, float32 [images, views, channels], in the place of its images."""
    splits = {
        split: dataclasses.replace(examples, images=pooled)
        for split in ('train', 'validation', 'test')
        if (examples := getattr(dataset, split)) is not None
    }
    return dataset._replace(**splits)


def measure_moments(examples):
    """Returns mean and standard deviation of the features of some images over all views, float32 [channels] each."""
    mine = examples.images[examples.index]
    return mine.mean(axis=(0, 1)), np.maximum(mine.std(axis=(0, 1)), 1e-6)


def draw_view(key, views):
    """Draws one of the views of each image for a training step: [batch, views, channels] -> [batch, channels]."""
    chosen = jax.random.randint(key, (views.shape[0], 1, 1), 0, views.shape[1])
    return jnp.take_along_axis(views, chosen, axis=1)[:, 0]


def standardize_head(params, mean, deviation):
    """Returns the parameters with the head that answers the same on standardised features, see `restore_head`.

    Features differ in spread by seven orders of magnitude, and lie far from 0; a head on them as they are hardly learns
    from the narrow ones. So a training step learns on features of mean 0 and deviation 1. Between steps the parameters
    are for the features as they are, and as the whole network computes them.

    Args:
      params: the network's parameters.
      mean: float32 [channels].
      deviation: float32 [channels], standard deviations.

    Returns:
      The parameters, with another head.
    """
    kernel, bias = params['predictions']['kernel'], params['predictions']['bias']
    bias = bias + jnp.matmul(mean, kernel, precision='highest')
    return params | {'predictions': {'kernel': kernel * deviation[:, None], 'bias': bias}}


def restore_head(params, mean, deviation):
    """Undoes `standardize_head`."""
    kernel, bias = params['predictions']['kernel'], params['predictions']['bias']
    kernel = kernel / deviation[:, None]
    bias = bias - jnp.matmul(mean, kernel, precision='highest')
    return params | {'predictions': {'kernel': kernel, 'bias': bias}}


def load_features(dataset, model, params, batch_stats, config, mesh):
    """Returns the pooled features of every image of the data set, float32 [images, views, channels].

    The first view is the image as it is; with `config.augment.flip_horizontal` its mirror image is the second. The
    features stand beside the prepared records under a hash of the weights and of what is done to the images.
    """
    backbone = {name: variables for name, variables in params.items() if name != 'predictions'}
    key = {
        'variables': checkpoints.content_hash([backbone, batch_stats]),
        'model': config.model,
        'head': config.head,
        'dtype': config.dtype,
        'image_size': config.image_size,
    }
    feature_step = make_feature_step(model, mesh)
    variables = {'params': params, 'batch_stats': batch_stats}
    views = []
    for mirrored in (False, True) if config.augment.flip_horizontal else (False,):
        name = hashlib.sha256(json.dumps(key | {'mirrored': mirrored}, sort_keys=True).encode()).hexdigest()[:16]
        path = dataset.folder / f'features_{name}.npy'
        if np.all(multihost_utils.process_allgather(np.array(path.exists()))):
            logging.info('using the features that were computed before: %s', path)
            views.append(np.load(path))
            continue
        views.append(compute_features(feature_step, variables, dataset.train, config, mesh, mirrored=mirrored))
        parallel.first_then_others(functools.partial(_keep, path, views[-1]))
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
    for batch in tqdm.tqdm(batches, description, total=count, unit=' batches', disable=parallel.hides_progress()):
        values, index = jax.tree.map(np.asarray, feature_step(variables, batch, mirrored))
        pooled[index[index >= 0]] = values[index >= 0]
    logging.info('%s: %d', description.lower(), len(everything))
    return pooled


def _keep(path, pooled):
    """Writes features to a file that is whole or not there; where it cannot be written the run goes on without.

    One that is there stays: the first of several processes wrote it.
    """
    if path.exists():
        return
    try:
        with files.replacing(path) as temporary:
            np.save(temporary, pooled)
    except OSError as error:
        reason = error.strerror or error  # NumPy's own, of a full disk, has none
        logging.warning('%s cannot be kept (%s): the next run computes the features anew', path, reason)
