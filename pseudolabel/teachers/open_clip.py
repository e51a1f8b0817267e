"""`open_clip:ARCH/PRETRAINED?classes=FILE`: zero-shot teachers, such as `open_clip:ViT-B-32/laion2b_s34b_b79k`.

The text side makes the head. Each class name of `classes` (one a line) is put into each prompt of `templates` (one a
line, `{}` where the name goes; by default "a photo of a {}."), the prompts' normalised embeddings are averaged and
normalised again, and an image's logits are its cosines with the classes times the learnt scale (Radford et al. 2021,
§3.1). The text side runs once, at the first batch: a thousand classes in eighty prompts take minutes on a CPU, so
describing the teacher doesn't wait for them.

`weights_file=F` takes the weights from a local .safetensors or .pt file, then PRETRAINED says only how their images are
preprocessed; `pretrained=false` makes random ones from `seed`: of use for timing alone. `open_clip:local-dir:DIR` and
`open_clip:hf-hub:OWNER/NAME` are read, too, as open_clip itself does. Preprocessing is the model's `preprocess_cfg`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pseudolabel import specs
from pseudolabel.classes.names import read_lines
from pseudolabel.classifier import Classifier, make_classifier
from pseudolabel.errors import SpecError
from pseudolabel.specs import Spec
from pseudolabel.views.image import Preprocessing
from pseudolabel.weights import explain_misfit, first_lines, random_weights, read_weights, weight_arguments

_SOURCES = ("hf-hub:", "local-dir:")
_PROMPTS_AT_ONCE = 256


@dataclass(frozen=True)
class OpenClipTeacher:
    """A CLIP model, and the words that make a classifier of it. The files were read when it was described."""

    spec: Spec
    architecture: str
    tag: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]

    @property
    def uri(self) -> str:
        return str(self.spec)

    def load(self, device: torch.device) -> Classifier:
        open_clip = _open_clip(self.spec)
        clip = self._model(open_clip, _checked(self.spec)).eval()
        with self._explain("its tokenizer can't be loaded"):
            tokenizer = open_clip.get_tokenizer(self.architecture)
        local = self.architecture.startswith(_SOURCES)
        config = open_clip.get_model_config(self.architecture) if local else self.architecture
        return make_classifier(
            ZeroShot(clip, tokenizer, self.classes, self.templates),
            preprocessing_of(self.spec, clip.visual.preprocess_cfg),
            architecture=f"open_clip:{'local' if local else self.architecture}",
            device=device,
            classes=self.classes,
            facts={"config": config, "prompted": list(self.classes), "templates": list(self.templates)},
            probe=False,
        )

    def _model(self, open_clip: Any, args: Mapping[str, Any]) -> Any:
        random = args.get("pretrained") is False
        if not random and "weights_file" not in args:
            with self._explain("the model can't be loaded"), contextlib.redirect_stdout(sys.stderr):
                return open_clip.create_model(
                    self.architecture, pretrained=self.tag or None, weights_only=True, require_pretrained=True
                )
        preprocess = open_clip.get_pretrained_cfg(self.architecture, self.tag) if self.tag else {}
        with (
            random_weights(self.uri, args.get("seed", 0)) if random else contextlib.nullcontext(),
            self._explain("the model can't be built"),
        ):
            model = open_clip.create_model(
                self.architecture, load_weights=False, pretrained_text=False, force_preprocess_cfg=preprocess
            )
        if not random:
            path = str(args["weights_file"])
            read_weights(path)  # with our own word on what can't be read; open_clip then converts older layouts
            with explain_misfit(path):
                open_clip.load_checkpoint(model, path, strict=True, weights_only=True)
        return model

    @contextlib.contextmanager
    def _explain(self, what: str) -> Any:
        try:
            yield
        except Exception as error:  # open_clip and its hub raise kinds of many libraries
            raise SpecError(
                f"{self.uri}: {what} ({first_lines(error)})\n"
                "fetch the weights elsewhere and name them with weights_file=FILE"
            ) from error


class ZeroShot(nn.Module):
    """Normalised images → scaled cosines with the class embeddings. The head is no weight: the text side makes it."""

    def __init__(self, clip: Any, tokenizer: Any, classes: tuple[str, ...], templates: tuple[str, ...]) -> None:
        super().__init__()
        self.clip, self._tokenizer, self._classes, self._templates = clip, tokenizer, classes, templates
        self._head_DC: Tensor | None = None

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        if self._head_DC is None:
            self._head_DC = self._embed_classes(pixels_BCHW.device)
        features_BD = self.clip.encode_image(pixels_BCHW, normalize=True)
        logits_BC: Tensor = self.clip.logit_scale.exp() * (features_BD @ self._head_DC)
        bias = getattr(self.clip, "logit_bias", None)
        return logits_BC if bias is None else logits_BC + bias

    def _embed_classes(self, device: torch.device) -> Tensor:
        from open_clip import build_zero_shot_classifier

        at_once = max(1, _PROMPTS_AT_ONCE // len(self._templates))
        with torch.no_grad(), torch.autocast(device.type, enabled=False):  # in float32, whatever the images run in
            head_DC: Tensor = build_zero_shot_classifier(
                self.clip, self._tokenizer, self._classes, self._templates, at_once, device
            )
        return head_DC


def make(spec: Spec) -> OpenClipTeacher:
    """Describe it; names, files and arguments are checked here. Raises `SpecError`."""
    open_clip = _open_clip(spec)
    args = _checked(spec)
    architecture, tag = spec.name, ""
    if not spec.name.startswith(_SOURCES):
        architecture, _, tag = spec.name.partition("/")
        _check_names(spec, open_clip, architecture, tag, random=args.get("pretrained") is False)
    elif "weights_file" in args:
        raise SpecError(f"{spec}: {architecture} brings its weights; drop weights_file=")
    if "classes" not in args:
        raise SpecError(f"{spec}: a zero-shot teacher needs class names; add classes=FILE with one a line")
    templates = read_lines(str(args["templates"]), "templates") if "templates" in args else ("a photo of a {}.",)
    for template in templates:
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise SpecError(f"{spec}: the template {template!r} must hold {{}} once, where the class name goes")
    return OpenClipTeacher(spec, architecture, tag, read_lines(str(args["classes"]), "class names"), templates)


def _check_names(spec: Spec, open_clip: Any, architecture: str, tag: str, *, random: bool) -> None:
    known = open_clip.list_models()
    if architecture not in known:
        raise SpecError(f"{spec}: open_clip has no model {architecture!r}{specs.nearest(architecture, known)}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag not in tags and (tag or (tags and not random)):
        what = f"no weights {tag!r}{specs.nearest(tag, tags)}" if tag else f"write open_clip:{architecture}/PRETRAINED"
        raise SpecError(f"{spec}: {what}; known are {', '.join(tags) or 'none'}")
    if not tag and not random and "weights_file" not in dict(spec.args):
        raise SpecError(f"{spec}: open_clip has no weights of {architecture}; add weights_file=FILE")
    quick = [
        bool((config or {}).get("quick_gelu"))
        for config in (open_clip.get_model_config(architecture), open_clip.get_pretrained_cfg(architecture, tag))
    ]
    if tag and quick[0] != quick[1]:  # open_clip only warns, and the logits are wrong
        twin = architecture.removesuffix("-quickgelu") if quick[0] else f"{architecture}-quickgelu"
        how = "with" if quick[1] else "without"
        raise SpecError(f"{spec}: these weights were trained {how} QuickGELU; write open_clip:{twin}/{tag}")


def preprocessing_of(spec: Spec, config: Mapping[str, Any]) -> Preprocessing:
    """Open_clip's evaluation transform. Raises `SpecError` for what can't be said in a `Preprocessing`."""
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    mode = config.get("resize_mode") or "shortest"
    problem = ""
    if height != width:
        problem = f"its input is {height}x{width}, not a square"
    elif mode not in ("shortest", "squash"):
        problem = f"its resize_mode {mode!r} pads the image"
    if problem:
        raise SpecError(f"{spec}: {problem}, which pseudolabel can't do; wrap the model as python:module:function")
    mean, std = (
        (value,) * 3 if isinstance(value, float) else tuple(value) for value in (config["mean"], config["std"])
    )
    interpolation = "bilinear" if config.get("interpolation") == "bilinear" else "bicubic"  # "random" is for training
    return Preprocessing(height, height, mean, std, interpolation, "squash" if mode == "squash" else "shorter")


def _checked(spec: Spec) -> dict[str, Any]:
    published = "published weights are named in open_clip:ARCH/TAG"
    return weight_arguments(spec, ("classes", "templates"), published=published)


def _open_clip(spec: Spec) -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise specs.missing_package(spec, error, "open-clip") from error
    return open_clip
