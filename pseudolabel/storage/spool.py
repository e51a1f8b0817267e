"""The spool: shards of an object storage, fetched to a disk before they are read.

A shard is read at random and more than once (index, samples, hash), so it is fetched whole, in pieces that are asked
for ahead. The spool is one directory for all of a user's processes on a machine: what annotate has fetched, training
finds there. It is a cache of bounded size. What was used longest ago goes first; a file that is open stays readable
when it goes.

    PSEUDOLABEL_SPOOL        a directory, best on a quick local disk; otherwise one among the temporary files
    PSEUDOLABEL_SPOOL_LIMIT  such as 200GB; otherwise half of what is free there

A file is found by URL, size and version (ETag, generation, time), so an object that is replaced is fetched again. Its
SHA-256 is taken while it comes in and kept beside it: whoever hashes the file later learns whether the disk still
holds what was fetched.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pseudolabel.errors import StorageError
from pseudolabel.storage.local import explain_os_errors, named_directory
from pseudolabel.storage.remote import Entry, RemotePath

_PIECE = 8 << 20
_PIECES_AHEAD = 4
_TRIES = 4  # of a file that is deleted while it is fetched
_ABANDONED = 3600.0  # seconds after which a file that nobody goes on fetching may go
_OURS = re.compile(r"[0-9a-f]{40}(\.part)?")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Spooled:
    """A fetched object: an open file, its hash when it came in, and a number that changes with the object."""

    descriptor: int
    sha256: str
    size: int
    version: int
    path: Path

    def forget(self) -> None:
        """Fetch it again the next time: the file is not what was fetched."""
        _remove(self.path)


def fetch(source: RemotePath) -> Spooled:
    """Open `source`'s copy in the spool; it is fetched if it isn't there. The caller closes the descriptor.

    Raises:
        StorageError: it isn't there, can't be fetched, was replaced meanwhile, or the disk is full.
    """
    entry = source.entry()
    named = f"{source.url} {entry.size} {entry.version}"
    if not entry.version:  # nothing says whether it is still the same: for this process, this time only
        named += f" {os.getpid()} {time.monotonic_ns()}"
    name = hashlib.sha256(named.encode()).hexdigest()[:40]
    for _ in range(_TRIES):
        path = _directory() / name
        with explain_os_errors(path, "writing"):
            found = _found_or_fetched(source, entry, path)
            if found is None:
                continue
            if not entry.version:
                _remove(path)
            return found
    raise StorageError(f"{path}: is gone as soon as it is fetched; give the spool more room: {_limits()}")


def _found_or_fetched(source: RemotePath, entry: Entry, path: Path) -> Spooled | None:
    """The file at `path`; None if somebody has deleted it, or the spool, meanwhile."""
    try:
        found = _open(path, entry)
        if found is None:
            with _alone(path):
                found = _open(path, entry)
                if found is None:
                    _fetch(source, entry, path)
                    found = _open(path, entry)
        return found
    except FileNotFoundError:
        return None
    except IsADirectoryError as error:
        raise StorageError(
            f"{error.filename}: is a directory where the spool keeps a file; remove it, or let PSEUDOLABEL_SPOOL name "
            "another place"
        ) from error


def _open(path: Path, entry: Entry) -> Spooled | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        sha256 = _beside(path).read_text(encoding="ascii")
        if os.fstat(descriptor).st_size == entry.size and len(sha256) == 64:
            used, changed = time.time_ns(), os.fstat(descriptor).st_mtime_ns  # the latter tells a reader of writers
            os.utime(path, ns=(used, changed))
            version = int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:7])
            return Spooled(descriptor, sha256, entry.size, version, path)
    except (FileNotFoundError, UnicodeDecodeError):
        pass
    os.close(descriptor)
    _remove(path)
    return None


def _fetch(source: RemotePath, entry: Entry, path: Path) -> None:
    """Fetch into a file beside `path`, then give it that name."""
    make_room(path.parent, entry.size)
    part = _part(path)
    try:
        digest = _copy(source, entry.size, part)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        make_room(path.parent, entry.size, all_of_it=True)
        digest = _copy(source, entry.size, part)
    if source.entry()[1:] != entry[1:]:
        raise StorageError(f"{source}: was replaced while it was fetched; run the same command again")
    _beside(path).write_text(digest, encoding="ascii")
    os.replace(part, path)


def _copy(source: RemotePath, size: int, target: Path) -> str:
    """Fetch pieces, a few at a time, and write them in order. Returns the SHA-256."""
    digest = hashlib.sha256()
    with open(target, "r+b") as file:
        file.truncate(0)
        for data in _pieces(source, size):
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def _pieces(source: RemotePath, size: int) -> Iterator[bytes]:
    starts = iter(range(0, size, _PIECE))
    if source.is_web and size:  # which may send more than is asked for
        first = source.read_range(0, min(next(starts) + _PIECE, size), or_all=size)
        yield first
        if len(first) == size:
            return
    waiting: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(_PIECES_AHEAD, "fetch") as pool:
        try:
            for start in starts:
                waiting.append(pool.submit(source.read_range, start, min(start + _PIECE, size)))
                if len(waiting) == _PIECES_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for piece in waiting:
                piece.cancel()


def make_room(directory: Path, size: int, *, all_of_it: bool = False) -> None:
    """Remove what was used longest ago until `size` more bytes keep the spool within its limit; `all_of_it`: whatever
    nobody is fetching just now.
    """
    files = list(_files(directory))
    used = sum(found[1] for found in files)
    limit = 0 if all_of_it else _limit(directory, used)
    for last_used, bytes_there, path in sorted(files):
        if used + size <= limit:
            return
        if path.suffix == ".part" and not (time.time() - last_used > _ABANDONED or all_of_it):
            continue
        if path.suffix == ".part":
            with suppress(OSError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(path)
        else:
            _remove(path)
        used -= bytes_there


def _files(directory: Path) -> Iterator[tuple[float, int, Path]]:
    """Time of last use, size and path of all that was fetched; what else lies there is somebody's own."""
    with os.scandir(directory) as found:
        for one in found:
            if _OURS.fullmatch(one.name) and not one.is_dir():
                with suppress(FileNotFoundError):  # another process makes room, too
                    status = one.stat()
                    yield max(status.st_atime, status.st_mtime), status.st_size, Path(one.path)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Fetch `path` by nobody else meanwhile. The file that is fetched into is its own lock."""
    while True:
        descriptor = os.open(_part(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            there = os.stat(_part(path)).st_ino if _part(path).exists() else None
            if there == os.fstat(descriptor).st_ino:  # nobody has renamed or removed it meanwhile
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            if os.stat(_part(path)).st_ino == os.fstat(descriptor).st_ino:
                os.unlink(_part(path))
        os.close(descriptor)


def _part(path: Path) -> Path:
    return path.with_suffix(".part")


def _beside(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    _beside(path).unlink(missing_ok=True)


def check() -> None:
    """Raise `StorageError` if the spool can't be one: said once, before anything is fetched or loaded."""
    directory = _directory()
    with explain_os_errors(directory, "writing to the spool"), tempfile.TemporaryFile(dir=directory):
        _limit(directory, 0)


def _directory() -> Path:
    """The spool's directory, made if it isn't there, and nobody else's."""
    path = named_directory() or Path(tempfile.gettempdir()) / f"pseudolabel-spool-{os.getuid()}"
    with explain_os_errors(path, "making the spool"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_uid != os.getuid():
            raise StorageError(f"{path}: belongs to another user; set PSEUDOLABEL_SPOOL to a directory of your own")
    return path


def _limit(directory: Path, used: int) -> int:
    text = os.environ.get("PSEUDOLABEL_SPOOL_LIMIT", "")
    if not text:
        return (shutil.disk_usage(directory).free + used) // 2
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if match is None:
        raise StorageError(f"PSEUDOLABEL_SPOOL_LIMIT={text}: write a number of bytes, such as 200GB")
    return int(float(match[1]) * _UNITS[match[2]])


def _limits() -> str:
    return "PSEUDOLABEL_SPOOL names another directory, PSEUDOLABEL_SPOOL_LIMIT a larger size"
