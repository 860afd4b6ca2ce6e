"""Tests of the search for copies."""

import csv
import io
import itertools
import sys

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, spatial

from brain_jax import InputError
from brain_jax.data import images, leakage, phantom

CLASSES = itertools.cycle(phantom.CLASS_NAMES)
HEADS = [phantom.draw_head(np.random.default_rng(i), next(CLASSES), 160)[0] for i in range(24)]


def all_orientations(image):
    """Returns the eight symmetries of a square image, in the order of ORIENTATIONS, each spelt out."""
    mirrored = np.fliplr(image)
    return [
        image,
        np.rot90(image),
        np.flipud(np.fliplr(image)),
        np.rot90(image, -1),
        mirrored,
        image.T,  # mirrored left to right, then turned by 90 degrees against the clock
        np.flipud(image),
        np.rot90(mirrored, -1),
    ]


def random_thumbnails(count, seed=0, side=8):
    rng = np.random.default_rng(seed)
    return leakage.thumbnails(rng.integers(0, 256, (count, side, side), np.uint8), side)


def compare_all(queries, references, side=8):
    """Returns the correlations [orientation, query, reference], each by numpy.corrcoef."""
    turned = [[image.ravel() for image in all_orientations(row.reshape(side, side))] for row in queries]
    size = len(queries)
    return np.array(
        [np.corrcoef([rows[k] for rows in turned], references)[:size, size:] for k in range(8)],
    )


def encode(image, **options):
    """Returns an image after it was saved as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, 'JPEG', **options)
    return images.decode_image(buffer.getvalue())


def resize(image, width, height):
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


COPIES = {
    'exact': lambda image: image,
    'made smaller': lambda image: resize(image, 100, 100),
    'made larger': lambda image: resize(image, 300, 300),
    'saved anew': lambda image: encode(image, quality=60),
    'mirrored': lambda image: image[:, ::-1],
    'upside down and saved anew': lambda image: encode(np.ascontiguousarray(image[::-1]), quality=75),
    'turned': np.rot90,
    'brighter': lambda image: np.minimum(image, 225) + 30,
    'darker': lambda image: image // 2,
}
ALIGNED_COPIES = {
    'cropped': lambda image: image[2:-2, 2:-2],
    'cropped at one corner': lambda image: image[2:, 2:],
    'shifted': lambda image: np.roll(image, 2, axis=1),
    'cropped and mirrored': lambda image: image[2:-2, -3:1:-1],
    'stretched': lambda image: resize(image, 160, 156),
}


def test_recall_by_kind_on_real_images(shared):
    """Of 100 real images, each changed in every way, among 900; and how many pairs of different groups are flagged."""
    with open(shared / 'brain-tumor-mri-groups.csv', newline='') as file:
        rows = [row for row in csv.DictReader(file) if row['path'].startswith('Training/') and row['patient_id']]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))[:900]]
    heads = [images.read_image(shared / 'brain-tumor-mri' / row['path']) for row in rows]
    groups = np.array([row['group'] for row in rows])
    references = leakage.thumbnails(heads)
    for kind, change in (COPIES | ALIGNED_COPIES).items():
        queries = leakage.thumbnails([change(head) for head in heads[:100]])
        found = leakage.search(queries, references)
        aligned = leakage.aligned_pairs(queries, found.matches, references)
        first, second = (
            np.concatenate([getattr(pairs, name) for pairs in (found.pairs, aligned)]) for name in ('first', 'second')
        )
        recall = np.isin(np.arange(100), first[first == second]).mean()
        unrelated = np.mean(groups[:100, None] != groups) * 100 * 900
        flagged = np.sum(groups[first] != groups[second]) / unrelated
        print(f'{kind:28} recall {recall:.2f}, unrelated pairs flagged {flagged:.5f}')
        assert recall == 1 if kind in COPIES else recall >= 0.9
        assert flagged <= 0.01


def test_thumbnails_are_standardised():
    thumbs = leakage.thumbnails(HEADS)
    assert (thumbs.dtype, thumbs.shape) == (np.float32, (24, 4096))
    small = np.array([images.pad_and_resize(head, 64).ravel() for head in HEADS], np.float64)
    np.testing.assert_allclose(thumbs @ thumbs.T, np.corrcoef(small), atol=1e-5)


def test_thumbnails_of_any_shape():
    wide = np.random.default_rng(0).integers(0, 256, (5, 9), np.uint8)
    expected = np.pad(wide, ((2, 2), (0, 0))).astype(np.float64).ravel()
    (thumb,) = leakage.thumbnails([wide], 9)
    expected -= expected.mean()
    np.testing.assert_allclose(thumb, expected / np.linalg.norm(expected), atol=1e-6)


@pytest.mark.parametrize('orientation', range(8))
def test_orientations(orientation):
    image = np.arange(36).reshape(6, 6)
    expected = all_orientations(image)[orientation]
    np.testing.assert_array_equal(leakage.turn(image, orientation), expected)
    np.testing.assert_array_equal(leakage.turn(expected, leakage.INVERSE[orientation]), image)
    np.testing.assert_array_equal(leakage.turn(np.stack([image, image]), orientation)[1], expected)


@pytest.mark.parametrize('orientation', range(8))
def test_every_orientation_is_found(orientation):
    thumbs = leakage.thumbnails(HEADS)
    turned = np.array([all_orientations(row.reshape(64, 64))[orientation].ravel() for row in thumbs])
    matches = leakage.best_matches(thumbs, turned)
    np.testing.assert_array_equal(matches.reference, np.arange(24))
    np.testing.assert_array_equal(matches.orientation, orientation)
    np.testing.assert_allclose(matches.correlation, 1, atol=1e-6)
    np.testing.assert_array_equal(leakage.best_matches(turned, thumbs).orientation, leakage.INVERSE[orientation])


@pytest.mark.parametrize('block', [5, 8, 100])
def test_search_between_two_sets_is_exact(monkeypatch, block):
    monkeypatch.setattr(leakage, '_BLOCK', block)
    queries, references = random_thumbnails(13), random_thumbnails(18, seed=1)
    references[7] = all_orientations(queries[4].reshape(8, 8))[3].ravel()
    expected = compare_all(queries, references)
    found = leakage.search(queries, references, threshold=0.2)
    best = expected.max(axis=0)
    np.testing.assert_array_equal(found.matches.reference, best.argmax(axis=1))
    np.testing.assert_allclose(found.matches.correlation, best.max(axis=1), atol=1e-5)
    rows = np.arange(13)
    np.testing.assert_array_equal(found.matches.orientation, expected.argmax(axis=0)[rows, best.argmax(axis=1)])
    np.testing.assert_allclose(found.unturned, np.maximum(expected[0].max(axis=1), 0), atol=1e-5)
    pairs = sorted(zip(found.pairs.first.tolist(), found.pairs.second.tolist(), strict=True))
    assert pairs == [tuple(pair) for pair in np.argwhere(best >= 0.2)] and len(pairs) > 20


@pytest.mark.parametrize('block', [5, 8, 100])
def test_search_within_a_set_is_exact(monkeypatch, block):
    monkeypatch.setattr(leakage, '_BLOCK', block)
    thumbs = random_thumbnails(17)
    thumbs[16] = all_orientations(thumbs[2].reshape(8, 8))[1].ravel()
    expected = compare_all(thumbs, thumbs)
    expected[:, np.arange(17), np.arange(17)] = -1
    best = expected.max(axis=0)
    found = leakage.search(thumbs, threshold=0.2)
    partners = best[np.arange(17), found.matches.reference]  # 2 and 16 are equally good for others
    np.testing.assert_allclose(partners, best.max(axis=1), atol=1e-6)
    np.testing.assert_allclose(found.matches.correlation, best.max(axis=1), atol=1e-5)
    assert (found.matches.orientation[2], found.matches.orientation[16]) == (1, 3)
    order = np.lexsort((found.pairs.second, found.pairs.first))
    first, second, correlation, orientation = (column[order] for column in found.pairs)
    np.testing.assert_array_equal(np.stack([first, second], 1), np.argwhere(np.triu(best) >= 0.2))
    np.testing.assert_allclose(correlation, best[first, second], atol=1e-5)
    np.testing.assert_array_equal(orientation, expected.argmax(axis=0)[first, second])


def test_a_constant_image_matches_nothing():
    black = np.zeros((2, 64, 64), np.uint8)
    thumbs = leakage.thumbnails([*black, np.full((10, 10), 77, np.uint8), *HEADS[:2]])
    np.testing.assert_array_equal(thumbs[:3], 0)
    matches = leakage.best_matches(thumbs)
    np.testing.assert_array_equal(matches.reference, [-1, -1, -1, 4, 3])
    np.testing.assert_array_equal(matches.correlation[:3], 0)
    assert len(leakage.near_pairs(thumbs).first) == 0


@pytest.mark.parametrize('kind', COPIES)
def test_copies_are_found(kind):
    queries, references = leakage.thumbnails([COPIES[kind](head) for head in HEADS]), leakage.thumbnails(HEADS)
    pairs = leakage.near_pairs(queries, references)
    np.testing.assert_array_equal(pairs.first, range(24))  # each once, and none with another head
    np.testing.assert_array_equal(pairs.second, range(24))


@pytest.mark.parametrize('kind', ALIGNED_COPIES)
def test_copies_are_found_after_alignment(kind):
    queries, references = leakage.thumbnails([ALIGNED_COPIES[kind](head) for head in HEADS]), leakage.thumbnails(HEADS)
    found = leakage.search(queries, references)
    aligned = leakage.aligned_pairs(queries, found.matches, references)
    pairs = leakage.join_pairs(found.pairs, aligned)
    np.testing.assert_array_equal(pairs.first, pairs.second)
    assert len(set(pairs.first.tolist())) == len(pairs.first) >= 23


def test_unrelated_images_do_not_align():
    thumbs = leakage.thumbnails(HEADS)
    assert len(leakage.aligned_pairs(thumbs, leakage.best_matches(thumbs)).first) == 0


def test_alignment_within_a_set_lists_each_pair_once():
    thumbs = leakage.thumbnails([*HEADS, HEADS[3][2:-2, -3:1:-1]])
    pairs = leakage.aligned_pairs(thumbs, leakage.best_matches(thumbs))
    assert [column.tolist() for column in (pairs.first, pairs.second, pairs.orientation)] == [[3], [24], [4]]


def test_fit_of_a_shift_is_exact_to_first_order():
    # A slow wave, moved: only its value and its derivative along x are needed, whatever blurs both.
    y, x = np.mgrid[:64, :64] / 64
    waves = np.sin(3 * x[None] + 2 * y[None] + np.array([0, 0.02, 0.5])[:, None, None]).astype(np.float32)
    correlation = leakage._fit(waves[[0, 0]], waves[1:])
    np.testing.assert_allclose(correlation, 1, atol=1e-3)
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(2, 64, 64)), (0, 2, 2)).astype(np.float32)
    assert leakage._fit(noise[:1], noise[1:]) < 0.5


def test_copy_groups_are_connected_components():
    chain = [HEADS[0], HEADS[0][::-1], encode(HEADS[0][::-1].copy(), quality=60)]
    black = np.zeros((9, 9), np.uint8)
    pictures = [*chain, HEADS[1], black, HEADS[2], black, HEADS[3][2:, 2:], HEADS[3]]
    names = [f'Training/a/{i}.png' for i in range(9)]
    pixels = [f'{image.shape}{image.tobytes()}' for image in pictures]
    found = leakage.copy_groups(names, leakage.thumbnails(pictures), pixels).tolist()
    assert [found.index(group) for group in found] == [0, 0, 0, 3, 4, 5, 4, 7, 7]
    assert found[0] == 'image Training/a/0.png'


def test_nearest_pixels_is_the_nearest_neighbour():
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 256, (40, 12, 12), np.uint8), rng.integers(0, 256, (15, 12, 12), np.uint8)
    labels = rng.integers(0, 4, 40)
    small = [[images.pad_and_resize(image, 6).ravel().astype(float) for image in some] for some in (test, train)]
    expected = labels[spatial.distance.cdist(*small).argmin(axis=1)]
    np.testing.assert_array_equal(leakage.nearest_pixels(train, labels, list(test), size=6), expected)


def test_many_images_need_faiss(monkeypatch):
    monkeypatch.setattr(leakage, '_MAX_EXACT', 10)
    monkeypatch.setitem(sys.modules, 'faiss', None)  # what Python itself sets for a module that cannot be imported
    with pytest.raises(InputError, match=r'more than 10 images .* pip install'):
        leakage.near_pairs(random_thumbnails(11))


def test_approximate_search(monkeypatch):
    pytest.importorskip('faiss')
    thumbs = leakage.thumbnails([*HEADS, HEADS[5][:, ::-1], np.rot90(HEADS[5]), np.zeros((8, 8), np.uint8)])
    exact = leakage.search(thumbs)
    monkeypatch.setattr(leakage, '_MAX_EXACT', 10)
    found = leakage.search(thumbs)
    assert found.matches.reference[-1] == -1
    for column, expected in zip((*found.pairs, *found.matches), (*exact.pairs, *exact.matches), strict=True):
        np.testing.assert_allclose(column, expected, atol=1e-5)
    assert leakage.measure_recall(thumbs) == (1, 1)


def test_approximate_search_between_two_sets(monkeypatch):
    pytest.importorskip('faiss')
    queries, references = leakage.thumbnails([head[::-1] for head in HEADS[:9]]), leakage.thumbnails(HEADS)
    monkeypatch.setattr(leakage, '_MAX_EXACT', 10)
    found = leakage.search(queries, references)
    np.testing.assert_array_equal(found.matches.reference, range(9))
    np.testing.assert_array_equal(found.pairs.orientation, 6)
