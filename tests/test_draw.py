"""Drawing views: the same numbers for good, by the law that the format gives."""

from __future__ import annotations

import dataclasses
import hashlib
import math

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given
from hypothesis import strategies as st
from viewing import SCALE

from pseudolabel.labels import schema
from pseudolabel.views.draw import CLEAN, View, draw_view, uniforms
from pseudolabel.views.photometric import parse_policy

UNIFORMS = [0.9039259094848828, 0.2842982946348752, 0.7418085603735591]
DRAWN = {
    ("a/0", 1, 23, 37): View(1, (2 / 23, 0.0, 20 / 23, 16 / 37), True, 3168087279379814),
    ("a/0", 2, 23, 37): View(2, (0.0, 13 / 37, 19 / 23, 17 / 37), False, 7331640038405092),
    ("ü", 1, 500, 375): View(1, (112 / 500, 19 / 375, 377 / 500, 343 / 375), True, 8586707229121662),
    ("k", 1, 1, 5000): View(1, (0.0, 2499 / 5000, 1.0, 1 / 5000), False, 5921200596924224),
}
COLOURS = (
    [("brightness", 85837), ("contrast", 51480), ("saturation", 61490)],
    (0.5676031878707267, 0.3190486287644687, 0.15365763003890942, 0.39936792854784897),
)
RANDOM = ([("equalize", 0), ("saturation", 61223), ("brightness", 94840)], None)


def test_draws_are_these_numbers_for_good() -> None:
    """Literal values: a draw that changes would make a store of two halves without anybody noticing."""
    numbers = uniforms(b"x")
    assert [next(numbers) for _ in range(3)] == UNIFORMS
    for (key, number, height, width), wanted in DRAWN.items():
        drawn = draw_view(7, key, number, height, width, SCALE)
        assert drawn == dataclasses.replace(wanted, crop=tuple(float(np.float32(value)) for value in wanted.crop))
    assert parse_policy("color+erase").draw(12345) == COLOURS
    assert parse_policy("randaugment:3").draw(12345) == RANDOM


def test_colours_are_drawn_as_the_format_says() -> None:
    """FORMAT.md, step 6, in its own words."""
    factors = []
    for i in range(3):
        data = i.to_bytes(4, "little") + b"photometric" + (12345).to_bytes(8, "little")
        u = (int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 11) / 2**53
        factors.append(math.floor((0.6 + 0.8 * u) * 2**16))
    assert [amount for _, amount in COLOURS[0]] == factors


def test_a_draw_hangs_on_seed_key_and_number_and_on_nothing_else() -> None:
    one = draw_view(7, "k", 1, 40, 30, SCALE)
    torch.manual_seed(5)
    np.random.seed(5)
    assert draw_view(7, "k", 1, 40, 30, SCALE) == one
    others = [(8, "k", 1), (7, "l", 1), (7, "k", 2), (7, "\u0000k", 1), (7, "ü", 1)]
    assert len({one, *(draw_view(*other, 40, 30, SCALE) for other in others)}) == 6
    assert draw_view(7, "k", 0, 40, 30, SCALE) == CLEAN


def fraction(value: float) -> float:
    return float(np.float32(value))


@given(st.data())
def test_stored_fractions_give_back_every_box(data: st.DataObject) -> None:
    """Any box of an image up to 5000 pixels a side survives float32."""
    height, width = (data.draw(st.integers(1, 5000)) for _ in range(2))
    rows, columns = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - rows)), data.draw(st.integers(0, width - columns))
    crop = (fraction(top / height), fraction(left / width), fraction(rows / height), fraction(columns / width))
    assert View(1, crop).box(height, width) == (top, left, rows, columns)


@given(*[st.floats(0, 1, width=32)] * 4, st.integers(1, 5000), st.integers(1, 5000))
def test_no_fractions_leave_the_image(
    top: float, left: float, rows: float, columns: float, height: int, width: int
) -> None:
    y, x, box_height, box_width = View(1, (top, left, rows, columns)).box(height, width)
    assert 0 <= y < y + box_height <= height
    assert 0 <= x < x + box_width <= width


@given(st.integers(1, 5000), st.integers(1, 5000), st.text(max_size=8), st.integers(0, (1 << 63) - 1))
def test_drawn_views_are_float32_and_survive_arrow(height: int, width: int, key: str, seed: int) -> None:
    view = draw_view(seed, key, 3, height, width, SCALE)
    assert view.crop == tuple(fraction(value) for value in view.crop)
    assert 0 <= view.aug_seed < 1 << 63
    columns = schema.part_schema([], augmented=True)
    kinds = pa.schema([columns.field(name) for name in ("view", "crop", "flip", "aug_seed")])
    row = {"view": 3, "crop": view.crop, "flip": view.flip, "aug_seed": view.aug_seed}
    assert View.from_row(pa.Table.from_pylist([row], schema=kinds).to_pylist()[0]) == view


def test_draws_follow_their_law() -> None:
    """RandomResizedCrop's law on a square, where nothing is refused for its shape but little."""
    size, count = 1000, 4000
    views = [draw_view(0, str(index), 1, size, size, SCALE) for index in range(count)]
    boxes = np.array([view.box(size, size) for view in views])
    flips = np.mean([view.flip for view in views])
    assert abs(flips - 0.5) < 4 * 0.5 / math.sqrt(count)
    area = boxes[:, 2] * boxes[:, 3] / size**2
    assert 0.249 < area.min() < 0.26
    assert 0.97 < area.max() <= 1.0
    small = area < 0.6  # always accepted: sqrt(0.6 * 4/3) < 1, so uniform here
    assert abs(np.median(area[small]) - 0.425) < 0.01
    ratio = np.log(boxes[small, 3] / boxes[small, 2])
    assert abs(ratio.mean()) < 0.02
    assert abs(ratio.std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.01
    place = boxes[small, 0] / (size - boxes[small, 2])
    assert abs(place.mean() - 0.5) < 0.03
    assert abs(place.std() - 1 / math.sqrt(12)) < 0.02
    assert len({view.aug_seed for view in views}) == count


def test_images_without_room_get_the_largest_crop_of_a_right_shape() -> None:
    assert draw_view(0, "k", 1, 1, 1, SCALE).box(1, 1) == (0, 0, 1, 1)
    assert draw_view(0, "k", 1, 1, 5000, SCALE).box(1, 5000) == (0, 2499, 1, 1)
    assert draw_view(0, "k", 1, 5000, 3, SCALE).box(5000, 3) == (2498, 0, 4, 3)
