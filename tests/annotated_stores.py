"""Stores as annotate makes them, one of each kind: with its shards, its teacher, and a store of another teacher."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import image_bytes

from pseudolabel.checkpoint import ModelCard, save_model
from pseudolabel.interfaces import Teacher
from pseudolabel.labeling.work import annotate_shard, identify
from pseudolabel.labels import store
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import Shard, list_shards
from pseudolabel.shards import write_shard
from pseudolabel.teachers import parse_teachers
from pseudolabel.views.image import square

CLASSES = 7
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "topk": {"encoding": "topk:3"},
    "all": {"encoding": f"topk:{CLASSES}"},
    "dense8": {"encoding": "dense8"},
    "sampled": {"encoding": "sampled:20@2"},
    "views": {"encoding": "topk:3", "views": 3},
    "members": {"keep_members": True, "encoding": "topk:2"},
    "mirrored": {"tta": "flip", "views": 2},
}


@dataclass(frozen=True)
class Made:
    """A store of the shards a, and b with two rejects; its teacher; and one of another teacher beside it."""

    root: Path
    other: Path
    shards: list[Shard]
    teacher: Teacher

    def copy(self, directory: Path) -> Made:
        shutil.rmtree(directory, ignore_errors=True)
        return replace(self, root=shutil.copytree(self.root, directory))


def _opinionated(directory: Path, seed: int) -> Path:
    """A random teacher that tells random images apart."""
    torch.manual_seed(seed)
    card = ModelCard("small:resnet8?width=4", tuple(f"class {index}" for index in range(CLASSES)), square(12, 1))
    model = card.build()
    with torch.no_grad():
        head = [parameter for parameter in model.parameters() if parameter.ndim == 2][-1]
        head.mul_(100).sub_(head.mean(0))
    save_model(directory, card, model)
    return directory


def _annotate(shards: list[Shard], teacher: Teacher, out: Path, settings: AnnotateSettings) -> None:
    loaded = teacher.load(torch.device("cpu"))
    opened = store.create(out, identify(loaded, settings))
    for shard in shards:
        found = annotate_shard(shard, loaded, settings)
        opened.commit(found.info, found.part, found.rejects)


# Its name differs from the function's, so that a test that imports it can have a parameter of that name.
@pytest.fixture(scope="module", name="make_store")
def annotated_stores(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """The store of a case, made once."""
    root = tmp_path_factory.mktemp("made")
    models = [f"checkpoint:{_opinionated(root / f'model-{seed}', seed)}" for seed in range(3)]
    for name in ("a", "b"):
        samples = [(f"{name}/{index}", {"png": image_bytes(index), "cls": b"%d" % (index % 9)}) for index in range(12)]
        if name == "b":
            samples[4], samples[9] = ("b/4", {"png": b"broken"}), ("b/9", {"png": image_bytes(9), "cls": b"?"})
        write_shard(root / "shards" / f"{name}.tar", samples)
    shards, made = list_shards(root / "shards"), dict[str, Made]()

    def make(case: str) -> Made:
        if case not in made:
            settings = AnnotateSettings(precision="fp32", batch_size=5, **CASES[case])
            several = 2 if settings.keep_members else 1
            teacher, another = parse_teachers(models[:several]), parse_teachers(models[3 - several :])
            _annotate(shards, teacher, root / case, settings)
            _annotate(shards, another, root / f"other-{case}", settings)
            made[case] = Made(root / case, root / f"other-{case}", shards, teacher)
        return made[case]

    return make
