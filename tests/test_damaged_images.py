"""Wrong bytes: whatever they are, the answer is a uint8 tensor or `UndecodableImage`, and never half grey."""

from __future__ import annotations

import resource
import time
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_images import BOMBS, GREY, JPEGS, LOSSLESS, RGB, encode, png
from PIL import Image, PngImagePlugin

from pseudolabel.views.image import (
    MAX_PIXELS,
    UndecodableImage,
    decode,
)

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
