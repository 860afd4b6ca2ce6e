"""Training and evaluation of a DenseNet: the only module that knows all others.

How a run starts: from the latest checkpoint of its own workdir; else from the weights of `config.pretrained`; else from
random ones.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import operator
import os
import pathlib
import sys
import time
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import logging
from clu import metric_writers, parameter_overview, periodic_actions
from flax.training import train_state

from brain_jax import InputError, augment, checkpoints, metrics, models, optimizer, parallel, pretrained
from brain_jax.data import phantom, pipeline

PROGRESS = {'best_loss': None, 'evaluations_since_best': 0, 'wall_seconds': 0.0}  # what the host keeps


class TrainState(train_state.TrainState):
    """Step, parameters and optimiser state, with the running statistics and, where asked for, averaged parameters."""

    batch_stats: Any
    ema_params: Any = None

    @property
    def eval_params(self):
        """The parameters to evaluate and to hand over."""
        return self.params if self.ema_params is None else self.ema_params


def create_model(config, num_classes):
    """Returns the network of the configuration."""
    networks = {'DenseNet121': models.DenseNet121, 'DenseNet169': models.DenseNet169, 'DenseNet201': models.DenseNet201}
    for field, allowed in (
        ('model', networks),
        ('dtype', ('float32', 'bfloat16')),
        ('batch_norm', ('train', 'frozen')),
    ):
        if config[field] not in allowed:
            raise InputError(f'{field} is {config[field]!r}: use one of {", ".join(allowed)}')
    return networks[config.model](
        num_classes=num_classes,
        dtype=jnp.dtype(config.dtype),
        batch_norm=config.batch_norm,
        momentum=config.batch_norm_momentum,
    )


def create_train_state(config, model, mesh, *, total_steps, steps_per_epoch):
    """Creates the state of step 0, on all devices.

    Returns:
      The `TrainState`, the learning-rate schedule, and the SHA-256 of the weights file ('' for random weights).
    """
    images = jnp.zeros((1, 32, 32, 3), jnp.float32)  # parameters do not depend on the size of the image
    variables = jax.jit(model.init)(jax.random.key(config.seed), images)
    weights_sha256 = ''
    if config.pretrained:
        variables, weights_sha256 = pretrained.load_pretrained(config.pretrained, variables)
    params, batch_stats = variables['params'], variables['batch_stats']
    tx, schedule = optimizer.create_optimizer(config, params, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    state = TrainState.create(
        apply_fn=model.apply,
        params=params,
        tx=tx,
        batch_stats=batch_stats,
        ema_params=jax.tree.map(jnp.copy, params) if config.ema_decay else None,
    )
    return jax.device_put(state, parallel.replicated(mesh)), schedule, weights_sha256


def apply_network(model, config, variables, inputs, *, train):
    """Computes logits, from images or, in mode 'frozen', from their features.

    Args:
      model: a `DenseNet`.
      config: the run's configuration.
      variables: its `params` and `batch_stats`.
      inputs: float32 [batch, height, width] in 0..255, or [batch, channels] pooled features.
      train: whether batch statistics are used and enter the running ones.

    Returns:
      logits: float32 [batch, classes], and the new `batch_stats`.
    """
    if config.mode == 'frozen':
        head = {'params': variables['params']['predictions']}
        return nn.Dense(model.num_classes).apply(head, inputs), variables['batch_stats']
    logits, updates = model.apply(variables, models.normalize(inputs), train=train, mutable=['batch_stats'])
    return logits, updates['batch_stats']


def make_train_step(model, config, class_weights, mesh):
    """Returns the compiled training step: (state, batch) -> (state, `TrainMetrics`, health).

    `health`, float32 [3], is the mean loss and the norms of the gradients and of the new parameters and statistics:
    finite as long as every number is. The state is donated.
    """
    weights = jnp.asarray(class_weights, jnp.float32)

    def prepare(state, batch):
        """Returns inputs, target probabilities and loss weights of the batch."""
        inputs, labels = batch['image'], batch['label']
        targets = optax.smooth_labels(jax.nn.one_hot(labels, model.num_classes), config.label_smoothing)
        key_augment, key_mixup = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), state.step))
        if config.mode != 'frozen':
            inputs = augment.augment_batch(key_augment, inputs, batch['index'], config.augment)
        if config.mixup:
            inputs, targets = augment.mixup(key_mixup, inputs, targets, config.mixup)
        return inputs, targets, weights[labels]

    def loss_fn(params, batch_stats, inputs, targets, weights):
        variables = {'params': params, 'batch_stats': batch_stats}
        logits, batch_stats = apply_network(model, config, variables, inputs, train=True)
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
        grads, (batch_stats, losses, logits) = compute_gradients(state, (inputs, targets, weights))
        grads = optimizer.zero_frozen(grads, config.freeze)
        state = state.apply_gradients(grads=grads, batch_stats=batch_stats)
        if config.ema_decay:
            ema_params = optax.incremental_update(state.params, state.ema_params, 1 - config.ema_decay)
            state = state.replace(ema_params=ema_params)
        gradient_norm = optax.global_norm(grads)
        update = metrics.TrainMetrics.single_from_model_output(
            loss=losses,
            correct=(jnp.argmax(logits, -1) == jnp.argmax(targets, -1)).astype(jnp.float32),
            gradient_norm=gradient_norm,
        )
        health = jnp.stack([jnp.mean(losses), gradient_norm, optax.global_norm((state.params, state.batch_stats))])
        return state, update, health

    everywhere = parallel.replicated(mesh)
    return jax.jit(train_step, donate_argnums=0, out_shardings=(everywhere, everywhere, everywhere))


def make_eval_step(model, config, mesh):
    """Returns the compiled evaluation step: (params, batch_stats, batch) -> `EvalMetrics`."""

    def eval_step(params, batch_stats, batch):
        variables = {'params': params, 'batch_stats': batch_stats}
        logits, _ = apply_network(model, config, variables, batch['image'], train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
        return metrics.EvalMetrics.single_from_model_output(
            loss=losses, logits=logits, labels=batch['label'], mask=batch['mask']
        )

    return jax.jit(eval_step, out_shardings=parallel.replicated(mesh))


def make_feature_step(model, mesh):
    """Returns the compiled function (variables, image uint8 [batch, size, size]) -> float32 [batch, channels]."""

    def feature_step(variables, images):
        _, features = model.apply(variables, models.normalize(images), return_features=True)
        return features['pooled']

    return jax.jit(feature_step, out_shardings=parallel.replicated(mesh))


def process_batches(examples, config, mesh):
    """Returns batches of a whole split on the devices, as `eval_step` takes them."""
    batches = pipeline.eval_batches(
        examples,
        batch_size=config.eval_batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return pipeline.prefetch(batches, parallel.split_over_data(mesh))


def evaluate(eval_step, state, examples, config, mesh):
    """Returns the scores of a split (accuracy, macro_f1, loss, n) and its confusion matrix."""
    total = None
    for batch in process_batches(examples, config, mesh):
        update = eval_step(state.eval_params, state.batch_stats, batch)
        total = update if total is None else total.merge(update)
    return metrics.summarize(total)


def extract_features(model, state, dataset, config, mesh):
    """Replaces the images of a data set by the backbone's pooled features, float32 [channels] each."""
    feature_step = make_feature_step(model, mesh)
    variables = {'params': state.params, 'batch_stats': state.batch_stats}
    splits = {}
    for split in ('train', 'validation', 'test'):
        examples = getattr(dataset, split)
        if examples is None:
            continue
        channels = variables['params']['predictions']['kernel'].shape[0]
        features = np.zeros((len(examples.images), channels), np.float32)
        batches = process_batches(examples, config, mesh)
        count = -(-len(examples) // config.eval_batch_size)
        for batch in tqdm.tqdm(batches, f'Features of {split}', total=count, unit=' batches', disable=None):
            index = jax.device_put(batch['index'], parallel.replicated(mesh))
            pooled = np.asarray(feature_step(variables, batch['image']))
            features[np.asarray(index)[np.asarray(index) >= 0]] = pooled[np.asarray(index) >= 0]
        splits[split] = dataclasses.replace(examples, images=features)
        logging.info('features of %s: %d images', split, len(examples))
    return dataset._replace(**splits)


def is_due(step, every, last):
    """Tells whether something done every so many steps, and after the last, is done after `step` steps."""
    return step % every == 0 or step == last


def describe_run(config, dataset, weights_sha256):
    """Returns what a run is, for its folder: configuration, classes, preprocessing, data and versions."""
    packages = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'tensorflow-datasets', 'numpy', 'ml-collections', 'clu')
    return {
        'config': config.to_dict(),
        'class_names': list(dataset.class_names),
        'preprocessing': {
            'channels': 'grey',
            'pad': 'black, to a centred square',
            'resize': 'antialiased bilinear',
            'image_size': config.image_size,
            'scale': 1 / 255,
            'mean': models.IMAGENET_MEAN,
            'standard_deviation': models.IMAGENET_STANDARD_DEVIATION,
        },
        'dataset': dataset.name,
        'split_sha256': dataset.split_sha256,
        'weights_sha256': weights_sha256,
        'versions': {package: importlib.metadata.version(package) for package in packages},
    }


def config_hash(config):
    """Returns the SHA-256 of the resolved configuration, as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()


def write_json(path, value):
    """Writes a JSON file that is whole or not there."""
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(value, indent=2) + '\n')
    os.replace(temporary, path)


def check_workdir(config, workdir):
    """Raises `InputError` where the folder holds a run of another configuration, and names the fields that differ."""
    run_file = workdir / 'run.json'
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f'the workdir {workdir} is a file: give a folder')
    if not run_file.exists():
        return
    flatten = functools.partial(flax.traverse_util.flatten_dict, sep='.')
    old = flatten(json.loads(run_file.read_text())['config'])
    new = flatten(json.loads(json.dumps(config.to_dict())))  # as JSON has it: tuples are lists there
    differences = [
        f'{field}: {old.get(field)!r} there, {new.get(field)!r} now'
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
    ]
    if differences:
        raise InputError(
            f'the workdir {workdir} belongs to another configuration ({"; ".join(differences)}); '
            'give the same configuration to go on with it, or another --workdir'
        )


def check_config(config):
    """Raises `InputError` for values that no run can use."""
    modes = ('finetune', 'frozen', 'scratch', 'demo')
    rules = [
        (config.mode in modes, 'mode', f'one of {", ".join(modes)}'),
        (0 <= config.seed < 2**32, 'seed', 'an integer from 0 to 2**32 - 1'),
        (config.num_epochs > 0, 'num_epochs', 'more than 0'),
        (config.batch_size > 0, 'batch_size', 'at least 1'),
        (config.eval_batch_size > 0, 'eval_batch_size', 'at least 1'),
        (config.gradient_accumulation > 0, 'gradient_accumulation', 'at least 1'),
        (config.image_size >= 32, 'image_size', 'at least 32 pixels'),
        (config.learning_rate > 0, 'learning_rate', 'more than 0'),
        (0 <= config.warmup_fraction < 1, 'warmup_fraction', 'at least 0 and less than 1'),
        (0 <= config.label_smoothing < 1, 'label_smoothing', 'at least 0 and less than 1'),
        (0 <= config.ema_decay < 1, 'ema_decay', 'at least 0 and less than 1'),
        (config.mixup >= 0, 'mixup', 'at least 0'),
        (0 <= config.augment.zoom < 1, 'augment.zoom', 'at least 0 and less than 1'),
        (config.class_weights in ('none', 'balanced'), 'class_weights', "'none' or 'balanced'"),
        (config.log_every_steps > 0, 'log_every_steps', 'at least 1'),
        (config.checkpoint_every_steps > 0, 'checkpoint_every_steps', 'at least 1'),
        (config.eval_every_epochs > 0, 'eval_every_epochs', 'more than 0'),
        (
            not config.early_stopping or config.validation_fraction,
            'early_stopping',
            '0 where validation_fraction is 0: nothing tells when to stop',
        ),
    ]
    for holds, field, wanted in rules:
        if not holds:
            raise InputError(f'config.{field} is {operator.attrgetter(field)(config)!r}: give {wanted}')


def load_data(config, workdir):
    """Loads the data set; in mode 'demo', without a data_dir, one is generated in the workdir."""
    config = config.copy_and_resolve_references()
    if config.mode == 'demo' and not config.data_dir:
        with config.unlocked():
            config.data_dir = str(workdir / 'phantom')
            config.prepared_dir = str(workdir / 'prepared')
        if not (workdir / 'phantom').exists():
            phantom.make_phantom(workdir / 'phantom', train_per_class=300, test_per_class=75, seed=config.seed)
        logging.info('The images of this demo are synthetic: its scores say nothing about real ones.')
    return pipeline.load_dataset(config)


def balanced_weights(labels, num_classes):
    """Returns loss weights float32 [classes] under which every class counts alike, with mean 1 over the images."""
    return len(labels) / (num_classes * np.bincount(labels, minlength=num_classes))


def create_writer(workdir):
    """Returns the CLU writer: TensorBoard files, and plain lines where no progress bar shows."""
    writers = []
    if jax.process_index() == 0:
        writers.append(metric_writers.SummaryWriter(str(workdir)))
    if not sys.stderr.isatty():
        writers.append(metric_writers.LoggingWriter())
    return metric_writers.AsyncMultiWriter(writers)


def write_scores(writer, step, split, scores, confusion, class_names):
    """Writes the scores of a split and the picture of its confusion matrix."""
    writer.write_scalars(step, {f'{split}_{name}': value for name, value in scores.items()})
    writer.write_images(step, {f'{split}_confusion': metrics.draw_confusion(confusion, class_names)})
    logging.info(
        'step %d, %s: accuracy %.2f %%, macro F1 %.4f, loss %.4f, %d images',
        step,
        split,
        100 * scores['accuracy'],
        scores['macro_f1'],
        scores['loss'],
        scores['n'],
    )


def write_augmented(writer, step, config, batch):
    """Writes up to 16 images of a training batch as the network sees them."""
    key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step))[0]
    images = augment.augment_batch(key, batch['image'][:16], batch['index'][:16], config.augment)
    writer.write_images(step, {'augmented': np.asarray(images, np.uint8)[..., None]})


def check_health(step, health, manager):
    """Raises `FloatingPointError` where the loss, a gradient or a parameter of a step is not finite."""
    loss, gradient_norm, parameter_norm = np.asarray(health)
    for value, name in ((loss, 'loss'), (gradient_norm, 'gradient norm'), (parameter_norm, 'parameter norm')):
        if not np.isfinite(value):
            manager.wait_until_finished()
            raise FloatingPointError(
                f'step {step}: the {name} is {value}. The last good checkpoint is that of step {manager.latest_step()} '
                f'in {manager.directory}; a lower learning_rate or gradient_clip may help'
            )


def update_progress(progress, validation):
    """Returns the host's progress after an evaluation."""
    if progress['best_loss'] is None or validation['loss'] < progress['best_loss']:
        return progress | {'best_loss': validation['loss'], 'evaluations_since_best': 0}
    return progress | {'evaluations_since_best': progress['evaluations_since_best'] + 1}


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
    seconds_so_far,
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
      seconds_so_far: function that tells the run's age, for the checkpoints.

    Returns:
      The last state.

    Raises:
      FloatingPointError: when the loss, a gradient or a parameter is no longer finite.
    """
    start_step, log_time = int(state.step), time.monotonic()
    eval_every = max(1, round(config.eval_every_epochs * len(dataset.train) / config.batch_size))
    hooks = [periodic_actions.ReportProgress(num_train_steps=total_steps, writer=writer)]
    if config.profile:
        hooks.append(periodic_actions.Profile(logdir=str(manager.directory.parent), num_profile_steps=3))
    batches = pipeline.train_batches(
        dataset.train, batch_size=config.batch_size, seed=config.seed, start_step=start_step, num_steps=total_steps,
        process_index=jax.process_index(), process_count=jax.process_count(),
    )  # fmt: skip
    batches = pipeline.prefetch(batches, parallel.split_over_data(mesh))
    if config.early_stopping and progress['evaluations_since_best'] >= config.early_stopping:
        return state  # stopped early before the run was resumed
    bar = tqdm.tqdm(batches, 'Training', total_steps, initial=start_step, unit=' steps', disable=None)
    collected, last_health = None, None
    for step, batch in enumerate(bar, start_step + 1):
        if step == 1 and config.mode != 'frozen':
            write_augmented(writer, 0, config, batch)
        with jax.profiler.StepTraceAnnotation('train', step_num=step):
            state, update, health = train_step(state, batch)
        if last_health is not None:  # of the step before, so that the device has its next step while the host looks
            check_health(step - 1, last_health, manager)
        last_health = health
        collected = update if collected is None else collected.merge(update)
        for hook in hooks:
            hook(step)
        if is_due(step, config.log_every_steps, total_steps):
            values = {name: float(value) for name, value in collected.compute().items()}
            seconds, log_time, collected = time.monotonic() - log_time, time.monotonic(), None
            images = config.batch_size * ((step - start_step - 1) % config.log_every_steps + 1)
            values |= {'learning_rate': float(schedule(step - 1)), 'images_per_second': images / seconds}
            writer.write_scalars(step, {f'train_{name}': value for name, value in values.items()})
            bar.set_postfix(loss=f'{values["loss"]:.3f}', accuracy=f'{values["accuracy"]:.3f}', refresh=False)
        validation = None
        if dataset.validation is not None and is_due(step, eval_every, total_steps):
            check_health(step, health, manager)
            validation, confusion = evaluate(eval_step, state, dataset.validation, config, mesh)
            write_scores(writer, step, 'validation', validation, confusion, dataset.class_names)
            progress = update_progress(progress, validation)
        stop = config.early_stopping and progress['evaluations_since_best'] >= config.early_stopping
        if validation or stop or is_due(step, config.checkpoint_every_steps, total_steps):
            check_health(step, health, manager)
            checkpoints.save(manager, state, progress | {'wall_seconds': seconds_so_far()}, validation)
        if stop:
            logging.info('step %d: stopped early', step)
            break
    return state


def final_scores(config, state, dataset, mesh, eval_step, manager, writer):
    """Evaluates the best checkpoint on validation and, for the first and only time, on the test split."""
    best_step = manager.best_step()
    if best_step is not None and best_step != int(state.step):
        state, _ = checkpoints.restore(manager, state, best_step)
    scores = {'validation': None}
    for split in ('validation', 'test'):
        examples = getattr(dataset, split)
        if examples is not None:
            scores[split], confusion = evaluate(eval_step, state, examples, config, mesh)
            write_scores(writer, int(state.step), f'final_{split}', scores[split], confusion, dataset.class_names)
    return scores | {'best_step': int(state.step)}


def train_and_evaluate(config, workdir):
    """Trains a network, evaluates the chosen checkpoint and writes `summary.json`.

    The same call goes on where an earlier one was stopped.

    Args:
      config: as `configs/densenet121.py` makes it.
      workdir: the run's folder, made if need be.

    Returns:
      The content of `summary.json`, a dictionary.

    Raises:
      InputError: for configurations, data and weights that cannot be used.
      FloatingPointError: when a loss, gradient or parameter is no longer finite.
    """
    start_time = time.monotonic()
    workdir = pathlib.Path(workdir)
    mesh = parallel.make_mesh()
    check_config(config)
    parallel.check_batch_sizes(config, mesh)
    check_workdir(config, workdir)
    if (workdir / 'summary.json').exists():
        logging.info('%s is finished already', workdir)
        return json.loads((workdir / 'summary.json').read_text())

    dataset = load_data(config, workdir)
    steps_per_epoch = len(dataset.train) / config.batch_size
    total_steps = max(1, round(config.num_epochs * steps_per_epoch))
    model = create_model(config, len(dataset.class_names))
    state, schedule, weights_sha256 = create_train_state(
        config, model, mesh, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    run = describe_run(config, dataset, weights_sha256)
    workdir.mkdir(parents=True, exist_ok=True)
    write_json(workdir / 'run.json', run)
    if config.mode == 'frozen':
        dataset = extract_features(model, state, dataset, config, mesh)

    writer = create_writer(workdir)
    with checkpoints.open_checkpoints(workdir) as manager, metric_writers.ensure_flushes(writer):
        progress = PROGRESS
        if manager.latest_step() is not None:
            state, progress = checkpoints.restore(manager, state, manager.latest_step())
            logging.info('going on from step %d of %d in %s', state.step, total_steps, workdir)
        else:
            writer.write_hparams(hyperparameters(config))
            parameter_overview.log_parameter_overview(state.params, include_stats=False)
        earlier = progress['wall_seconds']

        def seconds_so_far():
            return earlier + time.monotonic() - start_time

        weights = np.ones(model.num_classes)
        if config.class_weights == 'balanced':
            weights = balanced_weights(dataset.train.labels, model.num_classes)
        eval_step = make_eval_step(model, config, mesh)
        state = train(
            config, state, dataset, mesh,
            train_step=make_train_step(model, config, weights, mesh), eval_step=eval_step,
            schedule=schedule, total_steps=total_steps,
            manager=manager, writer=writer, progress=progress, seconds_so_far=seconds_so_far,
        )  # fmt: skip
        scores = final_scores(config, state, dataset, mesh, eval_step, manager, writer)

    summary = scores | {
        'steps': int(state.step),
        'wall_seconds': round(seconds_so_far(), 1),
        'mode': config.mode,
        'dataset': dataset.name,
        'config_sha256': config_hash(config),
        'split_sha256': dataset.split_sha256,
        'weights_sha256': weights_sha256,
    }
    if jax.process_index() == 0:
        write_json(workdir / 'summary.json', summary)
    logging.info('wrote %s; see the curves with: tensorboard --logdir %s', workdir / 'summary.json', workdir)
    return summary


def hyperparameters(config):
    """Returns the configuration as TensorBoard takes it: flat, and numbers, strings and booleans only."""
    flat = flax.traverse_util.flatten_dict(config.to_dict(), sep='.')
    return {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in flat.items()}
