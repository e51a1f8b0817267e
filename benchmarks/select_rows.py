"""Selecting from ten million rows of a thousand classes: seconds, and the most memory of the process.

    python benchmarks/select_rows.py [--quick] [--json]

The store is made: 1,000 parts of 10,000 rows in `topk:5` (--quick: 20 parts), of a few different parts under many
names. Each question is the command, from its start to its end, writing the selection included. The limits are a minute
and a gigabyte.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import made
import setup

from pseudolabel.labels.store import Store

ROWS, CLASSES, DIFFERENT = 10_000, 1000, 4
SECONDS, BYTES = 60.0, 1 << 30
QUESTIONS = {
    "inspect": ["inspect"],
    "histograms": ["inspect", "--histograms"],
    "top 100 a class": ["select", "--top-per-class", "100"],
    "confidence ≥ 0.9": ["select", "--min-confidence", "0.9"],
    "balance 5,000 a class": ["select", "--balance", "5000", "--weight", "confidence"],
}
# `getrusage` counts what a parent held when it forked, so the process says itself what it held.
COMMAND = """
import atexit, sys
from pathlib import Path
from pseudolabel.cli import main

def tell():
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmHWM")), file=sys.stderr)

atexit.register(tell)
sys.argv[0] = "pseudolabel"
main()
"""


def to(name: str, out: Path) -> list[str]:
    """Where a selection goes."""
    return ["--out", str(out)] if QUESTIONS[name][0] == "select" else []


def make_store(root: Path, parts: int) -> Store:
    """Parts that differ in their names alone are written from the same tables."""
    logits = [made.peaked_logits(ROWS, CLASSES, seed) for seed in range(DIFFERENT)]
    store = made.store_of(root, {"first-0000": (logits[0][:10], None)}, "topk:5")
    built = [made.build_part("x", one, "topk:5", fingerprint=store.fingerprint) for one in logits]
    for number in range(parts):
        one = built[number % DIFFERENT]
        store.commit(dataclasses.replace(one.info, shard=f"shard-{number:04d}"), one.part, one.rejects)
    return store


def ask(arguments: Sequence[str]) -> tuple[dict[str, Any], float, float]:
    """The command's JSON, its seconds from start to end, and the most memory that it held, in bytes."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", COMMAND, *arguments, "--json"], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout), seconds, 1024.0 * int(done.stderr.splitlines()[-1])


def main() -> None:
    arguments = setup.parse_arguments(__doc__, device=False)
    parts = 20 if arguments.quick else 1000
    report = setup.Report("select", {"parts": parts, "rows": parts * ROWS, "classes": CLASSES})
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "store"
        make_store(root, parts)
        for name in QUESTIONS:
            out = Path(directory) / name.replace(" ", "-")
            found, seconds, memory = ask([*QUESTIONS[name][:1], str(root), *QUESTIONS[name][1:], *to(name, out)])
            rows = found["selected"] if QUESTIONS[name][0] == "select" else found["rows"]
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
