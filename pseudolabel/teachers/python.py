"""`python:package.module:function?arg=value`: your own teacher, without a plug-in interface.

The function is called with the arguments and returns an `nn.Module` in evaluation mode that maps normalised float
images (B, channels, H, W) to logits (B, C). Its attribute `preprocessing` (a `Preprocessing`, or the dict of one)
says how images are resized and normalised, 224 pixels RGB to [-1, 1] if it has none; its attribute `classes` may name
the classes. The current directory is on the import path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pseudolabel.classifier import Classifier, make_classifier
from pseudolabel.entrypoint import call_entry_point
from pseudolabel.errors import SpecError
from pseudolabel.specs import Spec
from pseudolabel.views.image import Preprocessing, square


@dataclass(frozen=True)
class PythonTeacher:
    """A function that makes the model."""

    spec: Spec

    @property
    def uri(self) -> str:
        return str(self.spec)

    def load(self, device: torch.device) -> Classifier:
        body = call_entry_point(self.spec)
        preprocessing = _preprocessing(self.spec, getattr(body, "preprocessing", None))
        classes = _classes(self.spec, getattr(body, "classes", None))
        return make_classifier(body.eval(), preprocessing, architecture=self.uri, device=device, classes=classes)


def make(spec: Spec) -> PythonTeacher:
    return PythonTeacher(spec)


def _classes(spec: Spec, found: object) -> tuple[str, ...] | None:
    if found is None:
        return None
    if isinstance(found, str) or not isinstance(found, Sequence):
        raise SpecError(f"{spec}: its attribute `classes` must be a list of names, it is {type(found).__name__}")
    return tuple(str(name) for name in found)


def _preprocessing(spec: Spec, found: object) -> Preprocessing:
    if found is None:
        return square(224, 3)
    if isinstance(found, Preprocessing):
        return found
    if isinstance(found, Mapping):
        try:
            return Preprocessing.from_json(found)
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(f"{spec}: its attribute `preprocessing` lacks or misstates {error}") from error
    raise SpecError(
        f"{spec}: its attribute `preprocessing` must be a Preprocessing or a dict, it is {type(found).__name__}"
    )
