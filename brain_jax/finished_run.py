"""A finished run and its answers."""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
import tqdm

from brain_jax import InputError, checkpoints, features, models, parallel, run_folder, train
from brain_jax.data import pipeline


class Run(NamedTuple):
    """A finished run, ready to predict.

    Attributes:
      workdir: pathlib.Path, its folder.
      run: content of its `run.json`.
      config: its configuration.
      dataset: a `pipeline.Dataset`.
      inputs: the same with what the network reads: in mode 'frozen' features for images.
      model: a `DenseNet`.
      variables: `params`, averaged where the run averaged them, and `batch_stats` of the chosen checkpoint.
      mesh: the devices.
      logits_step: compiled function (variables, batch) -> logits, mask.
      step: number of the chosen checkpoint.
      checkpoint_sha256: of its parameters and running statistics.
    """

    workdir: pathlib.Path
    run: dict
    config: ml_collections.ConfigDict
    dataset: pipeline.Dataset
    inputs: pipeline.Dataset
    model: models.DenseNet
    variables: dict
    mesh: jax.sharding.Mesh
    logits_step: Callable
    step: int
    checkpoint_sha256: str


def load_run(workdir, data_dir=None, groups=None, *, images=None, pooled=None):
    """Loads a finished run: its data, and the checkpoint that validation chose.

    Args:
      workdir: the run's folder.
      data_dir: where the images are now, or others of the same classes; None: where the run found them.
      groups: another group table, '' for none; None: that of the run.
      images: `pipeline.Images` of that folder, where they are loaded already.
      pooled: the backbone's features of `images` for a run of mode 'frozen', float32 [images, channels]. Without them
        the whole network computes the answers.

    Returns:
      A `Run`.

    Raises:
      InputError: where the folder holds no finished run, or the data other classes.
    """
    workdir = pathlib.Path(workdir)
    run, summary = run_folder.read_finished_run(workdir)
    config, model = read_network(workdir, run)
    dataset = load_dataset(workdir, config, run['class_names'], data_dir, groups, images)
    mesh = parallel.make_mesh()
    variables = load_variables(workdir, config, model, mesh, summary['best_step'])
    return Run(
        workdir=workdir,
        run=run,
        config=config,
        dataset=dataset,
        inputs=dataset if pooled is None else features.use_features(dataset, pooled),
        model=model,
        variables=variables,
        mesh=mesh,
        logits_step=make_logits_step(model, config, mesh),
        step=summary['best_step'],
        checkpoint_sha256=checkpoints.content_hash([variables['params'], variables['batch_stats']]),
    )


def load_dataset(workdir, config, class_names, data_dir=None, groups=None, images=None):
    """Loads the images of a run, and splits them as it did.

    Args:
      workdir: pathlib.Path, the run's folder.
      config: its configuration; `data_dir` and `groups` in it are set to what is given.
      class_names: of its classes.
      data_dir, groups, images: see `load_run`.

    Returns:
      A `pipeline.Dataset`.

    Raises:
      InputError: where the data cannot be read, or has other classes.
    """
    config.data_dir = data_dir or config.data_dir
    config.groups = config.groups if groups is None else groups
    dataset = pipeline.split_images(images or train.load_images(config, workdir), config)
    if list(dataset.class_names) != list(class_names):
        raise InputError(
            f'{config.data_dir} has the classes {", ".join(dataset.class_names)}, but the run in {workdir} knows '
            f'{", ".join(class_names)}'
        )
    return dataset


def read_network(workdir, run):
    """Returns the configuration and the `DenseNet` of a run, and sets up the cache of compiled programs.

    Args:
      workdir: pathlib.Path, the run's folder.
      run: content of its `run.json`.

    Raises:
      InputError: where the configuration is of another version.
    """
    config = ml_collections.ConfigDict(run['config'])
    try:
        run_folder.use_compilation_cache(config, workdir)
        return config, train.create_model(config, len(run['class_names']))
    except (AttributeError, KeyError) as error:  # of ml_collections: the field, in quotes
        field = str(error).strip('"\'')
        raise InputError(
            f'the run in {workdir} is of another version of brain_jax: its configuration lacks {field}'
        ) from None


def load_variables(workdir, config, model, mesh, step):
    """Loads what the network of a checkpoint is evaluated with.

    Args:
      workdir: the run's folder.
      config: the run's configuration.
      model: its `DenseNet`.
      mesh: the devices to load onto.
      step: number of the checkpoint.

    Returns:
      `params`, averaged where the run averaged them, and `batch_stats`.

    Raises:
      InputError: where the checkpoint is lost, damaged, or of another network.
    """
    variables = jax.eval_shape(lambda: train.init_variables(config, model))
    if config.ema_decay:
        variables = variables | {'ema_params': variables['params']}
    everywhere = parallel.replicated(mesh)
    variables = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), variables)
    with checkpoints.open_checkpoints(workdir) as manager:
        variables = checkpoints.restore_variables(manager, variables, step)
    return {'params': variables.get('ema_params', variables['params']), 'batch_stats': variables['batch_stats']}


def make_logits_step(model, config, mesh):
    """Returns the compiled function (variables, batch) -> logits float32 [batch, classes], mask bool [batch]."""

    def logits_step(variables, batch):
        return train.evaluate_network(model, config, variables, batch['image']), batch['mask']

    return jax.jit(logits_step, out_shardings=parallel.replicated(mesh))


def predict(run, split):
    """Computes the answers of a finished run.

    Args:
      run: a `Run`.
      split: 'train', 'validation' or 'test'.

    Returns:
      Logits float32 [n, classes], in the order of the split's examples.
    """
    examples = getattr(run.inputs, split)
    batches = pipeline.sharded_eval_batches(examples, run.config.eval_batch_size, parallel.split_over_data(run.mesh))
    count = -(-len(examples) // run.config.eval_batch_size)
    parts = []
    for batch in tqdm.tqdm(batches, f'Answers to {split}', total=count, unit=' batches', disable=None):
        logits, mask = jax.tree.map(np.asarray, run.logits_step(run.variables, batch))
        parts.append(logits[mask])
    return np.concatenate(parts)


def pooled_features(run):
    """Computes what the head of a run sees of every image of its data set, mirrored none: float32 [images, channels].

    In mode 'frozen' they were computed for the training, and kept.
    """
    if run.config.mode == 'frozen':
        variables = run.variables['params'], run.variables['batch_stats']
        return features.load_features(run.dataset, run.model, *variables, run.config, run.mesh)[:, 0]
    feature_step = features.make_feature_step(run.model, run.mesh)
    return features.compute_features(
        feature_step, run.variables, run.dataset.train, run.config, run.mesh, mirrored=False
    )
