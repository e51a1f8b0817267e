"""A storage that refuses or fails while annotate is at work: what is said, what is kept, and when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Refuse
from conftest import image_bytes
from object_stores import web_server

from pseudolabel import annotate, failures
from pseudolabel.display import Display
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import StorageError
from pseudolabel.labeling.line import Progress
from pseudolabel.labels.store import open_store
from pseudolabel.shards import write_shard
from pseudolabel.storage import asking


class Storage:
    """A web server before twelve shards; of those in `refused` it gives the size and nothing else."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.refused: dict[str, int] = {}
        self.url = ""

    def answer(self, path: str) -> int:
        return self.refused.get(path.removeprefix("/").partition(".")[0], 200)

    @property
    def shards(self) -> str:
        return f"{self.url}/s-{{00..11}}.tar"


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    found = Storage(tmp_path / "served")
    for number in range(12):
        write_shard(found.directory / f"s-{number:02d}.tar", [("a", {"png": image_bytes(number)})])
    monkeypatch.setenv("PSEUDOLABEL_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setattr(asking, "_LONGEST_PAUSE", 0.01)
    asking.file_system.cache_clear()
    with web_server(found.directory, ranges=True, answer=found.answer) as found.url:
        yield found
    asking.file_system.cache_clear()


@pytest.fixture
def annotating(served: Storage, teacher_dir: Path, tmp_path: Path) -> tuple[object, ...]:
    options = ("--teacher", f"checkpoint:{teacher_dir}", "--device", "cpu", "--workers", 1)
    return ("annotate", served.shards, "--out", tmp_path / "out", *options)


def spoil(served: Storage, *numbers: int) -> None:
    for number in numbers:
        path = served.directory / f"s-{number:02d}.tar"
        path.write_bytes(path.read_bytes()[:700])


def test_shards_that_are_refused_are_one_short_error(
    served: Storage, annotating: tuple[object, ...], refuse: Refuse, tmp_path: Path
) -> None:
    """Each brought its own copy of the remedy, and was called damaged."""
    served.refused = {f"s-{number:02d}": 403 for number in range(3, 10)}
    said = refuse(*annotating, kind="StorageError", said=r"(?m)^the other 5 shards are annotated$")
    first, more, remedy, _ = said.splitlines()
    assert first.startswith(f"reading {served.url}/s-03.tar failed: 403")
    places = ", ".join(f"{served.url}/s-{number:02d}.tar" for number in range(4, 9))
    assert more == f"6 more could not be read: {places} …"
    assert remedy.startswith("check the credentials in your environment")
    assert len(open_store(tmp_path / "out").part_names()) == 5


def test_damaged_and_refused_shards_are_told_apart(
    served: Storage, annotating: tuple[object, ...], refuse: Refuse, tmp_path: Path
) -> None:
    served.refused = {"s-02": 403, "s-04": 403, "s-06": 401}
    spoil(served, 5, 7)
    said = refuse(*annotating, kind="DamagedShard", said=r"(?m)^the other 7 shards are annotated$")
    damaged, unread, _ = said.splitlines()
    assert damaged.startswith(f"{served.url}/s-05.tar: this shard is truncated")
    assert damaged.endswith(f"; 1 more damaged: {served.url}/s-07.tar")
    assert unread.startswith(f"reading {served.url}/s-02.tar failed: 403")
    assert f"; 2 more not read: {served.url}/s-04.tar, reading {served.url}/s-06.tar failed: 401" in unread


def test_where_nothing_could_be_annotated_it_is_said_so(
    served: Storage, annotating: tuple[object, ...], refuse: Refuse
) -> None:
    spoil(served, *range(12))
    said = refuse(*annotating, kind="DamagedShard", said="(?m)^no shard could be annotated$")
    assert "11 more are damaged: " in said


def test_one_good_shard_is_told_in_the_singular(
    served: Storage, annotating: tuple[object, ...], refuse: Refuse
) -> None:
    spoil(served, *range(1, 12))
    refuse(*annotating, kind="DamagedShard", said="(?m)^the other shard is annotated$")


def test_a_storage_that_fails_for_good_ends_it(
    served: Storage, annotating: tuple[object, ...], refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the shards was tried, however many there are; the finished ones are kept."""
    monkeypatch.setattr(failures, "_FOR_SECONDS", 0.0)
    served.refused = {f"s-{number:02d}": 403 for number in range(2, 12)}
    said = refuse(*annotating, kind="StorageError", said="finished shards are kept: the same command goes on$")
    first, remedy, _ = said.splitlines()
    last = f"8 shards one after the other could not be read; the last: reading {served.url}/s-09.tar failed: 403"
    assert first.startswith(last)
    assert remedy.startswith("check the credentials in your environment")
    assert open_store(str(annotating[3])).part_names() == ["s-00", "s-01"]


def test_it_ends_all_workers(
    served: Storage, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "_FOR_SECONDS", 0.0)
    served.refused = {f"s-{number:02d}": 403 for number in range(12)}
    with pytest.raises(StorageError, match="8 shards one after the other could not be read"):
        annotate(served.shards, f"checkpoint:{teacher_dir}", tmp_path / "out", engine=LocalEngine("cpu", 2))


def test_shards_that_are_missing_or_fail_now_and_then_end_nothing(
    served: Storage, annotating: tuple[object, ...], refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else the same command could never get beyond them."""
    monkeypatch.setattr(failures, "_FOR_SECONDS", 0.0)
    served.refused = {f"s-{number:02d}": 403 if number == 5 else 404 for number in range(1, 11)}
    refuse(*annotating, kind="StorageError", said=r"(?m)^9 more could not be read")
    assert open_store(str(annotating[3])).part_names() == ["s-00", "s-11"]
    served.refused = {f"s-{number:02d}": 403 for number in range(1, 11) if number != 6}
    spoil(served, 6)
    refuse(*annotating, kind="DamagedShard", said="; 8 more not read: ")


def test_a_moments_outage_that_hits_all_workers_at_once_ends_nothing(
    served: Storage, annotating: tuple[object, ...], refuse: Refuse
) -> None:
    served.refused = {f"s-{number:02d}": 403 for number in range(1, 11)}
    refuse(*annotating, kind="StorageError", said=r"(?m)^the other 2 shards are annotated$")


def test_failed_shards_are_counted_apart_and_their_time_is_of_fetching(
    served: Storage,
    teacher_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pseudolabel.display._QUIET_SECONDS", 0.0)
    served.refused = {"s-10": 503, "s-11": 503}
    seen: list[Progress] = []
    with Display() as display:
        display.begin_annotating(served.shards)

        def told(progress: Progress) -> None:
            seen.append(progress)
            display.annotating(progress)

        with pytest.raises(StorageError, match="1 more could not be read"):
            annotate(
                served.shards,
                f"checkpoint:{teacher_dir}",
                tmp_path / "out",
                engine=LocalEngine("cpu", 1),
                on_progress=told,
            )
    failed = [one for one in seen if one.failure is not None]
    assert [one.shard for one in failed] == ["s-10", "s-11"]
    assert all(one.seconds["fetch"] > 0.0 == one.seconds["decode"] for one in failed)
    assert f"  10 of {len(served.shards)} shards done, 2 failed" in capsys.readouterr().err
