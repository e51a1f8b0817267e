"""A model that turns images into class logits, with the preprocessing and class names it needs.

One value for teachers and students alike: `teachers/` make it from their sources, `checkpoint.py` from a run directory.
It fits `interfaces.LoadedTeacher`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pseudolabel.errors import SpecError
from pseudolabel.views.image import Normalize, Preprocessing


@dataclass(frozen=True)
class Classifier:
    """A model in evaluation mode on its device, uint8 images in, float32 logits out."""

    model: nn.Module
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    identity: Mapping[str, Any]
    device: torch.device

    def prepare(self, image_CHW: Tensor) -> tuple[Tensor, ...]:
        return (self.preprocessing.prepare(image_CHW),)

    def logits(self, inputs: tuple[Tensor, ...]) -> Tensor:
        pixels_BCHW = inputs[0].to(self.device, non_blocking=True)
        logits_BC: Tensor = self.model(pixels_BCHW)
        if not isinstance(logits_BC, Tensor):
            raise SpecError(f"the model must give a tensor of logits, it gave {type(logits_BC).__name__}")
        return logits_BC.float()


def make_classifier(
    body: nn.Module,
    preprocessing: Preprocessing,
    *,
    architecture: str,
    device: torch.device,
    classes: Sequence[str] | None = None,
    facts: Mapping[str, Any] | None = None,
    probe: bool = True,
) -> Classifier:
    """Put `body` (normalised images → logits) to work on `device`.

    `facts` are what else decides its logits, for its identity. Without a `probe`, which needs `classes`, the body is
    taken at its word, and what it does at its first batch is not done before.

    Raises:
        SpecError: it doesn't give logits of shape (B, C), or not one per class name.
    """
    model = nn.Sequential(Normalize(preprocessing), body).eval().requires_grad_(False)
    digest = weights_sha256(body)
    model = model.to(device).to(memory_format=torch.channels_last)
    names = tuple(classes) if classes is not None else ()
    if probe:
        outputs = _num_outputs(model, preprocessing, architecture, device)
        names = tuple(classes) if classes is not None else tuple(str(index) for index in range(outputs))
        if len(names) != outputs:
            raise SpecError(f"{architecture}: {len(names)} class names for {outputs} logits")
    identity = {"architecture": architecture, "weights_sha256": digest, "preprocessing": preprocessing.to_json()}
    identity |= facts or {}
    return Classifier(model, preprocessing, names, identity, device)


def _num_outputs(model: nn.Module, preprocessing: Preprocessing, architecture: str, device: torch.device) -> int:
    shape = (1, preprocessing.channels, preprocessing.crop, preprocessing.crop)
    try:
        with torch.no_grad():
            probe = model(torch.zeros(shape, dtype=torch.uint8, device=device))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise SpecError(f"{architecture}: the model fails on an input of shape {shape}: {reason}") from error
    if not isinstance(probe, Tensor) or probe.ndim != 2 or probe.shape[0] != 1:
        found = tuple(probe.shape) if isinstance(probe, Tensor) else type(probe).__name__
        raise SpecError(
            f"{architecture}: the model must give logits of shape (batch, classes), it gave {found} for a batch of 1"
        )
    if not probe.is_floating_point():
        raise SpecError(f"{architecture}: the model must give floating-point logits, it gave {probe.dtype}")
    row = probe[0].double()
    if len(row) > 1 and bool((row >= 0).all()) and abs(float(row.sum()) - 1) < 1e-5:
        raise SpecError(f"{architecture}: gives probabilities; leave out its softmax, logits are wanted")
    return int(probe.shape[1])


def weights_sha256(module: nn.Module) -> str:
    """A hash of all parameters and buffers by name, type, shape and bytes: equal wherever the file lies."""
    return state_sha256(module.state_dict())


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """The same of tensors that are in no module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
