"""Checkpoints on a real disk, by real orbax."""

import pathlib
import shutil
import subprocess

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
        checkpoints.wait_until_saved(manager)
        assert manager.best_step() == 2
    assert {int(folder.name) for folder in (tmp_path / 'checkpoints').iterdir()} == {2, 5, 6}


def test_step_that_is_saved_again_is_replaced(tmp_path):
    with checkpoints.open_checkpoints(tmp_path) as manager:
        checkpoints.save(manager, make_state(3), {'evaluation_missing': True})
        checkpoints.save(manager, make_state(3), {'evaluation_missing': False}, {'loss': 0.5})
        checkpoints.wait_until_saved(manager)
        assert checkpoints.restore(manager, make_state(0), 3)[1] == {'evaluation_missing': False}
        assert manager.metrics(3) == {'loss': 0.5}


def test_checkpoint_of_another_network(tmp_path):
    with checkpoints.open_checkpoints(tmp_path) as manager:
        checkpoints.save(manager, make_state(1), {})
        checkpoints.wait_until_saved(manager)
        with pytest.raises(InputError, match='is of another network: 1 arrays differ, params/layer/kernel first'):
            checkpoints.restore(manager, make_state(1, width=5), 1)


def test_checkpoint_of_another_optimiser(tmp_path):
    with checkpoints.open_checkpoints(tmp_path) as manager:
        checkpoints.save(manager, make_state(1), {})
        checkpoints.wait_until_saved(manager)
        with pytest.raises(InputError, match='keeps other arrays of the optimiser: use the version of brain_jax'):
            checkpoints.restore(manager, make_state(1, tx=optax.flatten(ADAM)), 1)


def test_checkpoint_that_is_gone(tmp_path):
    with (
        checkpoints.open_checkpoints(tmp_path) as manager,
        pytest.raises(InputError, match='checkpoints holds no checkpoint of step 4'),
    ):
        checkpoints.restore(manager, make_state(0), 4)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A run's folder with the checkpoints 10 and 20, and their states."""
    folder = tmp_path_factory.mktemp('saved')
    states = {}
    with checkpoints.open_checkpoints(folder) as manager:
        for step in (10, 20):
            states[step] = make_state(step, width=500)
            checkpoints.save(manager, states[step], {'wall_seconds': 1.5 * step}, {'loss': 1 / step})
    return folder, states


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize('damage', [flip, truncate, pathlib.Path.unlink], ids=['flipped', 'truncated', 'missing'])
def test_damage_of_any_file_is_noticed(saved, tmp_path, damage, caplog):
    folder, states = saved
    unused = ('commit_success.txt', '_CHECKPOINT_METADATA')  # times, nothing to restore
    files = [path.relative_to(folder) for path in (folder / 'checkpoints/20').rglob('*') if path.is_file()]
    files = [file for file in files if file.name not in unused]
    assert len(files) > 15
    for i, file in enumerate(files):
        workdir = tmp_path / str(i)
        shutil.copytree(folder, workdir)
        damage(workdir / file)
        checkpoints.remove_damaged(workdir)
        assert {path.name for path in (workdir / 'checkpoints').iterdir()} == {'10'}
        assert f'{workdir}/checkpoints/20 is damaged: ' in caplog.text
    with checkpoints.open_checkpoints(workdir) as manager:
        state, progress = checkpoints.restore(manager, make_state(0, width=500), manager.latest_step())
    assert_states_equal(state, states[10])
    assert progress == {'wall_seconds': 15.0}


def test_damaged_checkpoint_is_not_restored(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / 'run')
    flip(tmp_path / 'run/checkpoints/20/variables/_METADATA')
    with (
        checkpoints.open_checkpoints(tmp_path / 'run') as manager,
        pytest.raises(InputError, match='checkpoints/20 is damaged: variables/_METADATA differs from its checksum'),
    ):
        checkpoints.restore_variables(manager, {}, 20)


def test_what_orbax_adds_later_does_not_matter(saved, tmp_path):
    folder, states = saved
    shutil.copytree(folder, tmp_path / 'run')
    for name in ('commit_success.txt', '_CHECKPOINT_METADATA'):
        for file in (tmp_path / 'run/checkpoints/20').rglob(name):
            flip(file)
    checkpoints.remove_damaged(tmp_path / 'run')
    with checkpoints.open_checkpoints(tmp_path / 'run') as manager:
        assert_states_equal(checkpoints.restore(manager, make_state(0, width=500), 20)[0], states[20])


def test_checksums_are_those_of_sha256sum(saved):
    folder = saved[0] / 'checkpoints/20'
    subprocess.run(['sha256sum', '--check', '--strict', '--quiet', checkpoints.CHECKSUMS], cwd=folder, check=True)


def test_no_checkpoint_is_whole(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / 'run')
    for file in (tmp_path / 'run').glob('checkpoints/*/variables/manifest.ocdbt'):
        file.unlink()
    with pytest.raises(InputError, match=r'no checkpoint in .* is whole: of 20, variables/manifest.ocdbt is missing'):
        checkpoints.remove_damaged(tmp_path / 'run')
    assert {path.name for path in (tmp_path / 'run/checkpoints').iterdir()} == {'10', '20'}


def test_nothing_to_remove(tmp_path):
    checkpoints.remove_damaged(tmp_path / 'nowhere')
    assert not (tmp_path / 'nowhere').exists()


def test_damaged_scores_are_told_in_one_line(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / 'run')
    truncate(tmp_path / 'run/checkpoints/20/metrics/metrics')
    with (
        pytest.raises(InputError, match=r'the checkpoints in .* cannot be opened: JSONDecodeError'),
        checkpoints.open_checkpoints(tmp_path / 'run'),
    ):
        pass
