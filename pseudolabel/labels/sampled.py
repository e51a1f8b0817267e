"""`sampled:N` stores N classes drawn with replacement from the teacher's distribution, and how often each came up.

What a truncated label gets wrong on purpose (the tail), this one gets right on average: the share of draws of a class
is an unbiased estimate of its probability, so the expected gradient of the loss is that of the full label's (random
sampling knowledge distillation, Anshumann et al. 2025, arXiv:2503.16870, with its proposal q = p). A confident row
takes a few bytes.

The draws are made from softmax(z / T) at one temperature T, written behind an `@` if it isn't 1 (`sampled:50@2`).
They say nothing unbiased of another temperature, so training at another one is refused.

A row's numbers follow from a counter and the row's seed (uniforms.py): the same on every device, in any batch. Row
seeds come from the key and the view (views/draw.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from pseudolabel.errors import SpecError
from pseudolabel.labels.tensors import PAD, to_torch
from pseudolabel.uniforms import uniforms

MOST_DRAWS = (1 << 16) - 1
_SPEC = re.compile(r"([1-9][0-9]{0,4})(?:@([0-9]+(?:\.[0-9]+)?))?")


@dataclass(frozen=True)
class Sampled:
    """`count` draws from softmax(z / `temperature`)."""

    count: int
    temperature: float = 1.0
    sparse: bool = True
    draws: bool = True

    @property
    def name(self) -> str:
        return f"sampled:{self.count}" + (f"@{self.temperature:g}" if self.temperature != 1.0 else "")

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The one that the draws can be compared at."""
        return (self.temperature,)

    def check(self, num_classes: int) -> None:
        pass

    def check_temperature(self, temperature: float) -> None:
        if temperature != self.temperature:
            raise SpecError(
                f"{self.name}: its classes were drawn at temperature {self.temperature:g} and say nothing unbiased of "
                f"temperature {temperature:g}\ntrain with --temperature {self.temperature:g}, or annotate with "
                f"--encoding sampled:{self.count}@{temperature:g}"
            )

    def fields(self, num_classes: int) -> list[pa.Field]:
        class_type = pa.uint16() if num_classes <= 1 << 16 else pa.uint32()
        count_type = pa.uint8() if self.count < 1 << 8 else pa.uint16()
        return [
            pa.field("sample_id", pa.list_(class_type), nullable=False),
            pa.field("sample_count", pa.list_(count_type), nullable=False),
        ]

    def encode(self, logits_BC: Tensor, seed_B: Tensor) -> dict[str, Tensor]:
        """Each class once, in ascending order, with its number of draws; `PAD` behind them."""
        cdf_BC = torch.softmax(logits_BC.double() / self.temperature, dim=-1).cumsum(dim=-1)
        uniform_BN = uniforms(seed_B.to(logits_BC.device), self.count) * cdf_BC[:, -1:]
        drawn_BN = torch.searchsorted(cdf_BC, uniform_BN, right=True).clamp(max=logits_BC.shape[-1] - 1)
        drawn_BN = drawn_BN.sort(dim=-1).values
        first_BN = torch.ones_like(drawn_BN, dtype=torch.bool)
        first_BN[:, 1:] = drawn_BN[:, 1:] != drawn_BN[:, :-1]
        place_BN = first_BN.long().cumsum(dim=-1) - 1
        count_BN = torch.zeros_like(drawn_BN).scatter_add_(-1, place_BN, torch.ones_like(drawn_BN))
        id_BN = torch.full_like(drawn_BN, PAD).scatter_(-1, place_BN, drawn_BN)
        width = self._width(logits_BC.shape[-1])
        return {"sample_id": id_BN[:, :width], "sample_count": count_BN.where(count_BN > 0, PAD)[:, :width]}

    def tensors(self, table: pa.Table, num_classes: int) -> dict[str, Tensor]:
        return {name: to_torch(table[name], self._width(num_classes)) for name in ("sample_id", "sample_count")}

    def full_log_probs(self, columns: Mapping[str, Tensor], temperature: float, num_classes: int) -> Tensor:
        """Classes that were not drawn have log-probability −∞."""
        self.check_temperature(temperature)
        id_BK, share_BK = _shares(columns)
        full_BC = torch.zeros(len(id_BK), num_classes, dtype=share_BK.dtype, device=share_BK.device)
        return full_BC.scatter_add_(-1, id_BK, share_BK).log()

    def log_probs(
        self, columns: Mapping[str, Tensor], student_log_probs_BC: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Over the classes drawn, and all others together, of which the teacher says nothing."""
        self.check_temperature(temperature)
        id_BK, share_BK = _shares(columns)
        there_BK = share_BK > 0
        rest_BC = student_log_probs_BC.scatter(-1, id_BK, -math.inf)
        none_B1 = rest_BC.isneginf().all(dim=-1, keepdim=True)  # logsumexp would have no gradient, but NaN
        rest_B1 = torch.logsumexp(rest_BC.masked_fill(none_B1, 0.0), dim=-1, keepdim=True)
        student_BK = student_log_probs_BC.gather(-1, id_BK).where(there_BK, -math.inf)
        student_BM = torch.cat([student_BK, rest_B1.masked_fill(none_B1, -math.inf)], dim=-1)
        teacher_BM = torch.cat([share_BK.log(), torch.full_like(student_BM[:, :1], -math.inf)], dim=-1)
        return teacher_BM, student_BM

    def _width(self, num_classes: int) -> int:
        """Classes that a row can have at the most."""
        return min(self.count, num_classes)


def parse_sampled(text: str) -> Sampled | None:
    """What stands behind `sampled:`; None for anything else than N or N@T."""
    found = _SPEC.fullmatch(text)
    if found is None or int(found[1]) > MOST_DRAWS:
        return None
    temperature = float(found[2] or 1)
    return Sampled(int(found[1]), temperature) if 0.01 <= temperature <= 1000 else None


def _shares(columns: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Class ids (B, K) and their shares of the draws (B, K); padding repeats the first class with share 0."""
    id_BK, count_BK = columns["sample_id"].long(), columns["sample_count"].clamp(min=0).double()
    share_BK = count_BK / count_BK.sum(dim=-1, keepdim=True)
    return id_BK.where(id_BK != PAD, id_BK[:, :1]), share_BK.float()
