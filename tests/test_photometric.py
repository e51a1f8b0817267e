"""Views applied: crops, flips and colours as Pillow and torchvision do them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor
from viewing import SCALE, SIZES, pixels_of

from pseudolabel.errors import SpecError
from pseudolabel.views.augment import apply_view
from pseudolabel.views.draw import CLEAN, View, draw_view
from pseudolabel.views.image import Preprocessing, resize, square
from pseudolabel.views.photometric import parse_policy

# ---------------------------------------------------------------------------------- applying


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size_and_colour_becomes_the_models_input(size: tuple[int, int], channels: int) -> None:
    for grey in (1, 3):
        image = pixels_of(*size, grey)
        before = image.clone()
        for number in range(1, 4):
            view = draw_view(1, "k", number, *size, SCALE)
            made = apply_view(image, view, square(16, channels), "randaugment:4+erase")
            assert (made.shape, made.dtype) == ((channels, 16, 16), torch.uint8)
        assert torch.equal(image, before)


def test_a_view_is_cropped_resized_flipped_by_its_numbers() -> None:
    """By hand, on an image where each pixel tells its place."""
    image = torch.arange(64, dtype=torch.uint8).view(1, 8, 8)
    view = View(1, (0.25, 0.5, 0.5, 0.5), flip=True, aug_seed=3)
    assert torch.equal(apply_view(image, view, square(4, 1), "none"), image[:, 2:6, 4:8].flip(-1))
    unflipped = dataclasses.replace(view, flip=False)
    assert torch.equal(apply_view(image, unflipped, square(4, 1), "none"), image[:, 2:6, 4:8])
    whole = View(1, (0.0, 0.0, 1.0, 1.0))
    assert torch.equal(apply_view(image, whole, square(5, 1), "none"), resize(image, 5, 5, "bilinear"))
    assert torch.equal(apply_view(image, CLEAN, Preprocessing(8, 4, (0.5,), (0.5,)), "color"), image[:, 2:6, 2:6])


def test_another_models_size_sees_the_same_crop_and_colours() -> None:
    """A smooth image at two sizes: the views agree but for resampling."""
    ramp = torch.linspace(0, 255, 96)
    image = torch.stack([ramp.expand(96, 96), ramp.expand(96, 96).T, 255 - ramp.expand(96, 96)]).to(torch.uint8)
    for number in range(1, 12):
        view = draw_view(3, "k", number, 96, 96, SCALE)
        small, large = (apply_view(image, view, square(size, 3), "color") for size in (24, 72))
        shrunk = torch.nn.functional.avg_pool2d(large.float()[None], 3)[0]
        assert (small.float() - shrunk).abs().mean() < 2.0


def test_no_global_generator_is_read_or_moved() -> None:
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    image, view = pixels_of(40, 30), draw_view(1, "k", 1, 40, 30, SCALE)
    first = apply_view(image, view, square(16, 3), "randaugment:8+erase")
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    torch.manual_seed(1)
    assert torch.equal(apply_view(image, view, square(16, 3), "randaugment:8+erase"), first)


# ---------------------------------------------------------------------------------- colours


def operate(name: str, image: Tensor, amount: int = 0) -> Tensor:
    from pseudolabel.views import photometric

    return photometric._OPERATIONS[name](image.to(torch.int32), amount).to(torch.uint8)


def test_colour_operations_in_closed_form() -> None:
    image = torch.tensor([[10, 200], [100, 50], [0, 255]], dtype=torch.uint8).view(3, 1, 2)
    assert operate("brightness", image, 1 << 15).flatten().tolist() == [5, 100, 50, 25, 0, 128]
    assert operate("brightness", image, 2 << 16).flatten().tolist() == [20, 255, 200, 100, 0, 255]
    grey = [62, 118]  # (19595 R + 38470 G + 7471 B + 32768) >> 16
    assert operate("saturation", image, 0).flatten().tolist() == grey * 3
    assert operate("contrast", image, 0).unique().tolist() == [90]
    assert operate("contrast", image, 1 << 15).flatten().tolist() == [50, 145, 95, 70, 45, 173]
    for name in ("brightness", "contrast", "saturation"):
        assert torch.equal(operate(name, image, 1 << 16), image)
    assert operate("posterize", image, 4).flatten().tolist() == [0, 192, 96, 48, 0, 240]
    assert operate("solarize", image, 128).flatten().tolist() == [10, 55, 100, 50, 0, 0]
    assert operate("autocontrast", image).flatten().tolist() == [0, 255, 255, 0, 0, 255]
    assert torch.equal(operate("solarize", image, 256), image)
    assert torch.equal(operate("posterize", image, 8), image)


@given(st.integers(0, 1000))
def test_colour_operations_are_pillows_and_torchvisions(seed: int) -> None:
    """Equalize exactly Pillow's; the others within a level of torchvision's floating point."""
    from torchvision.transforms.v2 import functional as F

    height, width = 5 + seed % 13, 7 + seed % 11
    image = (pixels_of(height, width, seed=seed).float() * 0.7 + 20).to(torch.uint8)
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy())
    equal = torch.from_numpy(np.array(ImageOps.equalize(pillow))).permute(2, 0, 1)
    assert torch.equal(operate("equalize", image), equal)
    factor = 0.1 + 1.8 * (seed / 1000)
    for name in ("brightness", "contrast", "saturation"):
        theirs = getattr(F, f"adjust_{name}")(image, factor)
        assert (operate(name, image, round(factor * 65536)).int() - theirs.int()).abs().max() <= 2, name
    assert (operate("autocontrast", image).int() - F.autocontrast(image).int()).abs().max() <= 1
    assert torch.equal(operate("posterize", image, 5), F.posterize(image, 5))
    assert torch.equal(operate("solarize", image, 77), F.solarize(image, 77))


def test_grey_images_get_the_same_colours_in_one_and_three_channels() -> None:
    grey = pixels_of(9, 9, 1)
    for seed in range(40):
        policy = parse_policy("randaugment:3+erase")
        assert torch.equal(policy.apply(grey.expand(3, -1, -1), seed), policy.apply(grey, seed).expand(3, -1, -1))


@pytest.mark.parametrize("level", [0, 128, 255])
def test_flat_images_break_no_operation(level: int) -> None:
    image = torch.full((3, 4, 4), level, dtype=torch.uint8)
    for name in ("autocontrast", "equalize", "contrast"):
        assert torch.equal(operate(name, image, 50_000), image)


def test_policies_do_what_they_say() -> None:
    image = pixels_of(32, 32)
    assert torch.equal(parse_policy("none").apply(image, 5), image)
    assert [name for name, _ in parse_policy("color").draw(5)[0]] == ["brightness", "contrast", "saturation"]
    names: set[str] = set()
    erased = 0
    for seed in range(400):
        operations, rectangle = parse_policy("randaugment:2+erase").draw(seed)
        assert len(operations) == 2
        names |= {name for name, _ in operations}
        erased += rectangle is not None
        if rectangle is not None:
            top, left, height, width = rectangle
            assert 0 <= top < top + height <= 1
            assert 0 <= left < left + width <= 1
    assert len(names) == 8
    assert 150 < erased < 250
    made = parse_policy("none+erase")
    changed = [(made.apply(image, seed) != image).any(0) for seed in range(40)]
    assert 0 < sum(bool(mask.any()) for mask in changed) < 40
    assert all((made.apply(image, seed)[:, mask] == 128).all() for seed, mask in enumerate(changed))


@pytest.mark.parametrize("spec", ["", "colour", "randaugment", "randaugment:0", "randaugment:17", "color+", "+erase"])
def test_unknown_policies_are_refused_with_the_known_ones(spec: str) -> None:
    with pytest.raises(SpecError, match=r"write none, color or randaugment:N"):
        parse_policy(spec)
