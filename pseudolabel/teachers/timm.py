"""`timm:NAME`: any classifier of timm, such as `timm:vit_base_patch16_224.augreg_in21k_ft_in1k`.

The weights are the published ones of that name, from the cache or the net. `weights_file=F` takes them from a local
.safetensors or .pth file instead; `num_classes=N` is for files of a model that was fine-tuned to other classes.
`pretrained=false` makes random ones from `seed`: of use for timing alone. `timm:hf-hub:OWNER/NAME` and
`timm:local-dir:DIR` are read, too, as timm itself does.

Preprocessing is timm's `resolve_data_config`: its input size, crop_pct, crop_mode, interpolation, mean and std. Class
names are the config's, or ImageNet's by torchvision's spelling.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pseudolabel import specs
from pseudolabel.classes.names import usual_spelling
from pseudolabel.classifier import Classifier, make_classifier
from pseudolabel.errors import SpecError
from pseudolabel.specs import CLASSES, Spec
from pseudolabel.views.image import INTERPOLATIONS, Preprocessing
from pseudolabel.weights import explain_misfit, first_lines, random_weights, read_weights, weight_arguments

_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")


@dataclass(frozen=True)
class TimmTeacher:
    """A timm classifier by name."""

    spec: Spec

    @property
    def uri(self) -> str:
        return str(self.spec)

    def load(self, device: torch.device) -> Classifier:
        body = self._body(_checked(self.spec))
        config: dict[str, Any] = body.pretrained_cfg
        if not body.num_classes:
            raise SpecError(
                f"{self.uri}: these weights hold no classifier; name a model that was fine-tuned to classes"
            )
        return make_classifier(
            body,
            preprocessing_of(self.spec, config),
            architecture=f"timm:{config['architecture']}",
            device=device,
            classes=None if "num_classes" in dict(self.spec.args) else _classes(config),
        )

    def _body(self, args: Mapping[str, Any]) -> Any:
        timm = library(self.spec)
        options = {"num_classes": args["num_classes"]} if "num_classes" in args else {}
        if "weights_file" in args:
            path = str(args["weights_file"])
            overlay = {"source": "", "state_dict": read_weights(path), "custom_load": False, **options}
            with explain_misfit(path):  # through timm's own loading: it knows the older names of its layers
                body = timm.create_model(self.spec.name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
            body.pretrained_cfg.pop("state_dict", None)
            return body
        if args.get("pretrained", True):
            return self._published(timm)
        with random_weights(self.uri, args.get("seed", 0)), explain(self.spec, "can't be built"):
            return timm.create_model(self.spec.name, pretrained=False, **options)

    def _published(self, timm: Any) -> nn.Module:
        with explain(self.spec, "the weights can't be had"), contextlib.redirect_stdout(sys.stderr):
            body: nn.Module = timm.create_model(self.spec.name, pretrained=True)
            return body


@contextlib.contextmanager
def explain(spec: Spec, what: str) -> Iterator[None]:
    """What fails in the body is a `SpecError` that says `what`."""
    try:
        yield
    except Exception as error:  # timm and its hub raise kinds of many libraries
        raise SpecError(
            f"{spec}: {what} ({first_lines(error)})\nfetch them elsewhere and name them with weights_file=FILE"
        ) from error


def make(spec: Spec) -> TimmTeacher:
    """Describe it; the model's name and arguments are checked here. Raises `SpecError`."""
    timm = library(spec)
    if not spec.name.startswith(_SOURCES) and not ("/" not in spec.name and timm.is_model(spec.name)):
        known = timm.list_models() + timm.list_pretrained()
        raise SpecError(f"{spec}: timm has no model {spec.name!r}{specs.nearest(spec.name, known)}")
    _checked(spec)
    return TimmTeacher(spec)


def preprocessing_of(spec: Spec, config: Mapping[str, Any]) -> Preprocessing:
    """Timm's evaluation transform. Raises `SpecError` for what can't be said in a `Preprocessing`."""
    from timm.data import resolve_data_config

    data = resolve_data_config(pretrained_cfg=dict(config))
    channels, height, width = data["input_size"]
    problem = ""
    if height != width:
        problem = f"its input is {height}x{width}, not a square"
    elif data["crop_mode"] not in ("center", "squash"):
        problem = f"its crop_mode {data['crop_mode']!r} pads the image"
    elif data["interpolation"] not in INTERPOLATIONS:
        problem = f"its interpolation is {data['interpolation']!r}"
    elif channels not in (1, 3) or len(data["mean"]) != channels or len(data["std"]) != channels:
        problem = f"it has {channels} channels, and {len(data['mean'])} means"
    if problem:
        raise SpecError(f"{spec}: {problem}, which pseudolabel can't do; wrap the model as python:module:function")
    resize = math.floor(height / data["crop_pct"])
    fit = "squash" if data["crop_mode"] == "squash" else "shorter"
    return Preprocessing(resize, height, tuple(data["mean"]), tuple(data["std"]), data["interpolation"], fit)


def _classes(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    names = config.get("label_names")
    descriptions = config.get("label_descriptions") or {}
    if names is None:
        subset = infer_imagenet_subset(dict(config))
        if subset is None:
            return None
        names, descriptions = ImageNetInfo(subset).label_names(), ImageNetInfo(subset).label_descriptions(as_dict=True)
    return usual_spelling([str(descriptions.get(name, name)) for name in names])


def _checked(spec: Spec) -> dict[str, Any]:
    published = "the published weights are part of the name, NAME.TAG"
    args = weight_arguments(spec, whole={"num_classes": CLASSES}, published=published)
    if args.get("pretrained", True) and "num_classes" in args and "weights_file" not in args:
        raise SpecError(f"{spec}: published weights bring their classes; drop num_classes=, or add weights_file=")
    return args


def library(spec: Spec) -> Any:
    """The package. Raises `SpecError` if it isn't installed."""
    try:
        import timm
    except ImportError as error:
        raise specs.missing_package(spec, error, "timm") from error
    return timm
