"""Samples that must not be selected: what `leaks` found, if it was of these very shards."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from pseudolabel.duplicates.ledger import Leaks, read_leaks
from pseudolabel.errors import SelectionError

Positions = Mapping[str, Sequence[int]]
Exclusion = Leaks | Positions | str | os.PathLike[str] | None


def excluded_positions(exclude: Exclusion, sha256: Mapping[str, str]) -> Positions:
    """Positions by shard, of leaks, a file of them, or as given; `sha256` is what was annotated, by shard.

    Raises:
        SelectionError: leaks were looked for in another content of a shard.
        StoreError, DamagedPart: as `read_leaks`.
    """
    if exclude is None:
        return {}
    if isinstance(exclude, (str, os.PathLike)):
        exclude = read_leaks(exclude)
    if not isinstance(exclude, Leaks):
        return exclude
    for name, digest in exclude.shards.items():
        if sha256.get(name, digest) != digest:
            raise SelectionError(
                f"shard {name!r}: leaks were looked for in another content than was annotated; run `leaks` on these "
                "shards"
            )
    unseen = sorted(sha256.keys() - exclude.shards.keys() - exclude.against.keys())
    if unseen:
        warnings.warn(
            f"{len(unseen)} of {len(sha256)} shards of the store were not looked through for leaks, such as "
            f"{unseen[0]}",
            stacklevel=3,
        )
    return exclude.excluded


def recorded(positions: Positions) -> dict[str, Any] | None:
    """What a selection says of it."""
    if not positions:
        return None
    lines = "\n".join(f"{name} {sorted(positions[name])}" for name in sorted(positions))
    return {"samples": sum(map(len, positions.values())), "sha256": hashlib.sha256(lines.encode()).hexdigest()}
