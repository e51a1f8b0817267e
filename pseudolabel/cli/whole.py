"""The whole pipeline: by a recipe, on the bundled data, and its page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pseudolabel.cli.command import command, for_people
from pseudolabel.cli.options import (
    Cache,
    Device,
    Json,
    KeptImages,
    LoaderWorkers,
    Overrides,
    Profile,
    Threads,
    TrackerSpecs,
    training_place,
)
from pseudolabel.display import Display, print_rounds
from pseudolabel.forkserver import fork_server


@command
def run(
    recipe: Annotated[str, typer.Argument(help="TOML file")],
    out: Annotated[str, typer.Option(metavar="PATH", help="directory of the whole run: made, or gone on with")],
    overrides: Overrides = None,
    device: Device = "auto",
    workers: LoaderWorkers = None,
    threads: Threads = None,
    cache: Cache = KeptImages.auto,
    profile: Profile = False,
    tracker: TrackerSpecs = None,
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Run a recipe: teacher, rounds of annotate and train, control, table. Finished stages are skipped."""
    fork_server()
    from pseudolabel.engines.local import LocalEngine
    from pseudolabel.place import Place
    from pseudolabel.recipe import load_recipe
    from pseudolabel.report import write_report
    from pseudolabel.rounds import run
    from pseudolabel.run_result import table
    from pseudolabel.trackers import parse_tracker

    trackers = tuple(parse_tracker(one) for one in tracker or ())
    loaded = load_recipe(recipe, overrides or ())
    with Display() as display:
        place = Place(
            LocalEngine(device),
            **training_place(device, workers, threads),
            cache=cache.value,
            profile=profile,
            trackers=trackers,
        )
        result = run(loaded, out, place, display)
    rows = table(result)
    print_rounds(rows, for_people(as_json))
    print(f"page: {write_report(out)}", file=for_people(as_json))
    return {**dataclasses.asdict(result), "table": rows}


@command
def report(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="what `run` left, or a single run directory")],
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Write a self-contained HTML page: table, training curves, images with their soft labels."""
    from pseudolabel.report import write_report

    page = write_report(directory)
    print(f"page: {page}", file=for_people(as_json))
    return {"page": str(page)}


@command
def demo(
    out: Annotated[str, typer.Option(metavar="PATH", help="directory for shards, run and page")] = "demo",
    recipe: Annotated[
        str, typer.Option(help="fashion_mnist, or from_labels_alone: without a pretrained teacher")
    ] = "fashion_mnist",
    overrides: Overrides = None,
    device: Device = "auto",
    workers: LoaderWorkers = None,
    threads: Threads = None,
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Run the whole loop on the bundled Fashion-MNIST: about three minutes on two cores."""
    fork_server()
    from pseudolabel.demo import demo
    from pseudolabel.engines.local import LocalEngine
    from pseudolabel.place import Place
    from pseudolabel.report import write_report
    from pseudolabel.run_result import table

    with Display() as display:
        place = Place(LocalEngine(device), **training_place(device, workers, threads))
        result = demo(out, place, display, recipe=recipe, overrides=tuple(overrides or ()))
    rows = table(result)
    print_rounds(rows, for_people(as_json))
    print(f"page: {write_report(Path(out) / 'run')}", file=for_people(as_json))
    return {**dataclasses.asdict(result), "table": rows}
