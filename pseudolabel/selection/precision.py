"""The lowest confidence from which on labels are right often enough, with a stated certainty.

Thresholds are tested one after the other from high to low, each for the hypothesis that the precision above it is
*below* the target: of n labeled rows above it, k are right, and the hypothesis is rejected if a binomial with the
target's probability gives k or more with a chance of at most 1 − certainty. The first threshold that is not rejected
ends the walk. In such a fixed sequence every test may use the whole error (Bauer 1991; Angelopoulos et al. 2021,
arXiv:2110.01052, §3), however many there are, so long as the sequence doesn't look at what is tested: it is made from
the confidences alone. The walk begins where, if the confidences are right, the first test passes with a chance of
19 in 20, or at the best there is.

The certainty is about rows like the labeled ones: if the unlabeled differ from them, so may their precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_STEP = 1.1  # from a test to the next, so many times the rows
_POWER = 0.95


@dataclass(frozen=True)
class Threshold:
    """Labels from `confidence` on: of `rows` labeled rows there, `right` are right."""

    confidence: float
    rows: int
    right: int


def lowest_threshold(
    confidence_N: NDArray[np.float64], right_N: NDArray[np.bool_], target: float, certainty: float
) -> Threshold | None:
    """The lowest threshold whose precision is at least `target`, at a certainty; None if not even one is."""
    order = np.argsort(-confidence_N, kind="stable")
    confidence_N, right_N = confidence_N[order], right_N[order]
    ends = np.flatnonzero(np.append(np.diff(confidence_N) != 0, True)) + 1 if len(confidence_N) else np.empty(0, int)
    fewest = math.ceil(math.log(1 - certainty) / math.log(target))  # with fewer rows no test can pass
    ends = ends[ends >= fewest]
    if not len(ends):
        return None
    sums = np.cumsum(right_N)
    found: Threshold | None = None
    for count in _sequence(ends, confidence_N, target, certainty):
        right = int(sums[count - 1])
        if upper_tail(right, count, target) > 1 - certainty:
            break
        found = Threshold(float(confidence_N[count - 1]), int(count), right)
    return found


def _sequence(ends: NDArray[np.int64], confidence_N: NDArray[np.float64], target: float, certainty: float) -> list[int]:
    """The numbers of rows to test at, in order; of the right labels nothing is known here."""
    chosen = [int(ends[0])]
    for end in ends[1:]:
        if end >= chosen[-1] * _STEP or end == ends[-1]:
            chosen.append(int(end))
    hopes = np.cumsum(confidence_N)
    best, start = -1.0, 0
    for place, count in enumerate(chosen):
        power = _power(count, float(hopes[count - 1]) / count, target, certainty)
        if power > best:
            best, start = power, place
        if power >= _POWER:
            break
    return chosen[start:]


def _power(rows: int, precision: float, target: float, certainty: float) -> float:
    """The chance that the test of `rows` rows passes if so large a share of such labels is right."""
    low, high = 0, rows + 1  # the fewest right ones that pass
    while low < high:
        middle = (low + high) // 2
        if middle <= rows and upper_tail(middle, rows, target) > 1 - certainty:
            low = middle + 1
        else:
            high = middle
    return upper_tail(low, rows, precision) if low <= rows else 0.0


def upper_tail(right: int, rows: int, probability: float) -> float:
    """The chance of `right` or more of `rows` at this probability each (binomial)."""
    if right <= 0:
        return 1.0
    if probability >= 1:
        return 1.0
    wrong = np.arange(0, rows - right + 1)
    log_terms = (
        math.lgamma(rows + 1)
        - _log_factorials(wrong)
        - _log_factorials(rows - wrong)
        + (rows - wrong) * math.log(probability)
        + wrong * math.log1p(-probability)
    )
    top = float(log_terms.max())
    return min(1.0, math.exp(top) * float(np.exp(log_terms - top).sum()))


def _log_factorials(numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    import torch

    return torch.lgamma(torch.from_numpy(numbers).double() + 1).numpy()
