"""What a sample says of the whole: intervals, and how long workers take over shards of unequal size. Plain numbers.

All intervals are at 95 %.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Sequence

_Z = 1.959964  # 97.5 % quantile of the normal distribution


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of independent draws, its standard error, and half its interval's width; infinite for one draw."""
    if len(values) < 2:
        return statistics.fmean(values), math.inf, math.inf
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), error, t_quantile(len(values) - 1) * error


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t: exact up to 3 degrees, else Cornish–Fisher (Abramowitz & Stegun 26.7.5)."""
    if degrees <= 3:
        return {1: 12.7062, 2: 4.30265, 3: 3.18245}[degrees]
    z, n = _Z, float(degrees)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def wilson(fraction: float, draws: float) -> tuple[float, float]:
    """Wilson's interval of a fraction seen in so many draws; for none of n seen, its upper end is near 3.8 ÷ n."""
    if draws <= 0:
        return 0.0, 1.0
    square = _Z**2 / draws
    centre = (fraction + square / 2) / (1 + square)
    half = math.sqrt(fraction * (1 - fraction) * square + square**2 / 4) / (1 + square)
    return (0.0 if fraction == 0 else max(centre - half, 0.0)), (1.0 if fraction == 1 else min(centre + half, 1.0))


def effective(weights: Sequence[float]) -> float:
    """How many equally weighted draws say as much as these (Kish)."""
    total = sum(weights)
    return total**2 / sum(weight**2 for weight in weights) if total else 0.0


def makespan(sizes: Sequence[float], workers: int) -> float:
    """When the last of `workers` ends, in units of size, if each takes the next shard when it has finished one."""
    ends = [0.0] * workers
    for size in sizes:
        heapq.heapreplace(ends, ends[0] + size)
    return max(ends)
