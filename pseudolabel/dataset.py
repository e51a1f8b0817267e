"""Training batches: labeled rows, and unlabeled rows joined to their cached soft labels.

A batch is a pure function of its step, so any process can make any batch, and a resumed run sees what an
undisturbed one would have seen. Each row is augmented from a seed of its own, so any process can make any rows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pseudolabel.errors import PseudolabelError
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.targets import StoredTargets
from pseudolabel.replay import open_replay
from pseudolabel.settings import AugmentSettings
from pseudolabel.training.image_cache import CacheMode, ImageCache, Stream, keep_images
from pseudolabel.training.inputs import TrainingData
from pseudolabel.training.order import derive_seeds
from pseudolabel.training.rows import WEIGHT, Rows
from pseudolabel.training.views import VIEW_COLUMNS, Augmented, Replayed
from pseudolabel.training.world import ALONE, World
from pseudolabel.views.image import Preprocessing


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

    def parts(self, count: int) -> Iterator[Batch]:
        """The batch in so many parts, each with its share of the labeled and of the soft rows; as large as they are
        few. The numbers of rows stay the whole batch's, so that the parts' losses add up to its loss.
        """
        rows, soft = len(self.labels_B), 0 if self.targets is None else len(self.targets)
        first = rows - soft
        for part in range(min(count, rows)):
            share = World(part, count)
            own = [*share.share(first), *(first + row for row in share.share(soft, first))]
            rows_N = torch.tensor(own, device=self.labels_B.device)
            yield self._taken(rows_N, rows_N[rows_N >= first] - first)

    def partners(self, partner_B: Tensor) -> Batch:
        """The batch with the labels and soft labels of these rows, its pixels as they are."""
        soft = 0 if self.targets is None else len(self.targets)
        first = len(self.labels_B) - soft
        return replace(self._taken(partner_B, partner_B[first:] - first), pixels_BCHW=self.pixels_BCHW)

    def _taken(self, rows_N: Tensor, soft_N: Tensor) -> Batch:
        return replace(
            self,
            pixels_BCHW=self.pixels_BCHW[rows_N],
            labels_B=self.labels_B[rows_N],
            targets=self.targets.map(lambda column: column[soft_N]) if self.targets is not None else None,
            soft_weight_B=self.soft_weight_B[soft_N] if self.soft_weight_B is not None else None,
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            change(self.pixels_BCHW),
            change(self.labels_B),
            self.targets.map(change) if self.targets is not None else None,
            change(self.soft_weight_B) if self.soft_weight_B is not None else None,
            self.num_labeled,
            self.num_soft,
        )


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
        self._data, self._seed, self._steps, self._world = data, seed, steps, world
        self._empty = torch.empty(0, preprocessing.channels, preprocessing.crop, preprocessing.crop, dtype=torch.uint8)
        self.num_labeled, self.num_pseudo = split_batch(
            batch_size, labeled_fraction, has_labeled=bool(data.labeled), has_pseudo=bool(data.unlabeled)
        )
        own = Augmented(augment, preprocessing)
        seen = _replayed(data, preprocessing) if data.replay and self.num_pseudo else own
        kinds = [(data.labeled, True, own, self.num_labeled), (data.unlabeled, False, seen, self.num_pseudo)]
        self._streams = [
            (
                Stream(sources, labeled, presentation, uses=steps * count / max(sum(one.rows for one in sources), 1)),
                count,
            )
            for sources, labeled, presentation, count in kinds
            if count
        ]
        self._kept: list[ImageCache | None] = [None] * len(self._streams)
        self._rows: list[Rows] | None = None

    def __len__(self) -> int:
        return self._steps

    def keep_images(self, mode: CacheMode, *, workers: int, on_note: Callable[[str], None]) -> None:
        """Decode once what fits in memory, before the first batch; `workers` loader processes share it. Raises as
        `image_cache.keep_images`.
        """
        streams = [stream for stream, _ in self._streams]
        processes = self._world.local_size
        self._kept = keep_images(streams, self._data, mode, workers=workers, processes=processes, on_note=on_note)

    def __getitem__(self, step: int) -> Batch:
        pixels: list[Tensor] = []
        labels: list[Tensor] = []
        soft: list[tuple[dict[str, Tensor], int]] = []
        before = 0
        seed_B = torch.tensor(derive_seeds(self.num_labeled + self.num_pseudo, self._seed, 3, step))
        for rows, (stream, count) in zip(self._open(), self._streams, strict=True):
            mine = self._world.share(count, before)
            taken = rows.take(step * count, count, mine)
            own_B = seed_B[before : before + count][mine.start :: mine.step]
            pixels.append(stream.presentation.present(taken.images, own_B, taken.columns) if mine else self._empty)
            labels.append(taken.labels_N)
            if taken.columns:
                soft.append(({n: c for n, c in taken.columns.items() if n not in VIEW_COLUMNS}, count))
            before += count
        pixels_BCHW, labels_B = torch.cat(pixels), torch.cat(labels)
        if not soft:
            return Batch(pixels_BCHW, labels_B, None, None, self.num_labeled, 0)
        assert self._data.store is not None
        encoding = parse_encoding(self._data.store.identity.encoding)
        columns = {name: torch.cat([columns[name] for columns, _ in soft]) for name in soft[0][0]}
        weight_B, num_soft = columns.pop(WEIGHT), sum(count for _, count in soft)
        return Batch(pixels_BCHW, labels_B, StoredTargets(encoding, columns), weight_B, self.num_labeled, num_soft)

    def _open(self) -> list[Rows]:
        """The rows that each stream's part of a batch is taken from."""
        if self._rows is None:
            self._rows = [
                Rows(
                    stream.sources,
                    self._data,
                    stream.presentation,
                    labeled=stream.labeled,
                    seed=derive_seeds(1, self._seed, 1 if stream.labeled else 2)[0],
                    kept=kept,
                )
                for (stream, _), kept in zip(self._streams, self._kept, strict=True)
            ]
        return self._rows


def _replayed(data: TrainingData, preprocessing: Preprocessing) -> Replayed:
    """The store's own views at the student's size. Other library versions make pixels that differ by a level: it is
    warned of that.
    """
    assert data.store is not None
    return Replayed(open_replay(data.store.identity, preprocessing, other_versions="warn"))


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
