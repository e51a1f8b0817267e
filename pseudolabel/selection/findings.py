"""What a selection holds: coverage by class, and what its labels are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pseudolabel.estimates import wilson
from pseudolabel.labels.store import Store
from pseudolabel.selection.rules import exact_sum, filters
from pseudolabel.settings import SelectSettings

if TYPE_CHECKING:
    from pseudolabel.database import Connection


def why_nothing(connection: Connection, settings: SelectSettings, store: Store) -> str:
    """The message for an empty selection: how many rows there were, and what they reach."""
    total, unlabeled, free, top = connection.execute(
        "select count(*), count(*) filter (label is null), count(*) filter (not excluded), max(confidence) from scores"
    ).fetchall()[0]
    if not total:
        return f"{store.root}: has no rows; annotate shards into it first"
    if not unlabeled and not settings.include_labeled:
        return (
            f"{store.root}: all {total} rows carry a label, and such rows are evidence; annotate unlabeled shards into "
            "this store, or add --include-labeled"
        )
    if not free:
        return f"{store.root}: all {total} rows are excluded; is --exclude of these shards?"
    return (
        f"{store.root}: none of {total} rows passes ({filters(settings).replace('::float', '')}); the largest "
        f"confidence is {top:.4f}\nloosen the rules"
    )


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
