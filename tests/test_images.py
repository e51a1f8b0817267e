"""Images: the pixels are Pillow's, whatever the bytes are the answer is a uint8 tensor or `UndecodableImage`, and the
prepared view is torchvision's.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.v2 import InterpolationMode

from pseudolabel.decoding import DecodedBatch, Decoding, ShardEnd, decode_shard, decode_shards
from pseudolabel.errors import DamagedShard
from pseudolabel.shard_lists import Shard
from pseudolabel.shards import read_samples
from pseudolabel.views.image import (
    MAX_PIXELS,
    Normalize,
    Preprocessing,
    UndecodableImage,
    decode,
    image_field,
    square,
    to_channels,
)

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def picture(width: int = 37, height: int = 23, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise: neither trivial for a codec nor hopeless."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((pixels + random.integers(-8, 9, pixels.shape)).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pillow(data: bytes, mode: str) -> Tensor:
    with Image.open(io.BytesIO(data)) as image:
        pixels = torch.from_numpy(np.array(image.convert(mode)))
    return pixels[None] if mode == "L" else pixels.permute(2, 0, 1)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, interlaced: bool = False) -> bytes:
    """A PNG from raw rows, each with its filter byte."""
    shape = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    palette = chunk(b"PLTE", bytes(range(12))) if colour == 3 else b""
    image = chunk(b"IHDR", shape) + palette + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + image


RGB = picture()
GREY = RGB.convert("L")
PALETTE = RGB.quantize(16)
FRAMES = {"save_all": True, "append_images": [picture(seed=1), picture(seed=2)], "duration": 50}
GAMMA = PngImagePlugin.PngInfo()
GAMMA.add(b"gAMA", struct.pack(">I", 100_000))
LOSSLESS: dict[str, tuple[bytes, str]] = {
    "grey PNG": (encode(GREY, "PNG"), "L"),
    "grey PNG with a transparent level": (encode(GREY, "PNG", transparency=7), "L"),
    "RGB PNG": (encode(RGB, "PNG"), "RGB"),
    "RGB PNG with a transparent colour": (encode(RGB, "PNG", transparency=(1, 2, 3)), "RGB"),
    "RGB PNG with a gamma": (encode(RGB, "PNG", pnginfo=GAMMA), "RGB"),
    "RGBA PNG": (encode(RGB.convert("RGBA"), "PNG"), "RGB"),
    "grey PNG with alpha": (encode(RGB.convert("LA"), "PNG"), "L"),
    "palette PNG": (encode(PALETTE, "PNG"), "RGB"),
    "palette PNG of 4 bits": (encode(PALETTE, "PNG", bits=4), "RGB"),
    "palette PNG with a transparent entry": (encode(PALETTE, "PNG", transparency=3), "RGB"),
    "1-bit PNG": (encode(GREY.convert("1"), "PNG"), "L"),
    "2-bit grey PNG": (png(4, 2, 2, 0, b"\0\x1b\0\xe4"), "L"),
    "animated PNG": (encode(RGB, "PNG", **FRAMES), "RGB"),
    "GIF": (encode(RGB, "GIF"), "RGB"),
    "grey GIF": (encode(GREY, "GIF"), "RGB"),
    "animated GIF": (encode(RGB, "GIF", **FRAMES), "RGB"),
    "WebP": (encode(RGB, "WEBP"), "RGB"),
    "lossless WebP with alpha": (encode(RGB.convert("RGBA"), "WEBP", lossless=True), "RGB"),
    "animated WebP": (encode(RGB, "WEBP", **FRAMES), "RGB"),
    "BMP": (encode(RGB, "BMP"), "RGB"),
    "grey BMP": (encode(GREY, "BMP"), "L"),
    "TIFF": (encode(RGB, "TIFF"), "RGB"),
    "grey LZW TIFF": (encode(GREY, "TIFF", compression="tiff_lzw"), "L"),
    "CMYK TIFF": (encode(RGB.convert("CMYK"), "TIFF"), "RGB"),
    "PPM": (encode(RGB, "PPM"), "RGB"),
    "PGM": (encode(GREY, "PPM"), "L"),
    "one pixel": (encode(GREY.crop((0, 0, 1, 1)), "PNG"), "L"),
    "two pages of TIFF": (encode(RGB, "TIFF", save_all=True, append_images=[picture(seed=1)]), "RGB"),
}
JPEGS: dict[str, tuple[bytes, str]] = {
    "grey": (encode(GREY, "JPEG"), "L"),
    "RGB": (encode(RGB, "JPEG"), "RGB"),
    "full chroma": (encode(RGB, "JPEG", subsampling=0, quality=95), "RGB"),
    "stored as RGB": (encode(RGB, "JPEG", keep_rgb=True), "RGB"),
    "progressive": (encode(RGB, "JPEG", progressive=True), "RGB"),
    "grey progressive": (encode(GREY, "JPEG", progressive=True), "L"),
    "restart markers": (encode(RGB, "JPEG", restart_marker_blocks=2), "RGB"),
    "low quality": (encode(RGB, "JPEG", quality=5), "RGB"),
    "CMYK": (encode(RGB.convert("CMYK"), "JPEG"), "RGB"),
    "several pictures (MPO)": (encode(RGB, "MPO", save_all=True, append_images=[picture(seed=1)]), "RGB"),
    "one pixel": (encode(RGB.crop((0, 0, 1, 1)), "JPEG"), "RGB"),
}


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


# ---------------------------------------------------------------------------------- wrong bytes


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the file is empty (0 bytes)"),
        (b"\0", "no image of a known format"),
        (b"\0" * 4096, "no image of a known format"),
        (b"<html>404</html>", "no image of a known format"),
        ("Текст".encode() * 100, "no image of a known format"),
        (b"\x89PNG\r\n\x1a\n", "no image of a known format"),
        (b"\xff\xd8\xff", "no image of a known format"),
        (b"GIF89a", ""),
        (b"BM", ""),
        (encode(GREY.convert("F"), "TIFF"), "floating-point pixels"),
        (png(0, 5, 8, 0, b"\0" * 5), "no image of a known format"),
        (png(5, 5, 7, 0, b"\0" * 30), "no image of a known format"),
        (png(5, 5, 8, 0, b"\x09aaaaa" * 5), ""),
    ],
    ids=lambda value: None if isinstance(value, str) else repr(value[:20]),
)
def test_what_is_no_image_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(UndecodableImage) as caught:
        decode(data)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["EPS", "PCX", "ICO", "JPEG2000", "PDF"])
def test_formats_that_are_not_promised_are_not_tried(kind: str) -> None:
    """EPS would start Ghostscript on bytes from a shard."""
    with pytest.raises(UndecodableImage, match="no image of a known format"):
        decode(encode(RGB, kind))


# What a file may lack without lacking a pixel: checksums and end chunk, trailer, padding of a row, the next directory.
PADDING = {"PNG": 24, "GIF": 2, "BMP": 3, "TIFF": 4}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["grey PNG", "RGB PNG", "RGBA PNG", "palette PNG", "GIF", "WebP", "BMP", "TIFF", "grey LZW TIFF", "PPM"]
)
def test_a_cut_image_is_refused_and_never_half_grey(name: str) -> None:
    data, _ = LOSSLESS[name]
    whole, padding = decode(data), PADDING.get(name.split()[-1], 0)
    for length in {*range(0, len(data), max(len(data) // 60, 1)), *range(max(len(data) - 40, 0), len(data))}:
        try:
            found = decode(data[:length])
        except UndecodableImage:
            continue
        assert length >= len(data) - padding, length
        assert torch.equal(found, whole)


@pytest.mark.parametrize("name", JPEGS)
def test_a_cut_jpeg_is_refused(name: str) -> None:
    data, _ = JPEGS[name]
    data = data[: data.index(b"\xff\xd9", -2 if "MPO" not in name else 0) + 2]
    for length in {*range(0, len(data), max(len(data) // 80, 1)), *range(len(data) - 30, len(data))}:
        with pytest.raises(UndecodableImage):
            decode(data[:length])


def test_damaged_pngs_do_not_end_the_process() -> None:
    """torchvision 0.29's PNG decoder dies of a segmentation fault on these, and would take an annotation with it: here
    it would end pytest.
    """
    short = png(100, 100, 8, 0, bytes(1000))
    wrong_sum = bytearray(LOSSLESS["RGB PNG"][0])
    wrong_sum[len(wrong_sum) // 2] ^= 1
    for data in (short, bytes(wrong_sum)):
        with pytest.raises(UndecodableImage):
            decode(data)


SEEDS = [data for data, _ in [*LOSSLESS.values(), *JPEGS.values()]]
MAGIC = [
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
    b"\xff\xd8\xff\xe0",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"RIFF\0\0\0\0WEBPVP8 ",
    b"P6",
]


def answer(data: bytes) -> None:
    """A tensor of the promised shape, or `UndecodableImage`: anything else fails the test."""
    try:
        found = decode(data)
    except UndecodableImage as error:
        message = str(error)
        assert message
        assert " at 0x" not in message  # the same for the same bytes
        return
    assert found.dtype == torch.uint8
    assert found.ndim == 3
    assert found.shape[0] in (1, 3)
    assert 0 < found.shape[1] * found.shape[2] <= MAX_PIXELS


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=300)
@given(st.sampled_from([b"", *MAGIC]), st.binary(max_size=300))
def test_random_bytes_have_an_answer(magic: bytes, data: bytes) -> None:
    answer(magic + data)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=400)
@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), max_size=6),
    st.floats(0, 2),
    st.tuples(st.floats(0, 1), st.binary(max_size=12)),
)
def test_damaged_images_have_an_answer(
    data: bytes, flips: list[tuple[float, int]], cut: float, pasted: tuple[float, bytes]
) -> None:
    spoiled = bytearray(data)
    for place, bit in flips:
        spoiled[int(place**2 * (len(spoiled) - 1))] ^= 1 << bit  # more often near the start, where the headers are
    start = int(pasted[0] * len(spoiled))
    spoiled[start : start + len(pasted[1])] = pasted[1]
    answer(bytes(spoiled[: int(cut * len(spoiled)) or 1]))


# ---------------------------------------------------------------------------------- decompression bombs


def patched(kind: str, places: Callable[[bytes], list[tuple[int, bytes]]], **options: Any) -> bytes:
    data = bytearray(encode(RGB, kind, **options))
    for start, value in places(bytes(data)):
        data[start : start + len(value)] = value
    return bytes(data)


def tiff_size(data: bytes) -> list[tuple[int, bytes]]:
    """The entries of width and height, with 60,000 in each."""
    start = struct.unpack("<I", data[4:8])[0]
    entries = [start + 2 + 12 * index for index in range(struct.unpack("<H", data[start : start + 2])[0])]
    tags = {struct.unpack("<H", data[at : at + 2])[0]: at for at in entries}
    return [(tags[tag], struct.pack("<HHII", tag, 4, 1, 60_000)) for tag in (256, 257)]


BOMBS = {
    "PNG": png(100_000, 100_000, 8, 0, bytes(1000)),
    "RGB PNG": png(0x7FFFFFFF, 0x7FFFFFFF, 8, 2, bytes(1000)),
    "16-bit PNG": png(100_000, 100_000, 16, 2, bytes(1000)),
    "1-bit PNG": png(100_000, 100_000, 1, 0, bytes(1000)),
    "palette PNG": png(100_000, 100_000, 8, 3, bytes(1000)),
    "just too large": png(1 << 14, (1 << 13) + 1, 8, 0, bytes(1000)),
    "GIF": patched("GIF", lambda _: [(6, b"\xff" * 4)]),
    "BMP": patched("BMP", lambda _: [(18, struct.pack("<ii", 60_000, 60_000))]),
    "TIFF": patched("TIFF", tiff_size),
    "JPEG": patched("JPEG", lambda data: [(data.index(b"\xff\xc0") + 5, b"\xff" * 4)]),
    "progressive JPEG": patched("JPEG", lambda data: [(data.index(b"\xff\xc2") + 5, b"\xff" * 4)], progressive=True),
    "WebP": patched("WEBP", lambda data: [(data.index(b"VP8 ") + 14, b"\xff\x3f\xff\x3f")]),
    "lossless WebP": patched("WEBP", lambda data: [(data.index(b"VP8L") + 9, b"\xff\xff\xff\x0f")], lossless=True),
    "animated WebP": patched("WEBP", lambda data: [(data.index(b"VP8X") + 12, b"\xfe\xff\0\xff\xfe\0")], **FRAMES),
    "PPM": b"P6 60000 60000 255\n" + bytes(1000),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_from_the_header(name: str) -> None:
    """A few bytes that claim gigabytes: refused at once, and before anything of that size is allocated."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UndecodableImage, match="decompression bomb"):
        decode(BOMBS[name])
    assert time.process_time() - start < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_that_pillow_made_are_refused() -> None:
    """Whole, valid files of a few kilobytes whose pixels would fill 134 MB and more."""
    with Image.new("1", (16_400, 8_200)) as image:
        for kind, options in (("PNG", {}), ("TIFF", {"compression": "group4"})):
            data = encode(image, kind, **options)
            assert len(data) < 30_000
            with pytest.raises(UndecodableImage, match="16400x8200 pixels, more than 134217728"):
                decode(data)


def test_a_text_chunk_may_not_unpack_to_everything() -> None:
    info = PngImagePlugin.PngInfo()
    info.add(b"zTXt", b"key\0\0" + zlib.compress(bytes(30 << 20)))
    with pytest.raises(UndecodableImage, match="too large"):
        decode(encode(RGB, "PNG", pnginfo=info))


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


# ---------------------------------------------------------------------------------- the prepared view

SIZES = [(23, 37), (64, 64), (60, 41), (20, 20), (16, 90), (75, 110), (33, 32)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "nearest-exact"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_view_equals_torchvisions_transforms(height: int, width: int, interpolation: str) -> None:
    preprocessing = Preprocessing(32, 28, **IMAGENET, interpolation=interpolation)
    image = decode(encode(picture(width, height), "PNG"))
    wanted = v2.Compose([v2.Resize(32, InterpolationMode(interpolation), antialias=True), v2.CenterCrop(28)])(image)
    found = preprocessing.prepare(image)
    assert found.dtype == torch.uint8
    assert found.shape == (3, 28, 28)
    assert torch.equal(found, wanted)
    assert torch.equal(found, preprocessing.prepare(image.contiguous()))


def levels_apart(found: Tensor, wanted: Tensor) -> Tensor:
    """How far two normalised images are apart, in levels of the uint8 image."""
    return (found - wanted).abs() * torch.tensor(IMAGENET["std"]).view(3, 1, 1) * 255


@pytest.mark.parametrize(("height", "width"), [*SIZES, (375, 500)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_view_equals_the_preset_on_a_pillow_image(height: int, width: int, interpolation: str) -> None:
    """`ImageClassification` is how the published accuracies of torchvision's weights were measured."""
    preprocessing = Preprocessing(32, 28, **IMAGENET, interpolation=interpolation)
    preset = ImageClassification(
        crop_size=28, resize_size=32, **IMAGENET, interpolation=InterpolationMode(interpolation)
    )
    image = picture(width, height)
    pixels = decode(encode(image, "PNG"))
    found = Normalize(preprocessing)(preprocessing.prepare(pixels)[None])[0]
    assert found.dtype == torch.float32
    apart = levels_apart(found, preset(image))
    assert apart.max() < 1.01
    assert (apart > 0.5).float().mean() < 0.01


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_view_equals_the_preset_on_a_tensor_up_to_its_rounding(height: int, width: int) -> None:
    """On a tensor the preset resizes in floating point, so a value may be rounded to the next level."""
    preset = ImageClassification(crop_size=28, resize_size=32, **IMAGENET)
    preprocessing = Preprocessing(32, 28, **IMAGENET)
    image = decode(encode(picture(width, height), "PNG"))
    apart = levels_apart(Normalize(preprocessing)(preprocessing.prepare(image)[None])[0], preset(image))
    assert apart.max() < 1.01


@pytest.mark.parametrize(
    ("height", "width", "resize", "crop"), [(32, 32, 32, 28), (32, 50, 32, 32), (47, 32, 32, 20), (20, 20, 20, 28)]
)
def test_without_resizing_the_view_is_the_presets_to_the_bit(height: int, width: int, resize: int, crop: int) -> None:
    """The same crop, also where it is larger than the image (a black border), and the same normalisation."""
    preset = ImageClassification(crop_size=crop, resize_size=resize, **IMAGENET)
    preprocessing = Preprocessing(resize, crop, **IMAGENET)
    image = decode(encode(picture(width, height), "PNG"))
    assert torch.equal(Normalize(preprocessing)(preprocessing.prepare(image)[None])[0], preset(image))


_DIGESTS = """
import hashlib, sys, torch
from pseudolabel.views.image import Preprocessing
torch.set_num_threads(int(sys.argv[1]))
for channels in (1, 3):
    for height, width in ((37, 61), (500, 375), (28, 28), (1, 300)):
        generator = torch.Generator().manual_seed(height)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        for kind in ("nearest", "nearest-exact", "bilinear", "bicubic"):
            pixels = Preprocessing(64, 56, (0.5,) * channels, (0.5,) * channels, kind).prepare(image)
            print(hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest())
"""


def test_pixels_do_not_hang_on_the_cpus_instructions_or_threads() -> None:
    """torchvision's resize and grayscale give other levels where there is no AVX2."""
    found = []
    for capability, threads in (("default", "1"), (None, "1"), (None, "2")):
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        environment |= {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        command = [sys.executable, "-c", _DIGESTS, threads]
        found.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert found[0] == found[1] == found[2]
    assert len(found[0].split()) == 32


def test_normalize_is_a_closed_form_and_holds_no_parameters() -> None:
    normalize = Normalize(Preprocessing(2, 2, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)))
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(normalize(pixels).flatten(), torch.tensor([-1.0, -0.2, 1.0]))
    assert normalize.state_dict() == {}
    assert list(normalize.parameters()) == []


def test_grey_and_colour_become_what_the_model_wants() -> None:
    grey, colour = decode(LOSSLESS["grey PNG"][0]), decode(LOSSLESS["RGB PNG"][0])
    assert torch.equal(to_channels(grey, 3), grey.expand(3, -1, -1))
    assert to_channels(grey, 1) is grey
    assert torch.equal(to_channels(colour, 1), grey)  # the luma of Pillow's own "L"
    for channels in (1, 3):
        for image in (grey, colour):
            assert square(16, channels).prepare(image).shape == (channels, 16, 16)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("upright", [False, True])
def test_thin_images_are_shrunk_or_refused_but_never_blown_up(upright: bool, channels: int) -> None:
    """1x60000 would become 256 x 15,360,000 pixels before the crop."""

    def thin(length: int) -> Tensor:
        image = torch.arange(length).remainder(251).to(torch.uint8).view(1, 1, length)
        return image.mT if upright else image

    start = time.process_time()
    with pytest.raises(UndecodableImage, match="too long and thin to resize to 256"):
        square(256, channels).prepare(thin(60_000))
    assert time.process_time() - start < 0.5
    assert square(1, channels).prepare(thin(60_000)).shape == (channels, 1, 1)
    assert square(32, channels).prepare(thin(1000)).shape == (channels, 32, 32)
    data = encode(Image.new("L", (1, 60_000) if upright else (60_000, 1)), "PNG")
    assert decode(data).numel() == 60_000


# ---------------------------------------------------------------------------------- as JSON


def test_preprocessing_survives_json() -> None:
    for made in (
        Preprocessing(256, 224, **IMAGENET, interpolation="bicubic"),
        Preprocessing(28, 28, (0.2860,), (0.3530,)),
        square(32, 3),
    ):
        assert Preprocessing.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert square(32, 1).channels == 1
    assert Preprocessing.from_json({"resize": 8, "crop": 8, "mean": [0], "std": [1]}).interpolation == "bilinear"


@pytest.mark.parametrize(
    "change",
    [
        {"resize": 0},
        {"crop": -1},
        {"resize": "many"},
        {"resize": 28.5},
        {"crop": None},
        {"crop": 1 << 20},
        {"resize": 10**12},
        {"mean": []},
        {"mean": [0.5, 0.5], "std": [0.5, 0.5]},
        {"mean": [0.5] * 3},
        {"mean": 0.5},
        {"mean": ["x"]},
        {"mean": None},
        {"mean": [float("nan")]},
        {"std": [0.0]},
        {"std": [-1.0]},
        {"std": [float("nan")]},
        {"std": [float("inf")]},
        {"std": []},
        {"interpolation": "blurry"},
        {"interpolation": "lanczos"},
        {"interpolation": "box"},
        {"interpolation": None},
    ],
    ids=str,
)
def test_nonsense_is_refused(change: Mapping[str, Any]) -> None:
    data = {**square(28, 1).to_json(), **change}
    with pytest.raises((KeyError, TypeError, ValueError)):
        Preprocessing.from_json(data)


@pytest.mark.parametrize("data", [{}, [], None, "text", 3, {"resize": 8, "crop": 8, "mean": [0.5]}], ids=str)
def test_other_shapes_are_refused(data: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Preprocessing.from_json(data)


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
