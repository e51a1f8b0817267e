"""A remote file that is read here and there: a reader that knows what it wants of a large file fetches no more.

What is read at the end (a Parquet footer) is fetched with the bytes before it, in one go, and kept.
"""

from __future__ import annotations

import io
import os

from pseudolabel.storage.remote import RemotePath

_TAIL = 1 << 16  # bytes; a footer is rarely larger


class RangedFile(io.RawIOBase):
    """A `RemotePath` as an open file of which only what is read is fetched. Its methods raise `StorageError`."""

    def __init__(self, path: RemotePath, size: int | None = None) -> None:
        self._path, self._size = path, path.entry().size if size is None else size
        self._position = 0
        self._tail_start = max(self._size - _TAIL, 0)
        self._tail: bytes | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        start = min(self._position, self._size)
        stop = self._size if size is None or size < 0 else min(start + size, self._size)
        self._position = stop
        if start < self._tail_start:
            return self._path.read_range(start, stop)
        if self._tail is None:
            self._tail = self._path.read_range(self._tail_start, self._size)
        return self._tail[start - self._tail_start : stop - self._tail_start]
