"""What a page holds of a file that was dropped on it: in memory, until it is closed, replaced, or ten minutes old."""

import collections
import secrets
import threading
import time

from brain_jax import InputError

MAX_HELD = 2**28  # bytes of all files that are held
HELD_SECONDS = 600


class Upload:
    """A file that was dropped on the page.

    Attributes:
      data: bytes.
      suffix: ending of its name, with the dot.
      plane: of the slices that were decoded last, None before that.
      slices: list of (name, uint8 [height, width]).
    """

    def __init__(self, data, suffix):
        self.data = data
        self.suffix = suffix
        self.plane = None
        self.slices = []
        self.time = time.monotonic()

    def __len__(self):
        """Returns how many bytes are held."""
        return len(self.data) + sum(picture.nbytes for _, picture in self.slices)


class Uploads:
    """All that is held, by names that nobody can guess."""

    def __init__(self):
        self._held = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self):
        """Returns how many files are held."""
        return len(self._held)

    def add(self, data, suffix):
        """Holds a file, and drops the oldest ones where that is too much; returns its name."""
        name = secrets.token_urlsafe(16)
        with self._lock:
            self._held[name] = Upload(data, suffix)
        self.expire()
        return name

    def get(self, name):
        """Returns an `Upload`.

        Raises:
          InputError: where it is no longer held.
        """
        with self._lock:
            upload = self._held.get(name)
            if upload is None:
                raise InputError('the file is no longer held here; choose it again')
            upload.time = time.monotonic()
            self._held.move_to_end(name)
        return upload

    def drop(self, name):
        """Drops a file, where it is held."""
        with self._lock:
            self._held.pop(name, None)

    def expire(self):
        """Drops what is too old or too much, but the latest."""
        now = time.monotonic()
        with self._lock:
            for name, upload in list(self._held.items()):
                too_much = len(self._held) > 1 and sum(map(len, self._held.values())) > MAX_HELD
                if too_much or now - upload.time > HELD_SECONDS:
                    del self._held[name]
