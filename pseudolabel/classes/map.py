"""A class map: the classes a student shall have, each made of some of a teacher's.

    [classes]                       # the order is the order of the logits
    cat = ["tabby", "tiger cat"]    # merged
    dog = ["beagle"]                # renamed
    bird = [134, "robin"]           # by index where a name occurs twice

Merging takes the logsumexp of the logits, the logit of the sum of the probabilities: after a softmax over the targets,
each has exactly its share of the probability that the teacher gives to all classes of the map. What the teacher gives
to others is left out.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pseudolabel.errors import SpecError
from pseudolabel.interfaces import LoadedTeacher, Teacher
from pseudolabel.specs import nearest

_EXAMPLE = '[classes]\ncat = ["tabby", "tiger cat"]'


@dataclass(frozen=True)
class ClassMap:
    """What a file says, as names and indexes."""

    source: str
    targets: tuple[tuple[str, tuple[str | int, ...]], ...]

    def resolve(self, classes: Sequence[str], teacher: str) -> tuple[tuple[int, ...], ...]:
        """Per target the teacher's classes, by index.

        Raises:
            SpecError: a class the teacher doesn't have, has twice by that name, or that two targets claim.
        """
        taken: dict[int, str] = {}
        groups = []
        for target, members in self.targets:
            group = sorted(
                self._index(member, classes, f"{self.source}: class {target!r}", teacher) for member in members
            )
            for index in group:
                if index in taken:
                    raise SpecError(
                        f"{self.source}: {classes[index]!r} (index {index}) is in class {taken[index]!r} and "
                        f"{'again' if taken[index] == target else f'in {target!r}'}; it can count once"
                    )
                taken[index] = target
            groups.append(tuple(group))
        return tuple(groups)

    def _index(self, member: str | int, classes: Sequence[str], where: str, teacher: str) -> int:
        if isinstance(member, int):
            if not 0 <= member < len(classes):
                raise SpecError(f"{where}: {teacher} has the classes 0 to {len(classes) - 1}, not {member}")
            return member
        found = [index for index, name in enumerate(classes) if name == member]
        if not found:
            raise SpecError(f"{where}: {teacher} has no class {member!r}{nearest(member, classes)}")
        if len(found) > 1:
            listed = " and ".join(map(str, found))
            raise SpecError(f"{where}: {teacher} has {len(found)} classes {member!r}; write the index, {listed}")
        return found[0]


def read_class_map(path: str | Path) -> ClassMap:
    """Read a TOML file. Raises `SpecError`."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"{path}: can't be read as a class map ({error})") from error
    listed = tables.get("classes")
    if set(tables) != {"classes"} or not isinstance(listed, dict) or not listed:
        raise SpecError(f"{path}: a class map has one table, [classes], such as\n{_EXAMPLE}")
    for target, members in listed.items():
        right = isinstance(members, list) and all(type(member) in (str, int) for member in members)
        if not right or not members:
            raise SpecError(
                f"{path}: class {target!r} must list names or indexes of the teacher's classes, at least one"
            )
    return ClassMap(str(path), tuple((target, tuple(members)) for target, members in listed.items()))


@dataclass(frozen=True)
class MappedTeacher:
    """A teacher whose classes are those of a map."""

    teacher: Teacher
    class_map: ClassMap
    uri: str

    def load(self, device: torch.device) -> LoadedTeacher:
        loaded = self.teacher.load(device)
        groups = self.class_map.resolve(loaded.classes, self.teacher.uri)
        return LoadedMapped(loaded, tuple(target for target, _ in self.class_map.targets), groups)


@dataclass(frozen=True)
class LoadedMapped:
    """Its logits are the teacher's, selected and merged."""

    teacher: LoadedTeacher
    classes: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def identity(self) -> Mapping[str, Any]:
        merged = [[name, list(group)] for name, group in zip(self.classes, self.groups, strict=True)]
        return {**self.teacher.identity, "class_map": merged}

    def prepare(self, image_CHW: Tensor) -> tuple[Tensor, ...]:
        return self.teacher.prepare(image_CHW)

    def logits(self, inputs: tuple[Tensor, ...]) -> Tensor:
        logits_BC = self.teacher.logits(inputs)
        widest = max(map(len, self.groups))
        padded = [[*group, *[-1] * (widest - len(group))] for group in self.groups]
        index_TM = torch.tensor(padded, device=logits_BC.device)
        merged_BTM = logits_BC[:, index_TM.clamp(min=0)].masked_fill(index_TM < 0, -torch.inf)
        return torch.logsumexp(merged_BTM, dim=-1)
