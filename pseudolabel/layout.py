"""In which order a model's tensors lie in memory: channels last, but for networks that crash so.

Channels last is faster on CPUs and GPUs alike. But on CPUs with AVX2 and without AVX-512, oneDNN's backward pass of a
strided 1×1 convolution over fewer than eight channels writes past its buffer and corrupts the heap (torch 2.15, found
in training the smallest students; `tests/test_train.py` has the case). Such a network keeps its channels first, on
every machine, so that results don't depend on the processor.
"""

from __future__ import annotations

import torch
from torch import nn

_SAFE_CHANNELS = 8


def training_layout(body: nn.Module) -> torch.memory_format:
    """The memory format in which to train `body` and its input."""
    return torch.contiguous_format if any(map(_overruns, body.modules())) else torch.channels_last


def _overruns(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and tuple(module.kernel_size) == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < _SAFE_CHANNELS
    )
