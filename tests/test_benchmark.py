"""Tests of scripts/benchmark.py and brain_jax.benchmark: what is measured and how it is told, never how fast it is."""

import importlib.util
import json
import pathlib
import runpy
import shutil
import statistics
import subprocess
import sys

import ml_collections
import numpy as np
import pytest
from PIL import Image

from brain_jax import InputError, finished_run, train
from brain_jax.benchmark import contenders, measure, worker
from brain_jax.data import phantom

pytestmark = pytest.mark.usefixtures('quick_compilation')
REPOSITORY = pathlib.Path(__file__).parents[1]
get_config = runpy.run_path(str(REPOSITORY / 'configs/densenet121.py'))['get_config']


@pytest.fixture(scope='module')
def settings():
    """What the contenders get for a tiny network, whose answers are not averaged over flips."""
    config = get_config()
    config.update(
        model='_DenseNetTiny', pretrained='', image_size=32, batch_size=16, eval_batch_size=16, num_epochs=1.0,
        validation_fraction=0.25, average_flips=False,
    )  # fmt: skip
    return measure.Benchmark(config.lock(), ['brain_jax'], rounds=1, seconds=0).settings


def run_script(*flags):
    command = [sys.executable, 'scripts/benchmark.py', *map(str, flags)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)


def test_script(tmp_path):
    names = ['brain_jax', 'keras_tensorflow', 'onnxruntime']
    process = run_script(
        *('--output', tmp_path / 'out', '--tasks', 'inference,pipeline', '--contenders', ','.join(names)),
        *('--image_size', 32, '--batch_size', 4, '--rounds', 2, '--seconds', 0, '--config.model', '_DenseNetTiny'),
    )
    assert process.returncode == 0, process.stderr
    report = json.loads((tmp_path / 'out/benchmark.json').read_text())
    installed = [n for n in names if all(map(importlib.util.find_spec, contenders.PACKAGES[n]))]
    assert {left['contender'] for left in report['left_out']} == set(names) - set(installed)
    rows = {(row['task'], row['contender'], row['unit']): row for row in report['rows']}
    assert len(rows) == len(report['rows'])
    assert [name for task, name, _ in rows if task == 'inference'] == installed
    assert {(name, unit) for task, name, unit in rows if task == 'pipeline'} == {
        ('brain_jax', 'img/s'), ('first start, 440 images', 's'), ('second start, 440 images', 's')
    }  # fmt: skip
    for (task, name, unit), row in rows.items():
        assert row['value'] == statistics.median(row['values']) > 0
        if unit == 'img/s':
            assert len(row['values']) == 2
            assert row['ratio'] == pytest.approx(rows[task, 'brain_jax', unit]['value'] / row['value'])
            assert f'| {task} | {name} | ' in process.stdout
    for left in report['left_out']:
        assert f'- {left["contender"]} (all): {left["reason"]}' in process.stdout
    assert (tmp_path / 'out/benchmark.md').read_text().strip() == process.stdout.strip()
    with Image.open(tmp_path / 'out/benchmark.png') as image:
        assert image.format == 'PNG' and image.width > 500
    for field in ('processor', 'cores', 'memory_gb', 'system', 'python'):
        assert report['machine'][field]
    assert report['versions']['keras'] and 'xla_cpu' in report['variables']['brain_jax']['XLA_FLAGS']


def test_wrong_flags_end_with_one_line(tmp_path):
    process = run_script('--output', tmp_path, '--devices=1,3', '--batch_size=8')
    assert process.returncode == 1 and 'Traceback' not in process.stderr
    message = 'error: --devices is 1,3: give divisors of --batch_size=8'
    assert process.stderr.strip().splitlines()[-1] == message


def test_frozen_network_is_not_measured():
    with pytest.raises(InputError, match='in mode frozen no network is trained'):
        measure.measure(get_config('frozen'))


def test_timed_steps_are_those_of_a_run(settings, tmp_path, monkeypatch):
    """A run, its evaluations and its predictions compile the very programs that are timed."""
    programs = {}

    def record(module, maker):
        make = getattr(module, maker)

        def make_recorded(*arguments):
            step = make(*arguments)

            def recorded(*inputs):
                programs.setdefault(maker, step.lower(*inputs).as_text())
                return step(*inputs)

            return recorded

        monkeypatch.setattr(module, maker, make_recorded)

    record(train, 'make_train_step')
    record(train, 'make_eval_step')
    record(finished_run, 'make_logits_step')
    phantom.make_phantom(tmp_path / 'phantom', train_per_class=16, test_per_class=4, image_size=32)
    config = ml_collections.ConfigDict(settings['config'])
    config.update(data_dir=str(tmp_path / 'phantom'), prepared_dir=str(tmp_path / 'prepared'))
    train.train_and_evaluate(config, tmp_path / 'run')
    run = finished_run.load_run(tmp_path / 'run')
    finished_run.predict(run, 'test')
    of_run = dict(programs)
    programs.clear()

    monkeypatch.setattr(contenders, 'NUM_IMAGES', len(run.dataset.train))  # the schedule is a part of the program
    for task in ('train', 'evaluation', 'inference'):
        contenders.STEPS[task]['brain_jax'](ml_collections.ConfigDict(settings))()
    assert len(of_run) == 3 and programs == of_run


@pytest.mark.parametrize(('task', 'contender'), [('devices', 'brain_jax'), ('memory', 'brain_jax'), ('memory', 'flax')])
def test_one_of_ours(settings, task, contender):
    replies = worker.run(task, contender, ml_collections.ConfigDict(settings), ['{"seconds": 0}'])
    if task == 'memory':
        # At least the dense features of the first stage, 16 channels of 8x8 pixels, are kept for the backward pass.
        assert next(replies)['temporary_bytes'] > 16 * 16 * 8 * 8 * 4
    else:
        assert isinstance(next(replies)['collectives'], dict)
        assert next(replies)['images_per_second'] > 0
    assert next(replies, None) is None


@pytest.mark.parametrize('contender', sorted(contenders.STEPS['export'].keys() - {'brain_jax'}))
def test_exports_are_timed(settings, contender):
    if not all(map(importlib.util.find_spec, contenders.PACKAGES[contender])):
        pytest.skip(f'one of {contenders.PACKAGES[contender]} is not installed')
    replies = worker.run('export', contender, ml_collections.ConfigDict(settings), ['{"seconds": 0}'])
    assert next(replies)['first_step_seconds'] > 0
    assert next(replies)['images_per_second'] > 0


def test_search_finds_copies(settings, tmp_path):
    pytest.importorskip('faiss')
    phantom.make_phantom(tmp_path, train_per_class=4, test_per_class=2, image_size=32)
    for picture in (tmp_path / 'Testing/glioma').iterdir():
        shutil.copy(picture, tmp_path / 'Training/glioma' / f'copy_{picture.name}')
    config = settings['config'] | {'data_dir': str(tmp_path)}
    (found,) = worker.run('search', 'brain_jax', ml_collections.ConfigDict(settings | {'config': config}), [])
    assert found == {'near pairs': 1, 'images with a copy': 1}


def test_resident_growth():
    size = 200_000_000
    growth = worker.resident_growth(lambda: np.ones(size, np.uint8).sum(dtype=np.int64))
    assert size * 0.95 < growth < size * 1.5


def test_contenders_that_fail(settings):
    with pytest.raises(measure.ContenderError, match=r"^KeyError: 'nothing'$"):
        measure.Worker('train', 'nothing', settings)
    with pytest.raises(measure.ContenderError, match='the process ended with status 1: '):
        measure.Worker('train', 'brain_jax', settings, PYTHONHOME='/nowhere')
