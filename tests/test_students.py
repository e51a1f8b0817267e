"""Students of every source: they train, read back as they were, and take their arguments."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_models import CPU, logits_of
from small_students import settings_of, small_hf_dir, train_labeled  # noqa: F401 (a fixture)
from small_teachers import noise

from pseudolabel.checkpoint import load_model
from pseudolabel.errors import OutputExists, SpecError
from pseudolabel.students import parse_student
from pseudolabel.training.loop import TrainProgress


@pytest.mark.parametrize(
    ("student", "size", "channels"),
    [
        ("small:resnet8?width=4", 12, 1),
        ("torchvision:squeezenet1_1?dropout=0.1", 32, 3),
        ("timm:test_resnet?drop_rate=0.1", 32, 1),
        ("timm:test_vit?img_size=32", 32, 3),
        ("hf:{hf}?hidden_dropout_prob=0.1", 32, 3),
        ("hf:{hf}?image_size=16", 16, 1),
        ("python:small_models:grouped", 12, 1),
    ],
)
def test_a_student_trains_and_reads_back_as_it_was(
    corpus: Path, tmp_path: Path, hf_dir: Path, student: str, size: int, channels: int
) -> None:
    """Without the directory that its config came from, if it came from one: the model is whole by itself."""
    settings = settings_of(student.format(hf=hf_dir), size, channels)
    result = train_labeled(corpus, tmp_path / "run", settings, val=corpus / "val")
    assert (result.steps, result.notes) == (2, ())
    train_labeled(corpus, tmp_path / "same", settings, val=corpus / "val")
    files = [tmp_path / name / "model.safetensors" for name in ("run", "same")]
    assert files[0].read_bytes() == files[1].read_bytes(), "the seed decides it"
    shutil.rmtree(hf_dir)
    model = load_model(tmp_path / "run", CPU, trust_code=True)
    again = load_model(tmp_path / "run", CPU, trust_code=True)
    images = [noise(seed, size, size, channels) for seed in range(2)]
    logits = logits_of(model, *images)
    assert logits.shape == (2, 4)
    assert logits.std(0).max() > 0
    assert torch.equal(logits, logits_of(again, *images))
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.model[1].state_dict().items())


def test_layers_that_ask_for_their_version_train_resume_and_load(corpus: Path, tmp_path: Path) -> None:
    """MNASNet's: its training failed at the end, and its checkpoints could not be read."""
    settings = settings_of("torchvision:mnasnet0_5", steps=4)

    def stop(progress: TrainProgress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_labeled(corpus, tmp_path / "run", settings, val=corpus / "val", on_progress=stop)
    assert train_labeled(corpus, tmp_path / "run", settings, val=corpus / "val").steps == 4
    assert load_model(tmp_path / "run", CPU).classes == tuple("0123")


def test_arguments_reach_the_architecture(hf_dir: Path) -> None:
    """An argument without effect would be worse than none."""
    bodies = [parse_student(f"hf:{hf_dir}{more}").build(3, 3) for more in ("", "?num_hidden_layers=1")]
    assert len(bodies[0].state_dict()) > len(bodies[1].state_dict())
    assert parse_student("timm:test_vit?img_size=32").build(3, 1).state_dict()["pos_embed"].shape == (1, 5, 64)
    with pytest.raises(SpecError, match=r"its config has no 'image_sise' \(did you mean 'image_size'\?\)"):
        parse_student(f"hf:{hf_dir}?image_sise=16")
    with pytest.raises(SpecError, match="leave num_labels= out"):
        parse_student(f"hf:{hf_dir}?num_labels=16")


def test_a_config_that_says_nothing_of_channels_takes_colours() -> None:
    """CLIP's number of channels lies in the config of its vision tower, out of reach."""
    with pytest.raises(SpecError, match="use --channels 3"):
        parse_student("hf:x", {"model_type": "clip"}).build(3, 1)


def test_a_config_edited_between_two_starts_is_refused(corpus: Path, tmp_path: Path, hf_dir: Path) -> None:
    """Another dropout leaves all shapes alone, so that nothing else would notice."""
    settings = settings_of(f"hf:{hf_dir}")
    train_labeled(corpus, tmp_path / "run", settings)
    config = json.loads((hf_dir / "config.json").read_text()) | {"hidden_dropout_prob": 0.5}
    (hf_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(OutputExists, match=r"differs from this one \(config\)"):
        train_labeled(corpus, tmp_path / "run", settings)


@pytest.mark.parametrize(("student", "package"), [("timm:test_vit", "timm"), ("hf:anything", "transformers")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, student: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SpecError, match=rf"pip install 'pseudolabel\[{student.partition(':')[0]}\]'"):
        parse_student(student)
