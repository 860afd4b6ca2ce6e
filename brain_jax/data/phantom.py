"""Draws MRI-like heads, for a demo and tests that need no patient data.

The images are SYNTHETIC: ellipses, waves and noise. They show no person and no disease, and a model that was trained on
them says nothing about either. The four classes carry the names of the real dataset and one feature each:

    glioma      an irregular lesion deep in the brain, with oedema, often with a dark core
    meningioma  a smooth lesion that sits on the inner edge of the skull
    pituitary   a small bright lesion at the sella, in the middle of the skull's base
    notumor     none of them

Every head has bright vessels as large as a small lesion, and pose, shape and contrast vary, so that neither the mean
brightness nor a look at single pixels tells the classes apart.

Lengths are in half heights of the head; x points to the right of the image and y down, before the head is tilted.
"""

import pathlib
import tempfile
from typing import NamedTuple

import numpy as np
from PIL import Image

from brain_jax import InputError

CLASS_NAMES = ('glioma', 'meningioma', 'notumor', 'pituitary')
NOTE = """\
The images in this folder are synthetic. brain_jax drew them from ellipses, waves and noise (brain_jax/data/phantom.py).
They show no person and no disease. Use them to try the software, never to judge a model for real images.

seed {seed}, {train} training and {test} test images a class, {size} x {size} pixels
"""


class Head(NamedTuple):
    """The geometry of one head; arrays are float64 [size, size], intensities run from 0 (black) to 1."""

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray  # 0 at the centre, 1 on the skin
    pixel: float  # side of one pixel
    inner: float  # `radius` of the skull's inner edge
    base: float  # y of the skull's base
    aspect: float  # width over height
    bumps: tuple  # of the outline, see `_bumpy`
    white: float  # intensity of white matter


def draw_head(rng, class_name, size):
    """Draws one synthetic head.

    The head, its noise and its lesion have random streams of their own: generators in the same state give the same
    head for every class, and the images differ only inside the lesion's mask.

    Args:
      rng: a `np.random.Generator`.
      class_name: one of `CLASS_NAMES`.
      size: side of the image in pixels.

    Returns:
      (image uint8 [size, size], lesion mask bool [size, size]); the mask includes oedema and is empty for 'notumor'.

    Raises:
      InputError: for another class name.
    """
    if class_name not in CLASS_NAMES:
        raise InputError(f'unknown class {class_name!r}: use one of {", ".join(CLASS_NAMES)}')
    head_rng, lesion_rng, noise_rng = rng.spawn(3)
    head = _place_head(head_rng, size)
    image = _draw_tissue(head_rng, head)
    texture = 1 + 0.05 * _waves(head_rng, head, frequency=25) + 0.03 * _waves(head_rng, head, frequency=60)
    bias = np.exp(head_rng.uniform(0.05, 0.25) * _waves(head_rng, head, frequency=1.5))
    gain, noise = head_rng.uniform(0.6, 1.1), head_rng.uniform(0.01, 0.05)

    draw_lesion = {'glioma': _glioma, 'meningioma': _meningioma, 'pituitary': _pituitary}.get(class_name)
    mask = np.zeros((size, size), bool)
    for coverage, intensity in draw_lesion(lesion_rng, head) if draw_lesion else ():
        image = _paint(image, coverage, intensity)
        mask |= coverage > 0

    image = image * texture * bias * gain
    real, imaginary = noise_rng.normal(0, noise, (2, size, size))
    image = np.hypot(image + real, imaginary)  # Rician noise, as in magnitude images
    return np.clip(np.round(255 * image), 0, 255).astype(np.uint8), mask


def make_phantom(output_dir, *, train_per_class, test_per_class, image_size=96, seed=0):
    """Writes a folder of synthetic heads, laid out like the real dataset.

    The tree is Training/<class>/*.png and Testing/<class>/*.png, with a README.txt at its root that says what the
    images are. It appears when it is complete. Equal arguments give equal files.

    Args:
      output_dir: folder to create; may exist if it is empty.
      train_per_class: number of training images of each class.
      test_per_class: number of test images of each class.
      image_size: side of the images in pixels, at least 32.
      seed: whole number from which everything is drawn.

    Raises:
      InputError: if `output_dir` is not empty, or a number is too small.
    """
    output_dir = pathlib.Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise InputError(f'{output_dir} exists and is not an empty folder: choose another, or remove it')
    if min(train_per_class, test_per_class) < 1 or image_size < 32 or seed < 0:
        raise InputError('needs at least one image a class and split, 32 pixels, and a seed that is not negative')
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent) as scratch:
        tree = pathlib.Path(scratch, 'tree')
        for split_index, (split, count) in enumerate((('Training', train_per_class), ('Testing', test_per_class))):
            for class_index, class_name in enumerate(CLASS_NAMES):
                folder = tree / split / class_name
                folder.mkdir(parents=True)
                for index in range(count):
                    rng = np.random.default_rng([seed, split_index, class_index, index])
                    image, _ = draw_head(rng, class_name, image_size)
                    Image.fromarray(image).save(folder / f'{split[:2]}-{class_name[:2]}_{index:04d}.png')
        note = NOTE.format(seed=seed, train=train_per_class, test=test_per_class, size=image_size)
        (tree / 'README.txt').write_text(note, encoding='utf-8')
        if output_dir.exists():
            output_dir.rmdir()
        tree.rename(output_dir)


def _place_head(rng, size):
    """Draws size, position, tilt and outline, and returns the `Head` without its tissue."""
    scale = rng.uniform(0.76, 0.94)  # half height of the head over half the side of the image
    tilt = np.radians(rng.uniform(-15, 15))
    shift = rng.uniform(-0.07, 0.07, 2)
    line = (2 * np.arange(size) + 1) / size - 1
    column, row = np.meshgrid((line - shift[0]) / scale, (line - shift[1]) / scale)
    x, y = np.cos(tilt) * column + np.sin(tilt) * row, np.cos(tilt) * row - np.sin(tilt) * column
    aspect = rng.uniform(0.72, 0.92)
    bumps = _draw_bumps(rng, orders=(2, 3, 4, 5), height=0.03)
    return Head(
        x=x,
        y=y,
        radius=np.hypot(x / aspect, y) / _bumpy(np.arctan2(y, x / aspect), bumps),
        pixel=2 / size / scale,
        inner=rng.uniform(0.82, 0.89),
        base=rng.uniform(0.40, 0.58),
        aspect=aspect,
        bumps=bumps,
        white=rng.uniform(0.38, 0.52),
    )


def _draw_tissue(rng, head):
    """Returns the intensities of a head without a lesion, without noise: float64 [size, size]."""
    x, y, radius = head.x, head.y, head.radius
    csf, grey = (0.10, head.white - 0.08) if rng.random() < 0.6 else (0.75, head.white + 0.10)
    folds = _waves(rng, head, frequency=22)
    image = _paint(np.zeros_like(x), _inside(head, radius - 1), rng.uniform(0.55, 0.95))  # scalp
    image = _paint(image, _inside(head, radius - head.inner - rng.uniform(0.04, 0.07)), 0.05)  # skull
    image = _paint(image, _inside(head, radius - head.inner), csf)
    image = _paint(image, _inside(head, radius - head.inner + 0.03 + 0.02 * folds), grey)
    image = _paint(image, _inside(head, radius - head.inner + 0.13 + 0.07 * folds), head.white)
    image = _paint(image, _inside(head, np.maximum(np.abs(x) - 0.01, y + 0.15)) * (radius < head.inner), csf)  # falx

    size, height = rng.uniform(0.7, 1.5), rng.uniform(-0.2, -0.05)
    for side in (-1, 1):  # the ventricles: never quite symmetric
        width = size * rng.uniform(0.035, 0.08)
        lean = side * rng.uniform(0.1, 0.5)
        ventricle = _ellipse(head, side * (width + 0.04), height, width, 0.15 * size * rng.uniform(0.8, 1.2), lean)
        image = _paint(image, ventricle, csf)

    below = _inside(head, head.base + 0.3 * x**2 - y) * (radius < head.inner)
    image = _paint(image, below, 0.3 + 0.1 * _waves(rng, head, frequency=10))  # muscle and bone
    image = _paint(image, _ellipse(head, 0, head.base + 0.2, rng.uniform(0.1, 0.2), 0.12, 0), 0.03)  # sinus
    image = _paint(image, _ellipse(head, 0, head.base, 0.05, 0.03, 0), head.white + 0.1)  # the healthy gland
    return _draw_vessels(rng, head, image)


def _draw_vessels(rng, head, image):
    """Paints bright dots and short strokes: beside the sella, at the top, and anywhere in the brain."""
    places = [(side * rng.uniform(0.14, 0.22), head.base - rng.uniform(0, 0.05)) for side in (-1, 1)]
    places.append((0.0, -head.inner + 0.04))
    for _ in range(rng.integers(1, 5)):
        places.append((head.aspect * rng.uniform(-0.6, 0.6), rng.uniform(-0.6, head.base - 0.25)))
    for x, y in places:
        long, short = rng.uniform(0.03, 0.09), rng.uniform(0.025, 0.05)
        vessel = _ellipse(head, x, y, long, short, rng.uniform(0, np.pi)) * (head.radius < head.inner)
        image = _paint(image, vessel, head.white + rng.uniform(0.1, 0.5))
    return image


def _glioma(rng, head):
    """Returns the layers (coverage, intensity) of an irregular deep lesion: oedema, tumour, perhaps a dark core."""
    size = rng.uniform(0.12, 0.22)
    x = rng.choice((-1, 1)) * head.aspect * rng.uniform(0.15, 0.45)
    y = rng.uniform(-0.45, head.base - 0.3)
    deep = _inside(head, head.radius - head.inner + 0.12)
    angle, distance = np.arctan2(head.y - y, head.x - x), np.hypot(head.x - x, head.y - y)

    def blob(radius):
        outline = _bumpy(angle, _draw_bumps(rng, orders=(2, 3, 4, 5, 7), height=0.18))
        return deep * _inside(head, distance - radius * outline)

    layers = [
        (blob(1.5 * size), head.white + rng.uniform(0.08, 0.16)),
        (blob(size), head.white + rng.uniform(0.2, 0.45) + 0.08 * _waves(rng, head, frequency=20)),
    ]
    if rng.random() < 0.6:
        layers.append((blob(0.5 * size), head.white - rng.uniform(0.1, 0.25)))
    return layers


def _meningioma(rng, head):
    """Returns the layer (coverage, intensity) of a smooth lesion on the skull's inner edge, above the base."""
    angle = np.radians(rng.uniform(-200, 20))  # 0 is to the right, -90 is up
    edge = head.inner * _bumpy(angle, head.bumps)
    size = rng.uniform(0.14, 0.25)
    depth = 0.6 * size  # of the middle below the edge: a broad foot on the skull
    x, y = head.aspect * (edge - depth) * np.cos(angle), (edge - depth) * np.sin(angle)
    lesion = _ellipse(head, x, y, size * rng.uniform(0.7, 1.0), size, angle)
    return [(lesion * _inside(head, head.radius - head.inner), head.white + rng.uniform(0.2, 0.45))]


def _pituitary(rng, head):
    """Returns the layer (coverage, intensity) of a small bright lesion at the sella."""
    size = rng.uniform(0.08, 0.13)
    x, y = rng.uniform(-0.03, 0.03), head.base - size * rng.uniform(0.2, 0.7)
    lesion = _ellipse(head, x, y, size, size * rng.uniform(0.8, 1.1), rng.uniform(0, np.pi))
    return [(lesion, head.white + rng.uniform(0.3, 0.5))]


def _paint(image, coverage, intensity):
    """Lays `intensity` over `image` where `coverage` (0 to 1) says."""
    return image + coverage * (intensity - image)


def _inside(head, distance):
    """Returns the part of each pixel that lies inside, 0 to 1, from the signed distance to an outline."""
    # Exactly 0 beyond two thirds of a pixel: what is not covered must not change at all.
    return np.clip(0.5 - distance / (1.5 * head.pixel), 0, 1)


def _ellipse(head, x, y, width, height, angle):
    """Returns the coverage of an ellipse with these half axes, turned by `angle` (radians)."""
    dx, dy = head.x - x, head.y - y
    along, across = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    return _inside(head, (np.sqrt((along / width) ** 2 + (across / height) ** 2) - 1) * min(width, height))


def _draw_bumps(rng, orders, height):
    """Draws waves round a circle: a tuple of (order, height, phase)."""
    return tuple((order, rng.uniform(0, height), rng.uniform(0, 2 * np.pi)) for order in orders)


def _bumpy(angle, bumps):
    """Returns the radius of a bumpy circle in the direction `angle` (radians); about 1."""
    return 1 + sum(height * np.cos(order * angle + phase) for order, height, phase in bumps)


def _waves(rng, head, frequency):
    """Returns a sum of six random waves, of standard deviation 1: float64 [size, size].

    Args:
      rng: a `np.random.Generator`.
      head: a `Head`.
      frequency: of the waves, in radians a half height.
    """
    angle, phase = rng.uniform(0, 2 * np.pi, (2, 6))
    wave = frequency * rng.uniform(0.6, 1.4, 6)
    line = head.pixel * np.arange(len(head.x))
    columns, rows = np.outer(line, wave * np.cos(angle)) + phase, np.outer(line, wave * np.sin(angle))
    # cos(a + b) over all pairs, as a matrix product: far cheaper than a cosine at every pixel.
    return (np.exp(1j * rows) @ np.exp(1j * columns).T).real / np.sqrt(3)
