"""What moves the parameters: schedules, layer-wise rates, freezing, clipping, all in optax."""

import functools
import re

import jax
import jax.numpy as jnp
import optax

from brain_jax import InputError

# The path of a leaf as text: 'conv2_block1/0_bn/scale'.
path_string = functools.partial(jax.tree_util.keystr, simple=True, separator='/')


def create_schedule(config, total_steps):
    """Builds the learning-rate schedule: a linear warm-up, then `config.schedule`.

    Args:
      config: `schedule`, `learning_rate` (peak), `warmup_fraction`, `final_fraction`, `boundaries`, `boundary_scale`.
      total_steps: number of optimiser steps, warm-up included.

    Returns:
      A function from the step to the learning rate.

    Raises:
      InputError: for an unknown schedule, or an exponential one with `final_fraction` 0.
    """
    peak = config.learning_rate
    warmup_steps = round(config.warmup_fraction * total_steps)
    decay_steps = max(1, total_steps - warmup_steps)
    if config.schedule == 'cosine':
        decay = optax.cosine_decay_schedule(peak, decay_steps, alpha=config.final_fraction)
    elif config.schedule == 'linear':
        decay = optax.linear_schedule(peak, peak * config.final_fraction, decay_steps)
    elif config.schedule == 'exponential':
        if config.final_fraction <= 0:
            raise InputError('an exponential schedule never reaches 0: set --config.final_fraction=0.01, say')
        decay = optax.exponential_decay(peak, decay_steps, config.final_fraction)
    elif config.schedule == 'piecewise':
        steps = [max(1, round(fraction * total_steps) - warmup_steps) for fraction in config.boundaries]
        scales = {step: config.boundary_scale ** steps.count(step) for step in steps}  # a short run may merge some
        decay = optax.piecewise_constant_schedule(peak, scales)
    elif config.schedule == 'constant':
        decay = optax.constant_schedule(peak)
    else:
        raise InputError(
            f"schedule is {config.schedule!r}: use 'cosine', 'linear', 'exponential', 'piecewise' or 'constant'"
        )
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), decay], [warmup_steps])


def zero_frozen(grads, freeze):
    """Returns the gradients with 0 for parameters whose path the regular expression `freeze` finds.

    In a compiled step nothing of the backward pass that leads only to them remains.
    """
    if not freeze:
        return grads
    return jax.tree_util.tree_map_with_path(
        lambda path, grad: jnp.zeros_like(grad) if re.search(freeze, path_string(path)) else grad, grads
    )


def layer_position(path):
    """Returns a sortable place of a backbone parameter in the network: (block, layer)."""
    module = path[0].key
    if match := re.fullmatch(r'conv(\d)_block(\d+)', module):
        return int(match[1]), int(match[2])
    if match := re.fullmatch(r'pool(\d)_(bn|conv)', module):
        return int(match[1]), 1000
    return (1, 0) if module.startswith('conv1_') else (6, 0)


def rate_multipliers(params, config):
    """Computes how much faster or slower than the schedule every parameter learns.

    Args:
      params: nested dictionary of parameters.
      config: `head_multiplier` for the head; `layer_decay`, the factor from a dense layer to the one before it.

    Returns:
      A tree like `params` of floats.
    """
    positions = {
        layer_position(path) for path, _ in jax.tree_util.tree_leaves_with_path(params) if path[0].key != 'predictions'
    }
    depth = {position: rank for rank, position in enumerate(sorted(positions, reverse=True))}

    def multiplier(path, _):
        if path[0].key == 'predictions':
            return config.head_multiplier
        return config.layer_decay ** depth[layer_position(path)]

    return jax.tree_util.tree_map_with_path(multiplier, params)


def scale_gradients(config):
    """Returns the optax transformation of `config.optimizer`, without a learning rate.

    Weight decay acts on kernels only: for 'adamw' and 'lamb' beside the gradient, for 'sgd' and 'adam' as a part of it.
    Moments of the gradients are one vector: hundreds of small arrays are as many small programs to compile and run.
    """

    def is_kernel(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', params)

    decay = optax.add_decayed_weights(config.weight_decay, mask=is_kernel)
    if config.optimizer == 'sgd':
        return optax.chain(decay, optax.flatten(optax.trace(config.momentum)))
    if config.optimizer == 'adam':
        return optax.chain(decay, optax.flatten(optax.scale_by_adam()))
    if config.optimizer == 'adamw':
        return optax.chain(optax.flatten(optax.scale_by_adam()), decay)
    if config.optimizer == 'lamb':
        return optax.chain(optax.flatten(optax.scale_by_adam(eps=1e-6)), decay, optax.scale_by_trust_ratio())
    raise InputError(f"optimizer is {config.optimizer!r}: use 'sgd', 'adam', 'adamw' or 'lamb'")


def label_parameters(params, freeze):
    """Labels every parameter 'frozen' (its path matches `freeze`), 'head' or 'backbone'.

    Raises:
      InputError: where `freeze` is no regular expression, finds nothing, or leaves nothing to learn.
    """
    try:
        pattern = re.compile(freeze)
    except re.error as error:
        raise InputError(f'config.freeze {freeze!r} is not a regular expression: {error}') from None

    def label(path, _):
        if freeze and pattern.search(path_string(path)):
            return 'frozen'
        return 'head' if path[0].key == 'predictions' else 'backbone'

    labels = jax.tree_util.tree_map_with_path(label, params)
    used = set(jax.tree.leaves(labels))
    if freeze and 'frozen' not in used:
        raise InputError(f"config.freeze {freeze!r} matches no parameter; a path looks like 'conv2_block1/0_bn/scale'")
    if used == {'frozen'}:
        raise InputError(f'config.freeze {freeze!r} matches every parameter: nothing is left to learn')
    return labels


def create_optimizer(config, params, *, total_steps, steps_per_epoch):
    """Builds the optimiser of a run.

    Args:
      config: the run's configuration.
      params: nested dictionary of parameters, or of their shapes.
      total_steps: number of optimiser steps.
      steps_per_epoch: may be fractional.

    Returns:
      The optax transformation, and the schedule of the backbone's learning rate.

    Raises:
      InputError: for unknown names and for a `freeze` that makes no sense.
    """
    head_steps = min(round(config.head_epochs * steps_per_epoch), total_steps - 1)
    backbone_schedule = optax.join_schedules(
        [optax.constant_schedule(0.0), create_schedule(config, total_steps - head_steps)], [head_steps]
    )
    head_schedule = create_schedule(config, total_steps)
    multipliers = rate_multipliers(params, config)
    labels = label_parameters(params, config.freeze)
    transforms = {
        'head': optax.chain(scale_gradients(config), optax.scale_by_learning_rate(head_schedule)),
        'backbone': optax.chain(scale_gradients(config), optax.scale_by_learning_rate(backbone_schedule)),
        'frozen': optax.set_to_zero(),
    }
    return optax.chain(
        optax.flatten(optax.clip_by_global_norm(config.gradient_clip)) if config.gradient_clip else optax.identity(),
        optax.partition({label: transforms[label] for label in sorted(set(jax.tree.leaves(labels)))}, labels),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, m: u * m, updates, multipliers)),
    ), backbone_schedule
