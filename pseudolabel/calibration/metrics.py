"""How well probabilities fit what is true: accuracy, NLL, Brier score and ECE, with intervals by the bootstrap.

ECE is the mean distance of confidence and accuracy over 15 equal bins of confidence, weighted by rows (Naeini et al.
2015). Intervals are the 2.5 and 97.5 percentiles over 1,000 resamples of the rows, drawn by a fixed seed. ECE can't be
negative, so noise alone makes it positive: compare it with that of other maps on the same rows, not with 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BINS = 15
_RESAMPLES = 1000
_AT_ONCE = 1 << 22  # counts of a chunk of resamples


def measure(log_probs_NC: Tensor, label_N: Tensor) -> dict[str, Any]:
    """`accuracy`, `nll` (nats), `brier` (summed over classes), `ece`, and `mean_confidence`; `intervals` of all, at
    95 %; `reliability`: rows, mean confidence and accuracy of each bin that has rows.
    """
    probs_NC = log_probs_NC.double().exp()
    confidence_N, pred_N = probs_NC.max(dim=-1)
    right_N = (pred_N == label_N).double()
    nll_N = -log_probs_NC.double().gather(-1, label_N[:, None]).squeeze(-1)
    truth_N = probs_NC.gather(-1, label_N[:, None]).squeeze(-1)
    brier_N = probs_NC.square().sum(-1) - 2 * truth_N + 1
    bin_N = (confidence_N * BINS).ceil().long().clamp(1, BINS) - 1  # (a, b], as torchmetrics has it
    in_bin_NM = torch.nn.functional.one_hot(bin_N, BINS).double()
    plain_N4 = torch.stack([right_N, nll_N, brier_N, confidence_N], dim=-1)
    features_NF = torch.cat(
        [in_bin_NM, in_bin_NM * confidence_N[:, None], in_bin_NM * right_N[:, None], plain_N4], dim=-1
    )
    names = ("accuracy", "nll", "brier", "mean_confidence", "ece")
    found = dict(zip(names, _figures(features_NF.sum(0, keepdim=True))[0].tolist(), strict=True))
    spread = _figures(_resampled_sums(features_NF))
    low, high = (torch.quantile(spread, q, dim=0).tolist() for q in (0.025, 0.975))
    rows_M, confidence_M, right_M = features_NF.sum(0)[: 3 * BINS].view(3, BINS)
    return {
        **found,
        "intervals": {name: [low[place], high[place]] for place, name in enumerate(names)},
        "reliability": [
            {"bin": place, "rows": int(rows), "confidence": float(confidence / rows), "accuracy": float(right / rows)}
            for place, (rows, confidence, right) in enumerate(zip(rows_M, confidence_M, right_M, strict=True))
            if rows
        ],
    }


def _figures(sums_RF: Tensor) -> Tensor:
    """Means of the four plain columns, and the ECE, for each resample's sums: (R, 5)."""
    rows_RM, confidence_RM, right_RM = sums_RF[:, : 3 * BINS].view(-1, 3, BINS).unbind(1)
    total_R1 = rows_RM.sum(-1, keepdim=True)
    ece_R1 = (confidence_RM - right_RM).abs().sum(-1, keepdim=True) / total_R1
    return torch.cat([sums_RF[:, 3 * BINS :] / total_R1, ece_R1], dim=-1)


def _resampled_sums(features_NF: Tensor) -> Tensor:
    """Sums of the features over 1,000 resamples with replacement."""
    rows = len(features_NF)
    generator = torch.Generator().manual_seed(0)
    step = max(1, _AT_ONCE // rows)
    sums = []
    for start in range(0, _RESAMPLES, step):
        count = min(step, _RESAMPLES - start)
        drawn = torch.randint(rows, (count, rows), generator=generator)
        times = torch.zeros(count, rows, dtype=torch.float64).scatter_add_(
            -1, drawn, torch.ones(1, 1, dtype=torch.float64).expand(count, rows)
        )
        sums.append(times @ features_NF)
    return torch.cat(sums)
