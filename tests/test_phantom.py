"""Tests of the synthetic heads."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from brain_jax import InputError
from brain_jax.data import phantom

SIZE = 96
SEEDS = range(12)


def draw(class_name, seed, size=SIZE):
    return phantom.draw_head(np.random.default_rng(seed), class_name, size)


def draw_with_twin(class_name, seed):
    """Returns (image, mask, image of the same head without a lesion), the images as float."""
    image, mask = draw(class_name, seed)
    twin, _ = draw('notumor', seed)
    return image.astype(float), mask, twin.astype(float)


def centre(mask):
    """Returns the mean row and column of a mask, as fractions of its sides."""
    return np.argwhere(mask).mean(axis=0) / mask.shape


def read_tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('class_name', ['glioma', 'meningioma', 'pituitary'])
def test_classes_differ_only_inside_the_mask(class_name):
    for seed in SEEDS:
        image, mask, twin = draw_with_twin(class_name, seed)
        np.testing.assert_array_equal(image[~mask], twin[~mask])
        assert (image != twin)[mask].mean() > 0.8
        assert abs((image - twin)[mask]).mean() > 10  # of 255: it can be seen


def test_notumor_has_no_lesion():
    for seed in SEEDS:
        image, mask = draw('notumor', seed)
        assert (image.shape, image.dtype, mask.shape, mask.dtype) == ((SIZE, SIZE), np.uint8, (SIZE, SIZE), bool)
        assert not mask.any()


def test_meningioma_touches_the_skull_and_glioma_does_not():
    # Bone is the dark ring under the scalp: look for it next to the lesion, in the same head without a lesion.
    def darkest_beside(class_name, seed):
        _, mask, twin = draw_with_twin(class_name, seed)
        grown = mask.copy()
        for axis in (0, 1):
            for step in (-2, -1, 1, 2):
                grown |= np.roll(mask, step, axis)
        head = np.median(twin[twin > twin.mean()])
        return np.percentile(twin[grown & ~mask], 5) / head

    meningioma = [darkest_beside('meningioma', seed) for seed in SEEDS]
    glioma = [darkest_beside('glioma', seed) for seed in SEEDS]
    assert np.median(meningioma) < 0.25 < np.median(glioma)


def test_lesions_lie_where_their_class_says():
    pituitary = np.array([centre(draw('pituitary', seed)[1]) for seed in SEEDS])
    assert (abs(pituitary[:, 1] - 0.5) < 0.2).all()  # in the middle ...
    assert (pituitary[:, 0] > 0.55).all()  # ... and low
    area = {name: np.median([draw(name, seed)[1].mean() for seed in SEEDS]) for name in phantom.CLASS_NAMES}
    assert 0 == area['notumor'] < area['pituitary'] < area['meningioma'] < area['glioma']


def test_glioma_is_less_regular_than_meningioma():
    # A lesion's mirror image (through its own centre) covers a smooth lesion better than an irregular one.
    def symmetry(class_name, seed):
        _, mask = draw(class_name, seed)
        rows, columns = np.nonzero(mask)
        box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        return (box & box[::-1, ::-1]).sum() / box.sum()

    assert np.mean([symmetry('glioma', s) for s in SEEDS]) < np.mean([symmetry('meningioma', s) for s in SEEDS]) - 0.02


def test_mean_brightness_does_not_tell_the_classes_apart():
    means = {name: [draw(name, seed)[0].mean() for seed in range(40)] for name in phantom.CLASS_NAMES}
    spread = np.mean([np.std(values) for values in means.values()])
    assert np.ptp([np.mean(values) for values in means.values()]) < 0.3 * spread


def test_another_size_shows_the_same_head():
    large, _ = draw('meningioma', 3, size=128)
    small, _ = draw('meningioma', 3, size=64)
    shrunk = large.reshape(64, 2, 64, 2).mean(axis=(1, 3))
    assert np.corrcoef(shrunk.ravel(), small.ravel())[0, 1] > 0.95


def test_the_tree_is_that_of_the_real_data(tmp_path):
    phantom.make_phantom(tmp_path / 'new' / 'heads', train_per_class=3, test_per_class=2, image_size=48)
    files = read_tree(tmp_path / 'new' / 'heads')
    assert 'synthetic' in files.pop('README.txt').decode()
    counts = {}
    for name in files:
        folder = pathlib.PurePosixPath(name).parent.as_posix()
        counts[folder] = counts.get(folder, 0) + 1
    classes = ('glioma', 'meningioma', 'notumor', 'pituitary')
    assert counts == {f'Training/{c}': 3 for c in classes} | {f'Testing/{c}': 2 for c in classes}
    assert len(set(files.values())) == 20  # no image twice
    with Image.open(tmp_path / 'new' / 'heads' / 'Testing' / 'glioma' / 'Te-gl_0001.png') as image:
        assert (image.mode, image.size) == ('L', (48, 48))
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['heads']  # nothing left over


def test_the_seed_decides_every_file(tmp_path):
    (tmp_path / 'b').mkdir()  # an empty folder may be there
    for name, seed, train in (('a', 1, 2), ('b', 1, 2), ('c', 2, 2), ('d', 1, 1)):
        phantom.make_phantom(tmp_path / name, train_per_class=train, test_per_class=1, image_size=32, seed=seed)
    a, b, c, d = (read_tree(tmp_path / name) for name in 'abcd')
    assert a == b
    assert not {a[name] for name in a if name != 'README.txt'} & set(c.values())
    assert all(a[name] == d[name] for name in d if name != 'README.txt')  # more images do not change the first ones


def test_what_exists_is_not_overwritten(tmp_path):
    (tmp_path / 'mine.txt').write_text('precious')
    for target in (tmp_path, tmp_path / 'mine.txt'):
        with pytest.raises(InputError, match='not an empty folder'):
            phantom.make_phantom(target, train_per_class=1, test_per_class=1)
    assert read_tree(tmp_path) == {'mine.txt': b'precious'}


@pytest.mark.parametrize('change', [{'train_per_class': 0}, {'test_per_class': 0}, {'image_size': 8}, {'seed': -1}])
def test_numbers_that_make_no_dataset_are_refused(tmp_path, change):
    arguments = {'train_per_class': 1, 'test_per_class': 1} | change
    with pytest.raises(InputError):
        phantom.make_phantom(tmp_path / 'heads', **arguments)
    assert not list(tmp_path.iterdir())


def test_an_unknown_class_is_refused():
    with pytest.raises(InputError, match='unknown class'):
        draw('Glioma', 0)
