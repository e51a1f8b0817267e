"""Each library's settings, as a `Preprocessing`: the same pixels as its own transform gives, or refused."""

from __future__ import annotations

import json
from typing import Any

import open_clip
import pytest
import timm
import transformers
from small_teachers import SIZES, check_preprocessing, grey_levels, noise
from timm.data import create_transform, resolve_data_config

from pseudolabel.errors import SpecError
from pseudolabel.specs import parse
from pseudolabel.teachers.huggingface import check_against
from pseudolabel.teachers.huggingface import preprocessing_of as hf_preprocessing
from pseudolabel.teachers.open_clip import preprocessing_of as clip_preprocessing
from pseudolabel.teachers.timm import preprocessing_of as timm_preprocessing
from pseudolabel.views.image import Normalize, Preprocessing

SPEC = parse("any:model")


def test_every_pretrained_classifier_of_timm_can_be_prepared() -> None:
    """All that timm publishes resize to a square by the shorter side or squash to it."""
    fits = []
    for name in timm.list_pretrained():
        config = timm.get_pretrained_cfg(name).to_dict()
        if config["num_classes"]:
            fits.append(timm_preprocessing(SPEC, config).fit)
    assert {"shorter", "squash"} == set(fits)
    assert len(fits) > 1000


@pytest.mark.parametrize(
    "change",
    [
        {"crop_pct": 0.875},
        {"crop_pct": 1.0, "interpolation": "bilinear"},
        {"crop_pct": 0.9, "crop_mode": "squash", "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.3)},
        {"crop_pct": 1.0, "crop_mode": "squash", "input_size": (3, 51, 51)},
        {"crop_pct": 0.95, "input_size": (3, 97, 97)},
    ],
)
def test_timms_settings_are_timms_transform(change: dict[str, Any]) -> None:
    config = timm.get_pretrained_cfg("resnet50").to_dict() | {"input_size": (3, 64, 64)} | change
    check_preprocessing(
        timm_preprocessing(SPEC, config),
        create_transform(**resolve_data_config(pretrained_cfg=config), is_training=False),
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"crop_mode": "border"}, "'border' pads the image"),
        ({"input_size": (3, 64, 96)}, "its input is 64x96, not a square"),
        ({"interpolation": "lanczos"}, "its interpolation is 'lanczos'"),
        ({"input_size": (4, 64, 64)}, "4 channels, and 3 means"),
    ],
)
def test_what_a_preprocessing_can_not_say_is_refused_for_timm(change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        timm_preprocessing(SPEC, timm.get_pretrained_cfg("resnet50").to_dict() | change)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ViT", {"size": {"height": 40, "width": 40}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}),
        (
            "ViT",
            {"size": {"height": 40, "width": 40}, "do_rescale": False, "image_mean": [127] * 3, "image_std": [128] * 3},
        ),
        ("ViT", {"size": {"height": 40, "width": 40}, "rescale_factor": 1 / 127.5, "image_mean": [1] * 3}),
        ("ViT", {"size": {"height": 40, "width": 40}, "do_normalize": False}),
        ("CLIP", {"size": {"shortest_edge": 40}, "crop_size": {"height": 35, "width": 35}}),
        ("Bit", {"size": {"shortest_edge": 51}, "crop_size": {"height": 40, "width": 40}, "resample": 0}),
        ("DeiT", {"size": {"height": 51, "width": 51}, "crop_size": {"height": 40, "width": 40}}),
        ("ConvNext", {"size": {"shortest_edge": 40}, "crop_pct": 0.8}),
        ("ConvNext", {"size": {"shortest_edge": 384}}),
        ("EfficientNet", {"size": {"height": 40, "width": 40}, "image_std": [0.4, 0.5, 0.6]}),
        ("PoolFormer", {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}}),
        ("MobileNetV2", {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}),
    ],
)
def test_a_processors_settings_are_what_the_processor_does(name: str, settings: dict[str, Any]) -> None:
    """ConvNeXt squashes from 384 pixels and crops below, EfficientNet divides by std twice, and where a margin is odd
    transformers crops one pixel from where torchvision does.
    """
    processor = getattr(transformers, f"{name}ImageProcessor")(**settings)
    preprocessing = hf_preprocessing(SPEC, processor)
    for seed, size in enumerate(SIZES):
        image_CHW = noise(seed, *size)
        theirs = processor(image_CHW, return_tensors="pt")["pixel_values"]
        ours = Normalize(preprocessing)(preprocessing.prepare(image_CHW)[None])
        assert grey_levels(preprocessing, ours, theirs).max() < 0.01, size  # they resize the same tensor, so the same


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("ViT", {"do_resize": False}, "it has do_resize=False"),
        ("ViT", {"size": {"height": 40, "width": 50}}, "no squares of one size"),
        ("CLIP", {"do_center_crop": False}, "no squares of one size"),
        ("CLIP", {"crop_size": {"height": 40, "width": 50}}, "no squares of one size"),
        ("ViT", {"resample": 1}, "its resample is lanczos"),
        ("MobileViT", {}, "does more than resize, crop and normalise"),  # it swaps red and blue
        ("Levit", {}, "does more than resize, crop and normalise"),  # it resizes to 256/224 of what it says
        ("Perceiver", {}, "does more than resize, crop and normalise"),  # it crops first
    ],
)
def test_a_processor_that_does_something_else_is_refused(name: str, settings: dict[str, Any], said: str) -> None:
    """Settings alone don't tell: MobileViT's look like any other's."""
    processor = getattr(transformers, f"{name}ImageProcessor")(**settings)
    with pytest.raises(SpecError, match=said):
        check_against(SPEC, hf_preprocessing(SPEC, processor), processor)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"interpolation": "bilinear", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)},
        {"mean": 0.25, "std": 0.75},
        {"resize_mode": "squash", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "size": (51, 51)},
        {"interpolation": "random"},
    ],
)
def test_open_clips_settings_are_open_clips_transform(change: dict[str, Any]) -> None:
    config = open_clip.transform.PreprocessCfg(**{"size": 64, **change})
    check_preprocessing(
        clip_preprocessing(SPEC, vars(config)), open_clip.transform.image_transform_v2(config, is_train=False)
    )


@pytest.mark.parametrize(
    ("change", "said"), [({"resize_mode": "longest"}, "pads the image"), ({"size": (32, 64)}, "not a square")]
)
def test_what_a_preprocessing_can_not_say_is_refused_for_open_clip(change: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        clip_preprocessing(SPEC, vars(open_clip.transform.PreprocessCfg(**change)))


def test_preprocessing_of_old_stores_reads_and_writes_the_same_bytes() -> None:
    """The fingerprint hashes this JSON: a new key in it would cut off every store there is."""
    old = '{"resize": 256, "crop": 224, "mean": [0.5], "std": [0.5], "interpolation": "bilinear"}'
    assert json.dumps(Preprocessing.from_json(json.loads(old)).to_json()) == old
    new = Preprocessing(9, 8, (0.5,), (0.5,), fit="squash", center="floor")
    assert Preprocessing.from_json(new.to_json()) == new
    for name in ("fit", "center"):
        with pytest.raises(ValueError, match="makes no sense"):
            Preprocessing.from_json({**new.to_json(), name: "other"})
