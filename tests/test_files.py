"""Tests of brain_jax.files."""

import pytest

from brain_jax import InputError, files


@pytest.mark.parametrize(('content', 'expected'), [('größer\n', b'gr\xc3\xb6\xc3\x9fer\n'), (b'\r\n\xff', b'\r\n\xff')])
def test_content_is_written_and_nothing_else(tmp_path, content, expected):
    path = tmp_path / 'new/folder/file.txt'
    for text in ('older and longer than what follows', content):
        files.write_whole(path, text)
    assert path.read_bytes() == expected
    assert list(path.parent.iterdir()) == [path]


def test_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / 'plain').write_text('')
    files.write_whole(tmp_path / 'whole', '')
    assert (tmp_path / 'whole').stat().st_mode == (tmp_path / 'plain').stat().st_mode


def test_failure_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path = tmp_path / 'file.txt'
    path.write_text('old')
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
        temporary.write_text('ne')
        raise KeyboardInterrupt
    assert path.read_text() == 'old'
    assert list(tmp_path.iterdir()) == [path]


def test_old_file_stands_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / 'file.txt'
    path.write_text('old')
    with files.replacing(path) as temporary:
        temporary.write_text('new')
        assert path.read_text() == 'old'
    assert path.read_text() == 'new'


def test_what_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'folder').mkdir()
    for path in (tmp_path / 'file/x.txt', tmp_path / 'folder'):
        with pytest.raises(InputError, match=f'{path} cannot be written: .*[a-z]'):
            files.write_whole(path, 'x')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'folder']
    assert not list((tmp_path / 'folder').iterdir())
