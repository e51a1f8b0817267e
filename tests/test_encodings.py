"""Encodings: what is stored says what the teacher said, to a measured fidelity."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from pseudolabel.errors import SpecError
from pseudolabel.interfaces import Encoding
from pseudolabel.labels.encodings import TEMPERATURES, Dense, Dense8, TopK, parse_encoding
from pseudolabel.labels.facts import divergence, fidelity, summarize
from pseudolabel.labels.tensors import to_arrow

ENCODINGS = ["dense", "dense8", "topk:1", "topk:3", "topk:5", "sampled:1", "sampled:20", "sampled:300@2"]
_logits = npst.arrays(
    np.float32,
    st.tuples(st.integers(1, 6), st.integers(5, 40)),
    elements=st.floats(-1e6, 1e6, width=32, allow_nan=False, allow_infinity=False),
)


@pytest.mark.parametrize("name", ENCODINGS)
@given(array=_logits)
def test_contract(name: str, array: np.ndarray) -> None:
    """Whatever finite logits come: promised columns, finite values, proper distributions, argmax kept."""
    encoding, logits = parse_encoding(name), torch.from_numpy(array)
    rows, classes = logits.shape
    assert encoding.name == name
    columns = _encode(encoding, logits)
    fields = encoding.fields(classes)
    assert list(columns) == [field.name for field in fields]
    assert all(torch.isfinite(column).all() and len(column) == rows for column in columns.values())
    written = pa.table([to_arrow(columns[field.name], field.type) for field in fields], schema=pa.schema(fields))
    for column, read in encoding.tensors(written, classes).items():
        torch.testing.assert_close(read, columns[column], check_dtype=False)
    for temperature in encoding.temperatures if encoding.draws else (0.5, 1.0, 2.0, 4.0):
        encoding.check_temperature(temperature)
        full = encoding.full_log_probs(columns, temperature, classes)
        torch.testing.assert_close(full.exp().sum(-1), torch.ones(rows), rtol=1e-4, atol=1e-4)
        teacher, student = encoding.log_probs(columns, torch.randn(rows, classes).log_softmax(-1), temperature)
        assert teacher.shape == student.shape
        for side in (teacher, student):
            torch.testing.assert_close(side.exp().sum(-1), torch.ones(rows), rtol=1e-4, atol=1e-4)
    assert torch.isfinite(divergence(encoding, columns, logits)).all()


@given(array=npst.arrays(np.float32, (4, 12), elements=st.floats(-60, 60, width=32)))
def test_dense_costs_less_than_a_millionth_of_a_nat_where_it_counts(array: np.ndarray) -> None:
    """float16 after subtracting the maximum: the error is relative to the distance from the top."""
    logits = torch.from_numpy(array)
    lost = divergence(Dense(), _encode(Dense(), logits), logits)
    assert float(lost.max()) < 2e-5
    typical = 4 * torch.randn(256, 1000, generator=torch.Generator().manual_seed(0))
    assert float(divergence(Dense(), _encode(Dense(), typical), typical).mean()) < 1e-6


def test_a_large_constant_does_not_hurt() -> None:
    """float16 of raw logits would be infinite."""
    logits = torch.tensor([[1e5 + 2.0, 1e5, 1e5 - 3.0]])
    full = Dense().full_log_probs(_encode(Dense(), logits), 1.0, 3)
    torch.testing.assert_close(full, torch.log_softmax(torch.tensor([[2.0, 0.0, -3.0]]), -1), rtol=1e-3, atol=1e-3)


def test_topk_at_temperature_one_keeps_the_tails_mass_exactly() -> None:
    """The moments alone would be off for a skewed tail; lse makes T = 1 exact."""
    logits = torch.tensor([[9.0, 8.0, 5.0, -20.0, -20.0, 4.9, -20.0]])
    full = TopK(2).full_log_probs(_encode(TopK(2), logits), 1.0, 7).exp()
    wanted = torch.softmax(logits, -1)
    assert float(full[0, 2:].sum()) == pytest.approx(float(wanted[0, 2:].sum()), rel=1e-3)
    torch.testing.assert_close(full[0, :2], wanted[0, :2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("temperature", [2.0, 4.0])
def test_topk_tail_mass_follows_the_moments(temperature: float) -> None:
    """n·exp(mean/T + var/(2T²)), against the true sum over a Gaussian tail."""
    logits = torch.cat([torch.tensor([6.0, 5.0]), torch.randn(998, generator=torch.Generator().manual_seed(3)) - 3])[
        None
    ]
    columns = _encode(TopK(2), logits)
    tail = logits[0, 2:] - 6.0
    assert float(columns["tail_mean"]) == pytest.approx(float(tail.mean()), rel=1e-5)
    assert float(columns["tail_var"]) == pytest.approx(float(tail.var(correction=0)), rel=1e-4)
    stored = TopK(2).full_log_probs(columns, temperature, 1000).exp()[0, 2:].sum()
    assert float(stored) == pytest.approx(float(torch.softmax(logits / temperature, -1)[0, 2:].sum()), rel=0.01)


def test_a_wild_tail_stays_below_what_its_largest_logit_allows() -> None:
    """One logit at −1 and the rest at −60000: the variance alone would send the tail's mass to infinity."""
    logits = torch.full((1, 50), -60000.0)
    logits[0, :3] = torch.tensor([0.0, -0.5, -1.0])
    full = TopK(2).full_log_probs(_encode(TopK(2), logits), 2.0, 50).exp()
    assert torch.isfinite(full).all()
    assert float(full[0, 0]) > float(full[0, 2:].max())


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_tiny_tail_never_vanishes(temperature: float) -> None:
    """float16 of the kept logits can say that they are all there is: log 0, and an infinite KL."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.cat(
        [12 + torch.randn(4000, 1, generator=generator), 2 * torch.randn(4000, 9, generator=generator)], -1
    )
    columns = _encode(TopK(5), logits)
    full = TopK(5).full_log_probs(columns, temperature, 10)
    assert torch.isfinite(full).all()
    assert torch.isfinite(divergence(TopK(5), columns, logits)).all()
    assert float(divergence(TopK(5), columns, logits)[0].mean()) < 1e-3


def test_class_ids_beyond_int16_and_float16_survive() -> None:
    """Peers kept ids in int16 (wrong from 32,768) or cast them to float16 (exact to 2,048 only)."""
    logits = torch.zeros(1, 70_000)
    logits[0, [69_999, 40_001]] = torch.tensor([9.0, 8.0])
    encoding = TopK(2)
    assert encoding.fields(70_000)[0].type == pa.list_(pa.uint32(), 2)
    assert encoding.fields(65_536)[0].type == pa.list_(pa.uint16(), 2)
    assert _encode(encoding, logits)["topk_id"].tolist() == [[69_999, 40_001]]


@given(array=npst.arrays(np.float32, (4, 12), elements=st.floats(-30, 30, width=32)))
def test_dense8_is_within_half_a_level(array: np.ndarray) -> None:
    logits = torch.from_numpy(array)
    wanted = (logits - logits.amax(-1, keepdim=True)).double()
    columns = _encode(Dense8(), logits)
    stored = columns["logit_min"].double()[:, None] * (1 - columns["logits8"].double() / 255)
    level = -wanted.amin(-1, keepdim=True) / 255
    assert bool(((stored - wanted).abs() <= 0.5001 * level + 1e-5).all())
    assert bool((columns["logits8"].amax(-1) == 255).all()), "the largest logit is exact"


def test_dense8_spends_no_levels_on_what_weighs_nothing() -> None:
    """One logit at −60000 would leave all others a single level, and a KL of 0.3."""
    logits = torch.tensor([[0.0, -1.0, -2.0, -60000.0]])
    assert float(divergence(Dense8(), _encode(Dense8(), logits), logits).max()) < 0.01
    equal = torch.full((1, 3), 7.0)
    torch.testing.assert_close(
        Dense8().full_log_probs(_encode(Dense8(), equal), 1.0, 3), torch.full((1, 3), -math.log(3))
    )


def test_dense8_loses_little_on_what_teachers_say() -> None:
    typical = 4 * torch.randn(256, 1000, generator=torch.Generator().manual_seed(0))
    assert float(divergence(Dense8(), _encode(Dense8(), typical), typical).mean(-1).max()) < 1e-3


def test_summary_columns() -> None:
    summary = summarize(torch.tensor([[0.0, math.log(6.0), math.log(3.0)], [-1000.0, 1000.0, 0.0]]))
    assert summary["pred"].tolist() == [1, 1]
    torch.testing.assert_close(summary["confidence"], torch.tensor([0.6, 1.0]))
    torch.testing.assert_close(summary["margin"], torch.tensor([0.3, 1.0]))
    entropy = -(0.1 * math.log(0.1) + 0.6 * math.log(0.6) + 0.3 * math.log(0.3))
    torch.testing.assert_close(summary["entropy"], torch.tensor([entropy, 0.0]), rtol=1e-5, atol=1e-6)


def test_fidelity_is_measured_not_assumed() -> None:
    """Fewer kept classes lose more; the figures are the KL itself."""
    logits = 3 * torch.randn(500, 100, generator=torch.Generator().manual_seed(0))
    figures = {}
    for kept in (5, 20):
        lost = divergence(TopK(kept), _encode(TopK(kept), logits), logits)
        figures[kept] = fidelity(lost, TEMPERATURES)
        full = torch.log_softmax(logits.double(), -1)
        stored = TopK(kept).full_log_probs(_encode(TopK(kept), logits), 1.0, 100).double()
        wanted = (full.exp() * (full - stored)).sum(-1)
        assert figures[kept]["mean"]["1"] == pytest.approx(float(wanted.mean()), rel=1e-4)
        assert figures[kept]["p99"]["1"] == pytest.approx(float(wanted.quantile(0.99)), rel=1e-3)
    assert figures[20]["mean"]["1"] < figures[5]["mean"]["1"]


_NO_DRAWS = [
    "sampled",
    "sampled:",
    "sampled:0",
    "sampled:70000",
    "sampled:5@",
    "sampled:5@0",
    "sampled:5@-1",
    "sampled:5@x",
]


@pytest.mark.parametrize(
    "spec", ["", "dens", "topk", "topk:", "topk:0", "topk:-3", "topk:1.5", "topk:x", "DENSE", "dense16", *_NO_DRAWS]
)
def test_nonsense_specs_are_refused(spec: str) -> None:
    with pytest.raises(SpecError, match="topk:K"):
        parse_encoding(spec)


def test_more_kept_than_there_are_is_refused() -> None:
    encoding: Encoding = TopK(11)
    with pytest.raises(SpecError, match="only 10 classes"):
        encoding.check(10)


def _encode(encoding: Encoding, logits_BC: torch.Tensor) -> dict[str, torch.Tensor]:
    return encoding.encode(logits_BC, torch.arange(len(logits_BC)))
