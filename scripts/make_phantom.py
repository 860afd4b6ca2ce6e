"""Writes a folder of synthetic MRI-like heads, laid out like the real dataset.

    python scripts/make_phantom.py --output_dir phantom

The images are synthetic: they show no person and no disease. See `brain_jax/data/phantom.py`.
"""

from absl import app, flags

from brain_jax import InputError
from brain_jax.data import phantom

_OUTPUT_DIR = flags.DEFINE_string('output_dir', None, 'Folder to create.', required=True)
_TRAIN_PER_CLASS = flags.DEFINE_integer('train_per_class', 300, 'Training images of each class.', lower_bound=1)
_TEST_PER_CLASS = flags.DEFINE_integer('test_per_class', 100, 'Test images of each class.', lower_bound=1)
_IMAGE_SIZE = flags.DEFINE_integer('image_size', 96, 'Side of the images in pixels.', lower_bound=32)
_SEED = flags.DEFINE_integer('seed', 0, 'Equal seeds give equal images.', lower_bound=0)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'unexpected argument {argv[1]!r}')
    try:
        phantom.make_phantom(
            _OUTPUT_DIR.value,
            train_per_class=_TRAIN_PER_CLASS.value,
            test_per_class=_TEST_PER_CLASS.value,
            image_size=_IMAGE_SIZE.value,
            seed=_SEED.value,
        )
    except InputError as error:
        raise SystemExit(f'error: {error}') from None


if __name__ == '__main__':
    app.run(main)
