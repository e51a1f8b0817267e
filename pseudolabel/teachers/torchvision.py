"""`torchvision:NAME?weights=ENUM`: any classifier of torchvision, preprocessed as its weights object says.

`weights_file=F` takes the weights from a local .safetensors or .pth file (read with `weights_only`), then
`weights=ENUM` names the preprocessing and classes only, or `num_classes=N` gives their number. With neither, the
weights are random from `seed`: of use for timing alone.
"""

from __future__ import annotations

import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import Weights, WeightsEnum, get_model, get_model_weights, list_models
from torchvision.transforms import InterpolationMode

from pseudolabel import specs
from pseudolabel.classifier import Classifier, make_classifier
from pseudolabel.errors import SpecError
from pseudolabel.specs import Spec
from pseudolabel.views.image import Preprocessing

_ARGUMENTS = ("weights", "weights_file", "num_classes", "seed")
_IMAGENET = Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class TorchvisionTeacher:
    """A torchvision classifier by name."""

    spec: Spec

    @property
    def uri(self) -> str:
        return str(self.spec)

    def load(self, device: torch.device) -> Classifier:
        args = self.spec.only(_ARGUMENTS)
        weights = _find_weights(self.spec, args["weights"]) if "weights" in args else None
        preprocessing = _preprocessing(weights) if weights is not None else _IMAGENET
        classes = list(weights.meta["categories"]) if weights is not None else None
        return make_classifier(
            self._body(args, weights),
            preprocessing,
            architecture=f"torchvision:{self.spec.name}",
            device=device,
            classes=classes,
        )

    def _body(self, args: dict[str, Any], weights: Weights | None) -> nn.Module:
        options: dict[str, Any] = {}
        if weights is not None:
            options["num_classes"] = len(weights.meta["categories"])
        elif "num_classes" in args:
            options["num_classes"] = args["num_classes"]
        if "weights_file" in args:
            untrained: nn.Module = get_model(self.spec.name, weights=None, **options)
            return _load_file(untrained, Path(args["weights_file"]))
        if weights is None:
            warnings.warn(
                f"{self.uri}: no weights are given, so the teacher is random; of use for timing alone", stacklevel=2
            )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(args.get("seed", 0))
                body: nn.Module = get_model(self.spec.name, weights=None, **options)
                return body
        try:
            pretrained: nn.Module = get_model(self.spec.name, weights=weights)
            return pretrained
        except OSError as error:
            raise SpecError(
                f"{self.uri}: the weights can't be downloaded ({error})\nfetch them elsewhere and "
                "name them with weights_file=FILE, beside weights="
            ) from error


def make(spec: Spec) -> TorchvisionTeacher:
    """Describe it; the model's name and arguments are checked here. Raises `SpecError`."""
    known = list_models()
    if spec.name not in known:
        raise SpecError(f"{spec}: torchvision has no model {spec.name!r}{specs.nearest(spec.name, known)}")
    spec.only(_ARGUMENTS)
    return TorchvisionTeacher(spec)


def _find_weights(spec: Spec, name: str) -> Weights:
    enum: type[WeightsEnum] = get_model_weights(spec.name)
    names = [*enum.__members__, "DEFAULT"]
    if name not in names:
        raise SpecError(f"{spec}: no weights {name!r}{specs.nearest(str(name), names)}; known are {', '.join(names)}")
    chosen: WeightsEnum = getattr(enum, name)
    return chosen.value


def _preprocessing(weights: Weights) -> Preprocessing:
    preset = weights.transforms()
    (resize,), (crop,) = preset.resize_size, preset.crop_size
    interpolation: InterpolationMode = preset.interpolation
    return Preprocessing(resize, crop, tuple(preset.mean), tuple(preset.std), interpolation.value)


def _load_file(body: nn.Module, path: Path) -> nn.Module:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        body.load_state_dict(state)
    except pickle.UnpicklingError as error:
        raise SpecError(
            f"{path}: holds more than tensors, and loading that could run code; convert it to .safetensors"
        ) from error
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise SpecError(f"{path}: these weights don't load into the model: {str(error).splitlines()[0]}") from error
    return body
