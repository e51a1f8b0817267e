"""A training that was stopped or killed goes on to the same weights, and its directory is its own."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from commands import Invoke
from conftest import Cli, make_model, wait_until_gone
from small_trainings import SMALL, small_store, train_on  # noqa: F401 (a fixture)

from pseudolabel.errors import OutputExists
from pseudolabel.labels.store import Store


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resume_from_a_checkpoint_is_exact(corpus: Path, store: Store, tmp_path: Path, optimizer: str) -> None:
    """Stopped by an exception after the second checkpoint; test_kill.py does it with SIGKILL."""
    settings = SMALL.model_copy(update={"optimizer": optimizer, "lr": 0.02})
    train_on(corpus, tmp_path / "whole", store, settings, val=())  # without validation the last weights are kept

    def stop(progress: object) -> None:
        if progress.step == 10 or progress.step == 12:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_on(corpus, tmp_path / "stopped", store, settings, on_progress=stop, val=())
    assert not (tmp_path / "stopped" / "run.json").exists()
    assert (tmp_path / "stopped" / "checkpoint" / "state.safetensors").exists()
    result = train_on(corpus, tmp_path / "stopped", store, settings, val=())
    assert (tmp_path / "stopped" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    logged = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "metrics.jsonl").read_text().splitlines()]
    assert logged == sorted(set(logged))
    assert not (tmp_path / "stopped" / "checkpoint").exists()
    assert result.steps == 12


def test_killed_beside_its_loader_process_it_goes_on_to_the_same_weights(
    cli: Cli, invoke: Invoke, corpus: Path, store: Store
) -> None:
    """SIGKILL to the command alone, after its first checkpoint; the loader process must not outlive it."""
    given = ("--labeled", corpus / "labeled", "--unlabeled", corpus / "unlabeled", "--labels", store.root)
    options = ("--student", "small:resnet8?width=4", "--image-size", 12, "--channels", 1, "--batch-size", 16)
    place = ("--steps", 60, "--eval-every", 5, "--device", "cpu", "--workers", 1, "--threads", 1)
    arguments = ("train", *given, *options, *place)
    process = cli.start(*arguments, "--out", "killed")
    state = cli.cwd / "killed" / "checkpoint" / "state.safetensors"
    while not state.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert state.exists()
    wait_until_gone(process.pid)
    for name in ("killed", "undisturbed"):
        code, _, err = invoke(*arguments, "--out", cli.cwd / name)
        assert code == 0, err
    killed, undisturbed = (cli.cwd / name / "model.safetensors" for name in ("killed", "undisturbed"))
    assert killed.read_bytes() == undisturbed.read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="children are found in /proc")
def test_a_killed_loader_process_is_missed_soon(cli: Cli, corpus: Path) -> None:
    """As when memory runs out. It took five minutes until anything was said."""
    options = ("--student", "small:resnet8?width=4", "--image-size", 12, "--channels", 1, "--batch-size", 16)
    place = ("--steps", 100_000, "--device", "cpu", "--workers", 1, "--threads", 1, "--out", "run")
    process = cli.start("train", "--labeled", corpus / "labeled", *options, *place)
    metrics = cli.cwd / "run" / "metrics.jsonl"
    while not metrics.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    (loader,) = [own for server in _children(process.pid) for own in _children(server)]
    os.kill(loader, signal.SIGKILL)
    assert "a loader process ended" in process.communicate(timeout=60)[1]
    assert process.returncode == 1


def _children(process: int) -> list[int]:
    return [int(own) for own in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_a_finished_run_is_kept_and_another_is_refused(corpus: Path, store: Store, tmp_path: Path) -> None:
    first = train_on(corpus, tmp_path / "run", store)
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    assert train_on(corpus, tmp_path / "run", store) == first
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before
    other = SMALL.model_copy(update={"lr": 0.5})
    with pytest.raises(OutputExists, match=r"lr: 0\.002 there, 0\.5 now"):
        train_on(corpus, tmp_path / "run", store, other)
    train_on(corpus, tmp_path / "run", store, other, overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "dear.jpg").write_bytes(b"x")
    with pytest.raises(OutputExists, match=r"dear\.jpg"):
        train_on(corpus, tmp_path / "photos", store, overwrite=True)


def test_overwrite_looks_before_it_clears(corpus: Path, tmp_path: Path) -> None:
    """A page beside the run is the run's own; a stranger's file stops it before anything is gone."""
    train_on(corpus, tmp_path / "run")
    (tmp_path / "run" / "report.html").write_text("page")
    train_on(corpus, tmp_path / "run", settings=SMALL.model_copy(update={"lr": 0.1}), overwrite=True)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExists, match=r"notes\.txt"):
        train_on(corpus, tmp_path / "run", overwrite=True)
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_two_trainings_do_not_share_a_directory(corpus: Path, tmp_path: Path) -> None:
    """Both ended well, and one student was gone."""

    def second(_: object) -> None:
        with pytest.raises(OutputExists, match="another process is at work in it"):
            train_on(corpus, tmp_path / "run", settings=SMALL.model_copy(update={"seed": 1}))

    train_on(corpus, tmp_path / "run", on_progress=second)


def test_a_model_or_recipe_of_ones_own_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "best")
    before = (model / "model.safetensors").read_bytes()
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "recipe.toml").write_text("# mine")
    for place in (model, tmp_path / "exp"):
        with pytest.raises(OutputExists, match="is not of a training run"):
            train_on(corpus, place)
    assert (model / "model.safetensors").read_bytes() == before
    assert train_on(corpus, model, overwrite=True).steps == SMALL.steps
