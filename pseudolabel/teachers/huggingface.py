"""`hf:NAME_OR_DIR`: image classifiers of transformers, such as `hf:google/vit-base-patch16-224` or a local directory
that `save_pretrained` left.

Model and weights come through `AutoModelForImageClassification`, in float32; code from a repository is never run.
`weights_file=F` takes the weights from a local .safetensors or .bin file, `pretrained=false` makes random ones from
`seed`: of use for timing alone.

Preprocessing is the model's own image processor. Its settings are read into a `Preprocessing`, which is then compared
with the processor itself on a few images: a processor that does something else besides is refused, not imitated.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pseudolabel import specs
from pseudolabel.classes.names import usual_spelling
from pseudolabel.classifier import Classifier, make_classifier
from pseudolabel.errors import SpecError
from pseudolabel.specs import Spec
from pseudolabel.views.image import INTERPOLATIONS, Normalize, Preprocessing
from pseudolabel.weights import explain_misfit, first_lines, random_weights, read_weights, weight_arguments

_PROBES = ((97, 128), (64, 51), (203, 150))  # height, width: both orientations, odd and even margins
_TOLERANCE = 1.01  # grey levels: the processor may resize with Pillow, which rounds a few values the other way
# What says nothing of the logits, or names a place or a time.
NOT_IDENTITY = ("_name_or_path", "transformers_version", "architectures", "dtype", "id2label", "label2id")


@dataclass(frozen=True)
class HuggingFaceTeacher:
    """A transformers image classifier by name or directory."""

    spec: Spec

    @property
    def uri(self) -> str:
        return str(self.spec)

    def load(self, device: torch.device) -> Classifier:
        transformers = library(self.spec)
        with explain(self.spec, "the image processor can't be loaded"):
            processor = transformers.AutoImageProcessor.from_pretrained(self.spec.name, trust_remote_code=False)
        preprocessing = preprocessing_of(self.spec, processor)
        check_against(self.spec, preprocessing, processor)
        model = self._model(transformers, weight_arguments(self.spec))
        names = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
        config = {key: value for key, value in model.config.to_diff_dict().items() if key not in NOT_IDENTITY}
        return make_classifier(
            Logits(model),
            preprocessing,
            architecture=f"hf:{type(model).__name__}",
            device=device,
            classes=usual_spelling(names),
            facts={"config": config},
        )

    def _model(self, transformers: Any, args: dict[str, Any]) -> Any:
        auto, name = transformers.AutoModelForImageClassification, self.spec.name
        if "weights_file" not in args and args.get("pretrained", True):
            with explain(self.spec, "the model can't be loaded"), contextlib.redirect_stdout(sys.stderr):
                model, report = auto.from_pretrained(
                    name, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
                )
            return self._whole(model, report)
        with explain(self.spec, "its config can't be loaded"):
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        with contextlib.nullcontext() if "weights_file" in args else random_weights(self.uri, args.get("seed", 0)):
            model = auto.from_config(config, dtype=torch.float32, trust_remote_code=False)
        if "weights_file" not in args:
            return model
        # Through its own loading: what it saves has other names than the modules, in models such as ViT.
        state = read_weights(str(args["weights_file"]))
        options = {"config": config, "state_dict": state, "dtype": torch.float32, "output_loading_info": True}
        with explain_misfit(str(args["weights_file"])), contextlib.redirect_stdout(sys.stderr):
            model, report = type(model).from_pretrained(None, **options)
        if over := sorted(report["unexpected_keys"]):
            raise SpecError(
                f"{args['weights_file']}: these weights have {over[0]}{_and_others(over)} besides what {name} takes\n"
                "name the model that they were saved from"
            )
        return self._whole(model, report)

    def _whole(self, model: Any, report: dict[str, Any]) -> Any:
        """The model, if all its weights were there. Raises `SpecError`."""
        missing = sorted([*report["missing_keys"], *(key[0] for key in report["mismatched_keys"])])
        if missing:
            raise SpecError(
                f"{self.uri}: these weights lack {missing[0]}{_and_others(missing)}, which would be random\n"
                "name a model that was fine-tuned to classes"
            )
        return model


def _and_others(names: list[str]) -> str:
    return " and others" if len(names) > 1 else ""


@contextlib.contextmanager
def explain(spec: Spec, what: str) -> Iterator[None]:
    """What fails in the body is a `SpecError` that says `what`."""
    try:
        yield
    except Exception as error:  # transformers and its hub raise kinds of many libraries
        raise SpecError(
            f"{spec}: {what} ({first_lines(error)})\nfetch the whole repository elsewhere and name its directory"
        ) from error


def make(spec: Spec) -> HuggingFaceTeacher:
    weight_arguments(spec)
    return HuggingFaceTeacher(spec)


class Logits(nn.Module):
    """The logits out of the model's output object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        logits_BC: Tensor = self.model(pixel_values=pixels_BCHW).logits
        return logits_BC


def preprocessing_of(spec: Spec, processor: Any) -> Preprocessing:
    """What the processor's settings say. Raises `SpecError` for what can't be said in a `Preprocessing`."""

    if hasattr(processor, "val_transforms"):
        raise SpecError(f"{spec}: is a model of timm; name it timm:hf-hub:{spec.name}")

    def setting(name: str, default: Any = None) -> Any:
        return getattr(processor, name, default)

    size, cut = _size(setting("size")), _size(setting("crop_size")) if setting("do_center_crop") else {}
    shorter, crop_pct = size.get("shortest_edge"), setting("crop_pct")
    fit, resize, crop = "shorter", shorter, cut.get("height")
    if shorter and crop_pct and not crop:  # ConvNeXt: crops by itself, and squashes large inputs
        crop = shorter
        fit, resize = ("squash", shorter) if shorter >= 384 else ("shorter", int(shorter / crop_pct))
    elif shorter and crop_pct:  # PoolFormer
        resize = int(shorter / crop_pct)
    elif not shorter:
        fit, resize, crop = "squash", size.get("height"), crop or size.get("height")
    problem = ""
    if not setting("do_resize") or not resize or size.get("longest_edge"):
        problem = f"it has do_resize={setting('do_resize')} and size={size}"
    elif crop is None or size.get("height") != size.get("width") or cut.get("height") != cut.get("width"):
        problem = f"with size={size} and crop_size={cut} its images are no squares of one size"
    interpolation = _interpolation(setting("resample"))
    if interpolation not in INTERPOLATIONS:
        problem = f"its resample is {interpolation}"
    if problem or resize is None or crop is None:
        raise SpecError(f"{spec}: {problem}, which pseudolabel can't do; wrap the model as python:module:function")
    mean, std = norm_of(processor)
    return Preprocessing(resize, crop, mean, std, interpolation, fit, "floor")


def norm_of(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std of pixels in [0, 1]."""

    def setting(name: str) -> Any:
        return getattr(processor, name, None)

    mean, std = (setting("image_mean"), setting("image_std")) if setting("do_normalize") else ((0.0,) * 3, (1.0,) * 3)
    if setting("include_top") and setting("do_normalize"):  # EfficientNet divides by std twice
        std = [value**2 for value in std]
    unit = 255 * (setting("rescale_factor") if setting("do_rescale") else 1.0)  # the processor's 1 in ours
    mean, std = (tuple(round(float(value) / unit, 9) for value in values) for values in (mean, std))
    return mean, std


def check_against(spec: Spec, preprocessing: Preprocessing, processor: Any) -> None:
    """Raise `SpecError` unless ours gives what the processor gives, up to one grey level."""
    normalize = Normalize(preprocessing)
    for seed, (height, width) in enumerate(_PROBES):
        coarse = np.random.default_rng(seed).integers(0, 256, (3, height // 8, width // 8), dtype=np.uint8)
        image_CHW = nn.functional.interpolate(torch.from_numpy(coarse)[None].float(), (height, width), mode="bilinear")
        image_CHW = image_CHW[0].round().to(torch.uint8)
        try:
            theirs = processor(image_CHW.permute(1, 2, 0).numpy(), return_tensors="pt")["pixel_values"]
        except Exception as error:  # whatever a processor raises, it can't be compared
            raise SpecError(f"{spec}: its image processor fails on an image ({first_lines(error)})") from error
        ours = normalize(preprocessing.prepare(image_CHW)[None])
        levels = (
            ((ours - theirs).abs() * normalize.std * 255).max() if ours.shape == theirs.shape else torch.tensor(255.0)
        )
        if not levels <= _TOLERANCE:
            raise SpecError(
                f"{spec}: its {type(processor).__name__} does more than resize, crop and normalise "
                f"({levels:.0f} grey levels of difference), which pseudolabel can't do\n"
                "wrap the model as python:module:function"
            )


def _size(size: Any) -> dict[str, int]:
    if size is None:
        return {}
    if isinstance(size, int):
        return {"height": size, "width": size}
    names = ("height", "width", "shortest_edge", "longest_edge")
    found = {name: size[name] for name in names if name in size}
    return {name: int(value) for name, value in found.items() if value is not None}


def _interpolation(resample: Any) -> str:
    from transformers.image_utils import pil_torch_interpolation_mapping

    return str(pil_torch_interpolation_mapping[2 if resample is None else resample].value)  # 2 is bilinear


def library(spec: Spec) -> Any:
    """The package. Raises `SpecError` if it isn't installed."""
    try:
        import transformers
    except ImportError as error:
        raise specs.missing_package(spec, error, "hf") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers
