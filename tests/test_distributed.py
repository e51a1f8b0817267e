"""Several processes under torchrun: they train what one process trains, whichever of them is killed."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, Cli, digit_like, wait_until_gone
from event_files import scalars
from hypothesis import given
from hypothesis import strategies as st

from pseudolabel.cli.options import training_place
from pseudolabel.dataset import Batch, TrainingBatches
from pseudolabel.engines.local import available_cores
from pseudolabel.errors import LaunchError
from pseudolabel.labels.encodings import Dense
from pseudolabel.labels.store import open_store
from pseudolabel.labels.targets import StoredTargets
from pseudolabel.losses import NO_LABEL, Mixture
from pseudolabel.rundir import read_metrics
from pseudolabel.settings import AugmentSettings, TrainSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import write_shard
from pseudolabel.train import train
from pseudolabel.training.distributed import Team
from pseudolabel.training.inputs import TrainingData, check_annotated, check_labeled
from pseudolabel.training.world import World, starts_again, world_from_environment
from pseudolabel.views.image import square

SETTINGS = TrainSettings(
    student="python:small_models:grouped",
    image_size=12,
    channels=1,
    batch_size=15,
    labeled_fraction=0.3,
    lr=0.01,
    steps=60,
    eval_every=3,
)


class Torchrun:
    """Starts the real command as two processes."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd

    def start(self, *args: object, restarts: int = 0) -> subprocess.Popen[str]:
        paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={restarts}"]
        command = [sys.executable, "-m", *launcher, "-m", "pseudolabel", *map(str, args), "--json"]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=self.cwd, env=environment, text=True, start_new_session=True, **pipes)

    def end(self, process: subprocess.Popen[str]) -> tuple[int, dict[str, Any], str]:
        """Exit code, the one object on stdout, stderr. The processes are gone, and no traceback is of our code."""
        out, err = process.communicate(timeout=120)
        wait_until_gone(process.pid)
        assert out.count("\n") == 1, (out, err)
        assert f'File "{REPOSITORY / "pseudolabel"}' not in err, err
        return process.returncode, json.loads(out), err


@pytest.fixture
def torchrun(tmp_path: Path) -> Torchrun:
    return Torchrun(tmp_path)


def _options(corpus: Path, store: Path, out: str, settings: TrainSettings) -> tuple[object, ...]:
    """The command line that trains by `settings`."""
    data = ("--labeled", corpus / "labeled", "--unlabeled", corpus / "unlabeled", "--labels", store)
    names = ("student", "image_size", "channels", "batch_size", "labeled_fraction", "lr", "steps", "eval_every")
    flags = [part for name in names for part in (f"--{name.replace('_', '-')}", getattr(settings, name))]
    place = ("--val", corpus / "val", "--device", "cpu", "--workers", 0, "--threads", 1)
    return ("train", "--out", out, *data, *flags, *place)


def _train_alone(corpus: Path, store: Path, out: Path, settings: TrainSettings, **options: Any) -> None:
    sets = {name: list_shards(corpus / name) for name in ("labeled", "unlabeled", "val")}
    train(settings, out, **sets, store=store, threads=1, **options)


def _wait_for_rank(launcher: subprocess.Popen[str], rank: int) -> int:
    """The process id of one of the launcher's processes."""
    while True:
        assert launcher.poll() is None, launcher.communicate()
        for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                    return int(child)
        time.sleep(0.05)


def _curve(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run / "metrics.jsonl")]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")
def test_two_processes_train_as_one_does_and_go_on_after_sigkill(
    torchrun: Torchrun, corpus: Path, store: Path, tmp_path: Path
) -> None:
    """15 rows over two processes, one validation shard: shares are uneven, and one process validates nothing."""
    _train_alone(corpus, store, tmp_path / "one", SETTINGS)
    code, result, _ = torchrun.end(torchrun.start(*_options(corpus, store, "two", SETTINGS)))
    assert (code, result["run"], result["steps"]) == (0, "two", 60)
    one, two = _curve(tmp_path / "one"), _curve(tmp_path / "two")
    assert [step for step, _ in two] == [step for step, _ in one]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-4)
    told = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert told[0]["fingerprint"] == told[1]["fingerprint"], "how many trained it is no part of what a run is"
    assert told[1]["metrics"]["val_accuracy"] == pytest.approx(told[0]["metrics"]["val_accuracy"], abs=1.5 / 24)

    tracked = ("--tracker", "tensorboard") if importlib.util.find_spec("tensorboard") is not None else ()
    process = torchrun.start(*_options(corpus, store, "killed", SETTINGS), *tracked, restarts=1)
    victim = _wait_for_rank(process, 1)
    while not (tmp_path / "killed" / "checkpoint" / "state.safetensors").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    os.kill(victim, signal.SIGKILL)
    code, result, err = torchrun.end(process)
    assert code == 0, err
    assert err.count("error: another of the 2 processes that train together ended") == 1
    assert _curve(tmp_path / "killed") == two
    for name in ("model.safetensors", "model.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert result["val_accuracy"] == told[1]["metrics"]["val_accuracy"]
    if tracked:  # one process writes, before the kill and after
        assert len(list((tmp_path / "killed" / "events").iterdir())) == 2
        assert scalars(tmp_path / "killed" / "events")["loss"] == [(step, pytest.approx(loss)) for step, loss in two]


def test_what_one_process_began_two_go_on_with(torchrun: Torchrun, corpus: Path, store: Path, tmp_path: Path) -> None:
    """A student with batch norms, which see half of the rows in each process: its curve is near that of one process."""
    settings = SETTINGS.model_copy(update={"student": "small:resnet8?width=4", "batch_size": 32})
    _train_alone(corpus, store, tmp_path / "one", settings)

    def stop(progress: Any) -> None:
        if progress.step == 33:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train_alone(corpus, store, tmp_path / "both", settings, on_progress=stop)
    code, result, _ = torchrun.end(torchrun.start(*_options(corpus, store, "both", settings)))
    assert (code, result["steps"]) == (0, 60)
    one, both = _curve(tmp_path / "one"), _curve(tmp_path / "both")
    assert both[:10] == one[:10], "as one process left it at the checkpoint of step 30"
    assert both[10:] != one[10:]
    assert [loss for _, loss in both] == pytest.approx([loss for _, loss in one], rel=0.15)


def test_an_error_in_one_process_ends_all_with_one_message(torchrun: Torchrun, corpus: Path, tmp_path: Path) -> None:
    """The image that can't be decoded is in one process's share; the other waits for its gradients."""
    samples = [(f"k{i}", {"png": b"no image" if i == 7 else digit_like(i % 4, i), "cls": b"1"}) for i in range(24)]
    write_shard(corpus / "bad" / "bad.tar", samples)
    student = ("--student", "small:resnet8?width=4", "--image-size", 12, "--channels", 1, "--batch-size", 8)
    place = ("--steps", 3, "--device", "cpu", "--workers", 0, "--threads", 1)
    code, result, err = torchrun.end(
        torchrun.start("train", "--out", "run", "--labeled", corpus / "bad", *student, *place)
    )
    assert code == 1
    assert result["error"]["kind"] == "LabelError"
    assert "training sample 'k7' can't be decoded" in result["error"]["message"]
    assert "error: " not in err.replace("error_file: ", "")
    assert not (tmp_path / "run" / "run.json").exists()


def test_only_train_is_for_several_processes(cli: Cli, corpus: Path, teacher_dir: Path) -> None:
    started = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "none"}
    command = ("annotate", corpus / "unlabeled", "--teacher", f"checkpoint:{teacher_dir}", "--out", "store")
    result, _ = cli(*command, code=1, env=started)
    assert result["error"]["kind"] == "LaunchError"
    assert "start it without torchrun" in result["error"]["message"]
    assert not (cli.cwd / "store").exists()


@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 40))
def test_shares_are_a_partition_and_even(size: int, labeled: int, pseudo: int) -> None:
    """Of the labeled rows, of the others, and of both together."""
    worlds = [World(rank, size) for rank in range(size)]
    both = [[*one.share(labeled), *(labeled + row for row in one.share(pseudo, before=labeled))] for one in worlds]
    for shares, count in (
        ([list(one.share(labeled)) for one in worlds], labeled),
        ([list(one.share(pseudo, before=labeled)) for one in worlds], pseudo),
        (both, labeled + pseudo),
    ):
        assert sorted(row for share in shares for row in share) == list(range(count))
        assert all(share == sorted(share) for share in shares)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize(("batch_size", "fraction"), [(15, 0.3), (16, 0.99), (14, 0.0)])
def test_the_shares_of_a_batch_are_its_rows(
    corpus: Path, store: Path, size: int, batch_size: int, fraction: float
) -> None:
    """To the pixel, whoever else makes the batch: each row is augmented from a seed of its own. With all but one row
    labeled some processes have no soft label at all.
    """
    labels, (labeled, _) = open_store(store), check_labeled(list_shards(corpus / "labeled"), None)
    data = TrainingData(labeled, check_annotated(list_shards(corpus / "unlabeled"), labels), labels, 4)
    augment = AugmentSettings(crop="resized", randaugment=9, erasing=0.5)

    def batches(world: World) -> TrainingBatches:
        options: dict[str, Any] = {"batch_size": batch_size, "labeled_fraction": fraction, "seed": 3, "steps": 9}
        return TrainingBatches(data, square(12, 1), augment, **options, world=world)

    whole = batches(World())
    parts = [batches(World(rank, size)) for rank in range(size)]
    for step in (8, 2):
        shares = [part[step] for part in parts]
        _check_shares(whole[step], shares)


def _check_shares(whole: Batch, shares: list[Batch]) -> None:
    size, count = len(shares), len(whole.labels_B)
    assert whole.targets is not None
    for rank, share in enumerate(shares):
        rows = torch.arange(rank, count, size)
        assert torch.equal(share.pixels_BCHW, whole.pixels_BCHW[rows])
        assert torch.equal(share.labels_B, whole.labels_B[rows])
        assert (share.num_labeled, share.num_soft) == (whole.num_labeled, whole.num_soft)
        assert share.targets is not None
        soft = rows[rows >= count - whole.num_soft] - (count - whole.num_soft)
        for name, column in whole.targets.columns.items():
            assert torch.equal(share.targets.columns[name], column[soft]), name


def test_an_epoch_over_uneven_shards_has_every_row_once(corpus: Path) -> None:
    """Seventy-seven rows in four shards, dealt to three processes; the images are all different."""
    write_shard(corpus / "val" / "more.tar", [(f"m{i}", {"png": digit_like(i % 4, i), "cls": b"0"}) for i in range(5)])
    shards = [*list_shards(corpus / "val"), *list_shards(corpus / "labeled"), *list_shards(corpus / "unlabeled")[:1]]
    for path in (Path(shard.path) for shard in shards if "unlabeled" in shard.path):
        write_shard(path, [(f"u{i}", {"png": digit_like(i % 4, 900 + i), "cls": b"0"}) for i in range(24)])
    data = TrainingData(check_labeled(shards, None)[0], [], None, 4)
    clean, seen = AugmentSettings(crop="none", flip=False), []
    for rank in range(3):
        options: dict[str, Any] = {"batch_size": 11, "labeled_fraction": 1.0, "seed": 0, "steps": 7}
        batches = TrainingBatches(data, square(12, 1), clean, **options, world=World(rank, 3))
        seen += [pixels.numpy().tobytes() for step in range(7) for pixels in batches[step].pixels_BCHW]
    assert len(seen) == len(set(seen)) == 77


@given(st.integers(1, 6), st.integers(0, 5), st.integers(0, 7), st.sampled_from(["kd", "hard"]))
def test_the_shares_losses_add_up_to_the_batchs(size: int, labeled: int, soft: int, loss: str) -> None:
    """Value and gradient, where shares are uneven, without a label, without a soft label."""
    count = max(labeled + soft, 1)
    soft = count - labeled
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(count, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    labels = torch.tensor([row % 4 if row < labeled else NO_LABEL for row in range(count)])
    teacher = torch.randn(soft, 4, dtype=torch.float64, generator=generator)
    targets = StoredTargets(Dense(), {"logits": teacher, "pred": teacher.argmax(-1)})
    mixture = Mixture(0.7, 2.0, loss)
    total = torch.zeros((), dtype=torch.float64)
    for rank in range(size):
        mine, theirs = World(rank, size).share(labeled), World(rank, size).share(soft, before=labeled)
        rows = torch.tensor([*mine, *(labeled + row for row in theirs)], dtype=torch.int64)
        part = targets.map(lambda column, rows=tuple(theirs): column[list(rows)])  # type: ignore[misc]
        counts = {"num_labeled": labeled, "num_soft": max(soft, 1)}
        total = total + mixture(logits[rows], labels[rows], part, torch.ones(len(theirs)), **counts).total
    if not soft:
        wanted = 0.3 * torch.nn.functional.cross_entropy(logits, labels)
    else:
        wanted = mixture(logits, labels, targets, torch.ones(soft)).total
    torch.testing.assert_close(total, wanted)
    ours, right = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (total, wanted))
    torch.testing.assert_close(ours, right)


def test_what_a_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert world_from_environment() == World()
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(LaunchError, match="LOCAL_RANK and MASTER_ADDR and MASTER_PORT not set"):
        world_from_environment()
    for name, value in {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert world_from_environment() == World(3, 4, 1, 2)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert starts_again()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not starts_again()
    monkeypatch.setenv("RANK", "4")
    with pytest.raises(LaunchError, match="rank 4 of 4"):
        world_from_environment()


def test_several_processes_share_the_cores_and_no_device() -> None:
    place = training_place("cpu", None, None, World(1, 2, 1, 2))
    assert place["threads"] + place["workers"] == max(1, available_cores() // 2)
    for device in ("cuda:1", "mps"):
        with pytest.raises(LaunchError, match=f"--device {device}: several processes can't take one device"):
            training_place(device, None, None, World(1, 2, 1, 2))


def test_a_batch_too_small_for_all_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"--batch-size 15 is for all 8 processes .* make it 16 or more"):
        train(SETTINGS, tmp_path / "run", labeled=corpus / "labeled", team=Team(World(0, 8)))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_batch_norms_on_two_gpus_see_the_whole_batch(
    torchrun: Torchrun, corpus: Path, store: Path, tmp_path: Path
) -> None:
    settings = SETTINGS.model_copy(update={"student": "small:resnet8?width=8", "batch_size": 32, "steps": 20})
    _train_alone(corpus, store, tmp_path / "one", settings, device="cuda")
    options = [*_options(corpus, store, "two", settings), "--device", "cuda"]
    assert torchrun.end(torchrun.start(*options))[0] == 0
    one, two = ([loss for _, loss in _curve(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-2)
