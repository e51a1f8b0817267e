"""What must hold of a part by itself: its facts, columns, order, keys and values. And of a part beside its shard.

Columnar throughout: 10,000 rows of topk:10 take a few milliseconds, whatever is wrong with them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pseudolabel.classes.numbers import read_class
from pseudolabel.errors import DamagedPart, StoreMismatch
from pseudolabel.interfaces import Encoding
from pseudolabel.labels import schema
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.schema import PartInfo
from pseudolabel.labels.store import StoreIdentity
from pseudolabel.labels.values import wrong_values
from pseudolabel.shards import ShardFile
from pseudolabel.storage import Location

_STAGES = ("label", "decode", "forward")
_NO_LABEL = -1
_VALUES = 1 << 21  # looked at together: a cache's worth, and no second part in memory


def stored_fields(identity: StoreIdentity) -> list[pa.Field]:
    """The columns that hold logits: the encoding's, then those of an ensemble's members if they are kept. Raises
    `SpecError` for an encoding that this version doesn't know.
    """
    own = parse_encoding(identity.encoding).fields(identity.num_classes)
    kept = identity.teacher.get("members") if identity.teacher.get("members_kept") else None
    members = [field.with_name(f"member{number}_{field.name}") for number in range(len(kept or ())) for field in own]
    return [*own, *members]


def check_part(path: Location, identity: StoreIdentity, info: PartInfo, part: pa.Table, rejects: pa.Table) -> None:
    """Everything that a part and its rejects say, against the store and each other. Raises `DamagedPart`,
    `StoreMismatch`.
    """
    fields = stored_fields(identity)
    _check_facts(path, identity, info)
    _check_columns(path, part.schema, schema.part_schema(fields, augmented=identity.num_views > 1))
    check_rejects(path, info.shard, rejects)
    _check_counts(path, info, identity.num_views, part, rejects)
    _check_order(path, info, identity.num_views, part, rejects)
    _check_keys(path, identity.num_views, part, rejects)
    with np.errstate(all="ignore"):  # what overflows is wrong, and will be said to be
        for batch in part.to_batches(max(_VALUES // identity.num_classes, 1)):
            for what, rows_N in wrong_values(batch, fields, identity.encoding, identity.num_classes):
                if rows_N.any():
                    row = {name: batch.column(name)[int(rows_N.argmax())].as_py() for name in batch.schema.names[:6]}
                    raise _wrong(path, f"view {row['view']} of {row['key']!r}: {what}{_shown_view(row)}")


def check_rejects(path: Location, shard: str, rejects: pa.Table) -> None:
    """A ledger's columns and what they name. Raises `DamagedPart`."""
    _check_columns(path, rejects.schema, schema.REJECT_SCHEMA, "rejects")
    if any(column.null_count for column in rejects.columns):
        raise _wrong(path, "a reject lacks a value")
    stages, shards = rejects["stage"].unique().to_pylist(), rejects["shard"].unique().to_pylist()
    if not set(stages) <= set(_STAGES) or not set(shards) <= {shard}:
        raise _wrong(path, f"its rejects are of the stages {stages} and of {shards}")


def check_beside(path: Location, opened: ShardFile, info: PartInfo, part: pa.Table, rejects: pa.Table) -> None:
    """A part whose rows are in order, against its shard: content, keys, labels. Raises `StoreMismatch`,
    `DamagedPart`.
    """
    where = opened.shard.where
    if opened.size != info.size or opened.sha256() != info.sha256:
        raise StoreMismatch(
            f"{where}: its content is not what was annotated; put the old shard back, or delete its part and "
            "annotate again"
        )
    if len(opened) != info.samples:
        raise _wrong(path, f"it tells of {info.samples} samples, {where} has {len(opened)}")
    keys = pa.array(opened.keys, pa.string())
    for table in (part, rejects):
        wanted = keys.take(table["index"].combine_chunks())
        wrong_N = np.not_equal(wanted.to_numpy(zero_copy_only=False), table["key"].to_numpy())
        if wrong_N.any():
            row = int(wrong_N.argmax())
            index, key = table["index"][row].as_py(), table["key"][row].as_py()
            raise _wrong(path, f"sample {index} of {where} is {wanted[row].as_py()!r}, the store's label is of {key!r}")
    _check_labels(path, opened, part)


def _check_labels(path: Location, opened: ShardFile, part: pa.Table) -> None:
    index_N, label_N = part["index"].to_numpy(), part["label"].fill_null(_NO_LABEL).to_numpy()
    own = {index: read_class(opened, index) for index in np.unique(index_N).tolist()}
    for index, label in zip(index_N.tolist(), label_N.tolist(), strict=True):
        wanted = _NO_LABEL if own[index] is None else own[index]
        if wanted != label:
            raise _wrong(path, f"the label of {opened.keys[index]!r} is {label}, {opened.shard.where} has {wanted}")


def _check_facts(path: Location, identity: StoreIdentity, info: PartInfo) -> None:
    if (info.encoding, info.num_classes) != (identity.encoding, identity.num_classes):
        raise StoreMismatch(
            f"{path}: encoding {info.encoding} of {info.num_classes} classes; the store's is "
            f"{identity.encoding} of {identity.num_classes}"
        )
    for name in ("size", "samples", "rejects"):
        number = getattr(info, name)
        if type(number) is not int or number < 0:
            raise _wrong(path, f"its metadata says {name} is {number!r}")
    sha256 = str(info.sha256)
    if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        raise _wrong(path, f"its metadata says sha256 is {sha256[:80]!r}")
    if not _is_fidelity(info.fidelity, parse_encoding(identity.encoding)):
        raise _wrong(path, "its metadata holds no fidelity by temperature")


def _is_fidelity(found: Any, encoding: Encoding) -> bool:
    wanted = {f"{temperature:g}" for temperature in encoding.temperatures}
    return (
        isinstance(found, dict)
        and found.keys() == {"mean", "p99"}
        and all(isinstance(one, dict) and one.keys() == wanted for one in found.values())
        and all(type(value) in (int, float) and value >= 0 for one in found.values() for value in one.values())
    )


def _check_columns(path: Location, found: pa.Schema, wanted: pa.Schema, of: str = "columns") -> None:
    if found.names != wanted.names:
        raise _wrong(path, f"its {of} are {', '.join(found.names)}, not {', '.join(wanted.names)}")
    for field, right in zip(found, wanted, strict=True):
        if not field.equals(right):
            kind = f"{right.type}{'' if right.nullable else ' without nulls'}"
            raise _wrong(path, f"its column {field.name} is of type {field.type}, not {kind}")


def _check_counts(path: Location, info: PartInfo, views: int, part: pa.Table, rejects: pa.Table) -> None:
    if part.num_rows != (info.samples - info.rejects) * views or rejects.num_rows != info.rejects:
        each = f" of {views} views" if views > 1 else ""
        raise _wrong(
            path,
            f"{part.num_rows} rows and {rejects.num_rows} rejects for {info.samples} samples{each}, {info.rejects} of "
            "them rejects",
        )


def _check_order(path: Location, info: PartInfo, views: int, part: pa.Table, rejects: pa.Table) -> None:
    rejected = rejects["index"].to_numpy()
    labeled = np.setdiff1d(np.arange(info.samples), rejected)
    in_order = np.array_equal(part["index"].to_numpy(), np.repeat(labeled, views))
    in_order &= np.array_equal(part["view"].to_numpy(), np.tile(np.arange(views), len(labeled)))
    if not in_order or (np.diff(rejected) <= 0).any() or len(labeled) + len(rejected) != info.samples:
        raise _wrong(
            path,
            "rows are out of order, a sample is in neither or both of part and rejects, or a view is missing or twice "
            "there",
        )


def _check_keys(path: Location, views: int, part: pa.Table, rejects: pa.Table) -> None:
    """One key for all views of a sample, none for two samples."""
    if part["key"].null_count:
        raise _wrong(path, "a row has no key")
    together = pa.chunked_array([*part["key"].chunks, *rejects["key"].chunks], pa.string()).combine_chunks()
    encoded = together.dictionary_encode()
    codes: NDArray[np.int32] = encoded.indices.to_numpy(zero_copy_only=False)
    of_samples_SV, of_rejects = codes[: part.num_rows].reshape(-1, views), codes[part.num_rows :]
    if (of_samples_SV != of_samples_SV[:, :1]).any():
        raise _wrong(path, "the views of a sample have different keys")
    counts = np.bincount(np.concatenate([of_samples_SV[:, 0], of_rejects]), minlength=1)
    if counts.max(initial=0) > 1:
        raise _wrong(path, f"two samples have the key {encoded.dictionary[int(counts.argmax())].as_py()!r}")


def _shown_view(row: dict[str, Any]) -> str:
    return f" (crop {row['crop']}, flip {row['flip']}, seed {row['aug_seed']})" if "crop" in row else ""


def _wrong(path: Location, what: str) -> DamagedPart:
    return DamagedPart(f"{path}: {what}; delete it and annotate again")
