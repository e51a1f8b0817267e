"""Shards that annotate could not read: collected while the others go on, then told as one error.

A damaged shard is mended or packed again; one that the storage doesn't give is there another time. So they are told
apart, each kind with its first case, the names of some more, and its remedy once.

Where a storage fails for good, the others can't go on either: after some shards in a row, over some time, it is the
end. A shard that is missing says nothing of the storage, which has answered.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from pseudolabel.errors import DamagedShard, MissingFile, StorageError
from pseudolabel.shard_lists import Shard

_NAMED = 5  # more shards of a kind than the first
_IN_A_ROW = 8  # shards that the storage doesn't give
_FOR_SECONDS = 30.0  # and for so long: an outage of a moment hits all workers at once


@dataclass
class Failures:
    """The shards that failed, of `shards` in all."""

    shards: int
    _damaged: dict[str, str] = field(default_factory=dict)  # message by where the shard is
    _unread: dict[str, str] = field(default_factory=dict)
    _row: list[float] = field(default_factory=list)  # when each of the last shards wasn't given

    def add(self, shard: Shard, error: DamagedShard | StorageError) -> None:
        """Note why `shard` has no part. Raises `StorageError` when the storage fails for good."""
        (self._unread if isinstance(error, StorageError) else self._damaged)[shard.where] = str(error)
        if not isinstance(error, StorageError) or isinstance(error, MissingFile):
            self.reset()
            return
        self._row.append(time.monotonic())
        if len(self._row) >= _IN_A_ROW and self._row[-1] - self._row[0] >= _FOR_SECONDS:
            first, remedy = _parts(str(error))
            raise StorageError(
                f"{len(self._row)} shards one after the other could not be read; the last: {first}\n"
                f"{remedy}\nfinished shards are kept: the same command goes on"
            )

    def reset(self) -> None:
        """The storage has given a shard."""
        self._row.clear()

    def check(self) -> None:
        """Raise `DamagedShard` if shards are damaged, or else `StorageError` if some could not be read."""
        others = self.shards - len(self._damaged) - len(self._unread)
        rest = f"the other {others} shards are annotated" if others > 1 else "the other shard is annotated"
        rest = rest if others else "no shard could be annotated"
        if self._damaged and self._unread:
            lines = [_told(self._damaged, "damaged", apart=False), _told(self._unread, "not read", apart=False), rest]
            raise DamagedShard("\n".join(lines))
        if self._damaged:
            raise DamagedShard(f"{_told(self._damaged, 'are damaged')}\n{rest}")
        if self._unread:
            raise StorageError(f"{_told(self._unread, 'could not be read')}\n{rest}")


def _told(errors: dict[str, str], what: str, *, apart: bool = True) -> str:
    """The first error with its remedy, and between them, or with not `apart` in the same line, where the others are."""
    places = sorted(errors)
    first, remedy = _parts(errors[places[0]])
    named = ", ".join(_unlike(place, errors[place], first.replace(places[0], "")) for place in places[1 : 1 + _NAMED])
    more = f"{named}{' …' if len(places) > 1 + _NAMED else ''}"
    if not apart:
        told = f"{first}{f' ({remedy})' if remedy else ''}"
        return f"{told}; {len(places) - 1} more {what}: {more}" if more else told
    lines = [first, f"{len(places) - 1} more {what}: {more}" if more else "", remedy]
    return "\n".join(line for line in lines if line)


def _parts(message: str) -> tuple[str, str]:
    """What is wrong, and the remedy in one line."""
    first, *remedy = message.splitlines()
    return first, "; ".join(remedy)


def _unlike(place: str, message: str, known: str) -> str:
    """Where a shard is, and what is wrong if that isn't `known` from the first one."""
    what = _parts(message)[0]
    return place if what.replace(place, "") == known else what.split(" (at byte")[0]
