"""Trackers of other packages, for real and without a network: read back what they kept of an interrupted training.

Each needs its package: pip install 'pseudolabel[wandb,mlflow]', and trackio in an environment of its own while it wants
an older Pillow than constraints.txt names. Then pytest -m slow tests/test_tracker_backends.py
"""

from __future__ import annotations

import importlib
import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pseudolabel.rundir import read_metrics

pytestmark = pytest.mark.slow
Tracked = Callable[[str], Path]


@pytest.fixture
def tracked(corpus: Path, tmp_path: Path) -> Tracked:
    """Run tests/tracked.py with a spec, all places of the packages below `tmp_path`; returns the run directory."""

    def work(spec: str) -> Path:
        out, home = tmp_path / "run", tmp_path / "home"
        home.mkdir()
        named = ("HOME", "WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "TRACKIO_DIR")
        places = {**dict.fromkeys(named, str(home)), "WANDB_MODE": "offline"}
        places |= {"MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true", "HF_HUB_OFFLINE": "1"}
        program = Path(__file__).parent / "tracked.py"
        command = [sys.executable, "-W", "error", program, spec, corpus, out]
        done = subprocess.run(command, cwd=home, env={**os.environ, **places}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return out

    return work


def _logged(run: Path, name: str) -> list[tuple[int, Any]]:
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    return [(line["step"], pytest.approx(line[name])) for line in lines]


def _kept(run: Path) -> str:
    (earlier,) = json.loads((run / "trackers.json").read_text())["runs"].values()
    return str(earlier)


def test_mlflow_goes_on_with_the_run_and_keeps_each_step_once(
    tracked: Tracked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    run = tracked(f"mlflow?uri={tmp_path / 'mlruns'}&experiment=digits")
    client = importlib.import_module("mlflow").MlflowClient(tracking_uri=str(tmp_path / "mlruns"))
    experiment = client.get_experiment_by_name("digits")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.run_name, found.info.status) == (_kept(run), "run", "FINISHED")
    assert found.data.params["augment.crop"] == "pad"
    assert found.data.tags["result.steps"] == "6"
    for name in ("loss", "val_accuracy"):
        history = client.get_metric_history(found.info.run_id, name)
        assert [(one.step, one.value) for one in history] == _logged(run, name)


def test_trackio_goes_on_with_the_run_and_keeps_each_step_once(tracked: Tracked, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    run = tracked("trackio?project=digits")
    (database,) = (tmp_path / "home").glob("**/digits*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
        configs = [json.loads(one) for (one,) in connection.execute("SELECT config FROM configs")]
    connection.close()
    assert {name for name, *_ in rows} == {_kept(run)}
    assert [(step, json.loads(metrics)["loss"]) for _, step, metrics in rows] == _logged(run, "loss")
    assert configs[0]["augment.crop"] == "pad"


def test_wandb_offline_goes_on_with_the_run(tracked: Tracked, tmp_path: Path) -> None:
    """Offline the second file tells again of what followed the checkpoint; online the server drops it."""
    pytest.importorskip("wandb")
    run = tracked("wandb?project=digits")
    files = sorted((tmp_path / "home").glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in files] == [f"run-{_kept(run)}.wandb"] * 2
    steps, ends = [], []
    for path in files:
        for record in _wandb_records(path.read_bytes()):
            if record.WhichOneof("record_type") == "history":
                values = {
                    "/".join(one.nested_key) or one.key: json.loads(one.value_json) for one in record.history.item
                }
                steps.append((values["_step"], values["loss"]))
            if record.WhichOneof("record_type") == "run" and record.run.display_name:
                assert (record.run.project, record.run.display_name) == ("digits", "run")
            if record.WhichOneof("record_type") == "exit":
                ends.append(record.exit.exit_code)
    assert [step for step, _ in steps] == [2, 4, 4, 6]
    assert [steps[0], *steps[2:]] == _logged(run, "loss")
    assert ends == [1, 0]


def _wandb_records(content: bytes) -> Iterator[Any]:
    """The records of a .wandb file: a 7-byte header, then LevelDB's log of one block's length at most."""
    kind = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    assert len(content) < 1 << 15
    place = 7
    while place + 7 <= len(content):
        length, whole = struct.unpack_from("<HB", content, place + 4)
        assert whole == 1
        yield kind.FromString(content[place + 7 : place + 7 + length])
        place += 7 + length
