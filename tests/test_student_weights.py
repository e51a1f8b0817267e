"""The weights that a student's spec names, published or in a file, are what it starts from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_models import CPU
from small_students import (
    IMAGENET,
    assert_equal_but,
    begin,
    settings_of,
    small_hf_dir,  # noqa: F401 (a fixture)
    train_labeled,
)
from torchvision.models import get_model, get_model_weights

from pseudolabel.checkpoint import load_model
from pseudolabel.errors import OutputExists, SpecError


def test_torchvisions_published_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From torch.hub's cache; GoogLeNet's bring auxiliary heads, which no student has, and normalise once more."""
    torch.manual_seed(1)
    published = get_model("googlenet", weights=None, init_weights=False).state_dict()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / get_model_weights("googlenet").DEFAULT.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(published, file)
    student = "torchvision:googlenet?weights=DEFAULT"
    found, note, card = begin(student, ("a", "b", "c"), 64)
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
    found, note, card = begin(f"torchvision:squeezenet1_1?weights_file={path}", names)
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
    found, note, card = begin(f"timm:test_resnet?weights_file={path}", tuple("abcdefg"[:classes]))
    assert_equal_but(found, wanted, set()) if classes == 7 else None
    if classes == 3:
        assert {name for name in wanted if not torch.equal(found[name], wanted[name])} == {"fc.weight", "fc.bias"}
        assert "with a new head (3 here): fc.bias, fc.weight begin random" in note
    assert card.preprocessing.mean == tuple(timm.get_pretrained_cfg("test_resnet").mean)


def test_timms_published_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's cache: their own loading, then a head for other classes. Without them, what to do instead."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SpecError, match=r"can't be had \(.*\)\n.*weights_file=FILE"):
        begin("timm:test_resnet?pretrained=true", ("a", "b"))
    torch.manual_seed(3)
    wanted = timm.create_model("test_resnet").state_dict()
    hub = tmp_path / f"models--{timm.get_pretrained_cfg('test_resnet').hf_hub_id.replace('/', '--')}"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0" * 40)
    (hub / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(wanted, hub / "snapshots" / ("0" * 40) / "model.safetensors")
    found, note, _ = begin("timm:test_resnet?pretrained=true", ("a", "b"))
    assert {name for name in wanted if not torch.equal(found[name], wanted[name])} == {"fc.weight", "fc.bias"}
    assert "starts from timm:test_resnet?pretrained=True with a new head" in note


def test_timms_weights_become_those_of_grey_images_of_another_size(tmp_path: Path) -> None:
    """As timm itself does it: the first layer is summed over the colours, positions are resampled."""
    path = tmp_path / "weights.safetensors"
    wanted = timm.create_model("test_vit", num_classes=0).state_dict()  # no head at all
    save_file(wanted, path)
    found, note, card = begin(f"timm:test_vit?img_size=32&weights_file={path}", ("a", "b"), channels=1)
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
    same, note, card = begin(student, tuple("abcd"))
    assert_equal_but(same, wanted, set())
    assert "head included" in note
    assert (card.preprocessing.mean, card.preprocessing.std) == ((0.5,) * 3, (0.5,) * 3)
    found, note, _ = begin(student, tuple("ab"))
    assert {name for name in wanted if not torch.equal(found[name], wanted[name])} == {
        "model.classifier.weight",
        "model.classifier.bias",
    }
    with pytest.raises(SpecError, match="for images of 3 channels, the student takes 1; use --channels 3"):
        begin(student, tuple("ab"), channels=1)
    with pytest.raises(SpecError, match=r"don't fit hf:.*(is \(1, 17, 32\), not \(1, 5, 32\)|lack \S+position_emb)"):
        begin(f"{student}&image_size=16", tuple("ab"), size=16)


def test_transformers_weights_of_no_classifier_get_a_head(tmp_path: Path, hf_dir: Path) -> None:
    """What transformers fills in at random is not taken for weights."""
    model = transformers.ViTForImageClassification.from_pretrained(hf_dir).vit
    (tmp_path / "backbone").mkdir()
    model.save_pretrained(tmp_path / "backbone")
    shutil.copy(hf_dir / "preprocessor_config.json", tmp_path / "backbone")
    _, note, _ = begin(f"hf:{tmp_path / 'backbone'}?pretrained=true", tuple("abcd"))
    assert "with a new head (4 here): model.classifier.bias, model.classifier.weight begin random" in note


def test_weights_in_another_file_are_another_run(corpus: Path, tmp_path: Path) -> None:
    """The spec names the file, so its content must count; afterwards the model needs it no more."""
    path = tmp_path / "weights.safetensors"
    settings = settings_of(f"timm:test_resnet?weights_file={path}", lr=1e-9)
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_file(timm.create_model("test_resnet", num_classes=4).state_dict(), path)
        if seed == 0:
            result = train_labeled(corpus, tmp_path / "run", settings)
            assert train_labeled(corpus, tmp_path / "run", settings) == result
            assert "head included" in result.notes[0]
            assert json.loads((tmp_path / "run" / "run.json").read_text())["result"]["notes"] == list(result.notes)
            trained = load_file(tmp_path / "run" / "model.safetensors")
            torch.testing.assert_close(trained["fc.weight"], load_file(path)["fc.weight"], atol=1e-5, rtol=1e-5)
    with pytest.raises(OutputExists, match=r"differs from this one \(initial_weights\)"):
        train_labeled(corpus, tmp_path / "run", settings)
    path.unlink()
    mean = tuple(timm.get_pretrained_cfg("test_resnet").mean)
    assert load_model(tmp_path / "run", CPU).preprocessing.mean == mean


@pytest.mark.parametrize("source", ["torchvision:squeezenet1_1", "timm:test_resnet", "hf:{hf}"])
def test_a_file_of_a_whole_training_is_refused(tmp_path: Path, hf_dir: Path, source: str) -> None:
    """Its tensors lie one level down."""
    torch.save({"state_dict": {"weight": torch.zeros(3)}, "epoch": 3}, tmp_path / "w.pth")
    with pytest.raises(SpecError) as caught:
        begin(f"{source.format(hf=hf_dir)}?weights_file={tmp_path / 'w.pth'}", ("a", "b"))
    assert len(str(caught.value).splitlines()) <= 5
