"""Small models of every source of teachers, with what their own library makes of images."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import onnx
import open_clip
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torchvision import transforms
from torchvision.models import ResNet50_Weights

from pseudolabel.views.image import Normalize, Preprocessing

IMAGENET = tuple(ResNet50_Weights.DEFAULT.meta["categories"])
SIZES = [(300, 400), (413, 300), (64, 50), (37, 111), (160, 160), (161, 255)]  # height, width


def noise(seed: int, height: int, width: int, channels: int = 3) -> Tensor:
    """The hardest picture to resize: every pixel its own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)


def pillow(image_CHW: Tensor) -> Image.Image:
    return Image.fromarray(image_CHW.permute(1, 2, 0).numpy())


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
