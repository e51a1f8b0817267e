"""Reading and decoding shards into batches, ahead of whoever needs them.

Batches never span shards, so what is made of a shard depends on nothing but the shard.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import Full, Queue
from typing import Any, TypeVar

import torch
from torch import Tensor

from pseudolabel.classes.numbers import read_class
from pseudolabel.errors import DamagedShard, StorageError
from pseudolabel.shard_lists import Shard
from pseudolabel.shards import ShardFile
from pseudolabel.views.draw import CLEAN, View
from pseudolabel.views.image import decode, image_field

Entry = TypeVar("Entry")
Prepare = Callable[[Tensor], tuple[Tensor, ...]]
Unread = DamagedShard | StorageError  # why a shard gives no more
Rows = list[tuple[View, tuple[Tensor, ...]]]
Augment = Callable[[str, Tensor], Rows]  # of a key and a decoded image
_AHEAD = 3  # batches decoded in advance


@dataclass(frozen=True)
class Reject:
    """A sample that got no label, and why."""

    index: int
    key: str
    stage: str
    error: str
    detail: str


@dataclass
class DecodedBatch:
    """Decoded samples of one shard, and those that could not be decoded.

    `inputs` (uint8, stacked) has a row per (sample, view), a sample's views one after the other, the clean one first.
    """

    keys: list[str] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    views: list[tuple[View, ...]] = field(default_factory=list)
    inputs: tuple[Tensor, ...] = ()
    rejects: list[Reject] = field(default_factory=list)


@dataclass(frozen=True)
class ShardEnd:
    """All batches of a shard have been seen; what the shard as a file is."""

    size: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class Decoding:
    """How samples become a model's inputs: `samples` a batch, the clean view by `prepare`, the others by `augment`;
    `shrink_to` as in `decode`. Pickles if these do.
    """

    samples: int
    prepare: Prepare
    augment: Augment | None = None
    shrink_to: int = 0


def decode_shard(shard: Shard, decoding: Decoding) -> Iterator[DecodedBatch | ShardEnd]:
    """Yield a shard's batches, then its `ShardEnd`. Raises `DamagedShard`, also if the file is changed meanwhile."""
    with ShardFile(shard) as opened, ThreadPoolExecutor(1) as hasher:
        sha256 = hasher.submit(opened.sha256)  # beside the decoding: a cold disk is waited for there
        for start in range(0, len(opened), decoding.samples):
            yield decode_samples(opened, range(start, min(start + decoding.samples, len(opened))), decoding)
        yield shard_end(opened, sha256.result())


def shard_end(opened: ShardFile, sha256: str) -> ShardEnd:
    """The end of a shard of which all samples are decoded. Raises `DamagedShard` if its file is no longer the same."""
    opened.check_unchanged()
    return ShardEnd(opened.size, sha256, len(opened))


def decode_samples(opened: ShardFile, positions: Sequence[int], decoding: Decoding) -> DecodedBatch:
    """Decode some of a shard's samples; what can't be decoded is a reject."""
    batch = DecodedBatch()
    prepared: list[tuple[Tensor, ...]] = []
    for index in positions:
        outcome = _decode_one(opened, index, decoding)
        if isinstance(outcome, Reject):
            batch.rejects.append(outcome)
            continue
        label, rows = outcome
        batch.keys.append(opened.keys[index])
        batch.index.append(index)
        batch.labels.append(label)
        batch.views.append(tuple(view for view, _ in rows))
        prepared.extend(inputs for _, inputs in rows)
    batch.inputs = tuple(torch.stack(column) for column in zip(*prepared, strict=True))
    return batch


def decode_shards(
    shards: Iterator[Shard], decoding: Decoding
) -> Iterator[tuple[Shard, DecodedBatch | ShardEnd | Unread]]:
    """One shard after another; one that is damaged, gone or unreadable gives its error in place of a `ShardEnd`."""
    for shard in shards:
        try:
            for batch in decode_shard(shard, decoding):
                yield shard, batch
        except (DamagedShard, StorageError) as error:  # the others go on
            yield shard, bare(error)


def bare(error: Unread) -> Unread:
    """The error without what it was raised from: it is sent between processes, and kept."""
    return type(error)(str(error))


def _decode_one(opened: ShardFile, index: int, decoding: Decoding) -> Reject | tuple[int | None, Rows]:
    stage = "label"
    try:
        label = label_of(opened, index)
        stage = "decode"
        data = opened.read(index, image_field(opened.field_names(index)))
        image_CHW = decode(data, decoding.shrink_to)
        rows = [(CLEAN, decoding.prepare(image_CHW))]
        return label, rows if decoding.augment is None else [*rows, *decoding.augment(opened.keys[index], image_CHW)]
    except ValueError as error:
        return Reject(index, opened.keys[index], stage, type(error).__name__, str(error))


def label_of(opened: ShardFile, index: int) -> int | None:
    """A sample's own `cls`, if it has one. Raises `ValueError` if it is no class number."""
    label = read_class(opened, index)
    if isinstance(label, str):
        raise ValueError(f"cls is {label!r}, not a class number")
    return label


def ahead(source: Iterator[Entry]) -> Generator[Entry, None, None]:
    """Draw from `source` in a thread, a few entries ahead. What it raises is raised here."""
    queue: Queue[tuple[str, Any]] = Queue(_AHEAD)
    stop = threading.Event()

    def put(message: tuple[str, Any]) -> bool:
        while not stop.is_set():
            try:
                queue.put(message, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def draw() -> None:
        try:
            for entry in source:
                if not put(("entry", entry)):
                    return
            put(("end", None))
        except BaseException as error:  # handed to the consumer, which raises it
            put(("error", error))

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = queue.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join(5)
