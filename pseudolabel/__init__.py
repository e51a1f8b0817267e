"""Annotate once with a big teacher, keep its soft labels in Parquet, train small students offline, round after round.

The Python API mirrors the commands; names are imported when first used, so that `import pseudolabel` costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pseudolabel.annotate import AnnotateResult as AnnotateResult
    from pseudolabel.annotate import annotate as annotate
    from pseudolabel.annotate import annotate_shard as annotate_shard
    from pseudolabel.calibration import read_calibration as read_calibration
    from pseudolabel.calibration.calibrate import calibrate as calibrate
    from pseudolabel.duplicates.ledger import read_leaks as read_leaks
    from pseudolabel.engines.local import LocalEngine as LocalEngine
    from pseudolabel.errors import PseudolabelError as PseudolabelError
    from pseudolabel.evaluate import evaluate as evaluate
    from pseudolabel.labels.store import open_store as open_store
    from pseudolabel.labels.summary import summarize_store as summarize_store
    from pseudolabel.labels.verify import verify as verify
    from pseudolabel.leaks import find_leaks as find_leaks
    from pseudolabel.losses import kd_loss as kd_loss
    from pseudolabel.pack import pack as pack
    from pseudolabel.place import Place as Place
    from pseudolabel.plan import Plan as Plan
    from pseudolabel.plan import plan as plan
    from pseudolabel.recipe import load_recipe as load_recipe
    from pseudolabel.replay import open_replay as open_replay
    from pseudolabel.replay import replay as replay
    from pseudolabel.report import write_report as write_report
    from pseudolabel.rounds import run as run
    from pseudolabel.selection import open_selection as open_selection
    from pseudolabel.selection.select import select as select
    from pseudolabel.settings import AnnotateSettings as AnnotateSettings
    from pseudolabel.settings import SelectSettings as SelectSettings
    from pseudolabel.settings import TrainSettings as TrainSettings
    from pseudolabel.shard_lists import list_shards as list_shards
    from pseudolabel.shards import read_samples as read_samples
    from pseudolabel.teachers import parse_teacher as parse_teacher
    from pseudolabel.teachers import parse_teachers as parse_teachers
    from pseudolabel.trackers import parse_tracker as parse_tracker
    from pseudolabel.train import train as train

__version__ = "0.1.0"

_HOME = {
    "AnnotateResult": "annotate",
    "annotate": "annotate",
    "annotate_shard": "annotate",
    "read_calibration": "calibration",
    "calibrate": "calibration.calibrate",
    "read_leaks": "duplicates.ledger",
    "LocalEngine": "engines.local",
    "PseudolabelError": "errors",
    "evaluate": "evaluate",
    "open_store": "labels.store",
    "summarize_store": "labels.summary",
    "verify": "labels.verify",
    "find_leaks": "leaks",
    "kd_loss": "losses",
    "pack": "pack",
    "Plan": "plan",
    "plan": "plan",
    "load_recipe": "recipe",
    "open_replay": "replay",
    "replay": "replay",
    "write_report": "report",
    "Place": "place",
    "run": "rounds",
    "open_selection": "selection",
    "select": "selection.select",
    "AnnotateSettings": "settings",
    "SelectSettings": "settings",
    "TrainSettings": "settings",
    "list_shards": "shard_lists",
    "read_samples": "shards",
    "parse_teacher": "teachers",
    "parse_teachers": "teachers",
    "parse_tracker": "trackers",
    "train": "train",
}
__all__ = sorted(_HOME)


class _Package(ModuleType):
    """Here `annotate` is the function, though a module has that name, too: importing the module must not take its
    place.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
        setattr(self, name, value)
        return value


sys.modules[__name__].__class__ = _Package
