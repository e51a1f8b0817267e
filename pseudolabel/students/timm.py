"""`timm:NAME?arg=value`: any architecture of timm, the arguments going to its builder, such as `img_size=64` or
`drop_path_rate=0.1`.

`pretrained=true` starts from the published weights of that name, `weights_file=F` from a local .safetensors or .pth
file. Both go through timm's own loading, which resamples position embeddings to another `img_size` and sums the first
layer's weights over the colours for grey images.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pseudolabel import specs
from pseudolabel.errors import SpecError
from pseudolabel.specs import Spec
from pseudolabel.students.start import Start, norm_for
from pseudolabel.teachers.timm import explain, library
from pseudolabel.weights import explain_misfit, first_lines, read_weights

_OURS = ("pretrained", "weights_file")
_THE_DATAS = ("num_classes", "in_chans")


@dataclass(frozen=True)
class TimmStudent:
    """A timm architecture by name."""

    spec: Spec
    config: None = None

    def build(self, num_classes: int, channels: int) -> nn.Module:
        timm = library(self.spec)
        try:
            model: nn.Module = timm.create_model(
                self.spec.name, pretrained=False, num_classes=num_classes, in_chans=channels, **self._options()
            )
        except (TypeError, ValueError, KeyError, RuntimeError, AssertionError, AttributeError) as error:
            raise SpecError(f"{self.spec}: can't be built ({first_lines(error)}); check its arguments") from error
        return model

    def start(self, num_classes: int, channels: int) -> Start | None:
        args = dict(self.spec.args)
        options = {"pretrained": True, "in_chans": channels, **self._options()}
        timm, source = library(self.spec), str(args.get("weights_file", self.spec))
        if "weights_file" in args:
            state = read_weights(source)
            overlay: dict[str, Any] = {"source": "", "state_dict": state, "custom_load": False}
            overlay |= (classes := _classes_in(timm.get_pretrained_cfg(self.spec.name), state))
            with explain_misfit(source):
                body = timm.create_model(self.spec.name, pretrained_cfg_overlay=overlay, **options, **classes)
        elif args.get("pretrained"):
            with explain(self.spec, "the weights can't be had"), contextlib.redirect_stdout(sys.stderr):
                body = timm.create_model(self.spec.name, **options)
        else:
            return None
        mean, std = (tuple(map(float, body.pretrained_cfg[name])) for name in ("mean", "std"))
        return Start(source, body.state_dict(), norm_for(mean, std, channels))

    def _options(self) -> dict[str, Any]:
        return {name: value for name, value in self.spec.args if name not in _OURS}


def make(spec: Spec, config: object = None) -> TimmStudent:
    """Describe it; the model's name and what else is no argument of the architecture are checked here. Raises
    `SpecError`.
    """
    timm = library(spec)
    if "/" in spec.name or not timm.is_model(spec.name):
        known = timm.list_models() + timm.list_pretrained()
        raise SpecError(f"{spec}: timm has no architecture {spec.name!r}{specs.nearest(spec.name, known)}")
    args = dict(spec.args)
    for name in args.keys() & {*_THE_DATAS, *inspect.signature(timm.create_model).parameters} - {*_OURS}:
        why = "the data says it" if name in _THE_DATAS else f"a student takes {' or '.join(_OURS)}, and its own"
        raise SpecError(f"{spec}: leave {name}= out: {why}")
    if not isinstance(args.get("pretrained", False), bool):
        raise SpecError(
            f"{spec}: pretrained must be true or false; the published weights are part of the name, NAME.TAG"
        )
    if "pretrained" in args and "weights_file" in args:
        raise SpecError(f"{spec}: give pretrained= or weights_file=, not both")
    return TimmStudent(spec)


def _classes_in(config: Any, state: Mapping[str, Tensor]) -> dict[str, int]:
    """How many classes the head in a file has, as timm's argument; none are 0. Empty if timm doesn't say where to
    look.
    """
    heads = config.classifier if config is not None else None
    if not heads:
        return {}
    head = heads if isinstance(heads, str) else heads[0]
    weight = state.get(f"{head}.weight")
    return {"num_classes": len(weight) if weight is not None else 0}
