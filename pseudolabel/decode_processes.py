"""Decoding in processes of its own, for where a GPU must not wait: threads share one interpreter lock, processes don't.

Torch's DataLoader is the pool: it keeps order, hands tensors over in shared memory and pins them. Pieces of a shard (a
batch of samples, and where they lie in the file) go out as they are wanted, so a new shard is begun while the last one
is being labeled; what comes back is what `decode_shards` gives, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from torch.utils.data import DataLoader, Dataset

from pseudolabel.decoding import DecodedBatch, Decoding, ShardEnd, Unread, bare, decode_samples, shard_end
from pseudolabel.errors import DamagedShard, StorageError, WorkerDied
from pseudolabel.forkserver import fork_server
from pseudolabel.processes import helper_start
from pseudolabel.shard_lists import Shard
from pseudolabel.shards import ShardFile

_AHEAD = 4  # pieces that each process may have in hand
Entry = DecodedBatch | ShardEnd | Unread


@dataclass(frozen=True)
class _Piece:
    """Samples of a shard to decode; none: the shard's end. `version` is of the file as it was when it was counted."""

    shard: Shard
    samples: range
    version: tuple[int, ...] = ()
    failure: Unread | None = None


class _Decoder(Dataset[tuple[Shard, Entry]]):
    """Turns pieces into batches, in a pool's process. Keeps the last shard open."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._opened: ShardFile | None = None

    def __getitem__(self, piece: _Piece) -> tuple[Shard, Entry]:
        if piece.failure is not None:
            return piece.shard, piece.failure
        try:
            opened = self._open(piece)
            if not piece.samples:
                return piece.shard, shard_end(opened, opened.sha256())
            return piece.shard, decode_samples(opened, piece.samples, self._decoding)
        except (DamagedShard, StorageError) as error:
            return piece.shard, bare(error)

    def _open(self, piece: _Piece) -> ShardFile:
        """The piece's shard, in just the version that was cut into pieces. Raises `DamagedShard`."""
        if self._opened is None or self._opened.shard != piece.shard:
            if self._opened is not None:
                self._opened.close()
            self._opened = ShardFile(piece.shard)
        if self._opened.version != piece.version:
            raise DamagedShard(f"{piece.shard.where}: this shard was changed or replaced while it was read\nrerun")
        return self._opened


def _pieces(shards: Iterator[Shard], samples: int) -> Iterator[_Piece]:
    for shard in shards:
        try:
            with ShardFile(shard) as opened:
                count, version = len(opened), opened.version
        except (DamagedShard, StorageError) as error:
            yield _Piece(shard, range(0), failure=bare(error))
            continue
        for start in range(0, count, samples):
            yield _Piece(shard, range(start, min(start + samples, count)), version)
        yield _Piece(shard, range(0), version)


def decode_in_processes(
    shards: Iterator[Shard], decoding: Decoding, processes: int, *, pin: bool
) -> Iterator[tuple[Shard, Entry]]:
    """As `decode_shards`, by `processes` processes; `pin` puts the inputs into page-locked memory.

    Raises:
        WorkerDied: a process was killed, or shared memory is full.
    """
    loader = DataLoader(
        _Decoder(decoding),
        batch_size=None,
        sampler=_pieces(shards, decoding.samples),
        num_workers=processes,
        prefetch_factor=_AHEAD,
        pin_memory=pin,
        multiprocessing_context=fork_server(),
        worker_init_fn=helper_start(),
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader" not in str(error):
            raise
        raise WorkerDied(
            "a decoding process ended (killed, out of memory, or /dev/shm full?)\n"
            "run the same command again: finished shards are kept; a smaller --batch-size needs less memory"
        ) from error


def decoding_processes(devices: int) -> int:
    """How many of this machine's cores decode for each of its `devices`; one stays with the process of the device."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(devices, 1) - 1)
