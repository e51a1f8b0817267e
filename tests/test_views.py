"""Views: drawn from a hash, stored as numbers, replayed to the same pixels.

Seen at peers: stored views that can't be replayed as their parameters were never written, and cached outputs flipped
against their images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import REPOSITORY, Cli, image_bytes, make_model
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor

from pseudolabel.annotate import annotate
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import RecipeError, SpecError, StoreError, StoreMismatch
from pseudolabel.evaluate import evaluate
from pseudolabel.inputs import check_annotated
from pseudolabel.labeling import annotate_shard, identify
from pseudolabel.labels import schema
from pseudolabel.labels.store import Store, StoreIdentity, open_store
from pseudolabel.labels.summary import summarize_store
from pseudolabel.labels.verify import verify
from pseudolabel.recipe import validate
from pseudolabel.replay import open_replay, replay
from pseudolabel.settings import AnnotateSettings, AugmentSettings, TrainSettings
from pseudolabel.shard_lists import Shard, list_shards
from pseudolabel.shards import read_samples, write_shard
from pseudolabel.teachers import parse_teacher, parse_teachers
from pseudolabel.train import train
from pseudolabel.views.augment import ViewPlan, apply_view, library_versions, preprocessings
from pseudolabel.views.draw import CLEAN, View, draw_view, uniforms
from pseudolabel.views.image import Preprocessing, decode, image_field, resize, square
from pseudolabel.views.photometric import parse_policy

CPU = torch.device("cpu")
SCALE = (0.25, 1.0)
SIZES = [(1, 1), (1, 5000), (5000, 3), (23, 37), (28, 28)]
THREE = AnnotateSettings(precision="fp32", views=3, view_seed=7, view_policy="randaugment:2+erase", batch_size=7)

# A real model whose logits are a fixed random projection of all pixels: other pixels, other logits.
PROJECTION = """
import torch
class Projection(torch.nn.Module):
    classes = ("a", "b", "c", "d", "e")
    def __init__(self, channels, size):
        super().__init__()
        self.preprocessing = dict(resize=size + 2, crop=size, mean=[0.4] * channels, std=[0.2] * channels)
        weight = torch.randn(5, channels * size * size, generator=torch.Generator().manual_seed(0))
        self.weight = torch.nn.Parameter(weight / size)
    def forward(self, x):
        return (x.flatten(1)[:, None] * self.weight).sum(-1)  # row by row: the batch doesn't show
def make(channels="3", size="10"):
    return Projection(int(channels), int(size))
"""


def picture(height: int, width: int, mode: str = "RGB", seed: int = 0, kind: str = "PNG") -> bytes:
    return image_bytes(seed, (width, height), mode, kind)


def pixels_of(height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture
def projection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The spec of the projecting teacher."""
    (tmp_path / "projection_teacher.py").write_text(PROJECTION)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "python:projection_teacher:make"


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    """Two small shards of odd sizes, grey and RGB, PNG and JPEG, one broken image."""
    kinds = [("L", "PNG", "png"), ("RGB", "PNG", "png"), ("RGB", "JPEG", "jpg")]
    for name in ("a", "b"):
        samples: list[tuple[str, dict[str, bytes]]] = []
        for index, (height, width) in enumerate([*SIZES[:1], (1, 90), (90, 3), *SIZES[3:], (64, 48)] * 2):
            mode, kind, suffix = kinds[index % 3]
            samples.append((f"{name}/{index}", {suffix: picture(height, width, mode, index, kind), "cls": b"1"}))
        samples.insert(4, (f"{name}/broken", {"png": b"broken"}))
        write_shard(tmp_path / "shards" / f"{name}.tar", samples)
    return list_shards(tmp_path / "shards")


def label(shards: list[Shard], out: Path, spec: str, settings: AnnotateSettings = THREE, workers: int = 1) -> Store:
    annotate(
        shards,
        parse_teachers([spec]),
        out,
        engine=LocalEngine("cpu", workers),
        settings=settings,
        max_reject_fraction=1.0,
    )
    return open_store(out)


def images_of(shard: Shard) -> dict[str, bytes]:
    return {sample.key: sample.fields[image_field(sample.fields)] for sample in read_samples(shard)}


# ---------------------------------------------------------------------------------- drawing


UNIFORMS = [0.9039259094848828, 0.2842982946348752, 0.7418085603735591]
DRAWN = {
    ("a/0", 1, 23, 37): View(1, (2 / 23, 0.0, 20 / 23, 16 / 37), True, 3168087279379814),
    ("a/0", 2, 23, 37): View(2, (0.0, 13 / 37, 19 / 23, 17 / 37), False, 7331640038405092),
    ("ü", 1, 500, 375): View(1, (112 / 500, 19 / 375, 377 / 500, 343 / 375), True, 8586707229121662),
    ("k", 1, 1, 5000): View(1, (0.0, 2499 / 5000, 1.0, 1 / 5000), False, 5921200596924224),
}
COLOURS = (
    [("brightness", 85837), ("contrast", 51480), ("saturation", 61490)],
    (0.5676031878707267, 0.3190486287644687, 0.15365763003890942, 0.39936792854784897),
)
RANDOM = ([("equalize", 0), ("saturation", 61223), ("brightness", 94840)], None)


def test_draws_are_these_numbers_for_good() -> None:
    """Literal values: a draw that changes would make a store of two halves without anybody noticing."""
    numbers = uniforms(b"x")
    assert [next(numbers) for _ in range(3)] == UNIFORMS
    for (key, number, height, width), wanted in DRAWN.items():
        drawn = draw_view(7, key, number, height, width, SCALE)
        assert drawn == dataclasses.replace(wanted, crop=tuple(float(np.float32(value)) for value in wanted.crop))
    assert parse_policy("color+erase").draw(12345) == COLOURS
    assert parse_policy("randaugment:3").draw(12345) == RANDOM


def test_colours_are_drawn_as_the_format_says() -> None:
    """FORMAT.md, step 6, in its own words."""
    factors = []
    for i in range(3):
        data = i.to_bytes(4, "little") + b"photometric" + (12345).to_bytes(8, "little")
        u = (int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 11) / 2**53
        factors.append(math.floor((0.6 + 0.8 * u) * 2**16))
    assert [amount for _, amount in COLOURS[0]] == factors


def test_a_draw_hangs_on_seed_key_and_number_and_on_nothing_else() -> None:
    one = draw_view(7, "k", 1, 40, 30, SCALE)
    torch.manual_seed(5)
    np.random.seed(5)
    assert draw_view(7, "k", 1, 40, 30, SCALE) == one
    others = [(8, "k", 1), (7, "l", 1), (7, "k", 2), (7, "\u0000k", 1), (7, "ü", 1)]
    assert len({one, *(draw_view(*other, 40, 30, SCALE) for other in others)}) == 6
    assert draw_view(7, "k", 0, 40, 30, SCALE) == CLEAN


def fraction(value: float) -> float:
    return float(np.float32(value))


@given(st.data())
def test_stored_fractions_give_back_every_box(data: st.DataObject) -> None:
    """Any box of an image up to 5000 pixels a side survives float32."""
    height, width = (data.draw(st.integers(1, 5000)) for _ in range(2))
    rows, columns = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - rows)), data.draw(st.integers(0, width - columns))
    crop = (fraction(top / height), fraction(left / width), fraction(rows / height), fraction(columns / width))
    assert View(1, crop).box(height, width) == (top, left, rows, columns)


@given(*[st.floats(0, 1, width=32)] * 4, st.integers(1, 5000), st.integers(1, 5000))
def test_no_fractions_leave_the_image(
    top: float, left: float, rows: float, columns: float, height: int, width: int
) -> None:
    y, x, box_height, box_width = View(1, (top, left, rows, columns)).box(height, width)
    assert 0 <= y < y + box_height <= height
    assert 0 <= x < x + box_width <= width


@given(st.integers(1, 5000), st.integers(1, 5000), st.text(max_size=8), st.integers(0, (1 << 63) - 1))
def test_drawn_views_are_float32_and_survive_arrow(height: int, width: int, key: str, seed: int) -> None:
    view = draw_view(seed, key, 3, height, width, SCALE)
    assert view.crop == tuple(fraction(value) for value in view.crop)
    assert 0 <= view.aug_seed < 1 << 63
    columns = schema.part_schema([], augmented=True)
    kinds = pa.schema([columns.field(name) for name in ("view", "crop", "flip", "aug_seed")])
    row = {"view": 3, "crop": view.crop, "flip": view.flip, "aug_seed": view.aug_seed}
    assert View.from_row(pa.Table.from_pylist([row], schema=kinds).to_pylist()[0]) == view


def test_draws_follow_their_law() -> None:
    """RandomResizedCrop's law on a square, where nothing is refused for its shape but little."""
    size, count = 1000, 4000
    views = [draw_view(0, str(index), 1, size, size, SCALE) for index in range(count)]
    boxes = np.array([view.box(size, size) for view in views])
    flips = np.mean([view.flip for view in views])
    assert abs(flips - 0.5) < 4 * 0.5 / math.sqrt(count)
    area = boxes[:, 2] * boxes[:, 3] / size**2
    assert 0.249 < area.min() < 0.26
    assert 0.97 < area.max() <= 1.0
    small = area < 0.6  # always accepted: sqrt(0.6 * 4/3) < 1, so uniform here
    assert abs(np.median(area[small]) - 0.425) < 0.01
    ratio = np.log(boxes[small, 3] / boxes[small, 2])
    assert abs(ratio.mean()) < 0.02
    assert abs(ratio.std() - 2 * math.log(4 / 3) / math.sqrt(12)) < 0.01
    place = boxes[small, 0] / (size - boxes[small, 2])
    assert abs(place.mean() - 0.5) < 0.03
    assert abs(place.std() - 1 / math.sqrt(12)) < 0.02
    assert len({view.aug_seed for view in views}) == count


def test_images_without_room_get_the_largest_crop_of_a_right_shape() -> None:
    assert draw_view(0, "k", 1, 1, 1, SCALE).box(1, 1) == (0, 0, 1, 1)
    assert draw_view(0, "k", 1, 1, 5000, SCALE).box(1, 5000) == (0, 2499, 1, 1)
    assert draw_view(0, "k", 1, 5000, 3, SCALE).box(5000, 3) == (2498, 0, 4, 3)


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

    return photometric._OPERATIONS[name](image, amount)


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


# ---------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("channels", [1, 3])
def test_every_stored_row_is_replayed_to_the_pixels_that_were_labeled(
    shards: list[Shard], projection: str, tmp_path: Path, channels: int
) -> None:
    """The contract: from Parquet, images and store.json alone, without drawing anything again."""
    spec = f"{projection}?channels={channels}"
    store = label(shards, tmp_path / "store", spec)
    teacher = parse_teacher(spec).load(CPU)
    again = open_replay(store.identity)
    rows = 0
    for shard in shards:
        images = images_of(shard)
        for row in store.read(shard.name).to_pylist():
            pixels = again(images[row["key"]], row)
            logits = teacher.logits((pixels[None],))[0]
            stored = torch.tensor(np.array(row["logits"], np.float16))
            assert torch.equal((logits - logits.max()).half(), stored), (row["key"], row["view"])
            assert row["pred"] == int(logits.argmax())
            rows += 1
    assert rows == 2 * 12 * 3


def test_replay_is_the_same_on_a_cpu_without_vector_instructions(
    shards: list[Shard], projection: str, tmp_path: Path
) -> None:
    """Another process, other instructions, other threads: the digests of all rows are equal."""
    label(shards, tmp_path / "store", projection)
    script = """
import hashlib, sys, torch
from pseudolabel import list_shards, open_replay, open_store, read_samples
from pseudolabel.views.image import image_field
torch.set_num_threads(int(sys.argv[1]))
store = open_store("store")
again = open_replay(store.identity)
for shard in list_shards("shards"):
    images = {sample.key: sample.fields[image_field(sample.fields)] for sample in read_samples(shard)}
    for row in store.read(shard.name).to_pylist():
        pixels = again(images[row["key"]], row)
        print(hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest())
"""
    found = []
    for capability, threads in (("default", "2"), (None, "1")):
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        environment |= {"ATEN_CPU_CAPABILITY": capability} if capability else {}
        command = [sys.executable, "-c", script, threads]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        found.append(done.stdout.split())
    assert found[0] == found[1]
    assert len(found[0]) == 72


def test_cached_outputs_are_not_flipped_against_their_images(tmp_path: Path, projection: str) -> None:
    """Seen at a peer: cosine 0.867 instead of 0.9999. Dark left halves, bright right halves tell a flip."""
    image = Image.fromarray(np.tile(np.array([0] * 8 + [250] * 8, np.uint8), (16, 1)))
    path = tmp_path / "half.png"
    image.save(path)
    samples = [(str(index), {"png": path.read_bytes()}) for index in range(40)]
    write_shard(tmp_path / "shards" / "s.tar", samples)
    spec = f"{projection}?channels=1&size=16"
    settings = AnnotateSettings(precision="fp32", views=2, view_policy="none", crop_scale=(1.0, 1.0))
    store = label(list_shards(tmp_path / "shards"), tmp_path / "store", spec, settings)
    teacher = parse_teacher(spec).load(CPU)
    resized = resize(decode(path.read_bytes()), 16, 16, "bilinear")
    both = teacher.logits((torch.stack([resized, resized.flip(-1)]),))
    assert torch.cosine_similarity(both[0], both[1], dim=0) < 0.9
    flips = 0
    for row in store.read_view("s", view=1).to_pylist():
        if row["crop"] != [0.0, 0.0, 1.0, 1.0]:
            continue
        wanted = both[int(row["flip"])]
        stored = torch.tensor(np.array(row["logits"], np.float32))
        torch.testing.assert_close(stored, wanted - wanted.max(), rtol=2e-3, atol=2e-3)
        flips += row["flip"]
    assert 0 < flips < 40


def test_rows_are_sample_by_sample_then_view_by_view(shards: list[Shard], projection: str, tmp_path: Path) -> None:
    store = label(shards, tmp_path / "store", projection)
    for shard in shards:
        part = store.read(shard.name)
        assert part["view"].to_pylist() == [0, 1, 2] * 12
        assert part["index"].to_pylist() == [index for index in range(13) if index != 4 for _ in range(3)]
        info = store.info(shard.name)
        assert (info.samples, info.rejects, part.num_rows) == (13, 1, 36)
        images = images_of(shard)
        for row in part.to_pylist():
            height, width = decode(images[row["key"]]).shape[-2:]
            wanted = draw_view(7, row["key"], row["view"], height, width, SCALE)
            assert View.from_row(row) == wanted
            assert (tuple(row["crop"]), row["flip"], row["aug_seed"]) == (wanted.crop, wanted.flip, wanted.aug_seed)
        assert part.schema.field("crop").type == pa.list_(pa.float32(), 4)


def test_workers_and_batches_do_not_show_in_the_bytes(shards: list[Shard], projection: str, tmp_path: Path) -> None:
    """The projection adds row by row, so that even the size of a batch leaves no trace."""
    one = label(shards, tmp_path / "one", projection)
    many = label(shards, tmp_path / "many", projection, workers=2)
    for batch_size in (1, 3, 1000):
        label(shards, tmp_path / str(batch_size), projection, THREE.model_copy(update={"batch_size": batch_size}))
    teacher = parse_teacher(projection).load(CPU)
    assert many.fingerprint == one.fingerprint
    for shard in shards:
        whole = one.part_path(shard.name).read_bytes()
        for other in ("many", "1", "3", "1000"):
            assert (tmp_path / other / "parts" / f"{shard.name}.parquet").read_bytes() == whole, other
        assert annotate_shard(shard, teacher, THREE).part.equals(one.read(shard.name))


def test_forward_passes_hold_no_more_rows_than_the_batch_size(
    shards: list[Shard], projection: str, tmp_path: Path
) -> None:
    """A sample's views stay together, even where they are more than the batch size."""
    for batch_size, views, wanted in ((7, 3, 6), (64, 3, 36), (2, 3, 3), (4, 1, 4)):
        settings = AnnotateSettings(precision="fp32", views=views, batch_size=batch_size)
        teacher = parse_teacher(projection).load(CPU)
        seen: list[int] = []

        @dataclasses.dataclass(frozen=True)
        class Counting(type(teacher)):  # type: ignore[misc]
            def logits(self, inputs: tuple[Tensor, ...], seen: list[int] = seen) -> Tensor:
                seen.append(len(inputs[0]))
                return super().logits(inputs)

        fields = {field.name: getattr(teacher, field.name) for field in dataclasses.fields(teacher)}
        annotate_shard(shards[0], Counting(**fields), settings)
        assert max(seen) == wanted
        assert sum(seen) == 12 * views


def test_a_sample_with_one_bad_view_is_rejected_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rows of view 0 + rejects = samples, whatever view the teacher fails on."""
    (tmp_path / "picky_teacher.py").write_text(
        "import torch\n"
        "class Picky(torch.nn.Module):\n"
        "    preprocessing = dict(resize=8, crop=8, mean=[0.0], std=[1.0])\n"
        "    def forward(self, x):\n"
        "        logits = x.flatten(1)[:, :3].clone()\n"
        "        logits[x.flatten(1).mean(1) > 0.55] = float('inf')\n"
        "        return logits\n"
        "def make():\n"
        "    return Picky()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    gray = Image.new("L", (8, 8), 128)
    gray.save(tmp_path / "gray.png")
    data = (tmp_path / "gray.png").read_bytes()
    write_shard(tmp_path / "shards" / "s.tar", [(str(index), {"png": data}) for index in range(30)])
    settings = AnnotateSettings(precision="fp32", views=3, view_policy="color", batch_size=12)
    store = label(list_shards(tmp_path / "shards"), tmp_path / "store", "python:picky_teacher:make", settings)
    bright = set()
    for index in range(30):
        for number in (1, 2):
            view = draw_view(0, str(index), number, 8, 8, SCALE)
            level = apply_view(decode(data), view, square(8, 1), "color").float().mean() / 255
            bright |= {index} if level > 0.55 else set()
    assert 0 < len(bright) < 30
    assert store.read_rejects("s")["index"].to_pylist() == sorted(bright)
    part = store.read("s")
    assert part.num_rows == 3 * (30 - len(bright))
    assert verify(store, list_shards(tmp_path / "shards")).ok


def test_members_of_an_ensemble_see_one_view(shards: list[Shard], projection: str, tmp_path: Path) -> None:
    specs = [f"{projection}?channels=3", f"{projection}?channels=1&size=6"]
    teacher = parse_teachers(specs)
    settings = AnnotateSettings(precision="fp32", views=2, view_policy="color")
    annotate(shards, teacher, tmp_path / "store", engine=LocalEngine("cpu", 1), settings=settings)
    store = open_store(tmp_path / "store")
    inputs = preprocessings(store.identity.teacher)
    assert [(one.channels, one.crop) for one in inputs] == [(3, 10), (1, 6)]
    with pytest.raises(SpecError, match="ensemble with 2 different inputs; pass the preprocessing"):
        open_replay(store.identity)
    loaded = teacher.load(CPU)
    images = images_of(shards[0])
    for row in store.read("a").to_pylist():
        pixels = tuple(replay(images[row["key"]], row, store.identity, one)[None] for one in inputs)
        logits = loaded.logits(pixels)[0]
        stored = torch.tensor(np.array(row["logits"], np.float32))
        torch.testing.assert_close(stored, logits - logits.max(), rtol=2e-3, atol=2e-3)


def test_fidelity_is_over_all_rows(shards: list[Shard], projection: str, tmp_path: Path) -> None:
    settings = THREE.model_copy(update={"encoding": "topk:2"})
    store = label(shards, tmp_path / "store", projection, settings)
    clean = label(shards, tmp_path / "clean", projection, AnnotateSettings(precision="fp32", encoding="topk:2"))
    assert store.info("a").fidelity != clean.info("a").fidelity
    assert store.read_view("a", ["pred", "topk_id"]).equals(clean.read("a", ["pred", "topk_id"]))


# ---------------------------------------------------------------------------------- test-time augmentation


@pytest.mark.parametrize("views", [1, 3])
def test_flip_averages_the_image_and_its_mirror_image(
    shards: list[Shard], projection: str, tmp_path: Path, views: int
) -> None:
    """By hand: the mean of log-probabilities; the augmented views stay what they are."""
    settings = AnnotateSettings(precision="fp32", views=views, tta="flip", batch_size=5)
    plain = label(shards, tmp_path / "plain", projection, settings.model_copy(update={"tta": "none"}))
    store = label(shards, tmp_path / "store", projection, settings)
    teacher = parse_teacher(projection).load(CPU)
    images = images_of(shards[0])
    for row in store.read_view("a").to_pylist():
        clean = teacher.prepare(decode(images[row["key"]]))[0]
        mean = torch.log_softmax(teacher.logits((torch.stack([clean, clean.flip(-1)]),)), -1).mean(0)
        stored = torch.tensor(np.array(row["logits"], np.float32))
        torch.testing.assert_close(stored, mean - mean.max(), rtol=2e-3, atol=2e-3)
        assert row["pred"] == int(mean.argmax())
        assert math.isclose(row["confidence"], float(mean.softmax(-1).max()), rel_tol=1e-4)
    assert not store.read_view("a").equals(plain.read_view("a"))
    for number in range(1, views):
        assert store.read_view("a", view=number).equals(plain.read_view("a", view=number))


# ---------------------------------------------------------------------------------- identity


def test_stores_of_the_clean_view_keep_their_fingerprint(tmp_path: Path) -> None:
    teacher = parse_teacher(f"checkpoint:{make_model(tmp_path / 'm')}").load(CPU)
    plain = identify(teacher, AnnotateSettings(precision="fp32"))
    assert plain.views == {"count": 1}
    idle = AnnotateSettings(precision="fp32", view_seed=5, view_policy="none", crop_scale=(0.5, 1.0))
    assert identify(teacher, idle).fingerprint == plain.fingerprint
    assert identify(teacher, AnnotateSettings(precision="fp32", tta="flip")).views == {"count": 1, "tta": "flip"}


def test_all_that_decides_the_views_is_in_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = parse_teacher(f"checkpoint:{make_model(tmp_path / 'm')}").load(CPU)
    changes: list[dict[str, Any]] = [
        {},
        {"views": 4},
        {"view_seed": 1},
        {"view_policy": "none"},
        {"crop_scale": (0.3, 1.0)},
        {"tta": "flip"},
    ]
    fingerprints = {
        identify(teacher, AnnotateSettings(precision="fp32", **{"views": 3, **change})).fingerprint
        for change in changes
    }
    identity = identify(teacher, AnnotateSettings(precision="fp32", views=3))
    versions = identity.views["versions"]
    assert versions == library_versions()
    assert set(versions) == {"numpy", "pillow", "torch", "torchvision"}
    assert all(version.replace(".", "").isdecimal() and version.count(".") == 2 for version in versions.values())
    monkeypatch.setattr(torch, "__version__", "1.2.3+cpu")
    assert library_versions()["torch"] == "1.2.3"
    fingerprints.add(identify(teacher, AnnotateSettings(precision="fp32", views=3)).fingerprint)
    assert len(fingerprints) == len(changes) + 1


def test_a_plan_survives_json() -> None:
    for plan in (ViewPlan(), ViewPlan(tta="flip"), ViewPlan(4, 9, "none", (0.1, 0.5), "flip")):
        assert ViewPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    with pytest.raises(StoreError, match="law 2, this version knows 1"):
        ViewPlan.from_json({**ViewPlan(2).to_json(), "law": 2})


def test_other_library_versions_are_refused_or_warned_of(shards: list[Shard], projection: str, tmp_path: Path) -> None:
    store = label(shards, tmp_path / "store", projection)
    row = store.read_view("a", view=1).to_pylist()[3]
    image = images_of(shards[0])[row["key"]]
    versions = {**library_versions(), "torchvision": "0.1.2"}
    old = dataclasses.replace(store.identity, views={**store.identity.views, "versions": versions})
    with pytest.raises(StoreMismatch, match=r"torchvision 0\.1\.2 \(here .*\ninstall these versions"):
        replay(image, row, old)
    with pytest.warns(UserWarning, match=r"torchvision 0\.1\.2"):
        found = replay(image, row, old, other_versions="warn")
    assert torch.equal(found, replay(image, row, store.identity))


def test_rows_that_can_not_be_replayed_say_why(shards: list[Shard], projection: str, tmp_path: Path) -> None:
    store = label(shards, tmp_path / "store", projection)
    row = store.read_view("a", view=2).to_pylist()[3]
    again = pickle.loads(pickle.dumps(open_replay(store.identity)))  # noqa: S301 - loader processes need it
    image = decode(images_of(shards[0])[row["key"]])
    assert torch.equal(again(image, row), again(image, View.from_row(row)))
    with pytest.raises(StoreMismatch, match="read the columns view, crop, flip and aug_seed"):
        again(image, {"view": 1})
    with pytest.raises(StoreMismatch, match="read the columns view"):
        again(image, {"key": "k"})
    with pytest.raises(StoreMismatch, match="of view 5, its store has views 0 to 2"):
        again(image, {**row, "view": 5})
    nameless = StoreIdentity({"architecture": "x"}, ("a",), "dense", {"count": 1}, "fp32")
    with pytest.raises(SpecError, match="doesn't say how it prepares images"):
        open_replay(nameless)


def test_settings_refuse_nonsense() -> None:
    for bad in ({"views": 0}, {"tta": "rotate"}, {"crop_scale": (0.5, 0.2)}, {"crop_scale": (0, 1)}, {"view_seed": -1}):
        with pytest.raises(RecipeError):
            validate(AnnotateSettings, bad, "annotate")


# ---------------------------------------------------------------------------------- readers


def test_verify_wants_every_view_in_its_place(shards: list[Shard], projection: str, tmp_path: Path) -> None:
    store = label(shards, tmp_path / "store", projection)
    assert (verify(store, shards).ok, verify(store, shards).rows) == (True, 72)
    info, whole, rejects = store.info("a"), store.read("a"), store.read_rejects("a")

    def problem(table: pa.Table) -> str:
        store.commit(info, table, rejects)
        (found,) = verify(store).problems
        assert (found.part, found.kind) == ("a", "DamagedPart")
        return found.detail

    assert "35 rows and 1 rejects for 13 samples of 3 views" in problem(whole.slice(0, 35))
    assert "out of order" in problem(whole.take([1, 0, *range(2, 36)]))
    assert "a view is missing or twice there" in problem(whole.take([0, 1, 1, *range(3, 36)]))
    assert "its columns are" in problem(whole.drop_columns(["crop", "flip", "aug_seed"]))

    def changed(name: str, row: int, value: object) -> pa.Table:
        values = whole[name].to_pylist()
        values[row] = value
        field = whole.schema.field(name)
        return whole.set_column(whole.schema.get_field_index(name), field, pa.array(values, field.type))

    assert "not the clean view" in problem(changed("flip", 3, True))
    assert "outside of its image" in problem(changed("crop", 4, [0.5, 0.0, 0.75, 1.0]))
    store.commit(info, whole, rejects)
    assert verify(store).ok


def test_training_evaluation_and_inspection_know_views(corpus: Path, teacher_dir: Path, tmp_path: Path) -> None:
    """For now both use view 0 only: the same run from a store of one view and of three."""
    spec = f"checkpoint:{teacher_dir}"
    sets = {name: list_shards(corpus / name) for name in ("labeled", "unlabeled", "val")}
    settings = TrainSettings(
        student="small:resnet8?width=4",
        image_size=12,
        channels=1,
        steps=3,
        batch_size=16,
        augment=AugmentSettings(crop="none", flip=False),
    )
    results = []
    for name, views in (("one", 1), ("three", 3)):
        # batches that split samples alike, as a batch's size may show in the last bit
        annotated = AnnotateSettings(precision="fp32", views=views, batch_size=8 * views, encoding="topk:2")
        store = label([*sets["unlabeled"], *sets["val"]], tmp_path / name, spec, annotated)
        summary = summarize_store(store)
        assert (summary.rows, summary.views) == (96 * views, views)
        assert verify(store, sets["unlabeled"]).ok
        assert [one.rows for one in check_annotated(sets["unlabeled"], store)] == [24] * 3
        run = train(settings, tmp_path / f"run-{name}", store=store, threads=1, **sets)
        results.append((run.val_accuracy, (tmp_path / f"run-{name}" / "model.safetensors").read_bytes()))
        agreement = evaluate(teacher_dir, sets["val"], store=store).agreement
        assert agreement == 1.0
    assert results[0] == results[1]


def test_the_command_makes_views_and_says_what_has_no_effect(
    cli: Cli, corpus: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    base = ("annotate", corpus / "unlabeled", "--teacher", f"checkpoint:{teacher_dir}", "--workers", 1)
    result, err = cli(*base, "--out", "store", "--views", 2, "--view-seed", 3, "--view-policy", "none", "--tta", "flip")
    assert (result["samples"], "no effect" in err) == (72, False)
    views = open_store(tmp_path / "store").identity.views
    assert {name: views[name] for name in ("count", "seed", "policy", "tta")} == {
        "count": 2,
        "seed": 3,
        "policy": "none",
        "tta": "flip",
    }
    inspected, _ = cli("inspect", "store")
    assert (inspected["rows"], inspected["views"]) == (144, 2)
    _, err = cli(*base, "--out", "other", "--view-seed", 3)
    assert "note: with --views 1, --view-seed have no effect" in err
    for wrong, kind in ((("--view-policy", "sepia"), "SpecError"), (("--tta", "rotate"), "RecipeError")):
        failed, _ = cli(*base, "--out", "third", "--views", 2, *wrong, code=1)
        assert failed["error"]["kind"] == kind
    assert not (tmp_path / "third").exists()
