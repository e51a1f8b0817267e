"""`mlflow?uri=http://HOST:5000&experiment=E`: a run on an MLflow server; without `uri`, where MLFLOW_TRACKING_URI says.

The extra installs mlflow-skinny, which speaks to servers; a database of one's own (sqlite:///F) needs mlflow itself.
After a resume the run of the same id goes on. Its metrics are asked for first: MLflow would keep a step twice.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from pseudolabel import specs, storage
from pseudolabel.interfaces import TrackedRun, Tracker
from pseudolabel.specs import Spec

_RETRIES = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "4")  # half a minute; its own seven keep a training waiting for four


class Mlflow:
    """A run of MLflow."""

    def __init__(self, spec: Spec) -> None:
        args = spec.only(("uri", "experiment"))
        self._uri, self._experiment = args.get("uri"), args.get("experiment", "pseudolabel")
        shown = "&".join(f"{key}={storage.shown(value)}" for key, value in args.items())
        self.name = f"mlflow?{shown}" if args else "mlflow"
        self._client: Any = None
        self._run_id = ""
        self._known: dict[str, int] = {}

    def begin(self, run: TrackedRun) -> str:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        os.environ.setdefault(*_RETRIES)
        self._client, self._known = MlflowClient(tracking_uri=self._uri), {}
        if run.earlier is not None:
            self._run_id = run.earlier
            self._client.update_run(self._run_id, status="RUNNING")
            for key in self._client.get_run(self._run_id).data.metrics:
                history = self._client.get_metric_history(self._run_id, key)
                self._known[key] = max(metric.step for metric in history)
            return self._run_id
        tags = {"group": run.group} if run.group is not None else {}
        self._run_id = self._client.create_run(self._experiment_id(), run_name=run.name, tags=tags).info.run_id
        self._client.log_batch(self._run_id, params=[Param(key, str(value)) for key, value in run.settings.items()])
        return self._run_id

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self._experiment)
        return str(found.experiment_id if found is not None else self._client.create_experiment(self._experiment))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        new = [Metric(key, value, now, step) for key, value in metrics.items() if step > self._known.get(key, 0)]
        if new:
            self._client.log_batch(self._run_id, metrics=new)

    def end(self, result: Mapping[str, Any] | None, failure: str | None) -> None:
        outcome = result if result is not None else {"failure": failure}
        for key, value in outcome.items():
            self._client.set_tag(self._run_id, f"result.{key}", str(value))
        self._client.set_terminated(self._run_id, "FINISHED" if result is not None else "FAILED")


def make(spec: Spec) -> Tracker:
    """Check the arguments, and that the package is there. Raises `SpecError`."""
    tracker = Mlflow(spec)
    try:
        import mlflow  # noqa: F401
    except ImportError as error:
        raise specs.missing_package(spec, error, "mlflow") from error
    return tracker
