"""Training of a DenseNet, state, steps and loop: the only module that knows all others.

How a run starts: from the latest checkpoint of its own workdir; else from the weights of `config.pretrained`; else from
random ones.
"""

import functools
import json
import pathlib
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import logging
from flax.training import train_state
from flax.traverse_util import flatten_dict
from jax.flatten_util import ravel_pytree

from brain_jax import (
    InputError,
    augment,
    checkpoints,
    features,
    interruption,
    metrics,
    models,
    optimizer,
    parallel,
    pretrained,
    run_folder,
    training_log,
)
from brain_jax.data import phantom, pipeline

PROGRESS = {  # what the host keeps
    'best_loss': None,
    'evaluations_since_best': 0,
    'wall_seconds': 0.0,
    'evaluation_missing': False,  # the run was stopped within it
}


class TrainState(train_state.TrainState):
    """Step, parameters and optimiser state, and what else a run that is stopped must not lose.

    Attributes:
      batch_stats: the running statistics.
      ema_params: averaged parameters, where asked for.
      metrics: `TrainMetrics` of the steps since the last report.
    """

    batch_stats: Any
    ema_params: Any = None
    metrics: Any = None

    @property
    def eval_params(self):
        """The parameters to evaluate and to hand over."""
        return self.params if self.ema_params is None else self.ema_params


def create_model(config, num_classes):
    """Returns the network of the configuration."""
    for field, allowed in (
        ('model', ('DenseNet121', 'DenseNet169', 'DenseNet201', '_DenseNetTiny')),
        ('dtype', ('float32', 'bfloat16')),
        ('batch_norm', ('train', 'frozen')),
        ('head', ('last', 'wide')),
        ('remat', ('none', 'dense_layers', 'full')),
    ):
        if config[field] not in allowed:
            raise InputError(f'{field} is {config[field]!r}: use {" or ".join(allowed[:3])}')
    return getattr(models, config.model)(
        num_classes=num_classes,
        dtype=jnp.dtype(config.dtype),
        batch_norm=config.batch_norm,
        momentum=config.batch_norm_momentum,
        remat=config.remat,
        head=config.head,
    )


def init_variables(config, model, head_alone=False):
    """Returns random `params` and `batch_stats`; where `head_alone` only the head's arrays, and the others' shapes."""
    key = jax.random.key(config.seed)
    images = jnp.zeros((1, 32, 32, 3), jnp.float32)  # parameters do not depend on the size of the image
    if not head_alone:
        return jax.jit(model.init)(key, images)
    variables = jax.eval_shape(model.init, key, images)
    # Of all random numbers these alone are compiled, which takes a fortieth of the time.
    head = jax.jit(lambda key: model.init(key, images)['params']['predictions'])(key)
    return variables | {'params': variables['params'] | {'predictions': head}}


def create_train_state(config, model, mesh, *, total_steps, steps_per_epoch):
    """Creates the state of step 0, on all devices.

    Returns:
      The `TrainState`, the learning-rate schedule, and the SHA-256 of the weights file ('' for random weights).
    """
    variables = init_variables(config, model, head_alone=bool(config.pretrained))
    weights_sha256 = ''
    if config.pretrained:
        variables, weights_sha256 = pretrained.load_pretrained(config.pretrained, variables)
    if jax.process_count() > 1:
        parallel.check_agreement(weights_sha256=weights_sha256, first_parameters=checkpoints.content_hash(variables))
    state, schedule = make_train_state(
        config, model, variables, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    return parallel.replicate(state, mesh), schedule, weights_sha256


def make_train_state(config, model, variables, *, total_steps, steps_per_epoch):
    """Returns the `TrainState` of step 0 with the given `params` and `batch_stats`, and the learning-rate schedule."""
    params = variables['params']
    tx, schedule = optimizer.create_optimizer(config, params, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    state = TrainState.create(
        apply_fn=model.apply,
        params=params,
        tx=tx,
        batch_stats=variables['batch_stats'],
        ema_params=jax.tree.map(jnp.copy, params) if config.ema_decay else None,
        metrics=metrics.TrainMetrics.empty(),
    )
    return state, schedule


def apply_network(model, variables, inputs, *, train):
    """Computes logits, from images or from their features.

    Args:
      model: a `DenseNet`.
      variables: its `params` and `batch_stats`.
      inputs: float32 [batch, height, width] in 0..255, or [batch, channels] pooled features.
      train: whether batch statistics are used and enter the running ones.

    Returns:
      logits: float32 [batch, classes], and the new `batch_stats`.
    """
    if inputs.ndim == 2:
        head = {'params': variables['params']['predictions']}
        return nn.Dense(model.num_classes).apply(head, inputs), variables['batch_stats']
    logits, updates = model.apply(variables, models.normalize(inputs), train=train, mutable=['batch_stats'])
    return logits, updates['batch_stats']


def averages_flips(config):
    """Tells whether answers are means over an image and its mirror image: where asked for, and shown in training."""
    return bool(config.average_flips and config.augment.flip_horizontal)


def stack_views(inputs, flips):
    """Returns what is asked about each image, [batch, views, ...]: the image and, where `flips`, its mirror image.

    Args:
      inputs: uint8 [batch, height, width], or float32 [batch, views, channels] of `features.load_features`.
      flips: see `averages_flips`.
    """
    if inputs.dtype != jnp.uint8:
        return inputs if flips else inputs[:, :1]
    # An image lies beside its mirror image: both are on one device. One network for all compiles faster than two.
    return jnp.stack([inputs, inputs[:, :, ::-1]] if flips else [inputs], axis=1)


def evaluate_network(model, config, variables, inputs):
    """Computes logits for evaluation, where `averages_flips` the mean of those of an image and its mirror image.

    Args:
      model: a `DenseNet`.
      config: the run's configuration.
      variables: its `params` and `batch_stats`.
      inputs: see `stack_views`.

    Returns:
      float32 [batch, classes].
    """
    views = stack_views(inputs, averages_flips(config))
    logits, _ = apply_network(model, variables, views.reshape(-1, *views.shape[2:]), train=False)
    return logits.reshape(*views.shape[:2], -1).mean(axis=1)


def step_keys(config, step):
    """Returns the random keys of a step: of its augmentation and of its mixup."""
    return jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step))


def make_train_step(model, config, class_weights, mesh, feature_moments=None):
    """Returns the compiled training step: (state, batch) -> (state, health).

    `health`, float32 [3], is the mean loss and the norms of the gradients and of the new parameters and statistics:
    finite as long as every number is. The state is donated. In mode 'frozen' `feature_moments` are those of
    `features.measure_moments`.
    """
    weights = jnp.asarray(class_weights, jnp.float32)

    def prepare(state, batch):
        """Returns inputs, target probabilities and loss weights of the batch."""
        inputs, labels = batch['image'], batch['label']
        targets = optax.smooth_labels(jax.nn.one_hot(labels, model.num_classes), config.label_smoothing)
        key_augment, key_mixup = step_keys(config, state.step)
        if config.mode == 'frozen':
            mean, deviation = feature_moments
            inputs = (features.draw_view(key_augment, inputs) - mean) / deviation
        else:
            inputs = augment.augment_batch(key_augment, inputs, batch['index'], config.augment)
        if config.mixup:
            inputs, targets = augment.mixup(key_mixup, inputs, targets, config.mixup)
        return inputs, targets, weights[labels]

    def loss_fn(params, batch_stats, inputs, targets, weights):
        variables = {'params': params, 'batch_stats': batch_stats}
        logits, batch_stats = apply_network(model, variables, inputs, train=True)
        losses = weights * optax.softmax_cross_entropy(logits, targets)
        return jnp.mean(losses), (batch_stats, losses, logits)

    def accumulate(carry, part, params):
        """Adds the gradients of one part of the batch."""
        grads, batch_stats = carry
        new_grads, (batch_stats, losses, logits) = jax.grad(loss_fn, has_aux=True)(params, batch_stats, *part)
        grads = jax.tree.map(lambda a, b: a + b / config.gradient_accumulation, grads, new_grads)
        return (grads, batch_stats), (losses, logits)

    def compute_gradients(state, examples):
        parts = config.gradient_accumulation
        if parts == 1:
            return jax.grad(loss_fn, has_aux=True)(state.params, state.batch_stats, *examples)
        # Every part takes each n-th image, so that the parts lie on the devices as the batch does.
        examples = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), examples)
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        scan = functools.partial(accumulate, params=state.params)
        (grads, batch_stats), outputs = jax.lax.scan(scan, (zeros, state.batch_stats), examples)
        losses, logits = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), outputs)
        return grads, (batch_stats, losses, logits)

    def train_step(state, batch):
        inputs, targets, weights = prepare(state, batch)
        if feature_moments is not None:
            state = state.replace(params=features.standardize_head(state.params, *feature_moments))
        grads, (batch_stats, losses, logits) = compute_gradients(state, (inputs, targets, weights))
        grads = optimizer.zero_frozen(grads, config.freeze)
        state = state.apply_gradients(grads=grads, batch_stats=batch_stats)
        if feature_moments is not None:
            state = state.replace(params=features.restore_head(state.params, *feature_moments))
        if config.ema_decay:
            ema_params = optax.incremental_update(state.params, state.ema_params, 1 - config.ema_decay)
            state = state.replace(ema_params=ema_params)
        gradient_norm = jnp.linalg.norm(ravel_pytree(grads)[0])
        update = metrics.TrainMetrics.single_from_model_output(
            loss=losses,
            correct=(jnp.argmax(logits, -1) == jnp.argmax(targets, -1)).astype(jnp.float32),
            gradient_norm=gradient_norm,
        )
        health = jnp.stack(
            [jnp.mean(losses), gradient_norm, jnp.linalg.norm(ravel_pytree((state.params, state.batch_stats))[0])]
        )
        return state.replace(metrics=state.metrics.merge(update)), health

    everywhere = parallel.replicated(mesh)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(everywhere, everywhere))


def make_eval_step(model, config, mesh):
    """Returns the compiled evaluation step: (params, batch_stats, batch) -> `EvalMetrics`."""

    def eval_step(params, batch_stats, batch):
        variables = {'params': params, 'batch_stats': batch_stats}
        logits = evaluate_network(model, config, variables, batch['image'])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
        return metrics.EvalMetrics.single_from_model_output(
            loss=losses, logits=logits, labels=batch['label'], mask=batch['mask']
        )

    return jax.jit(eval_step, out_shardings=parallel.replicated(mesh))


def evaluate(eval_step, state, examples, config, mesh, stop=None):
    """Returns the scores of a split (accuracy, macro_f1, loss, n) and its confusion matrix; None, None if stopped."""
    total = None
    for batch in pipeline.sharded_eval_batches(examples, config.eval_batch_size, parallel.split_over_data(mesh)):
        if stop is not None and stop.is_set():
            return None, None
        update = eval_step(state.eval_params, state.batch_stats, batch)
        total = update if total is None else total.merge(update)
    return metrics.summarize(total)


def is_due(step, every, last):
    """Tells whether something done every so many steps, a fraction may be, and after the last, is done after `step`."""
    return step // every > (step - 1) // every or step == last


def load_images(config, workdir):
    """Loads the images; in mode 'demo', without a data_dir, they are generated in the workdir."""
    config = config.copy_and_resolve_references()
    if config.mode == 'demo' and not config.data_dir:
        with config.unlocked():
            config.data_dir = str(workdir / 'phantom')
            config.prepared_dir = str(workdir / 'prepared')
        if not (workdir / 'phantom').exists():
            logging.info('drawing a dataset in %s', workdir / 'phantom')
            phantom.make_phantom(
                workdir / 'phantom',
                train_per_class=250,
                test_per_class=50,
                image_size=config.image_size,
                seed=config.seed,
            )
        logging.warning('the images of this demo are synthetic: its scores say nothing about real ones')
    return pipeline.load_images(config)


def balanced_weights(dataset):
    """Returns loss weights float [classes] under which every class counts alike; their mean over the images is 1."""
    counts = np.bincount(dataset.train.labels, minlength=len(dataset.class_names))
    return len(dataset.train) / (len(counts) * counts)


def check_health(step, health, state, manager):
    """Raises `FloatingPointError` where the loss, a gradient or a parameter of a step is not finite.

    Args:
      step: its number.
      health: what it returned.
      state: the state after it, or after the next one: what is not finite stays so.
      manager: of `checkpoints.open_checkpoints`.
    """
    loss, gradient_norm, parameter_norm = np.asarray(health)
    for value, name in ((loss, 'loss'), (gradient_norm, 'gradient norm'), (parameter_norm, 'parameter norm')):
        if not np.isfinite(value):
            checkpoints.wait_until_saved(manager)
            latest = manager.latest_step()
            good = (
                'There is no checkpoint yet' if latest is None else f'The last good checkpoint is that of step {latest}'
            )
            variables = {'params': state.params, 'batch_stats': state.batch_stats}
            sizes = {path: np.abs(leaf).max() for path, leaf in flatten_dict(variables, sep='/').items()}
            worst = max(sizes, key=lambda path: np.nan_to_num(sizes[path], nan=np.inf))
            raise FloatingPointError(
                f'step {step}: the {name} is {value}; the largest value, {sizes[worst]}, is in {worst}. {good} in '
                f'{manager.directory}; a lower learning_rate or gradient_clip may help'
            )


def update_progress(progress, validation):
    """Returns the host's progress after an evaluation, or after one that was stopped: `validation` is None."""
    progress = progress | {'evaluation_missing': validation is None}
    if validation is None:
        return progress
    if progress['best_loss'] is None or validation['loss'] < progress['best_loss']:
        return progress | {'best_loss': validation['loss'], 'evaluations_since_best': 0}
    return progress | {'evaluations_since_best': progress['evaluations_since_best'] + 1}


def validate(config, state, dataset, mesh, eval_step, writer, progress, stop):
    """Evaluates on the validation images; returns their scores, None where it was stopped, and the new progress."""
    scores, confusion = evaluate(eval_step, state, dataset.validation, config, mesh, stop)
    if scores is not None:
        training_log.write_scores(writer, int(state.step), 'validation', scores, confusion, dataset.class_names)
    return scores, update_progress(progress, scores)


def save(manager, state, progress, validation, start_time):
    """Saves a checkpoint, with the time that the run has taken."""
    checkpoints.save(manager, state, progress | {'wall_seconds': time.monotonic() - start_time}, validation)


def train(
    config,
    state,
    dataset,
    mesh,
    *,
    train_step,
    eval_step,
    schedule,
    total_steps,
    manager,
    writer,
    progress,
    start_time,
    stop,
):
    """Runs the training loop from `state.step` to `total_steps`, or until early stopping.

    Args:
      config: the run's configuration.
      state: `TrainState`; its memory is reused.
      dataset: a `pipeline.Dataset`.
      mesh: the devices.
      train_step: of `make_train_step`.
      eval_step: of `make_eval_step`.
      schedule: function from the step to the learning rate, for the log.
      total_steps: number of the last step.
      manager: of `checkpoints.open_checkpoints`.
      writer: a CLU `MetricWriter`.
      progress: as the last checkpoint holds it, or `PROGRESS`.
      start_time: of the run, on the monotonic clock, less pauses.
      stop: of `interruption.watch_signals`.

    Returns:
      The last state.

    Raises:
      FloatingPointError: when the loss, a gradient or a parameter is no longer finite.
      InputError: when a checkpoint cannot be written.
      Interrupted: when a signal asked to stop; what was learned is saved.
    """
    if progress['evaluation_missing']:
        validation, progress = validate(config, state, dataset, mesh, eval_step, writer, progress, stop)
        save(manager, state, progress, validation, start_time)
    if config.early_stopping and progress['evaluations_since_best'] >= config.early_stopping:
        return state  # the run was stopped early before it was resumed
    start_step = int(state.step)
    eval_every = config.eval_every_epochs * len(dataset.train) / config.batch_size
    hooks = training_log.make_hooks(writer, config, manager.directory.parent, total_steps)
    batches = pipeline.train_batches(
        dataset.train, batch_size=config.batch_size, seed=config.seed, start_step=start_step, num_steps=total_steps,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    batches = pipeline.Timed(pipeline.prefetch(batches, parallel.split_over_data(mesh)))
    hidden = parallel.hides_progress()
    bar = tqdm.tqdm(batches, 'Training', total_steps, initial=start_step, unit=' steps', disable=hidden)
    no_metrics = jax.jit(metrics.TrainMetrics.empty, out_shardings=parallel.replicated(mesh))
    last_health = None
    log_step, log_time = start_step, time.monotonic()
    for step, batch in enumerate(bar, start_step + 1):
        if step == 1 and config.mode != 'frozen' and jax.process_index() == 0:
            key_augment, _ = step_keys(config, 0)
            training_log.write_augmented(writer, 0, key_augment, batch, config.augment)
        with jax.profiler.StepTraceAnnotation('train', step_num=step):
            state, health = train_step(state, batch)
        if last_health is not None:  # of the step before, so that the device has its next step while the host looks
            check_health(step - 1, last_health, state, manager)
        last_health = health
        for hook in hooks:
            hook(step)
        if is_due(step, config.log_every_steps, total_steps):
            values = {name: float(value) for name, value in state.metrics.compute().items()}
            state = state.replace(metrics=no_metrics())
            seconds = time.monotonic() - log_time
            values |= {
                'learning_rate': float(schedule(step - 1)),
                'images_per_second': config.batch_size * (step - log_step) / seconds,
                'waiting_share': batches.take_seconds() / seconds,
            }
            writer.write_scalars(step, {f'train_{name}': value for name, value in values.items()})
            bar.set_postfix(loss=f'{values["loss"]:.3f}', accuracy=f'{values["accuracy"]:.3f}', refresh=False)
            log_step, log_time = step, time.monotonic()
        validation = None
        if dataset.validation is not None and is_due(step, eval_every, total_steps):
            check_health(step, health, state, manager)
            pause_time = time.monotonic()
            validation, progress = validate(config, state, dataset, mesh, eval_step, writer, progress, stop)
            log_time += time.monotonic() - pause_time  # evaluation is no part of the training speed
        is_asked_to_stop = interruption.is_asked_to_stop(stop, step)
        if validation or is_asked_to_stop or is_due(step, config.checkpoint_every_steps, total_steps):
            check_health(step, health, state, manager)
            save(manager, state, progress, validation, start_time)
        if is_asked_to_stop:
            raise interruption.Interrupted(
                f'step {step} of {total_steps} is saved: the same command goes on from there'
            )
        if config.early_stopping and progress['evaluations_since_best'] >= config.early_stopping:
            logging.info('step %d: stopped early', step)
            break
    return state


def final_scores(config, state, dataset, mesh, eval_step, manager, writer):
    """Evaluates the best checkpoint on validation and, for the first and only time, on the test split."""
    checkpoints.wait_until_saved(manager)
    best_step = manager.best_step()
    if best_step is not None and best_step != int(state.step):
        state, _ = checkpoints.restore(manager, state, best_step)
    scores = {'validation': None}
    for split in ('validation', 'test'):
        examples = getattr(dataset, split)
        if examples is not None:
            scores[split], confusion = evaluate(eval_step, state, examples, config, mesh)
            tag = {'validation': 'best_validation', 'test': 'test'}[split]
            training_log.write_scores(writer, int(state.step), tag, scores[split], confusion, dataset.class_names)
    return scores | {'best_step': int(state.step)}


def train_and_evaluate(config, workdir, images=None):
    """Trains a network, evaluates the chosen checkpoint and writes `summary.json`.

    The same call goes on where an earlier one was stopped.

    Args:
      config: as `configs/densenet121.py` makes it.
      workdir: the run's folder, made if need be.
      images: `pipeline.Images` of this configuration's data, where they are loaded already.

    Returns:
      The content of `summary.json`, a dictionary.

    Raises:
      InputError: for configurations, data and weights that cannot be used.
      FloatingPointError: when a loss, gradient or parameter is no longer finite.
      Interrupted: when a signal asked to stop; the same call goes on.
    """
    start_time = time.monotonic()
    workdir = pathlib.Path(workdir)
    mesh = parallel.make_mesh()
    run_folder.check_config(config)
    parallel.check_agreement(config=run_folder.resolve(config))
    parallel.check_batch_sizes(config, mesh)
    run_folder.check_workdir(config, workdir)
    run_folder.use_compilation_cache(config, workdir)
    if (workdir / 'summary.json').exists():
        logging.info('%s is finished: its summary.json stands', workdir)
        return json.loads((workdir / 'summary.json').read_text())

    images = images or parallel.first_then_others(lambda: load_images(config, workdir))
    dataset = pipeline.split_images(images, config)
    steps_per_epoch = len(dataset.train) / config.batch_size
    total_steps = max(1, round(config.num_epochs * steps_per_epoch))
    model = create_model(config, len(dataset.class_names))
    state, schedule, weights_sha256 = create_train_state(
        config, model, mesh, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    run = run_folder.describe_run(config, dataset, weights_sha256)
    run_folder.write_run(workdir / 'run.json', run)
    feature_moments = None
    if config.mode == 'frozen':
        pooled = features.load_features(dataset, model, state.params, state.batch_stats, config, mesh)
        dataset = features.use_features(dataset, pooled)
        feature_moments = features.measure_moments(dataset.train)

    parallel.first_then_others(functools.partial(checkpoints.remove_damaged, workdir))
    with checkpoints.open_checkpoints(workdir) as manager, training_log.open_writer(workdir) as writer:
        progress = PROGRESS
        if manager.latest_step() is None:
            training_log.write_start(writer, config, state.params)
        else:
            state, progress = checkpoints.restore(manager, state, manager.latest_step())
            logging.info('going on from step %d of %d in %s', state.step, total_steps, workdir)
        start_time -= progress['wall_seconds']  # what the run has taken before it was stopped
        weights = balanced_weights(dataset) if config.class_weights == 'balanced' else np.ones(model.num_classes)
        eval_step = make_eval_step(model, config, mesh)
        with interruption.watch_signals() as stop:
            state = train(
                *(config, state, dataset, mesh),
                train_step=make_train_step(model, config, weights, mesh, feature_moments),
                eval_step=eval_step,
                schedule=schedule,
                total_steps=total_steps,
                manager=manager,
                writer=writer,
                progress=progress,
                start_time=start_time,
                stop=stop,
            )
        scores = final_scores(config, state, dataset, mesh, eval_step, manager, writer)

    summary = scores | {
        'steps': int(state.step),
        'wall_seconds': round(time.monotonic() - start_time, 1),
        'mode': config.mode,
        'config_sha256': run_folder.config_hash(config),
        **{name: run[name] for name in ('dataset', 'split_sha256', 'weights_sha256')},
    }
    run_folder.write_json(workdir / 'summary.json', summary)
    logging.info('wrote %s; see the curves with: tensorboard --logdir %s', workdir / 'summary.json', workdir)
    return summary
