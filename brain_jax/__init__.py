"""Fine-tune an ImageNet DenseNet on brain-MRI images in JAX and Flax."""

__version__ = '0.1.0'


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where and what to do.

    Entry points print the message as one line and exit with status 1; everything else is a defect
    and keeps its stack trace.
    """
