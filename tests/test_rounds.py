"""The whole pipeline on a small corpus, and the demo's data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import Cli, make_model
from safetensors.torch import load_file

from pseudolabel.demo import load_demo_recipe, pack_bundled
from pseudolabel.display import Display
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import OutputExists, RecipeError, SpecError, StoreError
from pseudolabel.evaluate import evaluate
from pseudolabel.labels.store import open_store
from pseudolabel.place import Place
from pseudolabel.recipe import Recipe, load_recipe
from pseudolabel.report import write_report
from pseudolabel.rounds import run
from pseudolabel.run_result import RunResult, table
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import read_samples, write_shard
from pseudolabel.teachers import parse_teacher

HOW = ("warm", "born-again")
PLACE = Place(LocalEngine("cpu", 1), threads=1)
STUDENT = (
    'student = "small:resnet8?width=4"\nimage_size = 12\nchannels = 1\nbatch_size = 16\nsteps = 6\neval_every = 3\n'
)


@pytest.fixture
def recipe_file(corpus: Path, tmp_path: Path) -> Path:
    data = "".join(f'{split} = "{corpus / split}"\n' for split in ("labeled", "unlabeled", "val"))
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'[data]\n{data}test = "{corpus / "val"}"\n[teacher.train]\n{STUDENT}[train]\n{STUDENT}[rounds]\ncount = 2\n'
    )
    return path


def _run(recipe: Recipe, out: Path) -> RunResult:
    return run(recipe, out, PLACE, Display())


def test_rounds_hand_the_student_on_as_teacher(recipe_file: Path, tmp_path: Path) -> None:
    result = _run(load_recipe(recipe_file), tmp_path / "run")
    assert [row.round for row in result.rounds] == [1, 2]
    assert result.teacher is not None
    assert result.control is not None
    identities = [open_store(tmp_path / "run" / f"round-{number}" / "store").identity.teacher for number in (1, 2)]
    cards = [
        json.loads((tmp_path / "run" / name / "model.json").read_text()) for name in ("teacher", "round-1/student")
    ]
    assert [one["weights_sha256"] for one in identities] == [card["weights_sha256"] for card in cards]
    assert identities[0] != identities[1]
    names = [row["name"] for row in table(result)]
    assert names == ["teacher", "round 1", "round 2", "control"]
    for row in table(result)[:-1]:
        assert row["gain"] == pytest.approx(row["test_accuracy"] - result.control.test_accuracy)


def test_a_warm_round_starts_from_the_last_ones_student(recipe_file: Path, tmp_path: Path) -> None:
    """A learning rate near zero leaves the weights as they began."""
    still = ["train.lr=1e-9", "train.ema=0", "rounds.control=true"]
    results = {how: _run(load_recipe(recipe_file, [*still, f"rounds.init={how}"]), tmp_path / how) for how in HOW}
    assert len(results["warm"].rounds) == 2
    heads = {
        (how, name): load_file(tmp_path / how / name / "model.safetensors")["head.weight"]
        for how in HOW
        for name in ("round-1/student", "round-2/student", "control")
    }
    torch.testing.assert_close(heads["warm", "round-2/student"], heads["warm", "round-1/student"], atol=1e-6, rtol=0)
    assert (heads["born-again", "round-2/student"] - heads["warm", "round-1/student"]).abs().max() > 0.01
    for name in ("round-1/student", "control"):
        assert torch.equal(heads["warm", name], heads["born-again", name]), "neither has a round before it"
    notes = {
        (how, name): json.loads((tmp_path / how / name / "run.json").read_text())["result"]["notes"]
        for how, name in heads
    }
    assert "round-1/student, head included" in notes.pop(("warm", "round-2/student"))[0]
    assert not any(notes.values())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.loss=kdd"], "did you mean 'kd'"),
        (["train.loss=dist", "annotate.encoding=topk:2"], "needs the logits of all classes"),
        (["train.loss=dkd"], "target=teacher"),
        (["annotate.encoding=sampled:9", "train.temperature=2"], "train with --temperature 1"),
        (["train.student=small:resnet9"], "did you mean 'resnet8'"),
        (["train.student=torchvision:resnet18"], "take 3 channels"),
        (["train.student=torchvision:vit_b_16", "train.channels=3"], "image_size|input of shape"),
        (["train.replay=2"], "has 0 augmented views"),
        (["train.accumulate=9"], "leaves fewer than 2 rows"),
        (["train.precision=fp16"], "needs a GPU"),
        (["train.labeled_fraction=0", "train.label_smoothing=0.1"], "is about labeled rows"),
        (["train.class_weights=evenly"], "write none, balanced"),
    ],
)
def test_what_no_student_could_learn_from_is_refused_before_annotating(
    recipe_file: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        _run(load_recipe(recipe_file, overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_leaves_init_alone_reads_as_before(recipe_file: Path, tmp_path: Path) -> None:
    """Or else every run begun before there was such a choice would be refused as another recipe's."""
    plain, said = load_recipe(recipe_file), load_recipe(recipe_file, ["rounds.init=born-again"])
    assert plain == said
    assert plain.model_dump(mode="json")["rounds"] == {"count": 2, "control": True, "max_reject_fraction": 0.1}
    assert load_recipe(recipe_file, ["rounds.init=warm"]).model_dump()["rounds"]["init"] == "warm"
    with pytest.raises(RecipeError, match=r"rounds\.init: .*'born-again' or 'warm' \(it is \"cold\"\)"):
        load_recipe(recipe_file, ["rounds.init=cold"])


def test_the_control_takes_as_many_steps_without_soft_labels(recipe_file: Path, tmp_path: Path) -> None:
    """With epochs in the recipe: the control gets the student's number of steps, not its own epochs."""
    overrides = ["train.epochs=2", "rounds.count=1"]
    text = recipe_file.read_text().replace("[train]\n" + STUDENT, "[train]\n" + STUDENT.replace("steps = 6\n", ""))
    recipe_file.write_text(text)
    result = _run(load_recipe(recipe_file, overrides), tmp_path / "run")
    steps = [
        json.loads((tmp_path / "run" / name / "run.json").read_text())["result"]["steps"]
        for name in ("round-1/student", "control")
    ]
    assert steps[0] == steps[1] == round(2 * 72 / 14)
    identity = json.loads((tmp_path / "run" / "control" / "run.json").read_text())["identity"]
    assert identity["store"] is None
    assert result.control is not None


def test_finished_stages_are_skipped_and_another_recipe_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    first = _run(load_recipe(recipe_file), tmp_path / "run")
    stamps = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "run").rglob("*")
        if path.suffix in (".parquet", ".safetensors")
    }
    again = _run(load_recipe(recipe_file), tmp_path / "run")
    assert [row.test_accuracy for row in again.rounds] == [row.test_accuracy for row in first.rounds]
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    with pytest.raises(OutputExists, match=r"another recipe.*\n  train.lr: 0.002 there, 0.5 now\n"):
        _run(load_recipe(recipe_file, ["train.lr=0.5"]), tmp_path / "run")


def test_a_given_teacher_and_no_control(recipe_file: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "given")
    text = recipe_file.read_text().replace(
        "[teacher.train]\n" + STUDENT, f'[teacher]\nspecs = ["checkpoint:{model}"]\n'
    )
    recipe_file.write_text(text)
    result = _run(load_recipe(recipe_file, ["rounds.count=1", "rounds.control=false"]), tmp_path / "run")
    assert result.control is None
    assert result.teacher is not None
    assert result.teacher.test_accuracy is not None
    assert "gain" in table(result)[0]


def test_the_page_is_whole_and_needs_no_network(recipe_file: Path, tmp_path: Path) -> None:
    _run(load_recipe(recipe_file, ["rounds.count=1"]), tmp_path / "run")
    page = write_report(tmp_path / "run").read_text()
    assert page.count('<img src="data:image/png;base64,') == 2 * 8 + len(set(_classes_of_first_part(tmp_path)))
    assert "round 1" in page
    assert "Plotly.newPlot" in page
    assert 'src="http' not in page
    assert "<h2>Recipe</h2>" in page
    write_report(tmp_path / "run" / "round-1" / "student")
    with pytest.raises(StoreError, match="no finished run"):
        write_report(tmp_path)


def _classes_of_first_part(root: Path) -> list[int]:
    store = open_store(root / "run" / "round-1" / "store")
    preds: list[int] = store.read(store.part_names()[0])["pred"].to_pylist()
    return preds


def test_an_evaluation_is_kept_until_model_or_shards_change(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file, ["rounds.count=1", "rounds.control=false"])
    _run(recipe, tmp_path / "run")
    path = tmp_path / "run" / "evaluations" / "round-1-student.json"
    known = json.loads(path.read_text())
    assert known["samples"] == 24
    path.write_text(json.dumps({**known, "accuracy": 0.125}))
    assert _run(recipe, tmp_path / "run").rounds[0].test_accuracy == 0.125
    for spoiled in (json.dumps({**known, "accuracy": 0.125, "model": "another"}), "{torn", "[]"):
        path.write_text(spoiled)
        assert _run(recipe, tmp_path / "run").rounds[0].test_accuracy == known["accuracy"]
        assert json.loads(path.read_text()) == known


def test_a_directory_may_have_any_name(recipe_file: Path, tmp_path: Path) -> None:
    """`?`, `%` and `@0.5` mean something in the spec of the next round's teacher."""
    _run(load_recipe(recipe_file), tmp_path / "what?a=b 100%25@0.5")


def test_a_python_student_teaches_the_next_round(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe names the code, so rounds trust what it made; whoever finds the model later has to say so."""
    (tmp_path / "own_student.py").write_text(
        "from torch import nn\n"
        "def net(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.AvgPool2d(3), nn.Flatten(), nn.Linear(16 * in_channels, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe_file.write_text(recipe_file.read_text().replace("small:resnet8?width=4", "python:own_student:net"))
    result = _run(load_recipe(recipe_file, ["rounds.control=false"]), tmp_path / "run")
    assert len(result.rounds) == 2
    model, shards = tmp_path / "run" / "round-2" / "student", tmp_path / "corpus" / "val"
    with pytest.raises(SpecError, match=r"loading this model calls python:own_student:net\n.*--trust-code"):
        evaluate(model, shards)
    assert evaluate(model, shards, trust_code=True).accuracy == result.rounds[1].test_accuracy
    with pytest.raises(SpecError, match="trust_code=true"):
        parse_teacher(f"checkpoint:{model}").load(torch.device("cpu"))
    assert len(parse_teacher(f"checkpoint:{model}?trust_code=true").load(torch.device("cpu")).classes) == 4
    with pytest.raises(SpecError, match="write true or false"):
        parse_teacher(f"checkpoint:{model}?trust_code=yes")


def test_a_run_trusts_the_recipes_code_only(recipe_file: Path, tmp_path: Path) -> None:
    """A model.json that was edited to name a function had it called when the run was looked at again."""
    recipe = load_recipe(recipe_file, ["rounds.count=1"])
    _run(recipe, tmp_path / "run")
    card_path = tmp_path / "run" / "control" / "model.json"
    card = {**json.loads(card_path.read_text()), "student": "python:evil:f"}
    del card["card_sha256"]
    card["card_sha256"] = hashlib.sha256(json.dumps(card, sort_keys=True).encode()).hexdigest()
    card_path.write_text(json.dumps(card))
    (tmp_path / "run" / "evaluations" / "control.json").unlink()
    with pytest.raises(SpecError, match="loading this model calls python:evil:f"):
        _run(recipe, tmp_path / "run")


def test_a_page_shows_no_labels_of_other_images(recipe_file: Path, tmp_path: Path) -> None:
    _run(load_recipe(recipe_file, ["rounds.count=1"]), tmp_path / "run")
    write_shard(tmp_path / "corpus" / "unlabeled" / "unlabeled-0.tar", [("another", {"png": b"image"})])
    assert '<img src="data:image/png' not in write_report(tmp_path / "run").read_text()


def test_a_page_leaves_out_torn_lines_of_metrics(recipe_file: Path, tmp_path: Path) -> None:
    _run(load_recipe(recipe_file, ["rounds.count=1", "rounds.control=false"]), tmp_path / "run")
    for name in ("teacher", "round-1/student"):
        with open(tmp_path / "run" / name / "metrics.jsonl", "ab") as file:
            file.write(b'{"step": 7, "lo\xff\n[]\n')
    assert "Plotly.newPlot" in write_report(tmp_path / "run").read_text()


def test_run_as_a_command(recipe_file: Path, cli: Cli) -> None:
    args = ("--set", "rounds.count=1", "--device", "cpu", "--threads", 1, "--profile")
    result, said = cli("run", recipe_file, "--out", "run", *args)
    assert said.count("a step takes ") == 3  # teacher, student, control
    assert result["rounds"][0].keys() >= {"round", "val_accuracy", "test_accuracy"}
    assert "test_accuracy" in result["control"]
    assert (cli.cwd / "run" / "report.html").exists()
    error, _ = cli("run", recipe_file, "--out", "run", "--set", "train.temprature=3", code=1)
    assert "did you mean 'temperature'" in error["error"]["message"]


def test_the_bundled_data_is_what_the_docs_say(tmp_path: Path) -> None:
    pack_bundled(tmp_path / "shards")
    counts = {}
    for split in ("labeled", "unlabeled", "val", "test"):
        samples = [sample for shard in list_shards(tmp_path / "shards" / split) for sample in read_samples(shard)]
        counts[split] = len(samples)
        assert all(("cls" in sample.fields) == (split != "unlabeled") for sample in samples)
    assert counts == {"labeled": 500, "unlabeled": 12_000, "val": 1_000, "test": 3_500}
    before = (tmp_path / "shards" / "dataset.json").stat().st_mtime_ns
    pack_bundled(tmp_path / "shards")
    assert (tmp_path / "shards" / "dataset.json").stat().st_mtime_ns == before
    (tmp_path / "other").mkdir()
    with pytest.raises(OutputExists):
        pack_bundled(tmp_path / "other")


@pytest.mark.parametrize("name", ["fashion_mnist", "from_labels_alone"])
def test_bundled_recipes_load_with_the_demos_paths(tmp_path: Path, name: str) -> None:
    recipe = load_demo_recipe(tmp_path, name)
    assert recipe.data.test == str(tmp_path / "shards" / "test")
    assert recipe.train.steps is not None
