"""The rules of a selection, as questions to the scores.

    candidates   rows without a label, not excluded, that pass all filters and reach their threshold
    chosen       of these the top K of each predicted class, and no more than balancing leaves, with their weight

Rows of equal confidence are taken in the order of their entropy, then of the store: the same rows at every call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pseudolabel.settings import SelectSettings

if TYPE_CHECKING:
    from pseudolabel.database import Connection

LIMITS = {
    "min_confidence": ("confidence", ">="),
    "min_margin": ("margin", ">="),
    "max_entropy": ("entropy", "<="),
    "max_disagreement": ("disagreement", "<="),
}
"""Settings that are limits, in the order in which they are told: the column, and how a row must compare with them."""

_LARGEST = 3e38  # of a float32, nearly
_MOST_KEPT = 999_999  # values that DuckDB's max(value, n) keeps
_ORDER = "confidence desc, entropy, part, index"


def limits(settings: SelectSettings) -> dict[str, str]:
    """By setting, what a row must be like, as SQL. Limits are compared as the columns are kept, in float32."""
    given = {name: getattr(settings, name) for name in LIMITS}
    return {
        name: f"{' '.join(LIMITS[name])} {min(value, _LARGEST)!r}::float"
        for name, value in given.items()
        if value is not None
    }


def filters(settings: SelectSettings) -> str:
    """All limits as one."""
    return " and ".join(limits(settings).values()) or "true"


def eligible(settings: SelectSettings) -> str:
    """Which rows may be selected at all, as SQL."""
    return "not excluded" if settings.include_labeled else "not excluded and label is null"


def mark_candidates(
    connection: Connection, settings: SelectSettings, thresholds: Mapping[int, float] | float | None
) -> int:
    """Make the views `candidates` and `passing`, the evidence that fares as they do; `thresholds` are of all rows, or
    by class (others have no candidates). Returns how many candidates there are.
    """
    reached = "true"
    if isinstance(thresholds, Mapping):
        connection.execute("create table thresholds(pred int, least float)")
        if thresholds:
            connection.executemany("insert into thresholds values (?, ?)", [list(pair) for pair in thresholds.items()])
        reached = "confidence >= (select least from thresholds t where t.pred = s.pred)"
    elif thresholds is not None:
        reached = f"confidence >= {thresholds!r}::float"
    connection.execute(
        f"create view candidates as select * from scores s where {eligible(settings)} and {filters(settings)} "
        f"and {reached}"
    )
    connection.execute(f"create view passing as select * from evidence s where {filters(settings)} and {reached}")
    return _number(connection, "select count(*) from candidates")


def choose(connection: Connection, settings: SelectSettings, num_classes: int) -> int:
    """Make the table `chosen(part, index, pred, confidence, label, weight)`; weights have a mean of 1. Returns how many
    rows were chosen: rows of weight 0 are not.
    """
    size = _class_size(connection, settings)
    most = min((number for number in (settings.top_per_class, size) if number is not None), default=None)
    if most is None:
        connection.execute("create view ranked as select * from candidates")
    else:
        least = f"list_min(max(confidence, {most}))" if most <= _MOST_KEPT else "0::float"  # drops rows before sorting
        connection.execute(f"create table cuts as select pred, {least} as least from candidates group by pred")
        connection.execute(
            "create table ranked as select c.* from candidates c join cuts using (pred) where c.confidence >= least "
            f"qualify row_number() over (partition by c.pred order by {_ORDER}) <= {most}"
        )
    soft = {
        "none": "1.0",
        "confidence": "confidence",
        "entropy": f"greatest(1 - entropy / {math.log(max(num_classes, 2))!r}, 0)",
    }[settings.weight]
    balanced = "1.0"
    if size is not None:
        balanced = f"least({size} / count(*) over (partition by pred), {settings.max_weight!r})"
    connection.execute(
        "create table weighed as select part, index, pred, confidence, label, weight from ("
        f"select *, ({soft})::double * ({balanced})::double as weight from ranked) where weight > 0"
    )
    mean = f"(select {exact_sum('weight')} / count(*) from weighed)"
    connection.execute(f"create table chosen as select * replace ((weight / {mean})::float as weight) from weighed")
    return _number(connection, "select count(*) from chosen")


def exact_sum(column: str) -> str:
    """SQL that adds a column up in whole billionths: in which order threads add doubles is chance."""
    return f"(sum(({column}::double * 1e9)::hugeint)::double / 1e9)"


def _class_size(connection: Connection, settings: SelectSettings) -> int | None:
    """How many rows balancing makes each class count for."""
    if settings.balance != "mean":
        return settings.balance
    mean = connection.execute("select avg(n) from (select count(*) n from candidates group by pred)").fetchone()
    return max(round(mean[0]), 1) if mean is not None and mean[0] is not None else 1


def _number(connection: Connection, question: str) -> int:
    found = connection.execute(question).fetchone()
    assert found is not None
    return int(found[0])
