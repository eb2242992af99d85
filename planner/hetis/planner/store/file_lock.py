"""One planner per SQLite file: a lock that is released when its process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from hetis.planner.store.errors import StoreError


class FileLock:
    """A lock on ``FILE.lock`` next to a store. It is a separate file so that backups may read the store meanwhile."""

    def __init__(self, store: Path) -> None:
        self._path = store.with_name(f"{store.name}.lock")
        self.store = store
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        return self._descriptor is not None

    def take(self) -> bool:
        """Take the lock and return True, or return False if another process holds it.

        Taking it twice has no further effect.

        Raises:
            StoreError: the lock file cannot be made.
        """
        if self.is_held:
            return True
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"store {self.store} cannot be locked: {self._path}: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        """Release the lock. The file stays: removing it would let two planners lock two files of one name."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
