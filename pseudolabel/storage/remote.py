"""Objects of S3, Google Cloud Storage, Azure, the Hugging Face hub and web servers, through fsspec.

Everything is tried again after what may pass (a reset, a 503, a slow answer), with growing, random pauses; every try
has a deadline. What stays wrong becomes one `StorageError`. Credentials are fsspec's business, which finds them where
the usual tools do; they are in no message here.

A file appears whole: it is one put, or an upload of pieces that nobody sees before it is completed.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pseudolabel.errors import StorageError

EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "hf": "hf", "http": "http"}
EXTRAS["https"] = "http"
_WEB = ("http", "https")
_TRIES = 7
_LONGEST_PAUSE = 15.0  # seconds between two tries
_DEADLINE = 60.0  # seconds for one try, and one more for each _SLOWEST bytes
_SLOWEST = 1 << 20
_AT_ONCE = 16  # requests under way, of many small ones
_MANY = 5000  # names, from which on a listing is divided
_PASSING_CODES = ("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "OperationAborted")
_PASSING_STATUS = (408, 409, 425, 429)
_FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError, ImportError)
_ETAGS = ("ETag", "etag", "generation", "md5Hash", "blob_id")  # what storages call a version
_VERSIONS = (*_ETAGS, "LastModified", "last_modified", "mtime", "Last-Modified")
_REFUSED = (TypeError, AttributeError, NotImplementedError, ValueError)  # asking again changes nothing


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
        return self.scheme in _WEB

    @property
    def _path(self) -> str:
        """Without what a web address carries behind its `?`."""
        return self.url.partition("?")[0] if self.is_web else self.url

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
            raise _absent(self)
        return found

    def _entry(self) -> Entry | None:
        try:
            info = self._ask("reading", "info")
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
        bucket, _, path = _bare(self).partition("/")
        prefix = f"{path}/" if path else ""
        where: dict[str, Any] = {"StartAfter": f"{prefix}{after}"} if after else {}
        found: list[Entry] = []
        while True:
            try:
                page = self._ask(
                    "listing", "call_s3", "list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter="/", **where
                )
            except FileNotFoundError as error:
                raise StorageError(f"listing {self} failed: {_text(error)}\n{_REMEDY_PLACE}") from error
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
            below = f"{_bare(self)}/"
            found = self._ask("listing", "ls", below, detail=True)
        except FileNotFoundError as error:
            if _code(error) == "NoSuchBucket":
                raise StorageError(f"listing {self} failed: {_text(error)}\n{_REMEDY_PLACE}") from error
            return []
        # An empty object named like the directory, as some tools make, is no file of it.
        return [one for one in found if one["name"].rstrip("/") != below.rstrip("/").lstrip("/")]

    def glob(self, pattern: str) -> list[tuple[RemotePath, Entry]]:
        """Files whose path below this one matches; `**` is any depth. Raises `StorageError`."""
        if "/" not in pattern and "**" not in pattern:
            return [(self / one.name, one) for one in self.entries() if fnmatch.fnmatchcase(one.name, pattern)]
        found = self._ask("listing", "glob", f"{_bare(self)}/{pattern}", detail=True)
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
            found: bytes = self._ask("reading", "cat_file", start=start, end=stop, size=stop - start, check=whole)
        except FileNotFoundError as error:
            raise _absent(self) from error
        return found

    def put(self, source: Path) -> None:
        """Make this the content of a local file, at once. Raises `StorageError`."""
        self._writable()
        size = source.stat().st_size
        try:
            self._ask("writing", "put_file", os.fspath(source), _bare(self), size=size, alone=False)
        except FileNotFoundError as error:
            raise StorageError(f"writing {self} failed: {_text(error)}\n{_REMEDY_PLACE}") from error

    def write_bytes(self, data: bytes) -> None:
        """Make this the file's content, at once. Raises `StorageError`."""
        self._writable()
        try:
            self._ask("writing", "pipe_file", _bare(self), data, size=len(data), alone=False)
        except FileNotFoundError as error:
            raise StorageError(f"writing {self} failed: {_text(error)}\n{_REMEDY_PLACE}") from error

    def write_new(self, data: bytes) -> bool:
        """Write unless something is there; whether it was written. Of several at once one wins, where the storage
        knows conditions (S3 does; its imitations may not, and there the last one wins).
        """
        self._writable()
        if self.is_file():
            return False
        try:
            self._ask("writing", "pipe_file", _bare(self), data, size=len(data), alone=False, mode="create")
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            raise StorageError(f"writing {self} failed: {_text(error)}\n{_REMEDY_PLACE}") from error
        except _Unfit:
            self.write_bytes(data)
        return True

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file. Raises `StorageError`."""
        self._writable()
        try:
            self._ask("removing", "rm_file")
        except FileNotFoundError as error:
            if not missing_ok:
                raise _absent(self) from error

    def mkdir(self, **_: bool) -> None:
        """Nothing: directories of an object storage are there when something is in them."""

    def _writable(self) -> None:
        if self.is_web:
            raise StorageError(f"{self}: a web server is only read from; write to a directory or an object storage")

    def _ask(
        self,
        doing: str,
        verb: str,
        *arguments: Any,
        size: int = 0,
        check: Callable[[Any], Any] | None = None,
        alone: bool = True,
        **options: Any,
    ) -> Any:
        """`verb` of this path's file system, tried until it succeeds or can't."""
        import tenacity

        system = _file_system(self.scheme, os.getpid())
        if alone and not arguments:
            arguments = (_bare(self),)
        seconds = _DEADLINE + size / _SLOWEST

        def once() -> Any:
            found = _call(system, verb, seconds, arguments, options)
            return found if check is None else check(found)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=_LONGEST_PAUSE),
            stop=tenacity.stop_after_attempt(_TRIES),
            reraise=True,
        )
        try:
            return retrying(once)
        except (FileNotFoundError, FileExistsError):
            raise
        except Exception as error:  # each storage has errors of its own
            if _code(error) in ("PreconditionFailed", "ConditionalRequestConflict", "412"):
                raise FileExistsError(self.url) from error
            if options.get("mode") == "create" and isinstance(error, _REFUSED):
                raise _Unfit from error
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{doing} {self} failed: {_text(error)}\n{_remedy(error)}") from error


class _Unfit(Exception):
    """The storage doesn't know what was asked of it."""


def shown(url: str) -> str:
    """A URL for people and logs: what may be a secret in it is left out."""
    scheme, separator, rest = url.partition("://")
    if scheme.lower() in _WEB and "?" in rest:
        rest = rest.partition("?")[0] + "?…"
    host, slash, path = rest.partition("/")
    if "@" in host and scheme not in ("az", "abfs"):
        host = "…@" + host.rpartition("@")[2]
    return f"{scheme}{separator}{host}{slash}{path}"


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


def _bare(path: RemotePath) -> str:
    return path.url.rstrip("/") if path.is_web else path.url.partition("://")[2].rstrip("/")


@lru_cache(maxsize=16)
def _file_system(scheme: str, process: int) -> Any:
    """One for each process: connections don't survive a fork."""
    try:
        import fsspec

        return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **_options(scheme))
    except ImportError as error:
        missing = f"pip install 'pseudolabel[{EXTRAS[scheme]}]'"
        raise StorageError(f"{scheme}:// needs a package that is not installed: {missing}") from error
    except Exception as error:  # of a storage's own kind: no credentials, a broken configuration
        raise StorageError(f"{scheme}:// can't be used: {_text(error)}\n{_remedy(error)}") from error


def _options(scheme: str) -> dict[str, Any]:
    """Time limits, and no retries of the library's own: they would multiply with those here."""
    from fsspec.config import conf

    known: dict[str, Any] = conf.get(scheme, {})
    if scheme == "s3":
        own: dict[str, Any] = {"connect_timeout": 10, "read_timeout": 30, "retries": {"total_max_attempts": 1}}
        own["response_checksum_validation"] = "when_required"  # some servers give a piece the sum of the whole
        importlib.import_module("s3fs")
        return {"config_kwargs": {**own, **known.get("config_kwargs", {})}}
    if scheme in _WEB:
        aiohttp = importlib.import_module("aiohttp")
        limits = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)
        return {"client_kwargs": {"timeout": limits, "trust_env": True, **known.get("client_kwargs", {})}}
    return {}


def _call(system: Any, verb: str, seconds: float, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """One try. Of a file system that works asynchronously, ended after `seconds`."""
    if not system.async_impl or verb == "glob":
        return getattr(system, verb)(*arguments, **options)
    from fsspec.asyn import sync

    if verb == "ls" and "refresh" in system._ls.__code__.co_varnames:
        options = {**options, "refresh": True}
    if hasattr(system, "retries"):
        system.retries = 1
    return sync(system.loop, getattr(system, f"_{verb}"), *arguments, timeout=seconds, **options)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _code(error: BaseException) -> str:
    """What S3 calls the error, or ''."""
    for one in _causes(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _status(error: BaseException) -> int:
    """The HTTP status, or 0."""
    for one in _causes(error):
        response = getattr(one, "response", None)
        facts = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        found = facts.get("HTTPStatusCode") or getattr(one, "status", None) or getattr(one, "status_code", None)
        if isinstance(found, int):
            return found
    return 0


def _may_pass(error: BaseException) -> bool:
    """Whether asking again may help."""
    if not isinstance(error, Exception) or isinstance(error, (StorageError, MemoryError, *_FINAL)):
        return False
    if _code(error) in _PASSING_CODES:
        return True
    status = _status(error)
    if status:
        return status >= 500 or status in _PASSING_STATUS or status < 300
    if any("Credential" in type(one).__name__ or "ProfileNotFound" in type(one).__name__ for one in _causes(error)):
        return False
    return not isinstance(error, _REFUSED)


_REMEDY_PLACE = "check the name of the bucket and the path"


def _remedy(error: BaseException) -> str:
    names = " ".join(type(one).__name__ for one in _causes(error))
    if isinstance(error, PermissionError) or "Credential" in names or _status(error) in (401, 403):
        return "check the credentials in your environment, and what they are allowed to do there"
    if isinstance(error, FileNotFoundError):
        return _REMEDY_PLACE
    return f"it was tried {_TRIES} times; check the network and the service, then run the same command again"


def _absent(path: RemotePath) -> StorageError:
    return StorageError(f"reading {path} failed: there is no such file\n{_REMEDY_PLACE}")


def _text(error: BaseException) -> str:
    """The error in one line, without what may be a secret."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]+", r"\1?…", text)
    return re.sub(r"://[^\s/@]+@", "://…@", text)[:300]
