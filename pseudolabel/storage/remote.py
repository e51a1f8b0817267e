"""Objects of S3, Google Cloud Storage, Azure, the Hugging Face hub and web servers, through fsspec.

How they are asked, and what is tried again, is in asking.py. Credentials are fsspec's business, which finds them where
the usual tools do; they are in no message here.

A file appears whole: it is one put, or an upload of pieces that nobody sees before it is completed.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pseudolabel.errors import MissingFile, StorageError
from pseudolabel.storage.asking import CHECK_PLACE, EXTRAS, WEB, Unfit, ask, is_missing_bucket, one_line, shown

_AT_ONCE = 16  # requests under way, of many small ones
_MANY = 5000  # names, from which on a listing is divided
_ETAGS = ("ETag", "etag", "generation", "md5Hash", "blob_id")  # what storages call a version
_VERSIONS = (*_ETAGS, "LastModified", "last_modified", "mtime", "Last-Modified")


class Entry(NamedTuple):
    """A file of a directory. `version` changes when the file does."""

    name: str
    size: int
    version: int


@dataclass(frozen=True, order=True)
class RemotePath(os.PathLike[str]):
    """A URL with the ways of a `Path`: `/`, `name`, `parent`, `exists`, `read_bytes`, … Errors are `StorageError`s."""

    url: str

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
        except ValueError as error:
            raise StorageError(f"{shown(self.url)}: is no URL ({error}); check its brackets") from error
        if self.scheme not in EXTRAS:
            raise StorageError(f"{shown(self.url)}: no storage of this kind is known; write one of {', '.join(EXTRAS)}")
        if "@" in parts.netloc and parts.scheme not in ("az", "abfs"):
            raise StorageError(
                f"{shown(self.url)}: a password doesn't belong into a URL; give it where the storage's own tools look "
                "for it, such as AWS_SECRET_ACCESS_KEY"
            )
        if not parts.netloc:
            raise StorageError(f"{shown(self.url)}: names no bucket or host")
        if ".." in parts.path.split("/"):
            raise StorageError(f"{shown(self.url)}: '..' leads nowhere in a URL; write out where it is")

    def __fspath__(self) -> str:
        return self.url

    def __str__(self) -> str:
        return shown(self.url)

    def __repr__(self) -> str:
        return f"RemotePath({shown(self.url)!r})"

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    @property
    def scheme(self) -> str:
        return self.url.partition("://")[0]

    @property
    def is_web(self) -> bool:
        """Whether it is a web server's, which is only read from and can't be listed."""
        return self.scheme in WEB

    @property
    def _path(self) -> str:
        """Without what a web address carries behind its `?`."""
        return self.url.partition("?")[0] if self.is_web else self.url

    @property
    def _bare(self) -> str:
        """What fsspec calls it."""
        return self.url.rstrip("/") if self.is_web else self.url.partition("://")[2].rstrip("/")

    @property
    def name(self) -> str:
        return posixpath.basename(self._path.rstrip("/"))

    @property
    def suffix(self) -> str:
        return posixpath.splitext(self.name)[1]

    @property
    def parent(self) -> RemotePath:
        above = posixpath.dirname(self._path.rstrip("/"))
        return self if above.endswith(":") else RemotePath(above)

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def exists(self) -> bool:
        """Whether a file is there, or anything below."""
        return self._entry() is not None or (not self.is_web and self.is_dir())

    def is_file(self) -> bool:
        return self._entry() is not None

    def is_dir(self) -> bool:
        """Whether anything is below. A bucket that isn't there is an error, not an empty one."""
        return any(True for _ in self._list())

    def iterdir(self) -> Iterator[RemotePath]:
        return (self / posixpath.basename(one["name"].rstrip("/")) for one in self._list())

    def entry(self) -> Entry:
        """Size and version. Raises `StorageError` if nothing is there."""
        found = self._entry()
        if found is None:
            raise self._absent()
        return found

    def _entry(self) -> Entry | None:
        try:
            info = ask(self.url, "reading", "info", self._bare)
        except FileNotFoundError:
            return None
        return None if info["type"] == "directory" else _as_entry(info)

    def entries(self, near: Sequence[str] = ()) -> list[Entry]:
        """The files right below, by name, from one listing. A storage gives a thousand names at a time, one page after
        the other; S3 is asked in many places at once if it is told names that lie `near` those that are there. Raises
        `StorageError`.
        """
        if self.scheme == "s3" and len(near) >= _MANY:
            names = sorted(near)
            bounds = names[len(names) // _AT_ONCE :: len(names) // _AT_ONCE]
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                return list(chain.from_iterable(pool.map(self._between, ["", *bounds], [*bounds, None])))
        return sorted(_as_entry(one) for one in self._list() if one["type"] != "directory")

    def _between(self, after: str, until: str | None) -> list[Entry]:
        """Files by name, from behind one name to another; None: to the end."""
        bucket, _, path = self._bare.partition("/")
        prefix = f"{path}/" if path else ""
        where: dict[str, Any] = {"StartAfter": f"{prefix}{after}"} if after else {}
        found: list[Entry] = []
        while True:
            try:
                what: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/", **where}
                page = ask(self.url, "listing", "call_s3", "list_objects_v2", **what)
            except FileNotFoundError as error:
                raise self._without_bucket("listing", error) from error
            for one in page.get("Contents", ()):
                entry = _as_entry({**one, "name": one["Key"], "size": one["Size"]})
                if until is not None and entry.name > until:
                    return found
                found.append(entry)
            if not page.get("IsTruncated"):
                return found
            where = {"ContinuationToken": page["NextContinuationToken"]}

    def _list(self) -> list[dict[str, Any]]:
        if self.is_web:
            raise StorageError(f"{self}: a web server's files can't be listed; name them: {{000..099}} or @list.txt")
        try:
            below = f"{self._bare}/"
            found = ask(self.url, "listing", "ls", below, detail=True)
        except FileNotFoundError as error:
            if is_missing_bucket(error):
                raise self._without_bucket("listing", error) from error
            return []
        # An empty object named like the directory, as some tools make, is no file of it.
        return [one for one in found if one["name"].rstrip("/") != below.rstrip("/").lstrip("/")]

    def glob(self, pattern: str) -> list[tuple[RemotePath, Entry]]:
        """Files whose path below this one matches; `**` is any depth. Raises `StorageError`."""
        if "/" not in pattern and "**" not in pattern:
            return [(self / one.name, one) for one in self.entries() if fnmatch.fnmatchcase(one.name, pattern)]
        found = ask(self.url, "listing", "glob", f"{self._bare}/{pattern}", detail=True)
        files = ((name, info) for name, info in sorted(found.items()) if info["type"] != "directory")
        return [(RemotePath(f"{self.scheme}://{name}"), _as_entry(info)) for name, info in files]

    def read_bytes(self) -> bytes:
        """The whole file. Raises `StorageError`."""
        return self.read_range(0, self.entry().size)

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self.read_bytes().decode(encoding, errors)

    def read_range(self, start: int, stop: int, *, or_all: int = 0) -> bytes:
        """Just these bytes; fewer are tried again like any other failure. A web server that knows no ranges sends all:
        they are returned if they are the `or_all` bytes that the file has. Raises `StorageError`.
        """
        if start == stop:
            return b""

        def whole(data: bytes) -> bytes:
            if self.is_web and len(data) > stop - start:
                if len(data) == or_all:
                    return data
                data = data[start:stop]
            if len(data) != stop - start:
                raise ConnectionError(f"{len(data)} bytes came where {stop - start} were asked for")
            return data

        try:
            where = {"start": start, "end": stop}
            found: bytes = ask(self.url, "reading", "cat_file", self._bare, size=stop - start, check=whole, **where)
        except FileNotFoundError as error:
            raise self._absent() from error
        return found

    def put(self, source: Path) -> None:
        """Make this the content of a local file, at once. Raises `StorageError`."""
        self.check_writable()
        self._write("put_file", os.fspath(source), self._bare, size=source.stat().st_size)

    def write_bytes(self, data: bytes) -> None:
        """Make this the file's content, at once. Raises `StorageError`."""
        self.check_writable()
        self._write("pipe_file", self._bare, data, size=len(data))

    def write_new(self, data: bytes) -> bool:
        """Write unless something is there; whether it was written. Of several at once one wins, where the storage
        knows conditions (S3 does; its imitations may not, and there the last one wins).
        """
        self.check_writable()
        if self.is_file():
            return False
        try:
            self._write("pipe_file", self._bare, data, size=len(data), mode="create")
        except FileExistsError:
            return False
        except Unfit:
            self.write_bytes(data)
        return True

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file. Raises `StorageError`."""
        self.check_writable()
        try:
            ask(self.url, "removing", "rm_file", self._bare)
        except FileNotFoundError as error:
            if not missing_ok:
                raise self._absent() from error

    def mkdir(self, **_: bool) -> None:
        """Nothing: directories of an object storage are there when something is in them."""

    def check_writable(self) -> None:
        """Raise `StorageError` for a web server's."""
        if self.is_web:
            raise StorageError(f"{self}: a web server is only read from; write to a directory or an object storage")

    def _write(self, verb: str, *arguments: Any, size: int, **options: Any) -> None:
        try:
            ask(self.url, "writing", verb, *arguments, size=size, **options)
        except FileNotFoundError as error:
            raise self._without_bucket("writing", error) from error

    def _without_bucket(self, doing: str, error: Exception) -> StorageError:
        return StorageError(f"{doing} {self} failed: {one_line(error)}\n{CHECK_PLACE}")

    def _absent(self) -> StorageError:
        return MissingFile(f"reading {self} failed: there is no such file\n{CHECK_PLACE}")


def entries_of(paths: Iterable[RemotePath]) -> list[Entry | None]:
    """Size and version of each, None for what isn't there; many are asked for at once. Raises `StorageError`."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(RemotePath._entry, paths))


def version_number(text: str) -> int:
    """A number that stands for a storage's name of a version."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def _as_entry(info: dict[str, Any]) -> Entry:
    size = info.get("size")
    if size is None:
        raise StorageError(f"{shown(info['name'])}: the server doesn't say how large it is; copy the files here")
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    path = info["name"]
    path = path.partition("?")[0] if path.startswith(("http://", "https://")) else path
    name = posixpath.basename(path.rstrip("/"))
    return Entry(name, int(size), version_number(version) if version else 0)
