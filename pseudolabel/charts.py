"""Histograms and answers for a terminal. Nothing here decides anything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pseudolabel.labels.histograms import Agreement, Histogram, StoreHistograms
    from pseudolabel.labels.query import Answer

_WIDTH = 32  # of the longest bar
_UNEVEN = 100  # the largest count as a multiple of the smallest, from which on bars tell logarithms
_MOST_CLASSES = 20
_LONGEST = 60  # letters of a value


def print_histograms(found: StoreHistograms, classes: Sequence[str], file: Any) -> None:
    """Confidence, entropy, margin, the predicted classes, and where there are labels, how many agree."""
    print(f"\n{found.rows:,} rows of view {found.view}", file=file)
    for name, unit in (("confidence", ""), ("entropy", ", in nats"), ("margin", "")):
        histogram: Histogram = getattr(found, name)
        _print_bars(f"{name}{unit}", zip(_bins(histogram.edges), histogram.counts, strict=True), file)
    order = sorted(range(len(classes)), key=lambda one: (-found.classes[one], one))
    title = f"predicted classes, {sum(map(bool, found.classes)):,} of {len(classes):,}"
    if len(order) > _MOST_CLASSES:
        order = [*order[: _MOST_CLASSES // 2], *order[-_MOST_CLASSES // 2 :]]
        title += f"; the {_MOST_CLASSES // 2} most frequent and the {_MOST_CLASSES // 2} rarest"
    _print_bars(title, ((_short(classes[one], 32), found.classes[one]) for one in order), file)
    if found.labeled is not None:
        _print_agreement(found.labeled, file)


def _print_agreement(labeled: Agreement, file: Any) -> None:
    print(f"\nagreement with labels: {labeled.accuracy:.2%} of {labeled.rows:,} rows; by confidence", file=file)
    for name, rows, agreeing in zip(_bins(labeled.edges), labeled.counts, labeled.agreeing_counts, strict=True):
        if rows:
            print(
                f"  {name}  {agreeing / rows:>7.1%} of {rows:>13,}  {_bar(agreeing / rows, file)}".rstrip(), file=file
            )


def _print_bars(title: str, named: Iterable[tuple[str, int]], file: Any) -> None:
    """A line each; if counts are very uneven, as long as their logarithms."""
    counts = dict(enumerate(named))
    there = [count for _, count in counts.values() if count]
    uneven = bool(there) and max(there) >= _UNEVEN * min(there)
    scale = math.log1p if uneven else float
    longest = scale(max(there, default=1))
    print(f"\n{title}{' (bars: logarithm of the count)' if uneven else ''}", file=file)
    width = max((len(name) for name, _ in counts.values()), default=0)
    for name, count in counts.values():
        print(f"  {name:<{width}}  {count:>13,}  {_bar(scale(count) / longest, file)}".rstrip(), file=file)


def _bins(edges: Sequence[float]) -> list[str]:
    return [f"{low:5.2f} – {high:5.2f}" for low, high in pairwise(edges)]


def _bar(share: float, file: Any) -> str:
    """Of block characters, in eighths; of plain ones for a terminal that has no others."""
    try:
        "█".encode(getattr(file, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return "#" * round(share * _WIDTH)
    whole, eighths = divmod(round(share * _WIDTH * 8), 8)
    return "█" * whole + ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")[eighths]


def print_answer(answer: Answer, file: Any) -> None:
    """A table, and how many rows are not in it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    rows = [[_text(value) for value in row] for row in answer.rows]
    for number, name in enumerate(answer.columns):
        figures = all(isinstance(row[number], (int, float, type(None))) for row in answer.rows)
        table.add_column(Text(name), justify="right" if figures else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    lengths = (max(len(name), *(len(row[i]) for row in rows), 1) for i, name in enumerate(answer.columns))
    wide = sum(lengths) + 2 * len(answer.columns)
    Console(file=file, highlight=False, width=max(Console().width, min(wide, 400))).print(table)
    if answer.more:
        print(f"… and {answer.more:,} more rows; ORDER BY and LIMIT choose", file=file)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        shown = ", ".join(map(_text, value[:5]))
        return f"[{shown}, … {len(value):,} in all]" if len(value) > 5 else f"[{shown}]"
    return "" if value is None else _short(str(value), _LONGEST)


def _short(text: str, longest: int) -> str:
    text = "".join(letter if letter.isprintable() else "�" for letter in text)
    return text if len(text) <= longest else text[: longest - 1] + "…"
