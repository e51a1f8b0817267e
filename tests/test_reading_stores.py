"""docs/reading-stores.md: its Python runs as it stands, and decodes labels as this package does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import REPOSITORY, digit_like, make_model

from pseudolabel.annotate import annotate
from pseudolabel.engines.local import LocalEngine
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.store import open_store
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.teachers import parse_teacher

PAGE = REPOSITORY / "docs" / "reading-stores.md"
ARRAYS = ("logits_BC", "dense_BC", "topk_BC")
SAVE = """
np.savez("arrays.npz", tensors=np.stack(tensors["logits"]), **{name: globals()[name] for name in ARRAYS})
Path("kept.json").write_text(json.dumps({
    "table": table.to_pydict(), "least_sure": least_sure, "per_class": per_class, "named": named,
    "disagreeing": disagreeing, "unsure": unsure.to_dicts(), "frame": frame["key"].tolist(),
    "dataset": dataset.num_rows, "images": [[*name, image.hex()] for name, image in images.items()],
}))
"""


def picture(index: int) -> bytes:
    return digit_like(index % 4, index)


@pytest.fixture
def ran(tmp_path: Path, make_shard: Callable[..., Path]) -> Path:
    """A directory as the page says, after its blocks were run there in a process of their own."""
    for shard in range(2):
        make_shard(
            f"shard-{shard}", [(f"{shard}/{index}", {"png": digit_like(index % 4, index)}) for index in range(15)]
        )
    shards = list_shards(tmp_path / "shards")
    for name, seed, encoding in (("labels", 0, "dense"), ("labels-topk", 0, "topk:3"), ("other", 1, "dense")):
        model = make_model(tmp_path / f"model-{seed}", classes=6, seed=seed)
        settings = AnnotateSettings(encoding=encoding, precision="fp32")
        teacher = parse_teacher(f"checkpoint:{model}")
        annotate(shards, teacher, tmp_path / name, engine=LocalEngine("cpu", 1), settings=settings)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == PAGE.read_text(encoding="utf-8").count("```") // 2 > 8
    (tmp_path / "page.py").write_text("\n".join([*blocks, f"ARRAYS = {ARRAYS}", SAVE]), encoding="utf-8")
    caches = {name: str(tmp_path / "cache") for name in ("HF_HOME", "HF_DATASETS_CACHE", "HOME", "XDG_CACHE_HOME")}
    environment = {**os.environ, **caches, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    result = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stderr
    return tmp_path


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any], pa.Table]:
    with np.load(path / "arrays.npz") as arrays:
        found = {name: arrays[name] for name in (*ARRAYS, "tensors")}
    opened = open_store(path / "labels")
    return json.loads((path / "kept.json").read_text()), found, pa.concat_tables(map(opened.read, opened.part_names()))


def test_the_page_runs_and_its_answers_are_right(ran: Path) -> None:
    kept, arrays, whole = read(ran)
    first = open_store(ran / "labels").read("shard-0")
    assert kept["table"] == first.select(["key", "pred", "confidence"]).to_pydict()
    assert kept["frame"] == first["key"].to_pylist()
    assert kept["dataset"] == whole.num_rows == 30
    by_confidence = whole.sort_by("confidence")
    assert [row[3] for row in kept["least_sure"]] == by_confidence["confidence"].to_pylist()[:20]
    assert {row[0] for row in kept["least_sure"]} <= {"shard-0", "shard-1"}
    preds = whole["pred"].to_pylist()
    assert {pred: rows for pred, rows, _ in kept["per_class"]} == {pred: preds.count(pred) for pred in set(preds)}
    assert kept["named"] == {f"class {pred}": preds.count(pred) for pred in set(preds)}
    assert sum(row["rows"] for row in kept["unsure"]) == sum(one < 0.5 for one in whole["confidence"].to_pylist())
    second = open_store(ran / "other")
    others = pa.concat_tables(map(second.read, second.part_names()))["pred"].to_pylist()
    keys = whole["key"].to_pylist()
    differing = sorted(key for key, one, two in zip(keys, preds, others, strict=True) if one != two)
    assert sorted(row[1] for row in kept["disagreeing"]) == differing != []
    assert sorted(row[:2] for row in kept["images"]) == sorted(row[:2] for row in kept["least_sure"])
    for _, key, content in kept["images"]:
        assert bytes.fromhex(content) == picture(int(key.split("/")[1]))
    assert arrays["tensors"].shape == (30, 6)
    assert np.array_equal(arrays["tensors"][:15], arrays["logits_BC"].astype(arrays["tensors"].dtype))


def test_labels_are_decoded_as_here(ran: Path) -> None:
    _, arrays, _ = read(ran)
    for name, place in (("dense_BC", "labels"), ("topk_BC", "labels-topk")):
        opened = open_store(ran / place)
        part = opened.read("shard-0")
        columns = {
            field.name: torch.tensor(np.array(part[field.name].to_pylist(), np.float32))
            for field in parse_encoding(opened.identity.encoding).fields(6)
        }
        wanted = parse_encoding(opened.identity.encoding).full_log_probs(columns, 2.0, 6).exp().numpy()
        assert np.allclose(arrays[name], wanted, rtol=0, atol=1e-6)
