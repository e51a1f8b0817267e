"""`torchvision:NAME?weights=ENUM`: any classifier of torchvision, preprocessed as its weights object says.

`weights_file=F` takes the weights from a local .safetensors or .pth file (read with `weights_only`), then
`weights=ENUM` names the preprocessing and classes only, or `num_classes=N` gives their number. With neither, the
weights are random from `seed`: of use for timing alone.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models
from torchvision.transforms import InterpolationMode

from pseudolabel import specs
from pseudolabel.classifier import Classifier, make_classifier
from pseudolabel.errors import SpecError
from pseudolabel.specs import CLASSES, SEEDS, Spec
from pseudolabel.views.image import Preprocessing
from pseudolabel.weights import fill, first_lines, random_weights, read_weights

_ARGUMENTS = ("weights", "weights_file", "num_classes", "seed")
_IMAGENET = Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")  # the names in DenseNet's published weights


@dataclass(frozen=True)
class TorchvisionTeacher:
    """A torchvision classifier by name."""

    spec: Spec

    @property
    def uri(self) -> str:
        return str(self.spec)

    def load(self, device: torch.device) -> Classifier:
        weights = self._weights
        return make_classifier(
            self.body(),
            self.preprocessing,
            architecture=f"torchvision:{self.spec.name}",
            device=device,
            classes=list(weights.meta["categories"]) if weights is not None else None,
        )

    @property
    def preprocessing(self) -> Preprocessing:
        """That of the weights, or ImageNet's usual one."""
        weights = self._weights
        return _preprocessing(weights) if weights is not None else _IMAGENET

    @property
    def _weights(self) -> WeightsEnum | None:
        name = dict(self.spec.args).get("weights")
        return find_weights(self.spec, name) if name is not None else None

    def body(self) -> nn.Module:
        """The model, its weights filled in. Raises `SpecError`."""
        args, weights = _checked(self.spec), self._weights
        if "weights_file" in args:
            path = str(args["weights_file"])
            return fill(self._untrained(args, weights), read_file(path), path)
        if weights is not None:
            return fill(self._untrained(args, weights), _old_names(_download(self.spec, weights)), str(self.spec))
        with random_weights(self.uri, args.get("seed", 0)):
            return self._untrained(args, None)

    def _untrained(self, args: dict[str, Any], weights: WeightsEnum | None) -> nn.Module:
        """The model that the weights fit: what torchvision's builders change for pretrained weights is changed here."""
        options: dict[str, Any] = {"num_classes": args["num_classes"]} if "num_classes" in args else {}
        if weights is not None:
            options["num_classes"] = len(weights.meta["categories"])
            if self.spec.name.startswith("vit_"):
                options["image_size"] = weights.meta["min_size"][0]
        if self.spec.name in ("googlenet", "inception_v3"):
            options["transform_input"] = weights is not None  # they came from TensorFlow, with its normalisation
            options["init_weights"] = weights is None and "weights_file" not in args
        body: nn.Module = get_model(self.spec.name, weights=None, **options)
        return body


def make(spec: Spec) -> TorchvisionTeacher:
    """Describe it; the model's name and arguments are checked here. Raises `SpecError`."""
    known = list_models(module=torchvision.models)
    if spec.name not in known:
        raise SpecError(f"{spec}: torchvision has no classifier {spec.name!r}{specs.nearest(spec.name, known)}")
    _checked(spec)
    return TorchvisionTeacher(spec)


def _checked(spec: Spec) -> dict[str, Any]:
    args = spec.only(_ARGUMENTS, whole={"num_classes": CLASSES, "seed": SEEDS})
    if "weights" in args and "num_classes" in args:
        raise SpecError(f"{spec}: weights= says the number of classes; drop it or num_classes=")
    return args


def find_weights(spec: Spec, name: str) -> WeightsEnum:
    """Published weights of a model by their name. Raises `SpecError`."""
    enum: type[WeightsEnum] = get_model_weights(spec.name)
    names = list(enum.__members__)  # DEFAULT is one of them
    if name not in names:
        raise SpecError(f"{spec}: no weights {name!r}{specs.nearest(str(name), names)}; known are {', '.join(names)}")
    weights = enum[name]
    if not weights.meta["categories"]:
        raise SpecError(f"{spec}: these weights hold no classifier; use others of {', '.join(names)}")
    return weights


def _preprocessing(weights: WeightsEnum) -> Preprocessing:
    preset = weights.transforms()
    (resize,), (crop,) = preset.resize_size, preset.crop_size
    interpolation: InterpolationMode = preset.interpolation
    return Preprocessing(resize, crop, tuple(preset.mean), tuple(preset.std), interpolation.value)


def _download(spec: Spec, weights: WeightsEnum) -> dict[str, Tensor]:
    """The weights from torch.hub's cache, or the net. Not through torchvision's builders: those unpickle."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch.hub reports on stdout, where only JSON may be
            state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
                weights.url, map_location="cpu", check_hash=True, weights_only=True
            )
            return state
    except pickle.UnpicklingError as error:
        raise SpecError(
            f"{spec}: the file in torch.hub's cache ({torch.hub.get_dir()}) is not {weights.url}; delete it there"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise SpecError(
            f"{spec}: the weights can't be downloaded ({first_lines(error)})\nfetch them elsewhere and "
            "name them with weights_file=FILE, beside weights="
        ) from error


def read_file(path: str) -> dict[str, Tensor]:
    """Weights from a local file, by the names that the model has today. Raises `SpecError`."""
    return _old_names(read_weights(path))


def _old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for name in list(state):  # in place: a state dict carries versions beside its tensors
        new = _OLD_DENSENET.sub(r"\1\2", name) if isinstance(name, str) else name
        state[new] = state.pop(name)
    return state
