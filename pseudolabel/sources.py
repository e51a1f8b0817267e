"""What `pack` can read: image folders, CSV or Parquet tables, IDX (MNIST) files. Each becomes a list of `Item`s, read
lazily.
"""

from __future__ import annotations

import gzip
import io
import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pseudolabel.columns import csv_columns, number_labels, parquet_columns
from pseudolabel.errors import SourceError
from pseudolabel.shards import IMAGE_FIELDS

_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif"}
_PATH_COLUMNS = ("path", "file", "filename", "filepath", "file_name", "image_path")
_BYTES_COLUMNS = ("image", "bytes", "img", "jpg", "png", "data", "content")
_LABEL_COLUMNS = ("label", "class", "cls", "target", "y")


@dataclass(frozen=True)
class Item:
    """One image to pack: its key, and how to get its field name and bytes. `label` is None where unknown."""

    key: str
    label: int | None
    read: Callable[[], tuple[str, bytes]]


@dataclass(frozen=True)
class Source:
    """All items, and the class names that their labels number (none if unlabeled)."""

    items: Sequence[Item]
    classes: tuple[str, ...]


def read_source(source: Path, *, image_column: str | None = None, label_column: str | None = None) -> Source:
    """Find out what `source` is and list it. Raises `SourceError`."""
    if not source.exists():
        raise SourceError(f"{source}: no such file or directory")
    if source.is_dir():
        idx = sorted(path for path in source.iterdir() if "images-idx3" in path.name or "images.idx3" in path.name)
        if len(idx) > 1:
            names = ", ".join(path.name for path in idx)
            raise SourceError(f"{source}: holds several IDX image files ({names}); name the one to pack")
        return _idx(idx[0]) if idx else _folder(source)
    suffix = source.suffix.lower()
    if suffix in (".csv", ".tsv"):
        return _table(source, csv_columns(source, "\t" if suffix == ".tsv" else ","), image_column, label_column)
    if suffix in (".parquet", ".pq"):
        return _table(source, parquet_columns(source), image_column, label_column)
    if "idx" in source.name or "ubyte" in source.name:
        return _idx(source)
    raise SourceError(f"{source}: not an image folder, .csv, .parquet or IDX file")


def _folder(root: Path) -> Source:
    """Images below `root`; a first-level folder is a class. Flat images have no label."""
    found: list[tuple[str, Path]] = []
    for directory, folders, files in os.walk(root, onerror=_unreadable, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(directory, name) for name in folders):
            if path.is_symlink() and path.resolve() in {above.resolve() for above in path.parents}:
                raise SourceError(f"{path}: this link leads back to a folder above it; remove it")
        for path in (Path(directory, name) for name in sorted(files)):
            if not path.name.startswith(".") and path.suffix[1:].lower() in IMAGE_FIELDS:
                found.append((path.relative_to(root).as_posix(), path))
    if not found:
        raise SourceError(f"{root}: no images ({'/'.join(IMAGE_FIELDS)}) in this folder or below it")
    in_folders = [("/" in relative) for relative, _ in found]
    if any(in_folders) and not all(in_folders):
        flat = next(relative for relative, _ in found if "/" not in relative)
        raise SourceError(
            f"{root}: holds class folders and loose images ({flat}, …) side by side; move the loose "
            "ones into a folder, or pack them apart"
        )
    classes = sorted({relative.split("/")[0] for relative, _ in found}) if all(in_folders) else []
    number = {name: index for index, name in enumerate(classes)}
    keys = _unique([_key(relative.rpartition(".")[0]) for relative, _ in found])
    items = [
        Item(key, number.get(relative.split("/")[0]), _file_reader(path))
        for key, (relative, path) in zip(keys, found, strict=True)
    ]
    return Source(items, tuple(classes))


def _unreadable(error: OSError) -> None:
    raise SourceError(f"{error.filename}: this folder can't be read: {error.strerror}") from error


def _file_reader(path: Path) -> Callable[[], tuple[str, bytes]]:
    def read() -> tuple[str, bytes]:
        try:
            return path.suffix[1:].lower(), path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise SourceError(f"{path}: can't be read: {getattr(error, 'strerror', None) or error}") from error

    return read


def _table(path: Path, columns: dict[str, Any], image_column: str | None, label_column: str | None) -> Source:
    image = _choose(path, columns, image_column, (*_PATH_COLUMNS, *_BYTES_COLUMNS), "image")
    if image is None:
        raise SourceError(
            f"{path}: which of the columns {', '.join(columns)} holds image paths or bytes? name it with --image-column"
        )
    label = _choose(path, columns, label_column, _LABEL_COLUMNS, "label")
    if label is None and len(columns) > 1:
        others = ", ".join(name for name in columns if name != image)
        warnings.warn(
            f"{path}: no column is called {'/'.join(_LABEL_COLUMNS)}, so the images are packed without labels; if one "
            f"of {others} holds them, name it with --label-column",
            stacklevel=2,
        )
    values = columns[image]
    if len(values) == 0:
        raise SourceError(f"{path}: has no rows")
    labels, classes = number_labels(path, columns[label]) if label is not None else ([None] * len(values), ())
    keys, readers = [], []
    for row in range(len(values)):
        key, reader = _cell(path, row, values)
        keys.append(key)
        readers.append(reader)
    return Source([Item(*one) for one in zip(_unique(keys), labels, readers, strict=True)], tuple(classes))


def _choose(path: Path, columns: dict[str, Any], wanted: str | None, usual: Sequence[str], what: str) -> str | None:
    if wanted is not None:
        if wanted not in columns:
            raise SourceError(f"{path}: no column {wanted!r} for the {what}; it has {', '.join(columns)}")
        return wanted
    return next((name for name in usual if name in columns), None)


def _cell(path: Path, row: int, values: Any) -> tuple[str, Callable[[], tuple[str, bytes]]]:
    """Key and reader of one table cell: a path, bytes, or the {bytes, path} struct of Hugging Face's `Image`
    feature.
    """

    def content() -> Any:
        value = values[row]
        value = value.as_py() if hasattr(value, "as_py") else value
        return (value.get("bytes") or value.get("path")) if isinstance(value, dict) else value

    def read() -> tuple[str, bytes]:
        value = content()
        if isinstance(value, bytes):
            return _sniff(f"{path}: row {row}", value), value
        if not value:
            raise SourceError(f"{path}: row {row} names no image")
        if not isinstance(value, str):
            kind = type(value).__name__
            raise SourceError(f"{path}: row {row} holds a {kind}; paths or bytes are wanted: see --image-column")
        file = path.parent / value
        if file.suffix[1:].lower() not in IMAGE_FIELDS:
            raise SourceError(f"{path}: row {row}: {value!r} is no image file ({'/'.join(IMAGE_FIELDS)})")
        return _file_reader(file)()

    kind = getattr(values, "type", None)  # an Arrow column; a CSV's is a list of text
    if kind is None or "string" in str(kind).split("<")[0]:
        return _key(os.path.splitext(str(content() or ""))[0]) or f"row-{row:09d}", read
    return f"row-{row:09d}", read


def _sniff(where: str, data: bytes) -> str:
    for magic, name in _MAGIC.items():
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise SourceError(f"{where}: these {len(data)} bytes are no JPEG, PNG, WebP, GIF, BMP or TIFF image")


def _idx(path: Path) -> Source:
    """MNIST's format: images of shape (N, H, W) uint8, labels beside them if there are any."""
    images = read_idx(path, 3)
    sibling = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
    labels: list[int | None] = [None] * len(images)
    if sibling != path and sibling.exists():
        found = read_idx(sibling, 1)
        if len(found) != len(images):
            raise SourceError(f"{sibling}: {len(found)} labels for {len(images)} images in {path.name}")
        labels = [int(label) for label in found]
    classes = tuple(
        str(index) for index in range(max((label for label in labels if label is not None), default=-1) + 1)
    )
    return Source(
        [Item(f"{index:07d}", labels[index], _png_reader(images, index)) for index in range(len(images))], classes
    )


def _png_reader(images: NDArray[np.uint8], index: int) -> Callable[[], tuple[str, bytes]]:
    def read() -> tuple[str, bytes]:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(images[index]).save(buffer, format="PNG", optimize=True)
        return "png", buffer.getvalue()

    return read


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        zero, kind, found = struct.unpack(">HBB", data[:4])
        if zero != 0 or kind != 8 or found != dimensions:
            raise SourceError(f"{path}: not an IDX file of unsigned bytes with {dimensions} dimensions")
        shape = struct.unpack(f">{found}I", data[4 : 4 + 4 * found])
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise SourceError(f"{path}: can't be read as IDX: {error}") from error
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * found)
    if values.size != math.prod(shape):
        raise SourceError(f"{path}: {values.size} bytes for a shape of {shape}: truncated?")
    if values.size == 0:
        raise SourceError(f"{path}: is empty, its shape is {shape}")
    return values.reshape(shape)


def _key(text: str) -> str:
    """A path as a sample key: a dot would end the key, and webdataset skips names that start with `__`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(f"{os.fsencode(text)!r}: this name is not UTF-8; rename the file or its folder") from error
    return re.sub("_{2,}", "_", text.replace("\\", "/").lstrip("/").replace(".", "%2E"))


def _unique(keys: Sequence[str]) -> Iterator[str]:
    """The keys; one that occurs again gets ~2, ~3, …, as far as that is nobody's own name."""
    taken, number = set(keys), dict[str, int]()
    for key in keys:
        unique = key
        if key in number:
            while unique in taken:
                unique = f"{key}~{number[key]}"
                number[key] += 1
            taken.add(unique)
        else:
            number[key] = 2
        yield unique
