"""Which loss a spec names, and whether it makes sense with these soft labels.

A spec is a name with its parameters: `kd`, `hard?threshold=0.95`, `dkd?beta=4&target=teacher`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pseudolabel import specs
from pseudolabel.errors import SpecError
from pseudolabel.interfaces import Encoding, Loss
from pseudolabel.losses.decoupled import DKD, NKD
from pseudolabel.losses.divergences import JSD, KD, MSE, WTTM, Hard
from pseudolabel.losses.relations import DIST

LOSSES: Mapping[str, type[Loss]] = {
    "kd": KD,
    "hard": Hard,
    "dkd": DKD,
    "nkd": NKD,
    "dist": DIST,
    "wttm": WTTM,
    "jsd": JSD,
    "mse": MSE,
}
_PARTS = {"dkd": ("alpha", "beta"), "dist": ("beta", "gamma")}
_BELOW_1 = {("hard", "threshold"), ("jsd", "beta")}


def parse_loss(text: str) -> Loss:
    """Raises `SpecError` for a name that isn't in the table, and for a parameter that the loss doesn't have or whose
    value makes no sense.
    """
    spec = specs.parse(f"loss:{text}")
    kind = LOSSES.get(spec.name)
    if kind is None:
        raise SpecError(f"no loss {spec.name!r}{specs.nearest(spec.name, LOSSES)}; known are {', '.join(LOSSES)}")
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    arguments = spec.only(defaults)
    for name, value in arguments.items():
        _check_parameter(text, spec.name, name, value, defaults[name])
    if (parts := _PARTS.get(spec.name)) and not any(arguments.get(name, defaults[name]) for name in parts):
        raise SpecError(f"--loss {text}: {parts[0]} and {parts[1]} are both 0, so nothing is left of it")
    return kind(**arguments)


def _check_parameter(text: str, loss: str, name: str, value: Any, default: Any) -> None:
    if isinstance(default, str):
        if value not in ("label", "teacher"):
            raise SpecError(f"--loss {text}: {name} must be label or teacher")
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise SpecError(f"--loss {text}: {name} must be true or false")
    elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise SpecError(f"--loss {text}: {name} must be a number from 0")
    elif (loss, name) in _BELOW_1 and not (value < 1 and (value > 0 or default == 0)):
        raise SpecError(f"--loss {text}: {name} must lie between 0 and 1")


@dataclass(frozen=True)
class SoftLabels:
    """What a loss is to work on: the store's encoding, and how it is read. `unlabeled` says whether there are rows
    without a label.
    """

    encoding: Encoding
    num_classes: int
    temperature: float
    tail: str = "bucket"
    standardize: bool = False
    unlabeled: bool = True


def check_loss(text: str, given: SoftLabels) -> None:
    """Raise `SpecError` where the loss would make no sense, or silently be another one."""
    loss, name = parse_loss(text), text.partition("?")[0]
    needs, encoding = loss.needs, given.encoding
    if given.num_classes < needs.classes:
        raise SpecError(
            f"--loss {name}: with {given.num_classes} classes there is one class beside the target, and nothing to "
            "compare among the others; use kd"
        )
    if encoding.draws and not needs.draws:
        raise SpecError(
            f"--loss {name}: of labels stored as {encoding.name} only kd and hard are right on average, since each row "
            "holds a few classes drawn at random; use kd, or annotate with --encoding dense"
        )
    if needs.outcomes == "logits" and encoding.sparse:
        raise SpecError(
            f"--loss {name}: needs the logits of all classes, the store keeps {encoding.name}; use kd, or annotate "
            "with --encoding dense or dense8"
        )
    if needs.outcomes == "classes" and encoding.sparse and given.tail == "bucket":
        raise SpecError(
            f"--loss {name}: needs a probability of each class, the store keeps {encoding.name} and the others as one "
            "bucket; use kd, or --tail uniform"
        )
    if needs.target and getattr(loss, "target", None) == "label" and given.unlabeled:
        raise SpecError(
            f"--loss {name}: parts a row's label from the other classes, and unlabeled rows have none\nwrite "
            f"{text}{'&' if '?' in text else '?'}target=teacher to take the teacher's class for it, or use kd"
        )
    if given.standardize and not needs.standardizes:
        able = ", ".join(name for name, kind in LOSSES.items() if kind.needs.standardizes)
        raise SpecError(f"--standardize: makes no sense with --loss {name}; it works with {able}")
    if given.standardize and given.num_classes < 3:
        raise SpecError(
            f"--standardize: the z-scores of {given.num_classes} logits say only which is larger; leave it out"
        )
    if given.standardize and encoding.sparse:
        raise SpecError(
            f"--standardize: needs the logits of all classes, the store keeps {encoding.name}; leave it out, or "
            "annotate with --encoding dense or dense8"
        )
    if needs.temperature:
        encoding.check_temperature(given.temperature)
