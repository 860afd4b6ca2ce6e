"""Tests of brain_jax.data.pipeline."""

import csv
import hashlib

import jax
import ml_collections
import numpy as np
import pytest
from PIL import Image

from brain_jax import InputError
from brain_jax.data import pipeline

SIZE = 8
CLASSES = ('glioma', 'notumor', 'pituitary')
TRAIN_COUNTS = (6, 10, 8)  # files a class, after the extra ones of make_folder


def make_folder(root):
    """Writes random grey images with a few copies among them; returns file name -> uint8 [height, width]."""
    generator = np.random.default_rng(0)
    files = {}
    for class_name, count in zip(CLASSES, TRAIN_COUNTS, strict=True):
        for i in range(count):
            files[f'Training/{class_name}/{i}.png'] = generator.integers(0, 256, (SIZE, SIZE), np.uint8)
        for i in range(3):
            files[f'Testing/{class_name}/{i}.png'] = generator.integers(0, 256, (SIZE, SIZE), np.uint8)
    files['Training/glioma/1.png'] = files['Training/glioma/0.png']
    files['Training/notumor/1.bmp'] = files.pop('Training/notumor/1.png')
    files['Training/notumor/0.png'] = files['Training/notumor/1.bmp']  # the same pixels in other bytes
    files['Training/pituitary/0.png'] = files['Training/pituitary/0.png'][:6]  # 6 rows, 8 columns
    files['Testing/pituitary/0.png'] = files['Training/pituitary/1.png']
    for name, image in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / name)
    return files


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The folder of make_folder, its images, and a configuration that reads it."""
    root = tmp_path_factory.mktemp('folder')
    config = ml_collections.ConfigDict(
        {
            'data_dir': str(root),
            'dataset': 'auto',
            'prepared_dir': str(tmp_path_factory.mktemp('prepared')),
            'groups': ml_collections.config_dict.placeholder(str),
            'skip_unreadable': False,
            'skip_mislabelled': False,
            'split': 'standard',
            'folds': 3,
            'fold': 0,
            'validation_fraction': 0.25,
            'image_size': SIZE,
            'cache_images': 'auto',
            'seed': 0,
        }
    )
    return root, make_folder(root), config


@pytest.fixture(scope='module')
def dataset(folder):
    """What load_dataset makes of the folder."""
    return pipeline.load_dataset(folder[-1])


def changed(config, **fields):
    """Returns a copy of a configuration with other values."""
    config = config.copy_and_resolve_references()
    config.update(fields)
    return config


def make_examples(n):
    """Returns n examples; all pixels of image i are i, its label is i % 3."""
    images = np.repeat(np.arange(n, dtype=np.uint8), 4).reshape(n, 2, 2)
    names = np.array([str(i) for i in range(n)])
    return pipeline.Examples(
        images, np.arange(n, dtype=np.int32), np.arange(n, dtype=np.int32) % 3, names, names, names, names
    )


def write_table(path, *rows, header=('path', 'group')):
    """Writes a CSV file and returns its path as str."""
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def test_examples_are_the_files(folder, dataset):
    root, files, _ = folder
    assert dataset.class_names == CLASSES
    seen = []
    for examples in (dataset.train, dataset.validation, dataset.test):
        batch = examples.batch(np.arange(len(examples)))
        types = {name: (value.dtype, value.shape[1:]) for name, value in batch.items()}
        assert types == {
            'image': (np.uint8, (8, 8)),
            'label': (np.int32, ()),
            'mask': (bool, ()),
            'index': (np.int32, ()),
        }
        assert batch['mask'].all()
        for name, image, label, sha256 in zip(
            examples.file_names, batch['image'], batch['label'], examples.sha256, strict=True
        ):
            expected = files[name]
            if expected.shape == (6, 8):
                expected = np.concatenate([np.zeros((1, 8)), expected, np.zeros((1, 8))])
            np.testing.assert_array_equal(image, expected)
            assert CLASSES[label] == name.split('/')[1]
            assert sha256 == hashlib.sha256((root / name).read_bytes()).hexdigest()
            seen.append(name)
    assert sorted(seen) == sorted(files)


def test_index_is_the_place_in_the_folders(folder, dataset):
    names = sorted(folder[1], key=lambda name: (name.startswith('Testing'), name))
    for examples in (dataset.train, dataset.validation, dataset.test):
        assert [names[i] for i in examples.index] == examples.file_names.tolist()


def test_images_decoded_on_access_are_those_in_memory(folder, dataset):
    decoded = pipeline.load_dataset(changed(folder[-1], cache_images='never'))
    assert not isinstance(decoded.train.images, np.ndarray)
    assert decoded.split_sha256 == dataset.split_sha256
    arguments = {'batch_size': 5, 'seed': 3, 'num_steps': 6}
    batches = zip(
        pipeline.train_batches(decoded.train, **arguments),
        pipeline.train_batches(dataset.train, **arguments),
        strict=True,
    )
    for batch, expected in batches:
        jax.tree.map(np.testing.assert_array_equal, batch, expected)


def test_validation_holds_whole_groups_of_every_class(dataset):
    assert not set(dataset.train.groups) & set(dataset.validation.groups)
    # A group of two may make one more of a class, and one less.
    assert np.bincount(dataset.validation.labels) == pytest.approx(np.array(TRAIN_COUNTS) / 4, abs=1)
    assert len(dataset.validation) == pytest.approx(sum(TRAIN_COUNTS) / 4, abs=2)


def test_copies_share_a_group(dataset):
    groups = {}
    for examples in (dataset.train, dataset.validation, dataset.test):
        groups.update(zip(examples.file_names, examples.groups, strict=True))
    assert groups['Training/glioma/0.png'] == groups['Training/glioma/1.png']
    assert groups['Training/notumor/0.png'] == groups['Training/notumor/1.bmp']
    assert groups['Training/pituitary/1.png'] == groups['Testing/pituitary/0.png']
    assert len(set(groups.values())) == len(groups) - 3


def test_split_is_deterministic_and_hashed(folder, dataset):
    lines = []
    for split in ('train', 'validation', 'test'):
        examples = getattr(dataset, split)
        for name, sha256 in zip(examples.file_names, examples.sha256, strict=True):
            lines.append(f'{split} {name} {sha256} {name.split("/")[1]}\n')
    assert dataset.split_sha256 == hashlib.sha256(''.join(sorted(lines)).encode()).hexdigest()
    assert pipeline.load_dataset(folder[-1]).split_sha256 == dataset.split_sha256
    assert pipeline.load_dataset(changed(folder[-1], seed=1)).split_sha256 != dataset.split_sha256


def test_group_table(folder, tmp_path):
    names = sorted(name for name in folder[1] if name.startswith('Training'))
    rows = [(name, f'patient {i // 2}', 'ignored') for i, name in enumerate(names)]
    table = write_table(tmp_path / 'groups.csv', *rows, header=('path', 'group', 'source'))
    dataset = pipeline.load_dataset(changed(folder[-1], groups=table, validation_fraction=0.34))
    patient = {name: group for name, group, _ in rows}
    train, validation = ({patient[name] for name in s.file_names} for s in (dataset.train, dataset.validation))
    assert train | validation == set(patient.values())
    assert not train & validation


def test_no_validation(folder):
    dataset = pipeline.load_dataset(changed(folder[-1], validation_fraction=0.0))
    assert dataset.validation is None
    assert len(dataset.train) == sum(TRAIN_COUNTS)


@pytest.mark.parametrize('split', ['standard', 'grouped'])
@pytest.mark.parametrize('seed', [0, 1])
def test_no_group_stands_on_two_sides(folder, split, seed):
    tests = []
    for fold in range(3):
        dataset = pipeline.load_dataset(changed(folder[-1], split=split, fold=fold, seed=seed))
        assert not set(dataset.train.groups) & set(dataset.validation.groups)
        if split == 'grouped':
            assert not set(dataset.test.groups) & {*dataset.train.groups, *dataset.validation.groups}
        tests.append(dataset.test.file_names.tolist())
        everything = [*dataset.train.file_names, *dataset.validation.file_names, *dataset.test.file_names]
        assert sorted(everything) == sorted(folder[1])
    if split == 'grouped':
        assert sorted(name for names in tests for name in names) == sorted(folder[1])  # each image is tested once


def test_random_split_ignores_groups(folder):
    config = changed(folder[-1], split='random', folds=2)
    names = [set(pipeline.load_dataset(changed(config, seed=seed)).test.file_names) for seed in range(8)]
    pair = {'Training/glioma/0.png', 'Training/glioma/1.png'}
    assert any(len(pair & test) == 1 for test in names)


def test_mislabelled_images_are_left_out_on_demand(folder, tmp_path, caplog):
    wrong = 'Testing/glioma/1.png'
    rows = [(name, name, 'pituitary' if name == wrong else name.split('/')[1]) for name in folder[1]]
    table = write_table(tmp_path / 'groups.csv', *rows, header=('path', 'group', 'source_label'))
    config = changed(folder[-1], groups=table)
    assert wrong in pipeline.load_dataset(config).test.file_names
    assert f'{wrong} (pituitary there)' in caplog.text
    without = pipeline.load_dataset(changed(config, skip_mislabelled=True))
    assert sorted(without.test.file_names) == sorted(
        name for name in folder[1] if name.startswith('Testing') and name != wrong
    )
    assert without.test.index.tolist() == [24, 26, *range(27, 33)]  # images keep their places


def test_copies_are_kept_beside_the_records(folder, dataset):
    (table,) = dataset.folder.glob('copies_*.csv')
    with open(table, newline='') as file:
        groups = {row['path']: row['group'] for row in csv.DictReader(file)}
    for examples in (dataset.train, dataset.validation, dataset.test):
        assert [groups[name] for name in examples.file_names] == examples.groups.tolist()


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'validation_fraction': -0.1}, 'at least 0'),
        ({'validation_fraction': 0.5}, 'less than 0.5'),
        ({'validation_fraction': 0.1}, 'class glioma has only 5 groups .* 10 parts'),
        ({'split': 'grouped', 'folds': 9}, 'class glioma has only 8 groups .* 9 parts'),
        ({'split': 'grouped', 'fold': 3}, 'fold is 3 of 3'),
        ({'split': 'patients'}, "split is 'patients'"),
        ({'cache_images': 'yes'}, "cache_images is 'yes'"),
    ],
)
def test_bad_fields(folder, fields, message):
    with pytest.raises(InputError, match=message):
        pipeline.load_dataset(changed(folder[-1], **fields))


def test_every_epoch_holds_every_image_once_in_another_order():
    n, epochs = 13, 4
    batches = pipeline.train_batches(make_examples(n), batch_size=n, seed=0, num_steps=epochs)
    orders = [batch['index'].tolist() for batch in batches]
    assert all(sorted(order) == list(range(n)) for order in orders)
    assert len({tuple(order) for order in orders}) == epochs
    # Whatever the batch size, also where a batch holds the end of an epoch and the start of the next.
    batches = list(pipeline.train_batches(make_examples(n), batch_size=4, seed=0, num_steps=13))
    assert np.concatenate([batch['index'] for batch in batches]).tolist() == np.ravel(orders).tolist()
    for batch in batches:
        np.testing.assert_array_equal(batch['image'], np.broadcast_to(batch['index'][:, None, None], (4, 2, 2)))
        np.testing.assert_array_equal(batch['label'], batch['index'] % 3)
        assert batch['mask'].all()
    other = next(pipeline.train_batches(make_examples(n), batch_size=n, seed=1, num_steps=1))
    assert other['index'].tolist() != orders[0]


@pytest.mark.parametrize('start_step', [1, 5, 9, 10])
def test_a_resumed_run_sees_the_steps_that_are_left(start_step):
    arguments = {'batch_size': 4, 'seed': 2, 'num_steps': 10}
    whole = [batch['index'].tolist() for batch in pipeline.train_batches(make_examples(7), **arguments)]
    rest = pipeline.train_batches(make_examples(7), start_step=start_step, **arguments)
    assert [batch['index'].tolist() for batch in rest] == whole[start_step:]


def test_processes_together_see_what_one_sees():
    examples = make_examples(11)
    for make, more in (
        (pipeline.train_batches, {'seed': 0, 'start_step': 2, 'num_steps': 6}),
        (pipeline.eval_batches, {}),
    ):
        arguments = {'batch_size': 6, **more}
        alone = [batch['index'] for batch in make(examples, **arguments)]
        parts = [list(make(examples, process_index=p, process_count=3, **arguments)) for p in range(3)]
        together = [np.concatenate([part['index'] for part in step]) for step in zip(*parts, strict=True)]
        np.testing.assert_array_equal(together, alone)
        with pytest.raises(InputError, match='6 images cannot be shared evenly by 4'):
            make(examples, process_count=4, **arguments)


@pytest.mark.parametrize('batch_size', [1, 3, 11, 16])
def test_eval_batches_cover_every_image_once(batch_size):
    batches = list(pipeline.eval_batches(make_examples(11).subset(np.arange(2, 11)), batch_size=batch_size))
    batch = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    assert all(len(b['label']) == batch_size for b in batches)
    assert len(batches) == -(-9 // batch_size)
    real = batch['mask']
    assert batch['index'][real].tolist() == list(range(2, 11))
    assert batch['image'][real][:, 1, 1].tolist() == list(range(2, 11))
    assert real[:9].all()
    assert not batch['image'][~real].any()
    assert set(batch['index'][~real]) <= {-1}


def test_prefetch_keeps_the_order_and_runs_ahead():
    mesh = jax.sharding.Mesh(jax.devices(), ('data',))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    rows = 2 * jax.device_count()
    host = [{'image': np.full((rows, 2), i, np.uint8), 'mask': np.ones(rows, bool)} for i in range(5)]
    taken = []
    batches = pipeline.prefetch((taken.append(i) or batch for i, batch in enumerate(host)), sharding, size=2)
    first = next(batches)
    assert taken == [0, 1, 2]
    rest = list(batches)
    assert len(rest) == 4
    for batch, expected in zip([first, *rest], host, strict=True):
        assert batch['image'].sharding == sharding
        assert batch['image'].dtype == np.uint8
        jax.tree.map(np.testing.assert_array_equal, batch, expected)


@pytest.mark.parametrize('split', ['standard', 'grouped'])
def test_no_real_group_stands_on_two_sides(shared, tmp_path_factory, split):
    config = ml_collections.ConfigDict(
        {
            'data_dir': str(shared / 'brain-tumor-mri'),
            'dataset': 'auto',
            'prepared_dir': str(tmp_path_factory.getbasetemp() / 'prepared_real'),
            'groups': str(shared / 'brain-tumor-mri-groups.csv'),
            'skip_unreadable': False,
            'skip_mislabelled': False,
            'split': split,
            'folds': 5,
            'fold': 0,
            'validation_fraction': 0.1,
            'image_size': 32,
            'cache_images': 'auto',
            'seed': 0,
        }
    )
    images = pipeline.load_images(config)
    with open(config.groups, newline='') as file:
        rows = {row['path']: row for row in csv.DictReader(file)}
    for fold in range(5) if split == 'grouped' else (0,):
        dataset = pipeline.split_images(images, changed(config, fold=fold))
        sides = [dataset.train, dataset.validation] + ([dataset.test] if split == 'grouped' else [])
        for column in ('group', 'patient_id'):
            seen = [{rows[name][column] for name in examples.file_names} - {''} for examples in sides]
            assert not seen[0] & seen[1] and not set().union(*seen[:2]) & set().union(*seen[2:])
        joined = [set(examples.groups) for examples in sides]  # by the table and by copies
        assert sum(map(len, joined)) == len(set().union(*joined))
        if split == 'grouped':
            shares = np.bincount(dataset.test.labels) / len(dataset.test)
            expected = np.bincount(images.examples.labels) / len(images.examples)
            np.testing.assert_allclose(shares, expected, atol=0.03)
    if split == 'standard':
        patients = set(dataset.train.patients) | set(dataset.validation.patients)
        assert sum(patient in patients for patient in dataset.test.patients if patient) == 788
