"""`select`: which soft labels of a store count, by rules, out of core.

    scores of all rows → filters → threshold for a target precision → top-K and balance → weights → manifest

What the selection's labels are worth is estimated from rows whose label is known: the share of right ones among those
that would have passed, class by class, weighted as the classes are in the selection. Without such rows it is the mean
confidence, and said to be.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pseudolabel import storage
from pseudolabel.calibration import Calibration
from pseudolabel.database import scratch_database, table_of
from pseudolabel.errors import SelectionError, StoreError
from pseudolabel.labels.footers import read_footers
from pseudolabel.labels.store import Store, open_store
from pseudolabel.selection import Selection, check_place, write_selection
from pseudolabel.selection.exclusion import Exclusion, excluded_positions, recorded
from pseudolabel.selection.findings import findings, why_nothing, why_weightless
from pseudolabel.selection.manifest import manifest_parts
from pseudolabel.selection.precision import lowest_threshold
from pseudolabel.selection.rules import choose, filters, mark_candidates
from pseudolabel.selection.scores import Scoring, load_scores
from pseudolabel.settings import SelectSettings

if TYPE_CHECKING:
    from pseudolabel.database import Connection

Thresholds = Mapping[int, float] | float | None


@dataclass(frozen=True)
class ClassCoverage:
    """Of a predicted class: `rows` that could have been selected, `selected` ones, their weight's sum and their least
    confidence.
    """

    name: str
    rows: int
    selected: int
    weight: float
    threshold: float | None


@dataclass(frozen=True)
class SelectResult:
    """`rows` could have been selected. `estimated_precision` with its 95 % interval is from `labels`, of which
    `checked` would have passed, or from `confidence` alone.
    """

    out: str
    rows: int
    selected: int
    excluded: int
    labeled_rows: int
    estimated_precision: float
    precision_interval: tuple[float, float] | None
    estimated_from: str
    checked: int
    classes: tuple[ClassCoverage, ...]
    seconds: float
    fingerprint: str


def select(
    store: Store | str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: SelectSettings | None = None,
    *,
    calibration: Calibration | None = None,
    evidence: Sequence[str] | None = None,
    exclude: Exclusion = None,
    overwrite: bool = False,
) -> SelectResult:
    """Select from all rows of a store by its clean view (a sample's other views go with it), and write the selection
    into the directory `out`.

    Rows with a label are evidence (all, or those of the shards named `evidence`) and aren't selected themselves unless
    the settings say so. `exclude` names samples that must not be selected: what `leaks` found, or positions by shard.

    Raises:
        SelectionError: nothing is left, or no threshold reaches the target.
        StoreMismatch: the calibration is of another store.
        OutputExists: `out` holds a selection and is not to be overwritten, or something else; another process is at
            work there; or it lies in a store.
    """
    started = time.monotonic()
    settings = settings or SelectSettings()
    root = storage.location(out)
    check_place(root, overwrite=overwrite)
    store = store if isinstance(store, Store) else open_store(store)
    _check_calibration(calibration, store, settings)
    footers = read_footers(store)
    shards, sha256 = list(footers), {name: footer.info.sha256 for name, footer in footers.items()}
    positions = excluded_positions(exclude, sha256)
    if absent := sorted(set(evidence or ()) - footers.keys()):
        raise StoreError(f"{store.root}: shard {absent[0]!r}, named as evidence, has no part here; annotate it first")
    used = calibration if calibration is None or settings.align_prior else calibration.without_shift()
    scoring = Scoring(store, used, settings.max_disagreement is not None)
    with scratch_database() as connection:
        load_scores(connection, scoring, shards, positions)
        _mark_evidence(connection, store, shards, evidence)
        thresholds = _thresholds(connection, settings, store)
        if not mark_candidates(connection, settings, thresholds):
            raise SelectionError(why_nothing(connection, settings, store, thresholds))
        if not choose(connection, settings, store.identity.num_classes):
            raise SelectionError(why_weightless(settings, store))
        found = findings(connection, settings, store)
        counts = dict(connection.execute("select part, count(*) from chosen group by part").fetchall())
        content = "\n".join(f"{name} {digest}" for name, digest in sha256.items())
        facts = {
            "store": store.fingerprint,
            "annotated": hashlib.sha256(content.encode()).hexdigest(),
            "settings": settings.model_dump(mode="json"),
            "calibration": None if calibration is None else {**calibration.to_json(), "facts": {}},
            "evidence": sorted(evidence) if evidence is not None else None,
            "excluded": recorded(positions),
            "thresholds": _named(thresholds),
            "shards": {name: counts.get(part, 0) for part, name in enumerate(shards)},
            **found,
        }
        parts = manifest_parts(connection, shards, store.identity.num_views)
        written = write_selection(root, facts, parts, sha256, overwrite=overwrite)
    return _result(written, round(time.monotonic() - started, 3))


def repeated(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `select` that a selection.json (`Selection.facts`) records, but for the exclusion."""
    calibration = facts["calibration"]
    return {
        "settings": SelectSettings.model_validate(facts["settings"]),
        "calibration": None if calibration is None else Calibration.from_json(calibration),
        "evidence": facts["evidence"],
    }


def _check_calibration(calibration: Calibration | None, store: Store, settings: SelectSettings) -> None:
    if calibration is not None:
        calibration.check(store)
    if settings.align_prior and (calibration is None or calibration.shift is None):
        raise SelectionError(
            "--align-prior needs a calibration with a prior correction: make one with `calibrate --prior labels` (or "
            "uniform) and pass it as --calibration"
        )


def _mark_evidence(connection: Connection, store: Store, shards: Sequence[str], evidence: Sequence[str] | None) -> None:
    """Make the view `evidence`: rows whose label is known and counts. Raises `SelectionError` if what was named holds
    none.
    """
    chosen = set(shards if evidence is None else evidence)
    connection.register(
        "named", pa.table({"part": pa.array([p for p, s in enumerate(shards) if s in chosen], pa.int32())})
    )
    connection.execute("create table evidence_parts as select * from named")
    connection.execute(
        "create view evidence as select * from scores where label is not null and not excluded "
        "and part in (select part from evidence_parts)"
    )
    if evidence is not None and not connection.execute("select 1 from evidence limit 1").fetchall():
        raise SelectionError(
            f"{store.root}: no row of the {len(chosen)} shards named as evidence carries a label; name labeled shards"
        )


def _thresholds(connection: Connection, settings: SelectSettings, store: Store) -> Thresholds:
    """Confidences from which on the target precision is reached; None if none is asked for. Raises `SelectionError`."""
    if settings.target_precision is None:
        return None
    table = table_of(
        connection,
        f"select pred, confidence, pred = label as right from evidence where {filters(settings)} "
        "order by confidence desc, part, index",
    )
    pred_N, confidence_N = table["pred"].to_numpy(), table["confidence"].to_numpy().astype(np.float64)
    right_N = table["right"].to_numpy()
    target, certainty = settings.target_precision, settings.certainty
    if not settings.per_class:
        found = lowest_threshold(confidence_N, right_N, target, certainty)
        if found is None:
            raise _unreached(store, settings, int(right_N.sum()), len(table))
        return found.confidence
    by_class = {
        int(pred): lowest_threshold(confidence_N[pred_N == pred], right_N[pred_N == pred], target, certainty)
        for pred in np.unique(pred_N)
    }
    reached = {pred: one.confidence for pred, one in by_class.items() if one is not None}
    if not reached:
        raise _unreached(store, settings, int(right_N.sum()), len(table))
    return reached


def _named(thresholds: Thresholds) -> Any:
    """As JSON keeps them."""
    return {str(pred): t for pred, t in thresholds.items()} if isinstance(thresholds, Mapping) else thresholds


def _unreached(store: Store, settings: SelectSettings, right: int, rows: int) -> SelectionError:
    seen = f"{right} of {rows} labeled rows are right" if rows else "no row of the store carries a label"
    return SelectionError(
        f"{store.root}: no confidence is known to reach a precision of {settings.target_precision:g} with a certainty "
        f"of {settings.certainty:g} ({seen})\nannotate more labeled shards into this store, which the teacher wasn't "
        "trained on; or lower --target-precision or --certainty"
    )


def _result(written: Selection, seconds: float) -> SelectResult:
    facts = written.facts
    return SelectResult(
        out=storage.shown(os.fspath(written.root)),
        rows=facts["rows"],
        selected=facts["selected"],
        excluded=facts["excluded_rows"],
        labeled_rows=facts["labeled_rows"],
        estimated_precision=facts["estimated_precision"],
        precision_interval=facts["precision_interval"] and tuple(facts["precision_interval"]),
        estimated_from=facts["estimated_from"],
        checked=facts["checked"],
        classes=tuple(ClassCoverage(**one) for one in facts["classes"]),
        seconds=seconds,
        fingerprint=written.fingerprint,
    )
