"""What is in a store, and whether it is whole."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pseudolabel.cli.command import command, for_people
from pseudolabel.cli.options import ClassMap, Device, Json
from pseudolabel.display import print_pairs

if TYPE_CHECKING:
    from pseudolabel.labels.store import Store

_ROWS_SHOWN = 20


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
        from pseudolabel.devices import resolve_device
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
