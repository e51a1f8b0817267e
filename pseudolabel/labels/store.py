"""The store: a directory of parts with one identity, on a disk or in an object storage.

    STORE/store.json               identity, written first
    STORE/parts/<shard>.parquet    present means whole
    STORE/rejects/<shard>.parquet  only where there are any; written before the part
    STORE/log/*.jsonl              timings and hosts; never part of identity

Committing a shard: rejects (or their removal), then the part, by rename or as one put. The part is the mark that the
shard is done.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pseudolabel import storage
from pseudolabel.errors import StoreError, StoreMismatch
from pseudolabel.labels import schema
from pseudolabel.labels.schema import FORMAT_VERSION, PartInfo
from pseudolabel.storage import Entry, Location


@dataclass(frozen=True)
class StoreIdentity:
    """What makes a store's labels what they are. Equal identities have equal fingerprints, whatever the paths."""

    teacher: Mapping[str, Any]
    classes: tuple[str, ...]
    encoding: str
    views: Mapping[str, Any]
    precision: str

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def num_views(self) -> int:
        """Rows of a sample."""
        return int(self.views["count"])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the identity as canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "teacher": dict(self.teacher),
            "classes": list(self.classes),
            "encoding": self.encoding,
            "views": dict(self.views),
            "precision": self.precision,
        }


@dataclass(frozen=True)
class Store:
    """An open store. Make one with `create` (annotate) or `open_store` (all others)."""

    root: Location
    identity: StoreIdentity

    @property
    def fingerprint(self) -> str:
        return self.identity.fingerprint

    def part_path(self, shard: str) -> Location:
        return self.root / "parts" / f"{shard}.parquet"

    def rejects_path(self, shard: str) -> Location:
        return self.root / "rejects" / f"{shard}.parquet"

    def part_names(self) -> list[str]:
        """Shards that are done, sorted. One listing of the directory."""
        return [one.name.removesuffix(".parquet") for one in self.part_files()]

    def part_files(self, near: Iterable[str] = ()) -> list[Entry]:
        """The part files, by name, with size and version. One listing of the directory; shards whose parts are likely
        there, `near`, make that of a remote store quicker.
        """
        files = storage.entries(self.root / "parts", [f"{shard}.parquet" for shard in near])
        return [one for one in files if one.name.endswith(".parquet") and not one.name.startswith(".")]

    def info(self, shard: str, size: int | None = None) -> PartInfo:
        """What a part says of itself; it must belong to this store and to this shard. `size`, where it is known from a
        listing, saves a remote store a question.

        Raises:
            StoreMismatch, DamagedPart.
        """
        info = schema.read_info(self.part_path(shard), size)
        self._check_own(info, shard)
        return info

    def _check_own(self, info: PartInfo, shard: str) -> None:
        path = self.part_path(shard)
        if info.fingerprint != self.fingerprint:
            raise StoreMismatch(
                f"{path}: made with fingerprint {info.fingerprint[:12]}, this store has {self.fingerprint[:12]}\n"
                "it was copied here from another store: delete it and annotate again"
            )
        if info.shard != shard:
            raise StoreMismatch(
                f"{path}: holds the labels of shard {info.shard!r}, not {shard!r}; give it its own name back"
            )

    def read(self, shard: str, columns: list[str] | None = None) -> pa.Table:
        """A part's rows, whole file verified. Raises `DamagedPart`, `StorageError`."""
        return schema.read_table(self.part_path(shard), columns)

    def read_columns(self, shard: str, columns: Sequence[str]) -> pa.Table:
        """Some columns of a part, in the order asked for, and little else is read: their page checksums are verified,
        the file's hash is not. For looking at many rows; training uses `read`.

        Raises:
            StoreMismatch, DamagedPart, StorageError, and StoreError if there is no such column.
        """
        info, table = schema.read_columns(self.part_path(shard), columns)
        self._check_own(info, shard)
        if columns and table.num_rows != (info.samples - info.rejects) * self.identity.num_views:
            raise schema.damaged(self.part_path(shard), f"it has {table.num_rows} rows for {info.samples} samples")
        return table

    def read_view(self, shard: str, columns: list[str] | None = None, *, view: int = 0) -> pa.Table:
        """A part's rows of one view, in the shard's order. Raises as `read`."""
        if self.identity.num_views == 1 and view == 0:
            return self.read(shard, columns)
        table = self.read(shard, None if columns is None else list({**dict.fromkeys(columns), "view": None}))
        found = table.filter(pc.equal(table["view"], view))
        return found if columns is None else found.select(columns)

    def read_rejects(self, shard: str) -> pa.Table:
        """A shard's rejects, empty where there are none. Raises `DamagedPart`."""
        path = self.rejects_path(shard)
        if not (path.name in self._remote_rejects if storage.is_remote(path) else path.exists()):
            return schema.REJECT_SCHEMA.empty_table()
        metadata = schema.read_metadata(path)
        if (metadata.get("fingerprint"), metadata.get("shard")) != (self.fingerprint, shard):
            raise StoreMismatch(
                f"{path}: these are not the rejects of shard {shard!r} in this store; put its own file back"
            )
        return schema.read_table(path)

    @cached_property
    def _remote_rejects(self) -> frozenset[str]:
        """The rejects files of a remote store: most shards have none, and asking for each costs a listing each."""
        return frozenset(one.name for one in storage.entries(self.root / "rejects"))

    def tidy(self) -> None:
        """Remove what writers that are gone have left half-written."""
        for directory in (self.root, self.root / "parts", self.root / "rejects"):
            storage.remove_stale(directory)

    def commit(self, info: PartInfo, part: pa.Table, rejects: pa.Table) -> None:
        """Publish a shard's labels: rejects first, the part last. Raises `StorageError`."""
        path = self.rejects_path(info.shard)
        if rejects.num_rows:
            facts = {"format_version": FORMAT_VERSION, "fingerprint": info.fingerprint, "shard": info.shard}
            schema.write_sealed(path, rejects, facts)
        else:
            storage.discard(path)
        schema.write_sealed(self.part_path(info.shard), part, info.to_json())


def create(root: str | os.PathLike[str], identity: StoreIdentity) -> Store:
    """Make the store, or open it for more parts if it has this very identity.

    Raises:
        StoreMismatch: there is a store made from something else; the message says what differs.
    """
    store = Store(storage.location(root), identity)
    path = store.root / "store.json"
    if not path.exists():
        if store.part_files():
            raise StoreError(
                f"{store.root}: holds parts but no store.json, so they can't be trusted; choose another --out"
            )
        with storage.explain_os_errors(store.root, "making"):
            for name in ("parts", "rejects", "log"):
                (store.root / name).mkdir(parents=True, exist_ok=True)
        content = {**identity.to_json(), "fingerprint": identity.fingerprint}
        storage.write_new(path, json.dumps(content, indent=1) + "\n")  # another annotate may be quicker
    found = open_store(root)
    if found.fingerprint != store.fingerprint:
        raise StoreMismatch(
            f"{store.root}: this store was made from something else:\n"
            + "\n".join(differences(found.identity.to_json(), identity.to_json())[:3])
            + "\nuse the same settings to go on with it, or another --out"
        )
    store.tidy()
    return found


def is_store(root: Location) -> bool:
    """Whether a store, be it damaged, is right there."""
    return (root / "store.json").is_file() and (root / "parts").exists()


def open_store(root: str | os.PathLike[str]) -> Store:
    """Open a store for reading.

    Raises:
        StoreError: no store there, or one of another format version, or a store.json that was edited.
    """
    directory = storage.location(root)
    path = directory / "store.json"
    if not path.exists():
        raise StoreError(f"{directory}: no store here (no store.json); make one with `pseudolabel annotate`")
    with storage.explain_os_errors(path, "reading"):
        content = path.read_bytes()
    try:
        data = json.loads(content)
        version = data["format_version"]
        if version != FORMAT_VERSION:
            raise StoreError(
                f"{path}: format version {version}, this version reads {FORMAT_VERSION}; use a matching pseudolabel"
            )
        identity = StoreIdentity(
            data["teacher"], tuple(data["classes"]), data["encoding"], data["views"], data["precision"]
        )
        fitting = data["fingerprint"] == identity.fingerprint
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(f"{path}: can't be read ({error}); put the file back from a copy, or annotate anew") from error
    if not fitting:
        raise StoreError(
            f"{path}: was edited, its fingerprint no longer fits; put the file back from a copy, or annotate anew"
        )
    return Store(directory, identity)


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str = "") -> list[str]:
    """One line per value that differs, by its dotted path."""
    lines = []
    for name in sorted(found.keys() | wanted.keys()):
        old, new = found.get(name), wanted.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{where}{name}.")
        elif old != new:
            lines.append(f"  {where}{name}: the store has {_short(old)}, this run {_short(new)}")
    return lines


def _short(value: object) -> str:
    text = f"{len(value)} values" if isinstance(value, list) and len(value) > 4 else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
