"""Options that commands share, and the settings and places that flags give."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from pseudolabel.errors import LaunchError, RecipeError
from pseudolabel.settings import AnnotateSettings, AugmentSettings, Settings, TrainSettings
from pseudolabel.training.world import ALONE, World

Shards = Annotated[list[str], typer.Argument(metavar="SHARDS...", help="directory, glob, brace range or @list.txt")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout, all else on stderr")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is there")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads that train; by default the cores that load nothing")
]
LoaderWorkers = Annotated[int | None, typer.Option(min=0, help="loader processes; by default 1, up to 8 beside a GPU")]
TrackerSpecs = Annotated[
    list[str] | None,
    typer.Option(
        "--tracker",
        metavar="NAME[?ARG=VALUE]",
        help="show metrics there, too: tensorboard, wandb?project=P, mlflow?uri=U&experiment=E or trackio?project=P; "
        "may be repeated",
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="override a value of the recipe; may be repeated")
]


def _settings_help(kind: type[Settings], name: str, *, note: str = "") -> str:
    field = kind.model_fields[name]
    default = "" if field.default is None or isinstance(field.default, bool) else f" [{field.default}]"
    return f"{field.description}{note}{default}"


def _annotate_option(name: str) -> Any:
    return setting_option(AnnotateSettings, name)


def train_option(name: str, kind: type[AugmentSettings | TrainSettings] = TrainSettings) -> Any:
    return setting_option(kind, name)


def setting_option(kind: type[Settings], name: str) -> Any:
    """The option for a setting; its help is the setting's, and its choices, if it has some."""
    annotation = kind.model_fields[name].annotation
    choices = "|".join(map(str, get_args(annotation))) if get_origin(annotation) is Literal else None
    return typer.Option(
        help=_settings_help(kind, name), show_default=False, metavar=f"<{choices}>" if choices else None
    )


def _batch_size(text: str) -> str:
    if text != "auto" and not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise typer.BadParameter(f"{text!r} is neither a whole number from 1 nor auto")
    return text


class KeptImages(StrEnum):
    """Which decoded images stay in memory."""

    auto = "auto"
    ram = "ram"
    off = "off"


Cache = Annotated[
    KeptImages, typer.Option(help="decoded images in memory: auto, if they take a quarter of what is free; ram; off")
]
Profile = Annotated[bool, typer.Option("--profile", help="print where the time of a training step goes")]
Teachers = Annotated[
    list[str],
    typer.Option(
        "--teacher",
        help="teacher spec: torchvision:NAME, timm:NAME, hf:NAME, open_clip:ARCH/TAG, onnx:FILE, checkpoint:RUN or "
        "python:MODULE:FUNCTION; several make an ensemble, weighted as in SPEC@0.7",
    ),
]
ClassMap = Annotated[
    str | None, typer.Option(metavar="PATH", help="TOML file of target classes, each made of some of the teacher's")
]
Encoding = Annotated[str | None, _annotate_option("encoding")]
Views = Annotated[
    int | None, typer.Option(min=1, max=1024, help=_settings_help(AnnotateSettings, "views"), show_default=False)
]
ViewSeed = Annotated[int | None, _annotate_option("view_seed")]
ViewPolicy = Annotated[str | None, _annotate_option("view_policy")]
Tta = Annotated[str | None, _annotate_option("tta")]
FastJpeg = Annotated[bool, _annotate_option("fast_jpeg")]
KeepMembers = Annotated[bool, _annotate_option("keep_members")]
BatchSize = Annotated[
    str | None,
    typer.Option(metavar="N|auto", parser=_batch_size, help=_settings_help(AnnotateSettings, "batch_size")),
]
AnnotatePrecision = Annotated[str | None, _annotate_option("precision")]
Compile = Annotated[bool, typer.Option("--compile", help=_settings_help(AnnotateSettings, "compile"))]
AnnotateWorkers = Annotated[int | None, typer.Option(min=1, help="processes; one per GPU or CPU core if not given")]
Slice = Annotated[
    str | None, typer.Option("--slice", metavar="I/N", help="only every N-th shard, from the I-th (from 0)")
]


def annotate_settings(flags: Mapping[str, Any]) -> AnnotateSettings:
    """The settings among a command's flags. Raises `RecipeError`."""
    from pseudolabel.recipe import validate

    names = {**dict.fromkeys(AnnotateSettings.model_fields), "compile": "compile_"}
    given = {name: flags.get(flag or name) for name, flag in names.items()}
    given = {name: value for name, value in given.items() if value is not None}
    idle = [f"--{name.replace('_', '-')}" for name in ("view_seed", "view_policy") if name in given]
    if idle and given.get("views", 1) == 1:
        print(f"note: with --views 1, {' and '.join(idle)} have no effect", file=sys.stderr)
    return validate(AnnotateSettings, given, "annotate", flags=given)


def train_settings(recipe: str | None, given: Mapping[str, Any]) -> TrainSettings:
    """A recipe's [train] table, then flags on top. Raises `RecipeError`."""
    from pseudolabel.recipe import read_tables, validate

    tables: dict[str, Any] = {}
    if recipe is not None:
        tables = read_tables(recipe).get("train", {})
        if not tables or not isinstance(tables, dict):
            raise RecipeError(f"{recipe}: has no [train] table")
    augment = tables.get("augment", {})
    if isinstance(augment, dict):
        augment = {**augment, **{name: given[name] for name in AugmentSettings.model_fields if name in given}}
    flags = {name: given[name] for name in TrainSettings.model_fields if name in given}
    if "steps" in flags or "epochs" in flags:  # one flag of the pair replaces the recipe's other
        tables = {name: value for name, value in tables.items() if name not in ("steps", "epochs")}
    return validate(
        TrainSettings, {**tables, **flags, "augment": augment}, str(recipe) if recipe is not None else "train", given
    )


def training_place(device: str, workers: int | None, threads: int | None, world: World = ALONE) -> dict[str, Any]:
    """Where to train. On a CPU one core loads and the others train: two thread pools on the same cores can be forty
    times slower than one. Processes that train together share a machine's cores evenly, and each has a GPU of its own.
    """
    from pseudolabel.devices import resolve_device
    from pseudolabel.engines.local import available_cores

    resolved = _own_device(device, world) if world.size > 1 else resolve_device(device)
    cores = max(1, available_cores() // world.local_size)
    if workers is None:
        workers = min(1 if resolved == "cpu" else 8, cores - 1)
    return {"device": resolved, "workers": workers, "threads": threads or max(1, cores - workers)}


def _own_device(device: str, world: World) -> str:
    """The device of one of several processes. Raises `LaunchError` if there is none for it."""
    from pseudolabel.devices import resolve_device

    if device not in ("auto", "cpu", "cuda"):
        raise LaunchError(
            f"--device {device}: several processes can't take one device; leave it out or write cpu or cuda: each then "
            "takes the GPU of its number on its machine"
        )
    resolved = resolve_device(device)
    if resolved == "cpu":
        return resolved
    import torch

    if world.local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"{world.local_size} processes on this machine, but {torch.cuda.device_count()} GPUs: start one per GPU "
            f"(torchrun --nproc-per-node {torch.cuda.device_count()}), or train with --device cpu"
        )
    return f"cuda:{world.local_rank}"
