"""Checkpoints on a real disk, by real orbax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from brain_jax import InputError, checkpoints
from brain_jax.train import TrainState

ADAM = optax.adam(0.1)


def make_state(step, width=3, tx=ADAM):
    params = {'layer': {'kernel': jnp.full((2, width), float(step))}}
    state = TrainState.create(apply_fn=None, params=params, tx=tx, batch_stats={'layer': {'mean': jnp.full(3, 2.0)}})
    return state.replace(step=jnp.asarray(step))


def assert_states_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, checkpoints.split_state(first), checkpoints.split_state(second))


def test_what_is_saved_comes_back(tmp_path):
    state = make_state(7)
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))
    progress = {'best_loss': None, 'evaluations_since_best': 2, 'wall_seconds': 1.5}
    with checkpoints.open_checkpoints(tmp_path) as manager:
        checkpoints.save(manager, state, progress)
    with checkpoints.open_checkpoints(tmp_path) as manager:
        assert manager.latest_step() == 8
        restored, restored_progress = checkpoints.restore(manager, make_state(0), 8)
    assert_states_equal(restored, state)
    assert restored_progress == progress


def test_two_latest_and_the_best_are_kept(tmp_path):
    losses = {1: 0.9, 2: 0.1, 3: None, 4: 0.5, 5: 0.4, 6: None}
    with checkpoints.open_checkpoints(tmp_path) as manager:
        for step, loss in losses.items():
            checkpoints.save(manager, make_state(step), {}, None if loss is None else {'loss': loss})
        manager.wait_until_finished()
        assert manager.best_step() == 2
    assert {int(folder.name) for folder in (tmp_path / 'checkpoints').iterdir()} == {2, 5, 6}


def test_step_is_saved_once(tmp_path):
    with checkpoints.open_checkpoints(tmp_path) as manager:
        checkpoints.save(manager, make_state(3), {'seconds': 1}, {'loss': 0.5})
        checkpoints.save(manager, make_state(3), {'seconds': 2})
        manager.wait_until_finished()
        assert checkpoints.restore(manager, make_state(0), 3)[1] == {'seconds': 1}


def test_checkpoint_of_another_network(tmp_path):
    with checkpoints.open_checkpoints(tmp_path) as manager:
        checkpoints.save(manager, make_state(1), {})
        manager.wait_until_finished()
        with pytest.raises(InputError, match='is of another network: 1 arrays differ, params/layer/kernel first'):
            checkpoints.restore(manager, make_state(1, width=5), 1)


def test_checkpoint_of_another_optimiser(tmp_path):
    with checkpoints.open_checkpoints(tmp_path) as manager:
        checkpoints.save(manager, make_state(1), {})
        manager.wait_until_finished()
        with pytest.raises(InputError, match='keeps other arrays of the optimiser: use the version of brain_jax'):
            checkpoints.restore(manager, make_state(1, tx=optax.flatten(ADAM)), 1)


def test_checkpoint_that_is_gone(tmp_path):
    with (
        checkpoints.open_checkpoints(tmp_path) as manager,
        pytest.raises(InputError, match='checkpoints holds no checkpoint of step 4'),
    ):
        checkpoints.restore(manager, make_state(0), 4)
