"""What only a GPU can show; skipped without one: `python -m pytest tests/test_gpu.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import make_model

from pseudolabel.annotate import annotate
from pseudolabel.engines.local import LocalEngine
from pseudolabel.evaluate import evaluate
from pseudolabel.labels.store import Store, open_store
from pseudolabel.settings import AnnotateSettings, TrainSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.teachers import parse_teacher
from pseudolabel.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _annotate(corpus: Path, out: Path, model: Path, device: str, precision: str = "fp32") -> Store:
    settings = AnnotateSettings(precision=precision, encoding="topk:3")  # type: ignore[arg-type]
    engine = LocalEngine(device, 1)
    annotate(
        list_shards(corpus / "unlabeled"), parse_teacher(f"checkpoint:{model}"), out, engine=engine, settings=settings
    )
    return open_store(out)


def test_the_gpus_labels_are_the_cpus_and_repeat_themselves(corpus: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "teacher")
    on_cpu = _annotate(corpus, tmp_path / "cpu", model, "cpu")
    on_gpu = _annotate(corpus, tmp_path / "gpu", model, "cuda")
    again = _annotate(corpus, tmp_path / "again", model, "cuda")
    assert on_cpu.fingerprint == on_gpu.fingerprint
    for name in on_cpu.part_names():
        assert on_gpu.part_path(name).read_bytes() == again.part_path(name).read_bytes()
        ours, theirs = (one.read(name)["confidence"].to_numpy() for one in (on_cpu, on_gpu))
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_on_a_gpu_learns_and_resumes(corpus: Path, tmp_path: Path, precision: str) -> None:
    store = _annotate(corpus, tmp_path / "store", make_model(tmp_path / "teacher"), "cuda", "bf16")
    settings = TrainSettings(
        student="small:resnet8?width=8",
        image_size=12,
        channels=1,
        steps=60,
        batch_size=16,
        lr=1e-2,
        precision=precision,
    )  # type: ignore[arg-type]
    sets = {
        "labeled": list_shards(corpus / "labeled"),
        "unlabeled": list_shards(corpus / "unlabeled"),
        "val": list_shards(corpus / "val"),
    }

    def stop(progress: object) -> None:
        if progress.step == 30:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, tmp_path / "run", store=store, device="cuda", on_progress=stop, **sets)  # type: ignore[arg-type]
    result = train(settings, tmp_path / "run", store=store, device="cuda", workers=2, **sets)  # type: ignore[arg-type]
    assert result.val_accuracy == pytest.approx(evaluate(tmp_path / "run", sets["val"], device="cuda").accuracy)
