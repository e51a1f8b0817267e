"""Where teachers come from: the scheme table. To add a source, write `teachers/x.py` with `make(spec)` and its line
here.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Sequence
from pathlib import Path

from pseudolabel import specs
from pseudolabel.classes.map import ClassMap, MappedTeacher, read_class_map
from pseudolabel.errors import SpecError
from pseudolabel.interfaces import Teacher

SCHEMES = {
    "torchvision": "pseudolabel.teachers.torchvision",
    "timm": "pseudolabel.teachers.timm",
    "hf": "pseudolabel.teachers.huggingface",
    "open_clip": "pseudolabel.teachers.open_clip",
    "onnx": "pseudolabel.teachers.onnx",
    "checkpoint": "pseudolabel.teachers.checkpoint",
    "python": "pseudolabel.teachers.python",
}


def parse_teacher(uri: str, class_map: ClassMap | None = None) -> Teacher:
    """Describe a teacher from its URI; nothing is loaded yet. Any source takes `class_map=FILE`, which goes before the
    `class_map` given here. Raises `SpecError`.
    """
    spec = specs.parse(uri)
    if spec.scheme not in SCHEMES:
        hint = specs.nearest(spec.scheme, SCHEMES)
        raise SpecError(f"{uri}: unknown teacher source {spec.scheme!r}{hint}; known are {', '.join(SCHEMES)}")
    own = [value for key, value in spec.args if key == "class_map"]
    bare = dataclasses.replace(spec, args=tuple(pair for pair in spec.args if pair[0] != "class_map"))
    teacher: Teacher = importlib.import_module(SCHEMES[spec.scheme]).make(bare)
    class_map = read_class_map(str(own[0])) if own else class_map
    return teacher if class_map is None else MappedTeacher(teacher, class_map, str(spec))


def parse_teachers(uris: str | Sequence[str], class_map: str | Path | None = None) -> Teacher:
    """One teacher, or an ensemble of several; each may carry a weight, `SPEC@0.7`. The file `class_map` maps every
    member that has no map of its own. Raises `SpecError`.
    """
    shared = read_class_map(class_map) if class_map is not None else None
    members, weights = [], []
    for uri in [uris] if isinstance(uris, str) else uris:
        head, at, tail = uri.rpartition("@")
        weight = _number(tail) if at else None
        members.append(parse_teacher(uri if weight is None else head, shared))
        weights.append(1.0 if weight is None else weight)
        if not 0 < weights[-1] < math.inf:
            raise SpecError(f"{uri}: an ensemble weight must be a number above 0")
    if not members:
        raise SpecError("no teacher given; name one with --teacher")
    if len(members) == 1:
        return members[0]
    from pseudolabel.teachers.ensemble import Ensemble

    total = sum(weights)
    if not total < math.inf:
        raise SpecError("the ensemble weights add up to infinity; only their ratios count, so make them smaller")
    return Ensemble(tuple(members), tuple(weight / total for weight in weights))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
