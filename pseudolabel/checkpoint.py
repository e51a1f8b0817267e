"""Models and training states on disk: safetensors and JSON, nothing pickled.

A model is `model.safetensors` and `model.json` (architecture spec, classes, preprocessing, hash). A training state is
one safetensors file whose header carries the JSON; it replaces the last one atomically.

A model whose student is `python:module:function` calls that function when it is built, and model.json names it: such a
model loads only for who says that its code is to be trusted (`trust_code`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from pseudolabel import specs, storage
from pseudolabel.classifier import Classifier, make_classifier, state_sha256, weights_sha256
from pseudolabel.errors import DamagedModel, SpecError
from pseudolabel.storage import Location
from pseudolabel.students import build_student
from pseudolabel.views.image import Preprocessing

FORMAT_VERSION = 1
_CARD_KEYS = {"format_version", "student", "classes", "preprocessing", "parameters", "weights_sha256"}


@dataclass(frozen=True)
class ModelCard:
    """What model.json says: how to build the model, what it takes and gives."""

    student: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    config: Mapping[str, Any] | None = None  # where the student's spec doesn't say all of the architecture

    def bare(self, num_classes: int) -> nn.Module:
        """The architecture for so many classes, untrained and untried. Raises `SpecError`."""
        channels = self.preprocessing.channels
        return build_student(self.student, num_classes=num_classes, channels=channels, config=self.config)

    def build(self) -> nn.Module:
        """The untrained model. Raises `SpecError`, also if it doesn't take these images or give these classes."""
        body = self.bare(len(self.classes))
        shape = (2, self.preprocessing.channels, self.preprocessing.crop, self.preprocessing.crop)
        body.eval()
        try:
            with torch.no_grad():
                logits_BC = body(torch.zeros(shape))
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise SpecError(f"{self.student}: it fails on an input of shape {shape}: {why}") from error
        found = tuple(logits_BC.shape) if isinstance(logits_BC, Tensor) else type(logits_BC).__name__
        if found != (2, len(self.classes)):
            raise SpecError(f"{self.student}: it must give logits of shape (2, {len(self.classes)}), it gave {found}")
        return body.train()


def save_model(directory: Path, card: ModelCard, body: nn.Module) -> None:
    """Write weights, then the card that names their hash. Raises `StorageError`."""
    # cloned: a module that goes by two names has its tensors twice, and safetensors takes no shared memory
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in body.state_dict().items()}
    storage.write_atomic(directory / "model.safetensors", save(state))
    content = {
        "format_version": FORMAT_VERSION,
        "student": card.student,
        "classes": list(card.classes),
        "preprocessing": card.preprocessing.to_json(),
        "parameters": sum(parameter.numel() for parameter in body.parameters()),
        "weights_sha256": weights_sha256(body),
    }
    if card.config is not None:
        content["config"] = dict(card.config)
    content["card_sha256"] = _card_sha256(content)
    storage.write_atomic(directory / "model.json", json.dumps(content, indent=1) + "\n")


def read_card(directory: Location) -> tuple[ModelCard, str]:
    """The card and the hash its weights must have. Raises `DamagedModel`."""
    path = directory / "model.json"
    if not path.exists():
        raise DamagedModel(
            f"{directory}: no model here (no model.json); name a directory that `pseudolabel train` has finished"
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        card = ModelCard(
            str(data["student"]),
            tuple(map(str, data["classes"])),
            Preprocessing.from_json(data["preprocessing"]),
            dict(data["config"]) if "config" in data else None,
        )
        if data["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {data['format_version']}, this version reads {FORMAT_VERSION}")
        if data.keys() - {"card_sha256", "config"} != _CARD_KEYS or data["card_sha256"] != _card_sha256(data):
            raise ValueError("it was edited: it no longer fits the hash in it")
        return card, str(data["weights_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedModel(f"{path}: can't be read ({error}); train again or restore it from a copy") from error


def _card_sha256(content: Mapping[str, Any]) -> str:
    facts = {name: value for name, value in content.items() if name != "card_sha256"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def load_weights(directory: Location, body: nn.Module, sha256: str | None = None) -> None:
    """Load model.safetensors into `body`. Raises `DamagedModel` if it is torn, of another architecture, or not what
    was saved.
    """
    path = directory / "model.safetensors"
    state = read_state(path, sha256)
    try:
        load_tensors(body, state)
    except RuntimeError as error:
        raise DamagedModel(_does_not_load(path, error)) from error


def load_tensors(body: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fill `state` into `body`, name by name. Neither files nor plain dicts keep the versions of layers that lie beside
    a module's own tensors, and MNASNet fails without: they are today's.
    """
    versioned = body.state_dict()
    if versioned.keys() != state.keys():
        versioned.clear()  # torch says best what is missing
    versioned.update(state)
    body.load_state_dict(versioned)


def read_state(path: Location, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file. Raises `DamagedModel` if it is torn, or not of this hash."""
    try:
        with storage.local_copy(path) as file:
            state: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise DamagedModel(_does_not_load(path, error)) from error
    if sha256 is not None and state_sha256(state) != sha256:
        raise DamagedModel(
            f"{path}: the weights aren't those that model.json was written for; restore both from one copy"
        )
    return state


def _does_not_load(path: Location, error: Exception) -> str:
    return f"{path}: these weights don't load: {str(error).splitlines()[0]}; train again or restore a copy"


def load_model(directory: str | os.PathLike[str], device: torch.device, *, trust_code: bool = False) -> Classifier:
    """A finished run's model, ready for `device`.

    Raises:
        DamagedModel: it is incomplete, edited, or not what was saved.
        SpecError: its student is `python:…`, which runs code of model.json's choosing, and `trust_code` is off.
    """
    directory = storage.location(directory)
    card, sha256 = read_card(directory)
    if not trust_code and specs.parse(card.student).scheme == "python":
        raise SpecError(
            f"{directory / 'model.json'}: loading this model calls {card.student}\nif you trust where it comes from, "
            "say so: --trust-code for evaluate, checkpoint:RUN?trust_code=true for a teacher"
        )
    body = card.build()
    load_weights(directory, body, sha256)
    return make_classifier(body, card.preprocessing, architecture=card.student, device=device, classes=card.classes)


def save_state(path: Path, facts: Mapping[str, Any], groups: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write named groups of tensors and JSON facts as one file, atomically. Raises `StorageError`."""
    tensors = {
        f"{group}/{name}": tensor.detach().cpu().contiguous().clone()
        for group, named in groups.items()
        for name, tensor in named.items()
    }
    text = json.dumps(dict(facts))
    storage.write_atomic(path, save(tensors, metadata={"facts": text, "sha256": _state_sha256(text, tensors)}))


def load_state(path: Path, groups: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Inverse of `save_state`. Raises `DamagedModel`."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            found: dict[str, dict[str, Tensor]] = {group: {} for group in groups}
            whole = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            if (file.metadata() or {})["sha256"] != _state_sha256(file.metadata()["facts"], whole):
                raise ValueError("its content doesn't fit its hash")
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                group, _, rest = name.partition("/")
                found[group][rest] = file.get_tensor(name)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DamagedModel(
            f"{path}: this checkpoint can't be read ({error}); delete it to start that training again"
        ) from error
    return facts, found


def _state_sha256(facts: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(facts.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors. Learning rates are not in it: the schedule gives them."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}/{name}": torch.as_tensor(value)
        for index, values in state.items()
        for name, value in values.items()
        if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of `flatten_optimizer`."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, _, field = name.partition("/")
        state.setdefault(int(index), {})[field] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    # A file keeps no memory format, and fused kernels pair moments with weights by their place in memory.
    for parameter, values in optimizer.state.items():
        for field, tensor in values.items():
            if tensor.shape == parameter.shape:
                values[field] = torch.empty_like(parameter).copy_(tensor)
