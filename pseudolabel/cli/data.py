"""Shards from images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from pseudolabel.cli.command import command, for_people
from pseudolabel.cli.options import Json, Overwrite
from pseudolabel.display import print_pairs


@command
def pack(
    source: Annotated[
        str, typer.Argument(help="image folder (one folder a class), .csv/.parquet of paths or bytes, or IDX file")
    ],
    out: Annotated[str, typer.Argument(help="directory to make: labeled/, unlabeled/, val/, test/")],
    labels_per_class: Annotated[
        int | None, typer.Option(min=0, help="keep so many labels a class, the rest becomes unlabeled")
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="share of each class for val/")] = 0.0,
    test_fraction: Annotated[float, typer.Option(help="share of each class for test/")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="decides the split and the order")] = 0,
    samples_per_shard: Annotated[int, typer.Option(min=1, help="samples in a shard")] = 1000,
    name: Annotated[str, typer.Option(help="prefix of the shards' names, which must be unique in a corpus")] = "",
    image_column: Annotated[str | None, typer.Option(help="column of image paths or bytes")] = None,
    label_column: Annotated[str | None, typer.Option(help="column of labels: numbers or names")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="decode every image first; refuse the source if any can't be")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> Mapping[str, Any]:
    """Turn images into shards, split by a seed."""
    from pseudolabel.pack import pack

    result = pack(
        source,
        out,
        labels_per_class=labels_per_class,
        val_fraction=val_fraction,
        test_fraction=test_fraction,
        seed=seed,
        samples_per_shard=samples_per_shard,
        name=name,
        image_column=image_column,
        label_column=label_column,
        check=check,
        overwrite=overwrite,
    )
    print_pairs({**result.samples, "shards": result.shards, "classes": len(result.classes)}, for_people(as_json))
    return dataclasses.asdict(result)
