"""Trainings that take a second: their settings, the corpus annotated for them, and one call that runs one."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import make_model

from pseudolabel.annotate import annotate
from pseudolabel.engines.local import LocalEngine
from pseudolabel.labels.store import Store, open_store
from pseudolabel.settings import AnnotateSettings, TrainSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.teachers import parse_teacher
from pseudolabel.train import TrainResult, train

SMALL = TrainSettings(student="small:resnet8?width=4", image_size=12, channels=1, steps=12, batch_size=16, eval_every=4)


# Its name differs from the function's, so that a test that imports it can have a parameter of that name.
@pytest.fixture(name="store")
def small_store(corpus: Path, tmp_path: Path) -> Store:
    return annotated_by(corpus, tmp_path / "store", make_model(tmp_path / "teacher"))


def annotated_by(corpus: Path, out: Path, model: Path, encoding: str = "dense") -> Store:
    teacher = parse_teacher(f"checkpoint:{model}")
    settings = AnnotateSettings(precision="fp32", encoding=encoding)
    annotate(list_shards(corpus / "unlabeled"), teacher, out, engine=LocalEngine("cpu", 1), settings=settings)
    return open_store(out)


def train_on(
    corpus: Path, out: Path, store: Store | None = None, settings: TrainSettings = SMALL, **options: object
) -> TrainResult:
    sets = {"labeled": list_shards(corpus / "labeled"), "val": list_shards(corpus / "val")}
    sets |= {"unlabeled": list_shards(corpus / "unlabeled")} if store is not None else {}
    return train(settings, out, **{**sets, "store": store, "threads": 1, **options})  # type: ignore[arg-type]
