"""Soft labels: their bill, and their making."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pseudolabel.cli.command import command, for_people
from pseudolabel.cli.options import (
    AnnotatePrecision,
    AnnotateWorkers,
    BatchSize,
    ClassMap,
    Compile,
    Device,
    Encoding,
    FastJpeg,
    Json,
    KeepMembers,
    Shards,
    Slice,
    Teachers,
    Tta,
    ViewPolicy,
    Views,
    ViewSeed,
    annotate_settings,
)
from pseudolabel.display import Display, print_pairs, print_plan
from pseudolabel.forkserver import fork_server

if TYPE_CHECKING:
    from pseudolabel.interfaces import Teacher
    from pseudolabel.shard_lists import Shard


@command
def plan(
    shards: Shards,
    teacher: Teachers,
    out: Annotated[str | None, typer.Option(metavar="PATH", help="a store to go on with: its shards are done")] = None,
    class_map: ClassMap = None,
    encoding: Encoding = None,
    views: Views = None,
    view_seed: ViewSeed = None,
    view_policy: ViewPolicy = None,
    tta: Tta = None,
    fast_jpeg: FastJpeg = False,
    keep_members: KeepMembers = False,
    batch_size: BatchSize = None,
    precision: AnnotatePrecision = None,
    compile_: Compile = False,
    device: Device = "auto",
    workers: AnnotateWorkers = None,
    part_of: Slice = None,
    max_reject_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="say so if annotate would reject more samples than this")
    ] = 0.1,
    probe_shards: Annotated[int, typer.Option(min=2, help="shards that are opened and probed")] = 8,
    probe_samples: Annotated[int, typer.Option(min=1, help="samples that are labeled to see rejects and bytes")] = 4096,
    probe_seconds: Annotated[float, typer.Option(min=0.0, help="seconds over which the speed is measured")] = 30.0,
    label_seconds: Annotated[
        float | None, typer.Option(min=0.0, help="seconds for the labels, at most [as --probe-seconds]")
    ] = None,
    exact: Annotated[
        bool | None, typer.Option("--exact/--estimate", help="count all samples [up to 1 GiB]", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="decides which shards and samples are probed")] = 0,
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Tell the bill of annotate beforehand: hours, bytes, rejects, and what each encoding costs and loses."""
    settings = annotate_settings(locals())
    from pseudolabel.engines import make_engine
    from pseudolabel.plan import plan

    listed, asked = _work(shards, part_of, teacher, class_map)
    with Display() as display:
        result = plan(
            listed,
            asked,
            engine=make_engine("local", device, workers),
            settings=settings,
            out=out,
            probe_shards=probe_shards,
            probe_samples=probe_samples,
            probe_seconds=probe_seconds,
            label_seconds=label_seconds,
            exact=exact,
            seed=seed,
            max_reject_fraction=max_reject_fraction,
            on_stage=display.stage,
        )
    print_plan(result, for_people(as_json))
    return dataclasses.asdict(result)


@command
def annotate(
    shards: Shards,
    teacher: Teachers,
    out: Annotated[str, typer.Option(metavar="PATH", help="the store: made, or gone on with")],
    class_map: ClassMap = None,
    encoding: Encoding = None,
    views: Views = None,
    view_seed: ViewSeed = None,
    view_policy: ViewPolicy = None,
    tta: Tta = None,
    fast_jpeg: FastJpeg = False,
    keep_members: KeepMembers = False,
    batch_size: BatchSize = None,
    precision: AnnotatePrecision = None,
    compile_: Compile = False,
    device: Device = "auto",
    workers: AnnotateWorkers = None,
    engine: Annotated[
        str, typer.Option(help="local: this machine; ray: a Ray cluster, an actor per GPU or core")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="of the Ray cluster, such as auto or ray://head:10001 [RAY_ADDRESS]")
    ] = None,
    part_of: Slice = None,
    max_reject_fraction: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="more rejected samples than this are an error")
    ] = 0.1,
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Run a teacher over shards and keep its soft labels. Run it again to go on where it stopped."""
    settings = annotate_settings(locals())
    if workers != 1 and engine == "local":
        fork_server()
    from pseudolabel.annotate import annotate
    from pseudolabel.engines import make_engine

    listed, asked = _work(shards, part_of, teacher, class_map)
    with Display() as display:
        display.begin_annotating(listed)
        result = annotate(
            listed,
            asked,
            out,
            engine=make_engine(engine, device, workers, address),
            settings=settings,
            max_reject_fraction=max_reject_fraction,
            on_progress=display.annotating,
        )
    found = dataclasses.asdict(result)
    stages = ", ".join(f"{stage} {share:.0%}" for stage, share in result.stages.items() if share)
    shown = {name: value for name, value in found.items() if value is not None}
    print_pairs({**shown, "stages": stages}, for_people(as_json))
    return found


def _work(
    shards: list[str], part_of: str | None, teacher: list[str], class_map: str | None
) -> tuple[list[Shard], Teacher]:
    """What is to be labeled and by whom: said to plan as to annotate."""
    from pseudolabel.shard_lists import list_shards, slice_shards
    from pseudolabel.teachers import parse_teachers

    return slice_shards(list_shards(shards), part_of), parse_teachers(teacher, class_map)
