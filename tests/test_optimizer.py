"""Tests of brain_jax.optimizer: against optax' own optimisers and numbers computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from brain_jax import InputError, models, optimizer
from configs import densenet121

RNG = np.random.default_rng(0)
PARAMS = {
    'conv1_conv': {'kernel': RNG.normal(size=(2, 3))},
    'conv2_block1': {
        '0_bn': {'scale': RNG.normal(size=3), 'bias': RNG.normal(size=3)},
        '1_conv': {'kernel': RNG.normal(size=(3, 3))},
    },
    'bn': {'scale': RNG.normal(size=5), 'bias': RNG.normal(size=5)},
    'predictions': {'kernel': RNG.normal(size=(5, 4)), 'bias': RNG.normal(size=4)},
}
PARAMS = jax.tree.map(jnp.float32, PARAMS)
IS_KERNEL = {
    'conv1_conv': {'kernel': True},
    'conv2_block1': {'0_bn': {'scale': False, 'bias': False}, '1_conv': {'kernel': True}},
    'bn': {'scale': False, 'bias': False},
    'predictions': {'kernel': True, 'bias': False},
}


def make_config(**changes):
    """Equal, constant rates for all parameters, and nothing else, but for the changes."""
    config = densenet121.get_config()
    config.update(schedule='constant', warmup_fraction=0.0, head_epochs=0.0, head_multiplier=1.0, layer_decay=1.0)
    config.update(weight_decay=0.0, gradient_clip=0.0, freeze='', **changes)
    return config


def create(params=PARAMS, **changes):
    """A run of 100 steps, 10 an epoch; returns the transformation and the schedule."""
    config = make_config()
    config.update(changes)
    return optimizer.create_optimizer(config, params, total_steps=100, steps_per_epoch=10)


def run(tx, num_steps, params=PARAMS):
    """Takes steps with random gradients; returns the parameters after each, and the last state."""

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    rng, state, history = np.random.default_rng(1), tx.init(params), []
    for _ in range(num_steps):
        grads = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape)), params)
        params, state = step(params, state, grads)
        history.append(params)
    return history, state


def single_update(grads, **changes):
    tx, _ = create(**changes)
    return tx.update(grads, tx.init(PARAMS), PARAMS)[0]


def assert_close(result, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), result, expected)


def moved(after, before=PARAMS):
    """Returns the paths of the parameters that are not bit-equal: {'bn/scale', ...}."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda a, b: np.any(a != b), after, before))
    return {jax.tree_util.keystr(path, simple=True, separator='/') for path, changed in leaves if changed}


HEAD = {'predictions/kernel', 'predictions/bias'}
KERNELS = {'conv1_conv/kernel', 'conv2_block1/1_conv/kernel', 'predictions/kernel'}
SCALES = {'conv2_block1/0_bn/scale', 'bn/scale'}
EVERYTHING = HEAD | KERNELS | SCALES | {'conv2_block1/0_bn/bias', 'bn/bias'}


# Schedules: 100 steps, of which the first 10 warm up to a rate of 2.


@pytest.mark.parametrize(
    ('schedule', 'final_fraction', 'rates'),
    [
        ('constant', 0.0, {55: 2, 99: 2}),
        ('cosine', 0.0, {55: 1, 70: 0.5, 99: 6.0917e-4, 100: 0}),  # 70: 1 + cos(120 deg); 99: 1 + cos(178 deg)
        ('cosine', 0.2, {55: 1.2, 70: 0.8, 100: 0.4}),
        ('linear', 0.0, {55: 1, 99: 2 / 90, 100: 0}),
        ('linear', 0.2, {55: 1.2, 100: 0.4}),
        ('exponential', 0.01, {55: 0.2, 100: 0.02}),
        ('piecewise', 0.0, {49: 2, 50: 0.2, 74: 0.2, 75: 0.02, 99: 0.02}),
    ],
)
def test_schedules(schedule, final_fraction, rates):
    config = make_config(learning_rate=2.0, final_fraction=final_fraction)
    config.update(schedule=schedule, warmup_fraction=0.1, boundaries=(0.5, 0.75), boundary_scale=0.1)
    function = optimizer.create_schedule(config, 100)
    for step, rate in ({0: 0, 1: 0.2, 5: 1, 10: 2} | rates).items():
        np.testing.assert_allclose(function(step), rate, rtol=1e-4, atol=1e-6, err_msg=str(step))


@pytest.mark.parametrize('schedule', ['constant', 'cosine', 'linear', 'exponential', 'piecewise'])
def test_no_warm_up_starts_at_the_peak(schedule):
    config = make_config(learning_rate=2.0)
    config.update(schedule=schedule, final_fraction=0.1)
    for total_steps in (1, 100):
        assert optimizer.create_schedule(config, total_steps)(0) == 2


def test_boundaries_within_few_steps():
    """Two boundaries that round to one step, or lie in the warm-up, still scale twice."""
    config = make_config(learning_rate=2.0, boundaries=(0.5, 0.75), boundary_scale=0.1)
    config.update(schedule='piecewise')
    rates = [float(optimizer.create_schedule(config, 2)(step)) for step in range(3)]
    np.testing.assert_allclose(rates, [2, 0.2, 0.02], rtol=1e-5)
    config.boundaries = (0.49, 0.51)
    rates = [float(optimizer.create_schedule(config, 20)(step)) for step in (9, 10, 11)]
    np.testing.assert_allclose(rates, [2, 0.02, 0.02], rtol=1e-5)


# Which parameters move, and how far.


@pytest.mark.parametrize('name', ['sgd', 'adam', 'adamw', 'lamb'])
def test_steps_are_those_of_optax(name):
    """With weight decay, which for 'sgd' and 'adam' is a part of the gradient."""
    rate, decay = 0.03, 0.2
    decayed = optax.add_decayed_weights(decay, IS_KERNEL)
    expected = {
        'sgd': optax.chain(decayed, optax.sgd(rate, momentum=0.8)),
        'adam': optax.chain(decayed, optax.adam(rate)),
        'adamw': optax.adamw(rate, weight_decay=decay, mask=IS_KERNEL),
        'lamb': optax.lamb(rate, weight_decay=decay, mask=IS_KERNEL),
    }[name]
    tx, _ = create(optimizer=name, learning_rate=rate, weight_decay=decay, momentum=0.8)
    assert_close(run(tx, 3)[0], run(expected, 3)[0])


@pytest.mark.parametrize('name', ['sgd', 'adam', 'adamw', 'lamb'])
def test_only_the_head_learns_at_first(name):
    tx, schedule = create(optimizer=name, head_epochs=0.3, schedule='linear', weight_decay=0.1, learning_rate=0.5)
    history, _ = run(tx, 4)
    for step, params in enumerate(history[:3]):
        assert moved(params) == HEAD, step
    assert moved(history[3]) == EVERYTHING
    # The backbone's schedule starts when the backbone does, and ends with the run.
    np.testing.assert_allclose([schedule(step) for step in (0, 2, 3, 100)], [0, 0, 0.5, 0], atol=1e-7)


def test_head_of_a_short_run():
    """The backbone gets the last step even where the run is shorter than `head_epochs`."""
    config = make_config(head_epochs=5.0)
    for total_steps in (1, 2):
        _, schedule = optimizer.create_optimizer(config, PARAMS, total_steps=total_steps, steps_per_epoch=10)
        assert schedule(total_steps - 1) > 0


def test_frozen_parameters():
    tx, _ = create(freeze='^conv2|/bias$', optimizer='adamw', weight_decay=0.1, gradient_clip=1.0)
    history, state = run(tx, 2)
    assert moved(history[-1]) == {'conv1_conv/kernel', 'bn/scale', 'predictions/kernel'}
    # Adam keeps two numbers for each other one, apart for the backbone (6 and 5) and the head (20).
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert shapes == sorted(2 * [(6 + 5,), (20,)])


def test_zero_frozen():
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    assert optimizer.zero_frozen(grads, '') is grads
    result = optimizer.zero_frozen(grads, '^conv2|/bias$')
    assert moved(result, jax.tree.map(jnp.zeros_like, PARAMS)) == {
        'conv1_conv/kernel',
        'bn/scale',
        'predictions/kernel',
    }


def test_weight_decay_reaches_kernels_only():
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    updates = single_update(grads, optimizer='adamw', learning_rate=0.5, weight_decay=0.1)
    assert_close(updates, jax.tree.map(lambda kernel, p: -0.05 * p * kernel, IS_KERNEL, PARAMS))
    assert moved(optax.apply_updates(PARAMS, updates)) == KERNELS


def test_head_multiplier():
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    updates = single_update(grads, optimizer='sgd', learning_rate=0.5, head_multiplier=10.0)
    values = {module: set(np.concatenate([u.ravel() for u in jax.tree.leaves(updates[module])])) for module in updates}
    assert values == {'conv1_conv': {-0.5}, 'conv2_block1': {-0.5}, 'bn': {-0.5}, 'predictions': {-5.0}}


@pytest.mark.parametrize('size', [0.01, 100.0])
def test_clipping(size):
    """By the norm over all parameters; small gradients pass as they are."""
    grads = jax.tree.map(lambda p: jnp.full_like(p, size), PARAMS)
    norm = size * 55**0.5  # 6 + 3 + 3 + 9 + 5 + 5 + 20 + 4 values
    updates = single_update(grads, optimizer='sgd', learning_rate=1.0, gradient_clip=2.0)
    assert_close(updates, jax.tree.map(lambda g: -g * min(1, 2 / norm), grads))
    assert optax.tree.norm(updates) <= 2.0001


def test_layer_decay():
    """The factor counts dense layers and transitions from the end: 16, 1, 24, 1, 12, 1, 6 and the stem."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = jax.eval_shape(models.DenseNet121(num_classes=4).init, jax.random.key(0), images)['params']
    config = make_config()
    config.update(layer_decay=0.5, head_multiplier=10.0)
    multipliers = optimizer.rate_multipliers(params, config)
    assert jax.tree.structure(multipliers) == jax.tree.structure(params)
    depth = {}
    for module, tree in multipliers.items():
        values = set(jax.tree.leaves(tree))
        assert len(values) == 1, module  # one rate a dense layer
        depth[module] = -np.log2(values.pop())
    assert depth.pop('predictions') == -np.log2(10)
    assert depth == (
        {'bn': 0, 'pool4_bn': 17, 'pool4_conv': 17, 'pool3_bn': 42, 'pool3_conv': 42, 'pool2_bn': 55, 'pool2_conv': 55}
        | {f'conv5_block{layer}': 17 - layer for layer in range(1, 17)}
        | {f'conv4_block{layer}': 42 - layer for layer in range(1, 25)}
        | {f'conv3_block{layer}': 55 - layer for layer in range(1, 13)}
        | {f'conv2_block{layer}': 62 - layer for layer in range(1, 7)}
        | {'conv1_conv': 62, 'conv1_bn': 62}
    )


def test_layer_decay_in_a_step():
    """Built from shapes alone, as for a restored checkpoint."""
    shapes = jax.eval_shape(lambda: PARAMS)
    tx, _ = create(shapes, optimizer='sgd', learning_rate=1.0, layer_decay=0.5)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, PARAMS), tx.init(PARAMS), PARAMS)
    rates = {'conv1_conv': 0.25, 'conv2_block1': 0.5, 'bn': 1, 'predictions': 1}
    assert jax.tree.all(jax.tree_util.tree_map_with_path(lambda path, u: (u == -rates[path[0].key]).all(), updates))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'schedule': 'step'}, "schedule is 'step': use 'cosine', 'linear', 'exponential', 'piecewise' or 'constant'"),
        ({'schedule': 'exponential', 'final_fraction': 0.0}, 'exponential schedule never reaches 0'),
        ({'optimizer': 'rmsprop'}, "optimizer is 'rmsprop': use 'sgd', 'adam', 'adamw' or 'lamb'"),
        ({'freeze': 'block9'}, "freeze 'block9' matches no parameter"),
        ({'freeze': '.'}, "freeze '.' matches every parameter"),
        ({'freeze': 'conv2('}, r"freeze 'conv2\(' is not a regular expression: .*unterminated"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(InputError, match=message):
        create(**changes)
