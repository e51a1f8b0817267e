"""Specs, and what they name: the table of teachers, functions of users, students."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import CPU, grey, logits_of

from pseudolabel import specs
from pseudolabel.checkpoint import ModelCard
from pseudolabel.errors import SpecError
from pseudolabel.specs import Spec
from pseudolabel.students import build_student
from pseudolabel.teachers import parse_teacher, parse_teachers
from pseudolabel.views.image import square

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
        ("torchvision:resnet18?num_classes=1000000000000", "num_classes must be a whole number from 1 to 1048576"),
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
        ("torchvision:squeezenet1_1?weights=BEST", "no weights 'BEST'; known are IMAGENET1K_V1, DEFAULT"),
        ("torchvision:squeezenet1_1?num_classes=3", "leave num_classes= out"),
        ("timm:resnet19", r"timm has no architecture 'resnet19' \(did you mean"),
        ("timm:hf-hub:someone/model", "timm has no architecture"),
        ("timm:test_vit?num_classes=3", "leave num_classes= out: the data says it"),
        ("timm:test_vit?checkpoint_path=a.pth", "leave checkpoint_path= out: a student takes pretrained or weights_f"),
        ("timm:test_vit?pretrained=yes", "pretrained must be true or false"),
        ("timm:test_vit?pretrained=true&weights_file=a.pth", "not both"),
        ("timm:test_vit?depht=3", "unexpected keyword argument 'depht'"),
        ("hf:no/such/model", "its config can't be loaded"),
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
