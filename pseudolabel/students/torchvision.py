"""`torchvision:NAME?arg=value`: any classifier of torchvision, the arguments going to its builder.

`weights=ENUM` starts from published weights, `weights_file=F` from a local .safetensors or .pth file (ENUM then names
the normalisation only, which is ImageNet's without it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torchvision.models
from torch import Tensor, nn
from torchvision.models import get_model, list_models

from pseudolabel import specs
from pseudolabel.errors import SpecError
from pseudolabel.specs import Spec
from pseudolabel.students.start import Start
from pseudolabel.teachers.torchvision import TorchvisionTeacher, find_weights, read_file

_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
_OF_TENSORFLOW = ("googlenet", "inception_v3")  # in training, their auxiliary heads make them return tuples


@dataclass(frozen=True)
class TorchvisionStudent:
    """A torchvision classifier by name."""

    spec: Spec
    config: None = None

    def build(self, num_classes: int, channels: int) -> nn.Module:
        if channels != 3:
            raise SpecError(
                f"{self.spec}: torchvision's models take 3 channels; use --channels 3 (grey images are repeated)"
            )
        try:
            model: nn.Module = get_model(self.spec.name, weights=None, num_classes=num_classes, **self._options())
        except (TypeError, ValueError, KeyError, RuntimeError, AssertionError, ArithmeticError) as error:
            raise SpecError(f"{self.spec}: {error or 'its builder refuses these arguments'}") from error
        return model

    def start(self, num_classes: int, channels: int) -> Start | None:
        args = dict(self.spec.args)
        if not args.keys() & {"weights", "weights_file"}:
            return None
        named = tuple(pair for pair in self.spec.args if pair[0] == "weights")
        teacher = TorchvisionTeacher(Spec("torchvision", self.spec.name, named))
        state = _read(str(args["weights_file"])) if "weights_file" in args else teacher.body().state_dict()
        state = {name: tensor for name, tensor in state.items() if not name.startswith(_AUXILIARY)}
        images = teacher.preprocessing
        return Start(str(args.get("weights_file", self.spec)), state, (images.mean, images.std))

    def _options(self) -> dict[str, Any]:
        """What the builder is told. The weights are not read here, but change the architecture in places, as they do
        in torchvision's own builders.
        """
        options = {name: value for name, value in self.spec.args if name not in ("weights", "weights_file")}
        weights = dict(self.spec.args).get("weights")
        if self.spec.name in _OF_TENSORFLOW:
            options = {"aux_logits": False, "init_weights": True, "transform_input": weights is not None, **options}
        if self.spec.name.startswith("vit_") and weights is not None:
            options = {"image_size": find_weights(self.spec, str(weights)).meta["min_size"][0], **options}
        return options


def make(spec: Spec, config: object = None) -> TorchvisionStudent:
    """Describe it; the names of model and weights are checked here. Raises `SpecError`."""
    known = list_models(module=torchvision.models)
    if spec.name not in known:
        raise SpecError(f"{spec}: torchvision has no classifier {spec.name!r}{specs.nearest(spec.name, known)}")
    args = dict(spec.args)
    if "weights" in args:
        find_weights(spec, str(args["weights"]))
    if "num_classes" in args:
        raise SpecError(f"{spec}: the data says how many classes there are; leave num_classes= out")
    return TorchvisionStudent(spec)


def _read(path: str) -> dict[str, Tensor]:
    state = read_file(path)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise SpecError(f"{path}: holds more than tensors by name, such as {name!r}; save model.state_dict() alone")
    return state
