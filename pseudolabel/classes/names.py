"""Names of classes: files of them, and the one label space that every source spells differently.

ImageNet's 1000 classes are 'tench' to torchvision and 'tench, Tinca tinca' to timm and transformers. All sources here
use torchvision's spelling, so that teachers of different sources can vote together and share a class map.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pseudolabel import storage
from pseudolabel.errors import RecipeError, SpecError


def read_lines(path: str | Path, what: str) -> tuple[str, ...]:
    """The lines of a text file that aren't blank. Raises `SpecError` if there are none, or one occurs twice."""
    try:
        lines = [line.strip() for line in storage.location(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: can't be read as a file of {what} ({error}); write one a line") from error
    found = tuple(line for line in lines if line)
    twice = [line for line, times in Counter(found).items() if times > 1]
    if not found or twice:
        why = f"holds {twice[0]!r} twice" if twice else f"holds no {what}"
        raise SpecError(f"{path}: {why}; write {what} one a line, each once")
    return found


def usual_spelling(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Torchvision's names if these are ImageNet's 1000 classes in order, none if they are placeholders."""
    if not names or list(names) == [f"LABEL_{index}" for index in range(len(names))]:
        return None
    if len(names) == 1000:
        from torchvision.models import ResNet50_Weights

        usual = tuple(ResNet50_Weights.DEFAULT.meta["categories"])
        same = sum(name.split(",")[0] == other for name, other in zip(names, usual, strict=True))
        if same > 950:  # a few differ from release to release: 'crane' and 'crane bird'
            return usual
    return tuple(names)


def parse_names(text: str, source: str) -> tuple[str, ...]:
    """A JSON list of names. Raises `SpecError`."""
    try:
        names = json.loads(text)
    except ValueError as error:
        raise SpecError(f"{source}: its class names are no JSON ({error}); write a list of strings") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SpecError(f"{source}: its class names must be a JSON list of strings")
    return tuple(names)


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Class names, one a line. Raises `RecipeError`."""
    file = storage.location(path)
    try:
        names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file}: can't read class names: {error}") from error
    if not names or len(set(names)) != len(names):
        raise RecipeError(
            f"{file}: class names must be one a line, each once; found {len(names)}, "
            f"{len(set(names))} of them different"
        )
    return names
