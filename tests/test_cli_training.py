"""The commands train and evaluate: settings, outputs, results."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import FEW, HERE, Invoke, Refuse, annotated, truncate
from conftest import Cli, image_bytes, make_model

from pseudolabel.precision import resolve_precision
from pseudolabel.shards import write_shard


@pytest.mark.parametrize(
    ("args", "kind", "said"),
    [
        (("--alpha", 2), "RecipeError", r"alpha: .*less than or equal to 1 \(it is 2.0\)"),
        (("--temperature", 0), "RecipeError", r"temperature: .*greater than or equal to 0.01 \(it is 0.0\)"),
        (("--temperature", "inf"), "RecipeError", "temperature: .*finite"),
        (("--epochs", "inf"), "RecipeError", "epochs: .*finite"),
        (("--epochs", "1e308"), "RecipeError", r"epochs: .*less than or equal to 1000000"),
        (("--steps", 10**30), "RecipeError", "steps: .*less than"),
        (("--lr", "nan"), "RecipeError", "lr: "),
        (("--loss", "kdd"), "SpecError", r"no loss 'kdd' \(did you mean 'kd'\?\); known are kd, hard"),
        (("--crop", "centre"), "RecipeError", "--crop: must be 'pad', 'resized' or 'none'"),
        (("--steps", 3, "--epochs", 1), "RecipeError", "give --steps or --epochs, not both"),
        (("--steps", 0), "RecipeError", "steps: "),
        (("--channels", 2), "RecipeError", "channels: must be 1 or 3"),
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
        ("[train]\naugment = 5", r"augment: must be a table \(it is 5\)"),
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


def test_a_flag_is_told_as_a_flag_and_a_key_as_a_key(tmp_path: Path, corpus: Path, invoke: Invoke) -> None:
    """Nobody who typed --labeled-fraction looks for labeled_fraction, nor the other way round."""
    (tmp_path / "recipe.toml").write_text("[train]\nbatch_size = 1\naugment = {erasing = 3}\n")
    train = ("train", "--out", tmp_path / "run", "--labeled", corpus / "labeled")
    flags = ("--labeled-fraction", 2, "--randaugment", 99)
    code, _, err = invoke(*train, "--recipe", tmp_path / "recipe.toml", *flags)
    assert code == 1
    for said in ("  batch_size: must", "  augment.erasing: must", "  --labeled-fraction: must", "  --randaugment: "):
        assert said in err
    assert "give --steps or --epochs, not both" in invoke(*train, "--steps", 1, "--epochs", 1)[2]
    _, _, err = invoke(*train, *FEW, "--steps", 1, "--labeled-fraction", 1)
    assert "note: without --labels, --labeled-fraction have no effect" in err


def test_a_short_training_is_remarked_upon_once(tmp_path: Path, corpus: Path, invoke: Invoke) -> None:
    """Without a terminal it was said again with every line of progress, and progress itself never."""
    train = ("train", "--out", tmp_path / "run", "--labeled", corpus / "labeled", *FEW)
    _, _, err = invoke(*train, "--steps", 4, "--eval-every", 1)
    assert err.count("note: 4 steps in all are few") == 1


def test_evaluate_needs_a_model(tmp_path: Path, corpus: Path, refuse: Refuse) -> None:
    refuse("evaluate", corpus, corpus / "val", kind="DamagedModel", said="no model here")
    model = make_model(tmp_path / "model")
    (model / "model.safetensors").write_bytes(truncate((model / "model.safetensors").read_bytes()))
    refuse("evaluate", model, corpus / "val", kind="DamagedModel", said="these weights don't load")


def test_evaluate_measures_a_model_and_its_agreement_with_a_store(
    tmp_path: Path, corpus: Path, answer: Callable[..., dict[str, Any]], refuse: Refuse
) -> None:
    """A teacher agrees with its own store in every row, over several shards; another model doesn't."""
    teacher = tmp_path / "teacher"
    answer("train", "--out", teacher, "--labeled", corpus / "labeled", *FEW, "--steps", 30)
    store = annotated(corpus / "labeled", teacher, tmp_path / "store")
    said = "val-0.tar: not annotated in"
    refuse("evaluate", teacher, corpus / "val", "--labels", store, kind="StoreMismatch", said=said)
    annotated(corpus / "val", teacher, store)
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


def test_what_a_users_teacher_prints_does_not_get_between_the_json(tmp_path: Path, corpus: Path, cli: Cli) -> None:
    """`python:` teachers and their libraries print to stdout as they like, C code past Python's own stream."""
    (tmp_path / "talking_teacher.py").write_text(
        "import os, torch\nfrom torch import nn\n\n\ndef make():\n    print('loading', flush=True)\n"
        "    os.write(1, b'from below')\n"
        "    torch.manual_seed(0)\n"
        "    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 4))\n"
        "    model.preprocessing = {'resize': 12, 'crop': 12, 'mean': [0.5], 'std': [0.5]}\n    return model\n"
    )
    command = ("annotate", corpus / "unlabeled", "--teacher", "python:talking_teacher:make", "--out", "store")
    result, err = cli(*command, "--workers", 1)
    assert result["samples"] == 72
    assert "loading" in err
    assert "from below" in err


def test_labeled_shards_of_two_corpora_say_how_their_classes_differ(refuse: Refuse, tmp_path: Path) -> None:
    for name, classes in (("a", "ant\nbee\n"), ("b", "ant\ncow\n")):
        write_shard(tmp_path / name / "labeled" / f"{name}.tar", [(name, {"png": image_bytes(), "cls": b"0"})])
        (tmp_path / name / "classes.txt").write_text(classes)
    places = ("--labeled", tmp_path / "a" / "labeled", "--labeled", tmp_path / "b" / "labeled")
    said = r"a/classes.txt and \S+b/classes.txt differ \(class 1 is 'bee' and 'cow'\)\npack them together"
    refuse("train", *places, "--out", tmp_path / "run", "--device", "cpu", kind="LabelError", said=said)


def test_train_tells_what_it_does(invoke: Invoke, corpus: Path, tmp_path: Path) -> None:
    """What a user would otherwise not see: a slow precision, an idle option, a run that was finished before."""
    given = ("train", "--labeled", corpus / "labeled", "--out", tmp_path / "run", "--device", "cpu", "--workers", 0)
    student = (
        "--student",
        "small:resnet8?width=4",
        "--image-size",
        12,
        "--channels",
        1,
        "--batch-size",
        8,
        "--cache",
        "ram",
    )
    code, _, err = invoke(*given, *student, "--steps", 4, "--optimizer", "sgd", "--precision", "bf16", "--alpha", 0.5)
    assert code == 0, err
    for said in ("without --labels, --alpha have no effect", "24 images decoded once"):
        assert said in err
    assert ("no bf16" in err) == (resolve_precision("auto", "cpu") != "bf16")
    code, _, err = invoke(*given, *student, "--steps", 4, "--optimizer", "sgd", "--precision", "bf16", "--alpha", 0.5)
    assert code == 0
    assert "was finished before: nothing was done" in err
