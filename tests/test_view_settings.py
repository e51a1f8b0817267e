"""Settings of views: all that decides them is in a store's identity, and commands say what has no effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Invoke
from conftest import make_model
from viewing import CPU

from pseudolabel.errors import RecipeError, StoreError
from pseudolabel.labeling.work import identify
from pseudolabel.labels.store import open_store
from pseudolabel.recipe import validate
from pseudolabel.settings import AnnotateSettings
from pseudolabel.teachers import parse_teacher
from pseudolabel.views.augment import ViewPlan, library_versions

# ---------------------------------------------------------------------------------- identity


def test_stores_of_the_clean_view_keep_their_fingerprint(tmp_path: Path) -> None:
    teacher = parse_teacher(f"checkpoint:{make_model(tmp_path / 'm')}").load(CPU)
    plain = identify(teacher, AnnotateSettings(precision="fp32"))
    assert plain.views == {"count": 1}
    idle = AnnotateSettings(precision="fp32", view_seed=5, view_policy="none", crop_scale=(0.5, 1.0))
    assert identify(teacher, idle).fingerprint == plain.fingerprint
    assert identify(teacher, AnnotateSettings(precision="fp32", tta="flip")).views == {"count": 1, "tta": "flip"}


def test_all_that_decides_the_views_is_in_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = parse_teacher(f"checkpoint:{make_model(tmp_path / 'm')}").load(CPU)
    changes: list[dict[str, Any]] = [
        {},
        {"views": 4},
        {"view_seed": 1},
        {"view_policy": "none"},
        {"crop_scale": (0.3, 1.0)},
        {"tta": "flip"},
    ]
    fingerprints = {
        identify(teacher, AnnotateSettings(precision="fp32", **{"views": 3, **change})).fingerprint
        for change in changes
    }
    identity = identify(teacher, AnnotateSettings(precision="fp32", views=3))
    versions = identity.views["versions"]
    assert versions == library_versions()
    assert set(versions) == {"numpy", "pillow", "torch", "torchvision"}
    assert all(version.replace(".", "").isdecimal() and version.count(".") == 2 for version in versions.values())
    monkeypatch.setattr(torch, "__version__", "1.2.3+cpu")
    assert library_versions()["torch"] == "1.2.3"
    fingerprints.add(identify(teacher, AnnotateSettings(precision="fp32", views=3)).fingerprint)
    assert len(fingerprints) == len(changes) + 1


def test_a_plan_survives_json() -> None:
    for plan in (ViewPlan(), ViewPlan(tta="flip"), ViewPlan(4, 9, "none", (0.1, 0.5), "flip")):
        assert ViewPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    with pytest.raises(StoreError, match="law 2, this version knows 1"):
        ViewPlan.from_json({**ViewPlan(2).to_json(), "law": 2})


def test_settings_refuse_nonsense() -> None:
    for bad in ({"views": 0}, {"tta": "rotate"}, {"crop_scale": (0.5, 0.2)}, {"crop_scale": (0, 1)}, {"view_seed": -1}):
        with pytest.raises(RecipeError):
            validate(AnnotateSettings, bad, "annotate")


# ---------------------------------------------------------------------------------- readers


def test_the_command_makes_views_and_says_what_has_no_effect(
    invoke: Invoke, corpus: Path, teacher_dir: Path, tmp_path: Path
) -> None:
    def run(*args: object, code: int = 0) -> tuple[dict[str, Any], str]:
        found, out, err = invoke(*args, "--json")
        assert found == code, err
        return json.loads(out), err

    store = tmp_path / "store"
    base = ("annotate", corpus / "unlabeled", "--teacher", f"checkpoint:{teacher_dir}", "--workers", 1)
    result, err = run(*base, "--out", store, "--views", 2, "--view-seed", 3, "--view-policy", "none", "--tta", "flip")
    assert (result["samples"], "no effect" in err) == (72, False)
    views = open_store(store).identity.views
    assert {name: views[name] for name in ("count", "seed", "policy", "tta")} == {
        "count": 2,
        "seed": 3,
        "policy": "none",
        "tta": "flip",
    }
    inspected, _ = run("inspect", store)
    assert (inspected["rows"], inspected["views"]) == (144, 2)
    _, err = run(*base, "--out", tmp_path / "other", "--view-seed", 3)
    assert "note: with --views 1, --view-seed have no effect" in err
    for wrong, kind in ((("--view-policy", "sepia"), "SpecError"), (("--tta", "rotate"), "RecipeError")):
        failed, _ = run(*base, "--out", tmp_path / "third", "--views", 2, *wrong, code=1)
        assert failed["error"]["kind"] == kind
    assert not (tmp_path / "third").exists()
