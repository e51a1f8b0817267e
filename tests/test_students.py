"""Students of every source, and what they start from: published weights, a file, another run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from commands import FEW, Invoke, Refuse
from object_stores import Bucket, web_server
from safetensors.torch import load_file, save_file
from small_models import CPU, logits_of, named_model
from small_teachers import make_hf, noise
from torch import Tensor
from torchvision.models import get_model, get_model_weights

from pseudolabel import storage
from pseudolabel.checkpoint import ModelCard, load_model, save_model
from pseudolabel.errors import DamagedModel, OutputExists, SpecError
from pseudolabel.settings import TrainSettings
from pseudolabel.students import parse_student
from pseudolabel.train import TrainResult, train
from pseudolabel.training.loop import TrainProgress
from pseudolabel.training.setup import preprocessing_of
from pseudolabel.training.starting import find_start, start_from
from pseudolabel.views.image import square

SMALL = TrainSettings(student="small:resnet8?width=4", image_size=12, channels=1, steps=2, batch_size=8, eval_every=1)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HF = "image_size=32"
Say = Callable[[str], None]


def _settings(student: str, size: int = 32, channels: int = 3, **more: Any) -> TrainSettings:
    return SMALL.model_copy(update={"student": student, "image_size": size, "channels": channels, **more})


def _train(corpus: Path, out: Path, settings: TrainSettings = SMALL, **more: Any) -> TrainResult:
    notes: list[str] = []
    return train(settings, out, labeled=corpus / "labeled", **{"threads": 1, "on_note": notes.append, **more})


def _begin(
    student: str, classes: tuple[str, ...], size: int = 32, channels: int = 3, init_from: Path | None = None
) -> tuple[dict[str, Tensor], str, ModelCard]:
    """A student's tensors before the first step, and what is told of them."""
    settings = _settings(student, size, channels)
    source = parse_student(student)
    start = find_start(source, len(classes), channels, init_from)
    assert start is not None
    card = ModelCard(student, classes, preprocessing_of(settings, start), source.config)
    torch.manual_seed(0)
    body = card.build()
    note = start_from(start, body, card)
    return body.state_dict(), note, card


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "hf"
    directory.mkdir()
    make_hf(directory)
    return directory


# --- the contract of a student


@pytest.mark.parametrize(
    ("student", "size", "channels"),
    [
        ("small:resnet8?width=4", 12, 1),
        ("torchvision:squeezenet1_1?dropout=0.1", 32, 3),
        ("timm:test_resnet?drop_rate=0.1", 32, 1),
        ("timm:test_vit?img_size=32", 32, 3),
        ("hf:{hf}?hidden_dropout_prob=0.1", 32, 3),
        ("hf:{hf}?image_size=16", 16, 1),
        ("python:small_models:grouped", 12, 1),
    ],
)
def test_a_student_trains_and_reads_back_as_it_was(
    corpus: Path, tmp_path: Path, hf_dir: Path, student: str, size: int, channels: int
) -> None:
    """Without the directory that its config came from, if it came from one: the model is whole by itself."""
    settings = _settings(student.format(hf=hf_dir), size, channels)
    result = _train(corpus, tmp_path / "run", settings, val=corpus / "val")
    assert (result.steps, result.notes) == (2, ())
    _train(corpus, tmp_path / "same", settings, val=corpus / "val")
    files = [tmp_path / name / "model.safetensors" for name in ("run", "same")]
    assert files[0].read_bytes() == files[1].read_bytes(), "the seed decides it"
    shutil.rmtree(hf_dir)
    model = load_model(tmp_path / "run", CPU, trust_code=True)
    again = load_model(tmp_path / "run", CPU, trust_code=True)
    images = [noise(seed, size, size, channels) for seed in range(2)]
    logits = logits_of(model, *images)
    assert logits.shape == (2, 4)
    assert logits.std(0).max() > 0
    assert torch.equal(logits, logits_of(again, *images))
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.model[1].state_dict().items())


def test_layers_that_ask_for_their_version_train_resume_and_load(corpus: Path, tmp_path: Path) -> None:
    """MNASNet's: its training failed at the end, and its checkpoints could not be read."""
    settings = _settings("torchvision:mnasnet0_5", steps=4)

    def stop(progress: TrainProgress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _train(corpus, tmp_path / "run", settings, val=corpus / "val", on_progress=stop)
    assert _train(corpus, tmp_path / "run", settings, val=corpus / "val").steps == 4
    assert load_model(tmp_path / "run", CPU).classes == tuple("0123")


def test_arguments_reach_the_architecture(hf_dir: Path) -> None:
    """An argument without effect would be worse than none."""
    bodies = [parse_student(f"hf:{hf_dir}{more}").build(3, 3) for more in ("", "?num_hidden_layers=1")]
    assert len(bodies[0].state_dict()) > len(bodies[1].state_dict())
    assert parse_student("timm:test_vit?img_size=32").build(3, 1).state_dict()["pos_embed"].shape == (1, 5, 64)
    with pytest.raises(SpecError, match=r"its config has no 'image_sise' \(did you mean 'image_size'\?\)"):
        parse_student(f"hf:{hf_dir}?image_sise=16")
    with pytest.raises(SpecError, match="leave num_labels= out"):
        parse_student(f"hf:{hf_dir}?num_labels=16")


def test_a_config_that_says_nothing_of_channels_takes_colours() -> None:
    """CLIP's number of channels lies in the config of its vision tower, out of reach."""
    with pytest.raises(SpecError, match="use --channels 3"):
        parse_student("hf:x", {"model_type": "clip"}).build(3, 1)


def test_a_config_edited_between_two_starts_is_refused(corpus: Path, tmp_path: Path, hf_dir: Path) -> None:
    """Another dropout leaves all shapes alone, so that nothing else would notice."""
    settings = _settings(f"hf:{hf_dir}")
    _train(corpus, tmp_path / "run", settings)
    config = json.loads((hf_dir / "config.json").read_text()) | {"hidden_dropout_prob": 0.5}
    (hf_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(OutputExists, match=r"differs from this one \(config\)"):
        _train(corpus, tmp_path / "run", settings)


# --- weights that the spec names


def _equal(found: dict[str, Tensor], wanted: dict[str, Tensor], but: set[str]) -> None:
    assert found.keys() == wanted.keys()
    assert {name for name in found if not torch.equal(found[name], wanted[name])} == but


def test_torchvisions_published_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From torch.hub's cache; GoogLeNet's bring auxiliary heads, which no student has, and normalise once more."""
    torch.manual_seed(1)
    published = get_model("googlenet", weights=None, init_weights=False).state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / get_model_weights("googlenet").DEFAULT.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(published, file)
    student = "torchvision:googlenet?weights=DEFAULT"
    found, note, card = _begin(student, ("a", "b", "c"), 64)
    wanted = {name: tensor for name, tensor in published.items() if not name.startswith("aux")}
    assert {name for name in wanted if not torch.equal(found[name], wanted[name])} == {"fc.weight", "fc.bias"}
    assert f"starts from {student} with a new head (3 here): fc.bias, fc.weight begin random" in note.replace(
        "1000 classes there, ", ""
    )
    assert (card.preprocessing.mean, card.preprocessing.std) == IMAGENET
    file.unlink()
    assert card.build().transform_input, "the architecture is that of the weights, though none are read"


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("classes", [7, 3])
def test_torchvisions_weights_from_a_file(tmp_path: Path, suffix: str, classes: int) -> None:
    path = tmp_path / f"weights{suffix}"
    wanted = get_model("squeezenet1_1", weights=None, num_classes=7).state_dict()
    save_file(wanted, path) if suffix == ".safetensors" else torch.save(wanted, path)
    names = tuple("abcdefg"[:classes])
    found, note, card = _begin(f"torchvision:squeezenet1_1?weights_file={path}", names)
    head = {"classifier.1.weight", "classifier.1.bias"}
    differing = {name for name in wanted if not torch.equal(found[name], wanted[name])}
    assert differing == (head if classes == 3 else set())
    assert ("head included: it has as many classes, of unknown names" in note) == (classes == 7)
    assert (card.preprocessing.mean, card.preprocessing.std) == IMAGENET


@pytest.mark.parametrize("classes", [7, 3])
def test_timms_weights_from_a_file(tmp_path: Path, classes: int) -> None:
    path = tmp_path / "weights.safetensors"
    wanted = timm.create_model("test_resnet", num_classes=7).state_dict()
    save_file(wanted, path)
    found, note, card = _begin(f"timm:test_resnet?weights_file={path}", tuple("abcdefg"[:classes]))
    _equal(found, wanted, set()) if classes == 7 else None
    if classes == 3:
        assert {name for name in wanted if not torch.equal(found[name], wanted[name])} == {"fc.weight", "fc.bias"}
        assert "with a new head (3 here): fc.bias, fc.weight begin random" in note
    assert card.preprocessing.mean == tuple(timm.get_pretrained_cfg("test_resnet").mean)


def test_timms_published_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's cache: their own loading, then a head for other classes. Without them, what to do instead."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SpecError, match=r"can't be had \(.*\)\n.*weights_file=FILE"):
        _begin("timm:test_resnet?pretrained=true", ("a", "b"))
    torch.manual_seed(3)
    wanted = timm.create_model("test_resnet").state_dict()
    hub = tmp_path / f"models--{timm.get_pretrained_cfg('test_resnet').hf_hub_id.replace('/', '--')}"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0" * 40)
    (hub / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(wanted, hub / "snapshots" / ("0" * 40) / "model.safetensors")
    found, note, _ = _begin("timm:test_resnet?pretrained=true", ("a", "b"))
    assert {name for name in wanted if not torch.equal(found[name], wanted[name])} == {"fc.weight", "fc.bias"}
    assert "starts from timm:test_resnet?pretrained=True with a new head" in note


def test_timms_weights_become_those_of_grey_images_of_another_size(tmp_path: Path) -> None:
    """As timm itself does it: the first layer is summed over the colours, positions are resampled."""
    path = tmp_path / "weights.safetensors"
    wanted = timm.create_model("test_vit", num_classes=0).state_dict()  # no head at all
    save_file(wanted, path)
    found, note, card = _begin(f"timm:test_vit?img_size=32&weights_file={path}", ("a", "b"), channels=1)
    summed = wanted["patch_embed.proj.weight"].sum(1, keepdim=True)
    torch.testing.assert_close(found["patch_embed.proj.weight"], summed)
    assert found["pos_embed"].shape == (1, 5, 64)
    assert torch.equal(found["blocks.0.attn.qkv.weight"], wanted["blocks.0.attn.qkv.weight"])
    assert "head.bias, head.weight begin random" in note
    assert card.preprocessing.channels == 1


@pytest.mark.parametrize(
    "how", ["pretrained=true", "weights_file={hf}/model.safetensors", "weights_file={hf}/own.safetensors"]
)
def test_transformers_weights(hf_dir: Path, how: str) -> None:
    """Published files have older names of some tensors than the modules; both are read."""
    published = transformers.AutoModelForImageClassification.from_pretrained(hf_dir)
    wanted = {f"model.{name}": tensor for name, tensor in published.state_dict().items()}
    save_file(published.state_dict(), hf_dir / "own.safetensors")
    student = f"hf:{hf_dir}?{how.format(hf=hf_dir)}"
    same, note, card = _begin(student, tuple("abcd"))
    _equal(same, wanted, set())
    assert "head included" in note
    assert (card.preprocessing.mean, card.preprocessing.std) == ((0.5,) * 3, (0.5,) * 3)
    found, note, _ = _begin(student, tuple("ab"))
    assert {name for name in wanted if not torch.equal(found[name], wanted[name])} == {
        "model.classifier.weight",
        "model.classifier.bias",
    }
    with pytest.raises(SpecError, match="for images of 3 channels, the student takes 1; use --channels 3"):
        _begin(student, tuple("ab"), channels=1)
    with pytest.raises(SpecError, match=r"don't fit hf:.*(is \(1, 17, 32\), not \(1, 5, 32\)|lack \S+position_emb)"):
        _begin(f"{student}&image_size=16", tuple("ab"), size=16)


def test_transformers_weights_of_no_classifier_get_a_head(tmp_path: Path, hf_dir: Path) -> None:
    """What transformers fills in at random is not taken for weights."""
    model = transformers.ViTForImageClassification.from_pretrained(hf_dir).vit
    (tmp_path / "backbone").mkdir()
    model.save_pretrained(tmp_path / "backbone")
    shutil.copy(hf_dir / "preprocessor_config.json", tmp_path / "backbone")
    _, note, _ = _begin(f"hf:{tmp_path / 'backbone'}?pretrained=true", tuple("abcd"))
    assert "with a new head (4 here): model.classifier.bias, model.classifier.weight begin random" in note


def test_weights_in_another_file_are_another_run(corpus: Path, tmp_path: Path) -> None:
    """The spec names the file, so its content must count; afterwards the model needs it no more."""
    path = tmp_path / "weights.safetensors"
    settings = _settings(f"timm:test_resnet?weights_file={path}", lr=1e-9)
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_file(timm.create_model("test_resnet", num_classes=4).state_dict(), path)
        if seed == 0:
            result = _train(corpus, tmp_path / "run", settings)
            assert _train(corpus, tmp_path / "run", settings) == result
            assert "head included" in result.notes[0]
            assert json.loads((tmp_path / "run" / "run.json").read_text())["result"]["notes"] == list(result.notes)
            trained = load_file(tmp_path / "run" / "model.safetensors")
            torch.testing.assert_close(trained["fc.weight"], load_file(path)["fc.weight"], atol=1e-5, rtol=1e-5)
    with pytest.raises(OutputExists, match=r"differs from this one \(initial_weights\)"):
        _train(corpus, tmp_path / "run", settings)
    path.unlink()
    mean = tuple(timm.get_pretrained_cfg("test_resnet").mean)
    assert load_model(tmp_path / "run", CPU).preprocessing.mean == mean


# --- the weights of another run


def test_a_student_starts_from_a_runs_weights(corpus: Path, tmp_path: Path) -> None:
    _train(corpus, tmp_path / "first", SMALL.model_copy(update={"seed": 7}))
    wanted = load_file(tmp_path / "first" / "model.safetensors")
    found, note, _ = _begin(SMALL.student, tuple("0123"), 12, 1, tmp_path / "first")
    _equal(found, wanted, set())
    assert "head included: its classes are the same" in note
    result = _train(corpus, tmp_path / "second", init_from=tmp_path / "first")
    assert result.notes == (note,)
    other = _train(corpus, tmp_path / "random")
    assert other.notes == ()
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("second", "random")}
    assert weights["second"] != weights["random"]


@pytest.mark.parametrize(("classes", "said"), [("abc", "4 classes there, 3 here"), ("abdc", "classes of other names")])
def test_other_classes_get_a_new_head(tmp_path: Path, classes: str, said: str) -> None:
    """Of the same number, too: a head that tells cats from dogs is no use the other way round."""
    named_model(tmp_path / "run", tuple("abcd"), seed=3)
    wanted = load_file(tmp_path / "run" / "model.safetensors")
    found, note, card = _begin(SMALL.student, tuple(classes), 12, 1, tmp_path / "run")
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
    _train(corpus, tmp_path / "next", init_from=tmp_path / "run")
    found = load_model(tmp_path / "next", CPU).preprocessing
    assert (found.mean, found.std) == ((0.25,), (0.125,))


def test_a_file_of_weights_will_do_and_its_place_does_not_matter(corpus: Path, tmp_path: Path) -> None:
    named_model(tmp_path / "model", tuple("0123"), seed=3)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "model" / "model.safetensors", tmp_path / name / "w.safetensors")
    first = _train(corpus, tmp_path / "run", init_from=tmp_path / "a" / "w.safetensors")
    assert "of unknown names" in first.notes[0]
    assert _train(corpus, tmp_path / "run", init_from=tmp_path / "b" / "w.safetensors") == first


def test_another_architecture_is_refused_by_what_differs(corpus: Path, tmp_path: Path) -> None:
    named_model(tmp_path / "run", tuple("0123"))
    with pytest.raises(SpecError) as caught:
        _train(corpus, tmp_path / "x", _settings("small:resnet8?width=8", 12, 1), init_from=tmp_path / "run")
    message = str(caught.value)
    assert "head.weight is (4, 16), not (4, 32) and " in message
    assert "they are of small:resnet8?width=4; name that with --student" in message
    with pytest.raises(SpecError, match=r"they lack stages\.3\.conv1\.weight and \d+ more"):
        _train(corpus, tmp_path / "x", _settings("small:resnet14?width=4", 12, 1), init_from=tmp_path / "run")
    with pytest.raises(SpecError, match="for images of 1 channels, the student takes 3; use --channels 1"):
        _train(corpus, tmp_path / "x", _settings("small:resnet8?width=4", 12, 3), init_from=tmp_path / "run")
    assert not (tmp_path / "x" / "run.json").exists()


def test_damage_and_what_is_no_run_are_refused(corpus: Path, tmp_path: Path) -> None:
    named_model(tmp_path / "run", tuple("0123"), seed=1)
    named_model(tmp_path / "other", tuple("0123"), seed=2)
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "run")
    with pytest.raises(DamagedModel, match=r"aren't those that model.json was written for"):
        _train(corpus, tmp_path / "x", init_from=tmp_path / "run")
    (tmp_path / "torn.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(DamagedModel, match=r"torn\.safetensors: these weights don't load"):
        _train(corpus, tmp_path / "x", init_from=tmp_path / "torn.safetensors")
    (tmp_path / "w.pth").write_bytes(b"x")
    with pytest.raises(SpecError, match=r"w\.pth: is neither a run directory nor a \.safetensors file"):
        _train(corpus, tmp_path / "x", init_from=tmp_path / "w.pth")
    with pytest.raises(DamagedModel, match="no model here"):
        _train(corpus, tmp_path / "x", init_from=tmp_path / "nowhere")


def test_weights_that_are_no_numbers_are_refused(corpus: Path, tmp_path: Path) -> None:
    """Training blamed its learning rate for them."""
    named_model(tmp_path / "run", tuple("0123"))
    weights = load_file(tmp_path / "run" / "model.safetensors")
    weights["head.bias"][1] = float("nan")
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(SpecError, match=r"w\.safetensors: these weights hold NaN or infinity, in head\.bias;"):
        _train(corpus, tmp_path / "x", init_from=tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["run", "run/model.safetensors", "other/../run"])
def test_a_run_is_not_to_replace_what_it_starts_from(corpus: Path, tmp_path: Path, name: str) -> None:
    """Its weights would be gone with the first step: killed then, it could never go on."""
    named_model(tmp_path / "run", tuple("0123"))
    (tmp_path / "other").mkdir()
    content = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(SpecError, match="is in this run's own --out, whose weights --overwrite removes first"):
        _train(corpus, tmp_path / "run", init_from=tmp_path / name, overwrite=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == content


def test_resume_goes_on_from_the_checkpoint_and_with_the_same_weights_only(corpus: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        named_model(tmp_path / name, tuple("0123"), seed=seed)
    settings = SMALL.model_copy(update={"steps": 30})

    def stop(progress: TrainProgress) -> None:
        if progress.step == 20:
            raise KeyboardInterrupt

    _train(corpus, tmp_path / "whole", settings, init_from=tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        _train(corpus, tmp_path / "run", settings, init_from=tmp_path / "one", on_progress=stop)
    for other in (tmp_path / "two", None):
        with pytest.raises(OutputExists, match=r"differs from this one \(initial_weights\)"):
            _train(corpus, tmp_path / "run", settings, init_from=other)
    shutil.move(tmp_path / "one", tmp_path / "moved")
    _train(corpus, tmp_path / "run", settings, init_from=tmp_path / "moved")
    files = [tmp_path / name / "model.safetensors" for name in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_run_takes_the_place_of_the_specs_weights(tmp_path: Path) -> None:
    """Or else a warm round would begin at the published weights again."""
    card = ModelCard("timm:test_resnet", ("a", "b"), square(32, 3))
    save_model(tmp_path / "run", card, card.build())
    found, note, _ = _begin("timm:test_resnet?pretrained=true", ("a", "b"), init_from=tmp_path / "run")
    _equal(found, load_file(tmp_path / "run" / "model.safetensors"), set())
    assert f"starts from {tmp_path / 'run'}, head included" in note


@pytest.mark.parametrize(("student", "package"), [("timm:test_vit", "timm"), ("hf:anything", "transformers")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, student: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SpecError, match=rf"pip install 'pseudolabel\[{student.partition(':')[0]}\]'"):
        parse_student(student)


@pytest.mark.parametrize("source", ["torchvision:squeezenet1_1", "timm:test_resnet", "hf:{hf}"])
def test_a_file_of_a_whole_training_is_refused(tmp_path: Path, hf_dir: Path, source: str) -> None:
    """Its tensors lie one level down."""
    torch.save({"state_dict": {"weight": torch.zeros(3)}, "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(SpecError) as caught:
        _begin(f"{source.format(hf=hf_dir)}?weights_file={tmp_path / 'w.pth'}", ("a", "b"))
    assert len(str(caught.value).splitlines()) <= 5


def test_without_a_listener_the_note_is_a_warning(corpus: Path, tmp_path: Path) -> None:
    named_model(tmp_path / "one", tuple("abcd"))
    with pytest.warns(UserWarning, match=r"starts from .* with a new head"):
        _train(corpus, tmp_path / "run", init_from=tmp_path / "one", on_note=None)


def test_a_model_of_foreign_code_is_read_without_calling_it(corpus: Path, tmp_path: Path) -> None:
    """Its tensors are all that is wanted; --student names the code, and that is the user's own word."""
    settings = _settings("python:small_models:grouped", 12, 1)
    _train(corpus, tmp_path / "first", settings)
    result = _train(corpus, tmp_path / "second", settings, init_from=tmp_path / "first")
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
    result = _train(corpus, tmp_path / "run", init_from=f"{bucket.url}/one")
    assert f"starts from {bucket.url}/one, head included" in result.notes[0]
    assert _train(corpus, tmp_path / "run", init_from=tmp_path / "one") == result
    _train(corpus, tmp_path / "other", init_from=f"{bucket.url}/one/model.safetensors")


def test_a_run_on_a_web_server_will_do(tmp_path: Path) -> None:
    """Whose directories look like files."""
    named_model(tmp_path / "one", tuple("0123"))
    with web_server(tmp_path, ranges=True) as address:
        assert find_start(parse_student("small:resnet8?width=4"), 4, 1, f"{address}/one") is not None
        with pytest.raises(DamagedModel, match=r"no model here \(no model.json\)"):
            find_start(parse_student("small:resnet8?width=4"), 4, 1, f"{address}/two")
