"""`tensorboard`: event files in the run's events/ directory; `tensorboard --logdir RUN` shows them.

    file_version, "from step N + 1 on what came before is void", settings as a text, then scalars

Written by the tensorboard package's own records, one by one: no TensorFlow, and no thread behind which a full disk
would go unseen. After a resume a new file voids what the earlier ones say of later steps than the checkpoint's.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

from pseudolabel import specs
from pseudolabel.interfaces import TrackedRun, Tracker
from pseudolabel.specs import Spec


class TensorBoard:
    """Writes what TensorBoard reads."""

    name = "tensorboard"
    _file: Any = None
    _records: Any = None

    def begin(self, run: TrackedRun) -> str:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.plugins.text.summary_v2 import text_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        run.events.mkdir(parents=True, exist_ok=True)
        # Readers take a directory's files in the order of their names: two that began in one second need the fraction.
        path = run.events / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(path, "wb")  # noqa: SIM115 - as long as the training
        self._records = RecordWriter(self._file)
        header = [
            Event(file_version="brain.Event:2"),
            Event(step=run.step + 1, session_log=SessionLog(status=SessionLog.START)),
        ]
        if run.earlier is None:
            rows = "\n".join(f"| {name} | {value} |" for name, value in run.settings.items())
            header.append(Event(step=0, summary=text_pb("settings", f"| | |\n|---|---|\n{rows}")))
        self._write(*header)
        return "events"

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(Event(step=step, summary=Summary(value=values)))

    def end(self, result: Mapping[str, Any] | None, failure: str | None) -> None:
        self._file.close()

    def _write(self, *events: Any) -> None:
        try:
            for event in events:
                if not event.wall_time:
                    event.wall_time = time.time()
                self._records.write(event.SerializeToString())
            self._records.flush()  # each line at once: what a checkpoint takes along must be in the file
        except OSError:
            with contextlib.suppress(OSError):  # what it still holds can't be written either
                self._file.close()
            raise


def make(spec: Spec) -> Tracker:
    """Check that the package is there. Raises `SpecError`."""
    spec.only(())
    try:
        import tensorboard.summary.writer.record_writer  # noqa: F401
    except ImportError as error:
        raise specs.missing_package(spec, error, "tensorboard") from error
    return TensorBoard()
