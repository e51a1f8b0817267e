"""Whole commands on object storages: the same bytes as on a disk, whatever the network does."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import FEW, distill
from conftest import Cli, image_bytes
from object_stores import ENVIRONMENT, Bucket, Proxy, web_server

from pseudolabel import annotate, storage, train, verify
from pseudolabel.annotate import AnnotateResult
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import DamagedShard, OutputExists, ShardListError, StorageError, StoreMismatch
from pseudolabel.labels.footers import read_footers
from pseudolabel.labels.store import Store, open_store
from pseudolabel.rundir import read_metrics
from pseudolabel.settings import TrainSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import write_shard
from pseudolabel.storage import asking
from pseudolabel.training.loop import TrainProgress


def put_all(directory: Path, url: str) -> None:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            place = storage.location(f"{url}/{path.relative_to(directory)}")
            assert isinstance(place, storage.RemotePath)
            place.put(path)


def labels(place: str | Path) -> dict[str, str]:
    """Hashes of all that a store holds but its log."""
    root = storage.location(place)
    found = {}
    for name in ("", "parts", "rejects"):
        for one in storage.entries(root / name if name else root):
            path = root / name / one.name if name else root / one.name
            found[f"{name}/{one.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture
def remote_corpus(bucket: Bucket, corpus: Path) -> str:
    put_all(corpus, f"{bucket.url}/corpus")
    return f"{bucket.url}/corpus"


def annotate_here(shards: object, teacher: Path | str, out: str, workers: int = 1) -> AnnotateResult:
    return annotate(shards, f"checkpoint:{teacher}", out, engine=LocalEngine("cpu", workers))  # type: ignore[arg-type]


def test_the_whole_way_from_url_to_url(
    bucket: Bucket,
    remote_corpus: str,
    corpus: Path,
    teacher_dir: Path,
    store: Path,
    tmp_path: Path,
    answer: Callable[..., dict[str, Any]],
) -> None:
    """Annotate, inspect, verify, train, evaluate, report: each is told URLs only, and gives what it gives on a disk."""
    put_all(teacher_dir, f"{bucket.url}/teacher")
    there, out = f"{bucket.url}/store", f"{bucket.url}/run"
    teacher = ("--teacher", f"checkpoint:{bucket.url}/teacher", "--device", "cpu", "--workers", 1)
    done = answer("annotate", f"{remote_corpus}/unlabeled", "--out", there, *teacher)
    assert (done["parts_written"], done["samples"]) == (3, 72)
    assert done["stages"]["fetch"] > 0
    assert labels(there) == labels(store)
    again = answer("annotate", f"{remote_corpus}/unlabeled/*.tar", "--out", there, *teacher)
    assert (again["parts_written"], again["parts_skipped"]) == (0, 3)
    assert answer("inspect", there)["rows"] == 72
    assert answer("verify", there, "--shards", f"{remote_corpus}/unlabeled")["ok"]
    data = [word for split in ("labeled", "unlabeled", "val") for word in (f"--{split}", f"{remote_corpus}/{split}")]
    training = ("--labels", there, "--out", out, *FEW, "--steps", 4, "--workers", 0)
    run = answer("train", *data, *training)
    assert run["run"] == out
    local = answer(*distill(corpus, store, tmp_path / "run", "--val", corpus / "val", "--workers", 0, steps=4))
    names = {one.name for one in storage.location(out).iterdir()}
    assert names == {"run.json", "recipe.toml", "metrics.jsonl", "model.safetensors", "model.json"}
    for name in ("model.safetensors", "model.json"):
        assert (storage.location(out) / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert answer("train", *data, *training) == run
    assert answer("evaluate", out, f"{remote_corpus}/val", "--device", "cpu")["accuracy"] == local["val_accuracy"]
    answer("report", out)
    assert b"<html" in storage.location(f"{out}/report.html").read_bytes()
    secret = bucket.environment["AWS_SECRET_ACCESS_KEY"]
    everything = asking.call(asking.file_system("s3", os.getpid()), "find", 30.0, (bucket.url[5:],))
    assert len(everything) > 15
    assert not any(secret.encode() in storage.location(f"s3://{name}").read_bytes() for name in everything)


def test_verify_repairs_a_store_at_a_url(
    bucket: Bucket, remote_corpus: str, teacher_dir: Path, corpus: Path, answer: Callable[..., dict[str, Any]]
) -> None:
    """What is damaged or foreign there is told apart, and only the damaged is deleted."""
    write_shard(corpus / "spoiled.tar", [("good", {"png": image_bytes()}), ("bad", {"png": b"no image"})])
    storage.location(f"{remote_corpus}/unlabeled/spoiled.tar").put(corpus / "spoiled.tar")  # type: ignore[union-attr]
    there, shards = f"{bucket.url}/store", f"{remote_corpus}/unlabeled"
    annotate_here(shards, teacher_dir, there)
    whole = labels(there)
    for name in ("parts/unlabeled-1.parquet", "rejects/spoiled.parquet"):
        storage.write_atomic(storage.location(f"{there}/{name}"), b"torn")
    storage.write_atomic(storage.location(f"{there}/parts/notes.txt"), b"mine")
    storage.write_atomic(storage.location(f"{there}/old/notes.txt"), b"mine")
    again = {"teacher": f"checkpoint:{teacher_dir}", "sample": 0.1}
    found = verify(there, shards, repair=True, **again)  # type: ignore[arg-type]
    assert [one.part for one in found.problems] == ["old", "notes.txt"]
    assert [one.part for one in found.repaired] == ["spoiled", "unlabeled-1"]
    assert found.compared > 0
    for name in ("parts/notes.txt", "old/notes.txt"):
        storage.discard(storage.location(f"{there}/{name}"))
    assert verify(there).ok
    assert answer("annotate", shards, "--teacher", again["teacher"], "--out", there, "--device", "cpu")["parts_written"]
    assert labels(there) == whole


def test_a_recipe_is_run_from_url_to_url(
    bucket: Bucket, remote_corpus: str, teacher_dir: Path, answer: Callable[..., dict[str, Any]]
) -> None:
    if bucket.kind == "rclone":
        pytest.skip("one server is enough for what only goes through the same verbs again")
    recipe = storage.location(f"{bucket.url}/recipe.toml")
    put_all(teacher_dir, f"{bucket.url}/teacher")
    data = "".join(f'{split} = "{remote_corpus}/{split}"\n' for split in ("labeled", "unlabeled", "val"))
    student = 'student = "small:resnet8?width=4"\nimage_size = 12\nchannels = 1\nbatch_size = 8\nsteps = 2\n'
    teacher = f'[teacher]\nspecs = ["checkpoint:{bucket.url}/teacher"]\n'
    storage.write_atomic(recipe, f'[data]\n{data}test = "{remote_corpus}/val"\n{teacher}[train]\n{student}')
    command = ("run", recipe.url, "--out", f"{bucket.url}/whole", "--device", "cpu", "--workers", 0)  # type: ignore[union-attr]
    found = answer(*command)
    assert [one["round"] for one in found["rounds"]] == [1]
    whole = storage.location(f"{bucket.url}/whole")
    assert {one.name for one in whole.iterdir()} >= {"run.json", "round-1", "control", "report.html"}
    assert answer(*command)["rounds"] == found["rounds"]


@pytest.mark.parametrize("kind", ["503", "reset", "cut", "short"])
def test_a_bad_network_changes_no_label(
    kind: str, proxied: tuple[Bucket, Proxy], corpus: Path, teacher_dir: Path, store: Path
) -> None:
    bucket, proxy = proxied
    put_all(corpus / "unlabeled", f"{bucket.url}/unlabeled")
    for method in ("GET", "PUT") if kind in ("503", "reset") else ("GET",):
        proxy.fail(kind, method, "unlabeled-1.tar|unlabeled-1.parquet", times=2)
    there = f"{bucket.url}/store"
    annotate_here(f"{bucket.url}/unlabeled", teacher_dir, there)
    assert all(fault.times == 0 for fault in proxy.faults)
    assert labels(there) == labels(store)


def test_annotate_is_killed_while_it_uploads_and_goes_on(
    proxied: tuple[Bucket, Proxy], corpus: Path, teacher_dir: Path, store: Path, cli: Cli
) -> None:
    """An interrupted upload leaves nothing that a reader can see."""
    bucket, proxy = proxied
    if bucket.kind == "moto":
        pytest.skip("once is enough: rclone writes what it gets to a disk, which is harder")
    put_all(corpus / "unlabeled", f"{bucket.url}/unlabeled")
    there = f"{bucket.url}/store"
    proxy.fail("cut upload", "PUT", "unlabeled-1.parquet", times=1000)
    command = ("annotate", f"{bucket.url}/unlabeled", "--out", there, "--teacher", f"checkpoint:{teacher_dir}")
    process = cli.start(*command, "--device", "cpu", "--workers", 1, env=bucket.environment)
    while not any("unlabeled-1.parquet" in request for request in proxy.seen) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    proxy.faults.clear()
    assert set(labels(there)) == {"/store.json", "parts/unlabeled-0.parquet"}
    assert verify(open_store(there)).ok
    annotate_here(f"{bucket.url}/unlabeled", teacher_dir, there)
    assert labels(there) == labels(store)


def test_ctrl_c_does_not_wait_for_a_storage_that_never_answers(cli: Cli, teacher_dir: Path, tmp_path: Path) -> None:
    """Its threads ask for minutes; a process waits for its threads."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = {**ENVIRONMENT, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        teacher = ("--teacher", f"checkpoint:{teacher_dir}", "--out", tmp_path / "store")
        process = cli.start("annotate", "s3://bucket/a.tar", *teacher, "--device", "cpu", env=endpoint)
        with silent.accept()[0]:
            time.sleep(0.5)
            os.kill(process.pid, signal.SIGINT)
            _, err = process.communicate(timeout=25)
    assert process.returncode == 130, err
    assert "Traceback" not in err


def test_who_may_read_the_shards_alone_needs_no_more(
    proxied: tuple[Bucket, Proxy], corpus: Path, teacher_dir: Path, store: Path, tmp_path: Path
) -> None:
    """Without the right to list, a storage refuses what isn't there: class names that might be beside the shards."""
    bucket, proxy = proxied
    put_all(corpus / "unlabeled", f"{bucket.url}/unlabeled")
    proxy.fail("403", ".*", "classes.txt", times=100)
    annotate_here(f"{bucket.url}/unlabeled", teacher_dir, str(tmp_path / "here"))
    assert labels(tmp_path / "here") == labels(store)


def test_training_goes_on_from_the_checkpoint_at_its_url(
    bucket: Bucket, remote_corpus: str, corpus: Path, store: Path, tmp_path: Path
) -> None:
    """Stopped after the first checkpoint; the next one, with another directory of its own, ends with the same bytes."""

    class Stopped(Exception):
        pass

    def stop(progress: TrainProgress) -> None:
        if progress.step == 6:
            raise Stopped

    settings = TrainSettings(
        student="small:resnet8?width=4", image_size=12, channels=1, batch_size=8, steps=9, eval_every=3
    )
    data = {name: f"{remote_corpus}/{name}" for name in ("labeled", "unlabeled", "val")}
    out = f"{bucket.url}/run"
    with pytest.raises(Stopped):
        train(settings, out, store=store, on_progress=stop, **data)  # type: ignore[arg-type]
    files = {one.name for one in storage.entries(storage.location(f"{out}/checkpoint"))}
    assert files == {"begun", "state.safetensors"}
    steps: list[int] = []
    train(settings, out, store=store, on_progress=lambda one: steps.append(one.step), **data)  # type: ignore[arg-type]
    assert steps == [6, 9]
    here = {name: corpus / name for name in data}
    train(settings, tmp_path / "run", store=store, **here)  # type: ignore[arg-type]
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert storage.location(f"{out}/model.safetensors").read_bytes() == weights
    lines = read_metrics(storage.location(f"{out}/metrics.jsonl"))
    assert [line["step"] for line in lines] == [3, 6, 9]
    with pytest.raises(OutputExists, match=f"{out}: holds a run that differs"):
        train(settings.model_copy(update={"steps": 5}), out, store=store, **data)  # type: ignore[arg-type]


def test_what_is_wrong_with_remote_shards_is_said(bucket: Bucket, remote_corpus: str, teacher_dir: Path) -> None:
    shards = list_shards(f"{remote_corpus}/unlabeled")
    first = storage.location(shards[0].path)
    assert isinstance(first, storage.RemotePath)
    there = f"{bucket.url}/store"
    whole = first.read_bytes()
    first.unlink()
    with pytest.raises(StorageError, match=r"-0.tar failed: there is no such file\n(.*\n)*.*other 2 shards are"):
        annotate_here(shards, teacher_dir, there)
    first.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedShard, match=r"unlabeled-0.tar: this shard is truncated.*\n(.*\n)*.*other 2 shards"):
        annotate_here(f"{remote_corpus}/unlabeled", teacher_dir, there)
    first.write_bytes(whole)
    assert annotate_here(f"{remote_corpus}/unlabeled", teacher_dir, there).parts_written == 1
    first.write_bytes(whole + b"\0" * 512)
    with pytest.raises(StoreMismatch, match=r"bytes, but .* when it was annotated"):
        annotate_here(f"{remote_corpus}/unlabeled", teacher_dir, there)
    with pytest.raises(ShardListError, match=r"7 of 10 shards are missing, the first is s3://.*unlabeled-3.tar"):
        list_shards(f"{remote_corpus}/unlabeled/unlabeled-{{0..9}}.tar")
    with pytest.raises(ShardListError, match=r"no \*.tar right below"):
        list_shards(f"{remote_corpus}")


def test_shards_of_a_web_server(corpus: Path, teacher_dir: Path, store: Path, tmp_path: Path) -> None:
    with web_server(corpus / "unlabeled", ranges=True) as url:
        out = str(tmp_path / "from-the-web")
        annotate_here(f"{url}/unlabeled-{{0..2}}.tar?sig=secret", teacher_dir, out)
        assert labels(out) == labels(store)
        (tmp_path / "list.txt").write_text("".join(f"{url}/unlabeled-{n}.tar?sig={n}\n" for n in range(3)))
        assert annotate_here(f"@{tmp_path}/list.txt", teacher_dir, out).parts_skipped == 3
        with pytest.raises(ShardListError, match=r"1 of 4 shards are missing, the first is .*-3.tar\?…") as error:
            list_shards(f"{url}/unlabeled-{{0..3}}.tar?sig=secret")
        assert "secret" not in str(error.value)
    asking.file_system.cache_clear()
    assert not any("secret" in path.read_text() for path in (tmp_path / "from-the-web").rglob("*.json*"))


def test_footers_are_read_from_the_ends_of_parts_and_then_from_one_file(
    bucket: Bucket, teacher_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that is made anew is known by its new version."""
    monkeypatch.setattr("pseudolabel.labels.footers.WORTH_IT", 2)
    monkeypatch.setattr("pseudolabel.storage.ranged._TAIL", 100)  # too few: the rest is asked for
    for number in range(4):
        write_shard(tmp_path / "shards" / f"s-{number}.tar", [("a", {"png": image_bytes(number)})])
    there = f"{bucket.url}/store"
    annotate_here(tmp_path / "shards", teacher_dir, there)
    opened = open_store(there)
    found = read_footers(opened, keep=True)
    assert [(name, one.info.samples) for name, one in found.items()] == [(f"s-{n}", 1) for n in range(4)]
    reads: list[str] = []
    monkeypatch.setattr(Store, "info", lambda self, shard, size=None: reads.append(shard) or found[shard].info)
    assert read_footers(opened) == found
    assert reads == []
    storage.write_atomic(opened.part_path("s-1"), opened.part_path("s-0").read_bytes())
    read_footers(opened)
    assert reads == ["s-1"]
