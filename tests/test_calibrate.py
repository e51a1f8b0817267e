"""Calibration: what is put in is found again, the figures are honest, and the store stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import Invoke, Refuse
from stores import add_part, known, write_store
from torchmetrics.classification import MulticlassCalibrationError

from pseudolabel.calibration import Calibration, read_calibration
from pseudolabel.calibration.calibrate import calibrate
from pseudolabel.calibration.evidence import MOST_ROWS, labeled_evidence
from pseudolabel.calibration.metrics import measure
from pseudolabel.errors import CalibrationError, LabelError, OutputExists, StoreError, StoreMismatch
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.store import Store
from pseudolabel.settings import CalibrateSettings


@pytest.mark.parametrize("encoding", ["dense", "dense8", "topk:5"])
def test_the_temperature_that_was_put_in_is_found(tmp_path: Path, encoding: str) -> None:
    """A teacher that says everything 2.5 times too loudly."""
    store = write_store(tmp_path / "store", {"val": known(4000, 10, 0, overconfident=2.5)}, encoding=encoding)
    before = {path: path.read_bytes() for path in (tmp_path / "store" / "parts").iterdir()}
    found = calibrate(store, tmp_path / "calibration.json")
    assert found.temperature == pytest.approx(2.5, rel=0.06)
    assert found.before["ece"] > 0.1
    assert found.after["ece"] < 0.03
    assert found.after["nll"] < found.before["nll"] - 0.1
    assert found.after["intervals"]["nll"][1] < found.before["intervals"]["nll"][0]
    assert (found.rows, found.labeled_rows, found.aligned) == (4000, 4000, None)
    assert {path: path.read_bytes() for path in (tmp_path / "store" / "parts").iterdir()} == before


def test_vector_scaling_mends_what_a_temperature_cannot(tmp_path: Path) -> None:
    """A class told too loudly and another favoured: the weights and the bias that were put in are found."""
    generator = torch.Generator().manual_seed(1)
    told = (2 * torch.randn(12_000, 6, generator=generator)).log_softmax(-1)
    weight, bias = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.5, 1.0]), torch.tensor([0.0, 0.0, -2.0, 0.0, 0.0, 0.0])
    labels = torch.multinomial((told * weight + bias).softmax(-1), 1, generator=generator).squeeze(-1).tolist()
    store = write_store(tmp_path / "store", {"val": (told, labels)})
    found = {m: calibrate(store, settings=CalibrateSettings(method=m)) for m in ("temperature", "vector")}
    assert found["vector"].after["nll"] < found["temperature"].after["nll"] - 0.05
    assert found["vector"].after["accuracy"] > found["vector"].before["accuracy"] + 0.03
    calibration = found["vector"].calibration
    torch.testing.assert_close(torch.tensor(calibration.weight), weight, atol=0.12, rtol=0)
    assert calibration.bias is not None
    assert calibration.bias[2] - calibration.bias[0] == pytest.approx(-2.0, abs=0.2)


def test_figures_are_not_of_what_was_fitted(tmp_path: Path) -> None:
    """Few rows, many classes, labels by chance: fitted to all rows a vector looks better than it is. Cross-fitted it
    doesn't.
    """
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(60, 20, generator=generator)
    labels = torch.randint(20, (60,), generator=generator).tolist()
    store = write_store(tmp_path / "store", {"val": (logits, labels)})
    found = calibrate(store, settings=CalibrateSettings(method="vector"))
    encoding = parse_encoding("dense")
    rows, _ = labeled_evidence(store, encoding, None)
    on_itself = measure(rows.log_probs(found.calibration), rows.label_N)
    assert on_itself["nll"] < found.after["nll"] - 0.05
    assert sorted(set(rows.fold_N.tolist())) == [0, 1, 2, 3, 4]


def test_metrics_are_the_usual_ones() -> None:
    logits, labels = known(3000, 7, 3, overconfident=1.7)
    label_N = torch.tensor(labels)
    found = measure(logits.log_softmax(-1), label_N)
    usual = MulticlassCalibrationError(7, n_bins=15, norm="l1")
    assert found["ece"] == pytest.approx(float(usual(logits.softmax(-1), label_N)), abs=1e-5)
    assert found["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, label_N)), rel=1e-5)
    one_hot = torch.nn.functional.one_hot(label_N, 7)
    assert found["brier"] == pytest.approx(float((logits.softmax(-1) - one_hot).square().sum(-1).mean()), rel=1e-5)
    assert found["accuracy"] == float((logits.argmax(-1) == label_N).double().mean())
    assert sum(one["rows"] for one in found["reliability"]) == 3000
    gap = sum(one["rows"] / 3000 * abs(one["confidence"] - one["accuracy"]) for one in found["reliability"])
    assert gap == pytest.approx(found["ece"], abs=1e-9)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of 95 % intervals for the accuracy over 120 samples of a population, between 104 and 120 hold its own (a chance
    of 1 in 10,000 otherwise); and their width is the binomial's.
    """
    logits, labels = known(200_000, 5, 4)
    label_N = torch.tensor(labels)
    truth = float((logits.argmax(-1) == label_N).double().mean())
    inside = 0
    for piece in range(120):
        part = slice(400 * piece, 400 * (piece + 1))
        low, high = measure(logits[part].log_softmax(-1), label_N[part])["intervals"]["accuracy"]
        inside += low <= truth <= high
    assert 104 <= inside <= 120
    assert (high - low) / (2 * 1.96 * (truth * (1 - truth) / 400) ** 0.5) == pytest.approx(1, rel=0.15)


def _skewed(tmp_path: Path, prior: str) -> tuple[Store, torch.Tensor, list[int]]:
    """A teacher that says class 0 too often of the unlabeled rows: its logits are raised by 1.5 everywhere."""
    logits, labels = known(3000, 5, 5)
    told = logits.clone()
    told[:, 0] += 1.5
    rest, truth = known(4000, 5, 6)
    rest[:, 0] += 1.5
    store = write_store(tmp_path / "store", {"val": (told, labels)})
    add_part(store, "unlabeled", rest, [None] * len(rest))
    return store, rest, truth


@pytest.mark.parametrize("prior", ["labels", "uniform"])
def test_a_prior_correction_takes_back_a_class_that_is_said_too_often(tmp_path: Path, prior: str) -> None:
    store, rest, truth = _skewed(tmp_path, prior)
    found = calibrate(store, settings=CalibrateSettings(prior=prior))
    assert found.aligned is not None
    assert found.aligned["accuracy"] > found.after["accuracy"] + 0.01
    shift = torch.tensor(found.calibration.shift)
    assert float(shift[0] - shift[1:].mean()) < -0.3
    plain = found.calibration.without_shift()
    columns = {"logits": rest}
    encoding = parse_encoding("dense")
    marginal = plain.log_probs(encoding, columns, 5).exp().mean(0)
    target = torch.full((5,), 0.2) if prior == "uniform" else torch.bincount(torch.tensor(known(3000, 5, 5)[1])) / 3000
    torch.testing.assert_close(shift, (target / marginal).log(), atol=5e-3, rtol=0)
    right = [
        (one.log_probs(encoding, columns, 5).argmax(-1) == torch.tensor(truth)).double().mean()
        for one in (plain, found.calibration)
    ]
    assert right[1] > right[0] + 0.01


def test_a_calibration_reads_back_and_an_edited_one_is_refused(tmp_path: Path) -> None:
    store, *_ = _skewed(tmp_path, "labels")
    path = tmp_path / "c.json"
    found = calibrate(store, path, CalibrateSettings(method="vector", prior="labels"))
    assert read_calibration(path) == found.calibration
    content = json.loads(path.read_text())
    for change in (
        {"temperature": 2.0},
        {"temperature": -1},
        {"kind": "x"},
        {"bias": [1.0]},
        {"shift": None},
        {"weight": [float("nan")]},
    ):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(CalibrationError, match="is no calibration"):
            read_calibration(path)
    path.write_text("[]")
    with pytest.raises(CalibrationError, match=r"is no calibration .* make it with `calibrate`"):
        read_calibration(path)
    other = write_store(tmp_path / "other", {"val": known(10, 5, 0)}, teacher="another")
    with pytest.raises(StoreMismatch, match="calibrate this store"):
        found.calibration.check(other)


def test_nothing_is_overwritten_without_being_asked(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", {"val": known(100, 4, 0)})
    path = tmp_path / "mine.json"
    path.write_text("mine")
    with pytest.raises(OutputExists, match="--overwrite"):
        calibrate(store, path)
    with pytest.raises(OutputExists, match="holds no calibration, so it isn't overwritten"):
        calibrate(store, path, overwrite=True)
    assert path.read_text() == "mine"
    path.unlink()
    calibrate(store, path)
    first = path.read_bytes()
    calibrate(store, path, overwrite=True)
    assert path.read_bytes() == first


def test_what_cannot_be_calibrated_says_why(tmp_path: Path) -> None:
    few = write_store(tmp_path / "few", {"val": known(49, 4, 0)})
    add_part(few, "unlabeled", known(100, 4, 1)[0], [None] * 100)
    with pytest.raises(
        CalibrationError, match=r"49 rows of this store carry a label, at least 50 .*\nannotate labeled"
    ):
        calibrate(few)
    with pytest.raises(CalibrationError, match="0 rows of the shards named"):
        calibrate(few, evidence=["unlabeled"])
    with pytest.raises(StoreError, match="shard 'absent' has no part here"):
        calibrate(few, evidence=["absent"])
    drawn = write_store(tmp_path / "drawn", {"val": known(100, 4, 0)}, encoding="sampled:10")
    with pytest.raises(CalibrationError, match=r"holds draws \(sampled:10\)"):
        calibrate(drawn)
    logits, labels = known(100, 4, 0)
    wrong = write_store(tmp_path / "wrong", {"val": (logits, [*labels[:-1], 4])})
    with pytest.raises(LabelError, match="a sample has label 4, the teacher has 4 classes"):
        calibrate(wrong)
    alone = write_store(tmp_path / "alone", {"val": known(100, 4, 0)})
    with pytest.raises(CalibrationError, match="every row carries a label, so there is no marginal"):
        calibrate(alone, settings=CalibrateSettings(prior="uniform"))


def test_of_very_many_rows_the_same_ones_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In whatever shards they lie; memory holds twice as many at the most."""
    from pseudolabel.calibration import evidence

    monkeypatch.setattr(evidence, "MOST_ROWS", 60)
    logits, labels = known(400, 3, 7)
    parts = {f"val-{n}": (logits[100 * n : 100 * n + 100], labels[100 * n : 100 * n + 100]) for n in range(4)}
    store = write_store(tmp_path / "store", parts)
    rows, total = labeled_evidence(store, parse_encoding("dense"), None)
    again, _ = labeled_evidence(store, parse_encoding("dense"), None)
    assert (len(rows), total) == (60, 400)
    assert torch.equal(rows.columns["logits"], again.columns["logits"])
    assert MOST_ROWS == 20_000


def test_only_the_shards_named_tell(tmp_path: Path) -> None:
    """Training rows, which the teacher knows by heart, beside validation rows."""
    logits, labels = known(500, 4, 8, overconfident=3.0)
    heart = torch.nn.functional.one_hot(torch.tensor(labels), 4) * 20.0
    store = write_store(tmp_path / "store", {"train": (heart, labels), "val": (logits, labels)})
    assert calibrate(store).temperature != calibrate(store, evidence=["val"]).temperature
    assert calibrate(store, evidence=["val"]).temperature == pytest.approx(3.0, rel=0.25)


def test_a_calibrated_temperature_is_the_encodings_own(tmp_path: Path) -> None:
    """Dividing by τ, then by T, is dividing by τ·T, for sparse labels, too."""
    logits, _ = known(50, 30, 9)
    for name in ("dense", "topk:5"):
        encoding = parse_encoding(name)
        columns = encoding.encode(logits, torch.zeros(50).long())
        found = Calibration("s", 1.5).log_probs(encoding, columns, 30, 2.0)
        assert torch.equal(found, encoding.full_log_probs(columns, 3.0, 30))


def test_the_command(tmp_path: Path, invoke: Invoke, refuse: Refuse) -> None:
    write_store(tmp_path / "store", {"val": known(300, 4, 0, overconfident=2.0)})
    code, out, err = invoke("calibrate", tmp_path / "store", "--out", tmp_path / "c.json", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["after"]["ece"] < found["before"]["ece"]
    assert found["temperature"] == read_calibration(tmp_path / "c.json").temperature
    for shown in ("before", "calibrated", "ece", "confidence → accuracy", "300 of 300 with a label"):
        assert shown in err
    refuse("calibrate", tmp_path / "store", "--out", tmp_path / "c.json", kind="OutputExists", said="--overwrite")
    refuse(
        "calibrate",
        tmp_path / "store",
        "--out",
        tmp_path / "d.json",
        "--method",
        "isotonic",
        kind="RecipeError",
        said="method",
    )
