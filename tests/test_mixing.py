"""Mixed images and their losses, and a step in parts, profiled or compiled."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file
from test_sparse_losses import logits
from torch import Tensor
from torch._inductor import config as inductor

from pseudolabel.annotate import annotate
from pseudolabel.checkpoint import ModelCard
from pseudolabel.dataset import Batch
from pseudolabel.engines.local import LocalEngine
from pseudolabel.labels.encodings import Dense, TopK
from pseudolabel.labels.targets import StoredTargets
from pseudolabel.losses import NO_LABEL, Mixture
from pseudolabel.losses.full import FullTargets
from pseudolabel.settings import TrainSettings
from pseudolabel.train import train
from pseudolabel.training.distributed import Team
from pseudolabel.training.inputs import TrainingData
from pseudolabel.training.learner import Learner
from pseudolabel.training.mixing import Mix, draw_mix, partners
from pseudolabel.training.step_times import STEP_STAGES, StepTimes, advice, summary
from pseudolabel.views.image import square

CPU = torch.device("cpu")
SMALL = TrainSettings(student="small:resnet8?width=8", image_size=12, channels=1, steps=6, batch_size=16, eval_every=3)


def _batch(soft: int = 8, labeled: int = 4, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (soft + labeled, 1, 12, 12), dtype=torch.uint8, generator=generator)
    labels = torch.cat([torch.arange(labeled) % 4, torch.full((soft,), NO_LABEL)])
    teacher = 3 * torch.randn(soft, 4, generator=generator)
    columns = Dense().encode(teacher, torch.zeros(soft)) | {"pred": teacher.argmax(-1)}
    return Batch(pixels, labels, StoredTargets(Dense(), columns), torch.rand(soft, generator=generator), labeled, soft)


def _learner(settings: TrainSettings = SMALL) -> Learner:
    card = ModelCard(settings.student, tuple("abcd"), square(12, 1))
    return Learner(settings, card, TrainingData((), (), None, 4), CPU, Team())


def _loss_and_gradient(learner: Learner, batch: Batch, mix: Mix | None = None) -> tuple[Tensor, list[Tensor]]:
    learner.body.zero_grad()
    loss = learner._loss(batch, mix, StepTimes(CPU, on=False)).total
    loss.backward()
    return loss.detach(), [one.grad.clone() for one in learner.body.parameters() if one.grad is not None]


def test_partners_stay_in_their_part_of_the_batch() -> None:
    assert partners(6, 4).tolist() == [1, 0, 5, 2, 3, 4]
    assert partners(3, 0).tolist() == [2, 0, 1]
    assert partners(3, 3).tolist() == [2, 0, 1]
    assert partners(1, 1).tolist() == [0]


def test_blended_and_pasted_images() -> None:
    pixels, partner = torch.rand(4, 1, 6, 8), torch.tensor([3, 0, 1, 2])
    torch.testing.assert_close(Mix(0.3).images(pixels, partner), 0.3 * pixels + 0.7 * pixels[partner])
    pasted = Mix(0.5, (0.5, 0.25, 0.5, 0.5))
    mixed = pasted.images(pixels, partner)
    assert torch.equal(mixed[..., 3:, 2:6], pixels[partner][..., 3:, 2:6])
    mixed[..., 3:, 2:6] = pixels[..., 3:, 2:6]
    assert torch.equal(mixed, pixels)
    assert pasted.share_of(6, 8) == 1 - 12 / 48


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_draws_follow_the_step_and_the_papers_laws(mixup: float, cutmix: float) -> None:
    settings = SMALL.model_copy(update={"mixup": mixup, "cutmix": cutmix})
    drawn = [draw_mix(settings, step, 0, 0) for step in range(2000)]
    assert drawn[:50] == [draw_mix(settings, step, 0, 0) for step in range(50)]
    assert len({one.share for one in drawn if one is not None}) == 2000
    blended = [one.share for one in drawn if one is not None and one.box is None]
    assert len(blended) / 2000 == pytest.approx(
        {(0.8, 0.0): 1, (0.0, 1.0): 0, (0.8, 1.0): 0.5}[mixup, cutmix], abs=0.05
    )
    if blended:
        variance = 1 / (4 * (2 * mixup + 1))  # of Beta(a, a)
        assert np.mean(blended) == pytest.approx(0.5, abs=0.03)
        assert np.var(blended) == pytest.approx(variance, rel=0.15)
    for one in drawn:
        if one is not None and one.box is not None:
            rows, columns = one.where(12, 12)
            assert 0 <= rows.start <= rows.stop <= 12
            assert 0 <= columns.start <= columns.stop <= 12
            assert one.share_of(120, 120) >= one.share - 0.02  # a box at the border is cut
    assert draw_mix(SMALL, 0, 0, 0) is None


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_mixed_losses_have_the_gradient_of_the_mixed_soft_target(temperature: float) -> None:
    """Mixed at the training temperature, of both partners, weights and all: the probabilities, not the logits."""
    teacher, other = logits(0), logits(1)
    student = logits(2).requires_grad_()
    kl, nobody, ones = Mixture(1.0, temperature), torch.full((6,), NO_LABEL), torch.ones(6).double()
    ours, partners = (kl(student, nobody, FullTargets(one), ones).total for one in (teacher, other))
    loss = 0.3 * ours + 0.7 * partners
    (found,) = torch.autograd.grad(loss, student)
    mixed = 0.3 * torch.softmax(teacher / temperature, -1) + 0.7 * torch.softmax(other / temperature, -1)
    log_q = torch.log_softmax(student / temperature, -1)
    (wanted,) = torch.autograd.grad(temperature**2 * (mixed * (mixed.log() - log_q)).sum() / 6, student)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_a_mixed_step_weighs_both_partners_labels() -> None:
    learner, batch, mix = _learner(), _batch(), Mix(0.3)
    learner.body.eval()  # whose batch norms don't depend on which rows come together
    partner = torch.tensor([3, 0, 1, 2, 11, 4, 5, 6, 7, 8, 9, 10])
    found, gradient = _loss_and_gradient(learner, batch, mix)
    pixels = learner.normalize(batch.pixels_BCHW)
    out = learner.body(0.3 * pixels + 0.7 * pixels[partner])
    assert batch.targets is not None
    assert batch.soft_weight_B is not None
    mixture = Mixture(SMALL.alpha, SMALL.temperature)
    swapped = batch.targets.map(lambda column: column[partner[4:] - 4])
    wanted = (
        0.3 * mixture(out, batch.labels_B, batch.targets, batch.soft_weight_B).total
        + 0.7 * mixture(out, batch.labels_B[partner], swapped, batch.soft_weight_B[partner[4:] - 4]).total
    )
    torch.testing.assert_close(found, wanted)
    assert any(bool(one.abs().sum() > 0) for one in gradient)


def test_sparse_labels_mix_each_over_its_own_classes() -> None:
    teacher = logits(5, rows=8, classes=40)
    columns = TopK(3).encode(teacher.float(), torch.zeros(8)) | {"pred": teacher.argmax(-1)}
    batch = dataclasses.replace(_batch(labeled=0), targets=StoredTargets(TopK(3), columns))
    swapped = batch.partners(partners(8, 8)).targets
    assert swapped is not None
    assert swapped.columns["topk_id"].tolist() == columns["topk_id"].roll(1, 0).tolist()


@pytest.mark.parametrize("parts", [2, 3, 12, 50])
@pytest.mark.parametrize(("soft", "labeled"), [(8, 4), (12, 0), (0, 12)])
def test_a_batch_in_parts_has_its_loss_and_gradient(parts: int, soft: int, labeled: int) -> None:
    """To rounding, for networks without batch norms; here they are frozen."""
    learner, batch = _learner(), _batch(soft, labeled)
    if not soft:
        batch = dataclasses.replace(batch, targets=None, soft_weight_B=None)
    learner.body.eval()
    whole, gradient = _loss_and_gradient(learner, batch)
    losses, total = [], [torch.zeros_like(one) for one in gradient]
    for part in batch.parts(parts):
        loss, pieces = _loss_and_gradient(learner, part)
        losses.append(loss)
        total = [one + piece for one, piece in zip(total, pieces, strict=True)]
    assert len(losses) == min(parts, 12)
    torch.testing.assert_close(torch.stack(losses).sum(), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total, gradient, rtol=1e-3, atol=1e-4)


def test_every_part_of_a_batch_is_trained_on_once() -> None:
    batch = _batch(soft=7, labeled=3)
    found = [tuple(row.flatten().tolist()) for part in batch.parts(3) for row in part.pixels_BCHW]
    assert sorted(found) == sorted(tuple(row.flatten().tolist()) for row in batch.pixels_BCHW)


@pytest.mark.parametrize(
    "update",
    [
        {"mixup": 0.5, "cutmix": 1.0, "accumulate": 2},
        {"label_smoothing": 0.1, "class_weights": "balanced", "logit_adjustment": 1.0},
        {"label_smoothing": 0.1, "class_weights": "1,2,3,4", "label_sampling": "balanced"},
    ],
)
def test_options_train_and_resume_exactly(corpus: Path, tmp_path: Path, update: dict[str, object]) -> None:
    model = make_model(tmp_path / "teacher")
    annotate(corpus / "unlabeled", f"checkpoint:{model}", tmp_path / "store", engine=LocalEngine("cpu", 1))
    settings = SMALL.model_copy(update=update)

    def run(name: str, stop_at: int = 0) -> bytes:
        def stop(progress: object) -> None:
            if progress.step == stop_at:  # type: ignore[attr-defined]
                raise KeyboardInterrupt

        train(
            settings,
            tmp_path / name,
            labeled=corpus / "labeled",
            unlabeled=corpus / "unlabeled",
            store=tmp_path / "store",
            threads=1,
            on_progress=stop,
        )
        return (tmp_path / name / "model.safetensors").read_bytes()

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop_at=6)
    assert run("stopped") == whole
    settings = SMALL
    assert run("plain") != whole


def test_a_profile_says_where_a_step_goes(corpus: Path, tmp_path: Path) -> None:
    result = train(SMALL, tmp_path / "run", labeled=corpus / "labeled", val=corpus / "val", threads=1, profile=True)
    assert result.profile is not None
    assert set(result.profile) == set(STEP_STAGES)
    assert all(value > 0 for value in result.profile.values())
    assert advice(result.profile).startswith("bound by ")
    whole = sum(result.profile.values())
    assert summary(result.profile).startswith(
        f"a step takes {whole:.2f} ms: load {result.profile['load'] / whole:.0%}, "
    )
    assert sum(result.profile.values()) * result.steps / 1000 == pytest.approx(result.seconds, rel=0.5)


def test_a_compiled_student_learns_the_same(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To rounding: fused kernels add up in another order. Its few channels, made channels-last by the compiler, once
    ended the process (see layout.py).
    """
    (tmp_path / "conv_student.py").write_text(
        "from torch import nn\n\ndef make(num_classes, in_channels):\n"
        "    convolutions = nn.Conv2d(in_channels, 4, 3, padding=1), nn.Conv2d(4, 8, 1, stride=2)\n"
        "    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(8 * 36, num_classes))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {}
    for compiled in (False, True):
        update = {"student": "python:conv_student:make", "compile": compiled, "steps": 3, "ema": 0.0}
        with inductor.patch(compile_threads=1):  # a pool takes longer to start than the rest
            train(SMALL.model_copy(update=update), tmp_path / f"{compiled}", labeled=corpus / "labeled", threads=1)
        found[compiled] = load_file(tmp_path / f"{compiled}" / "model.safetensors")
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-5)
