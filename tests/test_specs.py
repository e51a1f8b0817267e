"""Specs, and what they name: teachers of every source, ensembles, students, and models that were damaged on disk."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models
from conftest import make_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models

from pseudolabel import specs
from pseudolabel.checkpoint import ModelCard, load_model, save_model
from pseudolabel.errors import DamagedModel, SpecError
from pseudolabel.labeling import identify
from pseudolabel.settings import AnnotateSettings
from pseudolabel.specs import Spec
from pseudolabel.students import build_student
from pseudolabel.teachers import parse_teacher, parse_teachers
from pseudolabel.teachers.torchvision import _preprocessing
from pseudolabel.views.image import square

CPU = torch.device("cpu")
Damage = Callable[[Path], None]


def grey(seed: int = 0, size: int = 12) -> Tensor:
    return torch.randint(0, 256, (1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def logits_of(teacher: Any, *images: Tensor) -> Tensor:
    """What a loaded teacher says of a batch of images."""
    columns = zip(*(teacher.prepare(image) for image in images), strict=True)
    with torch.inference_mode():
        logits: Tensor = teacher.logits(tuple(torch.stack(column) for column in columns))
    return logits


# --- the URI itself


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("small:resnet8?width=16", Spec("small", "resnet8", (("width", 16),))),
        ("checkpoint:runs/a:b", Spec("checkpoint", "runs/a:b")),
        ("python:a.b:f?x=1&y=0.5&z=one", Spec("python", "a.b:f", (("x", 1), ("y", 0.5), ("z", "one")))),
        ("python:m:f?on=true&off=False&empty=", Spec("python", "m:f", (("on", True), ("off", False), ("empty", "")))),
        ("t:m?weights_file=/a%20b/c%26d.pth", Spec("t", "m", (("weights_file", "/a b/c&d.pth"),))),
        ("t:m?weights_file=c++/w.pth", Spec("t", "m", (("weights_file", "c++/w.pth"),))),
    ],
)
def test_parse(text: str, wanted: Spec) -> None:
    """A plus stays a plus: `c++/w.pth` became `c  /w.pth`, as in a web form."""
    assert specs.parse(text) == wanted


@pytest.mark.parametrize("text", ["", "resnet50", ":resnet50", "torchvision:", "torchvision:?weights=DEFAULT"])
def test_text_without_scheme_or_name_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(SpecError, match="is not a spec; write scheme:name"):
        specs.parse(text)


@pytest.mark.parametrize(("text", "why"), [("a:b?c", "can't read the arguments"), ("a:b?c=1&c=2", "given twice")])
def test_arguments_that_can_not_be_read_are_refused(text: str, why: str) -> None:
    with pytest.raises(SpecError, match=why):
        specs.parse(text)


@given(
    st.dictionaries(
        st.text("abcxyz_", min_size=1),
        st.one_of(st.integers(), st.booleans(), st.text("abc/.-+:@", min_size=1, max_size=9)),
    )
)
def test_a_spec_as_text_parses_to_itself(args: dict[str, Any]) -> None:
    spec = Spec("python", "module:function", tuple(args.items()))
    assert [type(value) for _, value in specs.parse(str(spec)).args] == [type(value) for value in args.values()]
    assert specs.parse(str(spec)) == spec


def test_only_gives_the_arguments_or_names_the_nearest() -> None:
    spec = specs.parse("small:resnet8?width=4")
    assert spec.only(["width", "stem_stride"]) == {"width": 4}
    with pytest.raises(SpecError, match=r"unknown argument 'width' \(did you mean 'widths'\?\); it takes widths, x"):
        spec.only(["widths", "x"])
    with pytest.raises(SpecError, match="unknown argument 'width'; it takes none"):
        spec.only([])


def test_nearest_is_silent_where_nothing_is_near() -> None:
    assert specs.nearest("resnet9", ["resnet8", "vgg"]) == " (did you mean 'resnet8'?)"
    assert specs.nearest("qqq", ["resnet8", "vgg"]) == ""
    assert specs.nearest("x", []) == ""


# --- the table of teachers


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("chekpoint:run", r"unknown teacher source 'chekpoint' \(did you mean 'checkpoint'\?\); known are torchvision"),
        ("torchvision:resnet5", r"torchvision has no classifier 'resnet5' \(did you mean 'resnet50'\?\)"),
        ("torchvision:resnet18?weight=DEFAULT", r"unknown argument 'weight' \(did you mean 'weights'\?\)"),
        ("torchvision:resnet18?num_classes=ten", "num_classes must be a whole number from 1"),
        ("torchvision:resnet18?num_classes=0", "num_classes must be a whole number from 1"),
        ("torchvision:resnet18?num_classes=true", "num_classes must be a whole number from 1"),
        ("torchvision:resnet18?seed=-1", "seed must be a whole number from 0"),
        ("torchvision:resnet18?weights=DEFAULT&num_classes=5", "drop it or num_classes="),
        ("torchvision:fcn_resnet50", r"no classifier 'fcn_resnet50' \(did you mean 'resnet50'\?\)"),
        ("checkpoint:run?x=1", "unknown argument 'x'; it takes trust_code"),
    ],
)
def test_a_wrong_teacher_is_refused_before_anything_is_loaded(uri: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        parse_teacher(uri)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_an_ensemble_weight_is_a_number_above_zero(weight: str) -> None:
    """`@nan` made every logit of the ensemble NaN, and so every sample a reject."""
    with pytest.raises(SpecError, match="must be a number above 0"):
        parse_teachers([f"checkpoint:a@{weight}", "checkpoint:b"])


def test_one_teacher_is_no_ensemble_and_none_is_an_error() -> None:
    assert parse_teachers(["checkpoint:a@0.7"]) == parse_teacher("checkpoint:a")
    assert parse_teachers(["checkpoint:mail@home"]).uri == "checkpoint:mail%40home"
    with pytest.raises(SpecError, match="no teacher given"):
        parse_teachers([])


@pytest.mark.parametrize(
    "uris", [["torchvision:resnet18?num_classes=3"], ["python:m:f?a=1"], ["checkpoint:a", "checkpoint:b@3"]]
)
def test_a_description_pickles(uris: list[str]) -> None:
    """It travels to worker processes."""
    teacher = parse_teachers(uris)
    again = pickle.loads(pickle.dumps(teacher))  # noqa: S301
    assert again == teacher
    assert again.uri == teacher.uri


# --- torchvision


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
        ("text.pth", b"hello world" * 20, "can't be read as weights|holds more than tensors"),
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


# --- python: entry points

MODULE = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, scale=1.0, outputs=3):
        super().__init__()
        self.scale, self.outputs = nn.Parameter(torch.tensor(float(scale))), outputs
        self.dropout = nn.Dropout(0.5)
    def forward(self, x):
        return self.dropout(self.scale * x.flatten(1)[:, :self.outputs])

def make(scale=1.0, outputs=3, classes=None, preprocessing=True):
    model = Model(scale, outputs)
    if preprocessing is True:
        model.preprocessing = {"resize": 12, "crop": 12, "mean": [0.0], "std": [0.5]}
    elif preprocessing:
        flat = {"resize": 8, "crop": 8, "mean": [0], "std": [0]}
        model.preprocessing = {"half": {"resize": 12}, "number": 12, "flat": flat}[preprocessing]
    if classes:
        model.classes = {"two": ["a", "b"], "three": ["a", "b", "c"], "text": "abc", "number": 3}[classes]
    return model

def make_student(num_classes, in_channels, extra=0):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes + extra))

def not_a_model():
    return {"logits": 1}

def raises(size):
    return size + "one"

def needs_an_argument(size):
    return size

def image_out():
    return nn.Identity()

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's module in the current directory, under a name of its own."""
    name = f"user_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return name


def test_a_python_teacher_is_called_with_its_arguments(module: str) -> None:
    """In evaluation mode, too: with its dropout on, the logits would be halved and doubled."""
    teacher = parse_teacher(f"python:{module}:make?scale=2.5&classes=three").load(CPU)
    image = grey()
    assert teacher.classes == ("a", "b", "c")
    torch.testing.assert_close(logits_of(teacher, image), 2.5 * image.flatten()[None, :3] / 255 / 0.5)
    other = parse_teacher(f"python:{module}:make?scale=2&classes=three").load(CPU)
    assert teacher.identity["weights_sha256"] != other.identity["weights_sha256"]


def test_a_python_teacher_without_preprocessing_sees_224_pixels_rgb(module: str) -> None:
    teacher = parse_teacher(f"python:{module}:make?preprocessing=").load(CPU)
    assert teacher.preprocessing == square(224, 3)
    assert teacher.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("nothing", "can't import it: module .* has no attribute 'nothing'"),
        ("make?colour=red", "unexpected keyword argument 'colour'"),
        ("needs_an_argument", "missing 1 required positional argument"),
        ("raises?size=1", "unsupported operand"),
        ("not_a_model", "must return an nn.Module, it returned dict"),
        ("number", "'int' object is not callable"),
        ("image_out", r"must give logits of shape \(batch, classes\), it gave \(1, 3, 224, 224\)"),
        ("make?classes=two", "2 class names for 3 logits"),
        ("make?classes=text", "`classes` must be a list of names, it is str"),
        ("make?classes=number", "`classes` must be a list of names, it is int"),
        ("make?preprocessing=half", "`preprocessing` lacks or misstates 'mean'"),
        ("make?preprocessing=flat", "`preprocessing` lacks or misstates"),
        ("make?preprocessing=number", "must be a Preprocessing or a dict, it is int"),
    ],
)
def test_a_python_teacher_that_does_not_work_is_refused(module: str, call: str, said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        parse_teacher(f"python:{module}:{call}").load(CPU)
    assert len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize("name", ["module", ":function", "module:", ".relative:function"])
def test_an_entry_point_is_module_and_function(name: str) -> None:
    with pytest.raises(SpecError, match=r"write python:package\.module:function"):
        parse_teacher(f"python:{name}").load(CPU)


def test_a_missing_module_says_where_to_run() -> None:
    with pytest.raises(SpecError, match="No module named 'no_such_module'; run where the module lies, or install it"):
        parse_teacher("python:no_such_module:f").load(CPU)


# --- ensembles


@pytest.fixture
def two_models(tmp_path: Path) -> list[str]:
    return [f"checkpoint:{make_model(tmp_path / f'model-{seed}', seed=seed)}" for seed in (1, 2)]


@pytest.mark.parametrize("weights", [(None, None), ("3", "1"), ("0.2", "0.05")])
def test_an_ensemble_is_the_weighted_mean_of_log_probabilities(
    two_models: list[str], weights: tuple[str | None, str | None]
) -> None:
    uris = [uri if weight is None else f"{uri}@{weight}" for uri, weight in zip(two_models, weights, strict=True)]
    images = [grey(seed) for seed in range(6)]
    one, two = (logits_of(parse_teacher(uri).load(CPU), *images) for uri in two_models)
    share = 0.5 if weights == (None, None) else float(weights[0] or 1) / sum(float(weight or 1) for weight in weights)
    found = logits_of(parse_teachers(uris).load(CPU), *images)
    wanted = share * one.log_softmax(-1) + (1 - share) * two.log_softmax(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_an_ensemble_gives_the_soft_labels_of_the_mean_of_logits(two_models: list[str], temperature: float) -> None:
    """The two differ by a constant a row, so one store serves both readings at every temperature."""
    images = [grey(seed) for seed in range(6)]
    mean = sum(0.5 * logits_of(parse_teacher(uri).load(CPU), *images) for uri in two_models)
    found = logits_of(parse_teachers(two_models).load(CPU), *images)
    shift = mean - found
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=0, atol=1e-6)
    assert shift.abs().min() > 1e-3, "equal by themselves, so this test shows nothing"
    torch.testing.assert_close((found / temperature).softmax(-1), (mean / temperature).softmax(-1))


def _named(directory: Path, names: tuple[str, ...], seed: int = 0, size: int = 12, channels: int = 1) -> str:
    torch.manual_seed(seed)
    card = ModelCard("small:resnet8?width=4", names, square(size, channels))
    save_model(directory, card, card.build())
    return f"checkpoint:{directory}"


def test_an_ensemble_needs_one_label_space(tmp_path: Path) -> None:
    cat_dog, dog_cat = _named(tmp_path / "a", ("cat", "dog")), _named(tmp_path / "b", ("dog", "cat"))
    three = _named(tmp_path / "c", ("cat", "dog", "bird"))
    with pytest.raises(SpecError, match=rf"{cat_dog} has 2 classes, {three} has 3"):
        parse_teachers([cat_dog, three]).load(CPU)
    with pytest.raises(SpecError, match=rf"class 0 is 'cat' in {cat_dog} and 'dog' in {dog_cat}"):
        parse_teachers([cat_dog, dog_cat]).load(CPU)


def test_numbered_classes_join_named_ones_and_each_member_prepares_its_own_input(tmp_path: Path) -> None:
    numbered = _named(tmp_path / "a", ("0", "1"), size=16, channels=3)
    named = _named(tmp_path / "b", ("cat", "dog"), seed=1)
    ensemble = parse_teachers([numbered, named]).load(CPU)
    assert ensemble.classes == ("cat", "dog")
    assert [tuple(one.shape) for one in ensemble.prepare(grey(size=20))] == [(3, 16, 16), (1, 12, 12)]
    assert logits_of(ensemble, grey(size=20)).shape == (1, 2)


def test_an_ensembles_identity_knows_members_and_weights(tmp_path: Path, two_models: list[str]) -> None:
    one, two = two_models
    moved = shutil.copytree(one.removeprefix("checkpoint:"), tmp_path / "elsewhere")
    identity = parse_teachers([f"{one}@3", f"{two}@1"]).load(CPU).identity
    assert identity == parse_teachers([f"checkpoint:{moved}@0.75", f"{two}@0.25"]).load(CPU).identity
    assert identity != parse_teachers([one, two]).load(CPU).identity


# --- checkpoints: what they are doesn't depend on where they lie, and damage is seen


def test_a_checkpoints_identity_is_its_content_not_its_path(tmp_path: Path, teacher_dir: Path) -> None:
    moved = shutil.copytree(teacher_dir, tmp_path / "moved")
    loaded, again = (parse_teacher(f"checkpoint:{path}").load(CPU) for path in (teacher_dir, moved))
    settings = AnnotateSettings(precision="fp32")
    assert loaded.identity == again.identity
    assert identify(loaded, settings).fingerprint == identify(again, settings).fingerprint
    other = parse_teacher(f"checkpoint:{make_model(tmp_path / 'other', seed=1)}").load(CPU)
    renamed = parse_teacher(_named(tmp_path / "renamed", ("a", "b", "c", "d"))).load(CPU)
    fingerprints = {identify(one, settings).fingerprint for one in (loaded, other, renamed)}
    assert len(fingerprints) == 3
    assert loaded.identity["weights_sha256"] == renamed.identity["weights_sha256"] != other.identity["weights_sha256"]


def test_a_model_reads_back_as_it_was_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    card = ModelCard("small:resnet14?width=4&stem_stride=2", ("cat", "d\u00f6g"), square(16, 3))
    body = card.build()
    save_model(tmp_path / "m", card, body)
    loaded = load_model(tmp_path / "m", CPU)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.inference_mode():
        wanted = body.eval()((pixels.float() / 255 - 0.5) / 0.5)
    torch.testing.assert_close(loaded.logits((pixels,)), wanted)
    assert (loaded.classes, loaded.preprocessing) == (card.classes, card.preprocessing)
    assert not loaded.model.training


def _cut(name: str, keep: float) -> Damage:
    def damage(directory: Path) -> None:
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(keep * len(content))])

    return damage


def _edit(**changes: Any) -> Damage:
    """Change fields of model.json, and leave all else as it is; None removes a field."""

    def damage(directory: Path) -> None:
        data = json.loads((directory / "model.json").read_text()) | changes
        data = {name: value for name, value in data.items() if value is not None}
        (directory / "model.json").write_text(json.dumps(data, indent=1))

    return damage


def _swap_weights(directory: Path) -> None:
    other = make_model(directory.parent / "other", seed=5)
    shutil.copyfile(other / "model.safetensors", directory / "model.safetensors")


DAMAGES: dict[str, Damage] = {
    "no card": lambda directory: (directory / "model.json").unlink(),
    "no weights": lambda directory: (directory / "model.safetensors").unlink(),
    "nothing at all": shutil.rmtree,
    **{f"weights cut to {keep}": _cut("model.safetensors", keep) for keep in (0, 0.001, 0.2, 0.99)},
    **{f"card cut to {keep}": _cut("model.json", keep) for keep in (0, 0.5, 0.99)},
    "card is a list": lambda directory: (directory / "model.json").write_text("[]") and None,
    "card is no text": lambda directory: (directory / "model.json").write_bytes(b"\xff\xfe\0") and None,
    "weights of another model": _swap_weights,
    "width edited": _edit(student="small:resnet8?width=8"),
    "depth edited": _edit(student="small:resnet9?width=4"),
    "class renamed": _edit(classes=["class 0", "class 1", "class 2", "class three"]),
    "classes swapped": _edit(classes=["class 1", "class 0", "class 2", "class 3"]),
    "class dropped": _edit(classes=["class 0", "class 1", "class 2"]),
    "mean edited": _edit(preprocessing={**square(12, 1).to_json(), "mean": [0.25]}),
    "size edited": _edit(preprocessing={**square(12, 1).to_json(), "crop": 10}),
    "no preprocessing": _edit(preprocessing=None),
    "hash edited": _edit(weights_sha256="0" * 64),
    "version edited": _edit(format_version=2),
    "field added": _edit(note="mine"),
    "field removed": _edit(parameters=None),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_model_is_refused_by_name(teacher_dir: Path, damage: Damage) -> None:
    """A class renamed or a mean changed by hand leaves the weights whole: the card has a hash of its own."""
    damage(teacher_dir)
    with pytest.raises(DamagedModel) as caught:
        parse_teacher(f"checkpoint:{teacher_dir}").load(CPU)
    message = str(caught.value)
    assert str(teacher_dir) in message
    assert len(message.splitlines()) <= 5
    assert any(word in message for word in ("train again", "restore", "pseudolabel train"))


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_no_flipped_bit_goes_unseen(tmp_path: Path, name: str) -> None:
    """Any byte, one bit: refused as damage, or without any effect (a space that became a tab)."""
    directory = make_model(tmp_path / "model", student="small:resnet8?width=1")
    whole = load_model(directory, CPU)
    content = (directory / name).read_bytes()
    generator = torch.Generator().manual_seed(0)
    header = 8 + int.from_bytes(content[:8], "little") if name == "model.safetensors" else len(content)
    places = [
        *range(0, header, 1 + header // 150),
        *torch.randint(0, len(content), (30,), generator=generator).tolist(),
    ]
    refused = 0
    for place, bit in zip(places, torch.randint(0, 8, (len(places),), generator=generator).tolist(), strict=True):
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        (directory / name).write_bytes(flipped)
        try:
            found = load_model(directory, CPU)
        except DamagedModel:
            refused += 1
        else:
            assert (found.identity, found.classes) == (whole.identity, whole.classes), (place, bit)
    assert refused > 0.9 * len(places)


def test_a_card_without_its_hash_is_refused(tmp_path: Path) -> None:
    model = make_model(tmp_path / "teacher")
    card = json.loads((model / "model.json").read_text())
    del card["card_sha256"]
    (model / "model.json").write_text(json.dumps(card))
    with pytest.raises(DamagedModel, match="card_sha256"):
        load_model(model, torch.device("cpu"))


# --- students


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("small:resnet9", r"no small student 'resnet9' \(did you mean 'resnet8'\?\); known are resnet8, resnet14"),
        ("small:resnet8?witdh=4", r"unknown argument 'witdh' \(did you mean 'width'\?\)"),
        ("small:resnet8?width=0", "width must be a whole number above 0"),
        ("small:resnet8?width=true", "width must be a whole number above 0"),
        ("small:resnet8?width=1.5", "width must be a whole number above 0"),
        ("smal:resnet8", r"unknown student source 'smal' \(did you mean 'small'\?\); known are small, torchvision"),
        ("torchvision:resnet19", "torchvision has no classifier 'resnet19'"),
        ("torchvision:fcn_resnet50", "torchvision has no classifier 'fcn_resnet50'"),
        ("torchvision:squeezenet1_1?depth=3", "unexpected keyword argument 'depth'"),
        ("torchvision:squeezenet1_1?weights=DEFAULT", "a student starts untrained"),
        ("python:no_such_module:f", "No module named"),
    ],
)
def test_a_wrong_student_is_refused(uri: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        build_student(uri, num_classes=4, channels=3)


def test_torchvisions_students_take_three_channels() -> None:
    with pytest.raises(SpecError, match="use --channels 3"):
        build_student("torchvision:squeezenet1_1", num_classes=4, channels=1)


@pytest.mark.parametrize(
    "uri", ["small:resnet8?width=4", "small:resnet20?width=2&stem_stride=2", "torchvision:squeezenet1_1"]
)
def test_a_student_gives_logits_in_training(uri: str) -> None:
    body = ModelCard(uri, ("a", "b", "c"), square(32, 3)).build()
    assert body.training
    assert body(torch.zeros(2, 3, 32, 32)).shape == (2, 3)


def test_a_student_with_auxiliary_heads_gives_plain_logits_in_training() -> None:
    """GoogLeNet's and Inception's return tuples while they train, which no loss here can take."""
    body = build_student("torchvision:googlenet", num_classes=3, channels=3)
    assert body.train()(torch.zeros(2, 3, 64, 64)).shape == (2, 3)


def test_a_python_student_is_told_classes_and_channels(module: str) -> None:
    card = ModelCard(f"python:{module}:make_student", ("a", "b"), square(8, 1))
    assert card.build()(torch.zeros(3, 1, 8, 8)).shape == (3, 2)


@pytest.mark.parametrize(
    ("student", "size", "said"),
    [
        ("python:{module}:make_student?extra=1", 8, r"must give logits of shape \(2, 2\), it gave \(2, 3\)"),
        ("torchvision:squeezenet1_1", 8, r"fails on an input of shape \(2, 3, 8, 8\)"),
    ],
)
def test_a_student_that_does_not_fit_images_and_classes_is_refused(
    module: str, student: str, size: int, said: str
) -> None:
    """One output too many trained to the end and could then not be loaded."""
    with pytest.raises(SpecError, match=said):
        ModelCard(student.format(module=module), ("a", "b"), square(size, 3)).build()
