"""Training batches: labeled rows, and unlabeled rows joined to their cached soft labels.

A batch is a pure function of its step, so any process can make any batch, and a resumed run sees what an
undisturbed one would have seen. Each row is augmented from a seed of its own, so any process can make any rows of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from pseudolabel.errors import LabelError, PseudolabelError, SelectionError
from pseudolabel.inputs import TrainingData, TrainingShard, join, read_label
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.targets import StoredTargets
from pseudolabel.labels.tensors import to_torch
from pseudolabel.losses import NO_LABEL
from pseudolabel.order import WINDOW_SHARDS, RowOrder, derive_seeds
from pseudolabel.settings import AugmentSettings
from pseudolabel.shards import Fetcher, ShardFile
from pseudolabel.storage import is_remote
from pseudolabel.views.image import Preprocessing, UndecodableImage, decode, image_field, to_channels
from pseudolabel.world import ALONE, World

_OPEN_SHARDS = 2 * WINDOW_SHARDS
_WEIGHT = "weight"  # beside a row's stored columns


@dataclass(frozen=True)
class Batch:
    """uint8 pixels (B, channels, H, W), labels (B,) or `NO_LABEL`; soft labels and weights of the last rows.

    `num_labeled` and `num_soft` count rows with a label and with a soft label in the whole batch, of which these may
    be one process's share.
    """

    pixels_BCHW: Tensor
    labels_B: Tensor
    targets: StoredTargets | None
    soft_weight_B: Tensor | None
    num_labeled: int
    num_soft: int

    def pin_memory(self) -> Batch:
        """In page-locked memory, from where copies to a GPU overlap with its work. The loader calls it."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            change(self.pixels_BCHW),
            change(self.labels_B),
            self.targets.map(change) if self.targets is not None else None,
            change(self.soft_weight_B) if self.soft_weight_B is not None else None,
            self.num_labeled,
            self.num_soft,
        )


class _OpenShard:
    """A shard open for training: where its rows lie, their labels and soft labels."""

    def __init__(self, source: TrainingShard, data: TrainingData, *, labeled: bool) -> None:
        self.file, store, num_classes = ShardFile(source.shard), data.store, data.num_classes
        source.check_same(self.file)
        self.positions: Sequence[int] = range(len(self.file))
        self.columns: dict[str, Tensor] = {}
        if source.part is not None:
            assert store is not None
            encoding = parse_encoding(source.part.encoding)
            names = ["key", "index", "pred", "confidence", *(field.name for field in encoding.fields(num_classes))]
            part = store.read_view(source.shard.name, names)
            self.positions = join(self.file, part, store.read_rejects(source.shard.name))
            self.columns = {
                **{name: to_torch(part[name]) for name in ("pred", "confidence")},
                **encoding.tensors(part, num_classes),
            }
            self.columns[_WEIGHT] = torch.ones(len(part))
            if data.selection is not None and not labeled:
                self._keep(data.selection.read(source.shard.name, source.sha256))
        labels = [read_label(self.file, index, num_classes) if labeled else NO_LABEL for index in self.positions]
        self.labels = torch.tensor(labels, dtype=torch.int64)

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
        self.columns[_WEIGHT] = to_torch(clean["weight"])

    def image(self, row: int, prepare: Callable[[Tensor], Tensor]) -> Tensor:
        position = self.positions[row]
        try:
            return prepare(decode(self.file.read(position, image_field(self.file.field_names(position)))))
        except UndecodableImage as error:
            raise LabelError(
                f"{self.file.shard.where}: training sample {self.file.keys[position]!r} can't be "
                f"decoded: {error}; remove or replace it"
            ) from error


class _Rows:
    """Rows of many shards, opened as they are needed, the least recently used closed."""

    def __init__(self, sources: Sequence[TrainingShard], data: TrainingData, *, labeled: bool, seed: int) -> None:
        self._sources, self._data, self._labeled = sources, data, labeled
        self._order = RowOrder([source.rows for source in sources], seed)
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._remote = any(is_remote(source.shard.path) for source in sources)
        self._fetcher, self._windows = Fetcher(), list[list[int]]()

    def take(
        self, start: int, count: int, mine: range, prepare: Callable[[Tensor], Tensor]
    ) -> tuple[list[Tensor], Tensor, dict[str, Tensor]]:
        """Of `count` rows of the order those that are `mine`: prepared images, labels (N,) and the stored columns,
        each (N, …).
        """
        pairs = self._order.rows(start, count)
        if self._remote and (windows := self._order.windows_from(start)) != self._windows:
            self._windows = windows
            self._fetcher.ask([[self._sources[shard].shard for shard in window] for window in windows])
        if not mine:
            opened = self._get(int(pairs[0, 0]))
            return [], opened.labels[:0], {name: values[:0] for name, values in opened.columns.items()}
        pairs = pairs[mine.start :: mine.step]
        images = [self._get(shard).image(row, prepare) for shard, row in pairs.tolist()]
        order = pairs[:, 0].argsort(kind="stable")  # shard by shard, then back into place
        shards, starts = np.unique(pairs[order, 0], return_index=True)
        pieces: dict[str, list[Tensor]] = {}
        for shard, rows in zip(shards.tolist(), np.split(pairs[order, 1], starts[1:]), strict=True):
            opened = self._get(shard)
            for name, values in {"label": opened.labels, **opened.columns}.items():
                pieces.setdefault(name, []).append(values[torch.from_numpy(rows)])
        back = torch.from_numpy(order.argsort())
        columns = {name: torch.cat(found)[back] for name, found in pieces.items()}
        labels = columns.pop("label")
        return images, labels, columns

    def _get(self, shard: int) -> _OpenShard:
        opened = self._open.pop(shard, None) or _OpenShard(self._sources[shard], self._data, labeled=self._labeled)
        self._open[shard] = opened
        while len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)[1].file.close()
        return opened


class TrainingBatches(Dataset[Batch]):
    """Batch number `step` of a training run: a fixed number of labeled rows, then pseudo-labeled ones; of these rows,
    the share of process `world`.

    Pickles before its first use, so loader processes open their own shards.
    """

    def __init__(
        self,
        data: TrainingData,
        preprocessing: Preprocessing,
        augment: AugmentSettings,
        *,
        batch_size: int,
        labeled_fraction: float,
        seed: int,
        steps: int,
        world: World = ALONE,
    ) -> None:
        self._data, self._preprocessing, self._seed, self._steps = data, preprocessing, seed, steps
        self._world = world
        self._augment, self._resized = make_augment(augment, preprocessing), augment.crop == "resized"
        self.num_labeled, self.num_pseudo = split_batch(
            batch_size, labeled_fraction, has_labeled=bool(data.labeled), has_pseudo=bool(data.unlabeled)
        )
        self._streams: list[tuple[_Rows, int]] | None = None

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, step: int) -> Batch:
        taken, seeds, before = [], [], 0
        row_seeds = derive_seeds(self.num_labeled + self.num_pseudo, self._seed, 3, step)
        for stream, count in self._open():
            mine = self._world.share(count, before)
            taken.append(stream.take(step * count, count, mine, self._prepare))
            seeds += row_seeds[before : before + count][mine.start :: mine.step]
            before += count
        images = [image for found, _, _ in taken for image in found]
        with torch.random.fork_rng(devices=[]):
            pixels_BCHW = torch.stack([self._augmented(*pair) for pair in zip(images, seeds, strict=True)])
        labels_B = torch.cat([labels for _, labels, _ in taken])
        soft = [(columns, count) for (_, _, columns), (_, count) in zip(taken, self._open(), strict=True) if columns]
        if not soft:
            return Batch(pixels_BCHW, labels_B, None, None, self.num_labeled, 0)
        assert self._data.store is not None
        encoding = parse_encoding(self._data.store.identity.encoding)
        columns = {name: torch.cat([columns[name] for columns, _ in soft]) for name in soft[0][0]}
        weight_B, num_soft = columns.pop(_WEIGHT), sum(count for _, count in soft)
        return Batch(pixels_BCHW, labels_B, StoredTargets(encoding, columns), weight_B, self.num_labeled, num_soft)

    def _augmented(self, image_CHW: Tensor, seed: int) -> Tensor:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a hundred times as long
        augmented: Tensor = self._augment(image_CHW)
        return augmented

    def _open(self) -> list[tuple[_Rows, int]]:
        """The streams of rows that batches are made of, and how many rows each gives."""
        if self._streams is None:
            kinds = [(self._data.labeled, True, 1, self.num_labeled), (self._data.unlabeled, False, 2, self.num_pseudo)]
            self._streams = [
                (_Rows(sources, self._data, labeled=labeled, seed=derive_seeds(1, self._seed, number)[0]), count)
                for sources, labeled, number, count in kinds
                if count
            ]
        return self._streams

    def _prepare(self, image_CHW: Tensor) -> Tensor:
        if self._resized:
            return to_channels(image_CHW, self._preprocessing.channels)
        return self._preprocessing.prepare(image_CHW)


class CarriedErrors(Dataset["Batch | PseudolabelError"]):
    """Batches for loader processes: a known error is passed on as a value; the loader would wrap it in a traceback."""

    def __init__(self, batches: TrainingBatches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, step: int) -> Batch | PseudolabelError:
        try:
            return self._batches[step]
        except PseudolabelError as error:
            return type(error)(str(error))


def split_batch(batch_size: int, labeled_fraction: float, *, has_labeled: bool, has_pseudo: bool) -> tuple[int, int]:
    """How many labeled and pseudo-labeled rows a batch has; at least one of each kind that is used at all."""
    if not has_pseudo:
        return batch_size, 0
    if not has_labeled or labeled_fraction == 0:
        return 0, batch_size
    labeled = min(max(round(batch_size * labeled_fraction), 1), batch_size - 1)
    return (labeled, batch_size - labeled) if batch_size > 1 else (0, 1)


def make_augment(settings: AugmentSettings, preprocessing: Preprocessing) -> v2.Transform:
    """The training view of an image that is prepared already (`crop="resized"`: decoded only), uint8 in and out."""
    size = preprocessing.crop
    steps: list[torch.nn.Module] = []
    if settings.crop == "pad":
        steps.append(v2.RandomCrop(size, padding=max(size // 8, 1)))
    elif settings.crop == "resized":
        steps.append(v2.RandomResizedCrop(size, scale=(0.25, 1.0), antialias=True))
    if settings.flip:
        steps.append(v2.RandomHorizontalFlip())
    if settings.randaugment:
        steps.append(v2.RandAugment(magnitude=settings.randaugment))
    if settings.erasing:
        steps.append(v2.RandomErasing(settings.erasing, scale=(0.02, 0.2)))
    return v2.Compose(steps or [torch.nn.Identity()])
