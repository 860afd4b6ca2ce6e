"""The tfds builder over folders of brain-MRI images, one sub-folder a class.

`prepare` reads such a folder once into ArrayRecord files and finds them again as long as nothing in the folder changed.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import pathlib
import re
import typing
import unicodedata

import tensorflow_datasets as tfds
import tqdm
from absl import logging

from brain_jax import InputError, parallel
from brain_jax.data import images

_SPLIT_FOLDERS = {'train': ('training', 'train'), 'test': ('testing', 'test')}  # compared in lower case
_TUMORS = ('glioma', 'meningioma', 'pituitary')
_KAGGLE_CLASSES = ('glioma', 'meningioma', 'notumor', 'pituitary')
_KAGGLE_COUNTS = {
    'kaggle_v1': {'train': (1321, 1339, 1595, 1457), 'test': (300, 306, 405, 300)},
    'kaggle_v2': {'train': (1400,) * 4, 'test': (400,) * 4},
}
_KAGGLE_HANDLE = 'masoudnickparvar/brain-tumor-mri-dataset'
_JUNK_FILES = ('thumbs.db', 'desktop.ini')
_LAYOUT = 'Training/ and Testing/ (or train/ and test/), each with one folder of images a class'


class ImageFolder(typing.NamedTuple):
    """What was found in a data folder.

    Attributes:
      path: pathlib.Path, the folder itself.
      class_names: the classes, sorted; a label is an index into them.
      files: 'train' and 'test' to a list of (path relative to the folder, label), sorted by path.
      fingerprint: 12 hexadecimal digits; other files, sizes, times of change or classes give others.
    """

    path: pathlib.Path
    class_names: tuple[str, ...]
    files: dict[str, list[tuple[str, int]]]
    fingerprint: str


@dataclasses.dataclass(eq=False)
class MriConfig(tfds.core.BuilderConfig):
    """A variant of the data set.

    Attributes:
      data_dir: the folder with the images; None: the tfds manual folder.
      class_names: the classes in the order of their labels; None: as the folder has them.
      skip_unreadable: leave unreadable files out instead of stopping.
    """

    data_dir: str | None = None
    class_names: tuple[str, ...] | None = _KAGGLE_CLASSES
    skip_unreadable: bool = False


class BrainTumorMri(tfds.core.GeneratorBasedBuilder):
    """Brain-MRI slices with the kind of tumour they show, as grey images of their original size."""

    VERSION = tfds.core.Version('1.0.0')
    RELEASE_NOTES: typing.ClassVar = {'1.0.0': 'First version.'}
    BUILDER_CONFIGS: typing.ClassVar = [
        MriConfig(name='kaggle_v1', description='Kaggle version 1: 5,712 training and 1,311 test images.'),
        MriConfig(name='kaggle_v2', description='Kaggle version 2: 5,600 training and 1,600 test images.'),
        MriConfig(name='folder', description=f'Any folder that holds {_LAYOUT}.', class_names=None),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        f'Unpack https://www.kaggle.com/datasets/{_KAGGLE_HANDLE}/versions/1 into brain_tumor_mri/ there. '
        f'It must hold {_LAYOUT}.'
    )

    def _info(self):
        """Describes the features."""
        config = self.builder_config
        manual_dir = pathlib.Path(self._data_dir_root, 'downloads', 'manual', self.name)
        class_names = config.class_names or read_folder(config.data_dir or manual_dir).class_names
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                'Brain-MRI slices sorted by what they show: glioma, meningioma, pituitary tumour or no tumour. '
                'Collected from several public sources and split by image, not by patient.'
            ),
            features=tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(shape=(None, None, 1), encoding_format='png'),
                    'label': tfds.features.ClassLabel(names=class_names),
                    'file_name': tfds.features.Text(),
                    'sha256': tfds.features.Text(),
                }
            ),
            supervised_keys=('image', 'label'),
            homepage=f'https://www.kaggle.com/datasets/{_KAGGLE_HANDLE}',
            citation=(
                '@misc{nickparvar_brain_tumor_mri, author = {Nickparvar, Msoud}, '
                'title = {Brain Tumor {MRI} Dataset}, year = {2021}, publisher = {Kaggle}, '
                f'url = {{https://www.kaggle.com/datasets/{_KAGGLE_HANDLE}}}}}'
            ),
            metadata=tfds.core.MetadataDict(unreadable=[]),
            disable_shuffling=True,  # the order of the files; who trains shuffles anyway
        )

    def _split_generators(self, dl_manager):
        """Returns a generator of examples for each of 'train' and 'test'."""
        config = self.builder_config
        class_names = self.info.features['label'].names
        folder = read_folder(config.data_dir or dl_manager.manual_dir / self.name, class_names=class_names)
        return {split: self._generate_examples(folder, split) for split in folder.files}

    def _generate_examples(self, folder, split):
        """Yields the readable images of a split; ends with an error that lists the others unless they are skipped."""
        unreadable, empty = [], {label for _, label in folder.files[split]}
        for key, (name, label) in enumerate(_progress(folder.files[split], f'Preparing the {split} images')):
            try:
                data = images.read_file(folder.path / name)
                image = images.decode_image(data, name=folder.path / name)
            except InputError as error:
                unreadable.append(str(error))
                continue
            empty.discard(label)
            sha256 = hashlib.sha256(data).hexdigest()
            yield key, {'image': images.encode_png(image), 'label': label, 'file_name': name, 'sha256': sha256}
        if unreadable and not self.builder_config.skip_unreadable:
            if split == 'train':  # tfds does not come to the test images any more
                unreadable += _find_unreadable(folder, 'test')
            total = sum(map(len, folder.files.values()))
            raise InputError(
                f'cannot read {len(unreadable):,} of {total:,} image files (mend or remove them, or set '
                f'--config.skip_unreadable):{_join(unreadable)}'
            )
        if empty:
            names = ', '.join(folder.class_names[label] for label in sorted(empty))
            raise InputError(f'{folder.path}: no {split} image can be read of {names}')
        self.info.metadata['unreadable'] += unreadable


def prepare(data_dir, *, dataset='auto', prepared_dir=None, skip_unreadable=False):
    """Reads a folder of images into ArrayRecord files, unless that was done before and nothing changed since.

    Args:
      data_dir: folder with Training/ and Testing/ (or train/ and test/), each with one folder of images a class; it is
        only read. None: the tfds manual folder, then a download from Kaggle.
      dataset: 'kaggle_v1' or 'kaggle_v2' (the class counts are checked), 'folder' (any classes), or 'auto': 'folder'
        with a data_dir, else 'kaggle_v1'.
      prepared_dir: where the prepared records are kept; None: the tfds folder (~/tensorflow_datasets).
      skip_unreadable: leave unreadable files out, listed in `builder.info.metadata['unreadable']`, instead of stopping.

    Returns:
      The prepared `BrainTumorMri` builder with the splits 'train' and 'test', in the order of the file names.

    Raises:
      InputError: when no such folder is found, its layout is wrong, or files in it are unreadable.
    """
    if dataset == 'auto':
        dataset = 'folder' if data_dir else 'kaggle_v1'
    if dataset == 'folder' and not data_dir:
        raise InputError(f"the data set 'folder' needs --config.data_dir, a folder that holds {_LAYOUT}")
    if dataset not in BrainTumorMri.builder_configs:
        names = ', '.join(['auto', *BrainTumorMri.builder_configs])
        raise InputError(f'unknown dataset {dataset!r}: use one of {names}')
    root = pathlib.Path(prepared_dir or tfds.core.constants.DATA_DIR).expanduser().absolute()
    counts = _KAGGLE_COUNTS.get(dataset)
    class_names = _KAGGLE_CLASSES if counts else None
    if data_dir:
        folder = read_folder(data_dir, class_names=class_names)
    else:
        folder = _find_kaggle(root / 'downloads' / 'manual' / BrainTumorMri.name, dataset)
    if counts:
        _check_counts(folder, dataset, counts)
    config = MriConfig(
        name=f'{dataset}-{folder.fingerprint}' + ('-skip' if skip_unreadable else ''),
        description=BrainTumorMri.builder_configs[dataset].description,
        data_dir=str(folder.path),
        class_names=folder.class_names,
        skip_unreadable=skip_unreadable,
    )
    builder = _prepare_once(config, root)
    if unreadable := builder.info.metadata['unreadable']:
        total = sum(split.num_examples for split in builder.info.splits.values()) + len(unreadable)
        logging.warning('left out %d of %d image files, unreadable:%s', len(unreadable), total, _join(unreadable))
    return builder


def read_folder(data_dir, *, class_names=None):
    """Finds the images and classes in a data folder.

    Hidden files and folders are not seen. 'no_tumor', 'glioma_tumor' and the like become 'notumor', 'glioma', ...

    Args:
      data_dir: the folder.
      class_names: the classes there must be; None: any.

    Returns:
      An `ImageFolder`.

    Raises:
      InputError: when the folder or a part of it is absent, empty, ambiguous or cannot be read.
    """
    path = pathlib.Path(data_dir).expanduser().absolute()
    if not path.is_dir():
        raise InputError(f'{path}: no such folder; data_dir must name one that holds {_LAYOUT}')
    try:
        found = {split: _read_split(path, names) for split, names in _SPLIT_FOLDERS.items()}
    except OSError as error:
        raise InputError(f'{error.filename}: {os.strerror(error.errno)}') from error
    classes = {split: sorted(by_class) for split, by_class in found.items()}
    for name in classes['test']:
        if name not in found['train']:
            raise InputError(f'{path}: class {name} is in the test folder but not in the training folder')
    if len(classes['train']) == 1:
        raise InputError(
            f'{path}: {classes["train"][0]} is the only class, so there is nothing to tell apart; give two or more'
        )
    if class_names and classes['train'] != sorted(class_names):
        raise InputError(
            f'{path}: the classes are {", ".join(classes["train"])}, not {", ".join(class_names)}; '
            'for a data set of your own use --config.dataset=folder'
        )
    for name in sorted(set(classes['train']) - set(classes['test'])):
        logging.warning('%s: class %s has no test images', path, name)
    files, digest = {}, hashlib.sha256(repr(classes['train']).encode())
    for split, by_class in found.items():
        entries = sorted((*entry, classes['train'].index(name)) for name in by_class for entry in by_class[name])
        digest.update(repr(entries).encode())
        files[split] = [(file, label) for file, _, _, label in entries]
    return ImageFolder(path, tuple(classes['train']), files, digest.hexdigest()[:12])


def _read_split(path, folder_names):
    """Returns class name -> list of (relative path, size, mtime_ns) for the one folder of such a name in `path`."""
    folders = [folder for folder in _visible(path) if folder.is_dir() and folder.name.lower() in folder_names]
    if not folders:
        hint = ''.join(f'; give {child} instead?' for child in _visible(path) if _looks_like_data(child))
        wanted = f'{folder_names[0].title()}/ or {folder_names[1]}/'
        raise InputError(f'{path}: there is no {wanted} in it; it must hold {_LAYOUT}{hint}')
    if len(folders) > 1:
        raise InputError(f'{path}: {" and ".join(folder.name for folder in folders)} are the same split; keep one')
    origin, by_class = {}, {}
    for class_folder in filter(pathlib.Path.is_dir, _visible(folders[0])):
        name = _class_name(class_folder.name)
        if name in origin:
            raise InputError(f'{origin[name]} and {class_folder.name}/ both mean class {name}; merge them')
        origin[name] = class_folder
        by_class[name] = [_describe(file, path) for file in _visible(class_folder) if not file.is_dir()]
        if not by_class[name]:
            inside = 'only folders, which are not searched' if any(_visible(class_folder)) else 'no images'
            raise InputError(f'{class_folder}: a class folder with {inside}; fill or remove it')
    if not by_class:
        raise InputError(f'{folders[0]}: there are no class folders in it; wanted are {_LAYOUT}')
    return by_class


def _visible(folder):
    """Lists what is in a folder by name, without hidden entries and what systems leave behind."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith('.') and p.name.lower() not in _JUNK_FILES)


def _looks_like_data(folder):
    """Says whether a folder holds a training folder."""
    return folder.is_dir() and any(child.name.lower() in _SPLIT_FOLDERS['train'] for child in _visible(folder))


def _class_name(folder_name):
    """Returns the class that a folder's name means: 'No_Tumour' -> 'notumor', 'glioma_tumor' -> 'glioma'."""
    plain = re.sub(r'[\W_]+', '', folder_name.lower()).replace('tumour', 'tumor')
    if plain == 'notumor' or plain in _TUMORS:
        return plain
    return plain.removesuffix('tumor') if plain.removesuffix('tumor') in _TUMORS else folder_name


def _describe(file, root):
    """Returns (path relative to root, size in bytes, time of change in ns)."""
    name = file.relative_to(root).as_posix()
    if any(unicodedata.category(letter) in ('Cc', 'Cs') for letter in name):  # lists of names have one a line
        raise InputError(f'{str(file)!r}: the name is not UTF-8 or has control characters; rename the file')
    stat = file.stat() if file.exists() else file.lstat()  # of a broken link itself: reading it will tell
    return name, stat.st_size, stat.st_mtime_ns


def _check_counts(folder, dataset, expected):
    """Warns with a table when a class has not as many images as the published data set."""
    rows, differs = [f'{"":8}{"class":12}{"expected":>10}{"found":>8}'], False
    for split, counts in expected.items():
        labels = [label for _, label in folder.files[split]]
        for label, (name, count) in enumerate(zip(folder.class_names, counts, strict=True)):
            found = labels.count(label)
            differs |= found != count
            mark = '' if found == count else f'  {found - count:+,}'
            rows.append(f'{split:8}{name:12}{count:10,}{found:8,}{mark}')
    if differs:
        logging.warning('%s is not %s as published:\n%s', folder.path, dataset, '\n'.join(rows))


def _find_kaggle(manual_dir, dataset):
    """Returns the `ImageFolder` of the published data set: of the manual folder, else of a download."""
    handle = f'{_KAGGLE_HANDLE}/versions/{dataset.removeprefix("kaggle_v")}'
    try:
        if manual_dir.is_dir() and _visible(manual_dir):
            return read_folder(manual_dir, class_names=_KAGGLE_CLASSES)
        import kagglehub  # optional

        return read_folder(kagglehub.dataset_download(handle), class_names=_KAGGLE_CLASSES)
    except InputError as error:
        reason = f'the data cannot be used: {error}'
    except ImportError:
        reason = f'no data: nothing is in the folder {manual_dir}, and to ask Kaggle kagglehub is not installed'
    except Exception as error:  # no network, no account, a withdrawn version: there is no common class
        reason = f'no data: nothing is in the folder {manual_dir}, and asking Kaggle failed ({_one_line(error)})'
    raise InputError(
        f'{reason}.\n'
        f'Download https://www.kaggle.com/datasets/{handle} and unpack it in {manual_dir}, or `pip install kagglehub`, '
        f'or name another folder with --config.data_dir; it must hold {_LAYOUT}.\n'
        'To try the program without data: --config configs/densenet121.py:demo'
    )


def _prepare_once(config, root):
    """Returns the prepared builder, after preparing it if need be."""
    with _quiet_tfds():
        builder = BrainTumorMri(config=config, data_dir=root)
    if builder.data_path.exists():
        logging.info('Using what was prepared before: %s', builder.data_path)
        return builder
    logging.info('Preparing %s once, in %s', config.data_dir, builder.data_path)
    with _quiet_tfds():
        try:
            builder.download_and_prepare(file_format=tfds.core.FileFormat.ARRAY_RECORD)
        except OSError as error:
            if not builder.data_path.exists():  # else another process finished the same a moment earlier
                raise InputError(
                    f'cannot write prepared data in {root} ({_one_line(error)}); name another folder with '
                    '--config.prepared_dir'
                ) from error
        return BrainTumorMri(config=config, data_dir=root)  # anew, as it reads what is on the disk


@contextlib.contextmanager
def _quiet_tfds():
    """Silences tfds: it speaks of downloads of unknown size, and its bars know no total and fill log files."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
        logging.set_verbosity(verbosity)


def _progress(files, description):
    """Wraps files in a progress bar, shown on a terminal only."""
    return tqdm.tqdm(files, desc=description, unit=' images', leave=False, disable=parallel.hides_progress())


def _find_unreadable(folder, split):
    """Returns the reason for each file of a split that is no readable image."""
    unreadable = []
    for name, _ in _progress(folder.files[split], f'Checking the {split} images'):
        try:
            images.read_image(folder.path / name)
        except InputError as error:
            unreadable.append(str(error))
    return unreadable


def _join(unreadable):
    """Returns the reasons as the end of a message: in the same line if there is one, else a line each."""
    return ('\n  ' if len(unreadable) > 1 else ' ').join(['', *unreadable])


def _one_line(error):
    """Returns an error's message without line breaks."""
    return ' '.join(str(error).split()) or type(error).__name__
