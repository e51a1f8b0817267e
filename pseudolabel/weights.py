"""Weights into modules, for every source of teachers: read without unpickling, filled in whole, or random by a seed.

A .safetensors file can hold nothing but tensors; all else goes through `torch.load(weights_only=True)`, which refuses
what isn't plain tensors and containers.
"""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pseudolabel.errors import SpecError
from pseudolabel.specs import SEEDS, Spec


def weight_arguments(
    spec: Spec, names: Iterable[str] = (), *, whole: Mapping[str, range] | None = None, published: str = ""
) -> dict[str, Any]:
    """The arguments of a source with published weights: `pretrained=false` makes random ones from `seed`,
    `weights_file` takes others. `names` and `whole` (numbers, with what they may be) are the source's own; `published`
    says how its weights are named. Raises `SpecError`.
    """
    whole = whole or {}
    args = spec.only((*names, "pretrained", "weights_file", *whole, "seed"), whole={**whole, "seed": SEEDS})
    if not isinstance(args.get("pretrained", True), bool):
        raise SpecError(f"{spec}: pretrained must be true or false{published and '; '}{published}")
    if args.get("pretrained") is False and "weights_file" in args:
        raise SpecError(f"{spec}: pretrained=false makes random weights; drop it or weights_file=")
    return args


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a local file. Raises `SpecError`."""
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state: object = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with open(path, "rb") as file:
            begin = file.read(2)
        if begin != b"PK" and begin[:1] != b"\x80":  # neither torch's archive nor a pickle
            raise SpecError(f"{path}: is no file of weights (a page of HTML?); fetch or save it again") from error
        raise SpecError(
            f"{path}: holds more than tensors, and loading that could run code; convert it to .safetensors"
        ) from error
    except Exception as error:  # the readers raise whatever they like on bytes that are no weights
        raise SpecError(
            f"{path}: can't be read as weights ({type(error).__name__}: {first_lines(error)}); fetch or save it again"
        ) from error
    if not isinstance(state, dict):
        raise SpecError(f"{path}: holds {type(state).__name__}, not a state dict; save model.state_dict()")
    return state


@contextlib.contextmanager
def explain_misfit(source: str) -> Iterator[None]:
    """Turn what `load_state_dict` raises into a `SpecError` that names the weights' `source`."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise SpecError(
            f"{source}: these weights don't load into the model: {first_lines(error)}\nname the model that they were "
            "saved from, and its num_classes="
        ) from error


def fill(body: nn.Module, state: dict[str, Tensor], source: str) -> nn.Module:
    """Load the whole `state` into `body`. Raises `SpecError` where a tensor is missing, left over or misshapen."""
    with explain_misfit(source):
        body.load_state_dict(state)
    return body


@contextlib.contextmanager
def random_weights(uri: str, seed: int) -> Iterator[None]:
    """Models built inside get weights that depend on the `seed` alone, and a warning."""
    warnings.warn(f"{uri}: no weights are given, so the teacher is random; of use for timing alone", stacklevel=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def first_lines(error: Exception) -> str:
    """What a library says, short enough for an error of ours."""
    text = " ".join(line.strip()[:200] for line in str(error).splitlines()[:2])
    return text or type(error).__name__
