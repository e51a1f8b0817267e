"""Tars to order, byte by byte, and how we and webdataset read them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from pseudolabel.errors import DamagedShard
from pseudolabel.shard_lists import Shard
from pseudolabel.shards import read_samples
from pseudolabel.tar import BLOCK

Samples = list[tuple[str, dict[str, bytes]]]
Member = tuple[str, bytes]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
END = bytes(2 * BLOCK)


def ours(path: Path) -> Samples:
    return [(sample.key, dict(sample.fields)) for sample in read_samples(Shard(path.stem, str(path)))]


def theirs(path: Path) -> Samples:
    """The same tar through webdataset's own pipeline, undecoded."""
    with open(path, "rb") as stream:
        found = list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))
    return [
        (one["__key__"], {name: value for name, value in one.items() if name not in ("__key__", "__url__")})
        for one in found
    ]


def damage(path: Path) -> str:
    """What is said of a damaged shard; every such message names the file, the byte and the remedy."""
    with pytest.raises(DamagedShard) as caught:
        ours(path)
    message = str(caught.value)
    first, remedy = message.splitlines()
    assert first.startswith(f"{path}: this shard ")
    assert " (at byte " in first
    assert first.endswith(" whole samples)")
    assert remedy == "fetch or pack it again, then rerun"
    return message


def tar(path: Path, members: Iterable[Member | tarfile.TarInfo], kind: int = tarfile.GNU_FORMAT) -> Path:
    """A tar by Python's tarfile: (name, bytes) is a file, a `TarInfo` anything else."""
    with tarfile.open(path, "w", format=kind) as out:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                out.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                out.addfile(info, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def header(name: bytes, size: bytes, kind: bytes = b"0", magic: bytes = b"ustar\x0000") -> bytes:
    """One raw header with a checksum that fits; `size` is the field's bytes as they are."""
    block = bytearray(BLOCK)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[257 : 257 + len(magic)] = magic
    return resummed(block)


def resummed(block: bytearray | bytes) -> bytes:
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def octal(size: int) -> bytes:
    return b"%011o\0" % size


GOOD = header(b"good.txt", octal(4)) + padded(b"good")
