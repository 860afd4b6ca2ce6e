"""What leaks from training into test images: copies, searched for among thumbnails, and what images they join.

Two images are near copies where their grey thumbnails of 64x64 pixels correlate, in one of the eight orientations of a
square. That finds copies which were resized, saved anew, made brighter or darker, mirrored, or turned by 90 degrees.
`aligned_pairs` adds those of the best partners that are copies after a small crop, shift or change of aspect: of about
a hundredth of the side. Neighbouring slices of one head can look like that too. Not found are copies that were changed
by more, or turned by more than a few degrees.
"""

import importlib.util
import math
import typing

import numpy as np
import tqdm
from scipy import linalg, ndimage, sparse
from sklearn import neighbors, preprocessing

from brain_jax import InputError
from brain_jax.data import groups, images

NEAR_COPY = 0.98  # correlation from which images count as copies
ORIENTATIONS = (
    'same',
    'turned 90',
    'turned 180',
    'turned 270',
    'mirrored',
    'mirrored, turned 90',
    'mirrored, turned 180',
    'mirrored, turned 270',
)
INVERSE = np.array([0, 3, 2, 1, 4, 5, 6, 7], np.int8)  # index of the orientation that undoes each
_BLOCK = 768  # images compared with as many others at once: 80 MB
_MAX_EXACT = 20_000  # images; above, an approximate index finds the candidates
_CANDIDATES = 16  # of the approximate index, for each image and orientation
_BLUR = 1.0  # standard deviation in pixels of a thumbnail: makes the derivatives hold for shifts of a pixel or two
_TIE = 1e-5  # correlations nearer than this are equal, and the first orientation counts


class Matches(typing.NamedTuple):
    """The best partner of each image, over all orientations.

    Attributes:
      reference: int32 [n], index of the partner; -1 where no image correlates positively.
      correlation: float32 [n], 0 where there is no partner.
      orientation: int8 [n], index into ORIENTATIONS: how the image must be turned to look like its partner.
    """

    reference: np.ndarray
    correlation: np.ndarray
    orientation: np.ndarray


class Pairs(typing.NamedTuple):
    """Pairs of images that look alike, each once, in its best orientation.

    Attributes:
      first: int32 [m], index of the query.
      second: int32 [m], index of the reference; larger than `first` where both are of one set.
      correlation: float32 [m].
      orientation: int8 [m], index into ORIENTATIONS: how the first must be turned to look like the second.
    """

    first: np.ndarray
    second: np.ndarray
    correlation: np.ndarray
    orientation: np.ndarray


class Found(typing.NamedTuple):
    """The result of a search.

    Attributes:
      matches: the best partner of each image.
      unturned: float32 [n], the best correlation of each image that none was turned for; 0 where none is positive.
      pairs: all pairs from the threshold on.
    """

    matches: Matches
    unturned: np.ndarray
    pairs: Pairs


def turn(image, orientation):
    """Brings an image, or a stack of images [..., size, size], into one of the eight orientations.

    Args:
      image: array [..., size, size].
      orientation: index into ORIENTATIONS. Mirrored is left to right, and comes first; turns go against the clock.

    Returns:
      A view of the array.
    """
    return np.rot90(image[..., ::-1] if orientation >= 4 else image, orientation % 4, axes=(-2, -1))


def thumbnails(pictures, size=64):
    """Makes thumbnails whose products are correlations.

    Args:
      pictures: uint8 [n, height, width] array, or a sequence of uint8 [height, width] arrays of any size.
      size: side of a thumbnail in pixels.

    Returns:
      float32 [n, size * size]: rows of mean zero and norm one. The row of a constant image is zero: it matches nothing.
    """
    rows = np.empty((len(pictures), size * size), np.float32)
    for row, picture in zip(rows, pictures, strict=True):
        row[:] = images.pad_and_resize(picture, size).ravel()
    for start in range(0, len(rows), 1000):  # in place, as the rows of 100,000 images take 1.6 GB
        some = rows[start : start + 1000]
        some -= some.mean(axis=1, keepdims=True)
        norms = np.linalg.norm(some, axis=1, keepdims=True)
        # The mean of equal numbers is not always that number, so the norm of a constant image is not always zero.
        np.divide(some, norms, out=some, where=norms > 1e-2)
        some[norms[:, 0] <= 1e-2] = 0
    return rows


def best_matches(queries, references=None, *, progress='Comparing the images'):
    """Finds the best partner of every image; see `search`, whose `matches` this is."""
    return search(queries, references, threshold=math.inf, progress=progress).matches


def near_pairs(queries, references=None, *, threshold=NEAR_COPY, progress='Comparing the images'):
    """Finds all pairs of images that look alike; see `search`, whose `pairs` this is."""
    return search(queries, references, threshold=threshold, progress=progress).pairs


def search(queries, references=None, *, threshold=NEAR_COPY, progress='Comparing the images'):
    """Finds the best partner of every image and all near pairs, in eight orientations.

    The search is exact up to 20,000 images. Above, FAISS proposes 16 partners for each image and orientation, and only
    these are compared.

    Args:
      queries: float32 [n, d], of `thumbnails`; their side is even, above 20,000 images a multiple of 4.
      references: float32 [m, d]; None: the queries, and no image is its own partner.
      threshold: correlation from which a pair counts.
      progress: name of the progress bar; None: no bar.

    Returns:
      `Found`.

    Raises:
      InputError: for more than 20,000 images where FAISS is not installed.
    """
    size = max(len(queries), len(queries if references is None else references))
    return (_search_exactly if size <= _MAX_EXACT else _search_approximately)(queries, references, threshold, progress)


def aligned_pairs(queries, matches, references=None, *, threshold=NEAR_COPY):
    """Finds the best partners that are near copies only after a small crop, shift or change of aspect.

    To first order these changes add derivatives to an image. So the partner is fitted by the blurred image and its
    derivatives along and across, times 1 and times the place: the tangent distance of Simard, LeCun and Denker
    (Efficient pattern recognition using a new transformation distance, 1993).

    Args:
      queries: float32 [n, d], of `thumbnails`.
      matches: their `Matches`.
      references: float32 [m, d], as `matches` was found with.
      threshold: of `near_pairs`. A fit raises any correlation, so it must come twice as near to 1.

    Returns:
      `Pairs` with the correlation of the fit. Without it, none of them reaches the threshold.
    """
    within = references is None
    references = queries if within else references
    shape = (-1, math.isqrt(queries.shape[1]), math.isqrt(queries.shape[1]))
    (rows,) = np.nonzero((matches.reference >= 0) & (matches.correlation < threshold))
    partners, orientations = matches.reference[rows], matches.orientation[rows]
    correlation = np.zeros(len(rows), np.float32)
    for start in range(0, len(rows), 256):
        some = slice(start, start + 256)
        turned = zip(queries[rows[some]].reshape(shape), orientations[some], strict=True)
        turned = np.stack([turn(image, orientation) for image, orientation in turned])
        correlation[some] = _fit(turned, references[partners[some]].reshape(shape))
    kept = correlation >= (1 + threshold) / 2
    return _unique(_clip(Pairs(rows[kept], partners[kept], correlation[kept], orientations[kept])), within)


def _fit(pictures, partners):
    """Returns the correlations float32 [n] of pictures, moved and stretched a little, with their partners.

    Args:
      pictures: float32 [n, side, side].
      partners: float32 [n, side, side].
    """
    pictures, partners = (ndimage.gaussian_filter(stack, (0, _BLUR, _BLUR)) for stack in (pictures, partners))
    side = pictures.shape[1]
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j].astype(np.float32)
    down, right = np.gradient(pictures, axis=(1, 2))
    basis = np.stack([pictures, right, down, x * right, y * down], axis=1).reshape(len(pictures), 5, -1)
    basis -= basis.mean(axis=2, keepdims=True)
    partners = partners.reshape(len(partners), -1, 1)
    partners = partners - partners.mean(axis=1, keepdims=True)
    products = basis @ basis.swapaxes(1, 2)
    # The derivatives of a simple image depend on one another: without this there would be no solution.
    products += 1e-5 * np.trace(products, axis1=1, axis2=2)[:, None, None] * np.eye(5, dtype=np.float32)
    projected = basis @ partners
    explained = np.sum(projected * np.linalg.solve(products, projected), axis=(1, 2))
    return np.sqrt(np.maximum(explained, 0) / np.maximum(np.sum(partners**2, axis=(1, 2)), 1e-12))


def measure_recall(thumbs, *, threshold=NEAR_COPY):
    """Measures what the approximate search, which large data sets need, finds of the exact search's result.

    Args:
      thumbs: float32 [n, d], of `thumbnails`.
      threshold: correlation from which a pair counts.

    Returns:
      The share of the near pairs that it finds, and the share of the images with a near partner for which it finds one;
      nan where there is none.
    """
    exact = _search_exactly(thumbs, None, threshold, None).pairs
    found = _search_approximately(thumbs, None, threshold, None).pairs
    shares = []
    for of_pairs in (
        lambda pairs: set(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)),
        lambda pairs: set(pairs.first.tolist()) | set(pairs.second.tolist()),
    ):
        wanted = of_pairs(exact)
        shares.append(len(wanted & of_pairs(found)) / len(wanted) if wanted else math.nan)
    return tuple(shares)


def _nothing_found(num_queries):
    """Returns `Matches` without a partner, and correlations of zero, to be filled in."""
    matches = Matches(
        np.full(num_queries, -1, np.int32), np.zeros(num_queries, np.float32), np.zeros(num_queries, np.int8)
    )
    return matches, np.zeros(num_queries, np.float32)


def _search_exactly(queries, references, threshold, progress):
    """Compares every query with every reference, a block at a time."""
    within = references is None
    references = _split_parities(queries if within else references)
    matches, unturned = _nothing_found(len(queries))
    pairs, starts = [], range(0, references.shape[1], _BLOCK)
    blocks = [(r, [c for c in starts if c >= r or not within]) for r in range(0, len(queries), _BLOCK)]
    with _bar(progress, sum(len(columns) for _, columns in blocks)) as bar:
        for r, columns in blocks:
            rows = slice(r, r + _BLOCK)
            turned = _split_parities(queries[rows]), _split_parities(queries[rows], transpose=True)
            for c in columns:
                block = slice(c, c + _BLOCK)
                correlation, orientation, same = _correlate(*turned, references[:, block])
                if within and r == c:
                    np.fill_diagonal(correlation, 0)
                    np.fill_diagonal(same, 0)
                _keep_best(matches, unturned, rows, c, correlation, orientation, same)
                if within and r != c:  # the same pairs from the other side
                    _keep_best(matches, unturned, block, r, correlation.T, INVERSE[orientation].T, same.T)
                i, j = np.nonzero(correlation >= threshold)
                if within and r == c:
                    i, j = i[i < j], j[i < j]
                pairs.append((np.int32(r + i), np.int32(c + j), correlation[i, j], orientation[i, j]))
                bar.update()
    return Found(_clip(matches), np.minimum(unturned, 1), _clip(join_pairs(*pairs)))


def _split_parities(thumbs, transpose=False):
    """Splits thumbnails into four parts, even and odd under mirroring left to right and top to bottom.

    A mirror image differs in the signs of these parts alone. So the products of the parts, a quarter of the work each,
    give the correlations in four orientations at once, and those with the transposed image give the other four.

    Returns:
      float32 [4, n, d / 4]; the sum of the products of two images' parts is the product of the images.
    """
    side = math.isqrt(thumbs.shape[1])
    square = thumbs.reshape(-1, side, side)
    square = square.swapaxes(1, 2) if transpose else square
    left, right = square[..., : side // 2], square[..., : side // 2 - 1 : -1]
    parts = []
    for columns in (left + right, left - right):
        top, bottom = columns[:, : side // 2], columns[:, : side // 2 - 1 : -1]
        parts.append(((top + bottom) / 2, (top - bottom) / 2))
    # In this order the signs are the rows of a Hadamard matrix.
    return np.stack([parts[0][0], parts[1][0], parts[0][1], parts[1][1]]).reshape(4, len(thumbs), -1)


def _correlate(queries, transposed, references):
    """Returns best correlation float32, orientation int8 and unturned correlation float32, [rows, columns] each."""
    signs = linalg.hadamard(4).astype(np.float32)  # of: no mirroring, left to right, top to bottom, both
    plain = np.tensordot(signs, np.matmul(queries, references.swapaxes(1, 2)), 1)
    turned = np.tensordot(signs, np.matmul(transposed, references.swapaxes(1, 2)), 1)
    correlation, orientation = plain[0].copy(), np.zeros(plain[0].shape, np.int8)
    for i, other in zip((4, 6, 2, 5, 3, 1, 7), (*plain[1:], *turned), strict=True):
        better = other > correlation + _TIE
        np.copyto(correlation, other, where=better)
        np.copyto(orientation, np.int8(i), where=better)
    return correlation, orientation, plain[0]


def _keep_best(matches, unturned, rows, first_column, correlation, orientation, same):
    """Updates the best partners of `rows`, a slice, with their correlations with some more references."""
    columns = correlation.argmax(axis=1)[:, None]
    value = np.take_along_axis(correlation, columns, 1)[:, 0]
    better = value > matches.correlation[rows]
    matches.correlation[rows][better] = value[better]
    matches.reference[rows][better] = first_column + columns[better, 0]
    matches.orientation[rows][better] = np.take_along_axis(orientation, columns, 1)[better, 0]
    np.maximum(unturned[rows], same.max(axis=1), out=unturned[rows])


def join_pairs(*parts):
    """Returns `Pairs` of several, or of tuples like them."""
    empty = Pairs(np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.float32), np.empty(0, np.int8))
    columns = zip(empty, *parts, strict=True)
    return Pairs(*(np.concatenate(column, dtype=column[0].dtype, casting='same_kind') for column in columns))


def _clip(found):
    """Takes off what rounding adds to correlations of 1."""
    return found._replace(correlation=np.minimum(found.correlation, np.float32(1)))


def _bar(description, num_blocks):
    """Returns a progress bar, shown on a terminal only."""
    hidden = True if description is None else None
    return tqdm.tqdm(None, description, num_blocks, unit=' blocks', leave=False, disable=hidden)


def _search_approximately(queries, references, threshold, progress):
    """Compares every query with the references that an index over smaller thumbnails proposes."""
    if importlib.util.find_spec('faiss') is None:
        raise InputError(
            f'more than {_MAX_EXACT:,} images are compared with the help of FAISS, which is not installed: '
            "pip install 'brain-jax[faiss]'"
        )
    import faiss  # optional

    within = references is None
    references = queries if within else references
    proposals = _shrink(references)
    index = faiss.index_factory(
        proposals.shape[1], f'IVF{max(len(references) // 100, 1)},Flat', faiss.METRIC_INNER_PRODUCT
    )
    index.train(proposals)
    index.add(proposals)
    index.nprobe = 16
    matches, unturned = _nothing_found(len(queries))
    pairs, step = [], 128
    with _bar(progress, -(-len(queries) // step)) as bar:
        for r in range(0, len(queries), step):
            rows = slice(r, r + step)
            columns, correlation = _propose(index, queries[rows], references)
            if within:
                correlation[columns == np.arange(r, r + len(columns))[:, None]] = 0
            best = np.round(correlation, 5).argmax(axis=1)[:, None]  # of equal ones, the first orientation
            value = np.maximum(np.take_along_axis(correlation, best, 1)[:, 0], 0)
            matches.correlation[rows] = value
            matches.reference[rows] = np.where(value > 0, np.take_along_axis(columns, best, 1)[:, 0], -1)
            matches.orientation[rows] = np.where(value > 0, best[:, 0] // _CANDIDATES, 0)
            unturned[rows] = np.maximum(correlation[:, :_CANDIDATES].max(axis=1), 0)
            i, j = np.nonzero(correlation >= threshold)
            pairs.append((r + i, columns[i, j], correlation[i, j], j // _CANDIDATES))
            bar.update()
    pairs = _unique(join_pairs(*pairs), within)
    return Found(_clip(matches), np.minimum(unturned, 1), _clip(pairs))


def _propose(index, queries, references):
    """Returns candidates int64 [b, 8 * candidates], orientation by orientation, and their true correlations."""
    columns, correlations = [], []
    side = math.isqrt(queries.shape[1])
    for orientation in range(len(ORIENTATIONS)):
        turned = turn(queries.reshape(-1, side, side), orientation).reshape(queries.shape)
        _, found = index.search(_shrink(turned), _CANDIDATES)
        correlation = np.matmul(references[found], turned[:, :, None])[..., 0]
        columns.append(found)
        correlations.append(np.where(found >= 0, correlation, 0))  # fewer may be proposed than asked for
    return np.concatenate(columns, axis=1), np.concatenate(correlations, axis=1)


def _shrink(thumbs):
    """Returns thumbnails of a quarter of the side, float32 [n, d / 16], of norm one."""
    side = math.isqrt(thumbs.shape[1])
    small = thumbs.reshape(-1, side // 4, 4, side // 4, 4).mean(axis=(2, 4)).reshape(len(thumbs), -1)
    return np.ascontiguousarray(preprocessing.normalize(small))


def _unique(pairs, within):
    """Keeps each pair once, in its best orientation, and within one set with the lower index first."""
    first, second, correlation, orientation = pairs
    if within:
        swap = first > second
        orientation = np.where(swap, INVERSE[orientation], orientation)
        first, second = np.where(swap, second, first), np.where(swap, first, second)
    order = np.lexsort((orientation, -np.round(correlation, 5), second, first))
    _, kept = np.unique(np.stack([first, second])[:, order], axis=1, return_index=True)
    return Pairs(*(column[order[kept]] for column in (first, second, correlation, orientation)))


def copy_groups(file_names, thumbs, pixels, *, threshold=NEAR_COPY):
    """Groups images that are copies of one another, also where it is through other images.

    Args:
      file_names: str [n].
      thumbs: float32 [n, d], of `thumbnails`.
      pixels: str [n], equal where the decoded images are.
      threshold: correlation from which a pair counts as copies.

    Returns:
      str [n], the name of each image's group, after the first file of it.

    Raises:
      InputError: for more than 20,000 images where FAISS is not installed.
    """
    found = search(thumbs, threshold=threshold)
    pairs = join_pairs(found.pairs, aligned_pairs(thumbs, found.matches, threshold=threshold))
    return groups.find_groups(file_names, [''] * len(file_names), pixels, connect(len(file_names), pairs))


def connect(size, pairs):
    """Numbers the connected components that near pairs form.

    Args:
      size: number of images.
      pairs: `Pairs` of them.

    Returns:
      str [size], equal for images that are connected.
    """
    graph = sparse.coo_array((np.ones(len(pairs.first)), (pairs.first, pairs.second)), shape=(size, size))
    return sparse.csgraph.connected_components(graph, directed=False)[1].astype(str)


def nearest_pixels(train_images, train_labels, test_images, size=32):
    """Classifies images by their nearest neighbour on tiny pixels: what can be had without any learning.

    Args:
      train_images: uint8 [n, height, width] array, or a sequence of uint8 [height, width] arrays.
      train_labels: [n].
      test_images: like train_images, m of them.
      size: side in pixels to which the images are padded and resized.

    Returns:
      The label of each test image's neighbour, [m].
    """
    classifier = neighbors.KNeighborsClassifier(1).fit(_tiny_pixels(train_images, size), train_labels)
    return classifier.predict(_tiny_pixels(test_images, size))


def _tiny_pixels(pictures, size):
    """Returns float32 [n, size * size] grey values."""
    return np.stack([images.pad_and_resize(picture, size).ravel() for picture in pictures]).astype(np.float32)
