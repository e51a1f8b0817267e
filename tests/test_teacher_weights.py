"""Weights and classes of every source: random ones say so, files run no code, and names have one spelling."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import transformers
from small_models import CPU
from small_teachers import IMAGENET, make_clip_dir, make_hf, write_onnx

from pseudolabel.errors import SpecError
from pseudolabel.teachers import parse_teacher, parse_teachers

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: without it, what isn't found is looked for in the net


@pytest.mark.parametrize(
    "uri", ["timm:test_vit?pretrained=false&num_classes=3&seed={}", "hf:{dir}?pretrained=false&seed={}", "open_clip:"]
)
def test_random_weights_come_with_a_warning_and_from_the_seed(uri: str, tmp_path: Path) -> None:
    make_hf(tmp_path)
    if uri == "open_clip:":
        uri = f"open_clip:local-dir:{make_clip_dir(tmp_path)}?classes={tmp_path / 'classes.txt'}"
        uri += "&pretrained=false&seed={}"
    loaded = []
    for seed in (3, 3, 4):
        with pytest.warns(UserWarning, match="the teacher is random; of use for timing alone"):
            loaded.append(parse_teacher(uri.format(seed, dir=tmp_path)).load(CPU))
    first, same, other = (one.identity["weights_sha256"] for one in loaded)
    assert first == same != other


def test_weights_from_a_file_are_the_models_own(tmp_path: Path) -> None:
    """The same weights by another way are the same teacher, so a store can be gone on with."""
    (tmp_path / "hf").mkdir()
    uri = make_hf(tmp_path / "hf").uri
    torch.save(
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf").state_dict(), tmp_path / "hf.bin"
    )
    assert (
        parse_teacher(f"{uri}?weights_file={tmp_path / 'hf.bin'}").load(CPU).identity
        == parse_teacher(uri).load(CPU).identity
    )


def test_a_file_may_have_the_names_that_transformers_saves(tmp_path: Path) -> None:
    """Those of a ViT differ from its modules'; a file of another model is refused, not half loaded."""
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=1, intermediate_size=8, image_size=16, patch_size=16
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    uri = f"hf:{tmp_path}?weights_file={tmp_path / 'model.safetensors'}"
    wanted = parse_teacher(f"hf:{tmp_path}").load(CPU).identity["weights_sha256"]
    assert parse_teacher(uri).load(CPU).identity["weights_sha256"] == wanted
    for layers, said in ((1, r"lack vit\.\S+ and others"), (3, r"have vit\.\S+ and others besides")):
        config.num_hidden_layers = layers
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "other")
        with pytest.raises(SpecError, match=said):
            parse_teacher(f"hf:{tmp_path}?weights_file={tmp_path / 'other' / 'model.safetensors'}").load(CPU)


class Malicious:
    """Makes a directory when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize(
    "uri",
    [
        "timm:test_vit?weights_file={dir}/pytorch_model.bin",
        "hf:{dir}?weights_file={dir}/pytorch_model.bin",
        "hf:{dir}",
        "timm:local-dir:{dir}",
        "open_clip:ViT-S-32?classes={dir}/classes.txt&weights_file={dir}/pytorch_model.bin",
        "open_clip:local-dir:{dir}?classes={dir}/classes.txt",
    ],
)
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, uri: str) -> None:
    """By weights_file, and by the libraries' own loading of a directory."""
    make_clip_dir(tmp_path)
    make_hf(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    if uri.startswith("timm:local-dir"):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "pretrained_cfg": {}}))
    torch.save({"x": Malicious(tmp_path / "trace")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SpecError, match=r"holds more than tensors|can't be loaded|can't be had"):
        parse_teacher(uri.format(dir=tmp_path)).load(CPU)
    assert not (tmp_path / "trace").exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "trace").exists(), "the file is harmless, so this test shows nothing"


def test_imagenet_has_one_spelling_so_that_teachers_can_vote_together(tmp_path: Path) -> None:
    """timm and transformers say 'tench, Tinca tinca' where torchvision says 'tench'."""
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16, patch_size=16
    )
    info = timm.data.ImageNetInfo()
    config.id2label = dict(enumerate(info.label_descriptions()))
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    assert parse_teacher(f"hf:{tmp_path}").load(CPU).classes == IMAGENET
    with pytest.warns(UserWarning, match="random"):
        ensemble = parse_teachers([f"hf:{tmp_path}", "timm:test_vit?pretrained=false"]).load(CPU)
    assert ensemble.classes == IMAGENET


def test_a_model_without_a_classifier_is_refused(tmp_path: Path) -> None:
    """transformers would make a random head, with no more than a line in its log."""
    make_hf(tmp_path)
    transformers.ViTModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"these weights lack .*classifier.* which would be random"):
        parse_teacher(f"hf:{tmp_path}").load(CPU)
    with pytest.raises(SpecError, match="hold no classifier"), pytest.warns(UserWarning, match="random"):
        parse_teacher("timm:vit_small_patch14_dinov2.lvd142m?pretrained=false").load(CPU)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("timm:resnet51", r"timm has no model 'resnet51' \(did you mean"),
        ("timm:test_vit?pretrained=a1_in1k", r"pretrained must be true or false; .* NAME\.TAG"),
        ("timm:test_vit?num_classes=5", "published weights bring their classes"),
        ("timm:test_vit?num_classes=0&pretrained=false", "num_classes must be a whole number from 1"),
        ("timm:test_vit?pretrained=false&weights_file=f", "drop it or weights_file="),
        ("timm:test_vit?weights=f", r"unknown argument 'weights'"),
        ("timm:test_vit", r"can't be had \(.*\)\n.*weights_file=FILE"),
        ("timm:test_vit?weights_file=missing.safetensors", "missing.safetensors: can't be read as weights"),
        ("hf:no/such-model", r"the image processor can't be loaded \(.*\)\n.*name its directory"),
        ("hf:m?pretrained=no", "pretrained must be true or false"),
        ("hf:m?pretrained=false&weights_file=f", "drop it or weights_file="),
        ("open_clip:ViT-B-33/openai?classes=f", r"no model 'ViT-B-33' \(did you mean 'ViT-B-32'\?\)"),
        ("open_clip:ViT-B-32/laion?classes=f", "no weights 'laion'.*; known are openai, laion400m"),
        ("open_clip:ViT-B-32?classes=f", "write open_clip:ViT-B-32/PRETRAINED; known are"),
        ("open_clip:ViT-S-32?classes=f", "open_clip has no weights of ViT-S-32; add weights_file=FILE"),
        ("open_clip:ViT-B-32/openai?classes=f", "trained with QuickGELU; write open_clip:ViT-B-32-quickgelu/openai"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "needs class names; add classes=FILE"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k?classes=missing", "missing: can't be read as a file of class names"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k?classes=twice", "twice: holds 'a' twice"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k?classes=good&templates=good", r"template 'a' must hold \{\} once"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k?classes=good", r"can't be loaded \(.*\)\n.*weights_file=FILE"),
        ("onnx:f?size=0", "size must be a whole number from 1"),
        ("onnx:missing.onnx", "can't be read as an ONNX file .*No such file"),
        ("onnx:good", "can't be read as an ONNX file"),
    ],
)
def test_a_wrong_spec_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("twice").write_text("a\nb\na\n")
    Path("good").write_text("a\nb\n")
    with pytest.raises(SpecError, match=said) as caught:
        parse_teacher(uri).load(CPU)
    assert len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize(
    ("uri", "package", "extra"),
    [
        ("timm:test_vit", "timm", "timm"),
        ("hf:m", "transformers", "hf"),
        ("open_clip:m/t?classes=f", "open_clip", "open-clip"),
        ("onnx:{path}", "onnx", "onnx"),
        ("onnx:{path}", "onnxruntime", "onnx"),
    ],
)
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, package: str, extra: str
) -> None:
    path = write_onnx(tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SpecError, match=rf"pip install 'pseudolabel\[{extra}\]'") as caught:
        parse_teacher(uri.format(path=path)).load(CPU)
    assert len(str(caught.value).splitlines()) == 1
