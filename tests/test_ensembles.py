"""Ensembles: the weighted mean of log-probabilities, over one label space."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_model
from small_models import CPU, grey, logits_of, named_model

from pseudolabel.errors import SpecError
from pseudolabel.teachers import parse_teacher, parse_teachers


@pytest.fixture
def two_models(tmp_path: Path) -> list[str]:
    return [f"checkpoint:{make_model(tmp_path / f'model-{seed}', seed=seed)}" for seed in (1, 2)]


@pytest.mark.parametrize("weights", [(None, None), ("3", "1"), ("0.2", "0.05")])
def test_an_ensemble_is_the_weighted_mean_of_log_probabilities(
    two_models: list[str], weights: tuple[str | None, str | None]
) -> None:
    uris = [uri if weight is None else f"{uri}@{weight}" for uri, weight in zip(two_models, weights, strict=True)]
    images = [grey(seed) for seed in range(6)]
    one, two = (logits_of(parse_teacher(uri).load(CPU), *images) for uri in two_models)
    share = 0.5 if weights == (None, None) else float(weights[0] or 1) / sum(float(weight or 1) for weight in weights)
    found = logits_of(parse_teachers(uris).load(CPU), *images)
    wanted = share * one.log_softmax(-1) + (1 - share) * two.log_softmax(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_an_ensemble_gives_the_soft_labels_of_the_mean_of_logits(two_models: list[str], temperature: float) -> None:
    """The two differ by a constant a row, so one store serves both readings at every temperature."""
    images = [grey(seed) for seed in range(6)]
    mean = sum(0.5 * logits_of(parse_teacher(uri).load(CPU), *images) for uri in two_models)
    found = logits_of(parse_teachers(two_models).load(CPU), *images)
    shift = mean - found
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=0, atol=1e-6)
    assert shift.abs().min() > 1e-3, "equal by themselves, so this test shows nothing"
    torch.testing.assert_close((found / temperature).softmax(-1), (mean / temperature).softmax(-1))


def test_an_ensemble_needs_one_label_space(tmp_path: Path) -> None:
    cat_dog, dog_cat = named_model(tmp_path / "a", ("cat", "dog")), named_model(tmp_path / "b", ("dog", "cat"))
    three = named_model(tmp_path / "c", ("cat", "dog", "bird"))
    with pytest.raises(SpecError, match=rf"{cat_dog} has 2 classes, {three} has 3"):
        parse_teachers([cat_dog, three]).load(CPU)
    with pytest.raises(SpecError, match=rf"class 0 is 'cat' in {cat_dog} and 'dog' in {dog_cat}"):
        parse_teachers([cat_dog, dog_cat]).load(CPU)


def test_numbered_classes_join_named_ones_and_each_member_prepares_its_own_input(tmp_path: Path) -> None:
    numbered = named_model(tmp_path / "a", ("0", "1"), size=16, channels=3)
    named = named_model(tmp_path / "b", ("cat", "dog"), seed=1)
    ensemble = parse_teachers([numbered, named]).load(CPU)
    assert ensemble.classes == ("cat", "dog")
    assert [tuple(one.shape) for one in ensemble.prepare(grey(size=20))] == [(3, 16, 16), (1, 12, 12)]
    assert logits_of(ensemble, grey(size=20)).shape == (1, 2)


def test_an_ensembles_identity_knows_members_and_weights(tmp_path: Path, two_models: list[str]) -> None:
    one, two = two_models
    moved = shutil.copytree(one.removeprefix("checkpoint:"), tmp_path / "elsewhere")
    identity = parse_teachers([f"{one}@3", f"{two}@1"]).load(CPU).identity
    assert identity == parse_teachers([f"checkpoint:{moved}@0.75", f"{two}@0.25"]).load(CPU).identity
    assert identity != parse_teachers([one, two]).load(CPU).identity
