"""Rows of shards as training takes them: images, labels and stored soft labels, in the order of a stream.

Soft labels are read column by column; a batch's are gathered with one index a shard.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from pseudolabel.errors import LabelError, SelectionError, StoreMismatch
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.tensors import to_torch
from pseudolabel.losses import NO_LABEL
from pseudolabel.shards import Fetcher, ShardFile
from pseudolabel.storage import is_remote
from pseudolabel.training.inputs import TrainingData, TrainingShard, join
from pseudolabel.training.order import WINDOW_SHARDS, BalancedOrder, RowOrder
from pseudolabel.training.views import VIEW_COLUMNS, Presentation
from pseudolabel.views.image import UndecodableImage, decode, image_field

WEIGHT = "weight"
"""A row's weight, beside its stored columns."""

_OPEN_SHARDS = 2 * WINDOW_SHARDS


class KeptImages(Protocol):
    """Prepared images of a stream in memory: an `image_cache.ImageCache`."""

    def images(self, pairs: NDArray[np.int64]) -> Tensor | list[Tensor]:
        """Those of (shard, row) pairs, (N, 2)."""
        ...


@dataclass(frozen=True)
class Taken:
    """Rows of a stream: prepared images, labels (N,), stored columns, each (N, …)."""

    images: Tensor | list[Tensor]
    labels_N: Tensor
    columns: dict[str, Tensor]


class OpenShard:
    """A shard open for training: where its rows lie, their labels and soft labels."""

    def __init__(self, source: TrainingShard, data: TrainingData, *, labeled: bool, epoch: int = 0) -> None:
        self.file = ShardFile(source.shard)
        source.check_same(self.file)
        self.positions: Sequence[int] = range(len(self.file))
        self.columns: dict[str, Tensor] = {}
        if source.part is not None:
            clean, chosen = _read_labels(source, data, replayed=0 if labeled else data.replay, epoch=epoch)
            assert data.store is not None
            self.positions = join(self.file, clean, data.store.read_rejects(source.shard.name))
            self.columns = _tensors(chosen, data)
            if data.selection is not None and not labeled:
                self._keep(data.selection.read(source.shard.name, source.sha256))
        self.labels_N = torch.full((len(self.positions),), NO_LABEL)
        if labeled:
            assert source.labels_N is not None
            self.labels_N = torch.from_numpy(source.labels_N)

    def _keep(self, selected: pa.Table) -> None:
        """Only the rows that are selected, with their weights. Raises `SelectionError`."""
        clean = selected.filter(pc.equal(selected["view"], 0))
        places = {position: row for row, position in enumerate(self.positions)}
        try:
            rows = [places[position] for position in clean["index"].to_pylist()]
        except KeyError as error:
            raise SelectionError(
                f"{self.file.shard.where}: sample {error} is selected but has no soft label; select anew"
            ) from error
        self.positions = [self.positions[row] for row in rows]
        self.columns = {name: column[torch.tensor(rows, dtype=torch.long)] for name, column in self.columns.items()}
        self.columns[WEIGHT] = to_torch(clean["weight"])

    def image(self, row: int, presentation: Presentation) -> Tensor:
        """A row's prepared image. Raises `LabelError` if it can't be decoded."""
        position = self.positions[row]
        try:
            data = self.file.read(position, image_field(self.file.field_names(position)))
            return presentation.prepare(decode(data, presentation.shrink_to))
        except UndecodableImage as error:
            raise LabelError(
                f"{self.file.shard.where}: training sample {self.file.keys[position]!r} can't be "
                f"decoded: {error}; remove or replace it"
            ) from error


def _read_labels(source: TrainingShard, data: TrainingData, *, replayed: int, epoch: int) -> tuple[pa.Table, pa.Table]:
    """Keys and positions of a part's samples, and the row of one view of each: the clean one, or of `replayed` views
    another one each epoch.
    """
    store, shard = data.store, source.shard.name
    assert store is not None
    assert source.part is not None
    encoding = parse_encoding(source.part.encoding)
    names = ["key", "index", "pred", "confidence", *(field.name for field in encoding.fields(data.num_classes))]
    if not replayed:
        table = store.read_view(shard, names)
        return table, table
    table = store.read(shard, [*names, *VIEW_COLUMNS])
    clean = table.filter(pc.equal(table["view"], 0))
    turn_N = (np.arange(len(clean)) + epoch) % replayed + 1
    chosen = table.take(pa.array(np.arange(len(clean)) * store.identity.num_views + turn_N))
    if chosen["view"].to_numpy().tolist() != turn_N.tolist() or not chosen["index"].equals(clean["index"]):
        raise StoreMismatch(f"{store.part_path(shard)}: its views don't follow each other; run `verify` on this store")
    return clean, chosen


def _tensors(part: pa.Table, data: TrainingData) -> dict[str, Tensor]:
    assert data.store is not None
    encoding = parse_encoding(data.store.identity.encoding)
    names = [name for name in ("pred", "confidence", *VIEW_COLUMNS) if name in part.column_names]
    columns = {name: to_torch(part[name]) for name in names}
    return {**columns, **encoding.tensors(part, data.num_classes), WEIGHT: torch.ones(len(part))}


class Rows:
    """A stream of rows of many shards, opened as they are needed, the least recently used closed."""

    def __init__(
        self,
        sources: Sequence[TrainingShard],
        data: TrainingData,
        presentation: Presentation,
        *,
        labeled: bool,
        seed: int,
        kept: KeptImages | None = None,
    ) -> None:
        self._sources, self._data, self.presentation, self._labeled = sources, data, presentation, labeled
        self._order: RowOrder | BalancedOrder
        if labeled and data.balanced:
            self._order = BalancedOrder([one.labels_N for one in sources if one.labels_N is not None], seed)
        else:
            self._order = RowOrder([source.rows for source in sources], seed)
        self._open: OrderedDict[tuple[int, int], OpenShard] = OrderedDict()
        self._remote = any(is_remote(source.shard.path) for source in sources)
        self._fetcher, self._windows = Fetcher(), list[list[int]]()
        self._kept = kept

    def take(self, start: int, count: int, mine: range) -> Taken:
        """Of `count` rows of the order those that are `mine`."""
        rows_N3 = self._order.rows(start, count)
        if self._remote and (windows := self._order.windows_from(start)) != self._windows:
            self._windows = windows
            self._fetcher.ask([[self._sources[shard].shard for shard in window] for window in windows])
        if not mine:
            opened = self._get(*rows_N3[0, [0, 2]].tolist())
            return Taken([], opened.labels_N[:0], {name: values[:0] for name, values in opened.columns.items()})
        rows_N3 = rows_N3[mine.start :: mine.step]
        labels_N, columns = self._gather(rows_N3)
        if self._kept is not None:
            return Taken(self._kept.images(rows_N3[:, :2]), labels_N, columns)
        images = [self._get(shard, epoch).image(row, self.presentation) for shard, row, epoch in rows_N3.tolist()]
        return Taken(images, labels_N, columns)

    def _gather(self, rows_N3: NDArray[np.int64]) -> tuple[Tensor, dict[str, Tensor]]:
        """Labels and stored columns: shard by shard, then back into place."""
        order = np.lexsort((rows_N3[:, 2], rows_N3[:, 0]))
        sorted_N3 = rows_N3[order]
        begins = np.flatnonzero(np.any(np.diff(sorted_N3[:, [0, 2]], axis=0, prepend=-1), axis=1))
        pieces: dict[str, list[Tensor]] = {}
        for piece_N3 in np.split(sorted_N3, begins[1:]):
            opened = self._get(int(piece_N3[0, 0]), int(piece_N3[0, 2]))
            rows_N = torch.from_numpy(np.ascontiguousarray(piece_N3[:, 1]))
            for name, values in {"label": opened.labels_N, **opened.columns}.items():
                pieces.setdefault(name, []).append(values[rows_N])
        back_N = torch.from_numpy(order.argsort())
        columns = {name: torch.cat(found)[back_N] for name, found in pieces.items()}
        return columns.pop("label"), columns

    def _get(self, shard: int, epoch: int) -> OpenShard:
        key = shard, epoch if self._data.replay and not self._labeled else 0
        opened = self._open.pop(key, None)
        if opened is None:
            opened = OpenShard(self._sources[shard], self._data, labeled=self._labeled, epoch=epoch)
        self._open[key] = opened
        while len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)[1].file.close()
        return opened
