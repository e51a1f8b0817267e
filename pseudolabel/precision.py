"""Mixed precision by name: `fp32` computes as it is, `bf16` and `fp16` under autocast."""

from __future__ import annotations

import torch

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(precision: str, device: torch.device | str) -> torch.autocast:
    """The context to run a model in."""
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=_TYPES.get(precision, torch.bfloat16), enabled=precision in _TYPES)
