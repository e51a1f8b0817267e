"""Packing: images that lie about → shards, split into labeled/, unlabeled/, val/ and test/ by a seed.

The split is stratified: of every class val and test get their fraction, then `labels_per_class` images keep their
label, and the rest lose it. Equal sources, options and seed give equal bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pseudolabel import storage
from pseudolabel.errors import OutputExists, SourceError
from pseudolabel.shards import write_shard
from pseudolabel.sources import Item, read_source

SPLITS = ("labeled", "unlabeled", "val", "test")
_PUBLISHING = "publishing"


@dataclass(frozen=True)
class PackResult:
    """How many samples each split has, in how many shards; the class names."""

    out: str
    samples: Mapping[str, int]
    shards: int
    classes: tuple[str, ...]


def pack(
    source: str | Path,
    out: str | Path,
    *,
    labels_per_class: int | None = None,
    val_fraction: float = 0.0,
    test_fraction: float = 0.0,
    seed: int = 0,
    samples_per_shard: int = 1000,
    name: str = "",
    image_column: str | None = None,
    label_column: str | None = None,
    check: bool = False,
    overwrite: bool = False,
) -> PackResult:
    """Pack `source` into shards below `out`, with `dataset.json` and `classes.txt` beside them. `check` decodes every
    image first and refuses the source if any can't be.

    Without `labels_per_class` every labeled image keeps its label. Images without a label go to unlabeled/. Shards
    are named `<name-><split>-000000.tar`.

    Raises:
        SourceError: the source can't be read, or has too few images for the split.
        OutputExists: `out` holds a data set and `overwrite` is off.
    """
    directory = storage.local_path(out)
    own = (directory / name for name in ("dataset.json", "classes.txt"))
    cut_short = (directory / ".packing" / _PUBLISHING).exists() and not (directory / "dataset.json").exists()
    if not (overwrite or cut_short) and (_shards(directory) or any(path.exists() for path in own)):
        raise OutputExists(
            f"{directory}: holds shards already, or class names; choose another place, or replace them with --overwrite"
        )
    if samples_per_shard < 1:
        raise SourceError(f"samples per shard is {samples_per_shard}; it can't be below 1")
    if name.startswith(".") or "/" in name:
        raise SourceError(f"{name!r} can't begin a shard's name: leave out slashes and a leading dot")
    found = read_source(storage.local_path(source), image_column=image_column, label_column=label_column)
    for one in found.classes:
        if one.splitlines() != [one.strip()]:
            raise SourceError(f"the class name {one!r} won't fit on a line of classes.txt: rename the class")
    if check:
        check_images(found.items)
    split = split_items(found.items, labels_per_class, val_fraction, test_fraction, seed, found.classes)
    shards = 0
    # an image that can't be read must not cost the data set that was there
    with storage.held(directory), _replacing(directory) as new:
        for part, items in split.items():
            for number, start in enumerate(range(0, len(items), samples_per_shard)):
                file = "-".join([*([name] if name else []), part, f"{number:06d}.tar"])
                chosen = items[start : start + samples_per_shard]
                write_shard(new / part / file, _samples(chosen, labeled=part != "unlabeled"))
                shards += 1
        counts = {part: len(items) for part, items in split.items()}
        result = PackResult(str(out), counts, shards, found.classes)
        options = {
            "labels_per_class": labels_per_class,
            "val_fraction": val_fraction,
            "test_fraction": test_fraction,
            "seed": seed,
        }
        storage.write_atomic(new / "classes.txt", "".join(f"{one}\n" for one in found.classes))
        storage.write_atomic(
            new / "dataset.json", json.dumps({**asdict(result), "out": None, **options}, indent=1) + "\n"
        )
    return result


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """Yield an empty directory to write a data set to. On success its files take the place of those in `directory`,
    dataset.json last. A mark says that this has begun: after a kill the same command may do it again.
    """
    new = directory / ".packing"
    shutil.rmtree(new, ignore_errors=True)
    began = False
    try:
        yield new
        began = True
        with storage.explain_os_errors(directory, "writing"):
            (new / _PUBLISHING).touch()
            for path in (directory / "dataset.json", directory / "classes.txt", *_shards(directory)):
                path.unlink(missing_ok=True)
            for path in (*_shards(new), new / "classes.txt", new / "dataset.json"):
                target = directory / path.relative_to(new)
                target.parent.mkdir(exist_ok=True)
                path.rename(target)
                storage.sync_directory(target.parent)
        began = False
    finally:
        if not began:
            shutil.rmtree(new, ignore_errors=True)


def _shards(directory: Path) -> list[Path]:
    return [path for split in SPLITS for path in (directory / split).glob("*.tar")]


def check_images(items: Sequence[Item]) -> None:
    """Decode all images. Raises `SourceError` naming those that can't be."""
    from pseudolabel.views.image import UndecodableImage, decode

    bad = []
    for item in items:
        try:
            decode(item.read()[1])
        except UndecodableImage as error:
            bad.append(f"{item.key}: {error}")
    if bad:
        listed = "\n".join(f"  {line}" for line in bad[:3])
        more = f" (the first {min(len(bad), 3)} are listed)" if len(bad) > 3 else ""
        raise SourceError(
            f"{len(bad)} of {len(items)} images can't be decoded{more}; remove or replace them:\n{listed}"
        )


def split_items(
    items: Sequence[Item],
    labels_per_class: int | None,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    classes: Sequence[str] = (),
) -> dict[str, list[Item]]:
    """Deal items out by class, shuffled by `seed`. Raises `SourceError` if a class has too few."""
    if not (val_fraction >= 0 and test_fraction >= 0 and val_fraction + test_fraction <= 1):  # NaN is none of these
        raise SourceError(
            f"val fraction {val_fraction} and test fraction {test_fraction}: each must lie in [0, 1], "
            "and their sum, too"
        )
    if labels_per_class is not None and labels_per_class < 0:
        raise SourceError(f"labels per class is {labels_per_class}; it can't be below 0")
    order = np.random.default_rng(seed)
    by_class: dict[int | None, list[Item]] = {}
    for item in items:
        by_class.setdefault(item.label, []).append(item)
    split: dict[str, list[Item]] = {part: [] for part in SPLITS}
    split["unlabeled"] += by_class.pop(None, [])
    if not by_class and (labels_per_class or val_fraction or test_fraction):
        raise SourceError("the source has no labels, so no labeled, val or test split can be made of it")
    for label in sorted(label for label in by_class if label is not None):
        members = by_class[label]
        shuffled = [members[index] for index in order.permutation(len(members))]
        val, test = round(len(members) * val_fraction), round(len(members) * test_fraction)
        rest = shuffled[val + test :]
        kept = len(rest) if labels_per_class is None else labels_per_class
        if kept > len(rest):
            raise SourceError(
                f"class {classes[label] if label < len(classes) else label} has {len(rest)} images after val and test, "
                f"fewer than --labels-per-class {kept}"
            )
        split["val"] += shuffled[:val]
        split["test"] += shuffled[val : val + test]
        split["labeled"] += rest[:kept]
        split["unlabeled"] += rest[kept:]
    return {
        part: [chosen[index] for index in order.permutation(len(chosen))] for part, chosen in split.items() if chosen
    }


def _samples(items: Sequence[Item], *, labeled: bool) -> Iterator[tuple[str, dict[str, bytes]]]:
    for item in items:
        field, data = item.read()
        fields: dict[str, Any] = {field: data}
        if labeled and item.label is not None:
            fields["cls"] = str(item.label).encode()
        yield item.key, fields
