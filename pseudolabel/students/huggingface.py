"""`hf:NAME_OR_DIR?arg=value`: an image classifier of transformers, built from its config; the arguments replace values
of that config, such as `image_size=64`.

`pretrained=true` starts from the weights of that name or directory, `weights_file=F` from a local .safetensors or .bin
file; both need its image processor, which says how images are normalised. Code from a repository is never run.

The config, with the arguments in it, goes into model.json: a finished model needs neither network nor directory.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pseudolabel import specs
from pseudolabel.errors import SpecError
from pseudolabel.specs import Spec
from pseudolabel.students.start import Start
from pseudolabel.teachers.huggingface import NOT_IDENTITY, Logits, explain, library, norm_of
from pseudolabel.weights import first_lines, read_weights

_OURS = ("pretrained", "weights_file")
_THE_DATAS = ("num_labels", "num_channels")


@dataclass(frozen=True)
class HuggingFaceStudent:
    """A transformers image classifier by its config."""

    spec: Spec
    config: Mapping[str, Any]

    def build(self, num_classes: int, channels: int) -> nn.Module:
        transformers = library(self.spec)
        auto = transformers.AutoModelForImageClassification
        try:
            made = transformers.AutoConfig.for_model(**self.config, num_labels=num_classes)
            if hasattr(made, "num_channels"):
                made.num_channels = channels
            elif channels != 3:
                raise ValueError("it has no num_channels and so takes colours: use --channels 3")
            return Logits(auto.from_config(made, dtype=torch.float32, trust_remote_code=False))
        except Exception as error:  # a config's values are checked in many places, in as many ways
            raise SpecError(
                f"{self.spec}: no image classifier can be built from its config ({first_lines(error)})\n"
                "check the arguments, and that transformers has this kind of model"
            ) from error

    def start(self, num_classes: int, channels: int) -> Start | None:
        args, transformers = dict(self.spec.args), library(self.spec)
        if not args.get("pretrained") and "weights_file" not in args:
            return None
        with explain(self.spec, "the image processor can't be loaded"):
            norm = norm_of(transformers.AutoImageProcessor.from_pretrained(self.spec.name, trust_remote_code=False))
        options = {"dtype": torch.float32, "output_loading_info": True}
        if "weights_file" in args:  # through its own loading: published files have other names than the modules
            options |= {"state_dict": read_weights(str(args["weights_file"])), "ignore_mismatched_sizes": True}
            body: Any = self.build(num_classes, channels).model
            load = functools.partial(type(body).from_pretrained, None, config=body.config)
        else:
            auto = transformers.AutoModelForImageClassification
            load = functools.partial(auto.from_pretrained, self.spec.name, trust_remote_code=False)
        with explain(self.spec, "the weights can't be loaded"), contextlib.redirect_stdout(sys.stderr):
            model, report = load(**options)
        random = {*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])}
        named = {f"model.{name}": tensor for name, tensor in model.state_dict().items() if name not in random}
        return Start(str(args.get("weights_file", self.spec)), named, norm)


def make(spec: Spec, config: Mapping[str, Any] | None = None) -> HuggingFaceStudent:
    """Describe it; without a `config` that is known, it is read from the directory, the cache or the net. Raises
    `SpecError`.
    """
    args = dict(spec.args)
    if not isinstance(args.get("pretrained", False), bool):
        raise SpecError(f"{spec}: pretrained must be true or false")
    if "pretrained" in args and "weights_file" in args:
        raise SpecError(f"{spec}: give pretrained= or weights_file=, not both")
    return HuggingFaceStudent(spec, config if config is not None else _read_config(spec))


def _read_config(spec: Spec) -> dict[str, Any]:
    with explain(spec, "its config can't be loaded"):
        found = library(spec).AutoConfig.from_pretrained(spec.name, trust_remote_code=False)
    known, kept = found.to_dict(), found.to_diff_dict()  # as transformers itself keeps it: what is no default
    config = {name: value for name, value in kept.items() if name not in (*NOT_IDENTITY, "auto_map")}
    changed = {name: value for name, value in spec.args if name not in _OURS}
    for name in changed:
        if name in _THE_DATAS:
            raise SpecError(f"{spec}: leave {name}= out: the data says it")
        if name not in known or name == "model_type":
            raise SpecError(f"{spec}: its config has no {name!r}{specs.nearest(name, known)}")
    return {**config, **changed}
