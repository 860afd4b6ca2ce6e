"""Images that a brain-MRI classifier was not made for, to find out whether it notices.

They come from packages that ship pictures (scikit-image, scikit-learn, pydicom), from a random generator, and from the
run's own images, turned or inverted.
"""

import pathlib

import numpy as np
import skimage
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pydicom import data as dicom_data
from sklearn import datasets, metrics, neighbors

from brain_jax import InputError
from brain_jax.data import images, phantom, scans

PHOTOGRAPHS = ('astronaut.png', 'camera.png', 'chelsea.png', 'coffee.png', 'motorcycle_left.png', 'rocket.jpg')
TEXTURES = ('brick.png', 'grass.png', 'gravel.png')
OTHER_MEDICINE = ('cell.png', 'ihc.png', 'retina.jpg')
SIZE = 224  # pixels a side of what is drawn here
CROPS = 20  # of each photograph


def make_sets(pictures, *, seed=0):
    """Makes sets of images that no run learned from.

    Args:
      pictures: list of uint8 [height, width] images of the kind that the run is made for.
      seed: of the generator.

    Returns:
      {name: list of uint8 [height, width]}.
    """
    rng = np.random.default_rng(seed)
    folder = pathlib.Path(skimage.data_dir)
    photographs = [images.read_image(folder / name) for name in PHOTOGRAPHS]
    photographs += [
        images.decode_image(pathlib.Path(path).read_bytes()) for path in datasets.load_sample_images().filenames
    ]
    medicine = [images.read_image(folder / name) for name in OTHER_MEDICINE]
    return {
        'photographs': _crop(rng, photographs),
        'textures': _crop(rng, [images.read_image(folder / name) for name in TEXTURES]),
        'faces': _faces(folder),
        'text': [_page(rng) for _ in range(60)] + _crop(rng, [images.read_image(folder / 'page.png')]),
        'noise': [_noise(rng, blur) for blur in (0, 1, 4, 16) for _ in range(25)],
        'blank': _blank(),
        'microscopy and retina': _crop(rng, medicine),
        'other DICOM': _dicom(),
        'generated heads': [phantom.draw_head(rng, name, SIZE)[0] for name in phantom.CLASS_NAMES for _ in range(25)],
        'turned by 90 degrees': [np.rot90(picture) for picture in pictures],
        'upside down': [picture[::-1] for picture in pictures],
        'inverted': [255 - picture for picture in pictures],
        'blurred': [_blur(picture, 0.04) for picture in pictures],
        'cropped to an eighth': [_corner(rng, picture) for picture in pictures],
    }


def _crop(rng, pictures):
    """Returns squares of random size and place from each picture."""
    crops = []
    for picture in pictures:
        for _ in range(CROPS):
            side = rng.integers(min(picture.shape) // 3, min(picture.shape) + 1)
            top, left = (rng.integers(length - side + 1) for length in picture.shape)
            crops.append(picture[top : top + side, left : left + side])
    return crops


def _faces(folder):
    """Returns a hundred faces, 25 pixels a side in the file, as large as other images."""
    faces = np.round(255 * np.load(folder / 'lfw_subset.npy')[:100]).astype(np.uint8)
    return [np.asarray(Image.fromarray(face).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for face in faces]


def _page(rng):
    """Draws a page of random words, black on white or white on black."""
    paper, ink = rng.permutation((0, 255)).tolist()
    page = Image.new('L', (SIZE, SIZE), paper)
    font = ImageFont.load_default(int(rng.integers(9, 24)))
    letters = rng.choice(list('abcdefghiklmnoprstuvw     '), (40, 40))
    ImageDraw.Draw(page).multiline_text((8, 8), '\n'.join(''.join(line) for line in letters), ink, font=font)
    return np.asarray(page)


def _noise(rng, blur):
    """Draws normal noise, blurred by so many pixels and stretched to the full range."""
    noise = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE), np.uint8)).filter(ImageFilter.GaussianBlur(blur))
    noise = np.asarray(noise, np.float32)
    return np.uint8(255 * (noise - noise.min()) / np.ptp(noise))


def _blank():
    """Draws even greys and slopes."""
    slope = np.tile(np.linspace(0, 255, SIZE).astype(np.uint8), (SIZE, 1))
    greys = [np.full((SIZE, SIZE), value, np.uint8) for value in range(0, 256, 5)]
    return greys + [np.rot90(slope, turns) for turns in range(4)]


def _dicom():
    """Returns the images among pydicom's own test files: computed tomography, ultrasound, drawings, dose maps."""
    folder = pathlib.Path(dicom_data.__file__).parent / 'test_files'
    found = []
    for path in sorted(folder.glob('*.dcm')):
        try:
            slices = scans.read_slices(path, slices='middle')
        except InputError:  # no image, or damaged on purpose
            continue
        found += [pixels for _, pixels in slices]
    return found


def _blur(picture, share):
    """Blurs by a share of the longer side."""
    blurred = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(share * max(picture.shape)))
    return np.asarray(blurred)


def _corner(rng, picture):
    """Returns a random rectangle of an eighth of the area."""
    sides = [max(1, int(length / np.sqrt(8))) for length in picture.shape]
    top, left = (rng.integers(length - side + 1) for length, side in zip(picture.shape, sides, strict=True))
    return picture[top : top + sides[0], left : left + sides[1]]


def nearest_distances(train_pooled, pooled, k=10):
    """Returns the distances to the k-th nearest training image, of normalised features (Sun et al., 2022): [n]."""
    bank, queries = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (train_pooled, pooled))
    return neighbors.NearestNeighbors(n_neighbors=k).fit(bank).kneighbors(queries)[0][:, -1]


def score_sets(known, strangers, threshold):
    """Scores how well distances tell sets of strangers from known images.

    Args:
      known: float [n], distances of images that the run was made for.
      strangers: {name: float [m]}, those of others.
      threshold: distance beyond which an image is taken for a stranger.

    Returns:
      {name: {n, auroc, caught}}: the area under the ROC curve, and the share beyond the threshold.
    """
    found = {}
    for name, distances in strangers.items():
        is_stranger = np.repeat((0, 1), (len(known), len(distances)))
        auroc = metrics.roc_auc_score(is_stranger, np.concatenate([known, distances]))
        found[name] = {
            'n': len(distances),
            'auroc': float(auroc),
            'caught': float(np.mean(distances > threshold)),
        }
    return found
