"""Fixtures for several test modules."""

import pathlib

import pytest


@pytest.fixture(scope='session')
def shared():
    """The folder with the real data and weights beside the project; a test that asks for it is skipped without it."""
    path = pathlib.Path(__file__).parents[2] / 'shared'
    if not path.is_dir():
        pytest.skip(f'no folder {path}')
    return path
