"""A flipped byte, and a hundred other ways to spoil a store of every encoding: verify finds each of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from annotated_stores import CASES, CLASSES, Made, annotated_stores  # noqa: F401 (a fixture)
from spoiling import (
    Spoil,
    cell,
    changed_bytes,
    copied,
    edited_store,
    flipped,
    moved,
    of_type,
    one_key,
    resealed,
    resealed_rejects,
    rewritten,
    row_twice,
    stranger,
    swapped_parts,
    swapped_rows,
    turned_labels,
    unchanged,
    users_table,
    zeroed,
)

from pseudolabel import verify
from pseudolabel.errors import DamagedPart, StoreError
from pseudolabel.labels.store import open_store
from pseudolabel.labels.verify import _Checking

ANY: dict[str, Spoil] = {
    "flip": changed_bytes(
        lambda content, chance: flipped(content, chance.randrange(len(content)), chance.randrange(8))
    ),
    "truncate": changed_bytes(lambda content, chance: content[: chance.randrange(len(content))]),
    "tail only": changed_bytes(lambda content, chance: content[chance.randrange(1, len(content)) :]),
    "zeros": changed_bytes(zeroed),
    "appended": changed_bytes(lambda content, chance: content + chance.randbytes(chance.randrange(1, 99))),
    "empty": changed_bytes(lambda content, chance: b""),
    "noise": changed_bytes(lambda content, chance: chance.randbytes(len(content))),
    "rewritten": rewritten,
    "swapped parts": swapped_parts,
    "renamed part": moved("parts", "a", "c"),
    "renamed rejects": moved("rejects", "b", "a"),
    "copied part": copied("parts", "a", "c"),
    "part of another store": copied("parts", "a", "a", other=True),
    "rejects of another store": copied("rejects", "b", "b", other=True),
    "orphan of another store": copied("rejects", "b", "z", other=True),
    "orphan of another shard": copied("rejects", "b", "z"),
    "rejects gone": lambda made, _: (made.root / "rejects" / "b.parquet").unlink(),
    "part gone": lambda made, _: (made.root / "parts" / "a.parquet").unlink(),
    "notes": stranger("parts/notes.txt"),
    "directory": stranger("parts/d.parquet", None),
    "hidden": stranger("rejects/.b.parquet"),
    "beside": stranger("model.safetensors"),
    "below": stranger("old", None),
    "user's table": users_table,
    "edited identity": edited_store,
    "no key column": resealed(lambda table, _: table.drop_columns(["key"])),
    "a column more": resealed(lambda table, _: table.append_column("x", table["pred"])),
    "columns turned": resealed(lambda table, _: table.select([*table.column_names[1:], table.column_names[0]])),
    "int64 pred": resealed(of_type("pred", pa.int64())),
    "float64 entropy": resealed(of_type("entropy", pa.float64())),
    "rows swapped": resealed(swapped_rows),
    "row twice": resealed(row_twice),
    "row lost": resealed(lambda table, chance: table.slice(chance.randrange(1, 3))),
    "no rows": resealed(lambda table, _: table.slice(0, 0)),
    "key twice": resealed(one_key),
    "another key": resealed(cell("key", "stranger")),
    "index": resealed(cell("index", 11, row=0)),
    "view": resealed(cell("view", 7)),
    "pred below": resealed(cell("pred", -1)),
    "pred above": resealed(cell("pred", CLASSES)),
    "label below": resealed(cell("label", -2)),
    "label of another": resealed(cell("label", 8, row=0)),
    "label lost": resealed(cell("label", None)),
    "confidence above": resealed(cell("confidence", 1.25)),
    "confidence below": resealed(cell("confidence", 0.01)),
    "confidence NaN": resealed(cell("confidence", float("nan"))),
    "entropy below": resealed(cell("entropy", -0.5)),
    "entropy infinite": resealed(cell("entropy", float("inf"))),
    "margin above": resealed(cell("margin", 1.0)),
    "samples": resealed(unchanged, samples=13),
    "samples as text": resealed(unchanged, samples="12"),
    "rejects": resealed(unchanged, rejects=1),
    "sha256": resealed(unchanged, sha256="0" * 64),
    "size": resealed(unchanged, size=1),
    "classes": resealed(unchanged, num_classes=8),
    "encoding": resealed(unchanged, encoding="topk:4"),
    "fingerprint": resealed(unchanged, fingerprint="0" * 64),
    "version": resealed(unchanged, format_version=2),
    "fidelity": resealed(unchanged, fidelity={"mean": {}, "p99": {}}),
    "reject's index": resealed_rejects(cell("index", 3, row=0)),
    "reject's key": resealed_rejects(cell("key", "stranger")),
    "reject's shard": resealed_rejects(cell("shard", "a")),
    "reject's stage": resealed_rejects(cell("stage", "?")),
    "reject twice": resealed_rejects(row_twice),
    "no rejects": resealed_rejects(lambda table, _: table.slice(0, 0)),
}
OWN: dict[str, dict[str, Spoil]] = {
    "dense": {
        "logit above 0": resealed(cell("logits", 0.5)),
        "logit NaN": resealed(cell("logits", float("nan"))),
        "logit infinite": resealed(cell("logits", -float("inf"))),
        "no logit 0": resealed(cell("logits", [-1.0] * CLASSES)),
        "null logit": resealed(cell("logits", None)),
        "labels turned": resealed(turned_labels),
    },
    "topk": {
        "id above": resealed(cell("topk_id", CLASSES)),
        "id twice": resealed(cell("topk_id", [1, 2, 1])),
        "kept rises": resealed(cell("topk_logit", [0.0, -2.0, -1.0])),
        "kept from -1": resealed(cell("topk_logit", -0.25)),
        "lse below": resealed(cell("lse", -1.0)),
        "tail above": resealed(cell("tail_mean", 1.0)),
        "variance below": resealed(cell("tail_var", -1.0)),
        "variance NaN": resealed(cell("tail_var", float("nan"))),
        "labels turned": resealed(turned_labels),
    },
    "all": {"a tail of none": resealed(cell("tail_mean", -1.0))},
    "dense8": {
        "no 255": resealed(cell("logits8", [0] * CLASSES)),
        "least above": resealed(cell("logit_min", 1.0)),
        "least below": resealed(cell("logit_min", -101.0)),
        "labels turned": resealed(turned_labels),
    },
    "sampled": {
        "id above": resealed(cell("sample_id", [CLASSES])),
        "ids fall": resealed(cell("sample_id", 6)),
        "counts": resealed(cell("sample_count", 19)),
        "none drawn": resealed(cell("sample_count", 0)),
        "lengths": resealed(cell("sample_id", [])),
    },
    "views": {
        "crop outside": resealed(cell("crop", [0.5, 0.0, 0.75, 1.0], row=1)),
        "crop empty": resealed(cell("crop", [0.5, 0.0, 0.0, 1.0], row=4)),
        "crop NaN": resealed(cell("crop", [float("nan"), 0.0, 0.5, 0.5], row=4)),
        "not clean": resealed(cell("flip", True, row=3)),
        "seed": resealed(cell("aug_seed", -1, row=2)),
        "two keys": resealed(cell("key", "stranger", row=1)),
    },
    "members": {
        "member's id": resealed(cell("member1_topk_id", CLASSES)),
        "member lost": resealed(lambda table, _: table.drop_columns(["member0_lse"])),
        "member's logit": resealed(cell("member0_topk_logit", 1.0)),
    },
    "mirrored": {},
}


@pytest.mark.parametrize("case", ["dense", "topk"])
@pytest.mark.parametrize("kind", ["parts", "rejects"])
def test_every_flipped_byte_is_found(case: str, kind: str, tmp_path: Path, make_store: Callable[[str], Made]) -> None:
    """Each position of a file, a bit at random in each; and as damage that --repair may delete."""
    made = make_store(case).copy(tmp_path / "store")
    (made.root / "parts" / "a.parquet").unlink()
    opened, path = open_store(made.root), made.root / kind / "b.parquet"
    whole, bits = path.read_bytes(), random.Random(0)
    assert len(whole) > 2000
    assert verify(opened).ok
    checking = _Checking(opened, {}, None)
    for position in range(len(whole)):
        path.write_bytes(flipped(whole, position, bits.randrange(8)))
        if position % 100 == 0:
            checking = _Checking(opened, {}, None)
            checking.run()
            assert [(one.part, one.kind) for one in checking.problems] == [("b", "DamagedPart")]
        with pytest.raises(DamagedPart):
            checking.check("b")
    path.write_bytes(whole)
    assert verify(opened).ok


def _found(made: Made) -> str | None:
    """What verify says first of a spoiled store."""
    try:
        result = verify(made.root, made.shards)
    except StoreError as error:
        return error.kind
    assert result.ok == (not result.problems)
    return None if result.ok else result.problems[0].kind


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_corruption_is_found_in_every_store(
    case: str, tmp_path: Path, make_store: Callable[[str], Made]
) -> None:
    intact = make_store(case)
    missed = []
    for number, (name, spoil) in enumerate({**ANY, **OWN[case]}.items()):
        made = intact.copy(tmp_path / "store")
        spoil(made, random.Random(number))
        if _found(made) is None:
            missed.append(name)
    assert missed == []


def test_of_a_hundred_corruptions_a_hundred_are_found(tmp_path: Path, make_store: Callable[[str], Made]) -> None:
    """Drawn at random, several at once at times, and between them nothing is found in the intact stores."""
    chance, found = random.Random(20), 0
    for _ in range(100):
        case = chance.choice(list(CASES))
        intact = make_store(case)
        kinds = {**ANY, **OWN[case]}
        made = intact.copy(tmp_path / "store")
        kinds[name := chance.choice(list(kinds))](made, chance)
        assert _found(made) is not None, (case, name)
        assert verify(intact.root, intact.shards).ok
        found += 1
    assert found == 100
