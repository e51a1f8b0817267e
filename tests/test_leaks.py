"""Planted duplicates are found, different images aren't, and the file of leaks can be trusted."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from commands import Invoke, Refuse
from made_images import encode, picture
from object_stores import Bucket
from PIL import Image, ImageOps

import pseudolabel
from pseudolabel import storage
from pseudolabel.demo import bundled
from pseudolabel.duplicates.look import CROPS, look_at
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import DamagedPart, DamagedShard, OutputExists, SpecError, StoreError
from pseudolabel.labels.schema import read_metadata
from pseudolabel.leaks import LeaksResult, find_leaks, read_leaks
from pseudolabel.shard_lists import Shard
from pseudolabel.shards import ShardFile, shard_sha256, write_shard
from pseudolabel.sources import read_source

ALONE = LocalEngine("cpu", 1)
SIZE = (96, 80)


@cache
def clothes() -> list[Image.Image]:
    """Real images, all different: 350 of each class, 10 classes."""
    items = read_source(bundled("data/fashion-mnist") / "test-images-idx3-ubyte.gz").items
    return [Image.open(io.BytesIO(item.read()[1])) for item in items[:800]]


def shard(path: Path, images: Mapping[str, bytes], field: str = "png") -> Path:
    write_shard(path, [(key, {field: data}) for key, data in images.items()])
    return path


def pngs(images: list[Image.Image], prefix: str) -> dict[str, bytes]:
    return {f"{prefix}{number:04d}": encode(image, "PNG") for number, image in enumerate(images)}


def recompressed(image: Image.Image) -> bytes:
    return encode(image, "JPEG", quality=60)


def half(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BILINEAR)


def cropped(image: Image.Image, shares: tuple[float, ...]) -> Image.Image:
    top, bottom, left, right = shares
    box = (image.width * left, image.height * top, image.width * (1 - right), image.height * (1 - bottom))
    return image.crop(tuple(map(round, box)))  # type: ignore[arg-type]


CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "recompressed": recompressed,
    "smaller": lambda image: encode(half(image), "PNG"),
    "larger": lambda image: encode(image.resize((image.width * 2, image.height * 2)), "PNG"),
    "brighter": lambda image: encode(image.point(lambda level: min(255, level * 5 // 4)), "PNG"),
    "darker": lambda image: encode(image.point(lambda level: level * 3 // 5), "PNG"),
    "mirrored": lambda image: encode(ImageOps.mirror(image), "PNG"),
    "mirrored, smaller, recompressed": lambda image: recompressed(half(ImageOps.mirror(image))),
}
CROPPED: dict[str, Callable[[Image.Image], bytes]] = {
    f"cropped by {shares}": lambda image, shares=shares: encode(cropped(image, shares), "PNG")  # type: ignore[misc]
    for shares in CROPS[1:]
}


def found_among(tmp_path: Path, against: list[Image.Image], samples: Mapping[str, bytes]) -> list[dict[str, Any]]:
    out = tmp_path / "leaks.parquet"
    val = shard(tmp_path / "val.tar", pngs(against, "v"))
    unlabeled = shard(tmp_path / "unlabeled.tar", samples)
    find_leaks(unlabeled, val, out, engine=ALONE)
    rows: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    return rows


def test_the_same_pixels_are_found_however_they_are_encoded(tmp_path: Path) -> None:
    images = [picture(*SIZE, seed) for seed in range(4)]
    grey = picture(*SIZE, 9).convert("L")
    samples = {
        "bmp": encode(images[2], "BMP"),
        "other": encode(picture(*SIZE, 8), "PNG"),
        "rgb": encode(grey.convert("RGB"), "PNG"),
        "webp": encode(images[1], "WEBP", lossless=True),
    }
    rows = found_among(tmp_path, [*images, grey], samples)
    shown = [(row["key"], row["index"], row["kind"], row["against_key"], row["against_index"]) for row in rows]
    assert shown == [
        ("bmp", 0, "exact", "v0002", 2),
        ("rgb", 2, "exact", "v0004", 4),
        ("webp", 3, "exact", "v0001", 1),
    ]
    assert {(row["distance"], row["similarity"], row["shard"], row["against_shard"]) for row in rows} == {
        (0, 1.0, "unlabeled", "val")
    }


def test_images_of_another_shape_with_the_same_bytes_are_others(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16), dtype=np.uint8)
    samples = {"turned": encode(Image.fromarray(pixels.reshape(16, 8)), "PNG")}
    assert found_among(tmp_path, [Image.fromarray(pixels)], samples) == []


@pytest.mark.parametrize("change", [*CHANGES, *CROPPED])
def test_changed_copies_of_pictures_are_found(change: str, tmp_path: Path) -> None:
    images = [picture(*SIZE, seed) for seed in range(6)]
    copy = {**CHANGES, **CROPPED}[change]
    rows = found_among(tmp_path, images, {f"u{seed}": copy(image) for seed, image in enumerate(images)})
    assert [(row["kind"], row["key"], row["against_index"]) for row in rows] == [
        ("near", f"u{seed}", seed) for seed in range(6)
    ]


@pytest.mark.parametrize("change", [name for name in CHANGES if name != "mirrored, smaller, recompressed"])
def test_changed_copies_of_tiny_images_are_found(change: str, tmp_path: Path) -> None:
    """28x28 pixels, where a hash is far from enough; and no other image comes first. (14x14 as JPEG is too little.)"""
    images = clothes()[:40]
    rows = found_among(tmp_path, images, {f"u{n:02d}": CHANGES[change](image) for n, image in enumerate(images)})
    right = [row for row in rows if row["against_index"] == row["index"]]
    assert len(right) == len(rows)
    assert len(right) >= 0.9 * len(images)


def test_different_images_are_no_leaks(tmp_path: Path) -> None:
    """Clothes look alike, and many share a hash."""
    images = clothes()
    assert found_among(tmp_path, images[:400], pngs(images[400:], "u")) == []


def test_plain_images_are_near_to_nothing(tmp_path: Path) -> None:
    flat = [Image.new("L", (20, 20), level) for level in (0, 90, 255)]
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1)))
    samples = pngs([Image.new("L", (30, 30), 91), ramp.resize((50, 50)), flat[1]], "u")
    rows = found_among(tmp_path, [*flat, ramp], samples)
    assert [(row["kind"], row["key"], row["against_index"]) for row in rows] == [("exact", "u0002", 1)]


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """Three unlabeled shards with copies of val and test images, and images that can't be decoded."""
    images = [picture(*SIZE, seed) for seed in range(12)]
    shard(tmp_path / "val" / "val-0.tar", {**pngs(images[:3], "v"), "broken": b"no image"})
    shard(tmp_path / "test" / "test-0.tar", pngs(images[3:6], "t"))
    for number in range(3):
        samples = {
            "a": encode(images[6 + number], "PNG"),
            "b": encode(images[number], "BMP"),
            "c": b"",
            "d": recompressed(ImageOps.mirror(images[3 + number])),
        }
        shard(tmp_path / "unlabeled" / f"u-{number}.tar", samples)
    return tmp_path


def search(root: Path, out: str, workers: int = 1, **options: Any) -> LeaksResult:
    against = [root / "val", root / "test"]
    return find_leaks(root / "unlabeled", against, root / out, engine=LocalEngine("cpu", workers), **options)


def test_any_number_of_workers_writes_the_same_bytes(planted: Path) -> None:
    result = search(planted, "one.parquet")
    assert (result.samples, result.against, result.skipped) == (12, 7, 4)
    assert (result.leaks, result.exact, result.near) == (6, 3, 3)
    search(planted, "two.parquet", workers=2)
    assert (planted / "one.parquet").read_bytes() == (planted / "two.parquet").read_bytes()
    found = pseudolabel.read_leaks(planted / "one.parquet")
    assert found.excluded == {f"u-{number}": [1, 3] for number in range(3)}
    hashes = {
        path.stem: shard_sha256(Shard(path.stem, str(path)))
        for split in ("unlabeled", "val", "test")
        for path in (planted / split).iterdir()
    }
    assert found.shards == {name: digest for name, digest in hashes.items() if name.startswith("u-")}
    assert found.against == {name: digest for name, digest in hashes.items() if not name.startswith("u-")}
    assert read_metadata(planted / "one.parquet")["parameters"]["distance"] == 8


def test_distance_0_keeps_what_is_equal(planted: Path) -> None:
    assert search(planted, "far.parquet", distance=0).exact == 3
    with pytest.raises(SpecError, match="from 0 to 64"):
        search(planted, "other.parquet", distance=65)


def test_nothing_found_is_a_file_too(planted: Path) -> None:
    find_leaks(planted / "val", planted / "test", planted / "none.parquet", engine=ALONE)
    found = read_leaks(planted / "none.parquet")
    assert (found.excluded, list(found.shards), list(found.against)) == ({}, ["val-0"], ["test-0"])


def test_what_is_there_stays(planted: Path) -> None:
    (planted / "kept").write_text("mine")
    with pytest.raises(OutputExists, match="--overwrite"):
        search(planted, "kept")
    with pytest.raises(OutputExists, match="holds no leaks, so it isn't overwritten"):
        search(planted, "kept", overwrite=True)
    assert (planted / "kept").read_text() == "mine"
    (planted / "kept").unlink()
    search(planted, "kept")
    search(planted, "kept", overwrite=True)
    assert len(read_leaks(planted / "kept").excluded) == 3


def test_leaks_at_a_url(planted: Path, bucket: Bucket) -> None:
    place = storage.location(f"{bucket.url}/val/val-0.tar")
    storage.write_atomic(place, (planted / "val" / "val-0.tar").read_bytes())
    out = f"{bucket.url}/leaks.parquet"
    find_leaks(planted / "unlabeled", f"{bucket.url}/val", out, engine=ALONE)
    assert read_leaks(out).excluded == {f"u-{number}": [1] for number in range(3)}
    with pytest.raises(OutputExists):
        find_leaks(planted / "unlabeled", planted / "val", out, engine=ALONE)


def test_a_damaged_shard_is_named_and_nothing_written(planted: Path) -> None:
    path = planted / "unlabeled" / "u-1.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DamagedShard, match=r"u-1\.tar"):
        search(planted, "leaks.parquet")
    assert not (planted / "leaks.parquet").exists()


def test_files_that_are_no_leaks_are_refused(planted: Path, store: Path) -> None:
    search(planted, "leaks.parquet")
    content = bytearray((planted / "leaks.parquet").read_bytes())
    with pytest.raises(StoreError, match="no such file"):
        read_leaks(planted / "absent.parquet")
    with pytest.raises(StoreError, match="something else"):
        read_leaks(next((store / "parts").glob("*.parquet")))
    for position in range(10, len(content), len(content) // 7):
        changed = bytearray(content)
        changed[position] ^= 1
        (planted / "changed.parquet").write_bytes(changed)
        with pytest.raises(DamagedPart):
            read_leaks(planted / "changed.parquet")
    (planted / "cut.parquet").write_bytes(content[:-20])
    with pytest.raises(DamagedPart):
        read_leaks(planted / "cut.parquet")


def test_a_missing_package_is_one_line(planted: Path, monkeypatch: pytest.MonkeyPatch, refuse: Refuse) -> None:
    monkeypatch.setitem(sys.modules, "imagehash", None)
    args = ("leaks", planted / "unlabeled", "--against", planted / "val", "--out", planted / "l", "--workers", 1)
    shown = refuse(*args, kind="SpecError", said=r"pip install 'pseudolabel\[leaks\]'")
    assert len(shown.splitlines()) == 1


def test_the_command(planted: Path, answer: Callable[..., dict[str, Any]], invoke: Invoke, refuse: Refuse) -> None:
    out = planted / "leaks.parquet"
    against = ("--against", planted / "val", "--against", planted / "test")
    args = ("leaks", planted / "unlabeled", *against, "--out", out, "--workers", 1)
    code, shown, _ = invoke(*args)
    assert code == 0
    assert "exact: u-0 'b' is val-0 'v0000'" in shown
    assert f"pseudolabel select STORE --exclude {out}" in shown
    refuse(*args, kind="OutputExists", said="--overwrite")
    found = answer(*args, "--overwrite")
    assert found.pop("seconds") > 0
    counts = {"samples": 12, "against": 7, "leaks": 6, "exact": 3, "near": 3, "skipped": 4}
    assert found == {"out": str(out), **counts}


def test_a_look_has_all_crops_or_one(tmp_path: Path) -> None:
    path = shard(tmp_path / "one.tar", pngs([picture()], "p"))
    with ShardFile(Shard("one", str(path))) as opened:
        one, all_of_them = (look_at(opened, [0], variants=variants) for variants in (False, True))
    assert one.hashes_MV.shape == (1, 1)
    assert all_of_them.hashes_MV.shape == (1, 2 * len(CROPS))
    assert all_of_them.hashes_MV[0, 0] == one.hashes_MV[0, 0]
    assert len(set(all_of_them.hashes_MV[0].tolist())) > len(CROPS)
