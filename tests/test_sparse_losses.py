"""The loss over labels that leave classes out: closed forms in float64, gradients, and what it tends to.

With p the teacher's distribution and q the student's, both at temperature T, S the stored classes, p(S̄) and q(S̄) the
mass of the others:

    bucket    T²·(Σ_{S} p log(p/q) + p(S̄) log(p(S̄)/q(S̄)))
    uniform   T²·(Σ_{S} p log(p/q) + Σ_{S̄} u log(u/q)), u = p(S̄)/n
    sampled   Σ_k (c_k/N) log((c_k/N)/q_k), which on average has the gradient of the full loss
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import make_model
from torch import Tensor

from pseudolabel.annotate import annotate
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import SpecError
from pseudolabel.interfaces import Encoding
from pseudolabel.labels.encodings import Dense, Dense8, TopK, parse_encoding
from pseudolabel.labels.facts import divergence, summarize
from pseudolabel.labels.sampled import Sampled
from pseudolabel.labels.targets import StoredTargets
from pseudolabel.losses import Mixture, kd
from pseudolabel.settings import AnnotateSettings, AugmentSettings, TrainSettings
from pseudolabel.train import train
from pseudolabel.uniforms import uniforms
from pseudolabel.views.draw import row_seeds

CLASSES, KEPT = 40, 5
SHORT = TrainSettings(student="small:resnet8?width=4", image_size=12, channels=1, steps=12, batch_size=16, eval_every=4)


def logits(seed: int, rows: int = 6, classes: int = CLASSES) -> Tensor:
    """Logits that float16 holds exactly, the maximum 0, the tail a smooth bell: closed forms need no tolerance for
    storing.
    """
    generator = torch.Generator().manual_seed(seed)
    made = (3 * 64 * torch.randn(rows, classes, generator=generator)).round().double() / 64
    return made - made.amax(-1, keepdim=True)


def targets(encoding: Encoding, teacher: Tensor, tail: str = "bucket", seed: int = 0) -> StoredTargets:
    columns = encoding.encode(teacher.float(), seed + torch.arange(len(teacher)))
    wide = {name: column.double() if column.is_floating_point() else column for name, column in columns.items()}
    return StoredTargets(encoding, {"pred": summarize(teacher)["pred"], **wide}, tail)


def parts(teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The stored classes' ids, their probabilities by FORMAT.md, and the tail's."""
    kept, ids = teacher.topk(KEPT, dim=-1)
    in_tail = torch.ones_like(teacher, dtype=torch.bool).scatter(-1, ids, False)
    tail = teacher[in_tail].view(len(teacher), -1)
    if temperature == 1.0:
        mass = tail.exp().sum(-1)
    else:
        mean, var = tail.mean(-1), tail.var(-1, correction=0)
        mass = tail.shape[-1] * torch.exp(mean / temperature + var / (2 * temperature**2))
        mass = mass.minimum(tail.shape[-1] * (kept[:, -1] / temperature).exp())
    total = (kept / temperature).exp().sum(-1) + mass
    return ids, (kept / temperature).exp() / total[:, None], mass / total


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_both_tails_are_their_closed_form(tail: str, temperature: float) -> None:
    teacher, student = logits(0), logits(1)
    ids, p_kept, p_tail = parts(teacher, temperature)
    q = torch.softmax(student / temperature, -1)
    wanted = (p_kept * (p_kept / q.gather(-1, ids)).log()).sum(-1)
    rest = q.scatter(-1, ids, 0.0)
    if tail == "bucket":
        wanted = wanted + p_tail * (p_tail / rest.sum(-1)).log()
    else:
        each = p_tail[:, None] / (CLASSES - KEPT)
        in_tail = torch.ones_like(q).scatter(-1, ids, 0.0)
        wanted = wanted + (in_tail * each * (each / q).log()).sum(-1)
    found = kd(student, targets(TopK(KEPT), teacher, tail), temperature)
    torch.testing.assert_close(found, temperature**2 * wanted, rtol=1e-5, atol=1e-6)  # lse and moments are float32


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_more_classes_bring_the_dense_loss_nearer(tail: str, temperature: float) -> None:
    teacher, student = logits(2, rows=200), logits(3, rows=200)
    dense = kd(student, targets(Dense(), teacher), temperature)
    gaps = [
        round(float((kd(student, targets(TopK(kept), teacher, tail), temperature) - dense).abs().mean()), 9)
        for kept in (1, 10, 30, CLASSES - 1, CLASSES)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.05
    assert gaps[-2] < 1e-4
    assert gaps[-1] < 1e-5


@pytest.mark.parametrize("spec", ["dense", "dense8", "topk:5", f"topk:{CLASSES}", "sampled:7", "sampled:2000"])
@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_gradients_check_out_numerically(spec: str, tail: str) -> None:
    """Draws of all classes leave nothing beside them: the gradient of that nothing was NaN."""
    stored = targets(parse_encoding(spec), logits(4, rows=3) / 8, tail)
    student = logits(5, rows=3).requires_grad_()
    temperature = 1.0 if spec.startswith("sampled") else 2.0
    assert torch.autograd.gradcheck(lambda s: kd(s, stored, temperature), (student,))


@pytest.mark.parametrize("spec", ["dense", "dense8", "topk:5", "sampled:20"])
def test_finite_at_logits_of_a_thousand(spec: str) -> None:
    teacher = 1000 * torch.sign(logits(6) + 3)
    student = (1000 * torch.sign(logits(7) + 3)).float().requires_grad_()
    loss = kd(student, targets(parse_encoding(spec), teacher), 1.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_are_unbiased(temperature: float) -> None:
    """Over 4,000 seeds the mean share of every class lies within 4.5 standard errors of its probability, and the chi²
    of all of them is what chance gives.
    """
    count, repetitions = 25, 4000
    teacher = logits(8, rows=1, classes=12)
    p = torch.softmax(teacher / temperature, -1)[0]
    rows = teacher.float().expand(repetitions, -1)
    encoding = Sampled(count, temperature)
    columns = encoding.encode(
        rows, torch.tensor(row_seeds([f"key {n}" for n in range(repetitions)], [0] * repetitions))
    )
    shares = encoding.full_log_probs(columns, temperature, 12).exp().double()
    torch.testing.assert_close(shares.sum(-1), torch.ones(repetitions, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    errors = (shares.mean(0) - p) / (p * (1 - p) / (count * repetitions)).sqrt()
    assert float(errors.abs().max()) < 4.5
    draws = count * repetitions
    chi2 = float(((shares.mean(0) - p).square() / p).sum() * draws)
    assert 1.0 < chi2 < 35.0  # 11 degrees of freedom: 0.1 % beyond 31, 0.01 % below 1
    usual = p > 0.01  # of rare classes it takes more draws to see how they scatter
    torch.testing.assert_close(shares.var(0)[usual], (p * (1 - p) / count)[usual], rtol=0.15, atol=0)


def test_the_mean_gradient_is_that_of_the_full_label() -> None:
    """What matters for training. A truncated and renormalised label has another one, however many rows there are."""
    rows = 6000
    teacher, student = logits(9, rows=1).expand(rows, -1), logits(10, rows=1)
    full = torch.softmax(student, -1) - torch.softmax(teacher[:1], -1)
    found = []
    for stored in (targets(Sampled(20), teacher), targets(TopK(3), teacher, "uniform")):
        leaf = student.clone().requires_grad_()
        kd(leaf.expand(rows, -1), stored, 1.0).mean().backward()
        assert leaf.grad is not None
        found.append(float((leaf.grad - full).norm()))
    noise = math.sqrt(1 / (20 * rows))
    assert found[0] < 3 * noise < found[1]


def test_rows_draw_on_their_own() -> None:
    """By key and view, whatever batch they are in; equal rows of other keys draw otherwise."""
    teacher = logits(11, rows=1).expand(4, -1)
    seeds = torch.tensor(row_seeds(["a", "a", "b", "c"], [0, 1, 0, 0]))
    whole = Sampled(30).encode(teacher.float(), seeds)
    assert len({tuple(row) for row in whole["sample_id"].tolist()}) > 1
    for row in range(4):
        alone = Sampled(30).encode(teacher[row : row + 1].float(), seeds[row : row + 1])
        assert all(torch.equal(alone[name][0], whole[name][row]) for name in whole)


def test_row_seeds_and_uniforms_are_these_forever() -> None:
    """Stores are redone shard by shard over years: the same key must draw the same classes."""
    assert row_seeds(["a/b", "ü"], [0, 3]) == SEEDS
    found = uniforms(torch.tensor(SEEDS), 3)
    assert found.tolist() == [[_splitmix(seed, n) for n in (1, 2, 3)] for seed in SEEDS]
    assert bool(((found >= 0) & (found < 1)).all())


def test_uniforms_are_uniform() -> None:
    found = uniforms(torch.arange(2000), 50).flatten()
    counts = torch.histc(found, 100, 0, 1)
    assert 60 < float(((counts - 1000).square() / 1000).sum()) < 150  # chi² of 99 degrees of freedom
    assert abs(float(torch.corrcoef(found.view(2000, 50).T)[0, 1])) < 0.08


def test_a_class_without_probability_is_never_drawn() -> None:
    teacher = torch.tensor([[-1e5, 0.0, -1e5, 0.0, -1e5]]).expand(500, -1)
    drawn = Sampled(50).encode(teacher, torch.arange(500))["sample_id"]
    assert set(drawn.flatten().tolist()) <= {-1, 1, 3}


def test_what_sampling_loses_is_measured_the_other_way_round() -> None:
    """KL(full ‖ stored) is infinite; KL(stored ‖ full) is about (classes drawn − 1) / 2N."""
    teacher = logits(12, rows=500)
    encoding = Sampled(200)
    columns = encoding.encode(teacher.float(), torch.arange(500))
    lost = divergence(encoding, columns, teacher.float())
    assert lost.shape == (1, 500)
    classes = (columns["sample_id"] >= 0).sum(-1).double().mean()
    assert 0.5 < float(lost.mean()) / float((classes - 1) / 400) < 2.5


def test_another_temperature_than_the_draws_is_refused() -> None:
    stored = targets(Sampled(10, 2.0), logits(13))
    with pytest.raises(SpecError, match=r"drawn at temperature 2 .*\n.*--temperature 2, or annotate .* sampled:10@4"):
        Mixture(1.0, 4.0)(logits(14), torch.full((6,), -1), stored, torch.ones(6))
    assert torch.isfinite(Mixture(1.0, 2.0)(logits(14), torch.full((6,), -1), stored, torch.ones(6)).total)


def test_dense8_gives_nearly_the_dense_loss() -> None:
    teacher, student = logits(15, rows=100), logits(16, rows=100)
    for temperature in (1.0, 2.0, 4.0):
        dense, eight = (kd(student, targets(one, teacher), temperature).mean() for one in (Dense(), Dense8()))
        assert float(eight) == pytest.approx(float(dense), rel=2e-3)


@pytest.mark.parametrize(
    ("encoding", "tail"), [("dense8", "bucket"), ("sampled:30@2", "bucket"), ("topk:2", "uniform")]
)
def test_a_student_learns_from_every_encoding(corpus: Path, tmp_path: Path, encoding: str, tail: str) -> None:
    """A teacher that knows the classes teaches a student that never sees a label."""
    sure = AugmentSettings(crop="none", flip=False)
    settings = SHORT.model_copy(update={"steps": 80, "lr": 1e-2, "augment": sure, "eval_every": 80, "tail": tail})
    train(settings, tmp_path / "teacher", labeled=corpus / "labeled", threads=1)
    store = _annotated(corpus, tmp_path, encoding)
    alone = settings.model_copy(update={"labeled_fraction": 0.0, "alpha": 1.0, "seed": 5})
    sets = {"unlabeled": corpus / "unlabeled", "store": store, "val": corpus / "val"}
    result = train(alone, tmp_path / "student", **sets, threads=1)
    assert result.val_accuracy is not None
    assert result.val_accuracy >= 0.9


def test_draws_at_another_temperature_are_refused_before_training(corpus: Path, tmp_path: Path) -> None:
    make_model(tmp_path / "teacher")
    store = _annotated(corpus, tmp_path, "sampled:30")
    with pytest.raises(SpecError, match="sampled:30: its classes were drawn at temperature 1"):
        train(SHORT, tmp_path / "run", unlabeled=corpus / "unlabeled", store=store)
    assert not (tmp_path / "run").exists()
    hard = SHORT.model_copy(update={"loss": "hard"})
    assert train(hard, tmp_path / "run", unlabeled=corpus / "unlabeled", store=store, threads=1).steps == 12


def _annotated(corpus: Path, tmp_path: Path, encoding: str) -> Path:
    settings = AnnotateSettings(precision="fp32", encoding=encoding)
    teacher, engine = f"checkpoint:{tmp_path / 'teacher'}", LocalEngine("cpu", 1)
    annotate(corpus / "unlabeled", teacher, tmp_path / "store", engine=engine, settings=settings)
    return tmp_path / "store"


def _splitmix(seed: int, number: int) -> float:
    mask = (1 << 64) - 1
    mixed = (seed + number * 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return ((mixed ^ (mixed >> 31)) >> 11) * 2.0**-53


SEEDS = [8375774707054692421, 5473066131996943995]
