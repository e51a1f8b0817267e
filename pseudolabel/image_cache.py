"""A small corpus decoded once, in memory that loader processes share.

Decoding costs more than all else that is done to a small image, and an epoch later it is done again. What is kept is a
stream's prepared images (`Presentation.prepare`), from which every view is made: batches are the same with and without.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pseudolabel.errors import PseudolabelError, SpecError
from pseudolabel.forkserver import fork_server
from pseudolabel.inputs import TrainingData, TrainingShard
from pseudolabel.processes import helper_start
from pseudolabel.student_views import Presentation
from pseudolabel.training_rows import OpenShard

CacheMode = Literal["auto", "ram", "off"]

_SHARE = 4  # auto takes at most this fraction of the memory that is free
_PROBED = 16
_SHARED_MEMORY = "/dev/shm"


@dataclass(frozen=True)
class ImageCache:
    """Prepared images of a stream, one after the other. `starts_N1` says where each begins, `shapes_N3` its shape;
    `first_row` which is a shard's first.
    """

    pixels: Tensor
    starts_N1: Tensor
    shapes_N3: Tensor
    first_row: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.pixels.numel()

    def images(self, pairs: NDArray[np.int64]) -> Tensor | list[Tensor]:
        """Those of (shard, row) pairs (N, 2): one tensor where all images of the stream have one shape."""
        rows_N = torch.from_numpy(np.asarray(self.first_row)[pairs[:, 0]] + pairs[:, 1])
        if self._shape is not None:
            return self.pixels.view(-1, *self._shape)[rows_N]
        starts_N, ends_N = self.starts_N1[rows_N].tolist(), self.starts_N1[rows_N + 1].tolist()
        shapes = self.shapes_N3[rows_N].tolist()
        return [self.pixels[start:end].view(shape) for start, end, shape in zip(starts_N, ends_N, shapes, strict=True)]

    @property
    def _shape(self) -> tuple[int, ...] | None:
        """The shape of all images, if it is one."""
        return tuple(self.shapes_N3[0].tolist()) if len(self.shapes_N3) == 1 else None


@dataclass(frozen=True)
class Stream:
    """What a cache may hold: the shards of a stream, and how often training takes a row of it."""

    sources: Sequence[TrainingShard]
    labeled: bool
    presentation: Presentation
    uses: float

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources)


def keep_images(
    streams: Sequence[Stream],
    data: TrainingData,
    mode: CacheMode,
    *,
    workers: int,
    processes: int = 1,
    on_note: Callable[[str], None],
) -> list[ImageCache | None]:
    """A cache for each stream, or None for each. `auto` keeps what takes at most a quarter of the free memory and is
    used twice. `processes` on this machine keep as much each. Raises `SpecError` if it is to fit and doesn't.
    """
    if mode == "off" or not streams:
        return [None] * len(streams)
    wanted = processes * sum(_estimate(stream, data) for stream in streams)
    free = min(_free_memory(), _free_shared_memory() if workers else _free_memory())
    if mode == "auto" and (wanted > free // _SHARE or max(stream.uses for stream in streams) < 2):
        return [None] * len(streams)
    if wanted > free:
        raise SpecError(
            f"--cache ram: the decoded images would take about {_in_words(wanted)}, free are {_in_words(free)}"
            f"{' (of shared memory: --workers 0 needs none)' if workers else ''}; use --cache off or auto"
        )
    caches = [_fill(stream, data, workers) for stream in streams]
    taken = sum(cache.num_bytes for cache in caches)
    rows = sum(stream.rows for stream in streams)
    on_note(f"{rows} images decoded once and kept in memory: {_in_words(taken)} (--cache off decodes them anew)")
    return list(caches)


class _Shards(Dataset["tuple[Tensor, Tensor] | PseudolabelError"]):
    """A shard's prepared images as one row of bytes, and their shapes."""

    def __init__(self, stream: Stream, data: TrainingData) -> None:
        self._stream, self._data = stream, data

    def __len__(self) -> int:
        return len(self._stream.sources)

    def __getitem__(self, shard: int) -> tuple[Tensor, Tensor] | PseudolabelError:
        try:
            images = list(_prepared(self._stream, self._data, shard, self._stream.sources[shard].rows))
        except PseudolabelError as error:  # as a value: the loader would wrap it in a traceback
            return type(error)(str(error))
        if not images:
            return torch.empty(0, dtype=torch.uint8), torch.empty(0, 3, dtype=torch.int64)
        return torch.cat([image.reshape(-1) for image in images]), torch.tensor([image.shape for image in images])


def _prepared(stream: Stream, data: TrainingData, shard: int, rows: int) -> Iterator[Tensor]:
    if rows == 0:
        return
    opened = OpenShard(stream.sources[shard], data, labeled=stream.labeled)
    with opened.file:
        for row in range(rows):
            yield opened.image(row, stream.presentation)


def _fill(stream: Stream, data: TrainingData, workers: int) -> ImageCache:
    pixels: list[Tensor] = []
    shapes: list[Tensor] = []
    for found in _all_shards(_Shards(stream, data), workers):
        if isinstance(found, PseudolabelError):
            raise found
        pixels.append(found[0].clone())  # out of the shared memory of one shard
        shapes.append(found[1].clone())
    shapes_N3 = torch.cat(shapes)
    starts_N1 = torch.cat([torch.zeros(1, dtype=torch.int64), shapes_N3.prod(dim=1).cumsum(0)])
    together = torch.empty(int(starts_N1[-1]), dtype=torch.uint8)
    if workers:
        together.share_memory_()  # type: ignore[no-untyped-call]
    place = 0
    for index, piece in enumerate(pixels):
        together[place : place + len(piece)] = piece
        place += len(piece)
        pixels[index] = piece[:0].clone()  # freed as the whole fills up
    first_row = np.cumsum([0, *(source.rows for source in stream.sources)])[:-1]
    if bool((shapes_N3 == shapes_N3[0]).all()):
        starts_N1, shapes_N3 = starts_N1[:0], shapes_N3[:1].clone()
    return ImageCache(together, starts_N1, shapes_N3, tuple(first_row.tolist()))


def _all_shards(shards: _Shards, workers: int) -> Iterator[tuple[Tensor, Tensor] | PseudolabelError]:
    if workers == 0:
        for shard in range(len(shards)):
            yield shards[shard]
        return
    yield from DataLoader(
        shards,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=fork_server(),
        worker_init_fn=helper_start(),
    )


def _estimate(stream: Stream, data: TrainingData) -> int:
    """Bytes of a stream's prepared images, from a few of its first shard that has any."""
    shard = next((index for index, source in enumerate(stream.sources) if source.rows), None)
    if shard is None:
        return 0
    sizes = [image.numel() for image in _prepared(stream, data, shard, min(stream.sources[shard].rows, _PROBED))]
    return stream.rows * sum(sizes) // len(sizes)


def _free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group if that has a limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        free = min(free, int(limit) - int(used))
    except (OSError, ValueError, StopIteration):  # not Linux, or no limit ("max")
        pass
    return max(free, 0)


def _free_shared_memory() -> int:
    try:
        found = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return _free_memory()
    return found.f_bavail * found.f_frsize


def _in_words(count: int) -> str:
    return (
        f"{count / 1e9:.1f} GB"
        if count >= 1e9
        else f"{count / 1e6:.0f} MB"
        if count >= 1e6
        else f"{count / 1e3:.0f} kB"
    )
