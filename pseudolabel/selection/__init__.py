"""A selection: which soft labels of a store count, and with what weight.

    SELECTION/selection.json           what was asked, what was found, and what of: written last
    SELECTION/parts/<shard>.parquet    index, view, weight of the rows that count, in the store's order

It is a value beside the store, which stays as it is: another selection never needs the teacher again. Weights have a
mean of 1 over all rows, so that a selection doesn't change how much soft labels count against labels.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pseudolabel import storage
from pseudolabel.errors import DamagedPart, OutputExists, SelectionError, StoreError, StoreMismatch
from pseudolabel.labels import schema
from pseudolabel.labels.store import Store
from pseudolabel.outputs import check_outside_stores
from pseudolabel.storage import Location

FORMAT_VERSION = 1
_BEGUN = "begun.json"  # a selection that is being written: what lies beside it is ours
_OWN = {"selection.json", _BEGUN, "parts"}
SCHEMA = pa.schema(
    [
        pa.field("index", pa.int32(), nullable=False),
        pa.field("view", pa.int16(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Selection:
    """An open selection. `facts` is all of selection.json."""

    root: Location
    facts: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        return str(self.facts["fingerprint"])

    @property
    def rows(self) -> Mapping[str, int]:
        """How many samples of each shard were selected."""
        found: Mapping[str, int] = self.facts["shards"]
        return found

    def read(self, shard: str, sha256: str) -> pa.Table:
        """Index, view and weight of the rows of a shard with this content, the whole file verified.

        Raises:
            SelectionError: the file is of another selection, or another content was annotated when this was selected.
            DamagedPart.
        """
        path = part_path(self.root, shard)
        metadata = schema.read_metadata(path)
        if (metadata.get("selection"), metadata.get("shard")) != (self.fingerprint, shard):
            raise SelectionError(f"{path}: isn't of this selection and shard; put its own file back, or select anew")
        if metadata.get("sha256") != sha256:
            raise SelectionError(f"{path}: shard {shard!r} was replaced since this was selected; select anew")
        return schema.read_table(path)

    def check(self, store: Store) -> None:
        """Raise `StoreMismatch` if it was made from another store."""
        if self.facts["store"] != store.fingerprint:
            raise StoreMismatch(
                f"{self.root}: selects from the store with fingerprint {self.facts['store'][:12]}, {store.root} has "
                f"{store.fingerprint[:12]}\nselect from this store, or train with the other"
            )


def open_selection(root: str | os.PathLike[str]) -> Selection:
    """Raises `SelectionError` if there is none, or it was edited."""
    directory = storage.location(root)
    path = directory / "selection.json"
    if not path.exists():
        raise SelectionError(f"{directory}: no selection here (no selection.json); make one with `pseudolabel select`")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {facts['format_version']}, this version reads {FORMAT_VERSION}")
        if facts["fingerprint"] != fingerprint(facts):
            raise ValueError("it was edited, its fingerprint no longer fits")
        return Selection(directory, facts)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SelectionError(f"{path}: can't be read ({error}); select anew") from error


def _is_ours(path: Location) -> bool:
    """Whether a file is a part of some selection."""
    try:
        return path.name.endswith(".parquet") and "selection" in schema.read_metadata(path)
    except (DamagedPart, StoreError):
        return False


def fingerprint(facts: Mapping[str, Any]) -> str:
    """SHA-256 of all facts but itself, as canonical JSON."""
    others = {name: value for name, value in facts.items() if name != "fingerprint"}
    return hashlib.sha256(json.dumps(others, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def part_path(root: Location, shard: str) -> Location:
    return root / "parts" / f"{shard}.parquet"


def check_place(root: Location, *, overwrite: bool) -> None:
    """Raise `OutputExists` if `root` holds a selection that is not to be overwritten, or anything that is none: the
    parts of a store have the same names. So it does if `root` lies in a store.
    """
    if not storage.is_remote(root) and isinstance(root, Path) and root.exists() and not root.is_dir():
        raise OutputExists(f"{root}: is a file; choose another --out")
    names = {one.name for one in root.iterdir()} if storage.is_remote(root) or root.exists() else set()
    strangers = sorted(name for name in names - _OWN if not storage.is_temporary(name))
    if strangers or ("parts" in names and not names & {_BEGUN, "selection.json"}):
        raise OutputExists(
            f"{root}: holds {(strangers or ['parts'])[0]!r}, which is not of a selection; choose another --out"
        )
    check_outside_stores(root)
    if "selection.json" in names and not overwrite:
        raise OutputExists(f"{root}: holds a selection; add --overwrite, or choose another --out")


def write_selection(
    root: Location,
    facts: Mapping[str, Any],
    parts: Iterator[tuple[str, pa.Table]],
    sha256: Mapping[str, str],
    *,
    overwrite: bool,
) -> Selection:
    """Write the parts, of shards with these hashes, then selection.json, which makes it one. What was there of another
    one is removed first. Raises `StorageError`, and `OutputExists` if another process was quicker or is at work there.
    """
    facts = {"format_version": FORMAT_VERSION, "kind": "selection", **facts}
    facts["fingerprint"] = fingerprint(facts)
    with storage.held(root):
        check_place(root, overwrite=overwrite)
        for directory in (root, root / "parts"):
            storage.remove_stale(directory)
        _write(root, facts, parts, sha256)
    return Selection(root, facts)


def _write(
    root: Location, facts: Mapping[str, Any], parts: Iterator[tuple[str, pa.Table]], sha256: Mapping[str, str]
) -> None:
    storage.write_atomic(root / _BEGUN, json.dumps({"fingerprint": facts["fingerprint"]}) + "\n")
    storage.discard(root / "selection.json")
    names = set()
    for shard, table in parts:
        belongs = {"selection": facts["fingerprint"], "shard": shard, "sha256": sha256[shard]}
        metadata = {"format_version": schema.FORMAT_VERSION, **belongs}
        schema.write_sealed(part_path(root, shard), table, metadata)
        names.add(f"{shard}.parquet")
    for stale in storage.entries(root / "parts"):
        if stale.name not in names and _is_ours(root / "parts" / stale.name):
            storage.discard(root / "parts" / stale.name)
    storage.write_atomic(root / "selection.json", json.dumps(facts, indent=1) + "\n")
    storage.discard(root / _BEGUN)
