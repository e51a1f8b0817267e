"""Inside a worker: decoding in processes, batches that don't fit, compiled teachers, members, where the time goes."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import image_bytes, make_model
from PIL import Image

from pseudolabel.annotate import annotate
from pseudolabel.checkpoint import ModelCard, save_model
from pseudolabel.classifier import Classifier
from pseudolabel.decode_processes import decode_in_processes
from pseudolabel.decoding import DecodedBatch, Decoding, decode_shard, decode_shards
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import DamagedShard, OutOfMemory, SpecError, StorageError, StoreMismatch
from pseudolabel.labeling.work import annotate_shard, identify, settle
from pseudolabel.labels.store import open_store
from pseudolabel.labels.verify import verify
from pseudolabel.replay import replay
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import Shard, list_shards
from pseudolabel.shards import write_shard
from pseudolabel.stages import Stages, bottleneck
from pseudolabel.teachers import parse_teacher, parse_teachers
from pseudolabel.views.image import PrepareFor, Preprocessing, decode, square


def test_decoding_processes_give_what_decoding_in_turns_gives(corpus: Path, tmp_path: Path) -> None:
    """The path of a GPU, on the CPU: order, rejects, damage and hashes are the same."""
    spoiled = [("good", {"png": image_bytes()}), ("bad", {"png": b"no image"})]
    write_shard(corpus / "unlabeled" / "spoiled.tar", spoiled)
    (corpus / "unlabeled" / "torn.tar").write_bytes((corpus / "unlabeled" / "spoiled.tar").read_bytes()[:700])
    shards = [*list_shards(corpus / "unlabeled"), Shard("gone", str(tmp_path / "gone.tar"))]
    decoding = Decoding(5, PrepareFor((square(12, 1),)))
    ours = list(decode_shards(iter(shards), decoding))
    theirs = list(decode_in_processes(iter(shards), decoding, 2, pin=False))
    assert len(ours) == len(theirs) == 3 * 6 + 2 + 2
    for (shard, one), (other_shard, other) in zip(ours, theirs, strict=True):
        assert (shard, type(one)) == (other_shard, type(other))
        if isinstance(one, (DamagedShard, StorageError)):
            assert str(one) == str(other)
        elif isinstance(one, DecodedBatch) and isinstance(other, DecodedBatch):
            assert (one.keys, one.index, one.rejects) == (other.keys, other.index, other.rejects)
            assert all(torch.equal(a, b) for a, b in zip(one.inputs, other.inputs, strict=True))
        else:
            assert one == other


def test_a_shard_that_changes_while_it_is_read_is_damaged(corpus: Path) -> None:
    """Replaced in between, its samples would be of both files and its hash of one."""
    (shard, *_) = list_shards(corpus / "unlabeled")
    batches = decode_shard(shard, Decoding(5, PrepareFor((square(12, 1),))))
    next(batches)
    path = Path(shard.path)
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)
    with pytest.raises(DamagedShard, match="was changed or replaced while it was read"):
        list(batches)


def test_a_batch_that_does_not_fit_is_run_in_halves(
    corpus: Path, teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the device held three rows: the labels are the same, and the larger batch is tried but once."""
    teacher = parse_teacher(f"checkpoint:{teacher_dir}").load(torch.device("cpu"))
    (shard, *_) = list_shards(corpus / "unlabeled")
    settings = AnnotateSettings(batch_size=12, precision="fp32")
    wanted = annotate_shard(shard, teacher, settings).part
    tried = []

    def small(self: Classifier, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        tried.append(len(inputs[0]))
        if len(inputs[0]) > 3:
            raise torch.OutOfMemoryError("no room")
        return whole(self, inputs)

    whole = Classifier.logits
    monkeypatch.setattr(Classifier, "logits", small)
    found = annotate_shard(shard, teacher, settings).part
    assert tried == [12, 6] + [3] * 8
    assert found["key"] == wanted["key"]
    for ours, theirs in zip(found["logits"].to_pylist(), wanted["logits"].to_pylist(), strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3)

    def full(self: Classifier, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Classifier, "logits", full)
    with pytest.raises(OutOfMemory, match="not even one sample fits"):
        annotate_shard(shard, teacher, settings)


def test_a_compiled_teacher_gives_its_logits_and_is_another_teacher(corpus: Path, teacher_dir: Path) -> None:
    """24 samples in batches of 10: the last one is filled up to the compiled shape."""
    teacher = parse_teacher(f"checkpoint:{teacher_dir}").load(torch.device("cpu"))
    (shard, *_) = list_shards(corpus / "unlabeled")
    plain, compiled = (AnnotateSettings(batch_size=10, precision="fp32", compile=flag) for flag in (False, True))
    assert identify(teacher, plain).fingerprint != identify(teacher, compiled).fingerprint
    wanted, found = (annotate_shard(shard, teacher, one).part for one in (plain, compiled))
    assert found["key"] == wanted["key"]
    for ours, theirs in zip(found["logits"].to_pylist(), wanted["logits"].to_pylist(), strict=True):
        assert ours == pytest.approx(theirs, abs=5e-3)


def test_an_ensembles_members_are_kept_beside_their_mean(corpus: Path, teacher_dir: Path, tmp_path: Path) -> None:
    uris = [f"checkpoint:{teacher_dir}@3", f"checkpoint:{make_model(tmp_path / 'second', seed=1)}"]
    shards = corpus / "unlabeled"
    settings = AnnotateSettings(encoding="topk:2", keep_members=True, precision="fp32")
    annotate(shards, parse_teachers(uris), tmp_path / "store", engine=LocalEngine("cpu", 1), settings=settings)
    opened = open_store(tmp_path / "store")
    assert verify(opened, list_shards(shards)).ok
    part = opened.read("unlabeled-0")
    alone = AnnotateSettings(encoding="topk:2", precision="fp32")
    for number, uri in enumerate(uris):
        teacher = parse_teacher(uri.split("@")[0]).load(torch.device("cpu"))
        own = annotate_shard(list_shards(shards)[0], teacher, alone).part
        for name in ("topk_id", "topk_logit"):
            assert part[f"member{number}_{name}"].to_pylist() == own[name].to_pylist()
    with pytest.raises(StoreMismatch, match="members_kept"):
        annotate(shards, parse_teachers(uris), tmp_path / "store", engine=LocalEngine("cpu", 1), settings=alone)
    with pytest.raises(SpecError, match="there is one teacher only"):
        annotate(shards, uris[1], tmp_path / "other", engine=LocalEngine("cpu", 1), settings=settings)


def test_an_automatic_batch_size_is_kept_for_the_store(corpus: Path, teacher_dir: Path, tmp_path: Path) -> None:
    settings = AnnotateSettings(batch_size="auto")
    first = annotate(corpus / "unlabeled", f"checkpoint:{teacher_dir}", tmp_path / "store", settings=settings)
    kept = json.loads((tmp_path / "store" / "annotate.json").read_text())
    assert first.batch_size == kept["batch_size"] >= 8
    assert set(kept["samples_per_second"]) >= {"8", "16"}
    (tmp_path / "store" / "annotate.json").write_text('{"batch_size": 3}')
    (tmp_path / "store" / "parts" / "unlabeled-1.parquet").unlink()
    again = annotate(corpus / "unlabeled", f"checkpoint:{teacher_dir}", tmp_path / "store", settings=settings)
    assert (again.parts_written, again.batch_size) == (1, 3)


@pytest.mark.parametrize("size", [(28, 256), (64, 256), (128, 98), (224, 32), (512, 32)])
def test_the_batch_size_of_a_cpu_follows_from_the_size_of_the_images(size: tuple[int, int], tmp_path: Path) -> None:
    pixels, rows = size
    card = ModelCard("small:resnet8?width=4&stem_stride=2", ("a", "b"), square(pixels, 1))
    save_model(tmp_path / "model", card, card.build())
    teacher = parse_teacher(f"checkpoint:{tmp_path / 'model'}").load(torch.device("cpu"))
    assert settle(AnnotateSettings(), "cpu", teacher).batch_size == rows
    assert settle(AnnotateSettings(precision="fp32"), "cuda:0", teacher).batch_size == 256
    assert settle(AnnotateSettings(batch_size=7), "cpu", teacher).batch_size == 7


def test_stages_add_up_and_name_the_largest() -> None:
    stages = Stages()
    with stages.during("forward"):
        time.sleep(0.02)
    with stages.during("decode"):
        time.sleep(0.005)
    taken = stages.take()
    assert taken["forward"] > taken["decode"] > taken["write"] == 0
    assert stages.take()["forward"] == 0
    assert bottleneck(taken, gpu=False).startswith("bound by forward")
    assert "more cores" in bottleneck({**taken, "decode": 1.0}, gpu=True)
    assert bottleneck(dict.fromkeys(taken, 0.0), gpu=True) == "nothing was done, so nothing was slow"


def _photo(size: tuple[int, int]) -> bytes:
    """A JPEG as cameras make them: soft, with a little noise."""
    dice = np.random.default_rng(0)
    coarse = Image.fromarray(dice.integers(0, 256, (size[1] // 100, size[0] // 100, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) + dice.normal(0, 4, (size[1], size[0], 3))
    buffer = io.BytesIO()
    Image.fromarray(soft.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def test_a_large_jpeg_may_be_decoded_smaller(teacher_dir: Path, tmp_path: Path) -> None:
    """At a quarter, the prepared pixels are within two levels; small images and other formats stay as they are."""
    large, small = _photo((1600, 1200)), _photo((800, 600))
    assert decode(large, 150).shape == (3, 300, 400)
    assert torch.equal(decode(large, 301), decode(large))
    assert torch.equal(decode(small, 151), decode(small))
    prepare = Preprocessing(150, 128, (0.5,) * 3, (0.5,) * 3).prepare
    gap = (prepare(decode(large)).int() - prepare(decode(large, 150)).int()).abs().float()
    assert 0 < gap.mean() < 2
    write_shard(tmp_path / "photos.tar", [("large", {"jpg": large})])
    settings = AnnotateSettings(fast_jpeg=True, views=2, precision="fp32")
    annotate(tmp_path / "photos.tar", f"checkpoint:{teacher_dir}", tmp_path / "store", settings=settings)
    store = open_store(tmp_path / "store")
    assert store.identity.views["shrink_to"] == 12
    teacher = parse_teacher(f"checkpoint:{teacher_dir}").load(torch.device("cpu"))
    for row in store.read("photos").to_pylist():
        with torch.inference_mode():
            logits = teacher.logits((replay(large, row, store.identity)[None],))[0]
        assert (logits - logits.max()).tolist() == pytest.approx(row["logits"], abs=2e-3)
    slow = AnnotateSettings(views=2, precision="fp32")
    with pytest.raises(StoreMismatch, match="shrink_to"):
        annotate(tmp_path / "photos.tar", f"checkpoint:{teacher_dir}", tmp_path / "store", settings=slow)
