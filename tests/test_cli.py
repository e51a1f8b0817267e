"""The command line: help that costs nothing, the JSON that scripts rely on, and one clear error per mistake.

The way through all commands, usage errors and an interrupt run in real processes; the mistakes run `main` in this one,
as each of them needs torch.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
from commands import FEW, Invoke, Refuse, distill
from conftest import REPOSITORY, Cli, digit_like

from pseudolabel.annotate import annotate
from pseudolabel.cli import app
from pseudolabel.shards import write_shard

COMMANDS = {"pack", "plan", "annotate", "inspect", "verify", "calibrate", "select", "leaks"}
COMMANDS |= {"train", "evaluate", "run", "report", "demo"}


# --- help


def test_help_imports_neither_torch_nor_arrow_and_every_command_has_json() -> None:
    """Half a second of import before the first line of help is a second too much, and torch takes three."""
    script = """
import json, sys
from typer.testing import CliRunner
from pseudolabel.cli import app
commands = [command.name or command.callback.__name__ for command in app.registered_commands]
found = {name: CliRunner().invoke(app, [name, "--help"]) for name in commands}
top = CliRunner().invoke(app, ["--help"])
heavy = sorted({"torch", "torchvision", "webdataset", "pyarrow", "numpy", "plotly", "jinja2"} & set(sys.modules))
pages = {name: [result.exit_code, "--json" in result.output] for name, result in found.items()}
print(json.dumps({"pages": pages, "top": [top.exit_code, top.output], "heavy": heavy}))
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["pages"] == {name: [0, True] for name in COMMANDS}
    assert found["heavy"] == []
    code, page = found["top"]
    assert code == 0
    assert all(name in page for name in COMMANDS)
    assert "@list.txt" in page


def test_the_installed_program_shows_its_help_without_torch(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-X", "importtime", "-m", "pseudolabel", "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "annotate" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "pseudolabel.cli" in imported, "importtime lists nothing, so this test shows nothing"
    assert not imported & {"torch", "webdataset", "pyarrow", "torchvision", "numpy"}


def test_every_option_says_what_it_does() -> None:
    commands: Mapping[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == COMMANDS
    for name, command in commands.items():
        assert command.help, name
        for option in command.params:
            assert getattr(option, "help", None), (name, option.name)


# --- in real processes: the way through, usage errors, an interrupt


def test_the_way_through_all_commands(tmp_path: Path, corpus: Path, teacher_dir: Path, cli: Cli) -> None:
    """Pack, annotate, inspect, verify, train, evaluate: the fields that scripts rely on, and how they fit together."""
    for label in range(4):
        (tmp_path / "images" / f"class-{label}").mkdir(parents=True)
        for seed in range(5):
            (tmp_path / "images" / f"class-{label}" / f"{seed}.png").write_bytes(digit_like(label, seed))
    options = ("--labels-per-class", 2, "--val-fraction", 0.2, "--seed", 3)
    packed, err = cli("pack", "images", "packed", *options)
    assert packed["samples"] == {"labeled": 8, "unlabeled": 8, "val": 4}
    assert (packed["shards"], packed["classes"]) == (3, [f"class-{label}" for label in range(4)])
    assert "labeled" in err

    annotated, _ = cli(
        "annotate", corpus / "unlabeled", "--teacher", f"checkpoint:{teacher_dir}", "--out", "store", "--workers", 1
    )
    assert (annotated["samples"], annotated["rejects"], annotated["parts_written"], annotated["parts_skipped"]) == (
        72,
        0,
        3,
        0,
    )
    assert annotated["seconds"] > 0

    inspected, _ = cli("inspect", "store")
    assert (inspected["rows"], inspected["parts"], inspected["rejects"]) == (72, 3, 0)
    assert (inspected["num_classes"], inspected["encoding"]) == (4, "dense")
    assert inspected["fingerprint"] == annotated["fingerprint"]
    sizes = sum(path.stat().st_size for path in (tmp_path / "store" / "parts").iterdir())
    assert inspected["bytes_per_row"] == pytest.approx(sizes / 72, abs=0.01)
    assert 0 <= inspected["fidelity"]["mean"]["1"] <= inspected["fidelity"]["p99"]["1"] < 1e-5

    verified, _ = cli("verify", "store", "--shards", corpus / "unlabeled")
    found = {name: verified[name] for name in ("ok", "parts", "rows", "problems")}
    assert found == {"ok": True, "parts": 3, "rows": 72, "problems": []}

    trained, err = cli(*distill(corpus, Path("store"), Path("run"), "--val", corpus / "val", steps=30), "--alpha", 0.2)
    assert (trained["run"], trained["steps"]) == ("run", 30)
    assert trained["seconds"] > 0
    assert 0.25 < trained["val_accuracy"] <= 1

    evaluated, _ = cli("evaluate", "run", corpus / "val", "--device", "cpu")
    assert (evaluated["samples"], evaluated["accuracy"]) == (24, trained["val_accuracy"])
    assert evaluated["top5"] == 1.0
    assert evaluated["nll"] > 0
    assert 0 <= evaluated["ece"] <= 1
    assert sum(map(sum, evaluated["confusion"])) == 24
    assert evaluated["agreement"] is None


def test_a_usage_error_ends_with_2_for_people_and_scripts(cli: Cli) -> None:
    process = cli.start("annotate", "shards")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert "Missing option" in err
    assert "Traceback" not in err
    result, err = cli("annotate", "shards", "--teacher", "x", "--out", "y", "--workers", "none", code=2)
    assert result["error"]["kind"] == "UsageError"
    assert "Invalid value for '--workers'" in result["error"]["message"]
    assert err == ""


def test_a_known_error_in_a_real_process_is_a_few_lines_and_exit_code_1(cli: Cli) -> None:
    process = cli.start("inspect", "store")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith("error: store: no store here")
    assert len(err.splitlines()) <= 5


def test_an_interrupt_ends_with_130_and_what_is_left_goes_on_as_the_same_run_only(
    tmp_path: Path, corpus: Path, cli: Cli, refuse: Refuse
) -> None:
    """With --json an interrupted command owes its one object, too. Another training in the same directory, though
    refused, once left its recipe there.
    """
    run = tmp_path / "run"
    command = (
        "train",
        "--out",
        run,
        "--labeled",
        corpus / "labeled",
        *FEW,
        "--steps",
        100_000,
        "--eval-every",
        20,
        "--json",
    )
    process = cli.start(*command)
    deadline = time.monotonic() + 60
    while not (run / "checkpoint" / "state.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert json.loads(out)["error"]["kind"] == "Interrupted"
    assert "the same command goes on from here" in err
    assert "Traceback" not in err
    assert {path.name for path in run.iterdir()} == {"checkpoint", "metrics.jsonl", "recipe.toml"}
    content = {path: path.read_bytes() for path in run.rglob("*.*")}
    other = ("train", "--out", run, "--labeled", corpus / "labeled", *FEW, "--steps", 5, "--eval-every", 20)
    refuse(*other, kind="OutputExists", said="steps: 100000 there, 5 now")
    assert {path: path.read_bytes() for path in run.rglob("*.*")} == content


# --- usage errors


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("anotate",), "No such command 'anotate'"),
        (("annotate",), "Missing argument 'shards...'"),
        (("annotate", "x", "--out", "y"), "Missing option '--teacher'"),
        (("annotate", "x", "--teacher", "t", "--out", "y", "--batch-size", "0"), "Invalid value for '--batch-size'"),
        (
            ("annotate", "x", "--teacher", "t", "--out", "y", "--max-reject-fraction", "1.5"),
            "Invalid value for '--max-reject-fraction'",
        ),
        (("train",), "Missing option '--out'"),
        (("train", "--out", "x", "--steps", "many"), "Invalid value for '--steps'"),
        (("train", "--out", "x", "--tempratur", "2"), "No such option"),
        (("pack", "x", "y", "--seed", "-1"), "Invalid value for '--seed'"),
        (("inspect",), "Missing argument 'store'"),
        (("inspect", "x", "y"), "unexpected extra argument"),
    ],
)
def test_usage_errors(invoke: Invoke, args: tuple[str, ...], said: str) -> None:
    code, out, err = invoke(*args, "--json")
    assert (code, err, out.count("\n")) == (2, "", 1)
    error = json.loads(out)["error"]
    assert error["kind"] == "UsageError"
    assert said.lower() in error["message"].lower()


# --- packing


@pytest.mark.parametrize(
    ("args", "kind", "said"),
    [
        (("nowhere", "out"), "SourceError", "nowhere: no such file or directory"),
        (("images", "out", "--val-fraction", "2"), "SourceError", "val fraction 2.0 and test fraction 0.0"),
        (("images", "out", "--labels-per-class", "9"), "SourceError", "fewer than --labels-per-class 9"),
        (("images", "full"), "OutputExists", "full: holds shards already"),
        (("images", "file"), "StorageError", "file"),
    ],
)
def test_pack_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Refuse, args: tuple[str, ...], kind: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "1.png").write_bytes(digit_like(0, 0))
    write_shard(tmp_path / "full" / "val" / "val-000000.tar", [("a", {"png": digit_like(0, 0)})])
    before = shutil.copytree(tmp_path / "full", tmp_path / "copy") / "val" / "val-000000.tar"
    refuse("pack", *args, kind=kind, said=said)
    assert (tmp_path / "full" / "val" / "val-000000.tar").read_bytes() == before.read_bytes()
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_a_full_disk_behind_stdout_is_one_line(corpus: Path, teacher_dir: Path, tmp_path: Path, cli: Cli) -> None:
    annotate(str(corpus / "val"), f"checkpoint:{teacher_dir}", tmp_path / "store")
    with open("/dev/full", "w") as full:
        process = cli.start("inspect", "store", stdout=full)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert len(err.splitlines()) == 1
    assert "No space left on device" in err
