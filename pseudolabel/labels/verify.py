"""Is a store intact? Every byte is read again: hashes, counts, order, names, values; with the shards at hand their
content, keys and labels; with the teacher at hand the labels of some samples. One part is in memory at a time.

    verify("store")
    verify("store", "corpus/unlabeled", teacher="checkpoint:runs/teacher", sample=0.001)

A shard without a part is not a problem: it is unfinished, and the same annotate goes on with it. So is one whose
rejects are in place and whose part is not: annotate was killed between the two.

`repair` deletes what is damaged or doesn't belong, when all of it has been looked at, so that annotate makes just that
again: the part first, then its rejects, so that whoever is killed in between leaves an unfinished shard. What isn't a
part of a store is never deleted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from pseudolabel import storage
from pseudolabel.errors import (
    DamagedPart,
    DamagedShard,
    ForeignFile,
    OtherLabels,
    SpecError,
    StorageError,
    StoreError,
    StoreMismatch,
)
from pseudolabel.interfaces import Teacher
from pseudolabel.labels import schema
from pseudolabel.labels.checks import check_beside, check_part, check_rejects, stored_fields
from pseudolabel.labels.schema import PartInfo
from pseudolabel.labels.store import Store, open_store
from pseudolabel.shard_lists import Shard, ShardsLike, as_shards
from pseudolabel.shards import ShardFile
from pseudolabel.storage import Location

if TYPE_CHECKING:
    from pseudolabel.labeling.reannotate import Reannotation

TOLERANCE = 0.01
"""Nats of KL(stored ‖ made again) that a row may have. The bundled teacher's images under bf16 stay within 0.002 of
those under float32, which no other device or batch comes near; another image's label is 12 away in the median
(`benchmarks/verify.py`).
"""

_OF_A_STORE = ("store.json", "annotate.json", "encoding.json", "parts", "rejects", "log")
_NOTED = (DamagedPart, DamagedShard, ForeignFile, OtherLabels, StorageError, StoreError, StoreMismatch)
_REPAIRED = ("DamagedPart", "StoreMismatch", "OtherLabels")  # kinds that annotating the shard again mends


_SEAL = b'"file_sha256":"'


@dataclass(frozen=True)
class Problem:
    """What is wrong with which file; `part` is the shard's name, or that of a foreign file."""

    part: str
    kind: str
    detail: str


@dataclass(frozen=True)
class VerifyResult:
    """`rows` counts those of intact parts. `ok`: no problem is left; `repaired` are those whose files were deleted.

    `compared` samples were annotated again, with KL(stored ‖ made again) in nats over their rows (None for none).
    """

    ok: bool
    parts: int
    rows: int
    problems: tuple[Problem, ...]
    repaired: tuple[Problem, ...] = ()
    compared: int = 0
    worst_kl: float | None = None
    mean_kl: float | None = None
    worst_row: str | None = None


def verify(
    store: Store | str | os.PathLike[str],
    shards: ShardsLike = (),
    *,
    teacher: Teacher | str | None = None,
    sample: float = 0.0,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    device: str = "cpu",
    repair: bool = False,
) -> VerifyResult:
    """Check all parts; those of `shards` also against the shards themselves, and a share `sample` of their samples,
    one at least, against the `teacher`.

    Raises:
        StoreError: no store, or a damaged store.json; nothing was deleted.
        StoreMismatch: the teacher is not the store's.
        SpecError, ShardListError.
    """
    by_name = {shard.name: shard for shard in as_shards(shards)}
    if sample and (teacher is None or not by_name):
        raise SpecError("--sample: annotates samples again, so it needs --shards and --teacher, too")
    if teacher is not None and not sample:
        raise SpecError("--teacher: is only asked with --sample, the share of samples to annotate again, such as 0.001")
    store = store if isinstance(store, Store) else open_store(store)
    stored_fields(store.identity)  # or else no part can be checked
    again: Reannotation | None = None
    if teacher is not None:
        from pseudolabel.labeling.reannotate import Reannotation  # with all that decodes images: seconds

        again = Reannotation(store, teacher, share=sample, seed=seed, tolerance=tolerance, device=device)
    checking = _Checking(store, by_name, again)
    checking.run()
    problems = checking.problems
    repaired = [problem for problem in problems if repair and problem.kind in _REPAIRED]
    for problem in repaired:
        storage.discard(store.part_path(problem.part))
        if problem.part in checking.rejects:  # or else what is there may be a directory
            storage.discard(store.rejects_path(problem.part))
    left = tuple(problem for problem in problems if problem not in repaired)
    result = VerifyResult(not left, len(checking.entries), checking.rows, left, tuple(repaired))
    if again is None:
        return result
    found = again.found
    result = replace(result, compared=found.samples, worst_row=found.worst_row or None)
    if not found.rows:
        return result
    return replace(result, worst_kl=found.worst_kl, mean_kl=found.sum_kl / found.rows)


class _Checking:
    """One store, listed once: the parts first, so that what is annotated meanwhile has its rejects listed, too."""

    def __init__(self, store: Store, by_name: dict[str, Shard], again: Reannotation | None) -> None:
        self._store, self._by_name, self._again = store, by_name, again
        self.entries = {one.name.removesuffix(".parquet"): one for one in store.part_files()}
        rejects = storage.entries(store.root / "rejects")
        self.rejects = {one.name.removesuffix(".parquet") for one in rejects if _is_ours(one.name)}
        self.problems: list[Problem] = []
        self.rows = 0

    def run(self) -> None:
        self._look_for_strangers()
        for name in self.entries:
            with self._noting(name):
                self.check(name)
        if self._again is not None and self._again.nearest is not None:
            name, position = self._again.nearest
            with self._noting(name), ShardFile(self._by_name[name]) as opened:
                self._again.compare_samples(opened, self._store.read(name), self._read_rejects(name), [position])
        for name in sorted(self._by_name.keys() - self.entries.keys()):
            where = self._by_name[name].where
            self.problems.append(Problem(name, "MissingPart", f"{where}: not annotated in this store"))
        for name in sorted(self.rejects - self.entries.keys()):
            with self._noting(name):
                self._read_rejects(name)  # of an unfinished shard, unless they are damaged or from elsewhere

    @contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        """What is wrong with one part is no reason not to look at the others."""
        try:
            yield
        except _NOTED as error:
            self.problems.append(Problem(name, error.kind, str(error).splitlines()[0]))

    def _look_for_strangers(self) -> None:
        root = self._store.root
        found = [root / name for name in _names(root) if name not in _OF_A_STORE]
        for place in (root / "parts", root / "rejects"):
            names = _names(place)
            files = {one.name for one in storage.entries(place)}
            found += [place / name for name in names if not _is_ours(name) or name not in files]
        for path in found:
            detail = f"{path}: doesn't belong into a store; remove it"
            self.problems.append(Problem(path.name, ForeignFile.__name__, detail))

    def check(self, name: str) -> None:
        """All of one part. Raises what is wrong with it."""
        path = self._store.part_path(name)
        part, info = self._read_part(name)
        rejects = self._read_rejects(name)
        check_part(path, self._store.identity, info, part, rejects)
        if name in self._by_name:
            with ShardFile(self._by_name[name]) as opened:
                check_beside(path, opened, info, part, rejects)
                if self._again is not None:
                    self._again.compare(opened, part, rejects)
        self.rows += part.num_rows

    def _read_part(self, name: str) -> tuple[pa.Table, PartInfo]:
        path = self._store.part_path(name)
        try:
            part = self._store.read(name)
        except DamagedPart:
            if _is_foreign(path):
                raise ForeignFile(f"{path}: is a Parquet file, but no part of a store; remove it") from None
            raise
        try:
            return part, self._store.info(name, self.entries[name].size)
        except DamagedPart:
            if "fingerprint" not in schema.read_metadata(path):
                raise ForeignFile(
                    f"{path}: is whole, but a selection's or leaks, no part of a store; move it away"
                ) from None
            raise

    def _read_rejects(self, name: str) -> pa.Table:
        """A shard's rejects, the whole file verified; empty where there are none."""
        if name not in self.rejects:
            return schema.REJECT_SCHEMA.empty_table()
        path = self._store.rejects_path(name)
        rejects = schema.read_table(path)
        metadata = schema.read_metadata(path)
        if (metadata.get("fingerprint"), metadata.get("shard")) != (self._store.fingerprint, name):
            raise StoreMismatch(f"{path}: these are not the rejects of shard {name!r} in this store; remove it")
        check_rejects(path, name, rejects)
        if not rejects.num_rows:
            raise schema.damaged(path, "it lists no rejects")
        return rejects


def _names(place: Location) -> list[str]:
    """All that lies right in a directory, but for what a writer, living or killed, has not finished: the next annotate
    removes it.
    """
    if not storage.is_remote(place) and not place.is_dir():
        return []
    return sorted(one.name for one in place.iterdir() if not storage.is_temporary(one.name))


def _is_ours(name: str) -> bool:
    """Whether a part or rejects could have this file name."""
    return name.endswith(".parquet") and not name.startswith(".")


def _is_foreign(path: Location) -> bool:
    """Whether a file that carries no seal is whole Parquet of someone else's: damage leaves one of our two marks."""
    with storage.explain_os_errors(path, "reading"):
        content = path.read_bytes()
    if _SEAL in content:
        return False
    try:
        facts = pq.read_metadata(pa.BufferReader(content)).metadata or {}
    except (pa.ArrowException, OSError, ValueError):
        return False
    return schema.METADATA_KEY not in facts
