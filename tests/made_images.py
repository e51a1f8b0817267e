"""Images of every kind and depth, made by Pillow or byte by byte."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin


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
