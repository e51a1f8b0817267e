"""How logits are stored: `dense` keeps all of them, `dense8` too, in 8 bits each, `topk:K` the K largest and what sums
up the rest. (`sampled:N` draws classes: sampled.py.)

Stored logits have their row's maximum subtracted, so float16 costs less than 1e-6 nats and can't overflow. All
log-probabilities are computed in float32 or wider.

`dense8` spreads 256 levels evenly between a row's least logit and its largest, 0. Logits below −100 count as −100:
exp(−100/4) is 1e-11, and levels aren't wasted on them.

`topk:K` keeps lse (log-sum-exp over all classes) and mean and variance of the n = C − K tail logits. The tail's mass at
temperature T is then n·exp(mean/T + var/(2T²)) (second-order cumulant expansion), and at T = 1 exactly exp(lse) − Σ
exp(kept). It is kept within what it can be: at least n·exp(mean/T) (Jensen), since where the tail is tiny the float16
rounding of the kept logits can push that difference below zero; at most n·exp(min kept / T), since no tail logit
exceeds the smallest kept one. A student is compared over K + 1 outcomes, the tail being one bucket; nothing is
renormalised over the kept classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from pseudolabel.errors import SpecError
from pseudolabel.interfaces import Encoding
from pseudolabel.labels.sampled import parse_sampled
from pseudolabel.labels.tensors import tensors

TEMPERATURES = (1.0, 2.0, 4.0)
"""At which it is measured what storing lost."""

_FLOAT16_MIN = -65504.0
_LEAST8 = -100.0
_LEVELS = 255


@dataclass(frozen=True)
class Dense:
    """All C logits as float16."""

    name: str = "dense"
    sparse: bool = False
    draws: bool = False
    temperatures: tuple[float, ...] = TEMPERATURES

    def check(self, num_classes: int) -> None:
        pass

    def check_temperature(self, temperature: float) -> None:
        pass

    def fields(self, num_classes: int) -> list[pa.Field]:
        return [pa.field("logits", pa.list_(pa.float16(), num_classes), nullable=False)]

    def encode(self, logits_BC: Tensor, seed_B: Tensor) -> dict[str, Tensor]:
        return {"logits": _shifted(logits_BC).half()}

    def tensors(self, table: pa.Table, num_classes: int) -> dict[str, Tensor]:
        return tensors(table, self.fields(num_classes))

    def full_log_probs(self, columns: Mapping[str, Tensor], temperature: float, num_classes: int) -> Tensor:
        return torch.log_softmax(_wide(columns["logits"]) / temperature, dim=-1)

    def log_probs(
        self, columns: Mapping[str, Tensor], student_log_probs_BC: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        return self.full_log_probs(columns, temperature, student_log_probs_BC.shape[-1]), student_log_probs_BC


@dataclass(frozen=True)
class Dense8:
    """All C logits as 8 bits, spread evenly over the row's range."""

    name: str = "dense8"
    sparse: bool = False
    draws: bool = False
    temperatures: tuple[float, ...] = TEMPERATURES

    def check(self, num_classes: int) -> None:
        pass

    def check_temperature(self, temperature: float) -> None:
        pass

    def fields(self, num_classes: int) -> list[pa.Field]:
        levels = pa.field("logits8", pa.list_(pa.uint8(), num_classes), nullable=False)
        return [levels, pa.field("logit_min", pa.float32(), nullable=False)]

    def encode(self, logits_BC: Tensor, seed_B: Tensor) -> dict[str, Tensor]:
        shifted_BC = _shifted(logits_BC).clamp(min=_LEAST8)
        min_B = shifted_BC.amin(dim=-1)
        share_BC = 1 - shifted_BC / min_B.clamp(max=-1e-30)[:, None]
        return {"logits8": (share_BC * _LEVELS).round().to(torch.uint8), "logit_min": min_B}

    def tensors(self, table: pa.Table, num_classes: int) -> dict[str, Tensor]:
        return tensors(table, self.fields(num_classes))

    def full_log_probs(self, columns: Mapping[str, Tensor], temperature: float, num_classes: int) -> Tensor:
        min_B = _wide(columns["logit_min"])
        logits_BC = min_B[:, None] * (1 - columns["logits8"].to(min_B.dtype) / _LEVELS)
        return torch.log_softmax(logits_BC / temperature, dim=-1)

    def log_probs(
        self, columns: Mapping[str, Tensor], student_log_probs_BC: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        return self.full_log_probs(columns, temperature, student_log_probs_BC.shape[-1]), student_log_probs_BC


@dataclass(frozen=True)
class TopK:
    """The `kept` largest logits with their classes, lse, and the tail's mean and variance."""

    kept: int
    sparse: bool = True
    draws: bool = False
    temperatures: tuple[float, ...] = TEMPERATURES

    @property
    def name(self) -> str:
        return f"topk:{self.kept}"

    def check(self, num_classes: int) -> None:
        if self.kept > num_classes:
            raise SpecError(f"{self.name}: the teacher has only {num_classes} classes; use dense, or a smaller K")

    def check_temperature(self, temperature: float) -> None:
        pass

    def fields(self, num_classes: int) -> list[pa.Field]:
        class_type = pa.uint16() if num_classes <= 1 << 16 else pa.uint32()
        kept_fields = [("topk_id", pa.list_(class_type, self.kept)), ("topk_logit", pa.list_(pa.float16(), self.kept))]
        tail_fields = [("lse", pa.float32()), ("tail_mean", pa.float32()), ("tail_var", pa.float32())]
        return [pa.field(name, kind, nullable=False) for name, kind in kept_fields + tail_fields]

    def encode(self, logits_BC: Tensor, seed_B: Tensor) -> dict[str, Tensor]:
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

    def tensors(self, table: pa.Table, num_classes: int) -> dict[str, Tensor]:
        return tensors(table, self.fields(num_classes))

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
        self, columns: Mapping[str, Tensor], student_log_probs_BC: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        kept_BK, tail_B = self._kept_and_tail(columns, temperature, student_log_probs_BC.shape[-1])
        id_BK = columns["topk_id"].long()
        student_BK = student_log_probs_BC.gather(-1, id_BK)
        if student_log_probs_BC.shape[-1] == self.kept:
            return kept_BK, student_BK
        rest_BC = student_log_probs_BC.scatter(-1, id_BK, -math.inf)
        student_BM = torch.cat([student_BK, torch.logsumexp(rest_BC, -1, keepdim=True)], dim=-1)
        return torch.cat([kept_BK, tail_B[:, None]], dim=-1), student_BM


def parse_encoding(spec: str) -> Encoding:
    """`dense`, `dense8`, `topk:K`, or `sampled:N` with the temperature of its draws behind an `@` if it isn't 1. Raises
    `SpecError`.
    """
    if spec == "dense":
        return Dense()
    if spec == "dense8":
        return Dense8()
    kind, _, number = spec.partition(":")
    if kind == "topk" and number.isdecimal() and len(number) < 10 and int(number) > 0:
        return TopK(int(number))
    if kind == "sampled" and (found := parse_sampled(number)) is not None:
        return found
    if kind == "auto":
        raise SpecError(f"{spec}: is chosen for a whole corpus, by annotate; name the encoding that it chose")
    raise SpecError(
        f"{spec!r} is not an encoding; write dense, dense8, topk:K such as topk:10, sampled:N such as sampled:50, or "
        "auto:EPS such as auto:0.01"
    )


def _shifted(logits_BC: Tensor) -> Tensor:
    logits_BC = logits_BC.float()
    return (logits_BC - logits_BC.amax(dim=-1, keepdim=True)).clamp(min=_FLOAT16_MIN)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
