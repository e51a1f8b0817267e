"""Class maps: merged classes have their share of the probability, and no map is ambiguous."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from small_models import CPU, logits_of
from small_teachers import IMAGENET, IMAGES, noise, write_onnx

from pseudolabel.annotate import annotate
from pseudolabel.classes.map import read_class_map
from pseudolabel.errors import SpecError, StoreMismatch
from pseudolabel.labels.store import open_store
from pseudolabel.teachers import parse_teacher, parse_teachers
from pseudolabel.teachers.ensemble import LoadedEnsemble


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
