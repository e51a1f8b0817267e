"""Is a store intact? Every byte is read again: hashes, counts, order, names, and with the shards at hand their
content and keys.

A shard without a part is not a problem: it is unfinished, and the same annotate goes on with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from pseudolabel import storage
from pseudolabel.errors import DamagedPart, DamagedShard, PseudolabelError, StoreMismatch
from pseudolabel.labels import schema
from pseudolabel.labels.schema import PartInfo
from pseudolabel.labels.store import Store, open_store
from pseudolabel.shard_lists import Shard, ShardsLike, as_shards
from pseudolabel.shards import ShardFile
from pseudolabel.storage import Location


@dataclass(frozen=True)
class Problem:
    """What is wrong with which file."""

    part: str
    kind: str
    detail: str


@dataclass(frozen=True)
class VerifyResult:
    """`rows` counts those of intact parts."""

    ok: bool
    parts: int
    rows: int
    problems: tuple[Problem, ...]


def verify(store: Store | str | os.PathLike[str], shards: ShardsLike = ()) -> VerifyResult:
    """Check all parts; those of `shards` also against the shards themselves. Raises `StoreError`, `ShardListError`."""
    store = store if isinstance(store, Store) else open_store(store)
    by_name = {shard.name: shard for shard in as_shards(shards)}
    problems = list(_foreign_files(store))
    names = store.part_names()
    rows = 0
    for name in names:
        try:
            info = store.info(name)
            part, rejects = store.read(name), store.read_rejects(name)
            _check_counts(store, info, part, rejects)
            if name in by_name:
                _check_shard(by_name[name], info, part, rejects)
            rows += part.num_rows
        except PseudolabelError as error:
            problems.append(Problem(name, error.kind, str(error).splitlines()[0]))
    for name in sorted(by_name.keys() - set(names)):
        problems.append(Problem(name, "MissingPart", f"{by_name[name].where}: not annotated in this store"))
    return VerifyResult(not problems, len(names), rows, tuple(problems))


def _foreign_files(store: Store) -> Iterator[Problem]:
    for directory in ("parts", "rejects"):
        place: Location = store.root / directory
        if not storage.is_remote(place) and not place.is_dir():
            continue
        files = {one.name for one in storage.entries(place)}
        for name in sorted(one.name for one in place.iterdir()):
            if storage.is_temporary(name):
                continue  # of a killed annotate: the next one removes it
            if not name.endswith(".parquet") or name not in files:
                yield Problem(name, "ForeignFile", f"{place / name}: doesn't belong into a store; remove it")


def _check_counts(store: Store, info: PartInfo, part: pa.Table, rejects: pa.Table) -> None:
    path = store.part_path(info.shard)
    views = store.identity.num_views
    wanted = schema.part_schema(_encoding_fields(part), augmented=views > 1)
    if part.schema.names != wanted.names:
        raise DamagedPart(f"{path}: its columns are {', '.join(part.schema.names)}; delete it and annotate again")
    if info.encoding != store.identity.encoding or info.num_classes != store.identity.num_classes:
        raise StoreMismatch(
            f"{path}: encoding {info.encoding} of {info.num_classes} classes; the store's is "
            f"{store.identity.encoding} of {store.identity.num_classes}"
        )
    if part.num_rows != (info.samples - info.rejects) * views or rejects.num_rows != info.rejects:
        each = f" of {views} views" if views > 1 else ""
        raise DamagedPart(
            f"{path}: {part.num_rows} rows and {rejects.num_rows} rejects for {info.samples} samples{each}, "
            f"{info.rejects} of them rejects"
        )
    rejected = set(rejects["index"].to_pylist())
    labeled = [index for index in range(info.samples) if index not in rejected]
    in_order = [(index, view) for index in labeled for view in range(views)]
    found = list(zip(part["index"].to_pylist(), part["view"].to_pylist(), strict=True))
    if found != in_order or len(labeled) + rejects.num_rows != info.samples:
        raise DamagedPart(
            f"{path}: rows are out of order, a sample is in neither or both of part and rejects, or a view is "
            "missing or twice there"
        )
    if views > 1:
        _check_views(path, part)


def _check_views(path: Location, part: pa.Table) -> None:
    """Crops lie in their image, and view 0 is the whole of it."""
    rows = part.select(["key", "view", "crop", "flip", "aug_seed"]).to_pylist()
    for row in rows:
        top, left, height, width = row["crop"]
        clean = (row["crop"], row["flip"], row["aug_seed"]) == ([0.0, 0.0, 1.0, 1.0], False, 0)
        # float32: top and height may add up to a little more than 1
        inside = min(top, left) >= 0 < min(height, width) and max(top + height, left + width) <= 1 + 1e-6
        if not inside or (row["view"] == 0 and not clean):
            raise DamagedPart(
                f"{path}: view {row['view']} of {row['key']!r} has crop {row['crop']}, flip {row['flip']}, seed "
                f"{row['aug_seed']}, which is {'not the clean view' if inside else 'outside of its image'}"
            )


def _encoding_fields(part: pa.Table) -> list[pa.Field]:
    """The columns behind the fixed ones, taken as they are."""
    names = part.schema.names
    return [part.schema.field(name) for name in names[names.index("margin") + 1 :]] if "margin" in names else []


def _check_shard(shard: Shard, info: PartInfo, part: pa.Table, rejects: pa.Table) -> None:
    with ShardFile(shard) as opened:
        if opened.size != info.size or opened.sha256() != info.sha256:
            raise StoreMismatch(
                f"{shard.where}: its content is not what was annotated; put the old shard back, or delete its part and "
                "annotate again"
            )
        keys = dict(
            zip(
                part["index"].to_pylist() + rejects["index"].to_pylist(),
                part["key"].to_pylist() + rejects["key"].to_pylist(),
                strict=True,
            )
        )
        wrong = [index for index, key in keys.items() if opened.keys[index] != key]
        if wrong:
            raise DamagedShard(
                f"{shard.where}: sample {wrong[0]} is {opened.keys[wrong[0]]!r}, the store's label is "
                f"of {keys[wrong[0]]!r}"
            )
