"""Which shards are meant: `list_shards` makes sorted `Shard`s of a directory, a glob, a brace range or a list, on a
disk or at a URL.

A shard's name is its identity in a store, so no two of a listing share one.
"""

from __future__ import annotations

import glob
import math
import os
import posixpath
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pseudolabel import storage
from pseudolabel.errors import MissingFile, ShardListError, StorageError
from pseudolabel.storage import shown, spool

_MAX_SHARDS = 1 << 22
_MAX_NESTING = 8
_LIST_FROM = 8  # shards of one directory: from here on a listing is quicker than a question each
_RANGE = re.compile(r"\{(-?\d{1,30})\.\.(-?\d{1,30})(?:\.\.-?\d+)?\}")


@dataclass(frozen=True)
class Shard:
    """One tar file. `name` is its file stem, unique in a corpus; `path` says where it lies; `size` is in bytes where
    the listing of an object storage told it.
    """

    name: str
    path: str
    size: int | None = field(default=None, compare=False)

    @property
    def where(self) -> str:
        """`path` for people: without what may be a secret in a URL."""
        return shown(self.path) if storage.is_remote(self.path) else self.path


ShardsLike = str | os.PathLike[str] | Iterable[Shard | str | os.PathLike[str]]


def list_shards(spec: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Shard]:
    """The shards that `spec` names, sorted by name: a directory, a file, a glob, a brace range, `@list.txt`, or
    several.

    Raises:
        ShardListError: nothing is there, or two shards share a name.
        StorageError: they are at URLs, and there is no place to fetch them to.
    """
    specs = [spec] if isinstance(spec, (str, os.PathLike)) else list(spec)
    paths = {path: size for one in specs for path, size in _expand(os.fspath(one))}
    if not paths:
        raise ShardListError("no shards given")
    by_name: dict[str, str] = {}
    for path in paths:
        name = (storage.location(path).name if storage.is_remote(path) else os.path.basename(path)).removesuffix(".tar")
        if not name.isascii() and not _is_utf8(name):
            raise ShardListError(
                f"{os.fsencode(path)!r}: this file name is not UTF-8; rename the shard, or set PYTHONUTF8=1"
            )
        if not name or name.startswith("."):
            raise ShardListError(f"{shown(path)}: a shard's name must not begin with a dot: rename it")
        other = by_name.setdefault(name, path)
        if other != path and real_place(other) != real_place(path):
            raise ShardListError(
                f"two shards are named {name!r}: {shown(other)} and {shown(path)}\na shard's file name is its "
                "identity in a store: rename one of them"
            )
    if any(storage.is_remote(path) for path in paths):
        spool.check()
    return [Shard(name, by_name[name], paths[by_name[name]]) for name in sorted(by_name)]


def real_place(path: str) -> str:
    """What two names of one file have in common."""
    return path if storage.is_remote(path) else os.path.realpath(path)


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # a byte that the file system's encoding could not make sense of
        return False
    return True


def _expand(spec: str, nesting: int = 0) -> list[tuple[str, int | None]]:
    """Paths or URLs, with their sizes where a listing told them."""
    if not spec:
        raise ShardListError("an empty text names no shards; is a variable unset?")
    if spec.startswith("@"):
        return _of_list(storage.location(spec[1:]), nesting)
    found = storage.location(spec)
    return _remote(found) if isinstance(found, storage.RemotePath) else [(path, None) for path in _local(str(found))]


def _of_list(listing: storage.Location, nesting: int) -> list[tuple[str, int | None]]:
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ShardListError(f"{listing}: can't read this list of shards: {error}") from error
    if nesting > _MAX_NESTING:
        raise ShardListError(f"{listing}: lists in lists without end; does one name itself?")
    texts = [text for line in lines if (text := line.strip()) and not text.startswith("#")]
    plain = [text for text in texts if storage.is_remote(text) and text.endswith(".tar") and not _is_pattern(text)]
    sizes = _sizes([storage.RemotePath(text) for text in plain])  # asked for together, not one by one
    found = [one for text in texts for one in ([(text, sizes[text])] if text in sizes else _expand(text, nesting + 1))]
    if not found:
        raise ShardListError(f"{listing}: lists no shards; write one path a line")
    return found


def _local(path: str) -> list[str]:
    if os.path.isdir(path):
        found = sorted(str(tar) for tar in Path(path).glob("*.tar") if not tar.name.startswith("."))
        if not found:
            raise ShardListError(f"{path}: no *.tar in this directory; make shards with `pseudolabel pack`")
        return found
    if os.path.exists(path):
        return [path]
    if "{" in path:
        found = [one for pattern in _braces(path) for one in (sorted(glob.glob(pattern)) or [pattern])]
        missing = [one for one in found if not os.path.exists(one)]
        if missing:
            raise ShardListError(
                f"{path}: {len(missing)} of {len(found)} shards are missing, the first is {missing[0]}"
            )
        return [path for one in found for path in _local(one)]
    found = [one for one in sorted(glob.glob(path, recursive=True)) if not os.path.isdir(one)]
    if not found:
        raise ShardListError(f"{path}: no such shard, and nothing matches it as a glob; check the path")
    return found


def _remote(place: storage.RemotePath) -> list[tuple[str, int | None]]:
    if any(sign in place.url.split("/")[2] for sign in "*?") and not place.is_web:
        raise ShardListError(f"{place}: a bucket can't be a pattern; name it, and write wildcards behind it")
    if place.suffix == ".tar" and _is_pattern(place.url) and (size := _size_of_name(place)) is not None:
        return [(place.url, size)]
    if "{" in place.url:
        named = [storage.RemotePath(url) for url in _braces(place.url)]
        patterns = [one for one in named if _is_pattern(one.url)]
        sizes = _sizes([one for one in named if one not in patterns])
        return [*sizes.items(), *(found for pattern in patterns for found in _remote(pattern))]
    if _is_pattern(place.url):
        fixed = re.split(r"/(?=[^/]*[*?\[])", place.url, maxsplit=1)
        found = storage.RemotePath(fixed[0]).glob(fixed[1])
        if not found:
            raise ShardListError(f"{place}: nothing matches; check the path")
        return [(one.url, entry.size) for one, entry in found]
    if place.suffix == ".tar":
        return list(_sizes([place]).items())
    listed: list[tuple[str, int | None]] = [((place / one.name).url, one.size) for one in storage.entries(place)]
    tars = [(url, size) for url, size in listed if url.endswith(".tar") and not posixpath.basename(url).startswith(".")]
    if not tars:
        raise ShardListError(f"{place}: no *.tar right below; check the path, or put shards there")
    return tars


def _size_of_name(place: storage.RemotePath) -> int | None:
    """The size of a file that has just this name, as one on a disk may: it is a name first, then a pattern."""
    try:
        return place.entry().size
    except MissingFile:
        return None
    except StorageError as error:  # some say so of what isn't there
        if storage.is_refused(error):
            return None
        raise


def _sizes(places: Sequence[storage.RemotePath]) -> dict[str, int | None]:
    """The size of each; many in one directory are found by listing it. Raises `ShardListError` if some are missing."""
    by_parent: dict[storage.RemotePath, list[storage.RemotePath]] = {}
    for place in places:
        by_parent.setdefault(place.parent, []).append(place)
    sizes: dict[str, int | None] = {}
    singly = [one for parent, ones in by_parent.items() if len(ones) < _LIST_FROM or parent.is_web for one in ones]
    known = dict(zip(singly, storage.entries_of(singly), strict=True))
    for parent in by_parent.keys() - {one.parent for one in singly}:
        listed = {one.name: one for one in storage.entries(parent, [one.name for one in by_parent[parent]])}
        known |= {one: listed.get(one.name) for one in by_parent[parent]}
    missing = [one for one in places if known[one] is None]
    if missing:
        missing[0].parent.is_web or missing[0].parent.is_dir()  # says so if there is no such bucket
        raise ShardListError(f"{len(missing)} of {len(places)} shards are missing, the first is {missing[0]}")
    for place in places:
        entry = known[place]
        sizes[place.url] = None if entry is None else entry.size
    return sizes


def _is_pattern(url: str) -> bool:
    """Whether it has wildcards. A web server can't be asked what matches; its ? begins a query."""
    return not url.startswith("http") and any(sign in url for sign in "*?[{")


def _braces(spec: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        lengths = (abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(spec))
        if math.prod(lengths) > _MAX_SHARDS:  # they are made at once
            raise ShardListError(f"{shown(spec)}: its braces name more than {_MAX_SHARDS} shards; check the range")
        return list(braceexpand(spec))
    except ValueError as error:
        raise ShardListError(f"{shown(spec)}: no such shard, and its braces don't match up; check the range") from error


def as_shards(shards: ShardsLike) -> list[Shard]:
    """Shards as a verb was given them: listed already, as `list_shards` takes them, or both. Raises
    `ShardListError`.
    """
    if isinstance(shards, (str, os.PathLike)):
        return list_shards(shards)
    given = list(shards)
    listed = [one for one in given if isinstance(one, Shard)]
    places = [one for one in given if not isinstance(one, Shard)]
    listed += list_shards(places) if places else []
    by_name: dict[str, Shard] = {}
    for shard in listed:
        if not shard.name or shard.name.startswith(".") or "/" in shard.name:
            raise ShardListError(f"{shard.where}: {shard.name!r} can't be a shard's name; take its file's, less .tar")
        other = by_name.setdefault(shard.name, shard)
        if other.path != shard.path and real_place(other.path) != real_place(shard.path):
            raise ShardListError(
                f"two shards are named {shard.name!r}: {other.where} and {shard.where}\n"
                "a shard's name is its identity in a store: give them different ones"
            )
    return list(by_name.values())


def slice_shards(shards: list[Shard], part_of: str | None) -> list[Shard]:
    """Every n-th shard from the i-th on, for `i/n` (i from 0): slices of one listing are disjoint and complete.
    Raises `ShardListError`.
    """
    if part_of is None:
        return shards
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", part_of)
    if match is None or not int(match[1]) < int(match[2]):
        raise ShardListError(f"--slice {part_of!r}: write i/n with i from 0 to n-1, such as 0/4")
    chosen = shards[int(match[1]) :: int(match[2])]
    if not chosen:
        raise ShardListError(f"--slice {part_of}: empty, there are only {len(shards)} shards; use fewer slices")
    return chosen
