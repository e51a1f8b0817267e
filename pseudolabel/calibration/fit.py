"""Finding the map from a teacher's logits to probabilities that fit labels best.

temperature   one number, by golden-section search: the NLL has one minimum in it
vector        a weight and a bias a class, by L-BFGS on the NLL with a penalty of half their squared distance from 1
              and 0, summed, once for all rows: a normal prior of deviation 1, which matters where labels are few
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pseudolabel.calibration import Calibration
from pseudolabel.calibration.evidence import Evidence

_COLDEST, _HOTTEST = 0.05, 20.0
_GOLDEN = (math.sqrt(5) - 1) / 2
_PRECISE = 1e-4  # of the logarithm of the temperature


def fit(method: str, evidence: Evidence, store: str) -> Calibration:
    """The best map of this kind for these rows, of the store with this fingerprint."""
    if method == "temperature":
        return Calibration(store, _temperature(evidence))
    assert method == "vector", method
    return _vector(evidence, store)


def _temperature(evidence: Evidence) -> float:
    def nll(log_temperature: float) -> float:
        log_probs_NC = evidence.encoding.full_log_probs(
            evidence.columns, math.exp(log_temperature), evidence.num_classes
        )
        return float(F.nll_loss(log_probs_NC.double(), evidence.label_N))

    low, high = math.log(_COLDEST), math.log(_HOTTEST)
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = nll(left), nll(right)
    while high - low > _PRECISE:
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = nll(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = nll(right)
    return round(math.exp((low + high) / 2), 6)


def _vector(evidence: Evidence, store: str) -> Calibration:
    log_probs_NC = evidence.encoding.full_log_probs(evidence.columns, 1.0, evidence.num_classes).double()
    weight_C = torch.ones(evidence.num_classes, dtype=torch.float64, requires_grad=True)
    bias_C = torch.zeros(evidence.num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_C, bias_C], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        penalty = ((weight_C - 1).square().sum() + bias_C.square().sum()) / (2 * len(evidence))
        value = F.cross_entropy(log_probs_NC * weight_C + bias_C, evidence.label_N) + penalty
        torch.autograd.backward(value)
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    weight, bias = (tuple(round(value, 6) for value in one.detach().tolist()) for one in (weight_C, bias_C))
    return Calibration(store, 1.0, weight, bias)
