"""How the benchmarks are run and how they print.

Ratios are taken within a repetition, between variants that run in turns, and the median over repetitions is printed:
what else runs on the machine then disturbs both sides alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from pseudolabel.devices import resolve_device

Result = TypeVar("Result")
Row = dict[str, str | float | None]


def parse_arguments(
    doc: str | None, *, device: bool = True, flags: Mapping[str, str] | None = None
) -> argparse.Namespace:
    """`--quick`, `--json`, `--device` where it matters, and `flags` of one's own with their help."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a run of some seconds: is the script sound?")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    if device:
        parser.add_argument("--device", default="auto", type=resolve_device, help="auto, cpu, cuda, cuda:1")
    for flag, text in (flags or {}).items():
        parser.add_argument(flag, action="store_true", help=text)
    return parser.parse_args()


def seeded_parser(doc: str | None, steps: int, images: Path) -> argparse.ArgumentParser:
    """For what students reach: `--quick`, `--json`, `--images`, `--steps` and `--seeds`."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a run of some seconds: is the script sound?")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    parser.add_argument("--images", type=Path, default=images, help="directory of IDX files")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seeds", type=int, default=3)
    return parser


@dataclass
class Report:
    """A table that grows by rows; a cell of `None` was not measured."""

    title: str
    settings: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def print(self, *, as_json: bool) -> None:
        """Markdown on stdout; with `as_json` an object there, and the Markdown on stderr."""
        machine = f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}"
        if torch.cuda.is_available():
            machine += f", {torch.cuda.get_device_name()}"
        shown = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        names = list(self.rows[0])
        lines = [" | ".join(names), " | ".join("---" for _ in names)]
        lines += [" | ".join(_cell(row[name]) for name in names) for row in self.rows]
        table = "\n".join(f"| {line} |" for line in lines)
        print(f"{self.title}: {shown}; {machine}\n\n{table}", file=sys.stderr if as_json else sys.stdout)
        if as_json:
            content = {"title": self.title, "machine": machine, "settings": self.settings, "rows": self.rows}
            print(json.dumps(content))


def _cell(value: str | float | None) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "–" if value is None else value


def in_new_process(work: Callable[..., Result], *args: Any) -> Result:
    """What `work(*args)` gives in a process that has run nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def median(values: Iterable[float]) -> float:
    """To 4 significant digits: more would be noise."""
    return float(f"{statistics.median(values):.4g}")


class Rates(NamedTuple):
    """Images or steps per second of wall time, and of this process's CPU time, which a busy machine distorts less."""

    wall: float
    cpu: float


def rates_of(work: Callable[[], int], device: str, seconds: float) -> Rates:
    """Repeat `work`, which returns how much it did, for `seconds` or a little more."""
    done, wall, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - wall < seconds:
        done += work()
        if device != "cpu":
            torch.cuda.synchronize(device)
    return Rates(done / (time.perf_counter() - wall), done / (time.process_time() - cpu))
