"""What people see: progress on stderr, results as small tables. Nothing here decides anything."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from pseudolabel.calibration.calibrate import CalibrateResult
    from pseudolabel.labeling.line import Progress as AnnotateProgress
    from pseudolabel.plan import Plan
    from pseudolabel.selection.select import SelectResult
    from pseudolabel.shard_lists import Shard
    from pseudolabel.training.loop import TrainProgress

_FEW_STEPS = 100
_QUIET_SECONDS = 10.0  # without a terminal, a line this often


class Display:
    """Progress of one command. On a terminal a live bar with rate and time left, elsewhere a line now and then."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._live: Progress | None = None
        self._training = False
        self._task: TaskID | None = None
        self._started = self._said = time.monotonic()
        self._total = self._ended = self._begun = 0
        self._samples = self._shards = self._failed = 0
        self._spent: dict[str, float] = {}

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def stage(self, title: str, shards: list[Shard] | None = None) -> None:
        """Begin something new; shards are given where an annotation follows."""
        self._close()
        self.say(title)
        if shards is not None:
            self.begin_annotating(shards)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.console.is_terminal:
            self.console.print(text, style="bold", markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def begin_annotating(self, shards: Sequence[Shard]) -> None:
        self._samples = self._shards = self._failed = self._ended = 0
        self._spent = {}
        self._open(len(shards), "shards")

    def annotating(self, progress: AnnotateProgress) -> None:
        """Told of every batch and shard."""
        self._samples += progress.samples
        seconds = max(time.monotonic() - self._started, 1e-9)
        rate = f"{self._samples / seconds:,.0f} samples/s"
        if progress.seconds:
            self._spent = {stage: self._spent.get(stage, 0.0) + s for stage, s in progress.seconds.items()}
        total = sum(self._spent.values())
        if total:
            rate += "".join(f", {stage} {spent / total:.0%}" for stage, spent in self._spent.items())
        self._shards += progress.finished is not None
        self._failed += progress.failure is not None
        self._ended += progress.ends is not None
        failed = f"{self._failed} failed" if self._failed else ""
        where = ", ".join(filter(None, (f"{self._shards} of {self._total} shards done", failed)))
        left = self._left(self._shards, self._total - self._ended)
        self._show(self._ended, ", ".join(filter(None, (failed, rate))), f"{where}{left}: {rate}")

    def training(self, progress: TrainProgress) -> None:
        """Told every few steps."""
        if not self._training:
            if progress.steps < _FEW_STEPS:
                self.say(
                    f"note: {progress.steps} steps in all are few to learn from; a smaller --batch-size or more "
                    "--epochs or --steps give more"
                )
            self._open(progress.steps, "steps")
            self._training, self._begun = True, progress.step
        val = f", val accuracy {progress.val_accuracy:.4f}" if progress.val_accuracy is not None else ""
        text = f"loss {progress.loss:.4f}{val}, {progress.samples_per_second:,.0f} samples/s"
        left = self._left(progress.step - self._begun, progress.steps - progress.step)
        self._show(progress.step, text, f"step {progress.step} of {progress.steps}{left}: {text}")
        if progress.step == progress.steps:
            self._close()

    def _open(self, total: int, unit: str) -> None:
        self._started = self._said = time.monotonic()
        self._total = total
        if self.console.is_terminal:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(unit),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._live = Progress(*columns, console=self.console, transient=True)
            self._live.start()
            self._task = self._live.add_task("", total=total)

    def _show(self, completed: int, text: str, line: str) -> None:
        """`text` beside the bar, or now and then a whole `line`."""
        if self._live is not None and self._task is not None:
            self._live.update(self._task, description=text, completed=completed)
        elif time.monotonic() - self._said > _QUIET_SECONDS:
            self._said = time.monotonic()
            print(f"  {line}", file=sys.stderr, flush=True)

    def _left(self, done: int, remaining: int) -> str:
        """How long the rest takes at the pace so far."""
        if done <= 0 or remaining <= 0:
            return ""
        return f", {_duration((time.monotonic() - self._started) / done * remaining)} left"

    def _close(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live = self._task = None
        self._training = False


def print_pairs(values: Mapping[str, Any], file: Any) -> None:
    """Name and value, a line each."""
    width = max(len(name) for name in values)
    for name, value in values.items():
        shown = f"{value:.4f}" if isinstance(value, float) else value
        print(f"{name.replace('_', ' '):<{width}}  {shown}", file=file)


def print_confusion(classes: Sequence[str], counts: Sequence[Sequence[int]], file: Any) -> None:
    """The largest confusions, or the whole matrix if it fits a screen."""
    if len(classes) <= 12:
        width = max(5, *(len(str(count)) + 1 for row in counts for count in row))
        print("confusion (row: class, column: prediction)", file=file)
        for name, row in zip(classes, counts, strict=True):
            print("".join(f"{count:>{width}}" for count in row) + f"  {name}", file=file)
        return
    pairs = [(n, classes[i], classes[j]) for i, row in enumerate(counts) for j, n in enumerate(row) if i != j and n]
    print("most frequent confusions (count: class taken for class)", file=file)
    for count, wanted, found in sorted(pairs, reverse=True)[:10]:
        print(f"{count:>6}: {wanted} taken for {found}", file=file)


def print_calibration(result: CalibrateResult, file: Any) -> None:
    """Figures before and after with their intervals, then confidence against accuracy."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    stages = {"before": result.before, "calibrated": result.after, "and aligned": result.aligned}
    shown = {name: found for name, found in stages.items() if found is not None}
    for title in ("", *shown):
        table.add_column(title, justify="left" if not title else "right")
    for name in ("accuracy", "mean_confidence", "nll", "ece", "brier"):
        cells = (
            f"{one[name]:.4f} ({one['intervals'][name][0]:.4f}–{one['intervals'][name][1]:.4f})"
            for one in shown.values()
        )
        table.add_row(name.replace("_", " "), *cells)
    console = Console(file=file, highlight=False, width=max(Console().width, 110))
    console.print(table)
    bins = Table(box=None, pad_edge=False, title="confidence → accuracy (rows)", title_justify="left")
    for title in shown:
        bins.add_column(title, justify="right")
    columns = [{found["bin"]: found for found in one["reliability"]} for one in shown.values()]
    for place in sorted(set().union(*columns)):
        bins.add_row(*(_bin(column.get(place)) for column in columns))
    console.print(bins)
    pairs = {"method": result.method, "temperature": result.temperature, "out": result.out or "nothing written"}
    print_pairs({"rows": f"{result.rows} of {result.labeled_rows} with a label", **pairs}, file)


def _bin(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f"{found['confidence']:.3f} → {found['accuracy']:.3f} ({found['rows']:,})"


def print_coverage(result: SelectResult, file: Any) -> None:
    """What is selected of each class; of many classes those with the least and the most."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("class", "rows", "selected", "share", "weight", "from confidence"):
        table.add_column(title, justify="left" if title == "class" else "right")
    ordered = sorted(result.classes, key=lambda one: -one.selected)
    few = ordered if len(ordered) <= 20 else [*ordered[:8], None, *ordered[-8:]]
    for one in few:
        if one is None:
            table.add_row(f"… {len(ordered) - 16} more")
            continue
        share = f"{one.selected / one.rows:.1%}" if one.rows else ""
        least = f"{one.threshold:.4f}" if one.threshold is not None else ""
        table.add_row(one.name, f"{one.rows:,}", f"{one.selected:,}", share, f"{one.weight:,.1f}", least)
    Console(file=file, highlight=False, width=max(Console().width, 90)).print(table)


def print_rounds(rows: Sequence[Mapping[str, Any]], file: Any) -> None:
    """The final table of a run."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    compared = any(row["gain"] is not None for row in rows)
    for title in ("", "student", "parameters", "val", "test", *(["gain over labels alone"] if compared else [])):
        table.add_column(title, justify="left" if title in ("", "student") else "right")
    for row in rows:
        gain = "" if row["gain"] is None else f"{100 * row['gain']:+.2f} points"
        accuracies = (
            "" if row[name] is None else f"{100 * row[name]:.2f} %" for name in ("val_accuracy", "test_accuracy")
        )
        shown = (row["name"], row["student"], f"{row['parameters']:,}", *accuracies)
        table.add_row(*shown, *([gain] if compared else []))
    Console(file=file, highlight=False, width=max(Console().width, 110)).print(table)


def print_plan(plan: Plan, file: Any) -> None:
    """The bill: what is to be done, how long it takes, how many bytes; then the encodings to choose from."""
    low, high = plan.samples_interval
    how = "counted" if plan.samples_exact else f"±{plan.samples_standard_error:,.0f}; 95 %: {low:,} to {high:,}"
    least, most = plan.reject_interval
    pairs = {"shards": f"{plan.shards:,}, {plan.shards_done:,} of them done ({plan.shards_indexed:,} opened)"}
    if plan.shards > plan.shards_done:
        pairs |= {
            "samples": f"{plan.samples:,} ({how}) in {_size(plan.shard_bytes)}",
            "rejects": f"{plan.rejects:,} ({plan.reject_fraction:.2%}; 95 %: {least:.2%} to {most:.2%})",
            "time": f"{_duration(plan.seconds)} here: start-up {_duration(plan.startup_seconds)}, then "
            f"{plan.samples_per_second:,.1f} samples/s",
            "device-hours": f"{plan.device_hours:,.3g} ({plan.devices} × {plan.device}, {plan.workers} workers)",
            "to write": f"{_size(plan.bytes_to_write)} ({plan.encoding})",
        }
    print_pairs({**pairs, "store": _size(plan.store_bytes)}, file)
    if plan.encodings:
        print_encodings(plan, file)
    print(f"recommended: {plan.recommended or '–'}: {plan.reason}", file=file)
    for line in (*plan.damaged[:5], *plan.notes):
        print(f"note: {line}", file=file)


def print_encodings(plan: Plan, file: Any) -> None:
    """Bytes and loss of every encoding; the chosen one is marked."""
    from rich.console import Console
    from rich.table import Table

    temperatures = plan.encodings[-1].kl  # of dense
    table = Table(box=None, pad_edge=False, title="KL(full || stored), mean, in nats", title_justify="right")
    for title in ("encoding", "", "bytes/row", "store", *(f"T={at}" for at in temperatures)):
        table.add_column(title, justify="left" if title in ("encoding", "") else "right")
    for row in plan.encodings:
        mark = "chosen" if row.chosen else ""
        lost = (f"{row.kl[at]:.2g}" if at in row.kl else "" for at in temperatures)
        table.add_row(row.encoding, mark, f"{row.bytes_per_row:,.1f}", _size(row.store_bytes), *lost)
    Console(file=file, highlight=False, width=max(Console().width, 90)).print(table)


def _size(count: float) -> str:
    """Bytes in units of a thousand."""
    units = ["PB", "TB", "GB", "MB", "kB", "bytes"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop()
    return f"{count:,.0f} {units[-1]}" if units[-1] == "bytes" else f"{count:,.3g} {units[-1]}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"
