"""What a run tells while it trains: TensorBoard's files, and lines for whoever looks on."""

import contextlib
import sys

import flax.traverse_util
import jax
import numpy as np
from absl import logging
from clu import asynclib, parameter_overview

from brain_jax import InputError, augment, metrics


@contextlib.contextmanager
def open_writer(workdir):
    """Yields the CLU writer: TensorBoard files, and lines where no progress bar shows; of process 0 only.

    It writes in the background.

    Raises:
      InputError: where TensorBoard's files cannot be written.
    """
    from clu import metric_writers  # brings TensorFlow, for which a program that only answers should not wait

    writers = []
    if jax.process_index() == 0:
        writers.append(metric_writers.SummaryWriter(str(workdir)))
    if jax.process_index() == 0 and not sys.stderr.isatty():
        writers.append(metric_writers.LoggingWriter())
    writer = metric_writers.AsyncMultiWriter(writers)
    try:
        with metric_writers.ensure_flushes(writer):
            yield writer
    except asynclib.AsyncError as error:  # around TensorFlow's, whose first line names the operation and the file
        reason = str(error.__cause__).splitlines()[0].rpartition('; ')[2]
        raise InputError(
            f"TensorBoard's files in {workdir} cannot be written: {reason}; the checkpoints that are saved stand, and "
            'the same command goes on from the latest'
        ) from error


def make_hooks(writer, config, workdir, total_steps):
    """Returns what is called with the number of every step: it tells of progress, and profiles where asked to."""
    from clu import periodic_actions  # brings TensorFlow, as above

    hooks = [periodic_actions.ReportProgress(num_train_steps=total_steps, writer=writer)]
    if config.profile and jax.process_index() == 0:
        hooks.append(periodic_actions.Profile(logdir=str(workdir), num_profile_steps=3, profile_duration_ms=None))
    return hooks


def hyperparameters(config):
    """Returns the configuration as TensorBoard takes it: flat, and numbers, strings and booleans only."""
    flat = flax.traverse_util.flatten_dict(config.to_dict(), sep='.')
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in flat.items()}


def write_start(writer, config, params):
    """Writes what is known before the first step: the configuration and the parameters."""
    writer.write_hparams(hyperparameters(config))
    table = parameter_overview.get_parameter_overview(params, include_stats=False)
    writer.write_texts(0, {'parameters': f'```\n{table}\n```'})
    logging.info('%d parameters', parameter_overview.count_parameters(params))


def write_augmented(writer, step, key, batch, settings):
    """Writes up to 16 images of a training batch, of those on this process' devices, as the network sees them.

    Args:
      writer: a CLU `MetricWriter`.
      step: number of the step to show them at.
      key: random key of the batch's augmentation.
      batch: of `pipeline.train_batches`.
      settings: `config.augment`.
    """
    images, index = (
        np.concatenate([shard.data for shard in batch[name].addressable_shards])[:16] for name in ('image', 'index')
    )
    images = augment.augment_batch(key, images, index, settings)
    writer.write_images(step, {'augmented': np.asarray(images, np.uint8)[..., None]})


def write_scores(writer, step, split, scores, confusion, class_names):
    """Writes the scores of a split and the picture of its confusion matrix."""
    writer.write_scalars(step, {f'{split}_{name}': value for name, value in scores.items()})
    writer.write_images(step, {f'{split}_confusion': metrics.draw_confusion(confusion, class_names)})
    logging.info(
        'step %d, %s: accuracy %.2f %%, macro F1 %.4f, loss %.4f, %d images',
        *(step, split, 100 * scores['accuracy'], scores['macro_f1'], scores['loss'], scores['n']),
    )
