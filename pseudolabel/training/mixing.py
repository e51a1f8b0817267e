"""Mixup and CutMix: two images in one, and the loss of both targets, each at its share.

The share-weighted sum of both losses is what OpenMMLab and others compute, and for cross-entropy and KL its gradient is
that of the mixed soft target: both are linear in the target at whichever temperature it is compared. So each partner
keeps its own stored label, sparse or not. A row's partner is the one before it, in the same part of the batch: labeled
with labeled, soft with soft.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pseudolabel.settings import TrainSettings
from pseudolabel.training.order import derive_seeds


@dataclass(frozen=True)
class Mix:
    """How a batch is mixed. `share` is what a row keeps of itself; `box` (top, left, height, width in fractions) is
    where its partner is pasted in, None where the images are blended.
    """

    share: float
    box: tuple[float, float, float, float] | None = None

    def images(self, pixels_BCHW: Tensor, partner_B: Tensor) -> Tensor:
        """Float images with their partners in them."""
        if self.box is None:
            return torch.lerp(pixels_BCHW[partner_B], pixels_BCHW, self.share)
        rows, columns = self.where(*pixels_BCHW.shape[-2:])
        mixed_BCHW = pixels_BCHW.clone()
        mixed_BCHW[..., rows, columns] = pixels_BCHW[partner_B][..., rows, columns]
        return mixed_BCHW

    def share_of(self, height: int, width: int) -> float:
        """What a row keeps, to the pixel."""
        if self.box is None:
            return self.share
        rows, columns = self.where(height, width)
        return 1 - len(range(height)[rows]) * len(range(width)[columns]) / (height * width)

    def where(self, height: int, width: int) -> tuple[slice, slice]:
        """The box in pixels."""
        assert self.box is not None
        top, left, high, wide = self.box
        first_row, first_column = round(top * height), round(left * width)
        return slice(first_row, round((top + high) * height)), slice(first_column, round((left + wide) * width))


def draw_mix(settings: TrainSettings, *place: int) -> Mix | None:
    """How to mix the batch at this place (step, process, …), None if it isn't to be mixed.

    The share is drawn from Beta(a, a), a = `mixup` (Zhang et al. 2018, arXiv:1710.09412) or `cutmix` (Yun et al. 2019,
    arXiv:1905.04899); with both, one or the other by halves.
    """
    if not (settings.mixup or settings.cutmix):
        return None
    generator = np.random.default_rng(derive_seeds(1, settings.seed, 5, *place)[0])
    blends = settings.mixup > 0 and (settings.cutmix == 0 or generator.random() < 0.5)
    alpha = settings.mixup if blends else settings.cutmix
    share = float(generator.beta(alpha, alpha))
    if blends:
        return Mix(share)
    side = math.sqrt(1 - share)
    (top, bottom), (left, right) = (
        (max(centre - side / 2, 0.0), min(centre + side / 2, 1.0)) for centre in generator.random(2).tolist()
    )
    return Mix(share, (top, left, bottom - top, right - left))


def partners(rows: int, soft: int) -> Tensor:
    """For each row of a batch whose last `soft` rows are its soft part, the row before it in its part, in a ring."""
    first = rows - soft
    return torch.cat([torch.arange(first).roll(1), first + torch.arange(soft).roll(1)])
