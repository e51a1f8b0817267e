"""Shards on a disk and at URLs in one command; names and places that are not what they seem."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError
from commands import FEW, Refuse
from object_stores import Bucket, web_server

from pseudolabel import storage
from pseudolabel.labels.store import open_store
from pseudolabel.shard_lists import list_shards
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


@pytest.mark.parametrize("name", ["a[1].tar", "b{0..3}.tar", "c*.tar"])
def test_an_object_whose_name_is_like_a_pattern_is_found_by_its_name(name: str, bucket: Bucket) -> None:
    """As on a disk: it is a name first."""
    place = storage.location(bucket.url) / "shards"
    storage.write_atomic(place / name, b"123")
    for spec in (f"{place}/{name}", f"{place}/?{name[1:].replace('[', '[[]')}" if "[" in name else f"{place}/*.tar"):
        assert [(one.name, one.size) for one in list_shards(spec)] == [(name.removesuffix(".tar"), 3)]


def test_places_that_can_not_be_are_said_to_be_so(served: str, corpus: Path, tmp_path: Path, refuse: Refuse) -> None:
    """Of the first one it was said that it can't be listed."""
    out, teacher = f"{served}/out", ("--teacher", "checkpoint:none")
    said = f"{out}: .*only read from"
    refuse("annotate", corpus / "unlabeled", "--out", out, *teacher, kind="StorageError", said=said)
    training = ("train", "--labeled", corpus / "labeled", *FEW, "--steps", 2, "--workers", 0)
    refuse(*training, "--out", out, kind="StorageError", said=said)
    bucket = ("annotate", "s3://*/unlabeled/*.tar", "--out", tmp_path / "out", *teacher)
    refuse(*bucket, kind="ShardListError", said="a bucket can't be a pattern")


def test_an_answer_without_a_reason_is_told_in_words() -> None:
    """A page in place of S3's XML: "An error occurred () when calling the ListObjectsV2 operation: "."""
    answer: Any = {"Error": {"Code": "", "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": 404}}
    error = OSError(5, str(ClientError(answer, "ListObjectsV2")))
    error.__cause__ = ClientError(answer, "ListObjectsV2")
    assert asking.one_line(error) == "the answer to ListObjectsV2 was 404, with no reason"
