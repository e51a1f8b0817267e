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
from pseudolabel.processes import explained_loader_deaths, helper_start
from pseudolabel.training.inputs import TrainingData, TrainingShard
from pseudolabel.training.rows import OpenShard
from pseudolabel.training.views import Presentation

CacheMode = Literal["auto", "ram", "off"]

_SHARE = 4  # auto takes at most this fraction of the memory that is free
_PROBED = 16
_SHARED_MEMORY = "/dev/shm"

Bytes = NDArray[np.uint8]
Shapes = NDArray[np.int64]


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
    """A cache for each stream, or None. `auto` keeps the streams that come up twice, if they take at most a quarter of
    the free memory together. `processes` on this machine keep as much each. Raises `SpecError` if it is to fit and
    doesn't.
    """
    none: list[ImageCache | None] = [None] * len(streams)
    places = [place for place, stream in enumerate(streams) if mode == "ram" or (mode == "auto" and stream.uses >= 2)]
    streams = [streams[place] for place in places]
    if not streams:
        return none
    wanted = processes * sum(_estimate(stream, data) for stream in streams)
    free = min(_free_memory(), _free_shared_memory() if workers else _free_memory())
    most = free // _SHARE if mode == "auto" else free
    if wanted <= most:
        try:
            caches = _fill_all(streams, data, workers, most // processes)
        except _TakesMore as found:  # than the first images let expect
            wanted = max(processes * found.num_bytes, most + 1)
    if wanted > most and mode == "auto":
        return none
    if wanted > most:
        raise SpecError(
            f"--cache ram: the decoded images would take about {_in_words(wanted)}, free are {_in_words(free)}"
            f"{' (of shared memory: --workers 0 needs none)' if workers else ''}; use --cache off or auto"
        )
    taken = sum(cache.num_bytes for cache in caches)
    rows = sum(stream.rows for stream in streams)
    on_note(f"{rows} images decoded once and kept in memory: {_in_words(taken)} (--cache off decodes them anew)")
    kept = dict(zip(places, caches, strict=True))
    return [kept.get(place) for place in range(len(none))]


@dataclass
class _TakesMore(Exception):
    """So many bytes at the least."""

    num_bytes: int


class _Shards(Dataset["tuple[Bytes, Shapes] | PseudolabelError"]):
    """A shard's prepared images as one row of bytes, and their shapes. No tensors: what loader processes send goes
    through a pipe then, and not through shared memory, where it would wait for ever once that is full.
    """

    def __init__(self, stream: Stream, data: TrainingData) -> None:
        self._stream, self._data = stream, data

    def __len__(self) -> int:
        return len(self._stream.sources)

    def __getitem__(self, shard: int) -> tuple[Bytes, Shapes] | PseudolabelError:
        try:
            images = list(_prepared(self._stream, self._data, shard, self._stream.sources[shard].rows))
        except PseudolabelError as error:  # as a value: the loader would wrap it in a traceback
            return type(error)(str(error))
        shapes_N3 = np.array([image.shape for image in images], np.int64).reshape(-1, 3)
        return np.concatenate([np.empty(0, np.uint8), *(image.numpy().reshape(-1) for image in images)]), shapes_N3


def _prepared(stream: Stream, data: TrainingData, shard: int, rows: int) -> Iterator[Tensor]:
    if rows == 0:
        return
    opened = OpenShard(stream.sources[shard], data, labeled=stream.labeled)
    with opened.file:
        for row in range(rows):
            yield opened.image(row, stream.presentation)


def _fill_all(streams: Sequence[Stream], data: TrainingData, workers: int, most: int) -> list[ImageCache]:
    """Raises `_TakesMore` than `most` bytes."""
    caches: list[ImageCache] = []
    for stream in streams:
        caches.append(_fill(stream, data, workers, most, sum(cache.num_bytes for cache in caches)))
    return caches


def _fill(stream: Stream, data: TrainingData, workers: int, most: int, taken: int) -> ImageCache:
    pixels: list[Bytes] = []
    shapes: list[Shapes] = []
    for found in _all_shards(_Shards(stream, data), workers):
        if isinstance(found, PseudolabelError):
            raise found
        pixels.append(found[0])
        shapes.append(found[1])
        taken += len(found[0])
        if taken > most:
            raise _TakesMore(taken)
    shapes_N3 = torch.from_numpy(np.concatenate(shapes))
    starts_N1 = torch.cat([torch.zeros(1, dtype=torch.int64), shapes_N3.prod(dim=1).cumsum(0)])
    together = torch.empty(int(starts_N1[-1]), dtype=torch.uint8)
    if workers:
        if len(together) > _free_shared_memory():  # another process may have taken some
            raise _TakesMore(taken)
        together.share_memory_()  # type: ignore[no-untyped-call]
    place = 0
    for index, piece in enumerate(pixels):
        together[place : place + len(piece)] = torch.from_numpy(piece)
        place += len(piece)
        pixels[index] = piece[:0].copy()  # freed as the whole fills up
    first_row = np.cumsum([0, *(source.rows for source in stream.sources)])[:-1]
    if bool((shapes_N3 == shapes_N3[0]).all()):
        starts_N1, shapes_N3 = starts_N1[:0], shapes_N3[:1].clone()
    return ImageCache(together, starts_N1, shapes_N3, tuple(first_row.tolist()))


def _all_shards(shards: _Shards, workers: int) -> Iterator[tuple[Bytes, Shapes] | PseudolabelError]:
    if workers == 0:
        for shard in range(len(shards)):
            yield shards[shard]
        return
    loader = DataLoader(
        shards,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=fork_server(),
        worker_init_fn=helper_start(),
        collate_fn=_as_it_is,
    )
    with explained_loader_deaths():
        yield from loader


def _as_it_is(found: object) -> object:
    return found


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
        limit, used, kinds = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii") for name in ("max", "current", "stat")
        )
        given_up = next(int(line.split()[1]) for line in kinds.splitlines() if line.startswith("inactive_file "))
        free = min(free, int(limit) - int(used) + given_up)  # files that were read lately are dropped when need be
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
