"""The lowest confidence from which on labels are right often enough, with a stated certainty.

Thresholds are tested one after the other from high to low, each for the hypothesis that the precision above it is
*below* the target: of n labeled rows above it, k are right, and the hypothesis is rejected if a binomial with the
target's probability gives k or more with a chance within the error allowed. The first threshold that is not rejected
ends the walk. In such a fixed sequence every test may use the whole error, however many there are, so long as the
sequence doesn't look at what is tested: it is made from the confidences alone. Three walks with a third of the error
each begin where, if the confidences are right, the first test passes with a chance of 19 in 20 or more: bad luck at
one of them then costs little (fixed sequence testing with several starts: Bauer 1991; Angelopoulos et al. 2021,
arXiv:2110.01052, §3).

The certainty is about rows like the labeled ones: if the unlabeled differ from them, so may their precision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_STEP = 1.1  # from a test to the next, so many times the rows
_POWER = 0.95
_WALKS = 3


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
    counts = _counts(ends)
    starts = _starts(counts, confidence_N, target, 1 - certainty)
    found: Threshold | None = None
    for start in starts:
        for count in counts[start:]:
            right = int(sums[count - 1])
            if upper_tail(right, count, target) > (1 - certainty) / len(starts):
                break
            if found is None or count > found.rows:
                found = Threshold(float(confidence_N[count - 1]), count, right)
    return found


def _counts(ends: NDArray[np.int64]) -> list[int]:
    """The numbers of rows to test at, ascending."""
    chosen = [int(ends[0])]
    for end in ends[1:]:
        if end >= chosen[-1] * _STEP or end == ends[-1]:
            chosen.append(int(end))
    return chosen


def _starts(counts: list[int], confidence_N: NDArray[np.float64], target: float, error: float) -> list[int]:
    """Where walks begin, as places in `counts`; of the right labels nothing is known here."""
    hopes = np.cumsum(confidence_N)
    powers = [_power(count, float(hopes[count - 1]) / count, target, error / _WALKS) for count in counts]
    good = [place for place, power in enumerate(powers) if power >= _POWER]
    if len(good) < _WALKS:
        return [int(np.argmax(powers))]
    return [good[number * (len(good) - 1) // (_WALKS - 1)] for number in range(_WALKS)]


def _power(rows: int, precision: float, target: float, error: float) -> float:
    """The chance that the test of `rows` rows passes, at this error, if so large a share of such labels is right."""
    low, high = 0, rows + 1  # the fewest right ones that pass
    while low < high:
        middle = (low + high) // 2
        if middle <= rows and upper_tail(middle, rows, target) > error:
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
    """Of consecutive whole numbers, ascending or descending."""
    least = int(numbers.min())
    steps = np.log(np.maximum(np.arange(least, int(numbers.max()) + 1), 1), dtype=np.float64)
    steps[0] = math.lgamma(least + 1)
    found = np.cumsum(steps)
    return found if numbers[0] == least else found[::-1]
