"""Files that are whole or not there: what is read later is never half-written."""

import contextlib
import os
import pathlib
import tempfile

from brain_jax import InputError


@contextlib.contextmanager
def replacing(path):
    """Yields the path of a temporary file, which takes the place of `path` when all went well and else is removed.

    The temporary file has the same name, in a hidden folder beside `path`. Folders are made if need be.

    Args:
      path: of the file; until then an older one stays as it is.

    Raises:
      OSError: where it cannot be written.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{path.name}.', dir=path.parent) as folder:
        temporary = pathlib.Path(folder, path.name)
        yield temporary
        os.replace(temporary, path)


def write_whole(path, content):
    """Writes a file that is whole or not there, and its folder if need be.

    Args:
      path: of the file; an older one is replaced.
      content: str, written as UTF-8, or bytes.

    Raises:
      InputError: where it cannot be written.
    """
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(content if isinstance(content, bytes) else content.encode())
    except OSError as error:
        raise InputError(f'{path} cannot be written: {error.strerror}') from error
