"""Shards on a disk and shards at URLs, given to one command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import FEW
from object_stores import web_server

from pseudolabel.labels.store import open_store
from pseudolabel.storage import asking


@pytest.fixture
def served(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The corpus's address on a web server."""
    monkeypatch.setenv("PSEUDOLABEL_SPOOL", str(tmp_path / "spool"))
    asking.file_system.cache_clear()
    with web_server(corpus, ranges=True) as url:
        yield url
    asking.file_system.cache_clear()


@pytest.mark.parametrize("listed", [False, True], ids=["named", "@list"])
def test_annotate_and_train_take_both_in_one_command(
    listed: bool, served: str, corpus: Path, teacher_dir: Path, tmp_path: Path, answer: Callable[..., dict[str, Any]]
) -> None:
    """Looking for the class names beside them ended in a traceback."""
    shards = [f"{served}/unlabeled/unlabeled-0.tar", f"{corpus}/unlabeled/unlabeled-1.tar"]
    labeled = [f"{served}/labeled/labeled-0.tar", f"{corpus}/val/val-0.tar"]
    if listed:
        for name, places in (("unlabeled", shards), ("labeled", labeled)):
            (tmp_path / f"{name}.txt").write_text("".join(f"{place}\n" for place in places))
        shards, labeled = [f"@{tmp_path}/unlabeled.txt"], [f"@{tmp_path}/labeled.txt"]
    out, teacher = tmp_path / "both", ("--teacher", f"checkpoint:{teacher_dir}")
    assert answer("annotate", *shards, "--out", out, *teacher, "--device", "cpu", "--workers", 1)["parts_written"] == 2
    assert open_store(out).part_names() == ["unlabeled-0", "unlabeled-1"]
    data = [word for place in shards for word in ("--unlabeled", place)]
    data += [word for place in labeled for word in ("--labeled", place)]
    training = ("--labels", out, "--out", tmp_path / "run", *FEW, "--steps", 2, "--workers", 0)
    assert answer("train", *data, *training)["run"] == str(tmp_path / "run")
