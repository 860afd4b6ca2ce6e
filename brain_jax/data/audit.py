"""The audit of a folder of images: how much its test images are known from its training images."""

import collections
import concurrent.futures
import hashlib
import os
import typing

import numpy as np
import tqdm
from scipy import sparse

from brain_jax import InputError
from brain_jax.data import brain_tumor_mri, groups, images, leakage, reference, shortcuts

SAME_SLICE = 0.999  # correlation from which an image counts as one of a reference set
SWEEP = (0.90, 0.95, 0.98, 0.99, 0.995, 0.999)  # correlations at which copies are counted
LARGE_GROUP = 0.05  # share of all images that no group should exceed
_EXAMPLES = 10  # that a warning lists
SHORTCUT = 0.2  # part of the way from the majority's accuracy to 1 at which a probe scores too well


class _Search(typing.NamedTuple):
    """What was found of a search: as `leakage.Found` has it, and the pairs that are copies only when aligned."""

    matches: leakage.Matches
    unturned: np.ndarray
    pairs: leakage.Pairs
    aligned: leakage.Pairs


class _Pictures(typing.NamedTuple):
    """All images of a folder, Training first; the arrays are [n]."""

    class_names: tuple[str, ...]
    file_names: np.ndarray
    labels: np.ndarray
    is_test: np.ndarray
    sha256: np.ndarray
    pixels: np.ndarray
    thumbs: np.ndarray
    features: list[dict]


class _Patients(typing.NamedTuple):
    """What a table and a reference set tell of each image, str [n] each, '' where nothing."""

    groups: np.ndarray
    tabled: np.ndarray
    traced: np.ndarray
    source_labels: np.ndarray

    @property
    def ids(self):
        """The patients: those of the table, else of the reference set."""
        return np.where(self.tabled != '', self.tabled, self.traced)


def audit(
    data_dir,
    *,
    threshold=leakage.NEAR_COPY,
    reference_dir=None,
    reference_threshold=SAME_SLICE,
    table=None,
    skip_unreadable=False,
):
    """Finds what leaks in a folder of images.

    Args:
      data_dir: folder with Training/ and Testing/ (or train/ and test/), each with one folder of images a class.
      threshold: correlation from which images count as copies, in the lists and for the groups.
      reference_dir: a set of images whose patients are known, see `reference.read_reference`; None: none.
      reference_threshold: correlation from which an image counts as one of the reference set.
      table: a CSV file of groups or patients, see `groups.read_table`; None: none.
      skip_unreadable: leave unreadable files out instead of stopping.

    Returns:
      A dict of numbers, strings, lists and dicts, ready for JSON. The counts of `across` are test images that have such
      a partner in Training; those of `within_training` and `within_testing` are images that have one in their own
      folder. None stands for what cannot be known. `files` has a dict for each image: path, group, patient_id and
      source_label.

    Raises:
      InputError: for an unusable folder, table or reference set, or unreadable files.
    """
    folder = brain_tumor_mri.read_folder(data_dir)
    rows = groups.read_table(table) if table else {}
    known, unreadable = (
        reference.read_reference(reference_dir, skip_unreadable=skip_unreadable) if reference_dir else (None, [])
    )
    pictures = _read_pictures(folder, skip_unreadable, unreadable)
    patients = _find_patients(pictures, rows, known, reference_threshold)
    num_train = int(np.sum(~pictures.is_test))
    train, test = pictures.thumbs[:num_train], pictures.thumbs[num_train:]
    searches = {
        'across': _search(test, train, threshold, 'Comparing test with training images'),
        'within_training': _search(train, None, threshold, 'Comparing the training images'),
        'within_testing': _search(test, None, threshold, 'Comparing the test images'),
    }
    pairs = _pool(searches, num_train)
    joined = _join(pictures, patients, pairs)
    standard, grouped = shortcuts.score_probes(pictures.features, pictures.labels, pictures.is_test, joined)
    report = {
        'data_dir': str(folder.path),
        'class_names': list(folder.class_names),
        'threshold': threshold,
        'unreadable': unreadable,
        **_count_partners(pictures, patients, searches, threshold),
        'groups': _describe_groups(pictures, patients, pairs, joined),
        'patients': _describe_patients(pictures, patients, rows),
        'probes': standard,
        'probes_grouped': grouped,
        'copies': _list_copies(pictures, searches['across'], threshold),
        'different_labels': _list_different_labels(pictures, pairs),
    }
    columns = ('path', 'group', 'patient_id', 'source_label')
    files = zip(pictures.file_names, joined, patients.ids, patients.source_labels, strict=True)
    for name in searches:
        report[name]['different_labels'] = sum(pair['section'] == name for pair in report['different_labels'])
    return report | {
        'warnings': [
            {'what': what, 'advice': advice, 'examples': examples[:_EXAMPLES]}
            for what, advice, examples in _find_warnings(report)
        ],
        'files': [dict(zip(columns, map(str, row), strict=True)) for row in files],
    }


def _search(queries, references, threshold, progress):
    """Returns a `_Search` among thumbnails."""
    found = leakage.search(queries, references, threshold=threshold, progress=progress)
    return _Search(*found, leakage.aligned_pairs(queries, found.matches, references, threshold=threshold))


def _read_pictures(folder, skip_unreadable, unreadable):
    """Reads every image of a folder once; adds what cannot be read to the list `unreadable`."""

    def read(name):
        try:
            data = images.read_file(folder.path / name)
            image = images.decode_image(data, name=folder.path / name)
        except InputError as error:
            return str(error)
        pixels = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
        features = shortcuts.measure_features(data, image)
        return hashlib.sha256(data).hexdigest(), pixels, images.pad_and_resize(image, 64), features

    files = [(name, label, split == 'test') for split in ('train', 'test') for name, label in folder.files[split]]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(read, [name for name, _, _ in files])
        found = list(tqdm.tqdm(found, 'Reading the images', len(files), unit=' images', leave=False, disable=None))
    failed = [result for result in found if isinstance(result, str)]
    if failed and not skip_unreadable:
        raise InputError(
            f'cannot read {len(failed):,} of {len(files):,} image files (mend or remove them, or set '
            '--skip_unreadable):' + ('\n  ' if len(failed) > 1 else ' ').join(['', *failed])
        )
    unreadable += failed
    kept = [(*file, *result) for file, result in zip(files, found, strict=True) if not isinstance(result, str)]
    if len({is_test for _, _, is_test, *_ in kept}) < 2:
        raise InputError(f'{folder.path}: in one of the two folders no image can be read')
    names, labels, is_test, sha256, pixels, squares, features = zip(*kept, strict=True)
    columns = (np.array(column) for column in (names, labels, is_test, sha256, pixels))
    return _Pictures(folder.class_names, *columns, leakage.thumbnails(squares), list(features))


def _find_patients(pictures, rows, known, reference_threshold):
    """Returns `_Patients` from the rows of a table and from a `Reference` or None."""
    if rows and not rows.keys() & set(pictures.file_names.tolist()):
        raise InputError(f'the group table names none of the images: its paths must look like {pictures.file_names[0]}')
    tabled = [rows.get(name, groups.GroupRow('', '', '')) for name in pictures.file_names]
    group, patient, label = (np.array(column) for column in zip(*tabled, strict=True))
    if known is None:
        return _Patients(group, patient, np.full(len(tabled), ''), label)
    matches = leakage.best_matches(
        pictures.thumbs, leakage.thumbnails(known.images), progress='Comparing with the reference'
    )
    is_traced = (matches.reference >= 0) & (matches.correlation >= reference_threshold)
    traced = np.where(is_traced, np.array([groups.known(value) for value in known.patients])[matches.reference], '')
    sources = np.where(is_traced, known.class_names[matches.reference], '')
    return _Patients(group, patient, traced, np.where(label == '', sources, label))


def _pool(searches, num_train):
    """Returns all pairs of copies, with indices into all images, the lower one first."""
    parts = []
    for name, search in searches.items():
        for pairs in (search.pairs, search.aligned):
            first, second, correlation, orientation = pairs
            if name == 'across':
                first, second, orientation = second, first + num_train, leakage.INVERSE[orientation]
            elif name == 'within_testing':
                first, second = first + num_train, second + num_train
            parts.append((first, second, correlation, orientation))
    return leakage.join_pairs(*parts)


def _join(pictures, patients, pairs):
    """Returns the group of each image, str [n]: what is connected by patients, by the table's groups and by copies."""
    names = np.char.add(np.where(patients.ids == '', '', 'patient '), patients.ids)
    names = np.where(patients.groups == '', names, patients.groups)
    copies = leakage.connect(len(pictures.labels), pairs)
    return groups.find_groups(pictures.file_names, names, patients.tabled, patients.traced, pictures.pixels, copies)


def _count_partners(pictures, patients, searches, threshold):
    """Counts the images that have a partner, across the folders and within each."""
    test = pictures.is_test
    sides = {'across': (test, ~test), 'within_training': (~test, None), 'within_testing': (test, None)}
    thresholds = sorted({*SWEEP, threshold})
    sections = {}
    for name, (side, other) in sides.items():
        found = searches[name]
        same_bytes, same_pixels, same_patient = (
            _shared(column[side], None if other is None else column[other])
            for column in (pictures.sha256, pictures.pixels, patients.ids)
        )
        aligned = np.full(len(same_pixels), False)
        aligned[found.aligned.first] = True
        if other is None:
            aligned[found.aligned.second] = True
        near = {f'{t:g}': (found.matches.correlation >= t) | same_pixels for t in thresholds}
        counted = {
            'images': np.full(len(same_bytes), True),
            'byte_identical': same_bytes,
            'pixel_identical': same_pixels,
            'near': near,
            'near_unturned': {f'{t:g}': (found.unturned >= t) | same_pixels for t in thresholds},
            'aligned': aligned & ~near[f'{threshold:g}'],
            'copied': aligned | near[f'{threshold:g}'],
            'same_patient': same_patient,
            'neither': ~aligned & ~near[f'{threshold:g}'] & ~same_patient,
        }
        labels, known = pictures.labels[side], patients.ids[side] != ''
        sections[name] = _sum(counted, known, np.full(len(labels), True))
        sections[name]['by_class'] = {
            class_name: _sum(counted, known, labels == label) for label, class_name in enumerate(pictures.class_names)
        }
    return sections


def _shared(values, others):
    """Says of each value whether it is among others too, or where others is None, whether it is there twice."""
    if others is not None:
        return np.isin(values, others) & (values != '')
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts[inverse] > 1) & (values != '')


def _sum(counted, known, rows):
    """Returns how many of some rows each of several bool arrays, or dicts of them, counts."""

    def count(value):
        if isinstance(value, dict):
            return {key: count(part) for key, part in value.items()}
        return int(value[rows].sum())

    return count(counted) | ({} if known[rows].any() else {'same_patient': None})


def _describe_groups(pictures, patients, pairs, joined):
    """Returns the number of groups, of those in both folders, the size of the largest and what holds it together."""
    names, inverse, sizes = np.unique(joined, return_inverse=True, return_counts=True)
    largest = int(sizes.argmax())
    across = np.intersect1d(inverse[pictures.is_test], inverse[~pictures.is_test])
    description = {
        'count': len(names),
        'across': len(across),
        'test_images_across': int(np.isin(inverse[pictures.is_test], across).sum()),
        'largest': int(sizes[largest]),
        'largest_name': str(names[largest]),
        'largest_share': float(sizes[largest] / len(joined)),
        'largest_link': None,
    }
    if description['largest_share'] > LARGE_GROUP:
        keys = {
            'group': patients.groups,
            'patient': patients.tabled,
            'traced patient': patients.traced,
            'pixels': pictures.pixels,
        }
        members = np.flatnonzero(inverse == largest)
        description['largest_link'] = _describe_links(pictures.file_names, members, pairs, keys)
    return description


def _describe_links(file_names, members, pairs, keys):
    """Says what holds a group together: the key that most of its images share, and the pair that joins its halves.

    That is the pair of the maximum spanning tree whose cut leaves the largest smaller part. It is the best pair between
    the two parts: above its correlation, copies join them no more.
    """
    keyed = [(i, (kind, str(column[i]))) for kind, column in keys.items() for i in members if column[i]]
    (kind, key), count = collections.Counter(key for _, key in keyed).most_common(1)[0]
    links = {'shared': kind, 'name': key, 'images': count, 'pair': None, 'parts': None}

    position = np.full(len(file_names), -1)
    position[members] = np.arange(len(members))
    inside = position[pairs.first] >= 0
    first, second, correlation, orientation = (column[inside] for column in pairs)
    hubs = {key: len(members) + i for i, key in enumerate(dict.fromkeys(key for _, key in keyed))}
    rows = np.concatenate([position[first], [position[i] for i, _ in keyed]])
    columns = np.concatenate([position[second], [hubs[key] for _, key in keyed]])
    # Not quite 0, which would be no edge.
    distances = np.concatenate([1.001 - correlation, np.full(len(keyed), 1e-6)])
    size = len(members) + len(hubs)
    graph = sparse.coo_array((distances, (rows, columns)), shape=(size, size)).tocsr()
    spanning = sparse.csgraph.minimum_spanning_tree(graph)
    order, parents = sparse.csgraph.breadth_first_order(spanning, 0, directed=False)

    below = (np.arange(size) < len(members)).astype(int)  # images at and below each node of the tree
    for node in order[:0:-1]:
        below[parents[node]] += below[node]
    ends = order[1:][np.maximum(order[1:], parents[order[1:]]) < len(members)]  # of the edges that are pairs
    if len(ends):
        smaller = np.minimum(below[ends], len(members) - below[ends])
        node = ends[smaller.argmax()]
        i, j = sorted(members[[node, parents[node]]])
        (k,) = np.flatnonzero((first == i) & (second == j))
        links['pair'] = _describe_pair(file_names, i, j, correlation[k], orientation[k])
        links['parts'] = [int(len(members) - smaller.max()), int(smaller.max())]
    return links


def _describe_pair(file_names, first, second, correlation, orientation):
    """Returns a pair of images as a dict."""
    return {
        'first': str(file_names[first]),
        'second': str(file_names[second]),
        'correlation': round(float(correlation), 5),
        'orientation': leakage.ORIENTATIONS[orientation],
    }


def _describe_patients(pictures, patients, rows):
    """Returns how many patients are known, and what does not fit together."""
    class_names = np.array(pictures.class_names)[pictures.labels]
    classes = {}
    for patient, class_name in zip(patients.ids.tolist(), class_names.tolist(), strict=True):
        if patient:
            classes.setdefault(patient, collections.Counter())[class_name] += 1
    # Classes that are called otherwise than the folders say nothing.
    sources = patients.source_labels
    wrong = (sources != '') & (sources != class_names) & np.isin(sources, pictures.class_names).any()
    return {
        'count': len(classes),
        'images': int(np.sum(patients.ids != '')),
        'traced': int(np.sum(patients.traced != '')),
        'table_rows': len(rows),
        'unknown_paths': sorted(rows.keys() - set(pictures.file_names.tolist())),
        'two_labels': [
            {'patient': patient, 'classes': dict(sorted(counter.items()))}
            for patient, counter in sorted(classes.items())
            if len(counter) > 1
        ],
        'mislabelled': [
            {'path': str(pictures.file_names[i]), 'label': str(class_names[i]), 'source_label': str(sources[i])}
            for i in np.flatnonzero(wrong)
        ],
    }


def _list_copies(pictures, search, threshold):
    """Lists the best copy in Training of each test image that has one."""
    num_train = int(np.sum(~pictures.is_test))
    first_of = {pixels: i for i, pixels in reversed(list(enumerate(pictures.pixels[:num_train])))}
    best = {i: pair for i, *pair in zip(*search.aligned, strict=True)}
    best |= {i: pair for i, pair in enumerate(zip(*search.matches, strict=True)) if pair[1] >= threshold}
    best |= {i: (first_of[key], 1, 0) for i, key in enumerate(pictures.pixels[num_train:]) if key in first_of}
    aligned = set(search.aligned.first.tolist())
    copies = []
    for i, (j, correlation, orientation) in sorted(best.items()):
        pair = _describe_pair(pictures.file_names, j, num_train + i, correlation, orientation)
        kind = {'identical': pictures.pixels[num_train + i] in first_of, 'aligned': i in aligned}
        copies.append({'training': pair.pop('first'), 'test': pair.pop('second'), **pair, **kind})
    return copies


def _list_different_labels(pictures, pairs):
    """Lists the copies that lie in folders of different classes; of equal pixels each with the first of them."""
    names, labels = pictures.file_names, pictures.labels
    _, first_of, inverse = np.unique(pictures.pixels, return_index=True, return_inverse=True)
    first_of = first_of[inverse]
    identical = [(first, i, 1, 0) for i, first in enumerate(first_of) if labels[i] != labels[first]]
    differ = (labels[pairs.first] != labels[pairs.second]) & (first_of[pairs.first] != first_of[pairs.second])
    near = sorted(zip(*(column[differ] for column in pairs), strict=True), key=lambda pair: -pair[2])
    sections = {0: 'within_training', 1: 'across', 2: 'within_testing'}
    return [
        _describe_pair(names, *pair)
        | {'identical': listed is identical, 'section': sections[int(pictures.is_test[[*pair[:2]]].sum())]}
        for listed in (identical, near)
        for pair in listed
    ]


def _find_warnings(report):
    """Yields (what was found, what to do, examples) for all that should worry."""
    across, patients = report['across'], report['patients']
    total = across['images']
    split = 'Do not quote the score on this test folder alone: split by group, with groups.csv as config.groups.'
    if copied := across['copied']:
        yield f'{copied:,} of {total:,} test images ({_percent(copied / total)}) have a copy in Training.', split, []
    if seen := across['same_patient']:
        share = _percent(seen / total)
        yield f'{seen:,} of {total:,} test images ({share}) are of a patient who is in Training too.', split, []
    if not patients['count']:
        yield (
            'No patient is known: images of one patient may lie in both folders.',
            'Give a table with --groups, or a set whose patients are known with --reference.',
            [],
        )
    lists = (
        (
            [f'{pair["first"]} and {pair["second"]}' for pair in report['different_labels']],
            'Pairs of copies in folders of different classes',
            'One label of each is wrong: look at them, then mend or remove them.',
        ),
        (
            [f'{row["path"]} ({row["source_label"]} there)' for row in patients['mislabelled']],
            'Images of another class than their source',
            'Look at them, then mend or remove them.',
        ),
        (
            [f'{row["patient"]} ({", ".join(row["classes"])})' for row in patients['two_labels']],
            'Patients with images of more than one class',
            'Look whether labels and patient ids are right.',
        ),
        (
            patients['unknown_paths'],
            f'Paths of the table, of {patients["table_rows"]:,}, that are not in the data',
            'Check that the table belongs to this version of the data.',
        ),
        (report['unreadable'], 'Unreadable files that were left out', 'Mend or remove them.'),
    )
    for examples, what, advice in lists:
        if examples:
            yield f'{what}: {len(examples):,}.', advice, examples
    if report['groups']['largest_link']:
        yield _warn_of_group(report['groups'])
    yield from _find_shortcuts(report['probes'], report['probes_grouped'])


def _warn_of_group(found):
    """Returns a warning of a large group, with what holds it together."""
    link, pair = found['largest_link'], found['largest_link']['pair']
    shared = 'The same pixels' if link['shared'] == 'pixels' else f'The {link["shared"]} {link["name"]}'
    examples = [f'{shared} joins {link["images"]:,} of them']
    if pair:
        examples.append(
            f'{pair["first"]} and {pair["second"]} (correlation {pair["correlation"]:.3f}, {pair["orientation"]}) join '
            f'a part of {link["parts"][0]:,} images to one of {link["parts"][1]:,}'
        )
    return (
        f'One group, {found["largest_name"]}, holds {found["largest"]:,} images, {_percent(found["largest_share"])} of '
        'all.',
        'Look at what joins it: a wrong link joins what does not belong together. A higher --threshold, or a mended '
        'table, takes it away.',
        examples,
    )


def _find_shortcuts(standard, grouped):
    """Yields a warning for each probe that scores well above the majority."""
    for name, probe in shortcuts.PROBES.items():
        told = []
        for scores, where in ((standard, 'on Testing'), (grouped, 'across grouped folds')):
            if scores and scores[name] - scores['majority'] > SHORTCUT * (1 - scores['majority']):
                told.append(f'{_percent(scores[name])} {where} (majority {_percent(scores["majority"])})')
        if told:
            yield f'A shortcut tells the class: {probe.title}, {" and ".join(told)}.', probe.advice, []


def _percent(share):
    """Returns a share as text."""
    return f'{100 * share:.1f} %'
