"""A full or unwritable disk: one clear error, nothing half-written, and the same command goes on once there is room."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import image_bytes, make_model

from pseudolabel import storage
from pseudolabel.annotate import AnnotateResult, annotate
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import StorageError
from pseudolabel.labels.store import open_store
from pseudolabel.labels.verify import verify
from pseudolabel.pack import pack
from pseudolabel.rundir import read_metrics
from pseudolabel.settings import AnnotateSettings, TrainSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import write_shard
from pseudolabel.teachers import parse_teacher
from pseudolabel.trackers import parse_tracker
from pseudolabel.train import train
from pseudolabel.training.loop import TrainProgress


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    options = ["-t", "tmpfs", "-o", "size=128k", "tmpfs", str(place)]
    if mount is None or os.geteuid() != 0 or subprocess.run([mount, *options], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def _shards(root: Path) -> Path:
    for shard in range(6):
        samples = [
            (f"{shard}-{index}", {"png": image_bytes(100 * shard + index), "cls": b"1"}) for index in range(1500)
        ]
        write_shard(root / "many" / f"s{shard}.tar", samples)
    return root / "many"


def _annotate(shards: Path, model: Path, out: Path, workers: int) -> AnnotateResult:
    settings = AnnotateSettings(encoding="topk:4", batch_size=500)
    return annotate(
        list_shards(shards),
        parse_teacher(f"checkpoint:{model}"),
        out,
        engine=LocalEngine("cpu", workers),
        settings=settings,
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_annotate_on_a_full_disk_keeps_whole_parts_and_goes_on(small_disk: Path, tmp_path: Path, workers: int) -> None:
    shards, model = _shards(tmp_path), make_model(tmp_path / "teacher")
    with pytest.raises(
        StorageError, match=r"No space left on device\nfree some space there and run the same command again"
    ):
        _annotate(shards, model, small_disk / "store", workers)
    left = verify(open_store(small_disk / "store"), [])
    assert left.ok or {problem.kind for problem in left.problems} == {"ForeignFile"}
    assert left.parts < 6
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    result = _annotate(shards, model, small_disk / "store", workers)
    assert (result.parts_skipped, result.samples) == (left.parts, 9000)
    assert verify(open_store(small_disk / "store"), list_shards(shards)).ok


def test_train_and_pack_on_a_full_disk(small_disk: Path, tmp_path: Path, corpus: Path) -> None:
    settings = TrainSettings(student="small:resnet8?width=32", image_size=12, channels=1, steps=2, batch_size=8)
    with pytest.raises(StorageError, match="No space left on device"):
        train(
            settings,
            small_disk / "run",
            labeled=list_shards(corpus / "labeled"),
            val=list_shards(corpus / "val"),
            threads=1,
        )
    assert not (small_disk / "run" / "model.safetensors").exists()
    shutil.rmtree(small_disk / "run")
    (tmp_path / "photos").mkdir()
    for index in range(40):
        (tmp_path / "photos" / f"{index}.png").write_bytes(image_bytes(index, (90, 90)))
    with pytest.raises(StorageError, match="No space left on device"):
        pack(tmp_path / "photos", small_disk / "packed", samples_per_shard=20)
    assert not (small_disk / "packed" / "dataset.json").exists()


def test_where_a_directory_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="writing"):
        storage.write_atomic(tmp_path / "file" / "below" / "x", "y")


def test_urls_are_refused_not_taken_for_paths(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="must be a path on this machine; copy the files here or mount the bucket"):
        storage.local_path("s3://bucket/x.tar")
    assert storage.local_path("file:///tmp/x") == Path("/tmp/x")


def test_a_living_writers_temporary_is_not_stale(tmp_path: Path) -> None:
    target = tmp_path / "x"
    with storage.atomic_file(target) as temporary:
        temporary.write_text("new")
        storage.remove_stale(tmp_path)
        assert temporary.exists()
        assert not target.exists()
    assert target.read_text() == "new"
    (tmp_path / ".x.tmp-0123456789ab").write_text("of a dead writer")
    storage.remove_stale(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    storage.write_atomic(tmp_path / "x", "old")
    with pytest.raises(RuntimeError), storage.atomic_file(tmp_path / "x") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    assert (tmp_path / "x").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_event_files_on_a_full_disk_cost_a_warning_not_the_training(
    small_disk: Path, corpus: Path, tmp_path: Path
) -> None:
    """TensorBoard's own writer would leave it to a thread, and wait for that for ever at the end."""
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    settings = TrainSettings(
        student="small:resnet8?width=4", image_size=12, channels=1, steps=60, batch_size=8, eval_every=1
    )  # a file of more than a page, 4 KiB

    def fill(progress: TrainProgress) -> None:
        if progress.step == 2:
            with contextlib.suppress(OSError):
                (small_disk / "big").write_bytes(bytes(1 << 20))

    def begun(progress: TrainProgress) -> None:
        raise KeyboardInterrupt

    data = {"labeled": str(corpus / "labeled"), "threads": 1}
    with pytest.raises(KeyboardInterrupt):
        train(settings, out, **data, on_progress=begun)  # type: ignore[arg-type]
    (out / "events").symlink_to(small_disk)
    with pytest.warns(UserWarning, match="tensorboard: tracking failed .*No space left") as warned:
        train(settings, out, **data, on_progress=fill, trackers=[parse_tracker("tensorboard")])  # type: ignore[arg-type]
    assert len(warned) == 1
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == list(range(1, 61))
