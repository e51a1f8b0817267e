"""How sure a teacher is, over a whole store: confidence, entropy, margin, classes, and agreement with labels.

Of each part the few columns needed are read, one part after the other (of a store at a URL, several at once), so
memory doesn't grow with the store.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pseudolabel.errors import StoreError
from pseudolabel.labels import schema
from pseudolabel.labels.store import Store, open_store
from pseudolabel.storage import RemotePath

BINS = 20
_AT_ONCE = 16  # parts under way, of a store at a URL
_MEASURES = ("confidence", "entropy", "margin")

_Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Histogram:
    """A bin holds values from its edge up to the next, the last one its upper edge, too."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Agreement:
    """Rows that have labels, and those whose prediction is the label: in all and by bins of confidence."""

    rows: int
    agreeing: int
    accuracy: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    agreeing_counts: tuple[int, ...]


@dataclass(frozen=True)
class StoreHistograms:
    """Of one view's rows. `classes` counts predictions by class; `labeled` is None if no row has a label."""

    view: int
    rows: int
    confidence: Histogram
    entropy: Histogram
    margin: Histogram
    classes: tuple[int, ...]
    labeled: Agreement | None

    def to_json(self) -> dict[str, Any]:
        found = {name: vars(getattr(self, name)) for name in _MEASURES}
        labeled = None if self.labeled is None else vars(self.labeled)
        return {"view": self.view, "rows": self.rows, **found, "classes": {"pred": self.classes}, "labeled": labeled}


@dataclass
class _Tally:
    """What has been counted so far."""

    num_classes: int
    measures: dict[str, _Counts] = field(default_factory=lambda: {name: _zeros(BINS) for name in _MEASURES})
    labeled: _Counts = field(default_factory=lambda: _zeros(BINS))
    agreeing: _Counts = field(default_factory=lambda: _zeros(BINS))
    classes: _Counts = field(init=False)

    def __post_init__(self) -> None:
        self.classes = _zeros(self.num_classes)

    def add(self, other: _Tally) -> None:
        for name, counts in self.measures.items():
            counts += other.measures[name]
        self.labeled += other.labeled
        self.agreeing += other.agreeing
        self.classes += other.classes


def store_histograms(store: Store | str | os.PathLike[str], *, view: int = 0) -> StoreHistograms:
    """Count all rows of a view. Raises `StoreError`, `StoreMismatch`, `DamagedPart`, `StorageError`."""
    store = store if isinstance(store, Store) else open_store(store)
    if not 0 <= view < store.identity.num_views:
        raise StoreError(f"{store.root}: has no view {view}; its views are 0 to {store.identity.num_views - 1}")
    total = _Tally(store.identity.num_classes)
    for part in _tallies(store, view):
        total.add(part)
    limits = _limits(store.identity.num_classes)
    edges = {name: tuple(np.linspace(0.0, limits[name], BINS + 1).tolist()) for name in _MEASURES}
    found = {name: Histogram(edges[name], tuple(total.measures[name].tolist())) for name in _MEASURES}
    rows, agreeing = int(total.labeled.sum()), int(total.agreeing.sum())
    counts = tuple(total.labeled.tolist()), tuple(total.agreeing.tolist())
    labeled = Agreement(rows, agreeing, agreeing / rows, edges["confidence"], *counts) if rows else None
    return StoreHistograms(
        view, int(total.classes.sum()), **found, classes=tuple(total.classes.tolist()), labeled=labeled
    )


def _tallies(store: Store, view: int) -> Iterable[_Tally]:
    def count(shard: str) -> _Tally:
        return _count(store, shard, view)

    if not isinstance(store.root, RemotePath):
        yield from map(count, store.part_names())
        return
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(count, store.part_names())


def _count(store: Store, shard: str, view: int) -> _Tally:
    columns = ["label", "pred", *_MEASURES]
    if store.identity.num_views > 1:
        table = store.read_columns(shard, [*columns, "view"])
        table = table.filter(pc.equal(table["view"], view))
    else:
        table = store.read_columns(shard, columns)
    tally, limits = _Tally(store.identity.num_classes), _limits(store.identity.num_classes)
    binned = {name: _bins(table[name], limits[name]) for name in _MEASURES}
    for name, bins in binned.items():
        tally.measures[name] = np.bincount(bins, minlength=BINS)
    pred = table["pred"].to_numpy()
    tally.classes = np.bincount(np.maximum(pred, 0), minlength=tally.num_classes)
    if len(tally.classes) > tally.num_classes or (pred < 0).any():
        raise schema.damaged(store.part_path(shard), "it predicts a class that the store doesn't have")
    has_label = table["label"].is_valid().to_numpy()
    agrees = has_label & (pc.fill_null(table["label"], -1).to_numpy() == pred)
    tally.labeled = np.bincount(binned["confidence"][has_label], minlength=BINS)
    tally.agreeing = np.bincount(binned["confidence"][agrees], minlength=BINS)
    return tally


def _bins(column: pa.ChunkedArray, limit: float) -> _Counts:
    """Number of each value's bin. Rounding may carry a value a little beyond the limits: it counts at the edge."""
    edges = np.linspace(0.0, limit, BINS + 1)
    values = column.to_numpy().astype(np.float64)
    bins: _Counts = np.searchsorted(edges[1:-1], values, side="right")
    return bins


def _limits(num_classes: int) -> dict[str, float]:
    return {"confidence": 1.0, "entropy": max(math.log(num_classes), 1e-6), "margin": 1.0}


def _zeros(count: int) -> _Counts:
    return np.zeros(count, np.int64)
