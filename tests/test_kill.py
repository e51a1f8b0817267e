"""SIGKILL at any moment, then the same command again: nothing lost, nothing twice, the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, Cli, image_bytes, make_model, wait_until_gone
from object_stores import Bucket

from pseudolabel.annotate import annotate
from pseudolabel.engines.local import LocalEngine
from pseudolabel.labels.store import open_store
from pseudolabel.labels.verify import verify
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import write_shard


@pytest.mark.timeout(900)
@pytest.mark.parametrize("scenario", ["annotate", "train", "run"])
@pytest.mark.parametrize(("moments", "least"), [("commit_steps", 10), ("random", 8)])
def test_killed_at_every_commit_step_and_at_random_moments(
    scenario: str, moments: str, least: int, corpus: Path
) -> None:
    make_model(corpus / "teacher")
    spoiled = [("good", {"png": image_bytes()}), ("bad", {"png": b"no image"}), ("worse", {"txt": b"none at all"})]
    write_shard(corpus / "unlabeled" / "spoiled.tar", spoiled)
    command = [sys.executable, str(REPOSITORY / "tests" / "killing.py"), scenario, moments, str(corpus)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["kills"] >= least


def test_jobs_side_by_side_on_one_store_killed_and_starved_at_random(corpus: Path) -> None:
    chaos(corpus, 1)


def test_jobs_side_by_side_on_an_object_store_with_a_spool_that_spoils(bucket: Bucket, corpus: Path) -> None:
    if bucket.kind == "rclone":
        pytest.skip("one server is enough: the jobs are what fails here")
    chaos(corpus, 3, bucket.url, rounds=2)


def chaos(corpus: Path, seed: int, *where: str, rounds: int = 6) -> None:
    make_model(corpus / "teacher")
    spoiled = [("good", {"png": image_bytes()}), ("bad", {"png": b"no image"})]
    write_shard(corpus / "unlabeled" / "spoiled.tar", spoiled)
    for shard in range(6):
        samples = [(f"{shard}-{index}", {"png": image_bytes(100 * shard + index)}) for index in range(20)]
        write_shard(corpus / "unlabeled" / f"more-{shard}.tar", samples)
    command = [sys.executable, str(REPOSITORY / "tests" / "chaos.py"), "12", str(seed), str(corpus), *where]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    ended = json.loads(done.stdout.splitlines()[-1])
    assert ended["killed"] > 0
    assert ended["rounds"] >= rounds


@pytest.fixture
def long_corpus(tmp_path: Path) -> Path:
    for shard in range(40):
        samples = [(f"{shard}-{index}", {"png": image_bytes(100 * shard + index)}) for index in range(60)]
        write_shard(tmp_path / "many" / f"s{shard:02d}.tar", samples)
    return tmp_path / "many"


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 130)]
)
def test_many_workers_are_stopped_and_go_on(
    cli: Cli, long_corpus: Path, teacher_dir: Path, sent: signal.Signals, code: int
) -> None:
    """The command dies mid-run; no worker outlives it, only whole parts are left, the end is one worker's bytes."""
    arguments = (
        "annotate",
        long_corpus,
        "--teacher",
        f"checkpoint:{teacher_dir}",
        "--device",
        "cpu",
        "--batch-size",
        8,
    )
    process = cli.start(*arguments, "--out", "store", "--workers", 2)
    store = cli.cwd / "store"
    while not list(store.glob("parts/*.parquet")):
        assert process.poll() is None
        time.sleep(0.01)
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # a terminal sends Ctrl-C to all
    else:
        process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == code
    wait_until_gone(process.pid)
    if sent != signal.SIGKILL:
        assert all(path.suffix == ".parquet" and not path.name.startswith(".") for path in store.glob("parts/*"))
    left = verify(open_store(store))
    assert [problem for problem in left.problems if problem.kind != "ForeignFile"] == []  # a killed writer's temporary
    assert left.parts < 40
    resumed, _ = cli(*arguments, "--out", "store", "--workers", 2)
    assert resumed["parts_skipped"] == left.parts
    assert resumed["samples"] == 40 * 60
    engine, settings = LocalEngine("cpu", 1), AnnotateSettings(batch_size=8)
    whole = annotate(long_corpus, f"checkpoint:{teacher_dir}", cli.cwd / "other", engine=engine, settings=settings)
    assert whole.parts_written == 40
    assert verify(open_store(store), list_shards(long_corpus)).ok
    for part in (cli.cwd / "other" / "parts").iterdir():
        assert (store / "parts" / part.name).read_bytes() == part.read_bytes()
