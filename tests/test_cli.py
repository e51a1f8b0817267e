"""The command line: help that costs nothing, the JSON that scripts rely on, and one clear error per mistake.

The way through all commands, usage errors and an interrupt run in real processes; the mistakes run `main` in this one,
as each of them needs torch.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer
from conftest import REPOSITORY, Cli, digit_like, make_model

from pseudolabel.annotate import annotate
from pseudolabel.cli import app, main
from pseudolabel.engines.local import LocalEngine
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import read_samples, write_shard
from pseudolabel.teachers import parse_teacher

COMMANDS = {"pack", "plan", "annotate", "inspect", "verify", "train", "evaluate", "run", "report", "demo"}
SMALL = ("--student", "small:resnet8?width=4", "--image-size", 12, "--channels", 1)
HERE = ("--device", "cpu", "--threads", 1)
FEW = (*SMALL, "--batch-size", 8, *HERE)
Invoke = Callable[..., tuple[int, str, str]]
Refuse = Callable[..., str]


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run the entry point in this process: exit code, stdout, stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pseudolabel", *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def answer(invoke: Invoke) -> Callable[..., dict[str, Any]]:
    """Run with --json; the object that is on stdout, and nothing else is."""

    def run(*args: object) -> dict[str, Any]:
        code, out, err = invoke(*args, "--json")
        assert code == 0, (out, err)
        assert out.count("\n") == 1
        found: dict[str, Any] = json.loads(out)
        return found

    return run


@pytest.fixture
def refuse(invoke: Invoke) -> Refuse:
    """Run a command that must fail with a known error, for people and for scripts: the same one to five lines."""

    def run(*args: object, kind: str, said: str) -> str:
        code, out, err = invoke(*args)
        assert (code, out) == (1, ""), (code, out, err)
        assert "Traceback" not in err
        shown = err[err.index("error: ") :].removeprefix("error: ").rstrip("\n")
        code, out, err = invoke(*args, "--json")
        assert (code, out.count("\n")) == (1, 1), (code, out, err)
        error = json.loads(out)["error"]
        assert error["kind"] == kind, error
        assert error["message"] == shown
        assert 1 <= len(shown.splitlines()) <= 5, shown
        assert re.search(said, shown), shown
        return shown

    return run


@pytest.fixture
def store(tmp_path: Path, corpus: Path, teacher_dir: Path) -> Path:
    """The corpus's unlabeled shards, annotated by a random teacher of four classes."""
    return _annotated(corpus / "unlabeled", teacher_dir, tmp_path / "store")


def _annotated(shards: Path, teacher: Path, out: Path) -> Path:
    annotate(list_shards(shards), parse_teacher(f"checkpoint:{teacher}"), out, engine=LocalEngine("cpu", 1))
    return out


def _distill(corpus: Path, store: Path, out: Path, *more: object, steps: int = 2) -> tuple[object, ...]:
    """The arguments of a short training from soft labels and labels."""
    data = ("--labeled", corpus / "labeled", "--unlabeled", corpus / "unlabeled", "--labels", store)
    return ("train", "--out", out, *data, *FEW, "--steps", steps, *more)


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
    assert verified == {"ok": True, "parts": 3, "rows": 72, "problems": []}

    trained, err = cli(*_distill(corpus, Path("store"), Path("run"), "--val", corpus / "val", steps=30), "--alpha", 0.2)
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


# --- shards, labels, and what is asked of them


@pytest.mark.parametrize(
    ("shards", "said"),
    [
        ("{corpus}/unlabeled/none-*.tar", "no such shard, and nothing matches it as a glob"),
        ("{corpus}/nowhere", "no such shard"),
        ("{corpus}", r"no \*.tar in this directory"),
        ("{corpus}/unlabeled/unlabeled-{{0..4}}.tar", "2 of 5 shards are missing, the first is .*unlabeled-3.tar"),
        ("@{corpus}/list.txt", "can't read this list of shards"),
    ],
)
def test_shards_that_are_not_there(corpus: Path, teacher_dir: Path, refuse: Refuse, shards: str, said: str) -> None:
    where = shards.format(corpus=corpus)
    out = corpus / "store"
    refuse("annotate", where, "--teacher", f"checkpoint:{teacher_dir}", "--out", out, kind="ShardListError", said=said)
    refuse("evaluate", teacher_dir, where, kind="ShardListError", said=said)
    assert not out.exists()


def test_a_labeled_sample_without_label_is_named(tmp_path: Path, corpus: Path, refuse: Refuse) -> None:
    said = r"unlabeled-0.tar: sample 'unlabeled/0-000' has no label \(no `cls` file\)"
    refuse("train", "--out", tmp_path / "r", "--labeled", corpus / "unlabeled", *FEW, kind="LabelError", said=said)
    labeled = ("--labeled", corpus / "labeled")
    refuse(
        "train", "--out", tmp_path / "r", *labeled, "--val", corpus / "unlabeled", *FEW, kind="LabelError", said=said
    )
    refuse("evaluate", make_model(tmp_path / "m"), corpus / "unlabeled", kind="LabelError", said=said)


def test_a_label_out_of_range_is_named(tmp_path: Path, corpus: Path, refuse: Refuse) -> None:
    said = "sample 'labeled/0-003': its label is 3, but there are 3 classes"
    train = ("train", "--out", tmp_path / "run", "--labeled", corpus / "labeled", *FEW)
    refuse(*train, "--num-classes", 3, kind="LabelError", said=said)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    refuse(*train, "--classes", tmp_path / "classes.txt", kind="LabelError", said=said)
    val = "sample 'val/0-003': its label is 3, but there are 3 classes"
    refuse("evaluate", make_model(tmp_path / "m", classes=3), corpus / "val", kind="LabelError", said=val)


@pytest.mark.parametrize("label", [b"cat", b"-1", b"1.0", b"", b"\xff"], ids=repr)
def test_a_label_that_is_no_number_is_named(
    tmp_path: Path, make_shard: Callable[..., Path], refuse: Refuse, label: bytes
) -> None:
    shard = make_shard("a", [("first", {"png": digit_like(0, 0), "cls": label})])
    said = "a.tar: sample 'first': its label is .*; a class number from 0 is wanted"
    refuse("train", "--out", tmp_path / "run", "--labeled", shard, *FEW, kind="LabelError", said=said)


def test_teacher_and_labels_of_different_classes_are_refused(
    tmp_path: Path, corpus: Path, make_shard: Callable[..., Path], refuse: Refuse
) -> None:
    """Five classes in the store, labels up to 9: a student of five outputs can't learn them."""
    store = _annotated(corpus / "unlabeled", make_model(tmp_path / "five", classes=5), tmp_path / "store")
    ten = make_shard("ten", [(f"{label}", {"png": digit_like(0, 0), "cls": b"%d" % label}) for label in range(10)])
    data = ("--labeled", ten, "--unlabeled", corpus / "unlabeled", "--labels", store)
    train = ("train", "--out", tmp_path / "run", *data, *FEW)
    refuse(*train, kind="LabelError", said="sample '5': its label is 5, but there are 5 classes")
    refuse(*train, "--num-classes", 10, kind="StoreMismatch", said="its teacher has 5 classes, 10 are asked for")
    model = make_model(tmp_path / "four")
    evaluate = ("evaluate", model, corpus / "val", "--labels", store)
    refuse(*evaluate, kind="StoreMismatch", said="its labels have 5 classes, the model has 4")


def test_data_that_can_not_be_trained_on(tmp_path: Path, corpus: Path, store: Path, refuse: Refuse) -> None:
    train = ("train", "--out", tmp_path / "run", *FEW)
    labeled, unlabeled = ("--labeled", corpus / "labeled"), ("--unlabeled", corpus / "unlabeled")
    refuse(*train, kind="LabelError", said="nothing to train on: give --labeled")
    refuse(*train, *unlabeled, kind="LabelError", said="annotate them and pass the store as --labels")
    refuse(*train, *labeled, "--labels", store, kind="LabelError", said="pass them as --unlabeled")
    both = ("--labeled", corpus / "unlabeled", *unlabeled, "--labels", store)
    refuse(*train, *both, kind="LabelError", said="given both|has no label")
    refuse(*train, *labeled, *unlabeled, "--labels", tmp_path / "no", kind="StoreError", said="no store here")
    refuse(*train, *labeled, "--classes", tmp_path / "no.txt", kind="RecipeError", said="can't read class names")
    assert not (tmp_path / "run").exists()


# --- stores


def test_a_store_goes_on_with_its_own_teacher_and_settings_only(
    tmp_path: Path, corpus: Path, store: Path, teacher_dir: Path, refuse: Refuse, answer: Callable[..., dict[str, Any]]
) -> None:
    """Another teacher, encoding or precision is refused, and what differs is named."""
    more = corpus / "val"
    go_on = ("annotate", more, "--out", store, "--workers", 1)
    own, other = (f"checkpoint:{path}" for path in (teacher_dir, make_model(tmp_path / "other", seed=1)))
    before = {path: path.read_bytes() for path in store.rglob("*.*")}
    said = "teacher.weights_sha256: the store has .*, this run "
    refuse(*go_on, "--teacher", other, kind="StoreMismatch", said=said)
    refuse(*go_on, "--teacher", own, "--teacher", other, kind="StoreMismatch", said="teacher.*the store has")
    said = 'encoding: the store has "dense", this run "topk:2"'
    refuse(*go_on, "--teacher", own, "--encoding", "topk:2", kind="StoreMismatch", said=said)
    said = 'precision: the store has "fp32", this run "bf16"'
    refuse(*go_on, "--teacher", own, "--precision", "bf16", kind="StoreMismatch", said=said)
    assert {path: path.read_bytes() for path in store.rglob("*.*")} == before
    found = answer(*go_on, "--teacher", own)
    assert (found["parts_written"], found["samples"]) == (1, 24)
    found = answer("annotate", corpus / "unlabeled", more, "--out", store, "--workers", 1, "--teacher", own)
    assert (found["parts_written"], found["parts_skipped"], found["samples"]) == (0, 4, 96)


@pytest.mark.parametrize(
    ("option", "value", "kind", "said"),
    [
        ("--encoding", "topk:0", "SpecError", "'topk:0' is not an encoding; write dense or topk:K"),
        ("--encoding", "topk:99", "SpecError", "topk:99: the teacher has only 4 classes"),
        ("--encoding", "sparse", "SpecError", "'sparse' is not an encoding"),
        ("--precision", "fp8", "RecipeError", "precision: Input should be 'auto', 'fp32', 'bf16' or 'fp16'"),
        ("--slice", "4/4", "ShardListError", "--slice '4/4': write i/n with i from 0 to n-1"),
        ("--slice", "1", "ShardListError", "--slice '1': write i/n"),
        ("--slice", "3/4", "ShardListError", "--slice 3/4: empty, there are only 3 shards"),
        ("--device", "tpu", "SpecError", "--device tpu: not usable here"),
    ],
)
def test_annotate_refuses_nonsense_before_it_makes_a_store(
    tmp_path: Path, corpus: Path, teacher_dir: Path, refuse: Refuse, option: str, value: str, kind: str, said: str
) -> None:
    out = tmp_path / "store"
    command = ("annotate", corpus / "unlabeled", "--teacher", f"checkpoint:{teacher_dir}", "--out", out)
    refuse(*command, option, value, kind=kind, said=said)
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_a_clear_error(
    tmp_path: Path, corpus: Path, teacher_dir: Path, refuse: Refuse
) -> None:
    said = "--device cuda: not usable here: .*; write auto, cpu, cuda"
    store, run = tmp_path / "store", tmp_path / "run"
    annotating = ("annotate", corpus / "unlabeled", "--teacher", f"checkpoint:{teacher_dir}", "--out", store)
    refuse(*annotating, "--device", "cuda", kind="SpecError", said=said)
    training = ("train", "--out", run, "--labeled", corpus / "labeled", *SMALL)
    refuse(*training, "--device", "cuda", kind="SpecError", said=said)
    refuse("evaluate", teacher_dir, corpus / "val", "--device", "cuda", kind="SpecError", said=said)
    assert not store.exists()
    assert not run.exists()


def test_too_many_rejects_name_the_worst_shard(
    tmp_path: Path, make_shard: Callable[..., Path], teacher_dir: Path, refuse: Refuse
) -> None:
    make_shard("good", [("a", {"png": digit_like(0, 0)}), ("b", {"png": digit_like(1, 0)})])
    bad = make_shard("bad", [("a", {"png": b"no image"}), ("b", {"png": digit_like(1, 0)})])
    command = ("annotate", bad.parent, "--teacher", f"checkpoint:{teacher_dir}", "--out", tmp_path / "store")
    said = r"1 of 4 samples were rejected.*\nthe worst shard is .*bad.tar: 1 of 2"
    refuse(*command, "--workers", 1, kind="TooManyRejects", said=said)


def test_an_unlabeled_shard_without_soft_labels_is_refused(
    tmp_path: Path, corpus: Path, store: Path, refuse: Refuse
) -> None:
    (store / "parts" / "unlabeled-1.parquet").unlink()
    said = r"unlabeled-1.tar: not annotated in .*; run `pseudolabel annotate`"
    refuse(*_distill(corpus, store, tmp_path / "run"), kind="StoreMismatch", said=said)


def test_a_shard_of_which_one_pixel_changed_is_refused(
    tmp_path: Path, make_shard: Callable[..., Path], teacher_dir: Path, refuse: Refuse, invoke: Invoke
) -> None:
    """Same size, same keys, a valid image: only the content tells that the labels are of another one."""
    pixels = [bytes([40 * index + 10]) * 144 for index in range(4)]
    samples = [(f"{index}", {"pgm": b"P5 12 12 255\n" + one}) for index, one in enumerate(pixels)]
    shard = make_shard("one", samples)
    store = _annotated(shard, teacher_dir, tmp_path / "store")
    size = shard.stat().st_size
    samples[2][1]["pgm"] = samples[2][1]["pgm"][:-1] + b"\0"
    make_shard("one", samples)
    assert shard.stat().st_size == size
    assert [sample.key for sample in read_samples(list_shards(shard)[0])] == ["0", "1", "2", "3"]
    train = ("train", "--out", tmp_path / "run", "--unlabeled", shard, "--labels", store, *FEW, "--steps", 2)
    refuse(
        *train, kind="StoreMismatch", said="one.tar: its content is not what was annotated .*\nput the old shard back"
    )
    code, out, _ = invoke("verify", store, "--shards", shard, "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)
    assert json.loads(out)["problems"][0]["kind"] == "StoreMismatch"


def test_two_shards_renamed_to_each_other_are_refused(
    tmp_path: Path, corpus: Path, store: Path, refuse: Refuse, invoke: Invoke
) -> None:
    first, second, aside = (corpus / "unlabeled" / name for name in ("unlabeled-0.tar", "unlabeled-1.tar", "aside"))
    for old, new in ((first, aside), (second, first), (aside, second)):
        old.rename(new)
    said = "unlabeled-0.tar: its content is not what was annotated"
    refuse(*_distill(corpus, store, tmp_path / "run"), kind="StoreMismatch", said=said)
    code, out, err = invoke("verify", store, "--shards", corpus / "unlabeled", "--json")
    assert code == 1
    assert [one["part"] for one in json.loads(out)["problems"]] == ["unlabeled-0", "unlabeled-1"]
    assert "unlabeled-0.tar" in err


def test_two_parts_renamed_to_each_other_are_refused(tmp_path: Path, corpus: Path, store: Path, refuse: Refuse) -> None:
    parts = store / "parts"
    for old, new in (("unlabeled-0", "x"), ("unlabeled-1", "unlabeled-0"), ("x", "unlabeled-1")):
        (parts / f"{old}.parquet").rename(parts / f"{new}.parquet")
    said = "holds the labels of shard 'unlabeled-1', not 'unlabeled-0'"
    refuse(*_distill(corpus, store, tmp_path / "run"), kind="StoreMismatch", said=said)
    refuse("inspect", store, kind="StoreMismatch", said=said)


def _truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def _flip(content: bytes) -> bytes:
    """One bit that changes soft labels; Parquet's own reader takes the file without a complaint."""
    whole = pq.read_table(io.BytesIO(content))
    for place in range(len(content)):
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        try:
            found = pq.read_table(io.BytesIO(flipped))
        except (pa.ArrowException, OSError):
            continue
        if found.schema == whole.schema and found.num_rows == whole.num_rows and found["logits"] != whole["logits"]:
            return flipped
    raise AssertionError("no such bit")


@pytest.mark.parametrize("damage", [_truncate, _flip])
def test_a_damaged_part_is_refused_by_train_and_reported_by_verify(
    tmp_path: Path, corpus: Path, store: Path, refuse: Refuse, invoke: Invoke, damage: Callable[[bytes], bytes]
) -> None:
    part = store / "parts" / "unlabeled-1.parquet"
    part.write_bytes(damage(part.read_bytes()))
    said = r"unlabeled-1.parquet: this file of the store is damaged: .*\ndelete it and run the same annotate again"
    refuse(*_distill(corpus, store, tmp_path / "run", steps=20), kind="DamagedPart", said=said)
    code, out, err = invoke("verify", store, "--json")
    result = json.loads(out)
    assert (code, result["ok"], result["parts"], result["rows"]) == (1, False, 3, 48)
    assert [(one["part"], one["kind"]) for one in result["problems"]] == [("unlabeled-1", "DamagedPart")]
    assert "unlabeled-1.parquet" in err
    code, out, _ = invoke("verify", store)
    assert code == 1
    assert re.search(r"^ok +False$", out, re.MULTILINE)
    if damage is _truncate:  # inspect reads footers alone
        refuse("inspect", store, kind="DamagedPart", said=said)
    part.unlink()
    code, _, _ = invoke("verify", store)
    assert code == 0, "a shard without a part is unfinished, not damaged"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "can't be read"),
        (b"{}", "can't be read"),
        (b'{"format_version": 2}', "format version 2, this version reads 1"),
        (None, "was edited, its fingerprint no longer fits"),
    ],
)
def test_a_damaged_store_is_refused(store: Path, refuse: Refuse, content: bytes | None, said: str) -> None:
    path = store / "store.json"
    path.write_bytes(path.read_bytes().replace(b'"class 0"', b'"class O"') if content is None else content)
    refuse("inspect", store, kind="StoreError", said=said)
    refuse("verify", store, kind="StoreError", said=said)


# --- training and evaluating


@pytest.mark.parametrize(
    ("args", "kind", "said"),
    [
        (("--alpha", 2), "RecipeError", r"alpha: .*less than or equal to 1 \(it is 2.0\)"),
        (("--temperature", 0), "RecipeError", r"temperature: .*greater than or equal to 0.01 \(it is 0.0\)"),
        (("--temperature", "inf"), "RecipeError", "temperature: .*finite"),
        (("--epochs", "inf"), "RecipeError", "epochs: .*finite"),
        (("--lr", "nan"), "RecipeError", "lr: "),
        (("--loss", "kdd"), "RecipeError", r"loss: Input should be 'kd' or 'hard' \(it is \"kdd\"\)"),
        (("--crop", "centre"), "RecipeError", "augment.crop: Input should be 'pad', 'resized' or 'none'"),
        (("--steps", 3, "--epochs", 1), "RecipeError", "give steps or epochs, not both"),
        (("--steps", 0), "RecipeError", "steps: "),
        (("--channels", 2), "RecipeError", "channels: Input should be 1 or 3"),
        (("--student", "small:resnet9"), "SpecError", r"no small student 'resnet9' \(did you mean 'resnet8'\?\)"),
        (("--student", "resnet8"), "SpecError", "'resnet8' is not a spec"),
        (("--student", "python:json:loads"), "SpecError", "loads\\(\\) .*argument"),
        (("--precision", "fp16"), "SpecError", "--precision fp16 needs a GPU"),
    ],
)
def test_train_refuses_nonsense(
    tmp_path: Path, corpus: Path, refuse: Refuse, args: tuple[object, ...], kind: str, said: str
) -> None:
    refuse("train", "--out", tmp_path / "run", "--labeled", corpus / "labeled", *FEW, *args, kind=kind, said=said)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_directory_with_another_run_is_left_alone(
    tmp_path: Path, corpus: Path, refuse: Refuse, answer: Callable[..., dict[str, Any]]
) -> None:
    """The same command returns what is there; another one is refused unless it may overwrite."""
    run = tmp_path / "run"
    train = ("train", "--out", run, "--labeled", corpus / "labeled", *FEW)
    first = answer(*train, "--steps", 2)
    content = {path.name: path.read_bytes() for path in run.iterdir()}
    assert answer(*train, "--steps", 2) == first
    said = "holds a run that differs from this one .*steps: 2 there, 3 now.*\n.*--overwrite"
    refuse(*train, "--steps", 3, kind="OutputExists", said=said)
    other = ("--labeled", corpus / "labeled", corpus / "val")
    refuse(
        "train", "--out", run, *other[:1], corpus / "val", *FEW, "--steps", 2, kind="OutputExists", said=r"\(labeled"
    )
    assert {path.name: path.read_bytes() for path in run.iterdir()} == content
    assert answer(*train, "--steps", 3, "--overwrite")["steps"] == 3
    assert json.loads((run / "run.json").read_text())["result"]["steps"] == 3


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path: Path, corpus: Path, refuse: Refuse) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train = ("train", "--out", tmp_path / "run", "--labeled", corpus / "labeled", *FEW, "--steps", 1)
    for more in ((), ("--overwrite",)):
        refuse(*train, *more, kind="OutputExists", said="holds 'notes.txt', which is not of a training run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_an_output_that_can_not_be_written_is_named(
    tmp_path: Path, corpus: Path, teacher_dir: Path, refuse: Refuse
) -> None:
    """A file in the place of a directory: no permission would stop root."""
    blocked = tmp_path / "file"
    blocked.write_text("mine")
    annotating = ("annotate", corpus / "unlabeled", "--teacher", f"checkpoint:{teacher_dir}", "--workers", 1)
    training = ("train", "--labeled", corpus / "labeled", *FEW, "--steps", 1)
    for out in (blocked, blocked / "below"):
        refuse(*annotating, "--out", out, kind="StorageError", said=f"{out}")
    refuse(*training, "--out", blocked / "below", kind="StorageError", said=f"{blocked}")
    for more in ((), ("--overwrite",)):
        refuse(*training, "--out", blocked, *more, kind="OutputExists", said=f"{blocked}: is a file")
    assert blocked.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_named(tmp_path: Path, corpus: Path, teacher_dir: Path, refuse: Refuse) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    out = tmp_path / "locked" / "out"
    said = "locked.*Permission denied\nchoose a place you may write to"
    annotating = ("annotate", corpus / "unlabeled", "--teacher", f"checkpoint:{teacher_dir}", "--out", out)
    refuse(*annotating, "--workers", 1, kind="StorageError", said=said)
    refuse("train", "--labeled", corpus / "labeled", *FEW, "--out", out, kind="StorageError", said=said)


def test_flags_go_over_a_recipes_train_table(
    tmp_path: Path, corpus: Path, answer: Callable[..., dict[str, Any]]
) -> None:
    """Also --steps over its epochs, and one flag of its augment table over the others."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[train]\nstudent = "small:resnet8?width=4"\nimage_size = 12\nchannels = 1\nepochs = 50\nlr = 0.5\n'
        'batch_size = 8\naugment = { crop = "none", erasing = 0.5 }\n'
    )
    command = ("train", "--labeled", corpus / "labeled", "--recipe", recipe, "--out", tmp_path / "run", *HERE)
    assert answer(*command, "--steps", 2, "--lr", 0.01, "--no-flip")["steps"] == 2
    written = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]["settings"]
    assert (written["steps"], written["epochs"], written["lr"], written["batch_size"]) == (2, None, 0.01, 8)
    assert (written["augment"]["crop"], written["augment"]["flip"], written["augment"]["erasing"]) == (
        "none",
        False,
        0.5,
    )
    again = ("train", "--labeled", corpus / "labeled", "--recipe", tmp_path / "run" / "recipe.toml", *HERE)
    assert answer(*again, "--out", tmp_path / "run")["steps"] == 2, "a run's own recipe.toml is that run"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train = 5", r"has no \[train\] table"),
        ("[[train]]\nsteps = 5", r"has no \[train\] table"),
        ("[data]\nlabeled = 'x'", r"has no \[train\] table"),
        ("[train]\naugment = 5", r"augment: Input should be a table \(it is 5\)"),
        ("[train]\nstep = 5", r"unknown key 'step' \(did you mean 'steps'\?\)"),
        ("[train", "not valid TOML"),
    ],
)
def test_a_recipe_without_a_train_table_is_refused(
    tmp_path: Path, corpus: Path, refuse: Refuse, text: str, said: str
) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    command = (
        "train",
        "--labeled",
        corpus / "labeled",
        "--recipe",
        tmp_path / "recipe.toml",
        "--out",
        tmp_path / "run",
    )
    refuse(*command, kind="RecipeError", said=f"^{tmp_path / 'recipe.toml'}(.|\n)*{said}")


def test_evaluate_needs_a_model(tmp_path: Path, corpus: Path, refuse: Refuse) -> None:
    refuse("evaluate", corpus, corpus / "val", kind="DamagedModel", said="no model here")
    model = make_model(tmp_path / "model")
    (model / "model.safetensors").write_bytes(_truncate((model / "model.safetensors").read_bytes()))
    refuse("evaluate", model, corpus / "val", kind="DamagedModel", said="these weights don't load")


def test_evaluate_measures_a_model_and_its_agreement_with_a_store(
    tmp_path: Path, corpus: Path, answer: Callable[..., dict[str, Any]], refuse: Refuse
) -> None:
    """A teacher agrees with its own store in every row, over several shards; another model doesn't."""
    teacher = tmp_path / "teacher"
    answer("train", "--out", teacher, "--labeled", corpus / "labeled", *FEW, "--steps", 30)
    store = _annotated(corpus / "labeled", teacher, tmp_path / "store")
    said = "val-0.tar: not annotated in"
    refuse("evaluate", teacher, corpus / "val", "--labels", store, kind="StoreMismatch", said=said)
    _annotated(corpus / "val", teacher, store)
    shards = (corpus / "labeled", corpus / "val", "--labels", store, "--device", "cpu")
    own = answer("evaluate", teacher, *shards)
    other = answer("evaluate", make_model(tmp_path / "m", seed=3), *shards, "--batch-size", 5)
    assert own["agreement"] == 1.0 > other["agreement"]
    assert own["accuracy"] > 0.5, "with one class for all images, agreement would show nothing"
    for found in (own, other):
        assert found["accuracy"] == sum(row[index] for index, row in enumerate(found["confusion"])) / 48
        assert found["per_class"] == [row[index] / 12 for index, row in enumerate(found["confusion"])]


def test_people_read_results_on_stdout(corpus: Path, teacher_dir: Path, store: Path, invoke: Invoke) -> None:
    """Without --json nothing else may be needed."""
    code, out, _ = invoke("inspect", store)
    assert code == 0
    assert re.search(r"^rows +72$", out, re.MULTILINE)
    code, out, _ = invoke("evaluate", teacher_dir, corpus / "val", "--device", "cpu")
    assert code == 0
    assert re.search(r"^accuracy +0\.\d{4}$", out, re.MULTILINE)
    assert "class 3" in out
    command = ("annotate", corpus / "unlabeled", "--teacher", f"checkpoint:{teacher_dir}", "--out", store)
    code, out, _ = invoke(*command, "--workers", 1)
    assert code == 0
    assert re.search(r"^parts skipped +3$", out, re.MULTILINE)


def test_what_a_users_teacher_prints_does_not_get_between_the_json(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, invoke: Invoke
) -> None:
    """`python:` teachers and their libraries print to stdout as they like."""
    (tmp_path / "talking_teacher.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef make():\n    print('loading', flush=True)\n"
        "    torch.manual_seed(0)\n"
        "    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 4))\n"
        "    model.preprocessing = {'resize': 12, 'crop': 12, 'mean': [0.5], 'std': [0.5]}\n    return model\n"
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    command = ("annotate", corpus / "unlabeled", "--teacher", "python:talking_teacher:make", "--out", "store")
    code, out, err = invoke(*command, "--workers", 1, "--json")
    assert code == 0, err
    assert json.loads(out)["samples"] == 72
    assert "loading" in err


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
