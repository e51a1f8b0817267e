"""What a selection holds: coverage by class, and what its labels are worth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pseudolabel.estimates import wilson
from pseudolabel.labels.store import Store
from pseudolabel.selection.rules import LIMITS, eligible, exact_sum, limits
from pseudolabel.settings import SelectSettings

if TYPE_CHECKING:
    from pseudolabel.database import Connection


def why_nothing(
    connection: Connection, settings: SelectSettings, store: Store, thresholds: Mapping[int, float] | float | None
) -> str:
    """The message for an empty selection: what left nothing, and what would have passed."""
    total, unlabeled = connection.execute("select count(*), count(*) filter (label is null) from scores").fetchall()[0]
    if not total:
        return f"{store.root}: has no rows; annotate shards into it first"
    if not unlabeled and not settings.include_labeled:
        return (
            f"{store.root}: all {total} rows carry a label, and such rows are evidence; annotate unlabeled shards into "
            "this store, or add --include-labeled"
        )
    passing = eligible(settings)
    left = _count(connection, passing)
    if not left:
        free = total if settings.include_labeled else unlabeled
        return f"{store.root}: all {free} rows that could be selected are excluded; is --exclude of these shards?"
    for name, limit in limits(settings).items():
        passed = _count(connection, f"{passing} and {limit}")
        if not passed:
            flag = f"--{name.replace('_', '-')}"
            return (
                f"{store.root}: none of {_rows(left, total, settings, unlabeled)} passes {flag} "
                f"{getattr(settings, name):g}; the {_nearest(connection, name, passing)}\nloosen {flag}"
            )
        passing, left = f"{passing} and {limit}", passed
    found = f"{store.root}: none of {_rows(left, total, settings, unlabeled)} reaches "
    remedy = "\nlower --target-precision or --certainty, or annotate more labeled shards into this store"
    if isinstance(thresholds, Mapping):
        return (
            f"{found}its class's threshold for --target-precision {settings.target_precision:g}: {len(thresholds)} of "
            f"{store.identity.num_classes} classes have one{remedy}"
        )
    return (
        f"{found}the confidence of {thresholds:.7g} from which on --target-precision {settings.target_precision:g} is "
        f"kept; the {_nearest(connection, 'min_confidence', passing)}{remedy}"
    )


def why_weightless(settings: SelectSettings, store: Store) -> str:
    """The message for a selection in which no row has any weight."""
    return (
        f"{store.root}: --weight {settings.weight} gives every row that passes the weight 0: the teacher takes all "
        "classes for as likely\nleave out --weight, or look at the teacher"
    )


def _count(connection: Connection, where: str) -> int:
    found = connection.execute(f"select count(*) from scores where {where}").fetchall()
    return int(found[0][0])


def _rows(left: int, total: int, settings: SelectSettings, unlabeled: int) -> str:
    return f"{left} rows" if left == (total if settings.include_labeled else unlabeled) else f"the {left} rows left"


def _nearest(connection: Connection, name: str, where: str) -> str:
    """The value that the limit of this name would have to have for one row to pass."""
    column, comparison = LIMITS[name]
    which, of = ("largest", "max") if comparison == ">=" else ("smallest", "min")
    value = connection.execute(f"select {of}({column}) from scores where {where}").fetchall()[0][0]
    return f"{which} {column} of these is {np.float32(value)!s}"


def findings(connection: Connection, settings: SelectSettings, store: Store) -> dict[str, Any]:
    """Coverage by class, and what the labels are worth."""
    among = "true" if settings.include_labeled else "label is null"
    rows = dict(connection.execute(f"select pred, count(*) from scores where {among} group by pred").fetchall())
    chosen = connection.execute(
        f"select pred, count(*), {exact_sum('weight')}, min(confidence) from chosen group by pred"
    ).fetchall()
    by_class = {pred: (count, weight, least) for pred, count, weight, least in chosen}
    names = store.identity.classes
    classes = []
    for pred, name in enumerate(names):
        count, weight, least = by_class.get(pred, (0, 0.0, None))
        classes.append(
            {"name": name, "rows": rows.get(pred, 0), "selected": count, "weight": weight, "threshold": least}
        )
    excluded, labeled = connection.execute(
        "select count(*) filter (excluded), count(*) filter (label is not null) from scores"
    ).fetchall()[0]
    return {
        "rows": sum(rows.values()),
        "selected": sum(count for count, _, _ in by_class.values()),
        "excluded_rows": excluded,
        "labeled_rows": labeled,
        **_worth(connection),
        "classes": classes,
    }


def _worth(connection: Connection) -> dict[str, Any]:
    """Of a class that was cut to its most confident rows, the evidence is cut at the same confidence."""
    found = connection.execute(
        "with kept as (select pred, min(confidence) least, count(*) n from chosen group by pred), "
        "offered as (select pred, count(*) n from candidates group by pred), "
        "cut as (select pred, k.n, if(k.n < o.n, least, 0) as least from kept k join offered o using (pred)) "
        "select n, count(e.pred), count(e.pred) filter (e.pred = e.label) from cut left join passing e "
        "on e.pred = cut.pred and e.confidence >= cut.least group by cut.pred, n order by cut.pred"
    ).fetchall()
    checked, right = sum(seen for _, seen, _ in found), sum(hits for _, _, hits in found)
    if not checked:
        mean = connection.execute(f"select {exact_sum('confidence')} / count(*) from chosen").fetchall()[0][0]
        return {
            "estimated_precision": round(mean, 6),
            "precision_interval": None,
            "estimated_from": "confidence",
            "checked": 0,
        }
    total = sum(count for count, _, _ in found)
    precision = sum(count / total * (hits / seen if seen else right / checked) for count, seen, hits in found)
    return {
        "estimated_precision": round(precision, 6),
        "precision_interval": [round(end, 6) for end in wilson(min(precision, 1.0), checked)],
        "estimated_from": "labels",
        "checked": checked,
    }
