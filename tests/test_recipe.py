"""Recipes: what is accepted, and that every mistake is named where it is, with the nearest that exists."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pseudolabel.errors import RecipeError
from pseudolabel.recipe import Recipe, load_recipe, read_tables, validate
from pseudolabel.settings import AnnotateSettings, TrainSettings

PIPELINES = Path(__file__).parent.parent / "pipelines"
TEXT = """
[data]
labeled = "labeled"
unlabeled = ["unlabeled/a", "unlabeled/b-{00..03}.tar"]
val = "val"

[teacher]
specs = ["checkpoint:one@0.7", "checkpoint:two"]

[annotate]
encoding = "topk:3"

[train]
student = "small:resnet8?width=4"
steps = 20
lr = 1e-3
augment = { crop = "none", erasing = 0.25 }

[rounds]
count = 2
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(TEXT)
    return path


def _refused(path: Path, *overrides: str) -> str:
    """The message of the refusal: it begins with the file, fits five lines, and is no Python."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) <= 5
    assert message.startswith((str(path), "--set"))
    assert "pydantic" not in message
    return message


def test_values_and_defaults(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    assert recipe.data.unlabeled == ("unlabeled/a", "unlabeled/b-{00..03}.tar")
    assert recipe.data.test is None
    assert recipe.teacher.specs == ("checkpoint:one@0.7", "checkpoint:two")
    assert recipe.annotate == AnnotateSettings(encoding="topk:3", batch_size=None)
    assert (recipe.train.steps, recipe.train.epochs, recipe.train.lr) == (20, None, 1e-3)
    assert (recipe.train.augment.crop, recipe.train.augment.flip, recipe.train.augment.erasing) == ("none", True, 0.25)
    assert (recipe.rounds.count, recipe.rounds.control) == (2, True)


def test_a_recipe_is_frozen(recipe_file: Path) -> None:
    """Its fingerprint is taken once; a later change would go unseen."""
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe(recipe_file).train.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "key", "meant"),
    [
        ("trian.steps=5", "trian", "train"),
        ("data.lableled=x", "data.lableled", "labeled"),
        ("teacher.spec=x", "teacher.spec", "specs"),
        ("annotate.encodng=dense", "annotate.encodng", "encoding"),
        ("train.temprature=3", "train.temprature", "temperature"),
        ("train.augment.cropp=pad", "train.augment.cropp", "crop"),
        ("teacher.train.stepz=4", "teacher.train.stepz", "steps"),
        ("teacher.train.augment.flipp=true", "teacher.train.augment.flipp", "flip"),
        ("rounds.cuont=2", "rounds.cuont", "count"),
    ],
)
def test_an_unknown_key_names_its_place_and_the_nearest_known(
    recipe_file: Path, override: str, key: str, meant: str
) -> None:
    assert f"unknown key {key!r} (did you mean {meant!r}?); known are" in _refused(recipe_file, override)


def test_a_key_like_nothing_else_lists_what_is_known(recipe_file: Path) -> None:
    message = _refused(recipe_file, "rounds.zzz=1")
    assert "did you mean" not in message
    assert "known are count, control, max_reject_fraction" in message


def test_an_unknown_key_that_is_called_like_a_type_is_still_named(recipe_file: Path) -> None:
    assert "unknown key 'train.str'" in _refused(recipe_file, "train.str=1")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=many", 'train.steps: must be a valid integer (it is "many")'),
        ("train.steps=1.5", "train.steps: .*(it is 1.5)"),
        ("train.steps=0", "train.steps: .*greater than or equal to 1 (it is 0)"),
        ("train.steps=[1, 2]", "train.steps: .*(it is [1, 2])"),
        ("train.epochs=0", "train.epochs: .*greater than 0"),
        ("train.alpha=1.5", "train.alpha: .*less than or equal to 1 (it is 1.5)"),
        ("train.alpha=-0.1", "train.alpha: .*greater than or equal to 0"),
        ("train.temperature=0", "train.temperature: .*greater than or equal to 0.01 (it is 0)"),
        ("train.labeled_fraction=1.01", "train.labeled_fraction: "),
        ("train.ema=1", "train.ema: .*less than 1"),
        ("train.seed=-1", "train.seed: "),
        ("train.channels=2", "train.channels: must be 1 or 3 (it is 2)"),
        ("train.image_size=7", "train.image_size: "),
        ("train.tail=even", "train.tail: must be 'bucket' or 'uniform' (it is \"even\")"),
        ("train.optimizer=adam", "train.optimizer: must be 'adamw' or 'sgd'"),
        ("train.precision=fp64", "train.precision: "),
        ("train.augment.crop=centre", "train.augment.crop: "),
        ("train.augment.randaugment=31", "train.augment.randaugment: "),
        ("annotate.batch_size=0", "annotate.batch_size: "),
        ("rounds.count=0", "rounds.count: "),
        ("rounds.max_reject_fraction=2", "rounds.max_reject_fraction: "),
        ("train=5", "train: must be a table (it is 5)"),
        ("train.augment=pad", 'train.augment: must be a table (it is "pad")'),
        ("teacher.specs=checkpoint:x", 'teacher.specs: must be a list (it is "checkpoint:x")'),
        ("data.labeled=5", "data.labeled: must be a list (it is 5)"),
        ("data.labeled=[1]", "data.labeled.0: must be a valid string (it is 1)"),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_wanted(recipe_file: Path, override: str, said: str) -> None:
    message = _refused(recipe_file, override)
    before, _, after = said.partition(".*")
    assert before in message
    assert after in message[message.index(before) + len(before) :]


@pytest.mark.parametrize("name", ["lr", "epochs", "temperature", "weight_decay", "clip_norm"])
@pytest.mark.parametrize("value", ["inf", "nan"])
def test_no_number_is_infinite_or_nan(recipe_file: Path, name: str, value: str) -> None:
    """TOML can write inf: epochs = inf ended in an OverflowError, lr = inf in a diverged run."""
    assert f"train.{name}: " in _refused(recipe_file, "train.steps=5", f"train.{name}={value}")


def test_a_seed_that_torch_can_not_take_is_refused(recipe_file: Path) -> None:
    assert "train.seed" in _refused(recipe_file, f"train.seed={1 << 64}")


def test_every_missing_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("")
    message = _refused(tmp_path / "empty.toml")
    assert [line.strip() for line in message.splitlines()[1:]] == [
        "'data' is missing",
        "'teacher' is missing",
        "'train' is missing",
    ]


def test_a_table_that_lacks_a_key_names_it(recipe_file: Path) -> None:
    recipe_file.write_text(TEXT.replace('val = "val"\n', ""))
    assert "'data.val' is missing" in _refused(recipe_file)


def test_many_mistakes_still_fit_five_lines(recipe_file: Path) -> None:
    wrong = [f"train.{name}=-1" for name in ("steps", "alpha", "temperature", "lr", "batch_size", "seed")]
    assert len(_refused(recipe_file, *wrong).splitlines()) == 5


def test_steps_and_epochs_are_not_given_together(recipe_file: Path) -> None:
    assert "train: give steps or epochs, not both" in _refused(recipe_file, "train.epochs=2")
    assert "teacher.train: give steps or epochs" in _refused(
        recipe_file, "teacher.specs=[]", "teacher.train.epochs=2", "teacher.train.steps=2"
    )


def test_a_teacher_has_one_origin(recipe_file: Path) -> None:
    trained = load_recipe(recipe_file, ["teacher.specs=[]", "teacher.train.steps=7"]).teacher
    assert trained.specs == ()
    assert trained.train is not None
    assert trained.train.steps == 7
    assert "teacher: give either specs" in _refused(recipe_file, "teacher.specs=[]")
    assert "teacher: give either specs" in _refused(recipe_file, "teacher.train.steps=7")


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("train.steps=200", {"steps": 200}),
        ("train.lr=4e-3", {"lr": 0.004}),
        (" train . lr = 0.5", {"lr": 0.5}),
        ("train.student=small:resnet14?width=8&stem_stride=2", {"student": "small:resnet14?width=8&stem_stride=2"}),
        ('train.student="small:resnet20"', {"student": "small:resnet20"}),
    ],
)
def test_an_override_is_toml_or_bare_text(recipe_file: Path, override: str, wanted: dict[str, Any]) -> None:
    assert load_recipe(recipe_file, [override]).train == load_recipe(recipe_file).train.model_copy(update=wanted)


def test_overrides_reach_nested_tables_lists_and_tables_that_are_not_there(recipe_file: Path) -> None:
    recipe_file.write_text(TEXT.replace("[rounds]\ncount = 2\n", ""))
    overrides = ["train.augment.flip=false", 'data.val=["a", "b"]', "data.test=t.tar", "rounds.control=false"]
    recipe = load_recipe(recipe_file, overrides)
    assert recipe.train.augment.flip is False
    assert recipe.train.augment.erasing == 0.25
    assert (recipe.data.val, recipe.data.test) == (("a", "b"), "t.tar")
    assert (recipe.rounds.count, recipe.rounds.control) == (1, False)


def test_the_last_override_wins(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["train.steps=3", "train.steps=4"]).train.steps == 4


@pytest.mark.parametrize("override", ["train", "train.steps", "=5", "train.=5", ".steps=5", "train..steps=5", ""])
def test_an_override_that_is_no_assignment_is_refused_with_an_example(recipe_file: Path, override: str) -> None:
    message = _refused(recipe_file, override)
    assert f"--set {override!r}: write table.key=value, such as train.steps=200" in message


def test_an_override_below_a_value_is_refused(recipe_file: Path) -> None:
    message = _refused(recipe_file, "train.steps.more=5")
    assert "--set 'train.steps.more=5': 'steps' is a value, not a table" in message


@pytest.mark.parametrize("text", ["[data\n", "a = 1\na = 2\n", "steps: 5\n"])
def test_text_that_is_no_toml_names_the_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    message = _refused(path)
    assert "not valid TOML" in message
    assert "line" in message


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe\x00")
    assert "not valid TOML" in _refused(tmp_path / "bad.toml")


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    assert "No such file or directory; check the path" in _refused(tmp_path / "no.toml")
    assert "Is a directory; check the path" in _refused(tmp_path)


@pytest.mark.parametrize(
    "path", [PIPELINES / f"{name}.toml" for name in ("fashion_mnist", "from_labels_alone")], ids=lambda path: path.stem
)
def test_a_bundled_pipeline_loads_and_its_classes_are_there(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.data.classes is not None
    assert len((PIPELINES.parent / recipe.data.classes).read_text().splitlines()) == 10
    assert recipe.train.input_size == 28
    assert recipe.rounds.control


def test_there_are_bundled_pipelines() -> None:
    assert {path.stem for path in PIPELINES.glob("*.toml")} >= {"fashion_mnist", "from_labels_alone"}


def _round_trip(path: Path, recipe: Recipe) -> Recipe:
    path.write_text(tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True)))
    return load_recipe(path)


@pytest.mark.parametrize("path", sorted(PIPELINES.glob("*.toml")), ids=lambda path: path.stem)
def test_a_resolved_pipeline_loads_to_an_equal_one(tmp_path: Path, path: Path) -> None:
    """`run` keeps the resolved recipe and compares it when it goes on."""
    recipe = load_recipe(path, ["train.lr=0.1", "data.val=['x', 'y']"])
    assert _round_trip(tmp_path / "resolved.toml", recipe) == recipe


@given(
    lr=st.floats(1e-12, 10, allow_subnormal=False),
    epochs=st.one_of(st.none(), st.floats(1e-3, 1e3), st.integers(1, 5)),
    student=st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=20),
    seed=st.integers(0, (1 << 63) - 1),
)
def test_any_resolved_recipe_loads_to_an_equal_one(
    tmp_path_factory: pytest.TempPathFactory, lr: float, epochs: float | None, student: str, seed: int
) -> None:
    """Awkward floats, and text with quotes, newlines and control characters, survive TOML."""
    train = {"lr": lr, "student": student, "seed": seed, **({} if epochs is None else {"epochs": epochs})}
    data = {"labeled": student, "unlabeled": [student, "b"], "val": "v"}
    recipe = validate(Recipe, {"data": data, "teacher": {"specs": [student]}, "train": train}, "here")
    assert _round_trip(tmp_path_factory.getbasetemp() / "resolved.toml", recipe) == recipe


def test_tables_are_read_without_being_validated(tmp_path: Path) -> None:
    """`train --recipe` takes a file that holds a train table alone, such as a run's recipe.toml."""
    path = tmp_path / "recipe.toml"
    path.write_text("[train]\nsteps = 3\n")
    assert read_tables(path, ["train.lr=1"]) == {"train": {"steps": 3, "lr": 1}}


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        (TrainSettings(), 32),
        (TrainSettings(student="torchvision:resnet18"), 224),
        (TrainSettings(student="torchvision:resnet18", image_size=64), 64),
    ],
)
def test_the_usual_input_size_depends_on_the_student(settings: TrainSettings, size: int) -> None:
    assert settings.input_size == size


def test_what_is_not_given_is_as_usual_for_the_optimizer() -> None:
    given, sgd = TrainSettings(optimizer="sgd", lr=0.3), TrainSettings(optimizer="sgd")
    assert (TrainSettings().lr, TrainSettings().weight_decay) == (2e-3, 0.05)
    assert (sgd.lr, sgd.weight_decay) == (0.1, 5e-4)
    assert (given.lr, given.weight_decay) == (0.3, 5e-4)
    assert TrainSettings.model_validate(given.model_dump()) == given


def test_values_that_are_at_the_limit_are_accepted() -> None:
    settings = TrainSettings(alpha=1, labeled_fraction=0, ema=0, clip_norm=0, weight_decay=0, image_size=8)
    assert (settings.alpha, settings.labeled_fraction, settings.ema) == (1.0, 0.0, 0.0)
    assert math.isfinite(settings.lr)


def test_true_is_no_number() -> None:
    """It became a learning rate of 1."""
    for kind, value in ((TrainSettings, {"student": "small:resnet8", "lr": True}), (AnnotateSettings, {"views": True})):
        with pytest.raises(ValidationError, match="must be a number, not true or false"):
            kind(**value)
