"""Which unlabeled images an evaluation shows, too."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from pseudolabel.cli.command import command, for_people
from pseudolabel.cli.options import Json, Overwrite
from pseudolabel.display import Display, print_pairs
from pseudolabel.forkserver import fork_server


@command
def leaks(
    unlabeled: Annotated[
        list[str], typer.Argument(metavar="UNLABELED...", help="directory, glob, brace range or @list.txt")
    ],
    against: Annotated[list[str], typer.Option(metavar="SHARDS", help="validation or test shards; may be repeated")],
    out: Annotated[str, typer.Option(metavar="FILE", help="Parquet file to make: the samples to leave out")],
    distance: Annotated[
        int | None,
        typer.Option(
            min=0, max=64, help="bits of 64 by which the hash of a near duplicate may differ [8]", show_default=False
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; one per CPU core if not given")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Find unlabeled images that are, exactly or nearly, images of validation or test shards."""
    if workers != 1:
        fork_server()
    from pseudolabel.engines import make_engine
    from pseudolabel.leaks import DISTANCE, find_leaks
    from pseudolabel.shard_lists import list_shards

    listed, held_out = list_shards(unlabeled), list_shards(against)
    with Display() as display:
        display.begin_annotating([*held_out, *listed])
        result = find_leaks(
            listed,
            held_out,
            out,
            distance=DISTANCE if distance is None else distance,
            engine=make_engine("local", "cpu", workers),
            overwrite=overwrite,
            on_progress=display.annotating,
        )
    found = dataclasses.asdict(result)
    first = found.pop("first")
    print_pairs(found, for_people(as_json))
    for one in first:
        print(
            "{kind}: {shard} {key!r} is {against_shard} {against_key!r} (similarity {similarity:.3f})".format(**one),
            file=for_people(as_json),
        )
    if result.leaks:
        print(f"next: pseudolabel select STORE --exclude {result.out}", file=for_people(as_json))
    return found
