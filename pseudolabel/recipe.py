"""Recipes: TOML files that hold everything that changes a result. Needs no torch.

    recipe = load_recipe("pipelines/fashion_mnist.toml", overrides=["train.steps=200"])

Paths in a recipe are relative to the current directory, as on the command line. An unknown key is an error that names
the nearest known one.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from pseudolabel import specs, storage
from pseudolabel.errors import RecipeError
from pseudolabel.settings import (
    AnnotateSettings,
    CalibrateSettings,
    Fraction,
    SelectSettings,
    Settings,
    TrainSettings,
)

Model = TypeVar("Model", bound=BaseModel)
Shards = str | tuple[str, ...]
_UNION_TAGS = ("str", "tuple[str, ...]")  # what pydantic adds to the place of an error in `Shards`
_MESSAGES = {"tuple_type": "must be a list", "model_type": "must be a table"}


class DataSettings(Settings):
    """Where the shards are; each is a SHARDS argument or a list of them."""

    labeled: Shards = Field(description="labeled shards")
    unlabeled: Shards = Field(description="unlabeled shards")
    val: Shards = Field(description="labeled shards that choose the best checkpoint")
    test: Shards | None = Field(None, description="labeled shards that choose nothing")
    classes: str | None = Field(None, description="a file of class names, one a line")
    leaks: str | None = Field(
        None,
        description="what `leaks` found of val and test among the unlabeled: never trained on; none: not looked for",
    )


class TeacherSettings(Settings):
    """The first round's teacher: given, or trained from the labels alone."""

    specs: tuple[str, ...] = Field((), description="teacher specs; several make an ensemble")
    train: TrainSettings | None = Field(None, description="train the teacher from the labeled set instead")

    @model_validator(mode="after")
    def _one_origin(self) -> TeacherSettings:
        if bool(self.specs) == (self.train is not None):
            raise ValueError(
                "give either specs (a teacher that exists) or a [teacher.train] table (one to train from the labels)"
            )
        return self


class RoundSettings(Settings):
    """How often a student becomes the next teacher."""

    count: int = Field(1, ge=1, le=20, description="annotate → train rounds")
    control: bool = Field(True, description="also train the same student on the labels alone, for as many steps")
    max_reject_fraction: Fraction = Field(0.1, description="more rejected samples than this stop the run")
    init: Literal["born-again", "warm"] = Field(
        "born-again",
        description="what the later rounds' students start from: born-again: what the first round's does; warm: the "
        "weights of the round before",
    )

    @model_serializer(mode="wrap")
    def _young_where_it_matters(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe that leaves `init` alone reads as before there was one, and its runs go on."""
        found: dict[str, Any] = dump(self)
        return {name: value for name, value in found.items() if (name, value) != ("init", "born-again")}


class Recipe(Settings):
    """A whole pipeline."""

    data: DataSettings
    teacher: TeacherSettings
    annotate: AnnotateSettings = AnnotateSettings()
    calibrate: CalibrateSettings | None = Field(None, description="fit the teacher's confidence to validation labels")
    select: SelectSettings | None = Field(None, description="which soft labels count; all without this table")
    train: TrainSettings
    rounds: RoundSettings = RoundSettings()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override (`a.b=c`, c as TOML or bare text) and validate. Raises `RecipeError`."""
    return validate(Recipe, read_tables(path, overrides), str(path))


def read_tables(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A TOML file with overrides applied, not validated. Raises `RecipeError`."""
    file = storage.location(path)
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{file}: can't be read: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number of 5,000 digits, nested too deep
        raise RecipeError(f"{file}: not valid TOML: {error}") from error
    for override in overrides:
        _override(tables, override)
    return tables


def validate(kind: type[Model], tables: Mapping[str, Any], where: str, flags: Collection[str] = ()) -> Model:
    """Build `kind` from plain tables; what came as flags is told as flags. Raises `RecipeError` naming each wrong key,
    at most four.
    """
    try:
        return kind.model_validate(tables)
    except ValidationError as error:
        lines = [_explain(kind, dict(one), flags) for one in error.errors()[:4]]
        raise RecipeError(f"{where}:\n" + "\n".join(f"  {line}" for line in lines)) from error


def _override(tables: dict[str, Any], text: str) -> None:
    name, equals, value = text.partition("=")
    path = [part.strip() for part in name.split(".")]
    if not equals or not all(path):
        raise RecipeError(f"--set {text!r}: write table.key=value, such as train.steps=200")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value
    for part in path[:-1]:
        inner = tables.setdefault(part, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {text!r}: {part!r} is a value, not a table")
        tables = inner
    tables[path[-1]] = parsed


def as_keys(message: str, table: str, kind: type[BaseModel]) -> str:
    """A message that names flags, as one that names a recipe's keys: `select.min_margin` for `--min-margin`."""

    def key(flag: re.Match[str]) -> str:
        name = flag[1].replace("-", "_")
        return f"{table}.{name}" if name in kind.model_fields else flag[0]

    return re.sub(r"--([a-z]+(?:-[a-z]+)*)", key, message)


def _explain(kind: type[BaseModel], error: dict[str, Any], flags: Collection[str]) -> str:
    added = _UNION_TAGS if error["type"] != "extra_forbidden" else ()
    path = [str(part) for part in error["loc"] if part not in added]
    name = _flag(path[-1]) if path and path[-1] in flags else ".".join(path)
    if error["type"] == "extra_forbidden":
        known = _fields_at(kind, path[:-1])
        return f"unknown key {name!r}{specs.nearest(path[-1], known)}; known are {', '.join(known)}"
    if error["type"] == "missing":
        return f"{name!r} is missing"
    message = _MESSAGES.get(error["type"], str(error["msg"]).removeprefix("Value error, "))
    message = re.sub(r", unable to parse.*", "", message.replace("Input should be", "must be"))
    message = re.sub(r"`(\w+)`", lambda named: _flag(named[1]) if named[1] in flags else named[1], message)
    return (
        (f"{name}: " if name else "")
        + message
        + ("" if isinstance(error["input"], dict) else f" (it is {json.dumps(error['input'], default=str)})")
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _fields_at(kind: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        annotation = kind.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        kind = next(one for one in options if isinstance(one, type) and issubclass(one, BaseModel))
    return list(kind.model_fields)


def differences(there: str, here: str) -> list[str]:
    """A line per value that two recipes don't share."""
    try:
        old, new = (dict(_flat(tomllib.loads(text))) for text in (there, here))
    except tomllib.TOMLDecodeError as error:
        return [f"its recipe.toml can't be read ({error})"]
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return [f"{name}: {old.get(name, 'not set')} there, {new.get(name, 'not set')} now" for name in names]


def _flat(tables: dict[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tables.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{where}{name}.")
        else:
            yield f"{where}{name}", value
