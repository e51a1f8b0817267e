"""Files on this machine's disks.

Writing is atomic and durable: a temporary file beside the target, fsync, rename, fsync of the directory. A reader sees
the old file, the new one, or none. A killed writer leaves its temporary file behind; it holds a lock that dies with
it, so the next writer can tell a stale temporary from one in use (`remove_stale`).
"""

from __future__ import annotations

import fcntl
import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pseudolabel.errors import MissingFile, OutputExists, StorageError
from pseudolabel.storage.remote import Entry

_TEMPORARY = ".tmp-"


@contextmanager
def explain_os_errors(path: os.PathLike[str], doing: str) -> Iterator[None]:
    """Turn an `OSError` of the body into a `StorageError` that names the place, the cause and the remedy."""
    try:
        yield
    except OSError as error:
        raise explained(error, path, doing) from error


def explained(error: OSError, path: os.PathLike[str], doing: str) -> StorageError:
    """`error` as a `StorageError` that names the place, the cause and the remedy."""
    kind = MissingFile if isinstance(error, FileNotFoundError) and doing == "reading" else StorageError
    return kind(f"{doing} {path} failed: {error.strerror or error}\n{_remedy(error)}")


def _remedy(error: OSError) -> str:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space there and run the same command again; finished work is kept"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a place you may write to, or change its permissions"
    if error.errno == errno.ENAMETOOLONG:
        return "give the shard, or the directory, a shorter name"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
        return "check the path: part of it is missing, or a file where a directory should be"
    return "check the disk, then run the same command again; finished work is kept"


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it becomes `target`, on an exception it is removed.

    Raises:
        StorageError: the directory can't be written, the disk is full.
    """
    with explain_os_errors(target, "writing"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = _locked_temporary(target)
        try:
            yield temporary
            with open(temporary, "rb") as written:  # a writer may have replaced the inode we hold
                os.fsync(written.fileno())
            os.replace(temporary, target)
            sync_directory(target.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)


def write_atomic(target: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `target`, whole or not at all. Raises `StorageError`."""
    with atomic_file(target) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_new(target: Path, data: str) -> bool:
    """Write `data` whole to `target` unless something is there already; whether it was written. Of several writers at
    once one wins. Raises `StorageError`.
    """
    with explain_os_errors(target, "writing"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = _locked_temporary(target)
        try:
            temporary.write_bytes(data.encode())
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.link(temporary, target)
            sync_directory(target.parent)
            return True
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Make `directory` and keep it for this process: another one that wants it, too, is refused. Raises
    `OutputExists`.
    """
    with explain_os_errors(directory, "making"):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputExists(
                f"{directory}: another process is at work in it; wait for it, or choose another --out"
            ) from error
        except OSError:
            pass  # a file system without locks: two at once can't be told apart there
        yield
    finally:
        os.close(descriptor)


def named_directory() -> Path | None:
    """The directory that PSEUDOLABEL_SPOOL names for copies of what lies at URLs. Raises `StorageError` for a URL."""
    named = os.environ.get("PSEUDOLABEL_SPOOL")
    if named and "://" in named:
        raise StorageError(
            f"PSEUDOLABEL_SPOOL={named.partition('://')[0]}://…: the spool must be on this machine; name a "
            "directory on a quick disk"
        )
    return Path(named) if named else None


def is_temporary(name: str) -> bool:
    """Whether a file of this name is what a writer, living or killed, has not finished: no reader looks at it."""
    return name.startswith(".") and _TEMPORARY in name


def entries(directory: Path) -> list[Entry]:
    """The files of a directory, by name; none if there is no directory. Raises `StorageError`."""
    with explain_os_errors(directory, "listing"):
        try:
            with os.scandir(directory) as found:
                return sorted(_entry(one.name, one.stat()) for one in found if one.is_file())
        except FileNotFoundError:
            return []


def entry(path: Path) -> Entry:
    """Size and version of a file. Raises `StorageError`."""
    with explain_os_errors(path, "reading"):
        return _entry(path.name, path.stat())


def _entry(name: str, status: os.stat_result) -> Entry:
    return Entry(name, status.st_size, status.st_mtime_ns)


def remove_stale(directory: Path, of: str | None = None) -> None:
    """Delete temporary files in `directory`, all or those of the file named `of`, whose writer is gone; those of living
    writers stay.
    """
    for path in directory.glob(f".{'*' if of is None else glob.escape(of)}{_TEMPORARY}*"):
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except OSError:
            pass  # its writer lives, or it is not ours to delete
        finally:
            os.close(descriptor)


def _locked_temporary(target: Path) -> tuple[Path, int]:
    while True:
        temporary = target.with_name(f".{target.name}{_TEMPORARY}{secrets.token_hex(6)}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Between creation and lock another process may have taken it for stale and deleted it.
        if temporary.exists():
            return temporary, descriptor
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Make renames and new names in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
