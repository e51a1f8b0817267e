"""Shards: WebDataset tars, read strictly.

A shard is opened and indexed once (about 10 µs a sample; webdataset's own reader takes 87), then every sample is read
from where it lies. Reading differs from webdataset's in one way only: damage is an error that says what and at which
byte, where webdataset may drop samples without a word. Names are split into key and field by webdataset's rule, so
whatever webdataset writes reads the same. Nothing here decodes or unpickles a field: fields are bytes.

    for sample in read_samples(shard): sample.key, sample.fields["png"]
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType

from pseudolabel import storage
from pseudolabel.errors import DamagedShard, PseudolabelError, StorageError
from pseudolabel.shard_lists import Shard, ShardsLike, as_shards, list_shards, slice_shards
from pseudolabel.storage import spool
from pseudolabel.tar import BLOCK, Window, damaged_shard, index_samples, split_name

__all__ = [  # what is listed and how tars are blocked lives elsewhere, and is wanted with a shard
    "BLOCK",
    "IMAGE_FIELDS",
    "Fetcher",
    "Sample",
    "Shard",
    "ShardFile",
    "ShardsLike",
    "as_shards",
    "fetched_ahead",
    "list_shards",
    "read_samples",
    "shard_sha256",
    "slice_shards",
    "write_shard",
]

_CHUNK = 1 << 20
_SHARDS_AHEAD = 1  # more would only take work from other workers
IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")


@dataclass(frozen=True, slots=True)
class Sample:
    """One record of a shard: `fields` maps a lower-case extension to its bytes; `index` is the position in the
    shard.
    """

    key: str
    index: int
    fields: Mapping[str, bytes]


class ShardFile:
    """An opened shard: indexed and checked. Use it as a context manager; samples are read by position.

    Raises:
        DamagedShard: empty, truncated, bad header, duplicate or interleaved keys, links, data after the end.
    """

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        path = self._path = storage.location(shard.path)
        self._spooled = spool.fetch(path) if isinstance(path, storage.RemotePath) else None
        self._descriptor = self._spooled.descriptor if self._spooled is not None else _opened(path)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        try:
            self._file_version = _version(os.fstat(self._descriptor))
            self.size = self._file_version[0]
            self.version: tuple[int, ...] = self._file_version
            if self._spooled is not None:
                self.version = (self._spooled.size, self._spooled.version)
            if self.size == 0:
                raise damaged_shard(shard.where, "is empty (0 bytes)", 0, 0)
            try:
                self.keys, self._fields = index_samples(shard.where, Window(self.size, self.bytes_at))
            except DamagedShard:
                if self._spooled is not None:
                    self.sha256()  # which tells damage of the copy from damage of the shard
                raise
        except BaseException:
            self._close()
            raise

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._close()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Sample:
        fields = {name: self.bytes_at(start, size) for name, (start, size) in self._fields[index].items()}
        return Sample(self.keys[index], index, fields)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def field_names(self, index: int) -> tuple[str, ...]:
        return tuple(self._fields[index])

    def read(self, index: int, field: str) -> bytes:
        """One field's bytes. Raises `KeyError` if the sample has no such field."""
        return self.bytes_at(*self._fields[index][field])

    def bytes_at(self, start: int, size: int) -> bytes:
        """Bytes of the file. Not through a map: a file that is cut short while it is mapped kills the process. Raises
        `DamagedShard` if they are not there any more.
        """
        try:
            data = os.pread(self._descriptor, size, start)
            while len(data) < size:
                more = os.pread(self._descriptor, size - len(data), start + len(data))
                if not more:
                    raise damaged_shard(self.shard.where, "was cut short while it was read", start + len(data), 0)
                data += more
        except OSError as error:
            raise storage.explained(error, self._path, "reading") from error
        return data

    def sha256(self) -> str:
        """The hash of the whole file, as hexadecimal digits."""
        digest = hashlib.sha256()
        for start in range(0, self.size, _CHUNK):
            digest.update(self.bytes_at(start, min(_CHUNK, self.size - start)))
        found = digest.hexdigest()
        if self._spooled is not None and found != self._spooled.sha256:
            self._spooled.forget()
            raise damaged_shard(self.shard.where, f"was changed in the spool ({self._spooled.path})", 0, 0)
        return found

    def check_unchanged(self) -> None:
        """Raise `DamagedShard` if the file is no longer the one that was opened: samples read may be of both."""
        with storage.explain_os_errors(self._path, "reading"):  # an object's copy may have lost its name by now
            now = _version(os.stat(self._path if self._spooled is None else self._descriptor))
        if now != self._file_version:
            raise damaged_shard(self.shard.where, "was changed or replaced while it was read", 0, len(self))


def _opened(path: os.PathLike[str]) -> int:
    """A descriptor of a file on a disk. Raises `StorageError`."""
    with storage.explain_os_errors(path, "reading"):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise StorageError(f"reading {path} failed: it is no regular file\nremove it, or name other shards")
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _version(status: os.stat_result) -> tuple[int, int, int, int]:
    """Size, time of change, and which file it is: equal as long as a file stays what it was."""
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def shard_sha256(shard: Shard) -> str:
    """The hash of a shard's file, whatever is in it. Raises `StorageError`."""
    path = storage.location(shard.path)
    if isinstance(path, storage.RemotePath):
        spooled = spool.fetch(path)
        os.close(spooled.descriptor)
        return spooled.sha256
    with storage.explain_os_errors(path, "reading"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetched_ahead(
    shards: Iterator[Shard], waiting_for_it: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Iterator[Shard]:
    """The same shards, while the next ones of an object storage are being fetched. What goes wrong with one is left to
    whoever opens it. `waiting_for_it` is entered while nothing else is done than waiting.
    """
    with ThreadPoolExecutor(_SHARDS_AHEAD, "fetch") as pool:
        waiting: deque[tuple[Shard, Future[None]]] = deque()

        def fetched() -> Shard:
            shard, fetching = waiting.popleft()
            with waiting_for_it():
                fetching.result()
            return shard

        for shard in shards:
            if not storage.is_remote(shard.path):
                yield shard
                continue
            waiting.append((shard, pool.submit(_try_to_fetch, shard)))
            if len(waiting) > _SHARDS_AHEAD:
                yield fetched()
        while waiting:
            yield fetched()


class Fetcher:
    """Fetches shards of an object storage beside whoever will open them, in a thread that ends with its process."""

    def __init__(self) -> None:
        self._asked: frozenset[Shard] = frozenset()
        self._queue: SimpleQueue[Shard] | None = None

    def ask(self, groups: Iterable[Sequence[Shard]]) -> None:
        """Fetch group after group what was not asked for the last time. Processes that fetch the same begin at
        different shards of a group.
        """
        asked: list[Shard] = []
        for group in groups:
            wanted = [shard for shard in group if storage.is_remote(shard.path)]
            new = [shard for shard in wanted if shard not in self._asked]
            for position in range(len(new)):
                self._start().put(new[(position + os.getpid()) % len(new)])
            asked += wanted
        self._asked = frozenset(asked)

    def _start(self) -> SimpleQueue[Shard]:
        if self._queue is None:
            self._queue = SimpleQueue()
            threading.Thread(target=_fetch_all, args=(self._queue,), daemon=True).start()
        return self._queue


def _fetch_all(queue: SimpleQueue[Shard]) -> None:
    while True:
        _try_to_fetch(queue.get())


def _try_to_fetch(shard: Shard) -> None:
    with suppress(PseudolabelError):
        shard_sha256(shard)


def read_samples(shard: Shard) -> Iterator[Sample]:
    """Yield a shard's samples in order. Raises `DamagedShard` before the first sample if the shard is not whole."""
    with ShardFile(shard) as opened:
        yield from opened


def write_shard(path: storage.Location, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write (key, fields) pairs as one tar through webdataset: fixed time, owner and mode, so equal samples give
    equal bytes.

    Raises:
        StorageError: the place can't be written.
        ValueError: a reader would skip or rename a field (a dot in the key, a leading underscore).
    """
    from webdataset.writer import TarWriter

    with (
        storage.atomic_file(path) as temporary,
        open(temporary, "wb") as file,
        TarWriter(file, user="root", group="root", mode=0o644, mtime=0, encoder=False) as writer,
    ):
        for key, fields in samples:
            for field in fields:
                if field.startswith("_") or split_name(f"{key}.{field}") != (key, field.lower()):
                    raise ValueError(f"the field {field!r} of the key {key!r} would not read back under these names")
            writer.write({"__key__": key, **fields})
