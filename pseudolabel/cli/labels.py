"""Soft labels: their bill, their making, what is in a store and whether it is whole."""

from __future__ import annotations

import dataclasses
import json
import sys
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
    from pseudolabel.labels.store import Store
    from pseudolabel.shard_lists import Shard

_ROWS_SHOWN = 20


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


@command
def inspect(
    store: Annotated[str, typer.Argument(help="a store")],
    rejects: Annotated[bool, typer.Option("--rejects", help="list every rejected sample with its reason")] = False,
    histograms: Annotated[
        bool, typer.Option("--histograms", help="count confidence, entropy, margin, classes; compare with labels")
    ] = False,
    view: Annotated[
        int | None, typer.Option(min=0, help="the view that --histograms counts [0]", show_default=False)
    ] = None,
    sql: Annotated[
        str | None,
        typer.Option(metavar="SELECT", help="answer a question in SQL over the tables labels, rejects and classes"),
    ] = None,
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Say what is in a store."""
    if sql is not None and (rejects or histograms):
        raise typer.BadParameter("--sql stands alone: its answer is all that is printed")
    if view is not None and not histograms:
        raise typer.BadParameter("--view belongs to --histograms")
    from pseudolabel.labels.store import open_store
    from pseudolabel.labels.summary import list_rejects, summarize_store

    opened = open_store(store)
    if sql is not None:
        return _answer(opened, sql, as_json)
    summary = dataclasses.asdict(summarize_store(opened))
    print_pairs(_shown(summary), for_people(as_json))
    if histograms:
        from pseudolabel.charts import print_histograms
        from pseudolabel.labels.histograms import store_histograms

        found = store_histograms(opened, view=view or 0)
        print_histograms(found, opened.identity.classes, for_people(as_json))
        summary["histograms"] = found.to_json()
    if rejects:
        summary["rejected"] = list(list_rejects(opened))
        for one in summary["rejected"]:
            print("{shard}: sample {key!r} ({stage}): {detail}".format(**one), file=for_people(as_json))
    return summary


def _shown(summary: Mapping[str, Any]) -> dict[str, Any]:
    shown = {name: value for name, value in summary.items() if name not in ("fidelity", "teacher", "classes")}
    for name, by_temperature in summary["fidelity"].items():
        shown[f"KL(full || stored), {name}"] = ", ".join(f"{value:.2g} at T={t}" for t, value in by_temperature.items())
    shown["classes"] = ", ".join(summary["classes"][:20]) + (", …" if len(summary["classes"]) > 20 else "")
    shown["teacher"] = json.dumps(summary["teacher"])
    return shown


def _answer(store: Store, sql: str, as_json: bool) -> Mapping[str, Any]:
    """People get the first rows, a script all of them."""
    from pseudolabel.charts import print_answer
    from pseudolabel.labels.query import query_store

    answer = query_store(store, sql, None if as_json else _ROWS_SHOWN)
    if not as_json:
        print_answer(answer, for_people(as_json))
    return {"columns": answer.columns, "rows": answer.rows}


@command
def verify(
    store: Annotated[str, typer.Argument(help="a store")],
    shards: Annotated[
        list[str] | None, typer.Option(help="also compare with these shards: content, keys and labels")
    ] = None,
    sample: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="share of the shards' samples that are annotated again, one at least"),
    ] = 0.0,
    teacher: Annotated[
        list[str] | None, typer.Option(help="with --sample: the store's teacher, as it was given to annotate")
    ] = None,
    class_map: ClassMap = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="nats of KL that a row annotated again may differ by [0.01]", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="decides which samples are annotated again")] = 0,
    device: Device = "auto",
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="delete parts, with their rejects, that are damaged, don't belong, or differ when annotated again, so "
            "that annotate makes just these anew; exit code 0 if nothing else is wrong",
        ),
    ] = False,
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Read every byte of a store again: hashes, counts, order, values. Exit code 1 if anything is wrong."""
    from pseudolabel.labels.store import open_store
    from pseudolabel.labels.verify import TOLERANCE, verify
    from pseudolabel.shard_lists import list_shards

    asked = None
    idle = {"--class-map": class_map is not None and not teacher, "--tolerance": tolerance is not None and not sample}
    for option in (name for name, is_idle in idle.items() if is_idle):
        print(f"note: without --sample and --teacher, {option} has no effect", file=sys.stderr)
    if teacher:
        from pseudolabel.engines.local import resolve_device
        from pseudolabel.teachers import parse_teachers

        asked, device = parse_teachers(teacher, class_map), resolve_device(device)
    result = verify(
        open_store(store),
        list_shards(shards) if shards else (),
        teacher=asked,
        sample=sample,
        tolerance=TOLERANCE if tolerance is None else tolerance,
        seed=seed,
        device=device,
        repair=repair,
    )
    for problem in result.problems:
        print(f"{problem.kind}: {problem.detail}", file=sys.stderr)
    for problem in result.repaired:
        print(f"deleted, as {problem.kind}: {problem.detail}", file=sys.stderr)
    shown: dict[str, Any] = {
        "ok": result.ok,
        "parts": result.parts,
        "rows": result.rows,
        "problems": len(result.problems),
    }
    if repair:
        shown["repaired"] = ", ".join(problem.part for problem in result.repaired) or "nothing"
    if sample:
        nats = {"mean KL": result.mean_kl, "worst KL": result.worst_kl}
        shown |= {"compared": result.compared, **{name: f"{value or 0:.2g}" for name, value in nats.items()}}
        shown["worst row"] = result.worst_row
    print_pairs(shown, for_people(as_json))
    return dataclasses.asdict(result)
