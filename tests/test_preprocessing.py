"""The prepared view: equal to torchvision's, on every CPU, and as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from made_images import LOSSLESS, encode, picture
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.v2 import InterpolationMode

from pseudolabel.views.image import (
    Normalize,
    Preprocessing,
    UndecodableImage,
    decode,
    square,
    to_channels,
)

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


# ---------------------------------------------------------------------------------- the prepared view


SIZES = [(23, 37), (64, 64), (60, 41), (20, 20), (16, 90), (75, 110), (33, 32)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest", "nearest-exact"])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_view_equals_torchvisions_transforms(height: int, width: int, interpolation: str) -> None:
    preprocessing = Preprocessing(32, 28, **IMAGENET, interpolation=interpolation)
    image = decode(encode(picture(width, height), "PNG"))
    wanted = v2.Compose([v2.Resize(32, InterpolationMode(interpolation), antialias=True), v2.CenterCrop(28)])(image)
    found = preprocessing.prepare(image)
    assert found.dtype == torch.uint8
    assert found.shape == (3, 28, 28)
    assert torch.equal(found, wanted)
    assert torch.equal(found, preprocessing.prepare(image.contiguous()))


def levels_apart(found: Tensor, wanted: Tensor) -> Tensor:
    """How far two normalised images are apart, in levels of the uint8 image."""
    return (found - wanted).abs() * torch.tensor(IMAGENET["std"]).view(3, 1, 1) * 255


@pytest.mark.parametrize(("height", "width"), [*SIZES, (375, 500)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_view_equals_the_preset_on_a_pillow_image(height: int, width: int, interpolation: str) -> None:
    """`ImageClassification` is how the published accuracies of torchvision's weights were measured."""
    preprocessing = Preprocessing(32, 28, **IMAGENET, interpolation=interpolation)
    preset = ImageClassification(
        crop_size=28, resize_size=32, **IMAGENET, interpolation=InterpolationMode(interpolation)
    )
    image = picture(width, height)
    pixels = decode(encode(image, "PNG"))
    found = Normalize(preprocessing)(preprocessing.prepare(pixels)[None])[0]
    assert found.dtype == torch.float32
    apart = levels_apart(found, preset(image))
    assert apart.max() < 1.01
    assert (apart > 0.5).float().mean() < 0.01


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_the_view_equals_the_preset_on_a_tensor_up_to_its_rounding(height: int, width: int) -> None:
    """On a tensor the preset resizes in floating point, so a value may be rounded to the next level."""
    preset = ImageClassification(crop_size=28, resize_size=32, **IMAGENET)
    preprocessing = Preprocessing(32, 28, **IMAGENET)
    image = decode(encode(picture(width, height), "PNG"))
    apart = levels_apart(Normalize(preprocessing)(preprocessing.prepare(image)[None])[0], preset(image))
    assert apart.max() < 1.01


@pytest.mark.parametrize(
    ("height", "width", "resize", "crop"), [(32, 32, 32, 28), (32, 50, 32, 32), (47, 32, 32, 20), (20, 20, 20, 28)]
)
def test_without_resizing_the_view_is_the_presets_to_the_bit(height: int, width: int, resize: int, crop: int) -> None:
    """The same crop, also where it is larger than the image (a black border), and the same normalisation."""
    preset = ImageClassification(crop_size=crop, resize_size=resize, **IMAGENET)
    preprocessing = Preprocessing(resize, crop, **IMAGENET)
    image = decode(encode(picture(width, height), "PNG"))
    assert torch.equal(Normalize(preprocessing)(preprocessing.prepare(image)[None])[0], preset(image))


_DIGESTS = """
import hashlib, sys, torch
from pseudolabel.views.image import Preprocessing
torch.set_num_threads(int(sys.argv[1]))
for channels in (1, 3):
    for height, width in ((37, 61), (500, 375), (28, 28), (1, 300)):
        generator = torch.Generator().manual_seed(height)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
        for kind in ("nearest", "nearest-exact", "bilinear", "bicubic"):
            pixels = Preprocessing(64, 56, (0.5,) * channels, (0.5,) * channels, kind).prepare(image)
            print(hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest())
"""


def test_pixels_do_not_hang_on_the_cpus_instructions_or_threads() -> None:
    """torchvision's resize and grayscale give other levels where there is no AVX2."""
    found = []
    for capability, threads in (("default", "1"), (None, "1"), (None, "2")):
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        environment |= {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        command = [sys.executable, "-c", _DIGESTS, threads]
        found.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert found[0] == found[1] == found[2]
    assert len(found[0].split()) == 32


def test_normalize_is_a_closed_form_and_holds_no_parameters() -> None:
    normalize = Normalize(Preprocessing(2, 2, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)))
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(normalize(pixels).flatten(), torch.tensor([-1.0, -0.2, 1.0]))
    assert normalize.state_dict() == {}
    assert list(normalize.parameters()) == []


def test_grey_and_colour_become_what_the_model_wants() -> None:
    grey, colour = decode(LOSSLESS["grey PNG"][0]), decode(LOSSLESS["RGB PNG"][0])
    assert torch.equal(to_channels(grey, 3), grey.expand(3, -1, -1))
    assert to_channels(grey, 1) is grey
    assert torch.equal(to_channels(colour, 1), grey)  # the luma of Pillow's own "L"
    for channels in (1, 3):
        for image in (grey, colour):
            assert square(16, channels).prepare(image).shape == (channels, 16, 16)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("upright", [False, True])
def test_thin_images_are_shrunk_or_refused_but_never_blown_up(upright: bool, channels: int) -> None:
    """1x60000 would become 256 x 15,360,000 pixels before the crop."""

    def thin(length: int) -> Tensor:
        image = torch.arange(length).remainder(251).to(torch.uint8).view(1, 1, length)
        return image.mT if upright else image

    start = time.process_time()
    with pytest.raises(UndecodableImage, match="too long and thin to resize to 256"):
        square(256, channels).prepare(thin(60_000))
    assert time.process_time() - start < 0.5
    assert square(1, channels).prepare(thin(60_000)).shape == (channels, 1, 1)
    assert square(32, channels).prepare(thin(1000)).shape == (channels, 32, 32)
    data = encode(Image.new("L", (1, 60_000) if upright else (60_000, 1)), "PNG")
    assert decode(data).numel() == 60_000


# ---------------------------------------------------------------------------------- as JSON


def test_preprocessing_survives_json() -> None:
    for made in (
        Preprocessing(256, 224, **IMAGENET, interpolation="bicubic"),
        Preprocessing(28, 28, (0.2860,), (0.3530,)),
        square(32, 3),
    ):
        assert Preprocessing.from_json(json.loads(json.dumps(made.to_json()))) == made
    assert square(32, 1).channels == 1
    assert Preprocessing.from_json({"resize": 8, "crop": 8, "mean": [0], "std": [1]}).interpolation == "bilinear"


@pytest.mark.parametrize(
    "change",
    [
        {"resize": 0},
        {"crop": -1},
        {"resize": "many"},
        {"resize": 28.5},
        {"crop": None},
        {"crop": 1 << 20},
        {"resize": 10**12},
        {"mean": []},
        {"mean": [0.5, 0.5], "std": [0.5, 0.5]},
        {"mean": [0.5] * 3},
        {"mean": 0.5},
        {"mean": ["x"]},
        {"mean": None},
        {"mean": [float("nan")]},
        {"std": [0.0]},
        {"std": [-1.0]},
        {"std": [float("nan")]},
        {"std": [float("inf")]},
        {"std": []},
        {"interpolation": "blurry"},
        {"interpolation": "lanczos"},
        {"interpolation": "box"},
        {"interpolation": None},
    ],
    ids=str,
)
def test_nonsense_is_refused(change: Mapping[str, Any]) -> None:
    data = {**square(28, 1).to_json(), **change}
    with pytest.raises((KeyError, TypeError, ValueError)):
        Preprocessing.from_json(data)


@pytest.mark.parametrize("data", [{}, [], None, "text", 3, {"resize": 8, "crop": 8, "mean": [0.5]}], ids=str)
def test_other_shapes_are_refused(data: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Preprocessing.from_json(data)
