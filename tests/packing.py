"""Sources to pack, and what was packed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pseudolabel.errors import SourceError
from pseudolabel.pack import pack
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import Sample, read_samples
from pseudolabel.views.image import image_field


def image(number: int, kind: str = "PNG") -> bytes:
    """A small image that no other number has."""
    buffer = io.BytesIO()
    pixels = np.array([[number % 256, number // 256], [7, 9]], dtype=np.uint8)
    Image.fromarray(pixels).resize((8, 8), Image.Resampling.NEAREST).save(buffer, kind)
    return buffer.getvalue()


def place(root: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def packed(out: Path) -> dict[str, list[Sample]]:
    """Every split's samples, read back strictly; keys are unique over all of them."""
    found = {
        part.name: [sample for shard in list_shards(part) for sample in read_samples(shard)]
        for part in sorted(out.iterdir())
        if part.is_dir()
    }
    keys = [sample.key for samples in found.values() for sample in samples]
    assert len(set(keys)) == len(keys)
    return found


def contents(samples: Sequence[Sample]) -> dict[str, tuple[bytes, str | None]]:
    """Key → image bytes and label."""
    return {
        one.key: (one.fields[image_field(one.fields)], one.fields["cls"].decode() if "cls" in one.fields else None)
        for one in samples
    }


def refused(source: Path, said: str, out: Path | None = None, **options: Any) -> None:
    """Packing fails with `SourceError`, and leaves no shard behind."""
    out = out or source.parent / "refused"
    with pytest.raises(SourceError, match=said) as caught:
        pack(source, out, **options)
    assert 1 <= len(str(caught.value).splitlines()) <= 5
    assert not list(out.rglob("*.tar"))
