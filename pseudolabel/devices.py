"""Devices by name."""

from __future__ import annotations

import torch

from pseudolabel.errors import SpecError


def resolve_device(name: str) -> str:
    """`auto` becomes cuda or cpu; others are checked. Raises `SpecError` if the device isn't there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cpu":
            return "cpu"
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise SpecError(
            f"--device {name}: not usable here: {str(error).splitlines()[0]}; write auto, cpu, cuda or cuda:1"
        ) from error
    return name
