"""Whole runs of a tiny network on a generated dataset."""

import json
import pathlib
import re
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.util import tensor_util

from brain_jax import InputError, checkpoints, finished_run, models, parallel, run_folder, train
from brain_jax.data import pipeline

pytestmark = pytest.mark.usefixtures('quick_compilation')
REPOSITORY = pathlib.Path(__file__).parents[1]
get_config = runpy.run_path(str(REPOSITORY / 'configs/densenet121.py'))['get_config']
TINY = {
    'model': '_DenseNetTiny',
    'pretrained': '',
    'image_size': 32,
    'batch_size': 16,
    'eval_batch_size': 24,
    'num_epochs': 2.0,
    'validation_fraction': 0.25,
    'log_every_steps': 2,
    'checkpoint_every_steps': 2,
}


def make_config(data, mode='scratch', **changes):
    config = get_config(mode)
    config.update({**TINY, **data, **changes})
    return config.lock()


def run(config, workdir):
    """Trains; returns the summary, and the variables of the checkpoint that it was measured on."""
    summary = train.train_and_evaluate(config, workdir)
    return summary, load_variables(config, workdir, summary['best_step'])


def load_variables(config, workdir, step):
    return finished_run.load_variables(workdir, config, train.create_model(config, 4), parallel.make_mesh(), step)


def assert_checkpoints_are_finite(config, workdir):
    """Checks each number of each checkpoint, those of the optimiser and the metrics too; returns the steps."""
    state, _, _ = train.create_train_state(
        config, train.create_model(config, 4), parallel.make_mesh(), total_steps=10, steps_per_epoch=5.0
    )
    with checkpoints.open_checkpoints(workdir) as manager:
        for step in manager.all_steps():
            saved = checkpoints.split_state(checkpoints.restore(manager, state, step)[0])
            jax.tree.map(lambda leaf: np.testing.assert_array_equal(np.isfinite(leaf), True), saved)
        return manager.all_steps()


def assert_trees_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def read_scalars(workdir):
    """Returns what TensorBoard would show: {tag: [(step, value), ...]}, and the tags of the images."""
    events = event_accumulator.EventAccumulator(str(workdir), {event_accumulator.TENSORS: 0, 'images': 0})
    events.Reload()
    scalars, images = {}, []
    for tag in events.Tags()['tensors']:
        values = [(value.step, tensor_util.make_ndarray(value.tensor_proto)) for value in events.Tensors(tag)]
        if values[0][1].ndim:
            images.append(tag)
        else:
            scalars[tag] = values
    return scalars, images


@pytest.fixture(scope='module')
def finished(data, tmp_path_factory, quick_compilation):
    """One finished run: configuration, workdir, summary, variables."""
    config = make_config(data, ema_decay=0.5, class_weights='balanced', mixup=0.2, gradient_accumulation=2)
    workdir = tmp_path_factory.mktemp('run')
    return config, workdir, *run(config, workdir)


def test_summary_holds_the_scores_of_the_best_checkpoint(finished):
    config, workdir, summary, variables = finished
    assert json.loads((workdir / 'summary.json').read_text()) == summary
    assert summary['steps'] == 6 and summary['mode'] == 'scratch' and summary['weights_sha256'] == ''
    assert all(len(summary[name]) == 64 for name in ('config_sha256', 'split_sha256'))
    dataset = pipeline.load_dataset(config)
    model = train.create_model(config, 4)
    for split in ('validation', 'test'):
        examples = getattr(dataset, split)
        images = examples.images[examples.index]
        views = (images, images[:, :, ::-1])
        logits = sum(model.apply(variables, models.normalize(view)) for view in views) / 2
        probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        predicted = probabilities.argmax(axis=1)
        assert summary[split]['n'] == len(examples)
        assert summary[split]['accuracy'] == pytest.approx(sklearn_metrics.accuracy_score(examples.labels, predicted))
        expected = sklearn_metrics.f1_score(examples.labels, predicted, average='macro', zero_division=0)
        assert summary[split]['macro_f1'] == pytest.approx(expected)
        expected = sklearn_metrics.log_loss(examples.labels, probabilities, labels=range(4))
        assert summary[split]['loss'] == pytest.approx(expected, rel=1e-4)


def test_tensorboard_shows_the_run(finished):
    _, workdir, summary, _ = finished
    scalars, images = read_scalars(workdir)
    for name in ('loss', 'accuracy', 'gradient_norm', 'learning_rate', 'images_per_second'):
        assert [step for step, _ in scalars[f'train_{name}']] == [2, 4, 6]
    assert all(0 <= share <= 1 for _, share in scalars['train_waiting_share'])
    assert [step for step, _ in scalars['validation_loss']] == [3, 6]
    assert scalars['test_accuracy'] == [(summary['best_step'], pytest.approx(summary['test']['accuracy']))]
    assert {'augmented', 'validation_confusion', 'test_confusion'} <= set(images)


def test_run_folder_tells_what_a_prediction_needs(finished):
    config, workdir, summary, _ = finished
    told = json.loads((workdir / 'run.json').read_text())
    assert told['class_names'] == ['glioma', 'meningioma', 'notumor', 'pituitary']
    assert told['config']['batch_size'] == config.batch_size
    assert told['preprocessing']['mean'] == [0.485, 0.456, 0.406]  # of Keras' preprocess_input, mode 'torch'
    assert told['split_sha256'] == summary['split_sha256']


def test_latest_and_best_checkpoints_are_kept(finished):
    _, workdir, summary, _ = finished
    steps = {int(folder.name) for folder in (workdir / 'checkpoints').iterdir()}
    scalars, _ = read_scalars(workdir)
    best_step = min(scalars['validation_loss'], key=lambda pair: pair[1])[0]
    assert summary['best_step'] == best_step
    assert steps == {4, 6, best_step}


def test_finished_run_is_not_run_again(finished):
    config, workdir, summary, _ = finished
    before = (workdir / 'summary.json').stat().st_mtime_ns
    assert train.train_and_evaluate(config, workdir) == summary
    assert (workdir / 'summary.json').stat().st_mtime_ns == before


def test_fresh_head_is_that_of_a_network_of_random_numbers():
    config = make_config({}, seed=3)
    model = train.create_model(config, 4)
    whole, head = (train.init_variables(config, model, head_alone) for head_alone in (False, True))
    assert_trees_equal(whole['params'].pop('predictions'), head['params'].pop('predictions'))
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, head)


def test_one_seed_gives_one_result_and_another_another(finished, data, tmp_path):
    config, _, _, variables = finished
    assert_trees_equal(run(config, tmp_path / 'same')[1], variables)
    kernels = []
    for seed in (0, 1):  # its images come in another order, too: see the tests of the pipeline
        config = make_config(data, seed=seed)
        kernels.append(train.init_variables(config, train.create_model(config, 4))['params']['conv1_conv']['kernel'])
    assert not np.array_equal(*kernels)


def command(config_changes, workdir, mode='scratch'):
    flags = [f'--config.{name}={value}' for name, value in config_changes.items()]
    config = REPOSITORY / f'configs/densenet121.py:{mode}'
    return [sys.executable, '-m', 'brain_jax.main', f'--config={config}', f'--workdir={workdir}', *flags]


def make_batch(rng, count=8):
    return {
        'image': rng.integers(0, 256, (count, 32, 32), np.uint8),
        'label': np.arange(count, dtype=np.int32) % 4,
        'mask': np.ones(count, bool),
        'index': np.arange(count, dtype=np.int32),
    }


def one_step(config, batch, class_weights=(1, 1, 1, 1)):
    """Returns the variables before, and the state and metrics after one step."""
    mesh = parallel.make_mesh()
    model = train.create_model(config, 4)
    state, _, _ = train.create_train_state(config, model, mesh, total_steps=10, steps_per_epoch=5.0)
    before = jax.tree.map(np.asarray, {'params': state.params, 'batch_stats': state.batch_stats})
    state, health = train.make_train_step(model, config, class_weights, mesh)(state, batch)
    return model, before, state, state.metrics.compute(), np.asarray(health)


STILL = {'rotation': 0.0, 'zoom': 0.0, 'shift': 0.0, 'brightness': 0.0, 'flip_horizontal': False}


def test_loss_is_the_weighted_smoothed_cross_entropy():
    batch = make_batch(np.random.default_rng(0))
    config = make_config({}, batch_norm='frozen', label_smoothing=0.1, augment=STILL)
    class_weights = np.array([0.5, 1.0, 1.5, 2.0])
    model, before, _, update, health = one_step(config, batch, class_weights)
    logits = np.asarray(model.apply(before, models.normalize(batch['image'])), np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    targets = 0.9 * np.eye(4)[batch['label']] + 0.1 / 4
    expected = np.mean(class_weights[batch['label']] * -(targets * log_probabilities).sum(axis=1))
    assert update['loss'] == pytest.approx(expected, rel=1e-4)
    assert health[0] == pytest.approx(expected, rel=1e-4)
    assert update['accuracy'] == np.mean(logits.argmax(axis=1) == batch['label'])


def test_every_parameter_learns():
    config = make_config({}, warmup_fraction=0.0)
    _, before, state, _, _ = one_step(config, make_batch(np.random.default_rng(0)))
    changed = jax.tree.map(lambda a, b: bool(np.any(a != np.asarray(b))), before['params'], state.params)
    assert all(jax.tree.leaves(changed)), changed


def test_accumulated_gradients_are_those_of_the_whole_batch():
    batch = make_batch(np.random.default_rng(0))
    # With batch statistics the parts would be normalised each by itself.
    changes = {'batch_norm': 'frozen', 'optimizer': 'sgd', 'learning_rate': 0.1, 'warmup_fraction': 0.0}
    states = [one_step(make_config({}, gradient_accumulation=n, **changes), batch)[2] for n in (1, 4)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), states[0].params, states[1].params
    )


@pytest.mark.parametrize(('average', 'flip'), [(True, True), (True, False), (False, True)])
def test_mirror_images_are_asked_where_training_shows_them(average, flip):
    config = get_config('scratch')
    config.update(model='_DenseNetTiny', average_flips=average)
    config.augment.flip_horizontal = flip
    model = train.create_model(config, 4)
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32), np.uint8)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    plain, mirrored = (model.apply(variables, models.normalize(x)) for x in (images, images[:, :, ::-1]))
    expected = (plain + mirrored) / 2 if average and flip else plain
    np.testing.assert_allclose(train.evaluate_network(model, config, variables, images), expected, atol=1e-4)
    assert np.abs(plain - mirrored).max() > 1e-2


def test_averaged_parameters_follow_by_their_decay():
    config = make_config({}, ema_decay=0.9, warmup_fraction=0.0)
    _, before, state, _, _ = one_step(config, make_batch(np.random.default_rng(0)))
    expected = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * np.asarray(new), before['params'], state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.eval_params, expected)


def test_frozen_part_stays_and_keeps_no_optimizer_state():
    config = make_config({}, freeze='^conv[12]', warmup_fraction=0.0)
    _, before, state, _, _ = one_step(config, make_batch(np.random.default_rng(0)))
    for name, module in before['params'].items():
        for old, new in zip(jax.tree.leaves(module), jax.tree.leaves(state.params[name]), strict=True):
            assert np.array_equal(old, new) == name.startswith(('conv1', 'conv2'))
    learned = sum(
        leaf.size
        for name, module in before['params'].items()
        if not name.startswith(('conv1', 'conv2'))
        for leaf in jax.tree.leaves(module)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * learned  # of Adam


def test_step_is_compiled_once():
    config = make_config({}, ema_decay=0.9)
    mesh = parallel.make_mesh()
    model = train.create_model(config, 4)
    state, _, _ = train.create_train_state(config, model, mesh, total_steps=10, steps_per_epoch=5.0)
    step = train.make_train_step(model, config, np.ones(4), mesh)
    for batch in pipeline.prefetch(
        [make_batch(np.random.default_rng(i)) for i in range(3)], parallel.split_over_data(mesh)
    ):
        state, _ = step(state, batch)
    assert step._cache_size() == 1


@pytest.mark.filterwarnings('ignore:overflow encountered')
def test_run_that_explodes_stops_and_leaves_a_good_checkpoint(data, tmp_path):
    config = make_config(
        data, optimizer='sgd', learning_rate=1e30, gradient_clip=0.0, warmup_fraction=0.5, checkpoint_every_steps=1
    )
    message = r'step \d+: the .* is (nan|inf); the largest value, \S+, is in \w+/\w+/\S+\. The last good'
    with pytest.raises(FloatingPointError, match=message):
        train.train_and_evaluate(config, tmp_path)
    assert not (tmp_path / 'summary.json').exists()
    assert max(assert_checkpoints_are_finite(config, tmp_path)) >= 1


@pytest.mark.filterwarnings('ignore:overflow encountered')
@pytest.mark.parametrize('optimizer', ['sgd', 'adamw', 'lamb'])
def test_no_checkpoint_has_a_number_that_is_none(data, tmp_path, optimizer):
    config = make_config(data, optimizer=optimizer, learning_rate=1e9, warmup_fraction=0.0, checkpoint_every_steps=1)
    try:
        train.train_and_evaluate(config, tmp_path)
    except FloatingPointError as error:
        assert re.match(r'step \d+: the .* is (nan|inf); the largest value, \S+, is in \w+/\w+/', str(error))
    assert_checkpoints_are_finite(config, tmp_path)


@pytest.mark.parametrize(
    ('image', 'dtype'),
    [('black', 'float32'), ('white', 'float32'), ('one image', 'float32'), ('512 images', 'bfloat16')],
)
def test_batches_at_the_edge_of_numbers(dtype, image):
    batch = make_batch(np.random.default_rng(0), 512 if image == '512 images' else 8)
    fill = {'black': np.zeros_like, 'white': lambda x: np.full_like(x, 255), 'one image': lambda x: x[:1].repeat(8, 0)}
    batch['image'] = fill.get(image, np.copy)(batch['image'])
    _, _, state, update, health = one_step(make_config({}, dtype=dtype), batch)
    assert np.isfinite(health).all() and np.isfinite(update['loss'])
    variables = jax.tree.leaves((state.params, state.batch_stats))
    assert all(np.all(np.isfinite(leaf)) for leaf in variables)
    assert {leaf.dtype for leaf in variables} == {jnp.dtype('float32')}  # what is computed short is kept long


def test_early_stopping(data, tmp_path):
    # With frozen statistics and a rate of next to nothing no evaluation is better than the first.
    config = make_config(data, batch_norm='frozen', learning_rate=1e-30, early_stopping=2, num_epochs=20.0)
    summary, _ = run(config, tmp_path)
    assert summary['steps'] == 9


def test_frozen_mode_trains_the_head_alone(data, tmp_path):
    config = make_config(data, 'frozen', num_epochs=20.0)
    summary, variables = run(config, tmp_path)
    mesh = parallel.make_mesh()
    model = train.create_model(config, 4)
    state, _, _ = train.create_train_state(config, model, mesh, total_steps=6, steps_per_epoch=3.0)
    for name, module in variables['params'].items():
        same = jax.tree.map(np.array_equal, module, state.params[name])
        assert all(jax.tree.leaves(same)) == (name != 'predictions')
    assert_trees_equal(variables['batch_stats'], state.batch_stats)
    # The checkpoint is a whole network: from the images it gives what the run measured on their features.
    dataset = pipeline.load_dataset(config)
    test = dataset.test.images[dataset.test.index]
    logits = sum(model.apply(variables, models.normalize(images)) for images in (test, test[:, :, ::-1]))
    assert summary['test']['accuracy'] == pytest.approx(np.mean(np.argmax(logits, axis=1) == dataset.test.labels))
    expected = sklearn_metrics.log_loss(dataset.test.labels, jax.nn.softmax(logits / 2), labels=range(4))
    assert summary['test']['loss'] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ('every', 'last', 'expected'),
    [(3, 7, [3, 6, 7]), (2.5, 10, [3, 5, 8, 10]), (160.4, 642, [161, 321, 482, 642]), (0.4, 3, [1, 2, 3])],
)
def test_what_is_due(every, last, expected):
    assert [step for step in range(1, last + 1) if train.is_due(step, every, last)] == expected


def test_run_without_validation_takes_the_last_step(data, tmp_path):
    summary, _ = run(make_config(data, validation_fraction=0.0, num_epochs=4.0, profile=True), tmp_path)
    assert summary['validation'] is None and summary['best_step'] == summary['steps'] == 16
    assert list(tmp_path.glob('plugins/profile/*/*.xplane.pb'))


def test_workdir_of_another_configuration(finished):
    config, workdir, _, _ = finished
    other = config.copy_and_resolve_references()
    other.learning_rate, other.augment.zoom = 0.5, 0.0
    with pytest.raises(InputError, match=r'augment.zoom: 0.1 there, 0.0 now; learning_rate: 0.0003 there, 0.5 now'):
        train.train_and_evaluate(other, workdir)


@pytest.mark.parametrize(
    ('field', 'earlier', 'expected'),
    [('auto', None, 'runs/compilation_cache'), ('', None, None), ('own', None, 'own'), ('auto', 'set', 'set')],
)
def test_where_compiled_programs_are_kept(field, earlier, expected, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update('jax_compilation_cache_dir', earlier)
        run_folder.use_compilation_cache(make_config(data, compilation_cache=field), pathlib.Path('runs/first'))
        found = jax.config.jax_compilation_cache_dir
    finally:
        jax.config.update('jax_compilation_cache_dir', before)
    assert found == (str(tmp_path / expected) if field == 'auto' and not earlier else expected)


def test_workdir_of_other_data(finished, data, tmp_path):
    config, workdir, _, _ = finished
    told = json.loads((workdir / 'run.json').read_text()) | {'split_sha256': 'of other files'}
    (tmp_path / 'run.json').write_text(json.dumps(told))
    with pytest.raises(InputError, match='split_sha256 was of other files'):
        train.train_and_evaluate(config, tmp_path)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'batch_size': 12, 'gradient_accumulation': 5}, r'batch_size is 12.*try --config.batch_size=10'),
        ({'num_epochs': 0.0}, 'config.num_epochs is 0.0: give more than 0'),
        ({'seed': -1}, 'config.seed'),
        ({'early_stopping': 2, 'validation_fraction': 0.0}, 'config.early_stopping'),
        ({'distributed': 'host:1234,2,0'}, 'only brain_jax.main starts several processes'),
        ({'model': 'ResNet50'}, 'DenseNet121'),
        ({'optimizer': 'adagrad'}, 'adamw'),
        ({'pretrained': '/nowhere/weights.h5'}, '/nowhere/weights.h5'),
        ({'data_dir': '/nowhere'}, '/nowhere'),
        ({'groups': '/nowhere.csv'}, '/nowhere.csv'),
    ],
)
def test_bad_configuration_leaves_no_workdir(data, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train.train_and_evaluate(make_config(data | changes), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_frozen_imagenet_features_tell_real_images_apart(shared, tmp_path):
    for split, count in (('Training', 60), ('Testing', 25)):
        for source in sorted((shared / 'brain-tumor-mri' / split).iterdir()):
            folder = tmp_path / 'data' / split / source.name
            folder.mkdir(parents=True)
            files = sorted(source.glob('*.jpg'))
            for image in files[:: len(files) // count][:count]:
                (folder / image.name).symlink_to(image)
    config = make_config(
        {'data_dir': str(tmp_path / 'data'), 'prepared_dir': str(tmp_path / 'prepared')},
        'frozen',
        model='DenseNet121',
        image_size=64,
        num_epochs=30.0,
        eval_every_epochs=30.0,
        log_every_steps=1000,
        checkpoint_every_steps=10_000,
        pretrained=str(shared / 'weights/densenet121_weights_tf_dim_ordering_tf_kernels.h5'),
    )
    summary, _ = run(config, tmp_path / 'run')
    assert summary['test']['n'] == 100 and len(summary['weights_sha256']) == 64
    assert summary['test']['accuracy'] > 0.6  # by chance: 0.25
