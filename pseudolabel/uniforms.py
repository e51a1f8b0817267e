"""Random numbers as a function of a seed and a counter: no generator, no state, the same on every device, in any batch.

The finalizer of SplitMix64 (Steele, Lea, Flood 2014) over 64-bit integers, a stream for each row's seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA, _MIX1, _MIX2 = (number - (1 << 64) for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def uniforms(seed_B: Tensor, count: int) -> Tensor:
    """`count` numbers in [0, 1) for each row's seed (int64), float64 of shape (B, count)."""
    counter_N = torch.arange(1, count + 1, device=seed_B.device) * _GAMMA  # all products wrap at 64 bits
    mixed_BN = seed_B[:, None] + counter_N
    for shift, factor in ((30, _MIX1), (27, _MIX2)):
        mixed_BN = (mixed_BN ^ _shifted_right(mixed_BN, shift)) * factor
    mixed_BN = mixed_BN ^ _shifted_right(mixed_BN, 31)
    return _shifted_right(mixed_BN, 11).double() * 2.0**-53


def _shifted_right(numbers: Tensor, bits: int) -> Tensor:
    """As unsigned integers are: zeros come in."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
