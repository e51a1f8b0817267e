"""What labels cost by their encoding: bytes, as the real writer writes them, and KL(full ‖ stored). And rejects.

Parquet's bytes are nearly linear in the rows, but not through zero: a footer and the columns' headers are paid for by
every part, and compression gets better as a part grows. So parts of about the size that annotate will write are made
of the probe's rows, whole and halved; the two sizes give the line

    bytes of a part = part_bytes + rows · row_bytes

at the place where it matters. Rows in the encoding that was asked for are annotate's own. Those in others are made of
logits that were kept as float16, less than 1e-6 nats from the full ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from pseudolabel.estimates import effective, wilson
from pseudolabel.interfaces import Encoding
from pseudolabel.labels import schema
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.facts import divergence, fidelity
from pseudolabel.labels.tensors import to_arrow, to_torch
from pseudolabel.plan.probe import Labeled
from pseudolabel.views.draw import row_seeds

KEPT = (5, 10, 20, 50, 100)
_PARTS = 8  # parts of each size whose mean is taken
_LOGITS = "logits"


@dataclass(frozen=True)
class Line:
    """Bytes of a file by its rows."""

    part_bytes: float
    row_bytes: float

    def __call__(self, rows: float, parts: float) -> float:
        return parts * self.part_bytes + rows * self.row_bytes


@dataclass(frozen=True)
class Price:
    """An encoding's bytes, and its mean KL(full ‖ stored) in nats by temperature."""

    encoding: str
    line: Line
    kl: dict[str, float]


@dataclass(frozen=True)
class RejectForecast:
    """The share of samples that get no label, and bytes of their lists. `rows_a_sample`: rejects count as samples."""

    fraction: float
    interval: tuple[float, float]
    bytes: float
    rows_a_sample: float


def candidates(num_classes: int, chosen: str) -> list[str]:
    """The encodings worth a row of the table, from the smallest K to dense; `chosen` is among them."""
    kept = {kept for kept in KEPT if kept < num_classes}
    name = parse_encoding(chosen).name
    if name.startswith("topk:"):
        kept.add(int(name.removeprefix("topk:")))
    drawn = [name] if name.startswith("sampled:") else []
    return [*drawn, *(f"topk:{number}" for number in sorted(kept)), "dense8", "dense"]


def price(labeled: Sequence[Labeled], spec: str, rows_a_part: float, scratch: Path) -> Price:
    """Encode rows that are dense, or in this encoding already, and write parts of them, in `scratch`."""
    encoding = parse_encoding(spec)
    tables, lost = zip(*(_encoded(one, encoding) for one in labeled), strict=True)
    weights = [one.weight if len(one.rows) else 0.0 for one in labeled]
    total = sum(weights) or 1.0
    kl = {at: sum(w * each[at] for w, each in zip(weights, lost, strict=True)) / total for at in lost[0]}
    info = replace(labeled[0].info, encoding=encoding.name, fidelity={"mean": kl, "p99": kl})
    line = fit(pa.concat_tables(tables), rows_a_part, info.to_json(), scratch)
    return Price(encoding.name, line, {at: float(f"{value:.6g}") for at, value in kl.items()})


def forecast_rejects(labeled: Sequence[Labeled], samples: float, shards: float, scratch: Path) -> RejectForecast:
    """What the probe's rejects say of a corpus of so many samples and whole shards.

    A shard has a list of rejects if any sample was rejected. That is known of shards probed whole; in others rejects
    are taken to fall independently of each other.
    """
    weights, total = [one.weight for one in labeled], sum(one.weight for one in labeled)
    fraction = sum(one.weight * len(one.rejects) / one.samples for one in labeled) / total
    rows = sum(one.weight * len(one.rows) / one.samples for one in labeled) / total
    interval = wilson(fraction, sum(one.samples for one in labeled) * effective(weights) / len(weights))
    with_any = sum(one.pick.stands_for * _chance_of_any(one) for one in labeled)
    with_any *= shards / sum(one.pick.stands_for for one in labeled)
    if not with_any:
        return RejectForecast(0.0, interval, 0.0, rows)
    facts = {"format_version": schema.FORMAT_VERSION, "fingerprint": labeled[0].info.fingerprint, "shard": "x" * 12}
    rejects = pa.concat_tables([one.rejects for one in labeled])
    line = fit(rejects, samples * fraction / with_any, facts, scratch)
    return RejectForecast(fraction, interval, line(samples * fraction, with_any), rows)


def _chance_of_any(one: Labeled) -> float:
    if one.samples == one.pick.samples:
        return float(len(one.rejects) > 0)
    return 1 - float((1 - len(one.rejects) / one.samples) ** one.pick.samples)


def fit(rows: pa.Table, rows_a_part: float, metadata: Mapping[str, Any], scratch: Path) -> Line:
    """The line through parts of `rows_a_part` rows, or of all there are, and of half as many. A row is never taken
    to cost more than it does uncompressed.
    """

    def size(table: pa.Table) -> int:
        path = scratch / "priced.parquet"
        schema.write_sealed(path, table, metadata)
        return path.stat().st_size

    top = min(max(round(rows_a_part), 1), len(rows))
    if top == 0:
        return Line(size(rows), 0.0)
    count = min(len(rows) // top, _PARTS)
    starts = [number * (len(rows) - top) // max(count - 1, 1) for number in range(count)]
    whole = statistics.fmean(size(rows.slice(start, top)) for start in starts)
    half = statistics.fmean(size(rows.slice(start, top // 2)) for start in starts)
    row_bytes = min((whole - half) / (top - top // 2), rows.nbytes / len(rows))
    return Line(whole - top * row_bytes, row_bytes)


def _encoded(one: Labeled, encoding: Encoding) -> tuple[pa.Table, dict[str, float]]:
    """Dense rows with `encoding`'s columns in place of the logits, the members' too, and the mean KL by temperature."""
    num_classes = one.info.num_classes
    if one.info.encoding == encoding.name:
        return one.rows, one.lost
    table, lost = one.rows, dict[str, float]()
    seed_B = torch.tensor(row_seeds(table["key"].to_pylist(), table["view"].to_pylist()), dtype=torch.int64)
    for name in [name for name in table.column_names if name == _LOGITS or name.endswith(f"_{_LOGITS}")]:
        logits_BC = to_torch(table[name]).float()
        columns = encoding.encode(logits_BC, seed_B)
        table = table.drop_columns([name])
        for field in encoding.fields(num_classes):
            column = to_arrow(columns[field.name], field.type)
            table = table.append_column(field.with_name(f"{name.removesuffix(_LOGITS)}{field.name}"), column)
        if name == _LOGITS:
            lost = fidelity(divergence(encoding, columns, logits_BC), encoding.temperatures)["mean"]
    return table, lost
