"""Selecting from ten million rows of a thousand classes: seconds, and the most memory of the process.

    python benchmarks/select_rows.py [--quick] [--json]

The store is made: 1,000 parts of 10,000 rows in `topk:5` (--quick: 20 parts), of a few different parts under many
names. Each question runs in a process of its own, with what a user would wait for: opening the store, reading the
columns, sorting, writing the selection. The limits are a minute and a gigabyte.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import made
import setup

from pseudolabel.labels.histograms import store_histograms
from pseudolabel.labels.store import Store
from pseudolabel.labels.summary import summarize_store
from pseudolabel.selection.select import select
from pseudolabel.settings import SelectSettings

ROWS, CLASSES, DIFFERENT = 10_000, 1000, 4
SECONDS, BYTES = 60.0, 1 << 30
RULES: dict[str, dict[str, Any]] = {
    "top 100 a class": {"top_per_class": 100},
    "confidence ≥ 0.9": {"min_confidence": 0.9},
    "balance 5,000 a class": {"balance": 5000, "weight": "confidence"},
}


def make_store(root: Path, parts: int) -> Store:
    """Parts that differ in their names alone are written from the same tables."""
    logits = [made.peaked_logits(ROWS, CLASSES, seed) for seed in range(DIFFERENT)]
    store = made.store_of(root, {"first-0000": (logits[0][:10], None)}, "topk:5")
    built = [made.build_part("x", one, "topk:5", fingerprint=store.fingerprint) for one in logits]
    for number in range(parts):
        one = built[number % DIFFERENT]
        store.commit(dataclasses.replace(one.info, shard=f"shard-{number:04d}"), one.part, one.rejects)
    return store


def question(root: Path, name: str, out: Path) -> tuple[int, float, float]:
    """Rows in the answer, seconds, and this process's largest memory in bytes."""
    started = time.perf_counter()
    if name == "inspect":
        rows = summarize_store(root).rows
    elif name == "histograms":
        rows = int(sum(store_histograms(root).confidence.counts))
    else:
        rows = select(root, out, SelectSettings(**RULES[name])).selected
    seconds = time.perf_counter() - started
    return rows, seconds, largest_memory()


def largest_memory() -> float:
    """The most that this process has held, in bytes. (`getrusage` counts what its parent held when it was forked.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def main() -> None:
    arguments = setup.parse_arguments(__doc__, device=False)
    parts = 20 if arguments.quick else 1000
    report = setup.Report("select", {"parts": parts, "rows": parts * ROWS, "classes": CLASSES})
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "store"
        make_store(root, parts)
        for name in ("inspect", "histograms", *RULES):
            out = Path(directory) / name.replace(" ", "-")
            rows, seconds, memory = setup.in_new_process(question, root, name, out)
            report.rows.append(
                {
                    "question": name,
                    "rows in the answer": f"{rows:,}",
                    "seconds": seconds,
                    "of a minute": seconds / SECONDS,
                    "memory, MB": memory / 1e6,
                    "of 1 GiB": memory / BYTES,
                }
            )
    report.print(as_json=arguments.json)


if __name__ == "__main__":
    main()
