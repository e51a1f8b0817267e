"""`auto:EPS`: the smallest K that keeps the loss within EPS, chosen once for a store."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import Invoke
from conftest import make_model

from pseudolabel.annotate import annotate
from pseudolabel.demo import bundled, pack_bundled
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import SpecError, StoreMismatch
from pseudolabel.labels.store import open_store
from pseudolabel.labels.summary import summarize_store
from pseudolabel.plan import auto as auto_module
from pseudolabel.plan import plan
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import list_shards

ENGINE = LocalEngine("cpu", 1)


def _annotate(shards: Path, teacher: Path, out: Path, encoding: str) -> str:
    settings = AnnotateSettings(precision="fp32", encoding=encoding)
    return annotate(shards, f"checkpoint:{teacher}", out, engine=ENGINE, settings=settings).encoding


def _lost(out: Path) -> float:
    return max(summarize_store(open_store(out)).fidelity["mean"].values())


@pytest.fixture
def wide_teacher(tmp_path: Path) -> Path:
    return make_model(tmp_path / "wide", classes=60)


@pytest.mark.parametrize("most", [0.005, 0.002])
def test_k_is_the_smallest_that_keeps_to_it(corpus: Path, tmp_path: Path, wide_teacher: Path, most: float) -> None:
    """The probe sees the whole corpus here, so there is no margin: one class fewer would lose too much."""
    chosen = _annotate(corpus / "unlabeled", wide_teacher, tmp_path / "auto", f"auto:{most}")
    kept = int(chosen.removeprefix("topk:"))
    assert 1 < kept < 26
    assert _lost(tmp_path / "auto") <= most
    _annotate(corpus / "unlabeled", wide_teacher, tmp_path / "fewer", f"topk:{kept - 1}")
    assert _lost(tmp_path / "fewer") > most
    assert json.loads((tmp_path / "auto" / "store.json").read_text())["encoding"] == chosen


def test_a_real_teachers_store_keeps_to_it_though_the_probe_sees_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_module, "SAMPLES", 100)
    pack_bundled(tmp_path / "data")
    teacher = bundled("data/fashion-mnist") / "teacher"
    chosen = _annotate(tmp_path / "data" / "val", teacher, tmp_path / "store", "auto:0.05")
    assert re.fullmatch(r"topk:[1-4]|dense", chosen)
    assert _lost(tmp_path / "store") <= 0.05
    assert json.loads((tmp_path / "store" / "encoding.json").read_text())["samples"] < 200


def test_where_topk_would_take_more_all_logits_are_kept(corpus: Path, tmp_path: Path, teacher_dir: Path) -> None:
    assert _annotate(corpus / "unlabeled", teacher_dir, tmp_path / "store", "auto:0.1") == "dense"


def test_the_choice_is_kept_for_the_store(corpus: Path, tmp_path: Path, wide_teacher: Path) -> None:
    """A resumed run, or another slice, takes it without asking the teacher again; other EPS are refused."""
    shards, out = list_shards(corpus / "unlabeled"), tmp_path / "store"
    settings = AnnotateSettings(precision="fp32", encoding="auto:0.01")
    first = annotate(shards[:1], f"checkpoint:{wide_teacher}", out, engine=ENGINE, settings=settings)
    written = (out / "encoding.json").read_bytes()
    rest = annotate(shards, f"checkpoint:{wide_teacher}", out, engine=ENGINE, settings=settings)
    assert (rest.encoding, rest.parts_skipped, rest.fingerprint) == (first.encoding, 1, first.fingerprint)
    assert (out / "encoding.json").read_bytes() == written
    assert _annotate(corpus / "unlabeled", wide_teacher, out, "auto:1e-2") == first.encoding
    assert _annotate(corpus / "unlabeled", wide_teacher, out, first.encoding) == first.encoding
    with pytest.raises(StoreMismatch, match=rf"{first.encoding}, was chosen for auto:0.01, not auto:0.5\n"):
        _annotate(corpus / "unlabeled", wide_teacher, out, "auto:0.5")


def test_whoever_comes_second_takes_what_the_first_chose(corpus: Path, tmp_path: Path, wide_teacher: Path) -> None:
    """Written before the store: of two machines with a slice each, one decides."""
    out = tmp_path / "store"
    out.mkdir()
    (out / "encoding.json").write_text(json.dumps({"asked": "auto:0.01", "encoding": "topk:33"}))
    assert _annotate(corpus / "unlabeled", wide_teacher, out, "auto:0.01") == "topk:33"


def test_plan_prices_what_annotate_would_choose(corpus: Path, tmp_path: Path, wide_teacher: Path) -> None:
    settings = AnnotateSettings(precision="fp32", encoding="auto:0.01")
    options = {"engine": ENGINE, "settings": settings, "probe_seconds": 0, "label_seconds": 100}
    found = plan(corpus / "unlabeled", f"checkpoint:{wide_teacher}", **options, out=tmp_path / "store")
    assert not (tmp_path / "store").exists()
    assert _annotate(corpus / "unlabeled", wide_teacher, tmp_path / "store", "auto:0.01") == found.encoding
    assert [row.encoding for row in found.encodings if row.chosen] == [found.encoding]


@pytest.mark.parametrize("spec", ["auto", "auto:", "auto:0", "auto:-1", "auto:x", "auto:inf", "auto:nan"])
def test_nonsense_is_refused(corpus: Path, tmp_path: Path, teacher_dir: Path, spec: str) -> None:
    with pytest.raises(SpecError, match=r"write auto:EPS .* such as auto:0.01"):
        _annotate(corpus / "unlabeled", teacher_dir, tmp_path / "store", spec)
    assert not (tmp_path / "store").exists()


def test_the_command_says_what_was_chosen(corpus: Path, tmp_path: Path, wide_teacher: Path, invoke: Invoke) -> None:
    how = ("--encoding", "auto:0.01", "--device", "cpu", "--workers", 1, "--json")
    teacher = ("--teacher", f"checkpoint:{wide_teacher}")
    code, out, err = invoke("annotate", corpus / "unlabeled", *teacher, "--out", tmp_path / "store", *how)
    found = json.loads(out)
    assert code == 0
    assert re.search(rf"^encoding +{found['encoding']}$", err, re.MULTILINE)
    assert found["encoding"].startswith("topk:")
    assert re.match(
        r"the fewest classes for auto:0.01: 0.0\d+ nats lost at T = 1, on 72 samples$", found["encoding_reason"]
    )
    assert f"encoding reason  {found['encoding_reason']}" in err
    again = invoke("annotate", corpus / "unlabeled", *teacher, "--out", tmp_path / "store", *how)[1]
    assert json.loads(again)["encoding_reason"] == found["encoding_reason"]
    plain = ("--encoding", found["encoding"], "--device", "cpu", "--json")
    _, out, err = invoke("annotate", corpus / "unlabeled", *teacher, "--out", tmp_path / "store", *plain)
    assert json.loads(out)["encoding_reason"] is None
    assert "reason" not in err


@pytest.mark.parametrize(
    ("classes", "why"),
    [
        (4, "any topk:K takes more bytes than all 4 logits"),
        (9, "topk:1 loses more than auto:1e-9 allows; more take more bytes than all 9 logits"),
        (60, "topk:1 to topk:26 lose more than auto:1e-9 allows; more take more bytes than all 60 logits"),
    ],
)
def test_why_all_logits_are_kept_is_told(corpus: Path, tmp_path: Path, classes: int, why: str) -> None:
    """Whoever asked for a loss and got dense wondered."""
    teacher = make_model(tmp_path / "teacher", classes=classes)
    settings = AnnotateSettings(precision="fp32", encoding="auto:1e-9")
    found = annotate(
        corpus / "unlabeled", f"checkpoint:{teacher}", tmp_path / "store", engine=ENGINE, settings=settings
    )
    assert (found.encoding, found.encoding_reason) == ("dense", why)
