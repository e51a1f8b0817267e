"""The order in which training sees its rows: a pure function of (sizes, seed, position), so that resuming is
arithmetic.

Each epoch permutes the shards, joins neighbours into windows of bounded size, and permutes the rows of a window. Only
a window's shards need be open at a time, yet rows of many shards mix. The stream goes on over epochs without end,
each in a new order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

WINDOW_ROWS = 1 << 17
WINDOW_SHARDS = 128
_KEPT_WINDOWS = 4


class RowOrder:
    """An endless shuffled sequence of (shard, row) pairs over shards of the given sizes."""

    def __init__(self, sizes: Sequence[int], seed: int) -> None:
        assert sum(sizes) > 0
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._seed = seed
        self.rows_per_epoch = int(self._sizes.sum())
        self._epoch: int | None = None
        self._windows: list[NDArray[np.int64]] = []
        self._starts: list[int] = []
        self._permuted: OrderedDict[tuple[int, int], NDArray[np.int64]] = OrderedDict()

    def rows(self, start: int, count: int) -> NDArray[np.int64]:
        """Pairs `start` to `start + count` of the sequence, shape (count, 2)."""
        found = []
        while count > 0:
            epoch, offset = divmod(start, self.rows_per_epoch)
            window = self._window_at(epoch, offset)
            begin = offset - self._starts[window]
            piece = self._permutation(epoch, window)[begin : begin + count]
            found.append(piece)
            start += len(piece)
            count -= len(piece)
        return np.concatenate(found)

    def windows_from(self, start: int) -> list[list[int]]:
        """The shards of the window that row `start` is of, and of the next window of its epoch, if there is one."""
        window = self._window_at(*divmod(start, self.rows_per_epoch))
        return [[int(shard) for shard in one] for one in self._windows[window : window + 2]]

    def _window_at(self, epoch: int, offset: int) -> int:
        if epoch != self._epoch:
            self._plan(epoch)
        return bisect_right(self._starts, offset) - 1

    def _plan(self, epoch: int) -> None:
        """Group the epoch's shards, in random order, into windows; empty shards are left out."""
        shards = np.random.default_rng([self._seed, epoch]).permutation(len(self._sizes))
        self._epoch, self._windows, self._starts = epoch, [], []
        window: list[int] = []
        rows = total = 0
        for shard in [int(shard) for shard in shards if self._sizes[shard]]:
            size = int(self._sizes[shard])
            if window and (rows + size > WINDOW_ROWS or len(window) == WINDOW_SHARDS):
                self._windows.append(np.asarray(window))
                self._starts.append(total - rows)
                window, rows = [], 0
            window.append(shard)
            rows += size
            total += size
        self._windows.append(np.asarray(window))
        self._starts.append(total - rows)

    def _permutation(self, epoch: int, window: int) -> NDArray[np.int64]:
        kept = self._permuted.get((epoch, window))
        if kept is None:
            pairs = np.concatenate(
                [
                    np.stack([np.full(self._sizes[s], s), np.arange(self._sizes[s])], axis=1)
                    for s in self._windows[window]
                ]
            )
            kept = np.random.default_rng([self._seed, epoch, window + 1]).permutation(pairs, axis=0)
            self._permuted[epoch, window] = kept
            while len(self._permuted) > _KEPT_WINDOWS:
                self._permuted.popitem(last=False)
        return kept


def derive_seeds(count: int, *numbers: int) -> list[int]:
    """`count` seeds of 63 bits that follow from numbers from 0, each as if drawn for itself."""
    return [int(state >> 1) for state in np.random.SeedSequence(numbers).generate_state(count, np.uint64)]
