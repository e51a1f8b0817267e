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
        """Rows `start` to `start + count` of the sequence, shape (count, 3): shard, row in the shard, epoch."""
        found = []
        while count > 0:
            epoch, offset = divmod(start, self.rows_per_epoch)
            window = self._window_at(epoch, offset)
            begin = offset - self._starts[window]
            piece = self._permutation(epoch, window)[begin : begin + count]
            found.append(np.column_stack([piece, np.full(len(piece), epoch)]))
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


class BalancedOrder:
    """An endless sequence in which every class comes up once in as many rows as there are classes, in an order drawn
    anew each time, and each class's rows in a `RowOrder` of their own.

    `labels` are those of each shard's rows. All shards are in use at once: meant for a labeled set.
    """

    def __init__(self, labels: Sequence[NDArray[np.int64]], seed: int) -> None:
        classes = np.unique(np.concatenate(labels))
        self._rows = [[np.flatnonzero(one == number) for one in labels] for number in classes]
        self._orders = [
            RowOrder([len(rows) for rows in of_class], derive_seeds(1, seed, int(number) + 1)[0])
            for number, of_class in zip(classes, self._rows, strict=True)
        ]
        self._seed = seed

    def rows(self, start: int, count: int) -> NDArray[np.int64]:
        """As `RowOrder.rows`; the epoch is that of the row's class."""
        found = np.empty((count, 3), dtype=np.int64)
        for place, position in enumerate(range(start, start + count)):
            turn, within = divmod(position, len(self._orders))
            drawn = int(np.random.default_rng([self._seed, turn]).permutation(len(self._orders))[within])
            shard, row, epoch = self._orders[drawn].rows(turn, 1)[0]
            found[place] = shard, self._rows[drawn][shard][row], epoch
        return found

    def windows_from(self, start: int) -> list[list[int]]:
        """All shards: any of them may be next."""
        return [list(range(len(self._rows[0])))]


def derive_seeds(count: int, *numbers: int) -> list[int]:
    """`count` seeds of 63 bits that follow from numbers from 0, each as if drawn for itself."""
    return [int(state >> 1) for state in np.random.SeedSequence(numbers).generate_state(count, np.uint64)]
