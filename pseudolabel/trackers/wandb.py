"""`wandb?project=P`: Weights & Biases; `entity=`, `group=` and `mode=` as in `wandb.init`. Without a network
WANDB_MODE=offline keeps all in ./wandb, or below WANDB_DIR.

After a resume the run of the same id goes on. Online, wandb knows the last step and leaves out what doesn't go beyond
it. Offline it can't know, and its files hold the steps between the checkpoint and the kill twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pseudolabel import specs
from pseudolabel.interfaces import TrackedRun, Tracker
from pseudolabel.specs import Spec

_PATIENCE = 60.0  # seconds for the last uploads: a network that is gone must not hold a training that is done


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, spec: Spec) -> None:
        self._args = spec.only(("project", "entity", "group", "mode"))
        self.name = str(spec)
        self._run: Any = None

    def begin(self, run: TrackedRun) -> str:
        import wandb

        self._run = wandb.init(
            **{"project": "pseudolabel", "group": run.group, **self._args},
            name=run.name,
            config=dict(run.settings),
            id=run.earlier,
            resume="allow" if run.earlier is not None else "never",
            reinit="create_new",  # beside what the user's own program tracks
            settings=wandb.Settings(console="off", finish_timeout=_PATIENCE),
        )
        return str(self._run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def end(self, result: Mapping[str, Any] | None, failure: str | None) -> None:
        self._run.summary.update(dict(result) if result is not None else {"failure": failure})
        self._run.finish(exit_code=0 if result is not None else 1)


def make(spec: Spec) -> Tracker:
    """Check the arguments, and that the package is there. Raises `SpecError`."""
    tracker = Wandb(spec)
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise specs.missing_package(spec, error, "wandb") from error
    return tracker
