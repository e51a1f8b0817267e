"""Images: the pixels are Pillow's, the field is found, and every sample of a shard is in a batch or a reject."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_images import BOMBS, JPEGS, LOSSLESS, PALETTE, RGB, encode, png
from PIL import Image
from torch import Tensor

from pseudolabel.decoding import DecodedBatch, Decoding, ShardEnd, decode_shard, decode_shards
from pseudolabel.errors import DamagedShard
from pseudolabel.shard_lists import Shard
from pseudolabel.shards import read_samples
from pseudolabel.views.image import (
    UndecodableImage,
    decode,
    image_field,
    square,
)


def pillow(data: bytes, mode: str) -> Tensor:
    with Image.open(io.BytesIO(data)) as image:
        pixels = torch.from_numpy(np.array(image.convert(mode)))
    return pixels[None] if mode == "L" else pixels.permute(2, 0, 1)


# ---------------------------------------------------------------------------------- right pixels


@pytest.mark.parametrize("name", LOSSLESS)
def test_pixels_are_pillows(name: str) -> None:
    data, mode = LOSSLESS[name]
    found = decode(data)
    assert found.dtype == torch.uint8
    assert torch.equal(found, pillow(data, mode))


@pytest.mark.parametrize("name", JPEGS)
def test_jpeg_pixels_are_pillows_within_two_levels(name: str) -> None:
    data, mode = JPEGS[name]
    found, wanted = decode(data), pillow(data, mode)
    assert found.dtype == torch.uint8
    assert found.shape == wanted.shape
    assert (found.int() - wanted.int()).abs().max() <= 2


def test_pixels_are_those_that_were_saved() -> None:
    """Not only Pillow's answer: what went into a lossless file comes out."""
    pixels = torch.from_numpy(np.array(RGB)).permute(2, 0, 1)
    for name in ("RGB PNG", "RGBA PNG", "BMP", "TIFF", "PPM", "animated PNG", "two pages of TIFF"):
        assert torch.equal(decode(LOSSLESS[name][0]), pixels), name
    assert torch.equal(decode(LOSSLESS["2-bit grey PNG"][0])[0], torch.tensor([[0, 85, 170, 255], [255, 170, 85, 0]]))
    assert decode(LOSSLESS["grey PNG"][0]).shape == (1, 23, 37)


def test_an_interlaced_png_is_put_together() -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b"".join(
        b"\0" + row.tobytes() for top, left, down, right in passes for row in pixels[top::down, left::right]
    )
    assert torch.equal(decode(png(8, 8, 8, 0, rows, interlaced=True))[0], torch.from_numpy(pixels))


def test_sixteen_bits_become_the_upper_eight() -> None:
    ramp = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    wanted = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 256)
    for data in (
        encode(Image.fromarray(ramp), "PNG"),
        encode(Image.fromarray(ramp), "PNG", transparency=5),
        encode(Image.fromarray(ramp), "TIFF"),
        encode(Image.fromarray(ramp.astype(">u2")), "TIFF"),
        b"P5 256 256 65535\n" + ramp.astype(">u2").tobytes(),
    ):
        assert torch.equal(decode(data), wanted[None])


def test_transparent_palette_entries_keep_their_colour_and_warn_of_nothing() -> None:
    """Pillow warns of this kind; where warnings are errors the image was rejected."""
    data = encode(PALETTE, "PNG", transparency=bytes(range(0, 256, 16)))
    assert torch.equal(decode(data), decode(encode(PALETTE, "PNG")))
    assert torch.equal(decode(encode(PALETTE, "GIF", transparency=2)), decode(encode(PALETTE, "PNG")))


def test_orientation_and_colour_profile_are_left_alone() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter
    for data in (encode(RGB, "JPEG", exif=exif, icc_profile=b"nonsense"), encode(RGB, "PNG", exif=exif)):
        assert decode(data).shape == (3, 23, 37)
    assert torch.equal(decode(encode(RGB, "JPEG", exif=exif)), decode(encode(RGB, "JPEG")))


# ---------------------------------------------------------------------------------- which field


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["png"], "png"),
        (["cls", "jpg", "json"], "jpg"),
        (["seg.png", "jpeg", "png.txt"], "jpeg"),
        (["webp", "tif.json"], "webp"),
    ],
)
def test_the_image_field_is_found(names: list[str], found: str) -> None:
    assert image_field(names) == image_field(iter(names)) == found


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "no image field among no fields"),
        (["cls", "txt"], "no image field among cls, txt; one of jpg/"),
        (["seg.png"], "no image field"),
        (["pyd", "pickle", "npy"], "no image field"),
        (["png", "jpg"], "several image fields among jpg, png"),
    ],
)
def test_no_image_field_or_several_are_refused(names: list[str], said: str) -> None:
    with pytest.raises(UndecodableImage, match=said):
        image_field(names)


# ---------------------------------------------------------------------------------- shards of images


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self.path,)


def test_nothing_in_a_shard_is_unpickled(make_shard: Callable[..., Path], tmp_path: Path) -> None:
    """webdataset's `.decode()` runs code from all four of these."""
    sprung = tmp_path / "sprung"
    code = pickle.dumps(Trap(sprung))
    fields = dict.fromkeys(("pyd", "pickle", "pkl", "pth"), code)
    path = make_shard("s", [("a", {"png": LOSSLESS["grey PNG"][0], "cls": b"2", **fields}), ("b", fields)])
    shard = Shard("s", str(path))
    first, second = read_samples(shard)
    assert all(first.fields[name] == second.fields[name] == code for name in fields)
    batch, end = decode_shard(shard, Decoding(8, lambda image: (image,)))
    assert isinstance(batch, DecodedBatch)
    assert isinstance(end, ShardEnd)
    assert (batch.keys, batch.labels, end.samples) == (["a"], [2], 2)
    assert [reject.key for reject in batch.rejects] == ["b"]
    assert not sprung.exists()
    pickle.loads(code)  # noqa: S301 - the trap does work
    assert sprung.exists()


def test_every_sample_is_in_a_batch_or_a_reject(make_shard: Callable[..., Path]) -> None:
    good = LOSSLESS["grey PNG"][0]
    samples: list[tuple[str, dict[str, bytes]]] = [
        ("fine", {"png": good, "cls": b"3\n"}),
        ("torn", {"png": good[:50]}),
        ("empty", {"png": b""}),
        ("bomb", {"png": BOMBS["PNG"]}),
        ("none", {"txt": b"text"}),
        ("two", {"png": good, "jpg": good}),
        ("misnamed", {"jpg": good}),
        ("minus", {"png": good, "cls": b"-1"}),
        ("word", {"png": good, "cls": b"cat"}),
        ("huge", {"png": good, "cls": b"9" * 5000}),
        ("thin", {"png": encode(Image.new("L", (60_000, 1)), "PNG")}),
        ("last", {"png": good}),
    ]
    shard = Shard("s", str(make_shard("s", samples)))
    prepare = square(256, 1).prepare
    *batches, end = decode_shard(shard, Decoding(5, lambda image: (prepare(image),)))
    assert [len(batch.keys) + len(batch.rejects) for batch in batches if isinstance(batch, DecodedBatch)] == [5, 5, 2]
    assert isinstance(end, ShardEnd)
    assert end.samples == len(samples)
    kept, rejects = {}, {}
    for batch in batches:
        assert isinstance(batch, DecodedBatch)
        assert all(len(column) == len(batch.keys) for column in batch.inputs)
        kept.update(zip(batch.keys, zip(batch.index, batch.labels, strict=True), strict=True))
        rejects.update({one.key: (one.index, one.stage) for one in batch.rejects})
    assert kept == {"fine": (0, 3), "misnamed": (6, None), "last": (11, None)}
    stages = {key: stage for key, (_, stage) in rejects.items()}
    assert stages == {
        **dict.fromkeys(("torn", "empty", "bomb", "none", "two", "thin"), "decode"),
        **dict.fromkeys(("minus", "word", "huge"), "label"),
    }
    assert all(samples[index][0] == key for key, (index, _) in rejects.items())


def test_a_damaged_shard_gives_its_error_and_the_next_goes_on(make_shard: Callable[..., Path]) -> None:
    paths = [make_shard(name, [("k", {"png": LOSSLESS["grey PNG"][0]})]) for name in ("a", "b", "c")]
    paths[1].write_bytes(paths[1].read_bytes()[:600])
    shards = [Shard(path.stem, str(path)) for path in paths]
    found = [(shard.name, type(one)) for shard, one in decode_shards(iter(shards), Decoding(4, lambda image: (image,)))]
    assert found == [("a", DecodedBatch), ("a", ShardEnd), ("b", DamagedShard), ("c", DecodedBatch), ("c", ShardEnd)]
