"""Mixed precision by name: `fp32` computes as it is, `bf16` and `fp16` under autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import torch

from pseudolabel.errors import SpecError
from pseudolabel.interfaces import Engine
from pseudolabel.settings import AnnotateSettings

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device | str) -> torch.autocast:
    """The context to run a model in."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=_TYPES.get(precision, torch.bfloat16), enabled=precision in _TYPES)


def choose_precision(settings: AnnotateSettings, engine: Engine) -> AnnotateSettings:
    """Settings whose precision is a name if it was `auto`: asked where the work will run, which may be elsewhere."""
    if settings.precision != "auto":
        return settings
    with closing(engine.map(ResolvePrecision(), ["auto"])) as found:
        return settings.model_copy(update={"precision": next(found)})


@dataclass(frozen=True)
class ResolvePrecision:
    """What an engine runs: a worker's answer to `auto`. Pickles."""

    def __call__(self, items: Iterator[str], device: str) -> Iterator[str]:
        return (resolve_precision(item, device) for item in items)


def resolve_precision(precision: str, device: torch.device | str) -> str:
    """`auto` becomes bf16 where the device computes in it, else fp32: emulated on a CPU it is 26 times slower."""
    if precision != "auto":
        return precision
    device = torch.device(device)
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    tiles = getattr(torch.cpu, "_is_amx_tile_supported", None)  # torch says it nowhere else
    return "bf16" if device.type == "cpu" and tiles is not None and tiles() else "fp32"


def check_precision(precision: str, device: torch.device | str) -> None:
    """Raise `SpecError` for what a student can't be trained in there."""
    if precision == "fp16" and torch.device(device).type != "cuda":
        raise SpecError("--precision fp16 needs a GPU (its gradients underflow without scaling); use fp32 or bf16")


def slow_here(precision: str, device: torch.device | str) -> str:
    """What to tell who computes in bf16 on a device that has to emulate it; nothing if it hasn't."""
    if precision != "bf16" or resolve_precision("auto", device) == "bf16":
        return ""
    return f"{device} has no bf16: it is emulated, many times slower than fp32 (--precision auto chooses by the device)"
