"""Rows of a part as they are asked for by more than one: those of the clean view, and their labels checked."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from pseudolabel.errors import LabelError
from pseudolabel.labels.store import Store


def clean_rows(table: pa.Table) -> pa.Table:
    """Those of view 0."""
    return table.filter(pc.equal(table["view"], 0))


def check_labels(store: Store, shard: str, table: pa.Table) -> None:
    """Raise `LabelError` for a label that is none of the teacher's classes."""
    wrong = pc.or_(pc.less(table["label"], 0), pc.greater_equal(table["label"], store.identity.num_classes))
    if pc.any(wrong).as_py():
        first = table.filter(wrong)["label"][0].as_py()
        raise LabelError(
            f"{store.part_path(shard)}: a sample has label {first}, the teacher has {store.identity.num_classes} "
            "classes (from 0); these labels are of another label space"
        )
