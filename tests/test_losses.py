"""Losses against exact values, closed forms and every usual mistake."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pseudolabel.errors import SpecError
from pseudolabel.interfaces import Encoding
from pseudolabel.labels.encodings import Dense, TopK
from pseudolabel.labels.facts import summarize
from pseudolabel.labels.targets import StoredTargets
from pseudolabel.losses import NO_LABEL, Mixture, hard, kd, kd_loss, parse_loss

TAILS = ["bucket", "uniform"]
VECTORS = json.loads((Path(__file__).parent / "kd_vectors.json").read_text())


def _tensors(vector: dict[str, Any], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    student = torch.tensor(vector["s"], dtype=dtype, requires_grad=True)
    return student, torch.tensor(vector["z"], dtype=dtype), torch.tensor(vector["y"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda vector: vector["name"])
def test_value_and_gradient_are_exact(vector: dict[str, Any], dtype: torch.dtype) -> None:
    student, teacher, labels = _tensors(vector, dtype)
    loss = kd_loss(student, teacher, labels, alpha=vector["alpha"], temperature=vector["T"])
    loss.backward()
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(loss.detach(), torch.tensor(vector["expected"]["loss"], dtype=dtype), **tolerance)
    wanted = torch.tensor(vector["expected"]["grad_s"], dtype=dtype)
    torch.testing.assert_close(
        student.grad, wanted, rtol=max(tolerance["rtol"], 1e-10), atol=max(tolerance["atol"], 1e-12)
    )


@pytest.mark.parametrize("vector", VECTORS["vectors"], ids=lambda vector: vector["name"])
def test_no_usual_mistake_gives_our_value(vector: dict[str, Any]) -> None:
    """T² missing, `mean` for `batchmean`, α swapped, KL reversed: wherever the mistake shows, we don't make it."""
    student, teacher, labels = _tensors(vector, torch.float64)
    ours = float(kd_loss(student.detach(), teacher, labels, alpha=vector["alpha"], temperature=vector["T"]))
    expected = vector["expected"]["loss"]
    for name, wrong in vector["mistakes"].items():
        if isinstance(wrong, float) and math.isfinite(wrong) and abs(wrong - expected) > 1e-9 * max(abs(expected), 1):
            assert abs(ours - wrong) > 1e-9, name


@pytest.mark.parametrize("point", VECTORS["grid_on_v2"], ids=str)
def test_grid_over_alpha_and_temperature(point: dict[str, Any]) -> None:
    vector = next(one for one in VECTORS["vectors"] if one["name"].startswith("v2"))
    student, teacher, labels = _tensors(vector, torch.float64)
    loss = kd_loss(student, teacher, labels, alpha=point["alpha"], temperature=point["T"])
    assert float(loss.detach()) == pytest.approx(point["loss"], rel=1e-12)


def test_finite_at_logits_of_a_thousand_under_half_precision() -> None:
    student = torch.tensor([[1000.0, -1000.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.tensor([[-1000.0, 1000.0, 0.0]], dtype=torch.bfloat16)
    loss = kd_loss(student, teacher, torch.tensor([1]), alpha=0.5, temperature=4.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_no_gradient_reaches_the_teacher() -> None:
    teacher = torch.randn(2, 3, requires_grad=True)
    kd_loss(torch.randn(2, 3, requires_grad=True), teacher, torch.tensor([0, 1]), alpha=0.5, temperature=2.0).backward()
    assert teacher.grad is None


@given(st.integers(0, 1000), st.sampled_from([1.0, 2.0, 4.0, 0.5]), st.integers(2, 30), st.sampled_from(TAILS))
def test_topk_over_all_classes_is_the_dense_loss(seed: int, temperature: float, classes: int, tail: str) -> None:
    """K = C has no tail, K = C − 1 a tail of one class: both are exact at every temperature."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (3 * torch.randn(5, classes, generator=generator) for _ in range(2))
    dense = kd(student, _targets(Dense(), teacher), temperature)
    for kept in {classes, classes - 1}:
        sparse = kd(student, _targets(TopK(kept), teacher, tail=tail), temperature)
        torch.testing.assert_close(sparse, dense, rtol=2e-3, atol=2e-3)  # float16 logits


def test_the_tail_is_one_bucket_and_nothing_is_renormalised() -> None:
    """A peer softmaxed sparse targets again: 0.90 became 0.21."""
    teacher = torch.tensor([[5.0, 2.0, 1.0, 0.0, -1.0]])
    student = torch.tensor([[1.0, 1.0, 0.0, 2.0, 0.0]])
    p, q = torch.softmax(teacher, -1)[0], torch.softmax(student, -1)[0]
    tail_p, tail_q = p[2:].sum(), q[2:].sum()
    wanted = p[0] * (p[0] / q[0]).log() + p[1] * (p[1] / q[1]).log() + tail_p * (tail_p / tail_q).log()
    assert float(kd(student, _targets(TopK(2), teacher), 1.0)) == pytest.approx(float(wanted), abs=1e-3)


def test_kd_gradient_over_a_tail_checks_out_numerically() -> None:
    targets = _targets(TopK(3), 2 * torch.randn(4, 9, generator=torch.Generator().manual_seed(1)))
    targets = StoredTargets(
        targets.encoding, {name: c.double() if c.is_floating_point() else c for name, c in targets.columns.items()}
    )
    student = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: kd(s, targets, 2.0), (student,))


def test_hard_is_cross_entropy_with_the_teachers_class() -> None:
    teacher, student = torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([[1.0, 0.5, 0.0]])
    wanted = torch.nn.functional.cross_entropy(student, torch.tensor([1]))
    assert float(hard(student, _targets(Dense(), teacher), 4.0)) == pytest.approx(float(wanted), rel=1e-6)


def test_mixture_averages_each_part_over_its_own_rows() -> None:
    """Two labeled rows, three pseudo-labeled: CE is a mean over 2, KL over 3, and a weight multiplies its row."""
    student, teacher = torch.randn(5, 4), torch.randn(3, 4)
    labels = torch.tensor([1, 2, NO_LABEL, NO_LABEL, NO_LABEL])
    targets, weights = _targets(Dense(), teacher), torch.tensor([1.0, 0.0, 2.0])
    loss, of_labels, of_soft = Mixture(0.3, 2.0)(student, labels, targets, weights)
    ce = torch.nn.functional.cross_entropy(student[:2], labels[:2])
    soft = (kd(student[2:], targets, 2.0) * weights).mean()
    torch.testing.assert_close((loss, of_labels, of_soft), (0.7 * ce + 0.3 * soft, ce, soft))


def test_mixture_of_a_batch_without_labels_is_not_nan() -> None:
    loss = Mixture(0.5, 1.0)(
        torch.randn(2, 3), torch.full((2,), NO_LABEL), _targets(Dense(), torch.randn(2, 3)), torch.ones(2)
    )
    assert torch.isfinite(torch.stack(loss)).all()


@pytest.mark.parametrize(
    ("alpha", "temperature"),
    [(-0.1, 1), (1.1, 1), (0.5, 0), (0.5, -1), (math.nan, 1), (0.5, math.nan), (0.5, math.inf)],
)
def test_nonsense_alpha_or_temperature_is_refused(alpha: float, temperature: float) -> None:
    with pytest.raises(SpecError):
        Mixture(alpha, temperature)
    with pytest.raises(ValueError, match=r"alpha|temperature"):
        kd_loss(
            torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), alpha=alpha, temperature=temperature
        )


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes"):
        kd_loss(torch.zeros(2, 3), torch.zeros(1, 3), torch.zeros(2, dtype=torch.long), alpha=0.5, temperature=1.0)


def test_an_unknown_loss_names_the_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean 'hard'"):
        parse_loss("hrad")


def _targets(encoding: Encoding, logits: torch.Tensor, *, tail: str = "bucket") -> StoredTargets:
    columns = encoding.encode(logits, torch.arange(len(logits)))
    return StoredTargets(encoding, {"pred": summarize(logits)["pred"], **columns}, tail)
