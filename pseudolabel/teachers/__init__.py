"""Where teachers come from: the scheme table. To add a source, write `teachers/x.py` with `make(spec)` and its line
here.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence

from pseudolabel import specs
from pseudolabel.errors import SpecError
from pseudolabel.interfaces import Teacher

SCHEMES = {
    "torchvision": "pseudolabel.teachers.torchvision",
    "checkpoint": "pseudolabel.teachers.checkpoint",
    "python": "pseudolabel.teachers.python",
}


def parse_teacher(uri: str) -> Teacher:
    """Describe a teacher from its URI; nothing is loaded yet. Raises `SpecError`."""
    spec = specs.parse(uri)
    if spec.scheme not in SCHEMES:
        hint = specs.nearest(spec.scheme, SCHEMES)
        raise SpecError(f"{uri}: unknown teacher source {spec.scheme!r}{hint}; known are {', '.join(SCHEMES)}")
    teacher: Teacher = importlib.import_module(SCHEMES[spec.scheme]).make(spec)
    return teacher


def parse_teachers(uris: Sequence[str]) -> Teacher:
    """One teacher, or an ensemble of several; each may carry a weight, `SPEC@0.7`. Raises `SpecError`."""
    members, weights = [], []
    for uri in uris:
        head, at, tail = uri.rpartition("@")
        weight = _number(tail) if at else None
        members.append(parse_teacher(uri if weight is None else head))
        weights.append(1.0 if weight is None else weight)
        if not 0 < weights[-1] < math.inf:
            raise SpecError(f"{uri}: an ensemble weight must be a number above 0")
    if not members:
        raise SpecError("no teacher given; name one with --teacher")
    if len(members) == 1:
        return members[0]
    from pseudolabel.teachers.ensemble import Ensemble

    total = sum(weights)
    return Ensemble(tuple(members), tuple(weight / total for weight in weights))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
