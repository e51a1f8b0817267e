"""ONNX files as teachers: what the graph says, what the spec says, and what neither does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from small_models import CPU, logits_of
from small_teachers import IMAGES, Net, noise, write_onnx

from pseudolabel.errors import SpecError
from pseudolabel.teachers import parse_teacher
from pseudolabel.views.image import Normalize, Preprocessing


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
