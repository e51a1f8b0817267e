"""Every loss against its paper's formula, written down with plain probabilities in float64; and where it is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_sparse_losses import logits, targets
from torch import Tensor

from pseudolabel.errors import SpecError
from pseudolabel.interfaces import Encoding
from pseudolabel.labels.encodings import Dense, Dense8, TopK, parse_encoding
from pseudolabel.labels.targets import StoredTargets
from pseudolabel.losses import LOSSES, NO_LABEL, LabelLoss, Mixture, SoftLabels, check_loss, kd, parse_loss
from pseudolabel.losses.full import FullTargets
from pseudolabel.losses.standardize import Standardized

ROWS, CLASSES = 6, 40
LABELS = torch.tensor([3, 0, 39, 7, 7, 1])
Formula = Callable[[Tensor, Tensor, float], Tensor]


def soft(values: Tensor, temperature: float = 1.0) -> Tensor:
    return torch.softmax(values / temperature, -1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def without(p: Tensor, labels: Tensor = LABELS) -> Tensor:
    """The classes but the target, renormalised: (B, C − 1)."""
    others = torch.ones_like(p, dtype=torch.bool).scatter(-1, labels[:, None], False)
    rest = p[others].view(len(p), -1)
    return rest / rest.sum(-1, keepdim=True)


def pick(p: Tensor, labels: Tensor = LABELS) -> Tensor:
    return p[torch.arange(len(p)), labels]


def jsd(s: Tensor, z: Tensor, t: float) -> Tensor:
    p, q = soft(z, t), soft(s, t)
    m = 0.3 * p + 0.7 * q
    return t**2 * (0.3 * kl(p, m) + 0.7 * kl(q, m))


def wttm(s: Tensor, z: Tensor, t: float) -> Tensor:
    powers = soft(z) ** (1 / t)
    return powers.sum(-1) * kl(powers / powers.sum(-1, keepdim=True), soft(s))


def dkd(s: Tensor, z: Tensor, t: float) -> Tensor:
    p, q = soft(z, t), soft(s, t)
    binary = [torch.stack([pick(one), 1 - pick(one)], -1) for one in (p, q)]
    return t**2 * (0.5 * kl(*binary) + 4 * kl(without(p), without(q)))


def nkd(s: Tensor, z: Tensor, t: float) -> Tensor:
    others = (without(soft(z, t)) * without(soft(s, t)).log()).sum(-1)
    return -pick(soft(z)) * pick(soft(s)).log() - 1.5 * t**2 * others


def dist(s: Tensor, z: Tensor, t: float) -> Tensor:
    p, q = soft(z, t), soft(s, t)
    rows = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p, q, strict=True)])
    classes = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p.T, q.T, strict=True)])
    return t**2 * (2 * (1 - rows) + 3 * (1 - classes).mean())


def mse(s: Tensor, z: Tensor, t: float) -> Tensor:
    return ((s - s.mean(-1, keepdim=True)) - (z - z.mean(-1, keepdim=True))).square().mean(-1)


FORMULAS: dict[str, Formula] = {
    "kd": lambda s, z, t: t**2 * kl(soft(z, t), soft(s, t)),
    "hard": lambda s, z, t: -pick(soft(s), z.argmax(-1)).log(),
    "jsd?beta=0.3": jsd,
    "wttm": wttm,
    "wttm?weighted=false": lambda s, z, t: kl(soft(z, t), soft(s)),
    "dkd?alpha=0.5&beta=4": dkd,
    "nkd": nkd,
    "dist?beta=2&gamma=3": dist,
    "mse": mse,
}
each_loss = pytest.mark.parametrize("spec", FORMULAS)


def test_every_loss_has_its_formula_here() -> None:
    assert {spec.partition("?")[0] for spec in FORMULAS} == set(LOSSES)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@each_loss
def test_is_its_closed_form(spec: str, temperature: float) -> None:
    teacher, student = logits(0), logits(1)
    found = parse_loss(spec)(student, FullTargets(teacher), temperature, LABELS)
    assert found.shape == (ROWS,)
    torch.testing.assert_close(found, FORMULAS[spec](student, teacher, temperature), rtol=1e-9, atol=1e-11)


@each_loss
def test_gradient_is_that_of_the_closed_form(spec: str) -> None:
    teacher, loss = FullTargets(logits(2)), parse_loss(spec)
    student = logits(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher, 2.0, LABELS), (student,))
    loss(student, teacher, 2.0, LABELS).sum().backward()
    wanted = logits(3).requires_grad_()
    FORMULAS[spec](wanted, teacher.logits_BC, 2.0).sum().backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, wanted.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("standardize", [False, True])
@each_loss
def test_finite_at_logits_of_a_thousand(spec: str, standardize: bool) -> None:
    teacher = torch.tensor([[-1000.0, 1000.0, 0.0, 5.0], [1000.0, -1000.0, -1000.0, -1000.0], [0.0, 0.0, 0.0, 0.0]])
    student = torch.tensor(
        [[1000.0, -1000.0, 0.0, 1.0], [-1000.0, 1000.0, 1000.0, 0.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True
    )
    labels = torch.tensor([0, 0, 3])
    given = Standardized(FullTargets(teacher)) if standardize else FullTargets(teacher)
    found = parse_loss(spec)(student, given, 2.0, labels)
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()
    assert found.ge(-1e-6).all()


@pytest.mark.parametrize("encoding", [Dense(), Dense8(), TopK(CLASSES)], ids=lambda one: one.name)
@each_loss
def test_stored_labels_give_the_loss_of_full_ones(spec: str, encoding: Encoding) -> None:
    teacher, student = logits(4), logits(5)
    stored = targets(encoding, teacher, "uniform")  # over a bucket, dkd and nkd are refused
    stored.columns["confidence"] = soft(teacher).amax(-1)  # type: ignore[index]
    found = parse_loss(spec)(student, stored, 2.0, LABELS)
    wanted = parse_loss(spec)(student, FullTargets(teacher), 2.0, LABELS)
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("spec", ["kd", "jsd", "wttm"])
def test_over_a_bucket_the_tail_is_one_outcome(spec: str) -> None:
    """K classes and what is left of the probability, whatever the loss."""
    teacher, student = logits(6), logits(7)
    stored = targets(TopK(5), teacher)
    log_p, _ = stored.log_probs(student, 2.0)
    ids = teacher.topk(5, dim=-1).indices
    q = soft(student, 1.0 if spec == "wttm" else 2.0)
    q = torch.cat([q.gather(-1, ids), 1 - q.gather(-1, ids).sum(-1, keepdim=True)], -1)
    p = log_p.exp()
    m = (p + q) / 2
    at_1, _ = stored.log_probs(student, 1.0)
    weight = (at_1[:, 0] / 2 - log_p[:, 0]).exp()  # Σ p^(1/T), by what is stored
    wanted = {"kd": 4 * kl(p, q), "jsd": 2 * (kl(p, m) + kl(q, m)), "wttm": weight * kl(p, q)}[spec]
    found = parse_loss(spec)(student, stored, 2.0)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_mse_is_twice_the_limit_of_kd_at_high_temperatures() -> None:
    teacher, student = FullTargets(logits(8)), logits(9)
    torch.testing.assert_close(
        2 * kd(student, teacher, 1e4), parse_loss("mse")(student, teacher, 1.0), rtol=1e-3, atol=0
    )


def test_a_threshold_leaves_unsure_rows_out() -> None:
    teacher = torch.tensor([[0.0, 3.0, 1.0], [0.0, 0.1, 0.0]]).double()
    student = torch.zeros(2, 3).double()
    found = parse_loss("hard?threshold=0.8")(student, FullTargets(teacher), 1.0)
    torch.testing.assert_close(found, torch.tensor([math.log(3), 0.0]).double())


def test_standardised_logits_are_compared_in_shape_alone() -> None:
    """Scaled and moved, a student is as good; and the formula is the paper's."""
    teacher, student = logits(10), logits(11)
    given = Standardized(FullTargets(teacher))
    z, s = ((one - one.mean(-1, keepdim=True)) / one.std(-1, keepdim=True) for one in (teacher, student))
    torch.testing.assert_close(kd(student, given, 2.0), 4 * kl(soft(z, 2.0), soft(s, 2.0)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(kd(7 * teacher + 3, given, 2.0), torch.zeros(ROWS).double(), rtol=0, atol=1e-9)


def test_the_teachers_class_must_be_asked_for() -> None:
    teacher, student = FullTargets(logits(12)), logits(13)
    pred = teacher.logits_BC.argmax(-1)
    for name in ("dkd", "nkd"):
        found = parse_loss(f"{name}?target=teacher")(student, teacher, 2.0, torch.full((ROWS,), NO_LABEL))
        torch.testing.assert_close(found, parse_loss(name)(student, teacher, 2.0, pred))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("kdd", "did you mean 'kd'"),
        ("dkd?betta=2", "did you mean 'beta'"),
        ("dkd?beta=-1", "beta must be a number from 0"),
        ("dkd?beta=inf", "beta must be a number from 0"),
        ("dkd?beta=true", "beta must be a number from 0"),
        ("dkd?alpha=0&beta=0", "alpha and beta are both 0"),
        ("dist?beta=0&gamma=0", "beta and gamma are both 0"),
        ("nkd?target=argmax", "label or teacher"),
        ("jsd?beta=1", "between 0 and 1"),
        ("jsd?beta=0", "between 0 and 1"),
        ("hard?threshold=1", "between 0 and 1"),
        ("wttm?weighted=2", "true or false"),
        ("kd?temperature=2", "unknown argument"),
        ("", "not a spec"),
    ],
)
def test_a_spec_that_is_none_is_refused(spec: str, message: str) -> None:
    with pytest.raises(SpecError, match=message.replace("?", r"\?")):
        parse_loss(spec)


def _allows(spec: str, **more: object) -> bool:
    given = {"encoding": Dense(), "num_classes": 10, "temperature": 2.0} | more
    try:
        check_loss(spec, SoftLabels(**given))  # type: ignore[arg-type]
    except SpecError:
        return False
    return True


def test_two_classes_have_nothing_beside_the_target() -> None:
    assert not _allows("dkd?target=teacher", num_classes=2)
    assert not _allows("nkd?target=teacher", num_classes=2)
    assert all(_allows(spec, num_classes=2) for spec in ("kd", "hard", "dist", "wttm", "jsd", "mse"))
    assert _allows("kd", num_classes=3, standardize=True)
    assert not _allows("kd", num_classes=2, standardize=True)  # z-scores of two are ±1, whatever they were


def test_rows_without_a_label_need_another_target() -> None:
    assert not _allows("dkd")
    assert not _allows("nkd")
    assert _allows("dkd?target=teacher")
    assert _allows("dkd", unlabeled=False)


def test_the_table_in_the_docs_is_what_is_allowed() -> None:
    """docs/losses.md: a row a loss, a column an encoding."""
    text = (Path(__file__).parents[1] / "docs" / "losses.md").read_text(encoding="utf-8")
    columns = {"dense": "dense", "dense8": "dense8", "topk:5": "topk", "sampled:20@2": "sampled"}
    lines = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("| `")]
    table = {row[0].strip("`"): row[1:] for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}
    assert {name.partition("?")[0] for name in table} >= set(LOSSES)
    for name in LOSSES:
        spec = f"{name}?target=teacher" if name in ("dkd", "nkd") else name
        for cell, encoding in zip(table[name], columns, strict=False):
            by_tail = {
                tail: _allows(spec, encoding=parse_encoding(encoding), tail=tail) for tail in ("bucket", "uniform")
            }
            wanted = {"yes": (True, True), "with `--tail uniform`": (False, True), "–": (False, False)}[cell]
            assert (by_tail["bucket"], by_tail["uniform"]) == wanted, (name, encoding)
        assert table[name][4] == ("yes" if _allows(spec, standardize=True) else "–"), name


def test_draws_are_of_one_temperature_and_losses_without_one_dont_mind() -> None:
    assert not _allows("kd", encoding=parse_encoding("sampled:20"), temperature=2.0)
    assert _allows("hard?threshold=0.5", encoding=parse_encoding("sampled:20"), temperature=2.0)


def test_smoothing_weights_and_adjustment_of_labels() -> None:
    student = logits(14, classes=4)[:3]
    labels, weight, prior = (
        torch.tensor([2, NO_LABEL, 0]),
        torch.tensor([1.5, 1.0, 0.5, 1.0]),
        torch.tensor([0.7, 0.1, 0.1, 0.1]),
    )
    plain, log_q = LabelLoss(), torch.log_softmax(student, -1)
    torch.testing.assert_close(plain(student, labels), -(log_q[0, 2] + log_q[2, 0]) / 2)
    smoothed = torch.full((2, 4), 0.1 / 4).double() + 0.9 * torch.eye(4).double()[[2, 0]]
    torch.testing.assert_close(LabelLoss(smoothing=0.1)(student, labels), -(smoothed * log_q[[0, 2]]).sum() / 2)
    torch.testing.assert_close(
        LabelLoss(weight_C=weight)(student, labels), -(0.5 * log_q[0, 2] + 1.5 * log_q[2, 0]) / 2
    )
    of_rows = -(smoothed * log_q[[0, 2]]).sum(-1) * torch.tensor([0.5, 1.5])  # a weight is of the row, all of it
    torch.testing.assert_close(LabelLoss(0.1, weight)(student, labels), of_rows.sum() / 2)
    adjusted = torch.log_softmax(student + 2 * prior.log(), -1)
    torch.testing.assert_close(
        LabelLoss(adjustment_C=2 * prior.log())(student, labels), -(adjusted[0, 2] + adjusted[2, 0]) / 2
    )


def test_a_mixture_standardises_and_passes_labels_on() -> None:
    teacher, student = logits(15), logits(16)
    both = torch.cat([student, student])
    labels = torch.cat([torch.full((ROWS,), NO_LABEL), LABELS])
    stored = StoredTargets(Dense(), {"logits": teacher, "pred": teacher.argmax(-1)})
    mixture = Mixture(1.0, 2.0, "dkd", standardize=True)
    wanted = parse_loss("dkd")(student, Standardized(FullTargets(teacher)), 2.0, LABELS).mean()
    torch.testing.assert_close(mixture(both, labels, stored, torch.ones(ROWS).double()).total, wanted)
