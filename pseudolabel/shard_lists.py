"""Which shards are meant: `list_shards` makes sorted `Shard`s of a directory, a glob, a brace range or a list.

A shard's name is its identity in a store, so no two of a listing share one.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pseudolabel import storage
from pseudolabel.errors import ShardListError

_MAX_SHARDS = 1 << 22
_MAX_NESTING = 8
_RANGE = re.compile(r"\{(-?\d{1,30})\.\.(-?\d{1,30})(?:\.\.-?\d+)?\}")


@dataclass(frozen=True)
class Shard:
    """One tar file. `name` is its file stem, unique in a corpus; `path` says where it lies."""

    name: str
    path: str


ShardsLike = str | os.PathLike[str] | Iterable[Shard | str | os.PathLike[str]]


def list_shards(spec: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Shard]:
    """The shards that `spec` names, sorted by name: a directory, a file, a glob, a brace range, `@list.txt`, or
    several.

    Raises:
        ShardListError: nothing is there, or two shards share a name.
    """
    specs = [spec] if isinstance(spec, (str, os.PathLike)) else list(spec)
    paths = [path for one in specs for path in _expand(os.fspath(one))]
    if not paths:
        raise ShardListError("no shards given")
    by_name: dict[str, str] = {}
    for path in paths:
        name = os.path.basename(path).removesuffix(".tar")
        if not name.isascii() and not _is_utf8(name):
            raise ShardListError(
                f"{os.fsencode(path)!r}: this file name is not UTF-8; rename the shard, or set PYTHONUTF8=1"
            )
        if not name or name.startswith("."):
            raise ShardListError(f"{path}: a shard's name must not begin with a dot: rename it")
        other = by_name.setdefault(name, path)
        if other != path and os.path.realpath(other) != os.path.realpath(path):
            raise ShardListError(
                f"two shards are named {name!r}: {other} and {path}\na shard's file name is its "
                "identity in a store: rename one of them"
            )
    return [Shard(name, by_name[name]) for name in sorted(by_name)]


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # a byte that the file system's encoding could not make sense of
        return False
    return True


def _expand(spec: str, nesting: int = 0) -> list[str]:
    if not spec:
        raise ShardListError("an empty text names no shards; is a variable unset?")
    if spec.startswith("@"):
        listing = storage.local_path(spec[1:])
        try:
            lines = listing.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ShardListError(f"{listing}: can't read this list of shards: {error}") from error
        if nesting > _MAX_NESTING:
            raise ShardListError(f"{listing}: lists in lists without end; does one name itself?")
        found = [
            path
            for line in lines
            if (text := line.strip()) and not text.startswith("#")
            for path in _expand(text, nesting + 1)
        ]
        if not found:
            raise ShardListError(f"{listing}: lists no shards; write one path a line")
        return found
    path = str(storage.local_path(spec))
    if os.path.isdir(path):
        found = sorted(str(tar) for tar in Path(path).glob("*.tar") if not tar.name.startswith("."))
        if not found:
            raise ShardListError(f"{path}: no *.tar in this directory; make shards with `pseudolabel pack`")
        return found
    if os.path.exists(path):
        return [path]
    if "{" in path:
        from braceexpand import braceexpand

        try:
            lengths = (abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(path))
            if math.prod(lengths) > _MAX_SHARDS:  # they are made at once
                raise ShardListError(f"{spec}: its braces name more than {_MAX_SHARDS} shards; check the range")
            found = [one for pattern in braceexpand(path) for one in (sorted(glob.glob(pattern)) or [pattern])]
        except ValueError as error:
            raise ShardListError(f"{spec}: no such shard, and its braces don't match up; check the range") from error
        missing = [one for one in found if not os.path.exists(one)]
        if missing:
            raise ShardListError(
                f"{spec}: {len(missing)} of {len(found)} shards are missing, the first is {missing[0]}"
            )
        return [path for one in found for path in _expand(one)]
    found = [one for one in sorted(glob.glob(path, recursive=True)) if not os.path.isdir(one)]
    if not found:
        raise ShardListError(f"{spec}: no such shard, and nothing matches it as a glob; check the path")
    return found


def as_shards(shards: ShardsLike) -> list[Shard]:
    """Shards as a verb was given them: listed already, or as `list_shards` takes them. Raises `ShardListError`."""
    if isinstance(shards, (str, os.PathLike)):
        return list_shards(shards)
    given = list(shards)
    if all(isinstance(one, Shard) for one in given):
        return [one for one in given if isinstance(one, Shard)]
    return list_shards([one for one in given if not isinstance(one, Shard)])


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
