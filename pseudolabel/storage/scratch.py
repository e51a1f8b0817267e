"""Scratch directories among the temporary files (TMPDIR), gone when their process is.

    with scratch_directory("plan") as path:      TMPDIR/pseudolabel-scratch-plan-…

A killed process leaves its own behind. A directory is locked as long as its process lives, so the next one can tell.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from pseudolabel.storage.local import explain_os_errors

_PREFIX = "pseudolabel-scratch-"


@contextmanager
def scratch_directory(purpose: str) -> Iterator[Path]:
    """An empty directory, removed with all that is in it afterwards. Raises `StorageError`."""
    above = Path(tempfile.gettempdir())
    with explain_os_errors(above, "making a temporary directory in"):
        _tidy_once(above)
        path, descriptor = _locked(above, purpose)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def remove_abandoned(above: Path, prefix: str, *, older_than: float = 0.0) -> None:
    """Delete directories that nobody holds: their process was killed. Those younger than so many seconds stay."""
    for path in above.glob(f"{prefix}*"):
        with suppress(OSError):  # another user's, or gone by now
            if time.time() - path.stat().st_mtime < older_than:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)


@lru_cache(maxsize=16)
def _tidy_once(above: Path) -> None:
    """A directory is made for every part that is sent, and others' are many: looking once is enough."""
    remove_abandoned(above, _PREFIX)


def _locked(above: Path, purpose: str) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{purpose}-", dir=above))
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            with suppress(OSError):  # a file system without locks: there nobody takes it for abandoned either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists():  # between making and locking another process may have deleted it
                return path, descriptor
            os.close(descriptor)
