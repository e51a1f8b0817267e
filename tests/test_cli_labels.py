"""Commands on shards, labels and stores: whatever is wrong with them is an error that names it."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import FEW, SMALL, Invoke, Refuse, annotated, distill, truncate
from conftest import digit_like, make_model

from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import read_samples

# --- shards, labels, and what is asked of them


@pytest.mark.parametrize(
    ("shards", "said"),
    [
        ("{corpus}/unlabeled/none-*.tar", "no such shard, and nothing matches it as a glob"),
        ("{corpus}/nowhere", "no such shard"),
        ("{corpus}", r"no \*.tar in this directory"),
        ("{corpus}/unlabeled/unlabeled-{{0..4}}.tar", "2 of 5 shards are missing, the first is .*unlabeled-3.tar"),
        ("@{corpus}/list.txt", "can't read this list of shards"),
    ],
)
def test_shards_that_are_not_there(corpus: Path, teacher_dir: Path, refuse: Refuse, shards: str, said: str) -> None:
    where = shards.format(corpus=corpus)
    out = corpus / "store"
    refuse("annotate", where, "--teacher", f"checkpoint:{teacher_dir}", "--out", out, kind="ShardListError", said=said)
    refuse("evaluate", teacher_dir, where, kind="ShardListError", said=said)
    assert not out.exists()


def test_a_labeled_sample_without_label_is_named(tmp_path: Path, corpus: Path, refuse: Refuse) -> None:
    said = r"unlabeled-0.tar: sample 'unlabeled/0-000' has no label \(no `cls` file\)"
    refuse("train", "--out", tmp_path / "r", "--labeled", corpus / "unlabeled", *FEW, kind="LabelError", said=said)
    labeled = ("--labeled", corpus / "labeled")
    refuse(
        "train", "--out", tmp_path / "r", *labeled, "--val", corpus / "unlabeled", *FEW, kind="LabelError", said=said
    )
    refuse("evaluate", make_model(tmp_path / "m"), corpus / "unlabeled", kind="LabelError", said=said)


def test_a_label_out_of_range_is_named(tmp_path: Path, corpus: Path, refuse: Refuse) -> None:
    said = "sample 'labeled/0-003': its label is 3, but there are 3 classes"
    train = ("train", "--out", tmp_path / "run", "--labeled", corpus / "labeled", *FEW)
    refuse(*train, "--num-classes", 3, kind="LabelError", said=said)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    refuse(*train, "--classes", tmp_path / "classes.txt", kind="LabelError", said=said)
    val = "sample 'val/0-003': its label is 3, but there are 3 classes"
    refuse("evaluate", make_model(tmp_path / "m", classes=3), corpus / "val", kind="LabelError", said=val)


@pytest.mark.parametrize("label", [b"cat", b"-1", b"1.0", b"", b"\xff"], ids=repr)
def test_a_label_that_is_no_number_is_named(
    tmp_path: Path, make_shard: Callable[..., Path], refuse: Refuse, label: bytes
) -> None:
    shard = make_shard("a", [("first", {"png": digit_like(0, 0), "cls": label})])
    said = "a.tar: sample 'first': its label is .*; a class number from 0 is wanted"
    refuse("train", "--out", tmp_path / "run", "--labeled", shard, *FEW, kind="LabelError", said=said)


def test_teacher_and_labels_of_different_classes_are_refused(
    tmp_path: Path, corpus: Path, make_shard: Callable[..., Path], refuse: Refuse
) -> None:
    """Five classes in the store, labels up to 9: a student of five outputs can't learn them."""
    store = annotated(corpus / "unlabeled", make_model(tmp_path / "five", classes=5), tmp_path / "store")
    ten = make_shard("ten", [(f"{label}", {"png": digit_like(0, 0), "cls": b"%d" % label}) for label in range(10)])
    data = ("--labeled", ten, "--unlabeled", corpus / "unlabeled", "--labels", store)
    train = ("train", "--out", tmp_path / "run", *data, *FEW)
    refuse(*train, kind="LabelError", said="sample '5': its label is 5, but there are 5 classes")
    refuse(*train, "--num-classes", 10, kind="StoreMismatch", said="its teacher has 5 classes, 10 are asked for")
    model = make_model(tmp_path / "four")
    evaluate = ("evaluate", model, corpus / "val", "--labels", store)
    refuse(*evaluate, kind="StoreMismatch", said="its labels have 5 classes, the model has 4")


def test_data_that_can_not_be_trained_on(tmp_path: Path, corpus: Path, store: Path, refuse: Refuse) -> None:
    train = ("train", "--out", tmp_path / "run", *FEW)
    labeled, unlabeled = ("--labeled", corpus / "labeled"), ("--unlabeled", corpus / "unlabeled")
    refuse(*train, kind="LabelError", said="nothing to train on: give --labeled")
    refuse(*train, *unlabeled, kind="LabelError", said="annotate them and pass the store as --labels")
    refuse(*train, *labeled, "--labels", store, kind="LabelError", said="pass them as --unlabeled")
    both = ("--labeled", corpus / "unlabeled", *unlabeled, "--labels", store)
    refuse(*train, *both, kind="LabelError", said="given both|has no label")
    refuse(*train, *labeled, *unlabeled, "--labels", tmp_path / "no", kind="StoreError", said="no store here")
    refuse(*train, *labeled, "--classes", tmp_path / "no.txt", kind="RecipeError", said="can't read class names")
    assert not (tmp_path / "run").exists()


# --- stores


def test_a_store_goes_on_with_its_own_teacher_and_settings_only(
    tmp_path: Path, corpus: Path, store: Path, teacher_dir: Path, refuse: Refuse, answer: Callable[..., dict[str, Any]]
) -> None:
    """Another teacher, encoding or precision is refused, and what differs is named."""
    more = corpus / "val"
    go_on = ("annotate", more, "--out", store, "--workers", 1)
    own, other = (f"checkpoint:{path}" for path in (teacher_dir, make_model(tmp_path / "other", seed=1)))
    before = {path: path.read_bytes() for path in store.rglob("*.*")}
    said = "teacher.weights_sha256: the store has .*, this run "
    refuse(*go_on, "--teacher", other, kind="StoreMismatch", said=said)
    refuse(*go_on, "--teacher", own, "--teacher", other, kind="StoreMismatch", said="teacher.*the store has")
    said = 'encoding: the store has "dense", this run "topk:2"'
    refuse(*go_on, "--teacher", own, "--encoding", "topk:2", kind="StoreMismatch", said=said)
    said = 'precision: the store has "fp32", this run "bf16"'
    refuse(*go_on, "--teacher", own, "--precision", "bf16", kind="StoreMismatch", said=said)
    assert {path: path.read_bytes() for path in store.rglob("*.*")} == before
    found = answer(*go_on, "--teacher", own)
    assert (found["parts_written"], found["samples"]) == (1, 24)
    found = answer("annotate", corpus / "unlabeled", more, "--out", store, "--workers", 1, "--teacher", own)
    assert (found["parts_written"], found["parts_skipped"], found["samples"]) == (0, 4, 96)


@pytest.mark.parametrize(
    ("option", "value", "kind", "said"),
    [
        ("--encoding", "topk:0", "SpecError", "'topk:0' is not an encoding; write dense, dense8, topk:K"),
        ("--encoding", "topk:99", "SpecError", "topk:99: the teacher has only 4 classes"),
        ("--encoding", "sparse", "SpecError", "'sparse' is not an encoding"),
        ("--precision", "fp8", "RecipeError", "precision: must be 'auto', 'fp32', 'bf16' or 'fp16'"),
        ("--slice", "4/4", "ShardListError", "--slice '4/4': write i/n with i from 0 to n-1"),
        ("--slice", "1", "ShardListError", "--slice '1': write i/n"),
        ("--slice", "3/4", "ShardListError", "--slice 3/4: empty, there are only 3 shards"),
        ("--device", "tpu", "SpecError", "--device tpu: not usable here"),
        ("--engine", "dask", "SpecError", "--engine dask: write local or ray"),
        ("--address", "auto", "SpecError", "--address auto: is of a Ray cluster; add --engine ray"),
    ],
)
def test_annotate_refuses_nonsense_before_it_makes_a_store(
    tmp_path: Path, corpus: Path, teacher_dir: Path, refuse: Refuse, option: str, value: str, kind: str, said: str
) -> None:
    out = tmp_path / "store"
    command = ("annotate", corpus / "unlabeled", "--teacher", f"checkpoint:{teacher_dir}", "--out", out)
    refuse(*command, option, value, kind=kind, said=said)
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_a_clear_error(
    tmp_path: Path, corpus: Path, teacher_dir: Path, refuse: Refuse
) -> None:
    said = "--device cuda: not usable here: .*; write auto, cpu, cuda"
    store, run = tmp_path / "store", tmp_path / "run"
    annotating = ("annotate", corpus / "unlabeled", "--teacher", f"checkpoint:{teacher_dir}", "--out", store)
    refuse(*annotating, "--device", "cuda", kind="SpecError", said=said)
    training = ("train", "--out", run, "--labeled", corpus / "labeled", *SMALL)
    refuse(*training, "--device", "cuda", kind="SpecError", said=said)
    refuse("evaluate", teacher_dir, corpus / "val", "--device", "cuda", kind="SpecError", said=said)
    assert not store.exists()
    assert not run.exists()


def test_too_many_rejects_name_the_worst_shard(
    tmp_path: Path, make_shard: Callable[..., Path], teacher_dir: Path, refuse: Refuse
) -> None:
    make_shard("good", [("a", {"png": digit_like(0, 0)}), ("b", {"png": digit_like(1, 0)})])
    bad = make_shard("bad", [("a", {"png": b"no image"}), ("b", {"png": digit_like(1, 0)})])
    command = ("annotate", bad.parent, "--teacher", f"checkpoint:{teacher_dir}", "--out", tmp_path / "store")
    said = r"1 of 4 samples were rejected.*\nthe worst shard is .*bad.tar: 1 of 2"
    refuse(*command, "--workers", 1, kind="TooManyRejects", said=said)


def test_an_unlabeled_shard_without_soft_labels_is_refused(
    tmp_path: Path, corpus: Path, store: Path, refuse: Refuse
) -> None:
    (store / "parts" / "unlabeled-1.parquet").unlink()
    said = r"unlabeled-1.tar: not annotated in .*; run `pseudolabel annotate`"
    refuse(*distill(corpus, store, tmp_path / "run"), kind="StoreMismatch", said=said)


def test_a_shard_of_which_one_pixel_changed_is_refused(
    tmp_path: Path, make_shard: Callable[..., Path], teacher_dir: Path, refuse: Refuse, invoke: Invoke
) -> None:
    """Same size, same keys, a valid image: only the content tells that the labels are of another one."""
    pixels = [bytes([40 * index + 10]) * 144 for index in range(4)]
    samples = [(f"{index}", {"pgm": b"P5 12 12 255\n" + one}) for index, one in enumerate(pixels)]
    shard = make_shard("one", samples)
    store = annotated(shard, teacher_dir, tmp_path / "store")
    size = shard.stat().st_size
    samples[2][1]["pgm"] = samples[2][1]["pgm"][:-1] + b"\0"
    make_shard("one", samples)
    assert shard.stat().st_size == size
    assert [sample.key for sample in read_samples(list_shards(shard)[0])] == ["0", "1", "2", "3"]
    train = ("train", "--out", tmp_path / "run", "--unlabeled", shard, "--labels", store, *FEW, "--steps", 2)
    refuse(
        *train, kind="StoreMismatch", said="one.tar: its content is not what was annotated .*\nput the old shard back"
    )
    code, out, _ = invoke("verify", store, "--shards", shard, "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)
    assert json.loads(out)["problems"][0]["kind"] == "StoreMismatch"


def test_two_shards_renamed_to_each_other_are_refused(
    tmp_path: Path, corpus: Path, store: Path, refuse: Refuse, invoke: Invoke
) -> None:
    first, second, aside = (corpus / "unlabeled" / name for name in ("unlabeled-0.tar", "unlabeled-1.tar", "aside"))
    for old, new in ((first, aside), (second, first), (aside, second)):
        old.rename(new)
    said = "unlabeled-0.tar: its content is not what was annotated"
    refuse(*distill(corpus, store, tmp_path / "run"), kind="StoreMismatch", said=said)
    code, out, err = invoke("verify", store, "--shards", corpus / "unlabeled", "--json")
    assert code == 1
    assert [one["part"] for one in json.loads(out)["problems"]] == ["unlabeled-0", "unlabeled-1"]
    assert "unlabeled-0.tar" in err


def test_two_parts_renamed_to_each_other_are_refused(tmp_path: Path, corpus: Path, store: Path, refuse: Refuse) -> None:
    parts = store / "parts"
    for old, new in (("unlabeled-0", "x"), ("unlabeled-1", "unlabeled-0"), ("x", "unlabeled-1")):
        (parts / f"{old}.parquet").rename(parts / f"{new}.parquet")
    said = "holds the labels of shard 'unlabeled-1', not 'unlabeled-0'"
    refuse(*distill(corpus, store, tmp_path / "run"), kind="StoreMismatch", said=said)
    refuse("inspect", store, kind="StoreMismatch", said=said)


def _flip(content: bytes) -> bytes:
    """One bit that changes soft labels; Parquet's own reader takes the file without a complaint."""
    whole = pq.read_table(io.BytesIO(content))
    for place in range(len(content)):
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        try:
            found = pq.read_table(io.BytesIO(flipped))
        except (pa.ArrowException, OSError):
            continue
        if found.schema == whole.schema and found.num_rows == whole.num_rows and found["logits"] != whole["logits"]:
            return flipped
    raise AssertionError("no such bit")


@pytest.mark.parametrize("damage", [truncate, _flip])
def test_a_damaged_part_is_refused_by_train_and_reported_by_verify(
    tmp_path: Path, corpus: Path, store: Path, refuse: Refuse, invoke: Invoke, damage: Callable[[bytes], bytes]
) -> None:
    part = store / "parts" / "unlabeled-1.parquet"
    part.write_bytes(damage(part.read_bytes()))
    said = r"unlabeled-1.parquet: this file of the store is damaged: .*\ndelete it and run the same annotate again"
    refuse(*distill(corpus, store, tmp_path / "run", steps=20), kind="DamagedPart", said=said)
    code, out, err = invoke("verify", store, "--json")
    result = json.loads(out)
    assert (code, result["ok"], result["parts"], result["rows"]) == (1, False, 3, 48)
    assert [(one["part"], one["kind"]) for one in result["problems"]] == [("unlabeled-1", "DamagedPart")]
    assert "unlabeled-1.parquet" in err
    code, out, _ = invoke("verify", store)
    assert code == 1
    assert re.search(r"^ok +False$", out, re.MULTILINE)
    if damage is truncate:  # inspect reads footers alone
        refuse("inspect", store, kind="DamagedPart", said=said)
    part.unlink()
    code, _, _ = invoke("verify", store)
    assert code == 0, "a shard without a part is unfinished, not damaged"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "can't be read"),
        (b"{}", "can't be read"),
        (b'{"format_version": 2}', "format version 2, this version reads 1"),
        (None, "was edited, its fingerprint no longer fits"),
    ],
)
def test_a_damaged_store_is_refused(store: Path, refuse: Refuse, content: bytes | None, said: str) -> None:
    path = store / "store.json"
    path.write_bytes(path.read_bytes().replace(b'"class 0"', b'"class O"') if content is None else content)
    refuse("inspect", store, kind="StoreError", said=said)
    refuse("verify", store, kind="StoreError", said=said)
