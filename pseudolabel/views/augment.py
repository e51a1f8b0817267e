"""Augmented views: made while annotating, and made again from the numbers in the store.

    plan = ViewPlan(count=4, seed=0, policy="color")
    for number in range(1, plan.count):
        view = plan.draw("sample key", number, height, width)
        pixels = apply_view(image, view, preprocessing, plan.policy)

An augmented view is cropped, resized to the model's input, flipped, then recoloured. The crop and the flip are numbers
of the view, the colours follow from its seed; none of them depends on the model's size, so a student at another
resolution sees what the teacher saw. `replay.py` starts from a store's row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from torch import Tensor

from pseudolabel.errors import SpecError, StoreError
from pseudolabel.views.draw import View, draw_view
from pseudolabel.views.image import Preprocessing, resize, to_channels
from pseudolabel.views.photometric import parse_policy

LAW = 1
"""Counts the rules by which views are drawn and applied. A change of any rule is a new law."""


@dataclass(frozen=True)
class ViewPlan:
    """How a store's views are made: what its identity says under `views`. `tta` averages view 0 over more
    presentations.
    """

    count: int = 1
    seed: int = 0
    policy: str = "color"
    crop_scale: tuple[float, float] = (0.25, 1.0)
    tta: str = "none"
    shrink_to: int = 0

    def draw(self, key: str, number: int, height: int, width: int) -> View:
        """View `number` of a sample whose image has this size."""
        return draw_view(self.seed, key, number, height, width, self.crop_scale)

    def augmented(
        self, key: str, image_CHW: Tensor, preprocessings: Sequence[Preprocessing]
    ) -> list[tuple[View, tuple[Tensor, ...]]]:
        """Views 1 to `count` − 1 of a decoded image, each with an input per model of the teacher."""
        height, width = image_CHW.shape[-2:]
        rows = []
        for number in range(1, self.count):
            view = self.draw(key, number, height, width)
            rows.append((view, tuple(apply_view(image_CHW, view, one, self.policy) for one in preprocessings)))
        return rows

    def to_json(self) -> dict[str, Any]:
        """What decides the views and nothing else; `{"count": 1}` for the clean view alone."""
        more: dict[str, Any] = {} if self.tta == "none" else {"tta": self.tta}
        if self.shrink_to:
            more["shrink_to"] = self.shrink_to
        if self.count == 1:
            return {"count": 1, **more}
        return {
            "count": self.count,
            "law": LAW,
            "seed": self.seed,
            "policy": self.policy,
            "crop_scale": list(self.crop_scale),
            "versions": library_versions(),
            **more,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ViewPlan:
        """From a store's identity. Raises `StoreError` if these views were made by rules that this version doesn't
        know.
        """
        if data["count"] == 1:
            return cls(tta=data.get("tta", "none"), shrink_to=data.get("shrink_to", 0))
        if data.get("law") != LAW:
            raise StoreError(
                f"the store's views follow law {data.get('law')}, this version knows {LAW}; use a matching pseudolabel"
            )
        low, high = data["crop_scale"]
        return cls(
            data["count"], data["seed"], data["policy"], (low, high), data.get("tta", "none"), data.get("shrink_to", 0)
        )


def apply_view(image_CHW: Tensor, view: View, preprocessing: Preprocessing, policy: str) -> Tensor:
    """A decoded image as a model sees it in this view: uint8 (channels, crop, crop).

    Raises:
        UndecodableImage: the clean view of an absurdly long image.
        SpecError: `policy` is none.
    """
    if view.number == 0:
        return preprocessing.prepare(image_CHW)
    top, left, height, width = view.box(*image_CHW.shape[-2:])
    image_CHW = to_channels(image_CHW[:, top : top + height, left : left + width], preprocessing.channels)
    image_CHW = resize(image_CHW, preprocessing.crop, preprocessing.crop, preprocessing.interpolation)
    if view.flip:
        image_CHW = image_CHW.flip(-1)
    return parse_policy(policy).apply(image_CHW, view.aug_seed)


def library_versions() -> dict[str, str]:
    """Versions of what decides pixels: decoders (torchvision, Pillow), resizing (torch), 16 to 8 bits (numpy)."""
    found = {
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    return {name: ".".join(re.findall(r"\d+", version)[:3]) for name, version in found.items()}


def preprocessings(teacher: Mapping[str, Any]) -> tuple[Preprocessing, ...]:
    """How a teacher's models want their images, in the order of its inputs, from its identity.

    Taken from there since it is what a store keeps: what is replayed is what was annotated. Raises `SpecError`.
    """
    if "members" in teacher:
        return tuple(one for member in teacher["members"] for one in preprocessings(member))
    try:
        return (Preprocessing.from_json(teacher["preprocessing"]),)
    except (KeyError, TypeError, ValueError) as error:
        raise SpecError(
            f"teacher {teacher.get('architecture', '')}: its identity doesn't say how it prepares images ({error}); "
            "annotate its clean view only (--views 1)"
        ) from error
