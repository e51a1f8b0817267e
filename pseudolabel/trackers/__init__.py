"""Who else is told of a training's metrics: the table of trackers. To add one, write `trackers/x.py` with `make(spec)`
and its line here.
"""

from __future__ import annotations

import importlib

from pseudolabel import specs
from pseudolabel.errors import SpecError
from pseudolabel.interfaces import Tracker

TRACKERS = {
    "tensorboard": "pseudolabel.trackers.tensorboard",
    "wandb": "pseudolabel.trackers.wandb",
    "mlflow": "pseudolabel.trackers.mlflow",
    "trackio": "pseudolabel.trackers.trackio",
}


def parse_tracker(text: str) -> Tracker:
    """A tracker from its spec, `NAME?arg=value`. Raises `SpecError`, for a package that isn't installed, too."""
    spec = specs.parse_named(text)
    if spec.name not in TRACKERS:
        hint = specs.nearest(spec.name, TRACKERS)
        raise SpecError(f"{text}: unknown tracker {spec.name!r}{hint}; known are {', '.join(TRACKERS)}")
    tracker: Tracker = importlib.import_module(TRACKERS[spec.name]).make(spec)
    return tracker
