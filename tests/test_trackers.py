"""Trackers: told what metrics.jsonl holds, in step after a resume, and none of them can harm a training."""

from __future__ import annotations

import builtins
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from commands import FEW, Refuse
from conftest import REPOSITORY
from event_files import scalars
from object_stores import Bucket

from pseudolabel import storage
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import Diverged, OutputExists, SpecError, TrackerError
from pseudolabel.interfaces import TrackedRun, Tracker
from pseudolabel.place import Place
from pseudolabel.recipe import load_recipe
from pseudolabel.rounds import run
from pseudolabel.rundir import read_metrics
from pseudolabel.settings import TrainSettings
from pseudolabel.trackers import parse_tracker
from pseudolabel.train import TrainResult, train

SMALL = TrainSettings(student="small:resnet8?width=4", image_size=12, channels=1, steps=6, batch_size=8, eval_every=2)


class Listener:
    """Keeps what it is told; fails where it is asked to."""

    def __init__(self, name: str = "listener", fails: str = "") -> None:
        self.name, self._fails = name, fails
        self.runs: list[TrackedRun] = []
        self.lines: list[dict[str, Any]] = []
        self.ends: list[tuple[Mapping[str, Any] | None, str | None]] = []

    def begin(self, run: TrackedRun) -> str | None:
        self.runs.append(run)
        self._fail("begin")
        return f"id {len(self.runs)}" if run.earlier is None else run.earlier

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._fail("log")
        self.lines.append({"step": step, **metrics})

    def end(self, result: Mapping[str, Any] | None, failure: str | None) -> None:
        self._fail("end")
        self.ends.append((result, failure))

    def _fail(self, where: str) -> None:
        if self._fails == where:
            raise ConnectionError("no route to https://me:secret@host")


def _train(
    corpus: Path, out: Path | str, *trackers: Tracker, settings: TrainSettings = SMALL, **more: Any
) -> TrainResult:
    data = {"labeled": str(corpus / "labeled"), "val": str(corpus / "val")}
    return train(settings, out, **data, threads=1, trackers=trackers, **more)


def _stop_at(step: int) -> Any:
    def stop(progress: Any) -> None:
        if progress.step == step:
            raise KeyboardInterrupt

    return stop


def test_a_tracker_hears_what_metrics_jsonl_holds_and_changes_nothing(corpus: Path, tmp_path: Path) -> None:
    listener = Listener()
    result = _train(corpus, tmp_path / "heard", listener)
    assert listener.lines == read_metrics(tmp_path / "heard" / "metrics.jsonl")
    assert [line["step"] for line in listener.lines] == [2, 4, 6]
    (begun,) = listener.runs
    assert (begun.name, begun.group, begun.step, begun.earlier) == ("heard", None, 0, None)
    assert (begun.settings["lr"], begun.settings["augment.crop"]) == (SMALL.lr, "pad")
    marker = json.loads((tmp_path / "heard" / "run.json").read_text())
    assert begun.settings["fingerprint"] == marker["fingerprint"]
    assert listener.ends == [(marker["result"], None)]
    assert _train(corpus, tmp_path / "heard", listener) == result
    assert len(listener.runs) == 1  # what is done is not told again
    _train(corpus, tmp_path / "alone")
    assert json.loads((tmp_path / "alone" / "run.json").read_text())["fingerprint"] == marker["fingerprint"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("heard", "alone")]
    assert weights[0] == weights[1]


def test_a_resumed_run_is_the_same_one(corpus: Path, tmp_path: Path) -> None:
    listener, late = Listener(), Listener("late")
    with pytest.raises(KeyboardInterrupt):
        _train(corpus, tmp_path / "run", listener, on_progress=_stop_at(4))
    assert listener.ends == [(None, "interrupted")]
    _train(corpus, tmp_path / "run", listener, late)
    assert [(one.step, one.earlier) for one in listener.runs] == [(0, None), (2, "id 1")]
    assert [(one.step, one.earlier) for one in late.runs] == [(2, None)]
    assert [line["step"] for line in listener.lines] == [2, 4, 4, 6]
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [2, 4, 6]
    _train(corpus, tmp_path / "run", listener, overwrite=True)
    assert listener.runs[-1].earlier is None


def test_other_settings_do_not_go_on_with_a_run_stopped_before_its_first_checkpoint(
    corpus: Path, tmp_path: Path
) -> None:
    listener = Listener()
    with pytest.raises(KeyboardInterrupt):
        _train(corpus, tmp_path / "run", listener, on_progress=_stop_at(2))
    _train(corpus, tmp_path / "run", listener, settings=SMALL.model_copy(update={"lr": 0.01}))
    assert [one.earlier for one in listener.runs] == [None, None]


@pytest.mark.parametrize("where", ["log", "end"])
def test_a_tracker_that_fails_is_left_out_with_one_warning(corpus: Path, tmp_path: Path, where: str) -> None:
    failing, listener = Listener("failing", where), Listener()
    with pytest.warns(UserWarning, match=r"^failing: tracking failed .*no route to https://…@host") as warned:
        result = _train(corpus, tmp_path / "run", failing, listener)
    assert len(warned) == 1
    assert result.steps == 6
    assert [line["step"] for line in listener.lines] == [2, 4, 6]
    assert listener.lines == read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert listener.ends[0][1] is None


def test_a_tracker_that_cannot_begin_ends_the_command_before_training(corpus: Path, tmp_path: Path) -> None:
    listener = Listener()
    with pytest.raises(TrackerError, match=r"^failing: the tracker can't begin \(no route") as refused:
        _train(corpus, tmp_path / "run", listener, Listener("failing", "begin"))
    assert "secret" not in str(refused.value)
    assert listener.lines == []
    assert listener.ends[0][0] is None
    with pytest.raises(TrackerError, match="listener: the tracker is given twice"):
        _train(corpus, tmp_path / "run", listener, Listener())
    assert _train(corpus, tmp_path / "run").steps == 6


def test_a_training_that_fails_says_how(corpus: Path, tmp_path: Path) -> None:
    listener = Listener()
    wild = SMALL.model_copy(update={"lr": 1e30, "optimizer": "sgd", "warmup_fraction": 0.0, "clip_norm": 0.0})
    with pytest.raises(Diverged):
        _train(corpus, tmp_path / "run", listener, settings=wild)
    ((result, failure),) = listener.ends
    assert result is None
    assert failure is not None
    assert failure.startswith("Diverged: ")


def test_each_stage_is_a_run_of_the_group(corpus: Path, tmp_path: Path) -> None:
    student = 'student = "small:resnet8?width=4"\nimage_size = 12\nchannels = 1\nbatch_size = 8\nsteps = 2\n'
    data = "".join(f'{split} = "{corpus / split}"\n' for split in ("labeled", "unlabeled", "val"))
    (tmp_path / "r.toml").write_text(f"[data]\n{data}[teacher.train]\n{student}[train]\n{student}")
    listener = Listener()
    place = Place(LocalEngine("cpu", 1), threads=1, trackers=(listener,))
    for _ in range(2):
        run(load_recipe(tmp_path / "r.toml", ["rounds.count=1"]), tmp_path / "whole", place)
    named = [(one.name, one.group) for one in listener.runs]
    assert named == [("teacher", "whole"), ("round-1/student", "whole"), ("control", "whole")]
    assert [failure for _, failure in listener.ends] == [None] * 3


def test_a_broken_trackers_json_is_an_error(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _train(corpus, tmp_path / "run", Listener(), on_progress=_stop_at(4))
    (tmp_path / "run" / "trackers.json").write_text("[")
    with pytest.raises(TrackerError, match=r"trackers\.json: can't be read .*delete it"):
        _train(corpus, tmp_path / "run", Listener())


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("wanbd?project=x", r"unknown tracker 'wanbd' \(did you mean 'wandb'\?\); known are tensorboard, wandb"),
        ("", "unknown tracker ''"),
        ("wandb?projet=x", r"wandb\?projet=x: unknown argument 'projet' \(did you mean 'project'\?\)"),
        ("mlflow?uri", "can't read the arguments after"),
        ("tensorboard?dir=x", "unknown argument 'dir'; it takes none"),
    ],
)
def test_wrong_specs(corpus: Path, tmp_path: Path, refuse: Refuse, spec: str, said: str) -> None:
    command = ("train", "--labeled", corpus / "labeled", "--out", tmp_path / "run", *FEW, "--tracker", spec)
    refuse(*command, kind="SpecError", said=said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow", "trackio"])
def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    present = builtins.__import__

    def absent(wanted: str, *args: Any, **options: Any) -> Any:
        if wanted.partition(".")[0] == name:
            raise ImportError(f"No module named '{name}'")
        return present(wanted, *args, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(SpecError, match=rf"^{name}: No module named .*pip install 'pseudolabel\[{name}\]'"):
        parse_tracker(name)


def test_values_of_specs_stay_text_and_secrets_are_not_kept() -> None:
    pytest.importorskip("mlflow")
    assert parse_tracker("mlflow?experiment=007").name == "mlflow?experiment=007"
    assert "secret" not in parse_tracker("mlflow?uri=https://me:secret@host/x&experiment=a").name


def test_the_tracker_of_the_docs_runs(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "trackers.md").read_text(), re.DOTALL)
    space: dict[str, Any] = {}
    exec(block, space)  # noqa: S102
    _train(corpus, tmp_path / "run", space["Printer"]())
    keys = "['loss', 'lr', 'samples_per_second', 'val_accuracy']"
    assert capsys.readouterr().out.splitlines() == [
        "begin run at step 0 lr 0.002",
        *(f"{step} {keys}" for step in (2, 4, 6)),
        "end 6",
    ]


def _logged(lines: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    names = {name for line in lines for name in line if name != "step"}
    return {name: [(line["step"], pytest.approx(line[name])) for line in lines if name in line] for name in names}


def test_tensorboard_reads_each_step_once_after_a_resume(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tracker, out = parse_tracker("tensorboard"), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        _train(corpus, out, tracker, on_progress=_stop_at(4))
    assert [step for step, _ in scalars(out / "events")["loss"]] == [2, 4]
    (first,) = (out / "events").iterdir()
    first.write_bytes(first.read_bytes() + first.read_bytes()[:20])  # a kill cut a record short
    _train(corpus, out, tracker)
    assert len(list((out / "events").iterdir())) == 2
    assert scalars(out / "events") == _logged(read_metrics(out / "metrics.jsonl"))
    assert "tensorflow" not in sys.modules
    _train(corpus, out, tracker, overwrite=True, settings=SMALL.model_copy(update={"steps": 3}))
    assert [step for step, _ in scalars(out / "events")["loss"]] == [2, 3]
    assert len(list((out / "events").iterdir())) == 1


def test_event_files_of_others_are_safe(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "events").mkdir(parents=True)
    (tmp_path / "run" / "events" / "diary.txt").write_text("mine")
    with pytest.raises(OutputExists, match="'events'"):
        _train(corpus, tmp_path / "run")
    _train(corpus, tmp_path / "other")
    (tmp_path / "other" / "events").mkdir()
    (tmp_path / "other" / "events" / "diary.txt").write_text("mine")
    _train(corpus, tmp_path / "other", overwrite=True)
    assert (tmp_path / "other" / "events" / "diary.txt").read_text() == "mine"


def test_a_run_at_a_url_has_its_events_there(corpus: Path, tmp_path: Path, bucket: Bucket) -> None:
    """Each resume works in a fresh copy: the id and the earlier events are only at the URL."""
    pytest.importorskip("tensorboard")
    out, listener = f"{bucket.url}/run", Listener()
    trackers = (parse_tracker("tensorboard"), listener)
    with pytest.raises(KeyboardInterrupt):
        _train(corpus, out, *trackers, on_progress=_stop_at(4))
    _train(corpus, out, *trackers)
    assert [one.earlier for one in listener.runs] == [None, "id 1"]
    there = storage.location(out)
    (tmp_path / "copy").mkdir()
    for one in (there / "events").iterdir():
        (tmp_path / "copy" / one.name).write_bytes(one.read_bytes())
    assert len(list((tmp_path / "copy").iterdir())) == 2
    assert scalars(tmp_path / "copy") == _logged(read_metrics(there / "metrics.jsonl"))
    _train(corpus, out, overwrite=True)
    assert "events" not in {one.name for one in there.iterdir()}
