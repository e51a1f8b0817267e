"""Building a part: rows come batch by batch, the table and its facts at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from pseudolabel.decoding import DecodedBatch, Reject, ShardEnd
from pseudolabel.interfaces import Encoding
from pseudolabel.labels import schema
from pseudolabel.labels.facts import fidelity
from pseudolabel.labels.schema import PartInfo
from pseudolabel.labels.tensors import to_arrow
from pseudolabel.views.draw import View


@dataclass(frozen=True)
class AnnotatedShard:
    """All that one shard's annotation gives: the part's facts, its rows, and the rejects."""

    info: PartInfo
    part: pa.Table
    rejects: pa.Table


class PartBuilder:
    """Collects one shard's rows, `num_views` a sample, and rejects. `extra` are columns beside the encoding's."""

    def __init__(
        self,
        shard: str,
        encoding: Encoding,
        num_classes: int,
        fingerprint: str,
        num_views: int = 1,
        extra: Sequence[pa.Field] = (),
    ) -> None:
        self._shard, self._encoding, self._num_classes, self._fingerprint = shard, encoding, num_classes, fingerprint
        self._num_views, self._extra = num_views, extra
        self._keys: list[str] = []
        self._index: list[int] = []
        self._labels: list[int | None] = []
        self._views: list[View] = []
        self._rejects: list[Reject] = []
        self._columns: dict[str, list[Tensor]] = {}

    def add(self, batch: DecodedBatch, columns: Mapping[str, Tensor] | None) -> None:
        """Take a batch with its columns (`forward.encoded`), a row per (sample, view); None if nothing was decoded. A
        sample with any row that isn't finite is rejected.
        """
        self._rejects += batch.rejects
        if columns is None:
            return
        good_S = columns["finite"].view(-1, self._num_views).all(dim=-1)
        flags = good_S.tolist()
        for sample, good in enumerate(flags):
            key, index = batch.keys[sample], batch.index[sample]
            if good:
                self._keys += [key] * self._num_views
                self._index += [index] * self._num_views
                self._labels += [batch.labels[sample]] * self._num_views
                self._views += batch.views[sample]
            else:
                detail = "the teacher's logits hold NaN or infinity"
                self._rejects.append(Reject(index, key, "forward", "NonFiniteLogits", detail))
        keep = slice(None) if all(flags) else good_S.repeat_interleave(self._num_views)
        for name, column in columns.items():
            self._columns.setdefault(name, []).append(column[keep])

    def finish(self, end: ShardEnd) -> AnnotatedShard:
        """The table, in the shard's order. rows of view 0 + rejects = samples."""
        ready = {
            "key": self._keys,
            "index": self._index,
            "label": self._labels,
            "view": [view.number for view in self._views],
            "crop": [view.crop for view in self._views],
            "flip": [view.flip for view in self._views],
            "aug_seed": [view.aug_seed for view in self._views],
        }
        wanted = schema.part_schema(
            [*self._encoding.fields(self._num_classes), *self._extra], augmented=self._num_views > 1
        )
        arrays = [
            pa.array(ready[field.name], field.type)
            if field.name in ready
            else _joined(self._columns.pop(field.name, []), field.type)
            for field in wanted
        ]
        part = pa.Table.from_arrays(arrays, schema=wanted)
        assert part.num_rows + len(self._rejects) * self._num_views == end.samples * self._num_views, (
            self._shard,
            part.num_rows,
            len(self._rejects),
            end.samples,
        )
        self._rejects.sort(key=lambda reject: reject.index)
        listed: list[dict[str, Any]] = [{"shard": self._shard, **asdict(reject)} for reject in self._rejects]
        temperatures = self._encoding.temperatures
        lost = self._columns.get("divergence", [torch.zeros(0, len(temperatures))])
        info = PartInfo(
            fingerprint=self._fingerprint,
            shard=self._shard,
            size=end.size,
            sha256=end.sha256,
            samples=end.samples,
            rejects=len(self._rejects),
            encoding=self._encoding.name,
            num_classes=self._num_classes,
            fidelity=fidelity(torch.cat(lost).T, temperatures),
        )
        return AnnotatedShard(info, part, pa.Table.from_pylist(listed, schema=schema.REJECT_SCHEMA))


def _joined(tensors: list[Tensor], kind: pa.DataType) -> pa.Array:
    return to_arrow(torch.cat(tensors), kind) if tensors else pa.array([], kind)
