"""Building a part: rows come batch by batch, the table and its facts at the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from pseudolabel.decoding import DecodedBatch, Reject, ShardEnd
from pseudolabel.interfaces import Encoding
from pseudolabel.labels import schema
from pseudolabel.labels.encodings import divergence, fidelity, summarize
from pseudolabel.labels.schema import PartInfo


@dataclass(frozen=True)
class AnnotatedShard:
    """All that one shard's annotation gives: the part's facts, its rows, and the rejects."""

    info: PartInfo
    part: pa.Table
    rejects: pa.Table


class PartBuilder:
    """Collects one shard's rows and rejects."""

    def __init__(self, shard: str, encoding: Encoding, num_classes: int, fingerprint: str) -> None:
        self._shard, self._encoding, self._num_classes, self._fingerprint = shard, encoding, num_classes, fingerprint
        self._keys: list[str] = []
        self._index: list[int] = []
        self._labels: list[int | None] = []
        self._rejects: list[Reject] = []
        self._columns: dict[str, list[Tensor]] = {}
        self._divergence: list[Tensor] = []

    def add(self, batch: DecodedBatch, logits_BC: Tensor) -> None:
        """Encode a batch; rows whose logits aren't finite become rejects."""
        self._rejects += batch.rejects
        finite = torch.isfinite(logits_BC).all(dim=-1)
        flags = finite.tolist()
        for row, good in enumerate(flags):
            if good:
                self._keys.append(batch.keys[row])
                self._index.append(batch.index[row])
                self._labels.append(batch.labels[row])
            else:
                detail = "the teacher's logits hold NaN or infinity"
                self._rejects.append(Reject(batch.index[row], batch.keys[row], "forward", "NonFiniteLogits", detail))
        if not any(flags):
            return
        logits_BC = logits_BC if all(flags) else logits_BC[finite]
        encoded = self._encoding.encode(logits_BC)
        self._divergence.append(divergence(self._encoding, encoded, logits_BC).cpu())
        for name, column in {**summarize(logits_BC), **encoded}.items():
            self._columns.setdefault(name, []).append(column.cpu())

    def finish(self, end: ShardEnd) -> AnnotatedShard:
        """The table, in the shard's order. rows + rejects = samples."""
        ready = {"key": self._keys, "index": self._index, "label": self._labels, "view": [0] * len(self._keys)}
        wanted = schema.part_schema(self._encoding.fields(self._num_classes), augmented=False)
        arrays = [
            pa.array(ready[field.name], field.type)
            if field.name in ready
            else _to_arrow(self._columns.get(field.name, []), field.type)
            for field in wanted
        ]
        part = pa.Table.from_arrays(arrays, schema=wanted)
        assert part.num_rows + len(self._rejects) == end.samples, (
            self._shard,
            part.num_rows,
            len(self._rejects),
            end.samples,
        )
        self._rejects.sort(key=lambda reject: reject.index)
        listed: list[dict[str, Any]] = [{"shard": self._shard, **asdict(reject)} for reject in self._rejects]
        lost_3N = torch.cat(self._divergence, dim=-1) if self._divergence else torch.zeros(3, 0)
        info = PartInfo(
            fingerprint=self._fingerprint,
            shard=self._shard,
            size=end.size,
            sha256=end.sha256,
            samples=end.samples,
            rejects=len(self._rejects),
            encoding=self._encoding.name,
            num_classes=self._num_classes,
            fidelity=fidelity(lost_3N),
        )
        return AnnotatedShard(info, part, pa.Table.from_pylist(listed, schema=schema.REJECT_SCHEMA))


def _to_arrow(tensors: list[Tensor], kind: pa.DataType) -> pa.Array:
    if not tensors:
        return pa.array([], kind)
    values = torch.cat(tensors).numpy()
    if pa.types.is_fixed_size_list(kind):
        flat = values.reshape(-1).astype(kind.value_type.to_pandas_dtype())
        return pa.FixedSizeListArray.from_arrays(pa.array(flat, kind.value_type), type=kind)
    return pa.array(values.astype(kind.to_pandas_dtype()), kind)
