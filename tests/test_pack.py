"""Packing: every image of every kind of source arrives once, byte for byte, with its label where it keeps one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Refuse
from hypothesis import given
from hypothesis import strategies as st
from packing import contents, image, packed, place, refused

from pseudolabel.errors import OutputExists, SourceError, StorageError
from pseudolabel.pack import pack, split_items
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import Sample, read_samples
from pseudolabel.sources import Item, read_source


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------- the split


def items(*counts: int, unlabeled: int = 0) -> list[Item]:
    labels = [label for label, count in enumerate(counts) for _ in range(count)] + [None] * unlabeled
    return [Item(f"{number}", label, lambda: ("png", b"")) for number, label in enumerate(labels)]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    st.integers(0, 5),
    st.sampled_from([0.0, 0.1, 0.25, 0.5]),
    st.sampled_from([0.0, 0.2, 0.5]),
    st.sampled_from([None, 0, 1, 2]),
    st.integers(0, 3),
)
def test_splits_are_stratified_disjoint_and_complete(
    counts: list[int], unlabeled: int, val: float, test: float, kept: int | None, seed: int
) -> None:
    source = items(*counts, unlabeled=unlabeled)
    in_val = [round(count * val) for count in counts]
    in_test = [min(round(count * test), count - part) for count, part in zip(counts, in_val, strict=True)]
    left = [count - one - other for count, one, other in zip(counts, in_val, in_test, strict=True)]
    if kept is not None and min(left) < kept:
        with pytest.raises(SourceError, match=f"fewer than --labels-per-class {kept}"):
            split_items(source, kept, val, test, seed)
        return
    split = split_items(source, kept, val, test, seed)
    assert sorted(int(item.key) for part in split.values() for item in part) == list(range(len(source)))
    assert all(split.values())

    def by_class(part: str) -> list[int]:
        found = Counter(item.label for item in split.get(part, []))
        return [found[label] for label in range(len(counts))]

    assert by_class("val") == in_val
    assert by_class("test") == in_test
    assert by_class("labeled") == (left if kept is None else [kept] * len(counts))
    assert sum(by_class("unlabeled")) + unlabeled == len(split.get("unlabeled", []))


def test_the_seed_decides_the_split_and_the_order() -> None:
    source = items(30, 30)
    first = split_items(source, 5, 0.2, 0.1, 1)
    assert split_items(source, 5, 0.2, 0.1, 1) == first
    other = split_items(source, 5, 0.2, 0.1, 2)
    for part, chosen in first.items():
        assert {item.key for item in chosen} != {item.key for item in other[part]}
        assert [item.key for item in chosen] != sorted((item.key for item in chosen), key=int)  # shuffled
    assert {item.label for item in first["labeled"][:5]} == {0, 1}  # classes don't lie one after the other


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"val_fraction": -0.1}, "each must lie in"),
        ({"test_fraction": 1.1}, "each must lie in"),
        ({"val_fraction": 0.6, "test_fraction": 0.6}, "each must lie in"),
        ({"val_fraction": float("nan")}, "each must lie in"),
        ({"test_fraction": float("inf")}, "each must lie in"),
        ({"labels_per_class": -1}, "can't be below 0"),
        ({"labels_per_class": 7}, "class a has 6 images after val and test, fewer than --labels-per-class 7"),
        ({"labels_per_class": 6, "val_fraction": 0.5}, "class a has 3 images after val and test"),
        ({"samples_per_shard": 0}, "samples per shard is 0"),
        ({"samples_per_shard": -5}, "samples per shard is -5"),
        ({"name": "a/b"}, "can't begin a shard's name"),
        ({"name": ".hidden"}, "can't begin a shard's name"),
    ],
    ids=str,
)
def test_nonsense_is_refused_before_anything_is_written(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    source = place(
        tmp_path / "source", {f"{label}/{number}.png": image(number) for label in "ab" for number in range(6)}
    )
    refused(source, said, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def two_classes(tmp_path: Path) -> Path:
    files = {
        f"{name}/{number}.png": image(100 * place + number) for place, name in enumerate("ab") for number in range(20)
    }
    return place(tmp_path / "source", files)


def test_what_is_packed_and_under_which_names(two_classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"labels_per_class": 3, "val_fraction": 0.2, "test_fraction": 0.1, "seed": 7}
    result = pack(two_classes, out, **options, samples_per_shard=4, name="pets")
    assert result.samples == {"labeled": 6, "unlabeled": 22, "val": 8, "test": 4}
    assert result.shards == 2 + 6 + 2 + 1
    assert sorted(tree(out)) == sorted(
        [f"labeled/pets-labeled-{number:06d}.tar" for number in range(2)]
        + [f"unlabeled/pets-unlabeled-{number:06d}.tar" for number in range(6)]
        + [f"val/pets-val-{number:06d}.tar" for number in range(2)]
        + ["test/pets-test-000000.tar", "classes.txt", "dataset.json"]
    )
    sizes = [len(list(read_samples(shard))) for shard in list_shards(out / "unlabeled")]
    assert sizes == [4, 4, 4, 4, 4, 2]
    found = packed(out)
    assert all("cls" not in sample.fields for sample in found["unlabeled"])
    for part in ("labeled", "val", "test"):
        for key, (data, label) in contents(found[part]).items():
            folder, number = key.split("/")
            assert label == str("ab".index(folder))
            assert data == image(100 * "ab".index(folder) + int(number))
    every = {key for samples in found.values() for key in contents(samples)}
    assert every == {f"{name}/{number}" for name in "ab" for number in range(20)}
    described = json.loads((out / "dataset.json").read_text())
    assert described["samples"] == dict(result.samples)
    assert described["classes"] == ["a", "b"]
    assert {name: described[name] for name in options} == options
    assert str(tmp_path) not in json.dumps(described)


def test_equal_seeds_give_equal_bytes(two_classes: Path, tmp_path: Path) -> None:
    def made(name: str, seed: int) -> dict[str, bytes]:
        pack(two_classes, tmp_path / name, labels_per_class=5, val_fraction=0.1, seed=seed, samples_per_shard=7)
        return tree(tmp_path / name)

    first = made("first", 3)
    assert made("again", 3) == first
    other = made("other", 4)
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first if name != "classes.txt")
    assert other["classes.txt"] == first["classes.txt"] == b"a\nb\n"


# ---------------------------------------------------------------------------------- what was there before


def test_a_data_set_is_replaced_only_when_asked(two_classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(two_classes, out, samples_per_shard=3)
    before = tree(out)
    with pytest.raises(OutputExists, match="--overwrite"):
        pack(two_classes, out)
    assert tree(out) == before
    place(out, {"notes.txt": b"mine", "labeled/mine.txt": b"mine"})
    pack(two_classes, out, val_fraction=0.5, overwrite=True)
    assert sorted(tree(out)) == [
        "classes.txt",
        "dataset.json",
        "labeled/labeled-000000.tar",
        "labeled/mine.txt",
        "notes.txt",
        "val/val-000000.tar",
    ]
    assert sum(map(len, packed_splits(out).values())) == 40
    for marker in ("dataset.json", "labeled/labeled-000000.tar"):
        half = place(tmp_path / marker.replace("/", "-"), {marker: b""})
        with pytest.raises(OutputExists):
            pack(two_classes, half)


def packed_splits(out: Path) -> dict[str, list[Sample]]:
    return {name: samples for name, samples in packed(out).items() if samples}


def test_an_overwrite_that_fails_loses_nothing(two_classes: Path, tmp_path: Path) -> None:
    """The old shards used to be deleted before the first new image was read."""
    out = tmp_path / "out"
    pack(two_classes, out)
    before = tree(out)
    (two_classes / "b" / "9.png").unlink()
    (two_classes / "b" / "9.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SourceError, match=r"9\.png: can't be read"):
        pack(two_classes, out, samples_per_shard=2, overwrite=True)
    assert tree(out) == before
    with pytest.raises(SourceError, match="fewer than"):
        pack(two_classes, out, labels_per_class=1000, overwrite=True)
    assert tree(out) == before


def test_a_failed_or_killed_pack_does_not_block_the_next(two_classes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (two_classes / "b" / "torn.png").symlink_to(tmp_path / "nowhere")
    refused(two_classes, r"torn\.png", out)
    assert tree(out) == {}
    (two_classes / "b" / "torn.png").unlink()
    place(out, {".packing/labeled/labeled-000007.tar": b"of a killed process"})
    pack(two_classes, out)
    assert sorted(tree(out)) == ["classes.txt", "dataset.json", "labeled/labeled-000000.tar"]


def test_a_place_that_can_not_be_written_is_a_storage_error(two_classes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="failed"):
        pack(two_classes, tmp_path / "file" / "out")


def test_items_are_read_late(two_classes: Path) -> None:
    """Listing a source opens no image, so a corpus needs no memory."""
    source = read_source(two_classes)
    (two_classes / "a" / "0.png").write_bytes(b"changed since")
    read: Callable[[], tuple[str, bytes]] = next(item.read for item in source.items if item.key == "a/0")
    assert read() == ("png", b"changed since")


def test_a_url_is_no_place_to_pack_into(tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for a directory named s3:."""
    monkeypatch.chdir(tmp_path)
    for command in (("pack", tmp_path, "s3://bucket/x"), ("demo", "--out", "s3://bucket/x")):
        refuse(*command, kind="StorageError", said="must be a path on this machine; copy the files here")
    assert list(tmp_path.iterdir()) == []
