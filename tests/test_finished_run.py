"""Tests of brain_jax.finished_run."""

import json
import pathlib
import runpy
import shutil

import numpy as np
import pytest
from scipy import special
from sklearn import metrics

from brain_jax import InputError, features, finished_run, train
from brain_jax.data import phantom

REPOSITORY = pathlib.Path(__file__).parents[1]
get_config = runpy.run_path(str(REPOSITORY / 'configs/densenet121.py'))['get_config']


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A finished run of mode 'frozen': its folder and its summary."""
    folder = tmp_path_factory.mktemp('finished')
    phantom.make_phantom(folder / 'phantom', train_per_class=8, test_per_class=3, image_size=32)
    config = get_config('frozen')
    config.update(
        model='_DenseNetTiny', pretrained='', image_size=32, batch_size=16, eval_batch_size=8, num_epochs=20.0,
        validation_fraction=0.25, data_dir=str(folder / 'phantom'), prepared_dir=str(folder / 'prepared'),
    )  # fmt: skip
    return folder / 'run', train.train_and_evaluate(config.lock(), folder / 'run')


def test_answers_score_as_the_run_did(finished):
    workdir, summary = finished
    run = finished_run.load_run(workdir)
    assert run.step == summary['best_step'] and run.dataset.split_sha256 == summary['split_sha256']
    for split in ('validation', 'test'):
        labels = getattr(run.dataset, split).labels
        logits = finished_run.predict(run, split)
        assert summary[split]['n'] == len(logits)
        assert summary[split]['accuracy'] == metrics.accuracy_score(labels, logits.argmax(axis=1))
        probabilities = special.softmax(logits.astype(np.float64), axis=1)
        assert summary[split]['loss'] == pytest.approx(metrics.log_loss(labels, probabilities), rel=1e-4)


def test_answers_from_features_are_those_of_the_whole_network(finished):
    run = finished_run.load_run(finished[0])
    start, _, _ = train.create_train_state(run.config, run.model, run.mesh, total_steps=1, steps_per_epoch=1.0)
    pooled = features.load_features(run.dataset, run.model, start.params, start.batch_stats, run.config, run.mesh)
    quick = finished_run.load_run(finished[0], pooled=pooled)
    logits = finished_run.predict(run, 'test')
    assert np.ptp(logits, axis=0).min() > 0.1  # not one answer to all
    np.testing.assert_allclose(finished_run.predict(quick, 'test'), logits, atol=1e-3)


def test_folders_that_cannot_be_loaded(finished, tmp_path):
    workdir = finished[0]
    with pytest.raises(InputError, match=r'there is no run\.json in it'):
        finished_run.load_run(tmp_path)
    shutil.copy(workdir / 'run.json', tmp_path)
    with pytest.raises(InputError, match='is not finished'):
        finished_run.load_run(tmp_path)
    (tmp_path / 'old').mkdir()
    shutil.copy(workdir / 'summary.json', tmp_path / 'old')
    told = json.loads((workdir / 'run.json').read_text())
    del told['config']['remat']
    (tmp_path / 'old/run.json').write_text(json.dumps(told))
    with pytest.raises(InputError, match='is of another version of brain_jax: its configuration lacks remat'):
        finished_run.load_run(tmp_path / 'old')
    phantom.make_phantom(tmp_path / 'other', train_per_class=4, test_per_class=2, image_size=32)
    for folder in (tmp_path / 'other').glob('*/glioma'):
        folder.rename(folder.with_name('abscess'))
    with pytest.raises(InputError, match=r'has the classes abscess, .* knows glioma, '):
        finished_run.load_run(workdir, str(tmp_path / 'other'))
