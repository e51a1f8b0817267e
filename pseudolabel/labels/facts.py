"""What is said of a row beside its encoded logits: its summary, and what storing it lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pseudolabel.interfaces import Encoding

_SMALLEST_LOG_PROB = -65504.0
_NOTHING = -700.0  # exp of it is nothing left to weigh


def summarize(logits_BC: Tensor) -> dict[str, Tensor]:
    """Columns `pred`, `confidence`, `entropy` (nats) and `margin` (of the two largest probabilities), all at T = 1."""
    log_probs_BC = torch.log_softmax(logits_BC.float(), dim=-1)
    probs_BC = log_probs_BC.exp()
    top_B2, id_B2 = probs_BC.topk(min(2, probs_BC.shape[-1]), dim=-1)
    entropy_B = -(probs_BC * log_probs_BC.clamp(min=_SMALLEST_LOG_PROB)).sum(-1)
    return {
        "pred": id_B2[:, 0],
        "confidence": top_B2[:, 0],
        "entropy": entropy_B.clamp(min=0.0),
        "margin": top_B2[:, 0] - top_B2[:, -1],
    }


def divergence(encoding: Encoding, columns: Mapping[str, Tensor], logits_BC: Tensor) -> Tensor:
    """What storing cost each row, in nats, at the encoding's `temperatures`, shape (their number, B): KL(full ‖
    stored), or KL(stored ‖ full) where classes that weren't drawn have no probability left.
    """
    rows = []
    for temperature in encoding.temperatures:
        full_BC = torch.log_softmax(logits_BC.double() / temperature, dim=-1)
        stored_BC = encoding.full_log_probs(columns, temperature, logits_BC.shape[-1]).double()
        rows.append(_kl(stored_BC, full_BC) if encoding.draws else _kl(full_BC, stored_BC))
    return torch.stack(rows)


def fidelity(divergence_TN: Tensor, temperatures: Sequence[float]) -> dict[str, dict[str, float]]:
    """Mean and 99th percentile of `divergence` by temperature, rounded to 6 significant digits; zeros for no rows."""
    if divergence_TN.shape[-1] == 0:
        return {name: {f"{t:g}": 0.0 for t in temperatures} for name in ("mean", "p99")}
    figures = {"mean": divergence_TN.mean(-1), "p99": torch.quantile(divergence_TN, 0.99, dim=-1)}
    return {
        name: {f"{t:g}": float(f"{value:.6g}") for t, value in zip(temperatures, values.tolist(), strict=True)}
        for name, values in figures.items()
    }


def _kl(p_BC: Tensor, q_BC: Tensor) -> Tensor:
    gap_BC = torch.where(p_BC > _NOTHING, p_BC - q_BC, 0.0)
    return (p_BC.exp() * gap_BC).sum(-1).clamp(min=0.0)
