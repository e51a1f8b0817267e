"""What `train` and `run` make of selections and calibrations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import HERE, SMALL, Invoke
from conftest import make_model
from stores import known

from pseudolabel.annotate import annotate
from pseudolabel.calibration import Calibration, read_calibration
from pseudolabel.dataset import TrainingBatches
from pseudolabel.duplicates.ledger import Leak, write_leaks
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import LabelError, OutputExists, SelectionError, SpecError, StoreMismatch
from pseudolabel.labels.encodings import Dense, TopK, parse_encoding
from pseudolabel.labels.store import Store, open_store
from pseudolabel.labels.targets import StoredTargets
from pseudolabel.losses import kd
from pseudolabel.place import Place
from pseudolabel.recipe import load_recipe
from pseudolabel.rounds import run
from pseudolabel.selection import open_selection
from pseudolabel.selection.select import select
from pseudolabel.settings import AnnotateSettings, AugmentSettings, SelectSettings, TrainSettings
from pseudolabel.shard_lists import Shard, list_shards
from pseudolabel.shards import shard_sha256
from pseudolabel.train import train
from pseudolabel.training.inputs import gather
from pseudolabel.views.image import square

SHORT = TrainSettings(student="small:resnet8?width=4", image_size=12, channels=1, steps=4, batch_size=8, eval_every=4)
ENGINE = LocalEngine("cpu", 1)


def _store(corpus: Path, tmp_path: Path, name: str = "store", encoding: str = "dense", seed: int = 0) -> Store:
    teacher = make_model(tmp_path / f"teacher-{seed}", seed=seed)
    settings = AnnotateSettings(precision="fp32", encoding=encoding)
    shards = [*list_shards(corpus / "unlabeled"), *list_shards(corpus / "val")]
    annotate(shards, f"checkpoint:{teacher}", tmp_path / name, engine=ENGINE, settings=settings)
    return open_store(tmp_path / name)


def _weights(run: Path) -> bytes:
    return (run / "model.safetensors").read_bytes()


def test_batches_hold_the_selected_rows_and_their_weights_and_no_others(corpus: Path, tmp_path: Path) -> None:
    """Over an epoch every selected row comes once, with its own label and weight."""
    store = _store(corpus, tmp_path)
    select(store, tmp_path / "s", SelectSettings(top_per_class=9, weight="confidence"))
    selection = open_selection(tmp_path / "s")
    data, _ = gather([], list_shards(corpus / "unlabeled"), store, selection=selection)
    total = sum(one.rows for one in data.unlabeled)
    assert total == selection.facts["selected"] < 72
    clean = AugmentSettings(crop="none", flip=False)
    batches = TrainingBatches(data, square(12, 1), clean, batch_size=total, labeled_fraction=0, seed=3, steps=1)
    batch = batches[0]
    assert batch.targets is not None
    assert batch.soft_weight_B is not None
    wanted = []
    for shard in list_shards(corpus / "unlabeled"):
        part = {row["index"]: row for row in store.read(shard.name).to_pylist()}
        for row in selection.read(shard.name, store.info(shard.name).sha256).to_pylist():
            wanted.append((tuple(part[row["index"]]["logits"]), round(row["weight"], 6)))
    found = zip(batch.targets.columns["logits"].tolist(), batch.soft_weight_B.tolist(), strict=True)
    assert sorted((tuple(logits), round(weight, 6)) for logits, weight in found) == sorted(wanted)


def test_a_selection_changes_what_is_learned_and_is_part_of_the_run(corpus: Path, tmp_path: Path) -> None:
    store = _store(corpus, tmp_path)
    select(store, tmp_path / "all")
    select(store, tmp_path / "few", SelectSettings(top_per_class=3))
    sets = {"unlabeled": corpus / "unlabeled", "labeled": corpus / "labeled", "store": store, "threads": 1}
    for name, options in (
        ("plain", {}),
        ("all", {"selection": tmp_path / "all"}),
        ("few", {"selection": tmp_path / "few"}),
        ("loud", {"calibration": Calibration(store.fingerprint, 0.2)}),
    ):
        train(SHORT, tmp_path / f"run-{name}", **sets, **options)  # type: ignore[arg-type]
    assert _weights(tmp_path / "run-plain") == _weights(tmp_path / "run-all"), "all rows with weight 1 are all rows"
    assert len({_weights(tmp_path / f"run-{name}") for name in ("plain", "few", "loud")}) == 3
    with pytest.raises(OutputExists):
        train(SHORT, tmp_path / "run-all", **sets, selection=tmp_path / "few")  # type: ignore[arg-type]
    with pytest.raises(OutputExists):
        train(SHORT, tmp_path / "run-plain", **sets, calibration=Calibration(store.fingerprint, 2.0))  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused_before_training(corpus: Path, tmp_path: Path) -> None:
    store, other = _store(corpus, tmp_path), _store(corpus, tmp_path, "other", seed=1)
    select(store, tmp_path / "s", SelectSettings(min_confidence=0.0))
    sets = {"unlabeled": corpus / "unlabeled", "threads": 1}
    with pytest.raises(StoreMismatch, match=r"selects from the store with fingerprint"):
        train(SHORT, tmp_path / "run", **sets, store=other, selection=tmp_path / "s")  # type: ignore[arg-type]
    with pytest.raises(StoreMismatch, match="calibrate this store"):
        train(SHORT, tmp_path / "run", **sets, store=other, calibration=Calibration(store.fingerprint, 2.0))  # type: ignore[arg-type]
    with pytest.raises(LabelError, match="a selection or calibration is about soft labels"):
        train(SHORT, tmp_path / "run", labeled=corpus / "labeled", selection=tmp_path / "s")
    (tmp_path / "store" / "parts" / "unlabeled-2.parquet").unlink()
    select(store, tmp_path / "fewer")
    again = _store(corpus, tmp_path)
    with pytest.raises(SelectionError, match=r"unlabeled-2.tar: was not in the store when .*fewer was made"):
        train(SHORT, tmp_path / "run", **sets, store=again, selection=tmp_path / "fewer")  # type: ignore[arg-type]
    drawn = _store(corpus, tmp_path, "drawn", "sampled:5@2")
    with pytest.raises(SpecError, match="drawn at temperature 2"):
        train(SHORT, tmp_path / "run", **sets, store=drawn, calibration=Calibration(drawn.fingerprint, 2.0))  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_shard_that_was_replaced_since_the_selection_is_refused(
    corpus: Path, tmp_path: Path, make_shard: Callable[..., Path]
) -> None:
    """Also though it was annotated again: positions mean other images now."""
    store = _store(corpus, tmp_path)
    select(store, tmp_path / "s")
    first, second = (corpus / "unlabeled" / f"unlabeled-{number}.tar" for number in (0, 1))
    first.write_bytes(second.read_bytes())
    second.unlink()
    (tmp_path / "store" / "parts" / "unlabeled-0.parquet").unlink()
    (tmp_path / "store" / "parts" / "unlabeled-1.parquet").unlink()
    again = _store(corpus, tmp_path)
    with pytest.raises(SelectionError, match="'unlabeled-0' was replaced since this was selected"):
        train(SHORT, tmp_path / "run", unlabeled=corpus / "unlabeled", store=again, selection=tmp_path / "s", threads=1)


@pytest.mark.parametrize("encoding", ["dense", "topk:3"])
def test_the_loss_of_calibrated_labels_is_that_of_the_mapped_logits(encoding: str) -> None:
    """A temperature keeps a sparse label's bucket; a vector or a prior correction is over all classes."""
    teacher, student = known(20, 6, 0)[0], known(20, 6, 1)[0]
    made = parse_encoding(encoding)
    columns = {"pred": teacher.argmax(-1), **made.encode(teacher, torch.zeros(20).long())}
    told = StoredTargets(made, columns)
    hot = kd(student, told.read_as("bucket", Calibration("s", 1.5)), 2.0)
    p_BM, q_BM = made.log_probs(columns, (student / 2).log_softmax(-1), 3.0)
    torch.testing.assert_close(hot, 4 * (p_BM.exp() * (p_BM - q_BM)).sum(-1))
    if isinstance(made, Dense):
        mapped = (teacher / 1.5).log_softmax(-1)
        torch.testing.assert_close(hot, 4 * _kl((teacher / 3).log_softmax(-1), student / 2), rtol=1e-2, atol=1e-3)
        shift = torch.tensor([0.5, -0.5, 0.0, 1.0, 0.0, -1.0])
        shifted = kd(student, told.read_as("bucket", Calibration("s", 1.5, shift=tuple(shift.tolist()))), 2.0)
        wanted = 4 * _kl(((mapped + shift) / 2).log_softmax(-1), student / 2)
        torch.testing.assert_close(shifted, wanted, rtol=1e-2, atol=1e-3)
    else:
        assert isinstance(made, TopK)
        assert p_BM.shape == (20, 4)


def _kl(p_BC: torch.Tensor, student_BC: torch.Tensor) -> torch.Tensor:
    return (p_BC.exp() * (p_BC - student_BC.log_softmax(-1))).sum(-1)


@pytest.fixture
def recipe_file(corpus: Path, tmp_path: Path) -> Path:
    data = "".join(f'{split} = "{corpus / split}"\n' for split in ("labeled", "unlabeled", "val"))
    student = 'student = "small:resnet8?width=4"\nimage_size = 12\nchannels = 1\nbatch_size = 16\nsteps = 6\n'
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'[data]\n{data}leaks = "none"\n[teacher.train]\n{student}[train]\n{student}[rounds]\ncount = 2\n'
        "[calibrate]\n[select]\ntop_per_class = 5\n"
    )
    return path


def test_a_recipes_rounds_calibrate_and_select(
    recipe_file: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the validation rows, which are annotated, too, and never trained on; a run that goes on makes the same."""
    from pseudolabel.calibration import evidence

    monkeypatch.setattr(evidence, "FEWEST_ROWS", 20)
    place = Place(ENGINE, threads=1)
    run(load_recipe(recipe_file), tmp_path / "run", place)
    for number in (1, 2):
        directory = tmp_path / "run" / f"round-{number}"
        store = open_store(directory / "store")
        assert store.part_names() == ["unlabeled-0", "unlabeled-1", "unlabeled-2", "val-0"]
        calibration = read_calibration(directory / "calibration.json")
        assert calibration.store == store.fingerprint
        assert calibration.facts["evidence"] == ["val-0"]
        facts = open_selection(directory / "selection").facts
        assert facts["selected"] <= 20
        assert facts["calibration"]["fingerprint"] == calibration.fingerprint
        assert facts["shards"]["val-0"] == 0
        identity = json.loads((directory / "student" / "run.json").read_text())
        assert facts["fingerprint"] in json.dumps(identity)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.parquet")}
    weights = _weights(tmp_path / "run" / "round-2" / "student")
    (tmp_path / "run" / "run.json").unlink()
    run(load_recipe(recipe_file), tmp_path / "run", place)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.parquet")} == before
    shutil.rmtree(tmp_path / "run" / "round-2" / "student")
    run(load_recipe(recipe_file), tmp_path / "run", place)
    assert _weights(tmp_path / "run" / "round-2" / "student") == weights


def test_errors_of_a_run_name_the_recipes_keys(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no flag to lower in a recipe."""
    from pseudolabel.calibration import evidence

    monkeypatch.setattr(evidence, "FEWEST_ROWS", 20)
    rules = ("select.target_precision=0.99", "select.min_confidence=0.1")
    with pytest.raises(SelectionError, match=r"or lower select\.target_precision or select\.certainty$"):
        run(load_recipe(recipe_file, rules), tmp_path / "run", Place(ENGINE, threads=1))
    with pytest.raises(SelectionError, match=r"rows passes select\.min_margin 1; .*\nloosen select\.min_margin$"):
        run(load_recipe(recipe_file, ("select.min_margin=1",)), tmp_path / "other", Place(ENGINE, threads=1))


def test_other_leaks_than_a_trained_rounds_are_refused(
    recipe_file: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe names a file: if that was made anew between two runs, round 1 left out other samples than round 2,
    and nobody said so.
    """
    from pseudolabel.calibration import evidence

    monkeypatch.setattr(evidence, "FEWEST_ROWS", 20)
    sha256 = {path.stem: shard_sha256(Shard(path.stem, str(path))) for path in (corpus / "unlabeled").iterdir()}
    path, leak = tmp_path / "leaks.parquet", ("near", 2, 0.99, "val-0", "x", 1)
    facts = {"shards": sha256, "against": {"val-0": "0" * 64}}
    recipe = load_recipe(recipe_file, (f"data.leaks={path}", "rounds.count=1", "rounds.control=false"))
    write_leaks(path, [Leak("unlabeled-0", 3, "x", *leak)], facts)
    run(recipe, tmp_path / "run", Place(ENGINE, threads=1))
    run(recipe, tmp_path / "run", Place(ENGINE, threads=1))
    for now in ([Leak("unlabeled-0", 4, "x", *leak)], []):
        write_leaks(path, now, facts)
        with pytest.raises(SelectionError, match=r"leaves out other samples than data\.leaks names now"):
            run(recipe, tmp_path / "run", Place(ENGINE, threads=1))


def test_the_commands_together(corpus: Path, tmp_path: Path, invoke: Invoke) -> None:
    store = _store(corpus, tmp_path)
    calibration = Calibration(store.fingerprint, 1.3)
    (tmp_path / "c.json").write_text(json.dumps(calibration.to_json()))
    trust = ("--calibration", tmp_path / "c.json")
    code, out, _ = invoke("select", tmp_path / "store", "--out", tmp_path / "s", *trust, "--top-per-class", 6, "--json")
    chosen = json.loads(out)
    data = ("--unlabeled", corpus / "unlabeled", "--labels", tmp_path / "store", "--selection", tmp_path / "s", *trust)
    how = (*SMALL, *HERE, "--workers", 0, "--epochs", 3, "--batch-size", 8, "--tail", "uniform", "--json")
    code, out, _ = invoke("train", "--out", tmp_path / "run", *data, *how)
    found = json.loads(out)
    assert code == 0
    assert found["steps"] == max(1, round(3 * chosen["selected"] / 8))
