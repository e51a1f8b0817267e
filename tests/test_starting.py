"""--init-from: a student starts from the weights of another run, wherever they lie, or is refused by what differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import FEW, Invoke, Refuse
from object_stores import Bucket, web_server
from safetensors.torch import load_file, save_file
from small_models import CPU, named_model
from small_students import SMALL, assert_equal_but, begin, settings_of, train_labeled

from pseudolabel import storage
from pseudolabel.checkpoint import ModelCard, load_model, save_model
from pseudolabel.errors import DamagedModel, OutputExists, SpecError
from pseudolabel.students import parse_student
from pseudolabel.training.loop import TrainProgress
from pseudolabel.training.setup import preprocessing_of
from pseudolabel.training.starting import find_start
from pseudolabel.views.image import square


def test_a_student_starts_from_a_runs_weights(corpus: Path, tmp_path: Path) -> None:
    train_labeled(corpus, tmp_path / "first", SMALL.model_copy(update={"seed": 7}))
    wanted = load_file(tmp_path / "first" / "model.safetensors")
    found, note, _ = begin(SMALL.student, tuple("0123"), 12, 1, tmp_path / "first")
    assert_equal_but(found, wanted, set())
    assert "head included: its classes are the same" in note
    result = train_labeled(corpus, tmp_path / "second", init_from=tmp_path / "first")
    assert result.notes == (note,)
    other = train_labeled(corpus, tmp_path / "random")
    assert other.notes == ()
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("second", "random")}
    assert weights["second"] != weights["random"]


@pytest.mark.parametrize(("classes", "said"), [("abc", "4 classes there, 3 here"), ("abdc", "classes of other names")])
def test_other_classes_get_a_new_head(tmp_path: Path, classes: str, said: str) -> None:
    """Of the same number, too: a head that tells cats from dogs is no use the other way round."""
    named_model(tmp_path / "run", tuple("abcd"), seed=3)
    wanted = load_file(tmp_path / "run" / "model.safetensors")
    found, note, card = begin(SMALL.student, tuple(classes), 12, 1, tmp_path / "run")
    assert {name for name in wanted if not torch.equal(found[name], wanted[name])} == {"head.weight", "head.bias"}
    assert said in note
    assert "head.bias, head.weight begin random" in note
    torch.manual_seed(0)
    fresh = card.build().state_dict()
    assert torch.equal(found["head.weight"], fresh["head.weight"]), "by the seed, as without --init-from"


def test_the_runs_normalisation_goes_on(corpus: Path, tmp_path: Path) -> None:
    """Weights trained on [0, 1] would see other images at [-1, 1], and nothing would say so."""
    torch.manual_seed(0)
    card = ModelCard(SMALL.student, tuple("0123"), preprocessing_of(SMALL))
    card = ModelCard(card.student, card.classes, type(card.preprocessing)(12, 12, (0.25,), (0.125,)))
    save_model(tmp_path / "run", card, card.build())
    train_labeled(corpus, tmp_path / "next", init_from=tmp_path / "run")
    found = load_model(tmp_path / "next", CPU).preprocessing
    assert (found.mean, found.std) == ((0.25,), (0.125,))


def test_a_file_of_weights_will_do_and_its_place_does_not_matter(corpus: Path, tmp_path: Path) -> None:
    named_model(tmp_path / "model", tuple("0123"), seed=3)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "model" / "model.safetensors", tmp_path / name / "w.safetensors")
    first = train_labeled(corpus, tmp_path / "run", init_from=tmp_path / "a" / "w.safetensors")
    assert "of unknown names" in first.notes[0]
    assert train_labeled(corpus, tmp_path / "run", init_from=tmp_path / "b" / "w.safetensors") == first


def test_another_architecture_is_refused_by_what_differs(corpus: Path, tmp_path: Path) -> None:
    named_model(tmp_path / "run", tuple("0123"))
    with pytest.raises(SpecError) as caught:
        train_labeled(corpus, tmp_path / "x", settings_of("small:resnet8?width=8", 12, 1), init_from=tmp_path / "run")
    message = str(caught.value)
    assert "head.weight is (4, 16), not (4, 32) and " in message
    assert "they are of small:resnet8?width=4; name that with --student" in message
    with pytest.raises(SpecError, match=r"they lack stages\.3\.conv1\.weight and \d+ more"):
        train_labeled(corpus, tmp_path / "x", settings_of("small:resnet14?width=4", 12, 1), init_from=tmp_path / "run")
    with pytest.raises(SpecError, match="for images of 1 channels, the student takes 3; use --channels 1"):
        train_labeled(corpus, tmp_path / "x", settings_of("small:resnet8?width=4", 12, 3), init_from=tmp_path / "run")
    assert not (tmp_path / "x" / "run.json").exists()


def test_damage_and_what_is_no_run_are_refused(corpus: Path, tmp_path: Path) -> None:
    named_model(tmp_path / "run", tuple("0123"), seed=1)
    named_model(tmp_path / "other", tuple("0123"), seed=2)
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "run")
    with pytest.raises(DamagedModel, match=r"aren't those that model.json was written for"):
        train_labeled(corpus, tmp_path / "x", init_from=tmp_path / "run")
    (tmp_path / "torn.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(DamagedModel, match=r"torn\.safetensors: these weights don't load"):
        train_labeled(corpus, tmp_path / "x", init_from=tmp_path / "torn.safetensors")
    (tmp_path / "w.pth").write_bytes(b"x")
    with pytest.raises(SpecError, match=r"w\.pth: is neither a run directory nor a \.safetensors file"):
        train_labeled(corpus, tmp_path / "x", init_from=tmp_path / "w.pth")
    with pytest.raises(DamagedModel, match="no model here"):
        train_labeled(corpus, tmp_path / "x", init_from=tmp_path / "nowhere")


def test_weights_that_are_no_numbers_are_refused(corpus: Path, tmp_path: Path) -> None:
    """Training blamed its learning rate for them."""
    named_model(tmp_path / "run", tuple("0123"))
    weights = load_file(tmp_path / "run" / "model.safetensors")
    weights["head.bias"][1] = float("nan")
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(SpecError, match=r"w\.safetensors: these weights hold NaN or infinity, in head\.bias;"):
        train_labeled(corpus, tmp_path / "x", init_from=tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["run", "run/model.safetensors", "other/../run"])
def test_a_run_is_not_to_replace_what_it_starts_from(corpus: Path, tmp_path: Path, name: str) -> None:
    """Its weights would be gone with the first step: killed then, it could never go on."""
    named_model(tmp_path / "run", tuple("0123"))
    (tmp_path / "other").mkdir()
    content = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(SpecError, match="is in this run's own --out, whose weights --overwrite removes first"):
        train_labeled(corpus, tmp_path / "run", init_from=tmp_path / name, overwrite=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == content


def test_resume_goes_on_from_the_checkpoint_and_with_the_same_weights_only(corpus: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        named_model(tmp_path / name, tuple("0123"), seed=seed)
    settings = SMALL.model_copy(update={"steps": 30})

    def stop(progress: TrainProgress) -> None:
        if progress.step == 20:
            raise KeyboardInterrupt

    train_labeled(corpus, tmp_path / "whole", settings, init_from=tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        train_labeled(corpus, tmp_path / "run", settings, init_from=tmp_path / "one", on_progress=stop)
    for other in (tmp_path / "two", None):
        with pytest.raises(OutputExists, match=r"differs from this one \(initial_weights\)"):
            train_labeled(corpus, tmp_path / "run", settings, init_from=other)
    shutil.move(tmp_path / "one", tmp_path / "moved")
    train_labeled(corpus, tmp_path / "run", settings, init_from=tmp_path / "moved")
    files = [tmp_path / name / "model.safetensors" for name in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_takes_the_place_of_the_specs_weights(tmp_path: Path) -> None:
    """Or else a warm round would begin at the published weights again."""
    card = ModelCard("timm:test_resnet", ("a", "b"), square(32, 3))
    save_model(tmp_path / "run", card, card.build())
    found, note, _ = begin("timm:test_resnet?pretrained=true", ("a", "b"), init_from=tmp_path / "run")
    assert_equal_but(found, load_file(tmp_path / "run" / "model.safetensors"), set())
    assert f"starts from {tmp_path / 'run'}, head included" in note


def test_without_a_listener_the_note_is_a_warning(corpus: Path, tmp_path: Path) -> None:
    named_model(tmp_path / "one", tuple("abcd"))
    with pytest.warns(UserWarning, match=r"starts from .* with a new head"):
        train_labeled(corpus, tmp_path / "run", init_from=tmp_path / "one", on_note=None)


def test_a_model_of_foreign_code_is_read_without_calling_it(corpus: Path, tmp_path: Path) -> None:
    """Its tensors are all that is wanted; --student names the code, and that is the user's own word."""
    settings = settings_of("python:small_models:grouped", 12, 1)
    train_labeled(corpus, tmp_path / "first", settings)
    result = train_labeled(corpus, tmp_path / "second", settings, init_from=tmp_path / "first")
    assert "head included" in result.notes[0]


def test_the_command_says_what_it_starts_from(corpus: Path, tmp_path: Path, invoke: Invoke, refuse: Refuse) -> None:
    named_model(tmp_path / "one", tuple("abcd"))
    arguments = (
        "train",
        "--labeled",
        corpus / "labeled",
        "--steps",
        2,
        *FEW,
        "--workers",
        0,
        "--out",
        tmp_path / "run",
    )
    code, out, err = invoke(*arguments, "--init-from", tmp_path / "one", "--json")
    assert code == 0
    (note,) = json.loads(out)["notes"]
    assert f"note: {note}\n" in err
    assert "with a new head (classes of other names there, 4 here): head.bias, head.weight begin random" in note
    refuse(*arguments, kind="OutputExists", said=r"\(initial_weights\)")


def test_a_run_at_a_url_will_do(corpus: Path, tmp_path: Path, bucket: Bucket) -> None:
    named_model(tmp_path / "one", tuple("0123"))
    for name in ("model.json", "model.safetensors"):
        target = storage.location(f"{bucket.url}/one/{name}")
        with storage.atomic_file(target) as file:
            shutil.copy(tmp_path / "one" / name, file)
    result = train_labeled(corpus, tmp_path / "run", init_from=f"{bucket.url}/one")
    assert f"starts from {bucket.url}/one, head included" in result.notes[0]
    assert train_labeled(corpus, tmp_path / "run", init_from=tmp_path / "one") == result
    train_labeled(corpus, tmp_path / "other", init_from=f"{bucket.url}/one/model.safetensors")


def test_a_run_on_a_web_server_will_do(tmp_path: Path) -> None:
    """Whose directories look like files."""
    named_model(tmp_path / "one", tuple("0123"))
    with web_server(tmp_path, ranges=True) as address:
        assert find_start(parse_student("small:resnet8?width=4"), 4, 1, f"{address}/one") is not None
        with pytest.raises(DamagedModel, match=r"no model here \(no model.json\)"):
            find_start(parse_student("small:resnet8?width=4"), 4, 1, f"{address}/two")
