"""Annotating: every sample accounted for, the same bytes whoever does it, bad shards named, good ones finished."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from commands import Invoke
from conftest import digit_like, image_bytes, make_model

from pseudolabel.annotate import AnnotateResult, annotate, annotate_shard
from pseudolabel.checkpoint import load_model
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import (
    DamagedShard,
    ShardListError,
    SpecError,
    StorageError,
    StoreMismatch,
    TooManyRejects,
)
from pseudolabel.labels.store import open_store
from pseudolabel.labels.summary import summarize_store
from pseudolabel.labels.verify import verify
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import Shard, list_shards
from pseudolabel.shards import read_samples, write_shard
from pseudolabel.teachers import parse_teacher, parse_teachers
from pseudolabel.views.image import decode

MakeShard = Callable[..., Path]


def _annotate(shards: Path, out: Path, teacher: Path | str, *, workers: int = 1, **options: object) -> AnnotateResult:
    settings = AnnotateSettings(
        precision="fp32", **{name: options.pop(name) for name in ("encoding", "batch_size") if name in options}
    )  # type: ignore[arg-type]
    uri = teacher if isinstance(teacher, str) else f"checkpoint:{teacher}"
    return annotate(
        list_shards(shards),
        parse_teachers([uri]),
        out,
        engine=LocalEngine("cpu", workers),
        settings=settings,
        **options,
    )  # type: ignore[arg-type]


def test_stored_logits_are_the_teachers(corpus: Path, teacher_dir: Path, tmp_path: Path) -> None:
    """Against the model run by hand on the same image: labels fit their images."""
    _annotate(corpus / "unlabeled", tmp_path / "store", teacher_dir, batch_size=7)
    model = load_model(teacher_dir, torch.device("cpu"))
    opened = open_store(tmp_path / "store")
    for shard in list_shards(corpus / "unlabeled"):
        rows = {row["key"]: row for row in opened.read(shard.name).to_pylist()}
        for sample in read_samples(shard):
            logits = model.logits((model.prepare(decode(sample.fields["png"]))[0][None],))[0]
            stored = torch.tensor(np.array(rows[sample.key]["logits"], np.float32))
            torch.testing.assert_close(stored, logits - logits.max(), rtol=2e-3, atol=2e-3)
            assert rows[sample.key]["pred"] == int(logits.argmax())


def test_every_sample_is_a_row_or_a_reject_with_its_reason(
    make_shard: MakeShard, teacher_dir: Path, tmp_path: Path
) -> None:
    whole, jpeg = image_bytes(1), image_bytes(2, mode="RGB", kind="JPEG")
    good = {
        "gray": {"png": whole, "cls": b"3"},
        "rgb": {"jpg": jpeg},
        "cmyk": {"jpg": image_bytes(3, mode="CMYK", kind="JPEG")},
        "rgba": {"png": image_bytes(4, mode="RGBA")},
        "gif": {"gif": image_bytes(5, mode="RGB", kind="GIF")},
        "webp": {"webp": image_bytes(6, mode="RGB", kind="WEBP")},
        "spa ce/ü/../x": {"png": whole},
    }
    bad = {
        "empty": ({"png": b""}, "decode", "empty"),
        "text": ({"png": b"this is text, not an image"}, "decode", "no image"),
        "torn": ({"jpg": jpeg[: len(jpeg) // 2]}, "decode", ""),
        "no-image": ({"txt": b"x"}, "decode", "no image field"),
        "two-images": ({"png": whole, "jpg": jpeg}, "decode", "several image fields"),
        "words-for-label": ({"png": whole, "cls": b"cat"}, "label", "not a class number"),
    }
    make_shard("mixed", [*good.items(), *((key, fields) for key, (fields, _, _) in bad.items())])
    result = _annotate(tmp_path / "shards", tmp_path / "store", teacher_dir, max_reject_fraction=1.0)
    assert (result.samples, result.rejects) == (len(good) + len(bad), len(bad))
    opened = open_store(tmp_path / "store")
    part = opened.read("mixed")
    assert part["key"].to_pylist() == list(good)
    assert part["label"].to_pylist() == [3, None, None, None, None, None, None]
    rejects = {row["key"]: row for row in opened.read_rejects("mixed").to_pylist()}
    assert rejects.keys() == bad.keys()
    for key, (_, stage, text) in bad.items():
        assert rejects[key]["stage"] == stage
        assert text in rejects[key]["detail"]
        assert rejects[key]["error"]


def test_nan_logits_are_rejects_not_labels(
    make_shard: MakeShard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_shard("s", [(str(index), {"png": image_bytes(index)}) for index in range(6)])
    (tmp_path / "nan_teacher.py").write_text(
        "import torch\n"
        "class Nan(torch.nn.Module):\n"
        "    preprocessing = dict(resize=12, crop=12, mean=[0.5], std=[0.5])\n"
        "    def forward(self, x):\n"
        "        logits = x.flatten(1)[:, :3].clone()\n"
        "        logits[::2, 1] = float('nan')\n"
        "        return logits\n"
        "def make():\n"
        "    return Nan()\n"
    )
    monkeypatch.chdir(tmp_path)
    result = _annotate(
        tmp_path / "shards", tmp_path / "store", "python:nan_teacher:make", max_reject_fraction=1.0, batch_size=4
    )
    assert (result.samples, result.rejects) == (6, 3)
    rejects = open_store(tmp_path / "store").read_rejects("s").to_pylist()
    assert [(row["index"], row["stage"], row["error"]) for row in rejects] == [
        (i, "forward", "NonFiniteLogits") for i in (0, 2, 4)
    ]


def test_too_many_rejects_name_the_worst_shard_and_keep_the_parts(
    make_shard: MakeShard, teacher_dir: Path, tmp_path: Path
) -> None:
    make_shard("fine", [(str(index), {"png": image_bytes(index)}) for index in range(8)])
    make_shard("awful", [(str(index), {"png": b"no"}) for index in range(3)])
    with pytest.raises(TooManyRejects, match=r"3 of 11 samples.*\n.*awful\.tar: 3 of 3"):
        _annotate(tmp_path / "shards", tmp_path / "store", teacher_dir, max_reject_fraction=0.1)
    again = _annotate(tmp_path / "shards", tmp_path / "store", teacher_dir, max_reject_fraction=0.3)
    assert (again.parts_written, again.parts_skipped) == (0, 2)


def test_damaged_shards_get_no_part_and_are_named_after_the_others_are_done(
    make_shard: MakeShard, teacher_dir: Path, tmp_path: Path
) -> None:
    for name in "abcd":
        path = make_shard(name, [(f"{name}{index}", {"png": image_bytes(index)}) for index in range(5)])
        if name in "bd":
            path.write_bytes(path.read_bytes()[: 3 * 1024 + 100])
    with pytest.raises(DamagedShard) as caught:
        _annotate(tmp_path / "shards", tmp_path / "store", teacher_dir)
    assert "b.tar: this shard is truncated" in str(caught.value)
    assert "d.tar" in str(caught.value)
    assert open_store(tmp_path / "store").part_names() == ["a", "c"]


@pytest.mark.parametrize("encoding", ["dense", "topk:2"])
def test_workers_and_order_do_not_show_in_the_bytes(
    corpus: Path, teacher_dir: Path, tmp_path: Path, encoding: str
) -> None:
    """Contract of engines: many processes, one process, and the pure function by hand give the same parts."""
    many = _annotate(corpus / "unlabeled", tmp_path / "many", teacher_dir, workers=2, encoding=encoding, batch_size=5)
    one = _annotate(corpus / "unlabeled", tmp_path / "one", teacher_dir, encoding=encoding, batch_size=5)
    assert many.fingerprint == one.fingerprint
    teacher = parse_teacher(f"checkpoint:{teacher_dir}").load(torch.device("cpu"))
    for shard in list_shards(corpus / "unlabeled"):
        name = f"parts/{shard.name}.parquet"
        assert (tmp_path / "many" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
        by_hand = annotate_shard(shard, teacher, AnnotateSettings(encoding=encoding, batch_size=5))
        assert by_hand.part.equals(pq.read_table(tmp_path / "one" / name).replace_schema_metadata(None))
        assert by_hand.info == open_store(tmp_path / "one").info(shard.name)


def test_resume_does_only_what_is_missing(corpus: Path, teacher_dir: Path, tmp_path: Path) -> None:
    first = _annotate(corpus / "unlabeled", tmp_path / "store", teacher_dir)
    path = tmp_path / "store" / "parts" / "unlabeled-1.parquet"
    whole = path.read_bytes()
    path.unlink()
    untouched = (tmp_path / "store" / "parts" / "unlabeled-0.parquet").stat().st_mtime_ns
    again = _annotate(corpus / "unlabeled", tmp_path / "store", teacher_dir)
    assert (again.parts_written, again.parts_skipped) == (1, 2)
    assert (again.samples, again.rejects) == (first.samples, first.rejects)
    assert path.read_bytes() == whole
    assert (tmp_path / "store" / "parts" / "unlabeled-0.parquet").stat().st_mtime_ns == untouched


def test_resume_with_another_teacher_or_an_edited_shard_is_refused(
    corpus: Path, teacher_dir: Path, tmp_path: Path, make_shard: MakeShard
) -> None:
    _annotate(corpus / "unlabeled", tmp_path / "store", teacher_dir)
    with pytest.raises(StoreMismatch, match="weights_sha256"):
        _annotate(corpus / "unlabeled", tmp_path / "store", make_model(tmp_path / "other", seed=1))
    make_shard("unlabeled-0", [("x", {"png": digit_like(0, 0)})] * 1, directory=corpus / "unlabeled")
    with pytest.raises(StoreMismatch, match="edited"):
        _annotate(corpus / "unlabeled", tmp_path / "store", teacher_dir)


def test_a_vanished_shard_is_one_clear_error(corpus: Path, teacher_dir: Path, tmp_path: Path) -> None:
    shards = list_shards(corpus / "unlabeled")
    (corpus / "unlabeled" / "unlabeled-1.tar").unlink()
    with pytest.raises(StorageError, match=r"unlabeled-1\.tar failed: No such file"):
        annotate(shards, parse_teacher(f"checkpoint:{teacher_dir}"), tmp_path / "store", engine=LocalEngine("cpu", 1))


def test_more_kept_classes_than_the_teacher_has(corpus: Path, teacher_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="only 4 classes"):
        _annotate(corpus / "unlabeled", tmp_path / "store", teacher_dir, encoding="topk:5")
    assert not (tmp_path / "store").exists()


def test_the_log_has_a_line_a_shard_and_is_not_part_of_identity(
    corpus: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    _annotate(corpus / "unlabeled", tmp_path / "store", teacher_dir)
    (log,) = (tmp_path / "store" / "log").glob("*.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["shard"] for line in lines[:-1]) == ["unlabeled-0", "unlabeled-1", "unlabeled-2"]
    assert all(set(line["seconds"]) == {"fetch", "decode", "forward", "write", "other"} for line in lines[:-1])
    assert lines[-1]["result"]["bottleneck"].startswith("bound by ")
    assert sum(lines[-1]["result"]["stages"].values()) == pytest.approx(1, abs=1e-3)
    assert all(line["samples"] == 24 and line["seconds"]["forward"] > 0 for line in lines[:-1])


def test_a_random_teacher_is_said_to_be_random(corpus: Path, tmp_path: Path) -> None:
    spec = "torchvision:mobilenet_v3_small?num_classes=4"
    with pytest.warns(UserWarning, match="random"):
        parse_teacher(spec).load(torch.device("cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, two = (parse_teacher(spec).load(torch.device("cpu")).identity for _ in range(2))
    assert one == two


def test_other_classes_than_the_corpus_names_are_pointed_out(corpus: Path, tmp_path: Path) -> None:
    """It came out only when the labels, hours later, were to be trained on."""
    (corpus / "classes.txt").write_text("a\nb\nc\n")
    with pytest.warns(UserWarning, match=r"teacher has 4 classes, the list of the corpus names 3: .*class-map"):
        _annotate(corpus / "unlabeled", tmp_path / "store", make_model(tmp_path / "model"))


def test_the_rejects_are_listed(invoke: Invoke, teacher_dir: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [("good", {"png": image_bytes()}), ("bad", {"png": b"no image"})])
    store, given = tmp_path / "store", ("--teacher", f"checkpoint:{teacher_dir}", "--max-reject-fraction", 1)
    code, _, err = invoke("annotate", tmp_path / "s.tar", *given, "--out", store, "--workers", 1, "--device", "cpu")
    assert code == 0, err
    (reject,) = json.loads(invoke("inspect", store, "--rejects", "--json")[1])["rejected"]
    assert (reject["shard"], reject["key"], reject["stage"]) == ("s", "bad", "decode")
    assert "rejected" not in json.loads(invoke("inspect", store, "--json")[1])


def test_shards_of_one_name_are_refused_and_a_mixed_list_is_taken_whole(
    corpus: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    """One of two was labeled and the other counted as done; listed shards were dropped beside paths."""
    paths = sorted((corpus / "unlabeled").iterdir())
    uri, engine = f"checkpoint:{teacher_dir}", LocalEngine("cpu", 1)
    twins = [Shard("a", str(paths[0])), Shard("a", str(paths[1]))]
    with pytest.raises(ShardListError, match="two shards are named 'a'"):
        annotate(twins, uri, tmp_path / "store", engine=engine)
    for name in ("../a", "", ".a"):
        with pytest.raises(ShardListError, match="can't be a shard's name"):
            annotate([Shard(name, str(paths[0]))], uri, tmp_path / "store", engine=engine)
    assert not (tmp_path / "store").exists()
    mixed = [Shard("unlabeled-0", str(paths[0])), paths[1], Shard("unlabeled-0", str(paths[0]))]
    assert annotate(mixed, uri, tmp_path / "store", engine=engine).parts_written == 2


@pytest.mark.parametrize(
    ("changed", "kind", "said"),
    [
        ({"shards": []}, ShardListError, "no shards given"),
        ({"teacher": ["checkpoint:x"]}, SpecError, "a teacher is wanted, .* not list"),
        ({"max_reject_fraction": float("nan")}, SpecError, "it is a share, from 0 to 1"),
        ({"max_reject_fraction": 5}, SpecError, "it is a share, from 0 to 1"),
        ({"out": ""}, StorageError, "an empty text is no path; is a variable unset"),
    ],
)
def test_arguments_that_make_no_sense(
    changed: dict[str, Any], kind: type[Exception], said: str, corpus: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    given = {"shards": corpus / "unlabeled", "teacher": f"checkpoint:{teacher_dir}", "out": tmp_path / "store"}
    with pytest.raises(kind, match=said):
        annotate(**{**given, **changed})
    assert not (tmp_path / "store").exists()


def test_the_commonest_reason_of_rejects_is_said(make_shard: MakeShard, teacher_dir: Path, tmp_path: Path) -> None:
    """A teacher that gives NaN was blamed on the shards."""
    make_shard("a", [(f"{index}", {"png": b"" if index < 3 else image_bytes(index)}) for index in range(4)])
    with pytest.raises(TooManyRejects, match=r"a.tar: 3 of 4, most of them: .*empty"):
        _annotate(tmp_path / "shards", tmp_path / "store", teacher_dir)


def test_classes_in_another_order_are_told_before_the_work(corpus: Path, teacher_dir: Path, tmp_path: Path) -> None:
    (corpus / "classes.txt").write_text("class 1\nclass 0\nclass 2\nclass 3\n")
    said = (
        r"class 0 is 'class 0' to the teacher, 'class 1' in the list of the corpus: train will refuse .* in any order"
    )
    with pytest.warns(UserWarning, match=said):
        _annotate(corpus / "unlabeled", tmp_path / "store", teacher_dir)


def test_verify_and_summary_take_paths(corpus: Path, teacher_dir: Path, tmp_path: Path) -> None:
    _annotate(corpus / "unlabeled", tmp_path / "store", teacher_dir)
    assert verify(tmp_path / "store", corpus / "unlabeled").ok
    assert summarize_store(str(tmp_path / "store")).parts == 3
