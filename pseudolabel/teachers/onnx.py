"""`onnx:FILE`: any classifier as an ONNX graph, run by onnxruntime on the CPU or, where it has the provider, on CUDA.

The graph's image input says channels, layout (NCHW or NHWC) and, if they are fixed, sizes. What a graph doesn't say
comes from the file's `metadata_props` or the spec's arguments, which win:

    metadata `preprocessing`   JSON: resize, crop, mean, std, and interpolation, fit where they aren't the defaults
    metadata `classes`         JSON list of names
    ?size=224&resize=256       pixels of the input, and of the shorter side before the crop (as size, if not given)
    &mean=0.485,0.456,0.406&std=0.229,0.224,0.225    of pixels/255; one number stands for all channels
    &interpolation=bicubic&fit=squash&classes=FILE   class names one a line

An input of uint8 takes pixels as they are, so mean and std don't apply. The output must be logits: a graph that ends in
a softmax is refused. The identity holds a hash of the file and of the external data it names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pseudolabel import specs
from pseudolabel.classes.names import parse_names, read_lines
from pseudolabel.errors import SpecError
from pseudolabel.specs import SIDES, Spec
from pseudolabel.views.image import Normalize, Preprocessing
from pseudolabel.weights import first_lines

_PREPROCESSING = ("size", "resize", "mean", "std", "interpolation", "fit")
_ARGUMENTS = (*_PREPROCESSING, "classes", "output")
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


@dataclass(frozen=True)
class OnnxTeacher:
    """An ONNX file."""

    spec: Spec

    @property
    def uri(self) -> str:
        return str(self.spec)

    def load(self, device: torch.device) -> LoadedOnnx:
        args = _checked(self.spec)
        digest, metadata = _read_file(self.spec, args.get("output"))
        session = _open_session(self.spec, device)
        image = _Input.of(self.spec, session)
        preprocessing = _preprocessing(self.spec, args, metadata, image)
        output = str(args.get("output", session.get_outputs()[0].name))
        names: tuple[str, ...] | None = None
        if "classes" in args:
            names = read_lines(str(args["classes"]), "class names")
        elif "classes" in metadata:
            names = parse_names(metadata["classes"], self.uri)
        found = _run(self.spec, session, image, output, torch.zeros(1, *image.shape(preprocessing.crop)).numpy())
        if found.ndim != 2 or found.shape[0] != 1:
            raise SpecError(
                f"{self.uri}: must give logits of shape (batch, classes), it gave {found.shape} for one image"
            )
        if found.shape[1] > 1 and found.min() >= 0 and abs(float(found.sum()) - 1) < 1e-3:
            raise SpecError(f"{self.uri}: gives probabilities; export it without its softmax, up to the logits")
        names = names or tuple(str(index) for index in range(found.shape[1]))
        if len(names) != found.shape[1]:
            raise SpecError(f"{self.uri}: {len(names)} class names for {found.shape[1]} logits")
        identity = {
            "architecture": f"onnx:{output}",
            "weights_sha256": digest,
            "preprocessing": preprocessing.to_json(),
        }
        return LoadedOnnx(self.spec, session, image, output, preprocessing, names, identity, device)


@dataclass(frozen=True)
class _Input:
    """The graph's image input."""

    name: str
    dtype: str
    batch: int | None
    channels: int
    size: int | None
    channels_last: bool

    @classmethod
    def of(cls, spec: Spec, session: Any) -> _Input:
        inputs = session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in _DTYPES:
            found = ", ".join(f"{one.name}: {one.type}{one.shape}" for one in inputs)
            raise SpecError(f"{spec}: must take one batch of images of float, float16 or uint8, it takes {found}")
        batch, *rest = (size if isinstance(size, int) else None for size in inputs[0].shape)
        last = rest[0] not in (1, 3) and rest[2] in (1, 3)
        channels, height, width = (rest[2], rest[0], rest[1]) if last else rest
        if channels not in (1, 3) or height != width:
            raise SpecError(f"{spec}: its input {inputs[0].shape} must be a square of 1 or 3 channels")
        return cls(inputs[0].name, inputs[0].type, batch, channels, height, last)

    def shape(self, crop: int) -> tuple[int, int, int]:
        return (crop, crop, self.channels) if self.channels_last else (self.channels, crop, crop)


@dataclass(frozen=True)
class LoadedOnnx:
    """A session and what it needs around it; fits `interfaces.LoadedTeacher`."""

    runs_torch: ClassVar[bool] = False  # what autocast and torch.compile do, it doesn't
    spec: Spec
    session: Any
    image: _Input
    output: str
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    identity: Mapping[str, Any]
    device: torch.device

    def prepare(self, image_CHW: Tensor) -> tuple[Tensor, ...]:
        return (self.preprocessing.prepare(image_CHW),)

    def logits(self, inputs: tuple[Tensor, ...]) -> Tensor:
        pixels_BCHW = inputs[0].cpu()
        values = pixels_BCHW if self.image.dtype == "tensor(uint8)" else Normalize(self.preprocessing)(pixels_BCHW)
        values = values.permute(0, 2, 3, 1) if self.image.channels_last else values
        logits = _run(self.spec, self.session, self.image, self.output, values.contiguous().numpy())
        return torch.from_numpy(logits.astype(np.float32)).to(self.device)


def make(spec: Spec) -> OnnxTeacher:
    _checked(spec)
    return OnnxTeacher(spec)


def _run(spec: Spec, session: Any, image: _Input, output: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The output for a batch of any size; a graph of a fixed batch gets it in pieces, the last filled up with zeros."""
    values = values.astype(_DTYPES[image.dtype], copy=False)
    step = image.batch or len(values)
    found = []
    for start in range(0, len(values), step):
        piece = values[start : start + step]
        missing = np.zeros((step - len(piece), *piece.shape[1:]), piece.dtype) if image.batch else piece[:0]
        try:
            found.append(session.run([output], {image.name: np.concatenate([piece, missing])})[0][: len(piece)])
        except Exception as error:  # onnxruntime's errors have no common parent but this
            raise SpecError(
                f"{spec}: the graph fails on images of shape {piece.shape}: {first_lines(error)}"
            ) from error
    return np.concatenate(found)


def _open_session(spec: Spec, device: torch.device) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise specs.missing_package(spec, error, "onnx") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # one process per core, as for all teachers
    options.log_severity_level = 3
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise SpecError(
                f"{spec}: this onnxruntime has no CUDA provider; "
                "install onnxruntime-gpu in its place, or use --device cpu"
            )
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    elif device.type != "cpu":
        raise SpecError(f"{spec}: runs on cpu or cuda, not on {device.type}; use --device cpu")
    try:
        return onnxruntime.InferenceSession(spec.name, options, providers=providers)
    except Exception as error:  # onnxruntime's errors have no common parent but this
        raise SpecError(f"{spec}: onnxruntime can't open it ({first_lines(error)})") from error


def _read_file(spec: Spec, output: object) -> tuple[str, dict[str, str]]:
    """A hash of the graph and its external data, and its metadata. Raises `SpecError`, also for probabilities."""
    try:
        import onnx
    except ImportError as error:
        raise specs.missing_package(spec, error, "onnx") from error
    path = Path(spec.name)
    digest = hashlib.sha256()
    try:
        digest.update(path.read_bytes())
        model = onnx.load(path, load_external_data=False)
        for name in sorted(_external_files(model)):
            with open(path.parent / name, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    except Exception as error:  # protobuf's errors have no common parent but this
        raise SpecError(
            f"{spec}: can't be read as an ONNX file ({type(error).__name__}: {first_lines(error)})"
        ) from error
    outputs = [one.name for one in model.graph.output]
    if output is None and len(outputs) > 1:
        raise SpecError(f"{spec}: has the outputs {', '.join(outputs)}; name the logits with output=")
    if output is not None and output not in outputs:
        raise SpecError(f"{spec}: has no output {output!r}{specs.nearest(str(output), outputs)}")
    maker = next((node.op_type for node in model.graph.node if (output or outputs[0]) in node.output), "")
    if maker in ("Softmax", "Sigmoid"):
        raise SpecError(f"{spec}: ends in a {maker}, so it gives probabilities; export it without, up to the logits")
    return digest.hexdigest(), {entry.key: entry.value for entry in model.metadata_props}


def _external_files(model: Any) -> set[str]:
    """Names of the files beside it that hold tensors."""
    tensors = [*model.graph.initializer, *_constants(model.graph.node)]
    tensors += [tensor for function in model.functions for tensor in _constants(function.node)]
    return {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}


def _constants(nodes: Iterable[Any]) -> Iterator[Any]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for graph in (attribute.g, *attribute.graphs):
            yield from graph.initializer
            yield from _constants(graph.node)


def _preprocessing(spec: Spec, args: Mapping[str, Any], metadata: Mapping[str, str], image: _Input) -> Preprocessing:
    try:
        said: dict[str, Any] = json.loads(metadata.get("preprocessing", "{}"))
        given = {name: args[name] for name in _PREPROCESSING if name in args}
        size = given.pop("size", image.size or said.get("crop"))
        if size is None:
            raise SpecError(f"{spec}: neither the graph nor its metadata says the size of its input; add size=PIXELS")
        if "size" in args or size != said.get("crop"):
            said.pop("resize", None)
        said = {"resize": size, **said, **given, "crop": size}
        if image.dtype == "tensor(uint8)":
            said |= {"mean": 0.0, "std": 1.0}
        if "mean" not in said or "std" not in said:
            raise SpecError(
                f"{spec}: neither its metadata nor the spec says how pixels are normalised; "
                "add mean=0.485,0.456,0.406&std=0.229,0.224,0.225 or whatever it was trained with"
            )
        said |= {name: _per_channel(said[name], image.channels) for name in ("mean", "std")}
        made = Preprocessing.from_json(said)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SpecError(f"{spec}: its preprocessing lacks or misstates {error}") from error
    if image.size not in (None, made.crop) or made.channels != image.channels:
        raise SpecError(
            f"{spec}: its preprocessing gives {made.channels}x{made.crop}x{made.crop}, "
            f"the graph takes {image.channels}x{image.size}x{image.size}"
        )
    return made


def _per_channel(value: object, channels: int) -> list[float]:
    if isinstance(value, str):
        value = value.split(",")
    values = [float(one) for one in (value if isinstance(value, list) else [value])]  # type: ignore[arg-type]
    return values * channels if len(values) == 1 else values


def _checked(spec: Spec) -> dict[str, Any]:
    return spec.only(_ARGUMENTS, whole={"size": SIDES, "resize": SIDES})
