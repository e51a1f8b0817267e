"""A student from labels and soft labels, and what it reaches."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from pseudolabel.cli.command import command, for_people
from pseudolabel.cli.options import (
    Cache,
    Device,
    Json,
    KeptImages,
    LoaderWorkers,
    Overwrite,
    Profile,
    Shards,
    Threads,
    TrackerSpecs,
    train_option,
    train_settings,
    training_place,
)
from pseudolabel.display import Display, print_confusion, print_pairs
from pseudolabel.forkserver import fork_server
from pseudolabel.settings import AugmentSettings
from pseudolabel.training.world import world_from_environment


@command
def train(
    out: Annotated[str, typer.Option(metavar="PATH", help="run directory: made, or gone on with")],
    labeled: Annotated[list[str] | None, typer.Option(metavar="SHARDS", help="labeled shards; may be repeated")] = None,
    unlabeled: Annotated[
        list[str] | None,
        typer.Option(metavar="SHARDS", help="unlabeled shards, annotated in --labels; may be repeated"),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="PATH", help="store of soft labels; without it, plain supervised training")
    ] = None,
    selection: Annotated[
        str | None, typer.Option(metavar="PATH", help="what select made: only these soft labels, so much each")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE", help="what calibrate made: maps the teacher's logits first")
    ] = None,
    val: Annotated[
        list[str] | None,
        typer.Option(metavar="SHARDS", help="labeled shards that choose the best checkpoint; may be repeated"),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="TOML file whose train table gives the settings; flags override it"),
    ] = None,
    student: Annotated[str | None, train_option("student")] = None,
    image_size: Annotated[int | None, train_option("image_size")] = None,
    channels: Annotated[int | None, train_option("channels")] = None,
    steps: Annotated[int | None, train_option("steps")] = None,
    epochs: Annotated[float | None, train_option("epochs")] = None,
    batch_size: Annotated[int | None, train_option("batch_size")] = None,
    labeled_fraction: Annotated[float | None, train_option("labeled_fraction")] = None,
    loss: Annotated[str | None, train_option("loss")] = None,
    label_sampling: Annotated[str | None, train_option("label_sampling")] = None,
    label_smoothing: Annotated[float | None, train_option("label_smoothing")] = None,
    class_weights: Annotated[str | None, train_option("class_weights")] = None,
    logit_adjustment: Annotated[float | None, train_option("logit_adjustment")] = None,
    alpha: Annotated[float | None, train_option("alpha")] = None,
    temperature: Annotated[float | None, train_option("temperature")] = None,
    standardize: Annotated[
        bool | None,
        typer.Option(
            "--standardize", help="compare the z-scores of both sides' logits, with kd, dkd or jsd", show_default=False
        ),
    ] = None,
    tail: Annotated[str | None, train_option("tail")] = None,
    replay: Annotated[str | None, train_option("replay")] = None,
    mixup: Annotated[float | None, train_option("mixup")] = None,
    cutmix: Annotated[float | None, train_option("cutmix")] = None,
    accumulate: Annotated[int | None, train_option("accumulate")] = None,
    optimizer: Annotated[str | None, train_option("optimizer")] = None,
    lr: Annotated[float | None, train_option("lr")] = None,
    weight_decay: Annotated[float | None, train_option("weight_decay")] = None,
    warmup_fraction: Annotated[float | None, train_option("warmup_fraction")] = None,
    clip_norm: Annotated[float | None, train_option("clip_norm")] = None,
    ema: Annotated[float | None, train_option("ema")] = None,
    precision: Annotated[str | None, train_option("precision")] = None,
    compile_: Annotated[
        bool | None, typer.Option("--compile", help="compile the student with torch.compile", show_default=False)
    ] = None,
    crop: Annotated[str | None, train_option("crop", AugmentSettings)] = None,
    flip: Annotated[
        bool | None,
        typer.Option("--flip/--no-flip", help="flip half of the images left to right [on]", show_default=False),
    ] = None,
    randaugment: Annotated[int | None, train_option("randaugment", AugmentSettings)] = None,
    erasing: Annotated[float | None, train_option("erasing", AugmentSettings)] = None,
    eval_every: Annotated[int | None, train_option("eval_every")] = None,
    seed: Annotated[int | None, train_option("seed")] = None,
    classes: Annotated[str | None, typer.Option(metavar="PATH", help="file of class names, one a line")] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="number of classes, where neither a store nor --classes says it")
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="finished run, or .safetensors file, whose weights the student starts from; its head is new where the "
            "classes differ",
        ),
    ] = None,
    device: Device = "auto",
    workers: LoaderWorkers = None,
    threads: Threads = None,
    cache: Cache = KeptImages.auto,
    profile: Profile = False,
    log_every: Annotated[int, typer.Option(min=1, help="steps between lines of metrics.jsonl and trackers")] = 20,
    tracker: TrackerSpecs = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> Mapping[str, Any] | None:
    """Train a student from cached soft labels and the labeled set. Run it again to go on where it stopped. Started by
    torchrun, several processes train it together.
    """
    given = {name.removesuffix("_"): value for name, value in locals().items() if value is not None}
    world = world_from_environment()
    settings = train_settings(recipe, given)
    decided = ("loss", "alpha", "temperature", "standardize", "tail", "labeled_fraction", "replay")
    idle = [f"--{name.replace('_', '-')}" for name in decided if name in given]
    if labels is None and idle and world.first:
        print(f"note: without --labels, {', '.join(idle)} have no effect", file=sys.stderr)
    if labels is not None and labeled and unlabeled and settings.labeled_fraction == 0 and world.first:
        print("note: with --labeled-fraction 0 the --labeled shards are not trained on", file=sys.stderr)
    if workers != 0:
        fork_server()
    import torch

    from pseudolabel.classes.names import read_classes
    from pseudolabel.labels.store import open_store
    from pseudolabel.shard_lists import list_shards
    from pseudolabel.storage import location
    from pseudolabel.trackers import parse_tracker
    from pseudolabel.train import train
    from pseudolabel.training.distributed import joined
    from pseudolabel.training.step_times import advice, summary

    trackers = [parse_tracker(one) for one in tracker or ()] if world.first else []
    finished = not overwrite and (location(out) / "run.json").exists()
    place = training_place(device, workers, threads, world)
    with Display() as display, joined(world, torch.device(place["device"])) as team:
        result = train(
            settings,
            out,
            labeled=list_shards(labeled) if labeled else (),
            unlabeled=list_shards(unlabeled) if unlabeled else (),
            store=open_store(labels) if labels is not None else None,
            val=list_shards(val) if val else (),
            selection=selection,
            calibration=calibration,
            classes=read_classes(classes) if classes is not None else None,
            num_classes=num_classes,
            init_from=init_from,
            overwrite=overwrite,
            on_progress=display.training if world.first else None,
            on_note=lambda note: display.say(f"note: {note}"),
            cache=cache.value,
            profile=profile,
            log_every=log_every,
            team=team,
            trackers=trackers,
            **place,
        )
    if not world.first:
        return None
    if finished:
        print(f"note: {out} was finished before: nothing was done (--overwrite trains anew)", file=sys.stderr)
    told = {name: value for name, value in dataclasses.asdict(result).items() if value is not None and name != "notes"}
    shares = told.pop("profile", {})
    print_pairs(told, for_people(as_json))
    if shares:
        print(f"{summary(shares)}\n{advice(shares)}", file=for_people(as_json))
    return dataclasses.asdict(result)


@command
def evaluate(
    model: Annotated[str, typer.Argument(help="run directory")],
    shards: Shards,
    store: Annotated[
        str | None,
        typer.Option("--labels", help="store of soft labels of these shards: how often the model agrees with it"),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="samples per forward pass")] = 256,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="let a model with a python: student call the function it names")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Measure a model on labeled shards: accuracy, top-5, NLL, ECE, per class, confusion."""
    from pseudolabel.devices import resolve_device
    from pseudolabel.evaluate import evaluate
    from pseudolabel.labels.store import open_store
    from pseudolabel.shard_lists import list_shards

    opened = open_store(store) if store is not None else None
    result = dataclasses.asdict(
        evaluate(
            model,
            list_shards(shards),
            store=opened,
            device=resolve_device(device),
            batch_size=batch_size,
            trust_code=trust_code,
        )
    )
    shown = {
        name: result[name]
        for name in ("samples", "accuracy", "top5", "nll", "ece", "agreement")
        if result[name] is not None
    }
    per_class = {
        f"  {name}": value
        for name, value in zip(result["classes"], result["per_class"], strict=True)
        if value is not None
    }
    print_pairs({**shown, "per class": "", **per_class}, for_people(as_json))
    print_confusion(result["classes"], result["confusion"], for_people(as_json))
    return result
