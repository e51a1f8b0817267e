"""Views of a store, made again from its rows: the pixels that the teacher labeled.

    store = open_store("store")
    made_again = open_replay(store.identity)
    for row in store.read("shard-000", ["key", "view", "crop", "flip", "aug_seed"]).to_pylist():
        pixels = made_again(image_bytes[row["key"]], row)

Crop, flip and seed are read, never drawn again. A student of another input size passes its own preprocessing and gets
the same crop and colours at its size. Needs no teacher.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from pseudolabel.errors import SpecError, StoreMismatch
from pseudolabel.labels.store import StoreIdentity
from pseudolabel.views.augment import ViewPlan, apply_view, library_versions, preprocessings
from pseudolabel.views.draw import View
from pseudolabel.views.image import Preprocessing, decode

OtherVersions = Literal["refuse", "warn"]


@dataclass(frozen=True)
class Replay:
    """Makes a store's views for a model of this preprocessing. Small, frozen, picklable. Make one with
    `open_replay`.
    """

    plan: ViewPlan
    preprocessing: Preprocessing

    def __call__(self, image: bytes | Tensor, row: Mapping[str, Any] | View) -> Tensor:
        """An image (its file's bytes, or as `decode` gives it) in the view of a part's row, as uint8 (channels, crop,
        crop).

        Of a store with test-time augmentation, view 0 is the clean image: its row is the mean over this and its
        mirror image.

        Raises:
            StoreMismatch: the row lacks the columns of its view, or the store has no such view.
            UndecodableImage: the bytes are no image.
        """
        view = row if isinstance(row, View) else View.from_row(row)
        if not 0 <= view.number < self.plan.count:
            raise StoreMismatch(
                f"this row is of view {view.number}, its store has views 0 to {self.plan.count - 1}; "
                "replay it with the identity of its own store"
            )
        image_CHW = decode(image, self.plan.shrink_to) if isinstance(image, bytes) else image
        return apply_view(image_CHW, view, self.preprocessing, self.plan.policy)


def open_replay(
    identity: StoreIdentity, preprocessing: Preprocessing | None = None, *, other_versions: OtherVersions = "refuse"
) -> Replay:
    """How to make the views of a store again, for the teacher's own input or for `preprocessing`.

    Other library versions than the store's are refused unless `other_versions` is "warn": crop, flip and colours are
    the same with any version, but decoding and resizing may differ by a level, and then the pixels are not the ones
    that were labeled. That is harmless to most trainings and fatal to a comparison of pixels, so it is the caller's
    decision and no silent one.

    Raises:
        StoreMismatch: the libraries have other versions than where the store was made.
        StoreError: the views follow rules that this version doesn't know.
        SpecError: the teacher is an ensemble of several inputs, and no `preprocessing` says which one is meant.
    """
    plan = ViewPlan.from_json(identity.views)
    here, there = library_versions(), identity.views.get("versions", {})
    differing = [f"{name} {there[name]} (here {here.get(name)})" for name in there if here.get(name) != there[name]]
    if differing:
        what = f"the store's augmented views were made with {', '.join(differing)}: pixels may differ by a level"
        if other_versions == "refuse":
            raise StoreMismatch(f'{what}\ninstall these versions, or accept the difference with other_versions="warn"')
        warnings.warn(what, stacklevel=2)
    if preprocessing is None:
        own = set(preprocessings(identity.teacher))
        if len(own) != 1:
            raise SpecError(
                f"the store's teacher is an ensemble with {len(own)} different inputs; pass the preprocessing of one"
            )
        preprocessing = own.pop()
    return Replay(plan, preprocessing)


def replay(
    image: bytes | Tensor,
    row: Mapping[str, Any],
    identity: StoreIdentity,
    preprocessing: Preprocessing | None = None,
    *,
    other_versions: OtherVersions = "refuse",
) -> Tensor:
    """The pixels of one row. For many rows make one `open_replay`. Raises what both of its halves raise."""
    return open_replay(identity, preprocessing, other_versions=other_versions)(image, row)
