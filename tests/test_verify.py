"""verify: whatever is wrong with a store is found, nothing in an intact one is, and --repair costs one part."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from commands import Invoke, annotated
from conftest import image_bytes, make_model

from pseudolabel import verify
from pseudolabel.checkpoint import ModelCard, save_model
from pseudolabel.errors import DamagedPart, SpecError, StoreError, StoreMismatch
from pseudolabel.interfaces import Teacher
from pseudolabel.labeling.work import annotate_shard, identify
from pseudolabel.labels import schema, store
from pseudolabel.labels.store import open_store
from pseudolabel.labels.verify import _Checking
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import Shard, list_shards
from pseudolabel.shards import write_shard
from pseudolabel.teachers import parse_teachers
from pseudolabel.views.image import square

CLASSES = 7
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "topk": {"encoding": "topk:3"},
    "all": {"encoding": f"topk:{CLASSES}"},
    "dense8": {"encoding": "dense8"},
    "sampled": {"encoding": "sampled:20@2"},
    "views": {"encoding": "topk:3", "views": 3},
    "members": {"keep_members": True, "encoding": "topk:2"},
    "mirrored": {"tta": "flip", "views": 2},
}


@dataclass(frozen=True)
class Made:
    """A store of the shards a, and b with two rejects; its teacher; and one of another teacher beside it."""

    root: Path
    other: Path
    shards: list[Shard]
    teacher: Teacher

    def copy(self, directory: Path) -> Made:
        shutil.rmtree(directory, ignore_errors=True)
        return replace(self, root=shutil.copytree(self.root, directory))


def _opinionated(directory: Path, seed: int) -> Path:
    """A random teacher that tells random images apart."""
    torch.manual_seed(seed)
    card = ModelCard("small:resnet8?width=4", tuple(f"class {index}" for index in range(CLASSES)), square(12, 1))
    model = card.build()
    with torch.no_grad():
        head = [parameter for parameter in model.parameters() if parameter.ndim == 2][-1]
        head.mul_(100).sub_(head.mean(0))
    save_model(directory, card, model)
    return directory


def _annotate(shards: list[Shard], teacher: Teacher, out: Path, settings: AnnotateSettings) -> None:
    loaded = teacher.load(torch.device("cpu"))
    opened = store.create(out, identify(loaded, settings))
    for shard in shards:
        found = annotate_shard(shard, loaded, settings)
        opened.commit(found.info, found.part, found.rejects)


@pytest.fixture(scope="module")
def make_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """The store of a case, made once."""
    root = tmp_path_factory.mktemp("made")
    models = [f"checkpoint:{_opinionated(root / f'model-{seed}', seed)}" for seed in range(3)]
    for name in ("a", "b"):
        samples = [(f"{name}/{index}", {"png": image_bytes(index), "cls": b"%d" % (index % 9)}) for index in range(12)]
        if name == "b":
            samples[4], samples[9] = ("b/4", {"png": b"broken"}), ("b/9", {"png": image_bytes(9), "cls": b"?"})
        write_shard(root / "shards" / f"{name}.tar", samples)
    shards, made = list_shards(root / "shards"), dict[str, Made]()

    def make(case: str) -> Made:
        if case not in made:
            settings = AnnotateSettings(precision="fp32", batch_size=5, **CASES[case])
            several = 2 if settings.keep_members else 1
            teacher, another = parse_teachers(models[:several]), parse_teachers(models[3 - several :])
            _annotate(shards, teacher, root / case, settings)
            _annotate(shards, another, root / f"other-{case}", settings)
            made[case] = Made(root / case, root / f"other-{case}", shards, teacher)
        return made[case]

    return make


def _flipped(content: bytes, position: int, bit: int = 0) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_wrong_with_an_intact_store(case: str, make_store: Callable[[str], Made]) -> None:
    """Alone, beside its shards, and every sample of it annotated again."""
    made = make_store(case)
    rows = 22 * CASES[case].get("views", 1)
    for found in (verify(made.root), verify(made.root, made.shards)):
        assert (found.ok, found.problems, found.parts, found.rows) == (True, (), 2, rows)
        assert (found.compared, found.worst_kl, found.worst_row) == (0, None, None)
    again = verify(made.root, made.shards, teacher=made.teacher, sample=1.0)
    assert (again.ok, again.compared) == (True, 24), again.problems
    assert again.worst_kl is not None
    assert again.worst_kl < 1e-5
    assert verify(made.root, made.shards, repair=True).repaired == ()


@pytest.mark.parametrize("case", ["dense", "topk"])
@pytest.mark.parametrize("kind", ["parts", "rejects"])
def test_every_flipped_byte_is_found(case: str, kind: str, tmp_path: Path, make_store: Callable[[str], Made]) -> None:
    """Each position of a file, a bit at random in each; and as damage that --repair may delete."""
    made = make_store(case).copy(tmp_path / "store")
    (made.root / "parts" / "a.parquet").unlink()
    opened, path = open_store(made.root), made.root / kind / "b.parquet"
    whole, bits = path.read_bytes(), random.Random(0)
    assert len(whole) > 2000
    assert verify(opened).ok
    checking = _Checking(opened, {}, None)
    for position in range(len(whole)):
        path.write_bytes(_flipped(whole, position, bits.randrange(8)))
        if position % 100 == 0:
            checking = _Checking(opened, {}, None)
            checking.run()
            assert [(one.part, one.kind) for one in checking.problems] == [("b", "DamagedPart")]
        with pytest.raises(DamagedPart):
            checking.check("b")
    path.write_bytes(whole)
    assert verify(opened).ok


# --- a hundred ways to spoil a store

Spoil = Callable[[Made, random.Random], None]


def _file(made: Made, chance: random.Random) -> Path:
    return chance.choice(sorted(made.root.glob("*/*.parquet")))


def _bytes(change: Callable[[bytes, random.Random], bytes]) -> Spoil:
    def spoil(made: Made, chance: random.Random) -> None:
        path = _file(made, chance)
        whole = path.read_bytes()
        path.write_bytes(change(whole, chance))
        assert path.read_bytes() != whole

    return spoil


def _zero(content: bytes, chance: random.Random) -> bytes:
    start = chance.choice([at for at, byte in enumerate(content) if byte])
    return content[:start] + bytes(min(512, len(content) - start)) + content[start + 512 :]


def _resealed(change: Callable[[pa.Table, random.Random], pa.Table], **facts: object) -> Spoil:
    """A part that was edited by someone who knows how to seal it."""

    def spoil(made: Made, chance: random.Random) -> None:
        path = made.root / "parts" / f"{chance.choice('ab')}.parquet"
        info, table = schema.read_info(path), schema.read_table(path)
        schema.write_sealed(path, change(table, chance), {**info.to_json(), **facts})

    return spoil


def _cell(name: str, value: object, row: int | None = None) -> Callable[[pa.Table, random.Random], pa.Table]:
    """Another value in a row; of a list, in its first element."""

    def change(table: pa.Table, chance: random.Random) -> pa.Table:
        values, at = table[name].to_pylist(), chance.randrange(table.num_rows) if row is None else row
        values[at] = [value, *values[at][1:]] if isinstance(values[at], list) and not isinstance(value, list) else value
        field = table.schema.field(name)
        return table.set_column(table.schema.get_field_index(name), field, pa.array(values, field.type))

    return change


def _same(table: pa.Table, _: random.Random) -> pa.Table:
    return table


def _swap_rows(table: pa.Table, chance: random.Random) -> pa.Table:
    order = list(range(table.num_rows))
    one, two = chance.sample(order, 2)
    order[one], order[two] = two, one
    return table.take(order)


def _twice(table: pa.Table, chance: random.Random) -> pa.Table:
    row = chance.randrange(table.num_rows)
    return pa.concat_tables([table.slice(0, row), table.slice(row, 1), table.slice(row)])


def _one_key(table: pa.Table, chance: random.Random) -> pa.Table:
    return _cell("key", table["key"][0].as_py(), row=chance.randrange(3, table.num_rows))(table, chance)


def _turned_labels(table: pa.Table, _: random.Random) -> pa.Table:
    """All columns of logits one row on: a writer's bug that hashes don't see."""
    first = table.schema.names.index("margin") + 1
    turned = table.take([*range(1, table.num_rows), 0])
    return pa.table([*table.columns[:first], *turned.columns[first:]], schema=table.schema)


def _of_type(name: str, kind: pa.DataType) -> Callable[[pa.Table, random.Random], pa.Table]:
    def change(table: pa.Table, _: random.Random) -> pa.Table:
        place = table.schema.get_field_index(name)
        return table.set_column(place, pa.field(name, kind, nullable=False), table[name].cast(kind))

    return change


def _rejects(change: Callable[[pa.Table, random.Random], pa.Table]) -> Spoil:
    def spoil(made: Made, chance: random.Random) -> None:
        path = made.root / "rejects" / "b.parquet"
        metadata, table = schema.read_metadata(path), schema.read_table(path)
        schema.write_sealed(path, change(table, chance), metadata)

    return spoil


def _moved(kind: str, old: str, new: str) -> Spoil:
    return lambda made, _: made.root.joinpath(kind, f"{old}.parquet").rename(made.root / kind / f"{new}.parquet")


def _copied(kind: str, old: str, new: str, *, other: bool = False) -> Spoil:
    def spoil(made: Made, _: random.Random) -> None:
        shutil.copy((made.other if other else made.root) / kind / f"{old}.parquet", made.root / kind / f"{new}.parquet")

    return spoil


def _swapped(made: Made, _: random.Random) -> None:
    one, two = (made.root / "parts" / f"{name}.parquet" for name in "ab")
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


def _rewritten(made: Made, chance: random.Random) -> None:
    path = _file(made, chance)
    pq.write_table(pq.read_table(path), path)


def _stranger(where: str, content: bytes | None = b"?") -> Spoil:
    def spoil(made: Made, _: random.Random) -> None:
        path = made.root / where
        path.mkdir() if content is None else path.write_bytes(content)

    return spoil


def _users_table(made: Made, _: random.Random) -> None:
    pq.write_table(pa.table({"mine": [1, 2]}), made.root / "parts" / "mine.parquet")


def _edited_store(made: Made, _: random.Random) -> None:
    path = made.root / "store.json"
    path.write_text(path.read_text().replace('"class 1"', '"class one"'))


ANY: dict[str, Spoil] = {
    "flip": _bytes(lambda content, chance: _flipped(content, chance.randrange(len(content)), chance.randrange(8))),
    "truncate": _bytes(lambda content, chance: content[: chance.randrange(len(content))]),
    "tail only": _bytes(lambda content, chance: content[chance.randrange(1, len(content)) :]),
    "zeros": _bytes(_zero),
    "appended": _bytes(lambda content, chance: content + chance.randbytes(chance.randrange(1, 99))),
    "empty": _bytes(lambda content, chance: b""),
    "noise": _bytes(lambda content, chance: chance.randbytes(len(content))),
    "rewritten": _rewritten,
    "swapped parts": _swapped,
    "renamed part": _moved("parts", "a", "c"),
    "renamed rejects": _moved("rejects", "b", "a"),
    "copied part": _copied("parts", "a", "c"),
    "part of another store": _copied("parts", "a", "a", other=True),
    "rejects of another store": _copied("rejects", "b", "b", other=True),
    "orphan of another store": _copied("rejects", "b", "z", other=True),
    "orphan of another shard": _copied("rejects", "b", "z"),
    "rejects gone": lambda made, _: (made.root / "rejects" / "b.parquet").unlink(),
    "part gone": lambda made, _: (made.root / "parts" / "a.parquet").unlink(),
    "notes": _stranger("parts/notes.txt"),
    "directory": _stranger("parts/d.parquet", None),
    "hidden": _stranger("rejects/.b.parquet"),
    "beside": _stranger("model.safetensors"),
    "below": _stranger("old", None),
    "user's table": _users_table,
    "edited identity": _edited_store,
    "no key column": _resealed(lambda table, _: table.drop_columns(["key"])),
    "a column more": _resealed(lambda table, _: table.append_column("x", table["pred"])),
    "columns turned": _resealed(lambda table, _: table.select([*table.column_names[1:], table.column_names[0]])),
    "int64 pred": _resealed(_of_type("pred", pa.int64())),
    "float64 entropy": _resealed(_of_type("entropy", pa.float64())),
    "rows swapped": _resealed(_swap_rows),
    "row twice": _resealed(_twice),
    "row lost": _resealed(lambda table, chance: table.slice(chance.randrange(1, 3))),
    "no rows": _resealed(lambda table, _: table.slice(0, 0)),
    "key twice": _resealed(_one_key),
    "another key": _resealed(_cell("key", "stranger")),
    "index": _resealed(_cell("index", 11, row=0)),
    "view": _resealed(_cell("view", 7)),
    "pred below": _resealed(_cell("pred", -1)),
    "pred above": _resealed(_cell("pred", CLASSES)),
    "label below": _resealed(_cell("label", -2)),
    "label of another": _resealed(_cell("label", 8, row=0)),
    "label lost": _resealed(_cell("label", None)),
    "confidence above": _resealed(_cell("confidence", 1.25)),
    "confidence below": _resealed(_cell("confidence", 0.01)),
    "confidence NaN": _resealed(_cell("confidence", float("nan"))),
    "entropy below": _resealed(_cell("entropy", -0.5)),
    "entropy infinite": _resealed(_cell("entropy", float("inf"))),
    "margin above": _resealed(_cell("margin", 1.0)),
    "samples": _resealed(_same, samples=13),
    "samples as text": _resealed(_same, samples="12"),
    "rejects": _resealed(_same, rejects=1),
    "sha256": _resealed(_same, sha256="0" * 64),
    "size": _resealed(_same, size=1),
    "classes": _resealed(_same, num_classes=8),
    "encoding": _resealed(_same, encoding="topk:4"),
    "fingerprint": _resealed(_same, fingerprint="0" * 64),
    "version": _resealed(_same, format_version=2),
    "fidelity": _resealed(_same, fidelity={"mean": {}, "p99": {}}),
    "reject's index": _rejects(_cell("index", 3, row=0)),
    "reject's key": _rejects(_cell("key", "stranger")),
    "reject's shard": _rejects(_cell("shard", "a")),
    "reject's stage": _rejects(_cell("stage", "?")),
    "reject twice": _rejects(_twice),
    "no rejects": _rejects(lambda table, _: table.slice(0, 0)),
}
OWN: dict[str, dict[str, Spoil]] = {
    "dense": {
        "logit above 0": _resealed(_cell("logits", 0.5)),
        "logit NaN": _resealed(_cell("logits", float("nan"))),
        "logit infinite": _resealed(_cell("logits", -float("inf"))),
        "no logit 0": _resealed(_cell("logits", [-1.0] * CLASSES)),
        "null logit": _resealed(_cell("logits", None)),
        "labels turned": _resealed(_turned_labels),
    },
    "topk": {
        "id above": _resealed(_cell("topk_id", CLASSES)),
        "id twice": _resealed(_cell("topk_id", [1, 2, 1])),
        "kept rises": _resealed(_cell("topk_logit", [0.0, -2.0, -1.0])),
        "kept from -1": _resealed(_cell("topk_logit", -0.25)),
        "lse below": _resealed(_cell("lse", -1.0)),
        "tail above": _resealed(_cell("tail_mean", 1.0)),
        "variance below": _resealed(_cell("tail_var", -1.0)),
        "variance NaN": _resealed(_cell("tail_var", float("nan"))),
        "labels turned": _resealed(_turned_labels),
    },
    "all": {"a tail of none": _resealed(_cell("tail_mean", -1.0))},
    "dense8": {
        "no 255": _resealed(_cell("logits8", [0] * CLASSES)),
        "least above": _resealed(_cell("logit_min", 1.0)),
        "least below": _resealed(_cell("logit_min", -101.0)),
        "labels turned": _resealed(_turned_labels),
    },
    "sampled": {
        "id above": _resealed(_cell("sample_id", [CLASSES])),
        "ids fall": _resealed(_cell("sample_id", 6)),
        "counts": _resealed(_cell("sample_count", 19)),
        "none drawn": _resealed(_cell("sample_count", 0)),
        "lengths": _resealed(_cell("sample_id", [])),
    },
    "views": {
        "crop outside": _resealed(_cell("crop", [0.5, 0.0, 0.75, 1.0], row=1)),
        "crop empty": _resealed(_cell("crop", [0.5, 0.0, 0.0, 1.0], row=4)),
        "crop NaN": _resealed(_cell("crop", [float("nan"), 0.0, 0.5, 0.5], row=4)),
        "not clean": _resealed(_cell("flip", True, row=3)),
        "seed": _resealed(_cell("aug_seed", -1, row=2)),
        "two keys": _resealed(_cell("key", "stranger", row=1)),
    },
    "members": {
        "member's id": _resealed(_cell("member1_topk_id", CLASSES)),
        "member lost": _resealed(lambda table, _: table.drop_columns(["member0_lse"])),
        "member's logit": _resealed(_cell("member0_topk_logit", 1.0)),
    },
    "mirrored": {},
}


def _found(made: Made) -> str | None:
    """What verify says first of a spoiled store."""
    try:
        result = verify(made.root, made.shards)
    except StoreError as error:
        return error.kind
    assert result.ok == (not result.problems)
    return None if result.ok else result.problems[0].kind


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_corruption_is_found_in_every_store(
    case: str, tmp_path: Path, make_store: Callable[[str], Made]
) -> None:
    intact = make_store(case)
    missed = []
    for number, (name, spoil) in enumerate({**ANY, **OWN[case]}.items()):
        made = intact.copy(tmp_path / "store")
        spoil(made, random.Random(number))
        if _found(made) is None:
            missed.append(name)
    assert missed == []


def test_of_a_hundred_corruptions_a_hundred_are_found(tmp_path: Path, make_store: Callable[[str], Made]) -> None:
    """Drawn at random, several at once at times, and between them nothing is found in the intact stores."""
    chance, found = random.Random(20), 0
    for _ in range(100):
        case = chance.choice(list(CASES))
        intact = make_store(case)
        kinds = {**ANY, **OWN[case]}
        made = intact.copy(tmp_path / "store")
        kinds[name := chance.choice(list(kinds))](made, chance)
        assert _found(made) is not None, (case, name)
        assert verify(intact.root, intact.shards).ok
        found += 1
    assert found == 100


# --- annotated again


def _edit(root: Path, shard: str, change: Callable[[pa.Table, random.Random], pa.Table], **facts: object) -> None:
    path = root / "parts" / f"{shard}.parquet"
    info = schema.read_info(path)
    table = change(schema.read_table(path), random.Random(0))
    schema.write_sealed(path, table, {**info.to_json(), **facts})


def _other_rows(table: pa.Table, _: random.Random) -> pa.Table:
    """Rows 2 and 3 with each other's labels: sealed, and nothing in the store contradicts it."""
    first = table.schema.names.index("pred")
    turned = table.take([0, 1, 3, 2, *range(4, table.num_rows)])
    return pa.table([*table.columns[:first], *turned.columns[first:]], schema=table.schema)


@pytest.mark.parametrize("case", CASES)
def test_labels_of_other_rows_are_found_by_annotating_again(
    case: str, tmp_path: Path, make_store: Callable[[str], Made]
) -> None:
    made = make_store(case).copy(tmp_path / "store")
    _edit(made.root, "a", _other_rows)
    assert verify(made.root, made.shards).ok
    found = verify(made.root, made.shards, teacher=made.teacher, sample=1.0)
    (problem,) = found.problems
    assert (problem.part, problem.kind, found.ok, found.compared) == ("a", "OtherLabels", False, 24)
    assert "2 of " in problem.detail
    assert found.worst_kl is not None
    assert found.mean_kl is not None
    assert found.worst_kl > 0.01 > found.mean_kl / 22
    assert "a.tar: view" in str(found.worst_row)
    lenient = verify(made.root, made.shards, teacher=made.teacher, sample=1.0, tolerance=found.worst_kl + 1)
    assert lenient.ok, lenient.problems


def test_what_must_be_equal_is_compared_exactly(tmp_path: Path, make_store: Callable[[str], Made]) -> None:
    """A view's seed, a summary, and a sample that is said to be rejected."""
    made = make_store("views")
    row = schema.read_table(made.root / "parts" / "a.parquet").slice(4, 1).to_pylist()[0]
    for name, value in (("aug_seed", 5), ("flip", not row["flip"]), ("entropy", 0.0), ("margin", row["confidence"])):
        spoiled = made.copy(tmp_path / "store")
        _edit(spoiled.root, "a", _cell(name, value, row=4))
        assert verify(spoiled.root, made.shards).ok
        (problem,) = verify(spoiled.root, made.shards, teacher=made.teacher, sample=1.0).problems
        assert problem.kind == "OtherLabels"
        assert f"another {name}" in problem.detail
    spoiled = made.copy(tmp_path / "store")
    opened = open_store(spoiled.root)
    info, part = opened.info("a"), opened.read("a")
    invented = [{"shard": "a", "index": 0, "key": "a/0", "stage": "decode", "error": "ValueError", "detail": "?"}]
    opened.commit(replace(info, rejects=1), part.slice(3), pa.Table.from_pylist(invented, schema=schema.REJECT_SCHEMA))
    assert verify(opened, made.shards).ok
    (problem,) = verify(opened, made.shards, teacher=made.teacher, sample=1.0).problems
    assert "sample 'a/0' was rejected, made again it is labeled" in problem.detail


def test_the_sample_is_the_same_in_every_run_and_never_empty(make_store: Callable[[str], Made]) -> None:
    made = make_store("topk")

    def compared(sample: float, seed: int = 0, shards: slice = slice(None)) -> int:
        return verify(made.root, made.shards[shards], teacher=made.teacher, sample=sample, seed=seed).compared

    assert compared(1e-9) == 1
    assert [compared(0.5) for _ in range(2)] == [compared(0.5)] * 2
    assert compared(0.5) == compared(0.5, shards=slice(0, 1)) + compared(0.5, shards=slice(1, 2))
    assert len({compared(0.5, seed) for seed in range(8)}) > 1
    assert compared(0.25) < compared(0.75)


def test_another_teacher_is_refused(tmp_path: Path, make_store: Callable[[str], Made]) -> None:
    """Before anything is compared, and nothing is deleted."""
    made = make_store("dense").copy(tmp_path / "store")
    stranger = parse_teachers(f"checkpoint:{make_model(tmp_path / 'model', classes=CLASSES)}")
    with pytest.raises(StoreMismatch, match=r"would not give these labels:\n +teacher.weights_sha256: the store has"):
        verify(made.root, made.shards, teacher=stranger, sample=1.0, repair=True)
    shutil.copy(made.other / "store.json", made.root / "store.json")
    with pytest.raises(StoreMismatch, match="name the store's own teacher"):
        verify(made.root, made.shards, teacher=made.teacher, sample=1.0)
    assert {problem.kind for problem in verify(made.root).problems} == {"StoreMismatch"}
    assert len(list(made.root.glob("parts/*"))) == 2


def test_requests_that_make_no_sense(make_store: Callable[[str], Made]) -> None:
    made = make_store("dense")
    for arguments, said in (
        ({"sample": 0.5}, "needs --shards and --teacher"),
        ({"sample": 0.5, "teacher": made.teacher}, "needs --shards and --teacher"),
        ({"teacher": made.teacher, "shards": made.shards}, "only asked with --sample"),
        ({"sample": 1.5, "teacher": made.teacher, "shards": made.shards}, "sample is 1.5"),
        ({"sample": 1, "teacher": made.teacher, "shards": made.shards, "tolerance": 0}, "tolerance is 0"),
    ):
        with pytest.raises(SpecError, match=said):
            verify(made.root, **arguments)  # type: ignore[arg-type]


# --- repair


def test_what_was_repaired_is_annotated_again_to_the_same_bytes(
    tmp_path: Path, corpus: Path, teacher_dir: Path, invoke: Invoke
) -> None:
    shards, teacher = corpus / "unlabeled", f"checkpoint:{teacher_dir}"
    write_shard(shards / "spoiled.tar", [("good", {"png": image_bytes()}), ("bad", {"png": b"no image"})])
    root = annotated(shards, teacher_dir, tmp_path / "store")
    whole = {path: path.read_bytes() for path in root.glob("*/*.parquet")}
    parts, rejects = root / "parts", root / "rejects"
    (parts / "unlabeled-0.parquet").write_bytes(b"")
    (rejects / "spoiled.parquet").write_bytes(_flipped(whole[rejects / "spoiled.parquet"], 99))
    shutil.copy(parts / "unlabeled-1.parquet", parts / "unlabeled-2.parquet")
    asking = ("verify", root, "--shards", shards, "--sample", 1, "--teacher", teacher, "--device", "cpu", "--json")
    code, out, err = invoke(*asking)
    assert (code, len(json.loads(out)["problems"])) == (1, 3), err
    assert {path: path.read_bytes() for path in root.glob("*/*.parquet")}.keys() == whole.keys()
    code, out, err = invoke(*asking, "--repair")
    result = json.loads(out)
    assert (code, result["ok"], result["problems"]) == (0, True, [])
    assert [one["part"] for one in result["repaired"]] == ["spoiled", "unlabeled-0", "unlabeled-2"]
    assert err.count("deleted, as ") == 3
    assert {path.stem for path in root.glob("*/*.parquet")} == {"unlabeled-1"}
    annotated(shards, teacher_dir, root)
    assert {path: path.read_bytes() for path in root.glob("*/*.parquet")} == whole
    code, out, _ = invoke(*asking)
    result = json.loads(out)
    assert (code, result["ok"], result["compared"], result["repaired"]) == (0, True, 74, [])
    assert result["worst_kl"] < 1e-5


def test_repair_deletes_labels_that_differ_and_parts_of_a_replaced_shard(
    tmp_path: Path, make_store: Callable[[str], Made]
) -> None:
    made = make_store("topk").copy(tmp_path / "store")
    _edit(made.root, "a", _other_rows)
    found = verify(made.root, made.shards, teacher=made.teacher, sample=1.0, repair=True)
    assert (found.ok, [(one.part, one.kind) for one in found.repaired]) == (True, [("a", "OtherLabels")])
    assert [path.name for path in made.root.glob("*/*.parquet")] == ["b.parquet"] * 2
    write_shard(tmp_path / "b.tar", [("new", {"png": image_bytes()})])
    replaced = Shard("b", str(tmp_path / "b.tar"))
    assert [one.kind for one in verify(made.root, [replaced]).problems] == ["StoreMismatch"]
    (tmp_path / "torn.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:700])
    torn = verify(made.root, [Shard("b", str(tmp_path / "torn.tar"))], repair=True)
    assert ([one.kind for one in torn.problems], torn.repaired) == (["DamagedShard"], ()), "the labels are not at fault"
    assert verify(made.root, [replaced], repair=True).ok
    assert list(made.root.glob("*/*.parquet")) == []


def test_repair_never_deletes_what_is_foreign(tmp_path: Path, make_store: Callable[[str], Made]) -> None:
    made = make_store("dense").copy(tmp_path / "store")
    strangers = [made.root / name for name in ("notes.txt", "parts/notes.txt", "rejects/.x.parquet")]
    for path in strangers:
        path.write_text("mine")
    _users_table(made, random.Random(0))
    (made.root / "parts" / "a.parquet").write_bytes(b"torn")
    found = verify(made.root, repair=True)
    assert not found.ok
    assert {one.part for one in found.problems} == {"notes.txt", ".x.parquet", "mine"}
    assert {one.kind for one in found.problems} == {"ForeignFile"}
    assert [one.part for one in found.repaired] == ["a"]
    assert all(path.read_text() == "mine" for path in strangers)
    assert (made.root / "parts" / "mine.parquet").exists()
    _edited_store(made, random.Random(0))
    (made.root / "parts" / "b.parquet").write_bytes(b"torn")
    with pytest.raises(StoreError):
        verify(made.root, repair=True)
    assert (made.root / "parts" / "b.parquet").read_bytes() == b"torn"


def test_a_shard_whose_annotation_was_killed_is_unfinished(tmp_path: Path, make_store: Callable[[str], Made]) -> None:
    """Rejects in place, no part yet, and a temporary file: no problem, and not repair's business."""
    made = make_store("dense").copy(tmp_path / "store")
    (made.root / "parts" / "b.parquet").unlink()
    (made.root / "parts" / ".b.parquet.tmp-0123456789ab").write_bytes(b"half")
    assert verify(made.root, repair=True).ok
    assert [one.kind for one in verify(made.root, made.shards, repair=True).problems] == ["MissingPart"]
    assert (made.root / "rejects" / "b.parquet").exists()
    (made.root / "rejects" / "b.parquet").write_bytes(b"torn")
    assert [one.part for one in verify(made.root, repair=True).repaired] == ["b"]
    assert not (made.root / "rejects" / "b.parquet").exists()


def test_repair_deletes_no_file_of_ours_that_is_no_part(tmp_path: Path, make_store: Callable[[str], Made]) -> None:
    """What `leaks` or `select` made, put among the parts, is whole and sealed: it was taken for a damaged part."""
    made = make_store("dense").copy(tmp_path / "store")
    path = made.root / "parts" / "leaks.parquet"
    schema.write_sealed(path, pa.table({"index": [1]}), {"format_version": 1, "kind": "leaks"})
    found = verify(made.root, repair=True)
    assert [(one.part, one.kind) for one in found.problems] == [("leaks", "ForeignFile")]
    assert "no part of a store; move it away" in found.problems[0].detail
    assert path.exists()


def test_repair_gets_by_a_directory_in_the_place_of_rejects(tmp_path: Path, make_store: Callable[[str], Made]) -> None:
    """The part was deleted, then the directory couldn't be, and what else was wrong nobody learned."""
    made = make_store("dense").copy(tmp_path / "store")
    (made.root / "rejects" / "b.parquet").unlink()
    (made.root / "rejects" / "b.parquet").mkdir()
    (made.root / "parts" / "a.parquet").write_bytes(b"torn")
    found = verify(made.root, repair=True)
    assert {one.kind for one in found.problems} == {"ForeignFile"}
    assert {one.part for one in found.repaired} == {"a", "b"}


def test_verify_on_the_command_line(tmp_path: Path, make_store: Callable[[str], Made], invoke: Invoke) -> None:
    made = make_store("dense").copy(tmp_path / "store")
    shards = Path(made.shards[0].path).parent
    asking = ("verify", made.root, "--shards", shards, "--teacher", made.teacher.uri, "--sample", 0.5)
    code, out, err = invoke(*asking, "--device", "cpu")
    assert (code, err) == (0, "")
    assert "worst KL" in out
    _edit(made.root, "a", _other_rows)
    code, out, err = invoke(*asking[:-1], 1, "--json")
    assert (code, json.loads(out)["ok"]) == (1, False)
    assert err.startswith("OtherLabels: ")
    code, out, err = invoke(*asking[:-2])
    assert (code, out) == (1, "")
    assert "only asked with --sample" in err
    code, _, err = invoke("verify", made.root, "--sample", 0.5, "--tolerance", 1)
    assert code == 1
    assert "needs --shards and --teacher" in err
    assert "--class-map has no effect" in invoke("verify", made.root, "--class-map", "x.toml")[2]
