"""A plan of a small corpus, what annotate then really writes, and a look that a plan leaves nothing behind."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import image_bytes

from pseudolabel.annotate import annotate
from pseudolabel.engines.local import LocalEngine
from pseudolabel.plan import Plan, plan
from pseudolabel.settings import AnnotateSettings

MakeShard = Callable[..., Path]


@pytest.fixture(autouse=True)
def no_scratch_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go; a plan leaves none, whatever its end."""
    directory = tmp_path / "scratch"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    yield directory
    assert list(directory.iterdir()) == []


def plan_of(shards: Path, teacher: Path, encoding: str = "dense", **options: Any) -> Plan:
    options = {"engine": LocalEngine("cpu", 1), "probe_seconds": 0.0, "label_seconds": 100.0, **options}
    settings = AnnotateSettings(precision="fp32", encoding=encoding, batch_size=32)
    return plan(shards, f"checkpoint:{teacher}", settings=settings, **options)


def annotated_bytes(shards: Path, teacher: Path, out: Path, encoding: str = "dense") -> int:
    settings = AnnotateSettings(precision="fp32", encoding=encoding, batch_size=32)
    annotate(
        shards,
        f"checkpoint:{teacher}",
        out,
        engine=LocalEngine("cpu", 1),
        settings=settings,
        max_reject_fraction=1.0,
    )
    return bytes_of(out)


def bytes_of(out: Path) -> int:
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and path.parent.name != "log")


def some_samples(count: int, *, bad_every: int = 0, start: int = 0) -> Iterator[tuple[str, dict[str, bytes]]]:
    for index in range(start, start + count):
        bad = bad_every and index % bad_every == bad_every // 2
        yield f"sample-{index:06d}", {"png": b"no image" if bad else image_bytes(index)}
