"""Fixtures for several test modules, and a cache that spares compiling the same network for every test."""

import os
import pathlib
import tempfile

import pytest

# Read when JAX is imported, here and in the processes that tests start. Removed when this one ends.
CACHE = tempfile.TemporaryDirectory(prefix='brain_jax_tests_')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', CACHE.name)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')


@pytest.fixture(scope='session')
def shared():
    """The folder with the real data and weights beside the project; a test that asks for it is skipped without it."""
    path = pathlib.Path(__file__).parents[2] / 'shared'
    if not path.is_dir():
        pytest.skip(f'no folder {path}')
    return path
