"""Telling trackers of a training, so that none of them can end one that is well.

    with Tracking(trackers, run, settings) as tracking:
        tracking.begin(step)      all of them, or an error before the first step
        tracking.log(record)      whoever fails is left out from here on, with a warning
        tracking.finish(result)   or, on an exception, how it failed

What a tracker calls the run is kept in the run directory: after a kill it goes on with the same one.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from pseudolabel.errors import PseudolabelError, TrackerError
from pseudolabel.interfaces import TrackedRun, Tracker
from pseudolabel.rundir import RunDirectory
from pseudolabel.storage.asking import one_line


class Tracking:
    """The trackers of one training."""

    def __init__(self, trackers: Sequence[Tracker], run: RunDirectory, settings: Mapping[str, Any]) -> None:
        self._trackers, self._run, self._settings = list(trackers), run, settings
        self._told: list[Tracker] = []

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            said = (
                "interrupted" if isinstance(error, KeyboardInterrupt) else f"{type(error).__name__}: {one_line(error)}"
            )
            self._end(None, said)

    def begin(self, step: int) -> None:
        """Begin with all of them, at the checkpoint of `step`. Raises `TrackerError` if one can't."""
        names = [tracker.name for tracker in self._trackers]
        if twice := {name for name in names if names.count(name) > 1}:
            raise TrackerError(f"{min(twice)}: the tracker is given twice; leave one out")
        known = self._run.tracked() if names else {}
        for tracker in self._trackers:
            found = self._begin_with(tracker, step, known.get(tracker.name))
            self._told.append(tracker)
            if found is not None and found != known.get(tracker.name):
                known[tracker.name] = found
                self._run.keep_tracked(known)

    def _begin_with(self, tracker: Tracker, step: int, earlier: str | None) -> str | None:
        settings = {**dict(_flat(self._settings)), "fingerprint": self._run.fingerprint}
        run = TrackedRun(self._run.place.name or "run", None, settings, self._run.path / "events", step, earlier)
        try:
            return tracker.begin(run)
        except PseudolabelError:
            raise
        except Exception as error:  # each backend has errors of its own
            raise TrackerError(
                f"{tracker.name}: the tracker can't begin ({one_line(error).strip()})\n"
                "mend that, or leave it out; metrics.jsonl is written in any case"
            ) from error

    def log(self, record: Mapping[str, Any]) -> None:
        """Tell of a line of metrics.jsonl."""
        metrics = {name: value for name, value in record.items() if name != "step" and value is not None}
        for tracker in list(self._told):
            self._tell(tracker, lambda tracker: tracker.log(int(record["step"]), metrics))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Tell of the end, with the result."""
        self._end(result, None)

    def _end(self, result: Mapping[str, Any] | None, failure: str | None) -> None:
        for tracker in list(self._told):
            self._tell(tracker, lambda tracker: tracker.end(result, failure))
        self._told.clear()

    def _tell(self, tracker: Tracker, told: Callable[[Tracker], None]) -> None:
        try:
            told(tracker)
        except Exception as error:  # each backend has errors of its own, and the training is well
            self._told.remove(tracker)
            warnings.warn(
                f"{tracker.name}: tracking failed and is off from here on ({one_line(error)}); training and "
                "metrics.jsonl are whole",
                stacklevel=4,
            )


@dataclasses.dataclass(frozen=True)
class _Grouped:
    """A tracker to which runs go by another name."""

    tracker: Tracker
    run_name: str
    group: str

    @property
    def name(self) -> str:
        return self.tracker.name

    def begin(self, run: TrackedRun) -> str | None:
        return self.tracker.begin(dataclasses.replace(run, name=self.run_name, group=self.group))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.tracker.log(step, metrics)

    def end(self, result: Mapping[str, Any] | None, failure: str | None) -> None:
        self.tracker.end(result, failure)


def grouped(trackers: Sequence[Tracker], *, name: str, group: str) -> list[Tracker]:
    """The same trackers, told that the run is called `name` and belongs to `group`."""
    return [_Grouped(tracker, name, group) for tracker in trackers]


def _flat(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            scalar = value is None or isinstance(value, (str, int, float))
            yield above + name, value if scalar else str(value)
