"""Torchvision's classifiers as teachers: its own logits and preprocessing, and weights that hold no code."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models
from safetensors.torch import save_file
from small_models import CPU, logits_of
from torch import nn
from torchvision.models import get_model, get_model_weights, list_models

from pseudolabel.errors import SpecError
from pseudolabel.teachers import parse_teacher
from pseudolabel.teachers.torchvision import _preprocessing


@pytest.fixture
def squeezenet() -> nn.Module:
    torch.manual_seed(0)
    return get_model("squeezenet1_1", weights=None, num_classes=5).eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_torchvision_weights_from_a_file_give_torchvisions_logits(
    tmp_path: Path, squeezenet: nn.Module, suffix: str
) -> None:
    path = tmp_path / f"a+b{suffix}"
    save_file(squeezenet.state_dict(), path) if suffix == ".safetensors" else torch.save(squeezenet.state_dict(), path)
    teacher = parse_teacher(f"torchvision:squeezenet1_1?num_classes=5&weights_file={path}").load(CPU)
    image = torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    preset = get_model_weights("squeezenet1_1").DEFAULT.transforms()
    with torch.inference_mode():
        wanted = squeezenet(preset(image)[None])
    assert wanted.std() > 0.01
    torch.testing.assert_close(logits_of(teacher, image), wanted, rtol=1e-4, atol=1e-4)
    assert teacher.classes == ("0", "1", "2", "3", "4")
    assert str(tmp_path) not in json.dumps(teacher.identity)


def _cache(monkeypatch: pytest.MonkeyPatch, home: Path, name: str, member: str, content: object) -> None:
    """Put a file where torch.hub looks before it downloads."""
    monkeypatch.setenv("TORCH_HOME", str(home))
    file = home / "hub" / "checkpoints" / get_model_weights(name)[member].url.rpartition("/")[2]
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file)


@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet", "densenet121", "mnasnet0_5"])
def test_published_weights_give_torchvisions_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """GoogLeNet's normalise their input again, DenseNet's have old names, MNASNet's need the version that lies beside
    the tensors: torchvision's builders know it, we must, too. A local copy of the file gives the same teacher.
    """
    torch.manual_seed(1)
    options = {"init_weights": False} if name == "googlenet" else {}
    body = get_model(name, weights=None, **options)
    for module in body.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # so that after one batch the logits depend on the image, as those of a trained model
    body.train()(torch.randn(4, 3, 64, 64))
    state = body.state_dict()
    if name == "densenet121":
        state = {
            re.sub(r"(denselayer\d+\.(?:norm|conv))", r"\1.", key): value
            for key, value in state.items()
            if not key.endswith("num_batches_tracked")
        }
    _cache(monkeypatch, tmp_path, name, "DEFAULT", state)
    teacher = parse_teacher(f"torchvision:{name}?weights=DEFAULT").load(CPU)
    theirs = get_model(name, weights="DEFAULT").eval()
    image = torch.randint(0, 256, (3, 256, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted = theirs(get_model_weights(name).DEFAULT.transforms()(image)[None])
    assert wanted.std() > 0.01
    torch.testing.assert_close(logits_of(teacher, image), wanted, rtol=1e-3, atol=1e-4)
    assert teacher.classes[:2] == ("tench", "goldfish")
    torch.save(state, tmp_path / "copy.pth")
    local = parse_teacher(f"torchvision:{name}?weights=DEFAULT&weights_file={tmp_path / 'copy.pth'}").load(CPU)
    assert (local.identity, local.classes) == (teacher.identity, teacher.classes)
    torch.testing.assert_close(logits_of(local, image), logits_of(teacher, image))


def test_the_weights_that_were_asked_for_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given the value of the enum in place of its member, torchvision took the oldest weights, with no more than a
    deprecation warning: `weights=IMAGENET1K_V2` was V1.
    """
    hashes = []
    for seed, member in enumerate(("IMAGENET1K_V1", "IMAGENET1K_V2")):
        torch.manual_seed(seed)
        _cache(monkeypatch, tmp_path, "mobilenet_v2", member, get_model("mobilenet_v2", weights=None).state_dict())
    for member in ("IMAGENET1K_V1", "IMAGENET1K_V2", "DEFAULT"):
        teacher = parse_teacher(f"torchvision:mobilenet_v2?weights={member}").load(CPU)
        hashes.append(teacher.identity["weights_sha256"])
        assert teacher.preprocessing.resize == (256 if member == "IMAGENET1K_V1" else 232)
    assert hashes[0] != hashes[1]
    assert hashes[1] == hashes[2]


class Malicious:
    """Makes a directory when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("place", ["weights_file", "cache"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """torchvision's own loading of published weights unpickles whatever lies in torch.hub's cache."""
    trace, content = tmp_path / "trace", {"x": Malicious(tmp_path / "trace")}
    if place == "cache":
        _cache(monkeypatch, tmp_path, "squeezenet1_1", "DEFAULT", content)
        uri = "torchvision:squeezenet1_1?weights=DEFAULT"
    else:
        torch.save(content, tmp_path / "weights.pth")
        uri = f"torchvision:squeezenet1_1?weights_file={tmp_path / 'weights.pth'}"
    with pytest.raises(SpecError, match=r"holds more than tensors|delete it there"):
        parse_teacher(uri).load(CPU)
    assert not trace.exists()
    torch.load(next(tmp_path.rglob("*.pth")), weights_only=False)
    assert trace.exists(), "the file is harmless, so this test shows nothing"


def test_weights_that_can_not_be_downloaded_say_so_and_nothing_is_written_to_stdout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch.hub says `Downloading` on stdout, where `--json` promises one object and nothing else."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(SpecError, match=r"can't be downloaded .*\n.*weights_file=FILE"):
        parse_teacher("torchvision:squeezenet1_1?weights=DEFAULT").load(CPU)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.pth", b"", "can't be read as weights"),
        ("text.pth", b"<html>" * 20, "is no file of weights"),
        ("torn.pth", None, "can't be read as weights"),
        ("zeros.safetensors", b"\0" * 100, "can't be read as weights"),
        ("list.pth", [1, 2], "holds list, not a state dict"),
        ("nested.pth", {"state_dict": {}}, "don't load into the model: .*Missing key"),
        ("other.pth", {"classifier.1.weight": torch.zeros(1)}, "don't load into the model"),
    ],
)
def test_a_file_that_holds_no_such_weights_is_refused(tmp_path: Path, name: str, content: Any, said: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
        if content is None:
            path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(SpecError, match=said) as caught:
        parse_teacher(f"torchvision:squeezenet1_1?weights_file={path}").load(CPU)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize("name", ["missing.pth", "missing.safetensors", "2024"])
def test_a_missing_weights_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A file name that reads as a number is a name nevertheless."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=f"{name}: can't be read as weights .*No such file"):
        parse_teacher(f"torchvision:squeezenet1_1?weights_file={name}").load(CPU)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("torchvision:resnet50?weights=IMAGENET1K_V3", r"no weights 'IMAGENET1K_V3' \(did you mean 'IMAGENET1K_V"),
        ("torchvision:resnet50?weights=5", "no weights 5; known are IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"),
        ("torchvision:vgg16?weights=IMAGENET1K_FEATURES", "hold no classifier"),
    ],
)
def test_unknown_or_headless_weights_are_refused(uri: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        parse_teacher(uri).load(CPU)


def test_preprocessing_is_that_of_the_weights_for_every_classifier_of_torchvision() -> None:
    seen = 0
    for name in list_models(module=torchvision.models):
        for weights in get_model_weights(name):
            preset, ours = weights.transforms(), _preprocessing(weights)
            assert ([ours.resize], [ours.crop]) == (preset.resize_size, preset.crop_size), weights
            assert (list(ours.mean), list(ours.std)) == (list(preset.mean), list(preset.std)), weights
            assert ours.interpolation == preset.interpolation.value, weights
            seen += 1
    assert seen > 100


def test_random_weights_come_with_a_warning_and_from_the_seed() -> None:
    loaded = []
    for seed in (3, 3, 4):
        with pytest.warns(UserWarning, match="the teacher is random"):
            loaded.append(parse_teacher(f"torchvision:squeezenet1_1?num_classes=2&seed={seed}").load(CPU))
    first, same, other = (one.identity["weights_sha256"] for one in loaded)
    assert first == same != other
