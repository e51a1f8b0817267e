"""How far soft labels can be trusted, and which of them count."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from pseudolabel.cli.command import command, for_people
from pseudolabel.cli.options import Json, Overwrite, setting_option
from pseudolabel.display import print_calibration, print_coverage, print_pairs
from pseudolabel.errors import SelectionError
from pseudolabel.settings import CalibrateSettings, SelectSettings

Evidence = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SHARDS", help="only rows of these labeled shards tell what is right [all rows that carry a label]"
    ),
]


def _select(name: str) -> Any:
    return setting_option(SelectSettings, name)


@command
def calibrate(
    store: Annotated[str, typer.Argument(help="a store with labeled shards annotated into it, too")],
    out: Annotated[
        str | None, typer.Option(metavar="FILE", help="JSON file to make, which select and train take [none]")
    ] = None,
    method: Annotated[str | None, setting_option(CalibrateSettings, "method")] = None,
    prior: Annotated[str | None, setting_option(CalibrateSettings, "prior")] = None,
    evidence: Evidence = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Fit the teacher's confidence to labels: NLL, ECE and Brier score before and after, cross-fitted."""
    from pseudolabel.calibration.calibrate import calibrate
    from pseudolabel.recipe import validate

    given = {name: value for name, value in (("method", method), ("prior", prior)) if value is not None}
    settings = validate(CalibrateSettings, given, "calibrate", flags=given)
    result = calibrate(store, out, settings, evidence=_names(evidence), overwrite=overwrite)
    print_calibration(result, for_people(as_json))
    found = dataclasses.asdict(result)
    return {**found, "calibration": result.calibration.to_json()["fingerprint"]}


@command
def select(
    store: Annotated[str, typer.Argument(help="a store")],
    out: Annotated[str, typer.Option(metavar="PATH", help="the selection: a directory to make, for train --selection")],
    min_confidence: Annotated[float | None, _select("min_confidence")] = None,
    min_margin: Annotated[float | None, _select("min_margin")] = None,
    max_entropy: Annotated[float | None, _select("max_entropy")] = None,
    max_disagreement: Annotated[float | None, _select("max_disagreement")] = None,
    target_precision: Annotated[float | None, _select("target_precision")] = None,
    certainty: Annotated[float | None, _select("certainty")] = None,
    per_class: Annotated[bool, _select("per_class")] = False,
    top_per_class: Annotated[int | None, _select("top_per_class")] = None,
    balance: Annotated[str | None, _select("balance")] = None,
    max_weight: Annotated[float | None, _select("max_weight")] = None,
    weight: Annotated[str | None, _select("weight")] = None,
    align_prior: Annotated[bool, _select("align_prior")] = False,
    include_labeled: Annotated[bool, _select("include_labeled")] = False,
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE", help="what calibrate made: confidences are calibrated ones")
    ] = None,
    evidence: Evidence = None,
    exclude: Annotated[str | None, typer.Option(metavar="FILE", help="what leaks made: none of these samples")] = None,
    like: Annotated[
        str | None,
        typer.Option(
            metavar="SELECTION", help="the rules, calibration and evidence of another selection, not what it excludes"
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Choose which soft labels count, and how much. Rows that carry a label tell what the others are worth."""
    given = {name: value for name, value in locals().items() if name in SelectSettings.model_fields}
    given = {name: value for name, value in given.items() if value is not None and value is not False}
    from pseudolabel.calibration import read_calibration
    from pseudolabel.recipe import validate
    from pseudolabel.selection import open_selection
    from pseudolabel.selection.select import repeated, select

    if like is not None:
        if given or calibration is not None or evidence is not None:
            raise SelectionError("--like takes all rules from another selection; leave out the others, or --like")
        how = repeated(open_selection(like).facts)
    else:
        how = {
            "settings": validate(SelectSettings, given, "select", flags=SelectSettings.model_fields),
            "calibration": read_calibration(calibration) if calibration is not None else None,
            "evidence": _names(evidence),
        }
        _note_idle(given)
    result = select(store, out, **how, exclude=exclude, overwrite=overwrite)
    print_coverage(result, for_people(as_json))
    print_pairs(_summary(dataclasses.asdict(result)), for_people(as_json))
    return dataclasses.asdict(result)


def _names(shards: list[str] | None) -> list[str] | None:
    from pseudolabel.shard_lists import list_shards

    return None if shards is None else [shard.name for shard in list_shards(shards)]


def _note_idle(given: Mapping[str, Any]) -> None:
    for name, other in (("certainty", "target_precision"), ("max_weight", "balance")):
        if name in given and other not in given:
            flags = (f"--{one.replace('_', '-')}" for one in (other, name))
            print("note: without {}, {} has no effect".format(*flags), file=sys.stderr)


def _summary(found: Mapping[str, Any]) -> dict[str, Any]:
    interval = found["precision_interval"]
    how = (
        f"{found['estimated_precision']:.4f} ({interval[0]:.4f} to {interval[1]:.4f}, from {found['checked']} rows "
        "with a label that would be selected)"
        if interval is not None
        else f"{found['estimated_precision']:.4f} (the mean confidence: no row with a label would be selected)"
    )
    return {
        "rows": found["rows"],
        "selected": f"{found['selected']} ({found['selected'] / max(found['rows'], 1):.1%})",
        "excluded": found["excluded"],
        "estimated precision": how,
        "out": found["out"],
    }
