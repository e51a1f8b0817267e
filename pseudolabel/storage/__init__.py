"""Where files live: on this machine's disks or at a URL, behind the few verbs that both can offer.

    location("runs/a")  location("s3://bucket/runs/a")      a `Path`, or a `RemotePath` with the same ways

A file appears whole or not at all, in either place (local.py, remote.py). What must be a file on a disk to be read, a
shard, is fetched into a spool (spool.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pseudolabel.errors import StorageError
from pseudolabel.storage import local
from pseudolabel.storage.asking import give_up, is_refused, shown
from pseudolabel.storage.journal import Journal
from pseudolabel.storage.local import explain_os_errors, explained, is_temporary, sync_directory
from pseudolabel.storage.mirror import Mirror, mirrored
from pseudolabel.storage.ranged import RangedFile
from pseudolabel.storage.remote import Entry, RemotePath, entries_of
from pseudolabel.storage.scratch import scratch_directory

__all__ = [
    "Entry",
    "Journal",
    "Location",
    "Mirror",
    "RangedFile",
    "RemotePath",
    "atomic_file",
    "check_writable",
    "discard",
    "entries",
    "entries_of",
    "entry",
    "explain_os_errors",
    "explained",
    "give_up",
    "held",
    "is_refused",
    "is_remote",
    "is_temporary",
    "local_copy",
    "local_path",
    "location",
    "mirrored",
    "remove_stale",
    "scratch_directory",
    "shown",
    "sync_directory",
    "write_atomic",
    "write_new",
]

Location = Path | RemotePath


def location(place: str | os.PathLike[str]) -> Location:
    """Where `place` is. Raises `StorageError` for a URL of an unknown kind, with a password in it, or that can't be."""
    text = os.fspath(place)
    if isinstance(place, (Path, RemotePath)):
        return place
    if not text:
        raise StorageError("an empty text is no path; is a variable unset?")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme == "file" and not rest.startswith("/"):
        raise StorageError(f"{text}: names the machine {rest.partition('/')[0]!r}; of a path, write file:///PATH")
    return Path(rest) if scheme == "file" else RemotePath(f"{scheme.lower()}://{rest}")


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Whether `place` is a URL that isn't of this machine's disks."""
    text = os.fspath(place)
    return "://" in text and not text.startswith("file://")


def local_path(place: str | os.PathLike[str]) -> Path:
    """The path of what must be on this machine. Raises `StorageError` for a URL."""
    found = location(place)
    if isinstance(found, RemotePath):
        raise StorageError(f"{found}: must be a path on this machine; copy the files here or mount the bucket")
    return found


def entries(directory: Location, near: Sequence[str] = ()) -> list[Entry]:
    """The files of a directory, by name, from one listing; none if nothing is there. `near` as in
    `RemotePath.entries`. Raises `StorageError`.
    """
    return directory.entries(near) if isinstance(directory, RemotePath) else local.entries(directory)


def entry(path: Location) -> Entry:
    """Size and version of a file. Raises `StorageError`."""
    return path.entry() if isinstance(path, RemotePath) else local.entry(path)


def check_writable(place: Location) -> None:
    """Raise `StorageError` if nothing can ever be written there: a web server is only read from."""
    if isinstance(place, RemotePath):
        place.check_writable()


@contextmanager
def atomic_file(target: Location) -> Iterator[Path]:
    """Yield a temporary path on this machine; on success its content becomes `target`, whole, on an exception nothing
    does. Raises `StorageError`.
    """
    if not isinstance(target, RemotePath):
        with local.atomic_file(target) as temporary:
            yield temporary
        return
    with scratch_directory("write") as scratch:
        yield scratch / target.name
        target.put(scratch / target.name)


@contextmanager
def local_copy(path: Location) -> Iterator[Path]:
    """A file of `path`'s content, as long as it is wanted: itself, or a copy. Raises `StorageError`."""
    if not isinstance(path, RemotePath):
        yield path
        return
    content = path.read_bytes()
    with scratch_directory("read") as scratch:
        temporary = scratch / path.name
        with explain_os_errors(temporary, "writing"):
            temporary.write_bytes(content)
        yield temporary


def write_atomic(target: Location, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `target`, whole or not at all. Raises `StorageError`."""
    content = data.encode() if isinstance(data, str) else data
    if isinstance(target, RemotePath):
        target.write_bytes(content)
    else:
        local.write_atomic(target, content)


def write_new(target: Location, data: str) -> bool:
    """Write `data` whole to `target` unless something is there already; whether it was written. Of several writers at
    once one wins (see `RemotePath.write_new` for whom it doesn't). Raises `StorageError`.
    """
    return target.write_new(data.encode()) if isinstance(target, RemotePath) else local.write_new(target, data)


@contextmanager
def held(directory: Location) -> Iterator[None]:
    """Make `directory` and keep it for this process: another one that wants it, too, is refused. An object storage has
    no locks: two at once can't be told apart there. Raises `OutputExists`.
    """
    if isinstance(directory, RemotePath):
        yield
        return
    with local.held(directory):
        yield


def discard(path: Location) -> None:
    """Delete `path` if it is there. Of an object nobody asks first: that would cost more. Raises `StorageError`."""
    if not isinstance(path, RemotePath):
        with explain_os_errors(path, "removing"):
            path.unlink(missing_ok=True)
        return
    try:
        path.unlink(missing_ok=True)
    except StorageError:
        if path.is_file():  # or else whoever may not delete has nothing to delete
            raise


def remove_stale(directory: Location, of: str | None = None) -> None:
    """Delete temporary files in `directory`, all or those of the file named `of`, whose writer is gone; an object
    storage has none.
    """
    if not isinstance(directory, RemotePath):
        local.remove_stale(directory, of)
