"""How logits are stored: `dense` keeps all of them, `topk:K` the K largest and what sums up the rest.

Stored logits have their row's maximum subtracted, so float16 costs less than 1e-6 nats and can't overflow. All
log-probabilities are computed in float32 or wider.

`topk:K` keeps lse (log-sum-exp over all classes) and mean and variance of the n = C − K tail logits. The tail's mass at
temperature T is then n·exp(mean/T + var/(2T²)) (second-order cumulant expansion), and at T = 1 exactly exp(lse) − Σ
exp(kept). It is kept within what it can be: at least n·exp(mean/T) (Jensen), since where the tail is tiny the float16
rounding of the kept logits can push that difference below zero; at most n·exp(min kept / T), since no tail logit
exceeds the smallest kept one. A student is compared over K + 1 outcomes, the tail being one bucket; nothing is
renormalised over the kept classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pyarrow as pa
import torch
from torch import Tensor

from pseudolabel.errors import SpecError
from pseudolabel.interfaces import Encoding

_FLOAT16_MIN = -65504.0
_TEMPERATURES = (1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Dense:
    """All C logits as float16."""

    name: str = "dense"

    def check(self, num_classes: int) -> None:
        pass

    def fields(self, num_classes: int) -> list[pa.Field]:
        return [pa.field("logits", pa.list_(pa.float16(), num_classes), nullable=False)]

    def encode(self, logits_BC: Tensor) -> dict[str, Tensor]:
        return {"logits": _shifted(logits_BC).half()}

    def full_log_probs(self, columns: Mapping[str, Tensor], temperature: float, num_classes: int) -> Tensor:
        return torch.log_softmax(_wide(columns["logits"]) / temperature, dim=-1)

    def log_probs(
        self, columns: Mapping[str, Tensor], student_logits_BC: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        teacher = self.full_log_probs(columns, temperature, student_logits_BC.shape[-1])
        return teacher, torch.log_softmax(_wide(student_logits_BC) / temperature, dim=-1)


@dataclass(frozen=True)
class TopK:
    """The `kept` largest logits with their classes, lse, and the tail's mean and variance."""

    kept: int

    @property
    def name(self) -> str:
        return f"topk:{self.kept}"

    def check(self, num_classes: int) -> None:
        if self.kept > num_classes:
            raise SpecError(f"{self.name}: the teacher has only {num_classes} classes; use dense, or a smaller K")

    def fields(self, num_classes: int) -> list[pa.Field]:
        class_type = pa.uint16() if num_classes <= 1 << 16 else pa.uint32()
        kept_fields = [("topk_id", pa.list_(class_type, self.kept)), ("topk_logit", pa.list_(pa.float16(), self.kept))]
        tail_fields = [("lse", pa.float32()), ("tail_mean", pa.float32()), ("tail_var", pa.float32())]
        return [pa.field(name, kind, nullable=False) for name, kind in kept_fields + tail_fields]

    def encode(self, logits_BC: Tensor) -> dict[str, Tensor]:
        shifted_BC = _shifted(logits_BC)
        kept_BK, id_BK = shifted_BC.topk(self.kept, dim=-1)
        in_tail_BC = torch.ones_like(shifted_BC).scatter_(-1, id_BK, 0.0)
        count = max(shifted_BC.shape[-1] - self.kept, 1)
        mean_B = (shifted_BC * in_tail_BC).sum(-1) / count
        var_B = ((shifted_BC - mean_B[:, None]).square() * in_tail_BC).sum(-1) / count
        return {
            "topk_id": id_BK,
            "topk_logit": kept_BK.half(),
            "lse": torch.logsumexp(shifted_BC, dim=-1),
            "tail_mean": mean_B,
            "tail_var": var_B,
        }

    def _kept_and_tail(
        self, columns: Mapping[str, Tensor], temperature: float, num_classes: int
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the kept classes (B, K) and of the tail as a whole (B,)."""
        kept_BK = _wide(columns["topk_logit"]) / temperature
        tail_classes = num_classes - self.kept
        if tail_classes == 0:
            return torch.log_softmax(kept_BK, dim=-1), torch.full_like(kept_BK[:, 0], -math.inf)
        bound_B = math.log(tail_classes) + kept_BK[:, -1]
        if temperature == 1.0:
            mass_B = -torch.expm1(torch.logsumexp(kept_BK, -1) - columns["lse"])  # of the whole
            tail_B = columns["lse"] + torch.log(mass_B.clamp(min=0.0))
        else:
            moments_B = columns["tail_mean"] / temperature + columns["tail_var"] / (2 * temperature**2)
            tail_B = math.log(tail_classes) + moments_B
        least_B = math.log(tail_classes) + columns["tail_mean"] / temperature
        tail_B = torch.minimum(torch.maximum(tail_B, least_B), bound_B)
        all_BM = torch.cat([kept_BK, tail_B[:, None]], dim=-1)
        log_probs_BM = torch.log_softmax(all_BM, dim=-1)
        return log_probs_BM[:, :-1], log_probs_BM[:, -1]

    def full_log_probs(self, columns: Mapping[str, Tensor], temperature: float, num_classes: int) -> Tensor:
        kept_BK, tail_B = self._kept_and_tail(columns, temperature, num_classes)
        each_B = tail_B - math.log(max(num_classes - self.kept, 1))
        full_BC = each_B[:, None].expand(-1, num_classes).contiguous()
        return full_BC.scatter(-1, columns["topk_id"].long(), kept_BK)

    def log_probs(
        self, columns: Mapping[str, Tensor], student_logits_BC: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        kept_BK, tail_B = self._kept_and_tail(columns, temperature, student_logits_BC.shape[-1])
        student_BC = torch.log_softmax(_wide(student_logits_BC) / temperature, dim=-1)
        id_BK = columns["topk_id"].long()
        if student_BC.shape[-1] == self.kept:
            return kept_BK, student_BC.gather(-1, id_BK)
        rest_BC = student_BC.scatter(-1, id_BK, -math.inf)
        student_BM = torch.cat([student_BC.gather(-1, id_BK), torch.logsumexp(rest_BC, -1, keepdim=True)], dim=-1)
        return torch.cat([kept_BK, tail_B[:, None]], dim=-1), student_BM


def parse_encoding(spec: str) -> Encoding:
    """`dense` or `topk:K`. Raises `SpecError`."""
    if spec == "dense":
        return Dense()
    kind, _, number = spec.partition(":")
    if kind == "topk" and number.isdecimal() and len(number) < 10 and int(number) > 0:
        return TopK(int(number))
    raise SpecError(f"{spec!r} is not an encoding; write dense or topk:K, such as topk:10")


@dataclass(frozen=True)
class StoredTargets:
    """Soft labels read from a store, as tensors with one row a sample. Fits `interfaces.SoftTargets`."""

    encoding: Encoding
    columns: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.columns["pred"])

    @property
    def pred_B(self) -> Tensor:
        return self.columns["pred"].long()

    def log_probs(self, student_logits_BC: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return self.encoding.log_probs(self.columns, student_logits_BC, temperature)

    def map(self, change: Callable[[Tensor], Tensor]) -> StoredTargets:
        """The same targets with every column changed: moved, pinned, sliced."""
        return replace(self, columns={name: change(column) for name, column in self.columns.items()})


def summarize(logits_BC: Tensor) -> dict[str, Tensor]:
    """Columns `pred`, `confidence`, `entropy` (nats) and `margin` (of the two largest probabilities), all at T = 1."""
    log_probs_BC = torch.log_softmax(logits_BC.float(), dim=-1)
    probs_BC = log_probs_BC.exp()
    top_B2, id_B2 = probs_BC.topk(min(2, probs_BC.shape[-1]), dim=-1)
    entropy_B = -(probs_BC * log_probs_BC.clamp(min=_FLOAT16_MIN)).sum(-1)
    return {
        "pred": id_B2[:, 0],
        "confidence": top_B2[:, 0],
        "entropy": entropy_B.clamp(min=0.0),
        "margin": top_B2[:, 0] - top_B2[:, -1],
    }


def divergence(encoding: Encoding, columns: Mapping[str, Tensor], logits_BC: Tensor) -> Tensor:
    """KL(full ‖ stored) in nats at T = 1, 2 and 4, shape (3, B): what storing cost each row."""
    rows = []
    for temperature in _TEMPERATURES:
        full_BC = torch.log_softmax(logits_BC.double() / temperature, dim=-1)
        stored_BC = encoding.full_log_probs(columns, temperature, logits_BC.shape[-1]).double()
        gap_BC = torch.where(full_BC > -700, full_BC - stored_BC, 0.0)  # exp(-700): nothing left to weigh
        rows.append((full_BC.exp() * gap_BC).sum(-1).clamp(min=0.0))
    return torch.stack(rows)


def fidelity(divergence_3N: Tensor) -> dict[str, dict[str, float]]:
    """Mean and 99th percentile of `divergence` by temperature, rounded to 6 significant digits; zeros for no rows."""
    if divergence_3N.shape[-1] == 0:
        return {name: {f"{t:g}": 0.0 for t in _TEMPERATURES} for name in ("mean", "p99")}
    p99_3 = torch.quantile(divergence_3N, 0.99, dim=-1)
    figures = {"mean": divergence_3N.mean(-1), "p99": p99_3}
    return {
        name: {f"{t:g}": float(f"{value:.6g}") for t, value in zip(_TEMPERATURES, values.tolist(), strict=True)}
        for name, values in figures.items()
    }


def _shifted(logits_BC: Tensor) -> Tensor:
    logits_BC = logits_BC.float()
    return (logits_BC - logits_BC.amax(dim=-1, keepdim=True)).clamp(min=_FLOAT16_MIN)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
