"""What training reads, checked against each other before the first step.

Joining is checked, not hoped for: a shard must hash to what was annotated, its keys must equal the part's row by row,
and labels, store and class names must speak of the same classes.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pseudolabel.calibration import Calibration
from pseudolabel.classes.numbers import MAX_CLASSES, read_class
from pseudolabel.classes.space import label_space, named_beside
from pseudolabel.errors import LabelError, SelectionError, StoreMismatch
from pseudolabel.labels.schema import PartInfo
from pseudolabel.labels.store import Store
from pseudolabel.selection import Selection
from pseudolabel.shard_lists import Shard, real_place
from pseudolabel.shards import ShardFile


@dataclass(frozen=True)
class TrainingShard:
    """A shard as training uses it: which samples, and its content's hash. `part` is set if soft labels are joined,
    `labels_N` (int64) for labeled shards: a class a row.
    """

    shard: Shard
    sha256: str
    rows: int
    part: PartInfo | None = None
    version: tuple[int, ...] = ()
    labels_N: NDArray[np.int64] | None = field(default=None, compare=False, repr=False)

    def check_same(self, opened: ShardFile) -> None:
        """Raise `StoreMismatch` if the file that is opened now isn't the one that was checked."""
        if opened.version != self.version and opened.sha256() != self.sha256:
            raise StoreMismatch(
                f"{self.shard.where}: was replaced since this training began\nput the old shard back and run it again: "
                "it goes on from its last checkpoint"
            )


@dataclass(frozen=True)
class TrainingData:
    """Where batches come from. `store` holds the soft labels of `unlabeled`, and those of `labeled` if these were
    annotated too; of `unlabeled` only what `selection` holds counts, if there is one. `calibration` says how the
    store's logits are to be read. With `replay`, the unlabeled rows are seen in that many of the store's augmented
    views, one after the other; else, and always the labeled, in the clean one. `balanced`: every class of the labeled
    rows comes up equally often.
    """

    labeled: Sequence[TrainingShard]
    unlabeled: Sequence[TrainingShard]
    store: Store | None
    num_classes: int
    selection: Selection | None = None
    calibration: Calibration | None = None
    replay: int = 0
    balanced: bool = False

    def label_counts(self) -> NDArray[np.int64]:
        """Labeled rows of each class, (C,)."""
        found = [one.labels_N for one in self.labeled if one.labels_N is not None]
        return np.bincount(np.concatenate(found) if found else np.empty(0, np.int64), minlength=self.num_classes)


def gather(
    labeled: Sequence[Shard],
    unlabeled: Sequence[Shard],
    store: Store | None,
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
    selection: Selection | None = None,
    calibration: Calibration | None = None,
) -> tuple[TrainingData, tuple[str, ...]]:
    """Check all inputs of a training against each other; returns what to train on and the class names.

    Labeled shards that were annotated into `store`, too, bring their soft labels, whatever is selected.

    Raises:
        SelectionError: a shard is not in the selection.
        LabelError: something is missing, a label is missing or out of range.
        StoreMismatch: shards differ from what was annotated, or the label spaces differ.
    """
    if not labeled and not unlabeled:
        raise LabelError("nothing to train on: give --labeled, or --unlabeled with --labels, or both")
    if unlabeled and store is None:
        raise LabelError("unlabeled shards need soft labels: annotate them and pass the store as --labels")
    places = {real_place(shard.path) for shard in unlabeled}
    for shard in labeled:
        if real_place(shard.path) in places:
            raise LabelError(f"{shard.where}: given both as --labeled and as --unlabeled; give it once")
    classes = classes if classes is not None else named_beside(labeled)
    if store is not None:
        classes = label_space(store, classes, num_classes)
    bound = len(classes) if classes is not None else num_classes
    checked, largest = check_labeled(labeled, bound) if labeled else ([], 0)
    bound = bound or largest
    if bound > MAX_CLASSES:
        raise LabelError(f"{bound} classes are more than {MAX_CLASSES}: is a label an id? mend it or --num-classes")
    soft = check_annotated(unlabeled, store) if store is not None else []
    if store is None and (selection is not None or calibration is not None):
        raise LabelError("a selection or calibration is about soft labels: give --unlabeled with --labels, too")
    if store is not None and calibration is not None:
        calibration.check(store)
    if store is not None and selection is not None:
        selection.check(store)
        soft = [_selected(one, selection) for one in soft]
    both = [one for one in checked if store is not None and _is_annotated(one, store)]
    if store is not None and both and len(both) == len(checked):
        checked = _with_labels(check_annotated(labeled, store), checked, store)
        if not unlabeled and selection is not None:
            raise LabelError("a selection is of --unlabeled shards, and only --labeled ones are given; leave it out")
    elif store is not None and both and unlabeled:
        rest = next(one.shard.where for one in checked if one not in both)
        warnings.warn(
            f"{len(both)} of {len(checked)} labeled shards have soft labels in {store.root}, and these are not used: "
            f"{rest} has none; annotate all of them into it, or none",
            stacklevel=4,
        )
    elif store is not None and not unlabeled:
        raise LabelError(
            f"{store.root}: a store of soft labels needs the shards it was made from: pass them as --unlabeled (or, to "
            "learn from labels and soft labels of the same images, annotate the --labeled shards into it)"
        )
    if sum(one.rows for one in (*checked, *soft)) == 0:
        raise LabelError(
            "nothing to train on: the store has no rows for these shards (all were rejected, or none selected)"
        )
    if soft and not any(one.rows for one in soft):
        raise LabelError(
            f"{store.root if store else ''}: has no rows for the --unlabeled shards (all were rejected, or none "
            "selected)\nleave out --unlabeled and --labels to train on the labels alone"
        )
    if checked and not any(one.rows for one in checked):
        raise LabelError(
            f"{store.root if store else ''}: all samples of the --labeled shards were rejected\nmend them, or leave "
            "out --labeled to train on the soft labels alone"
        )
    names = tuple(classes) if classes is not None else tuple(str(index) for index in range(bound))
    return TrainingData(checked, soft, store, bound, selection, calibration), names


def _with_labels(
    annotated: Sequence[TrainingShard], checked: Sequence[TrainingShard], store: Store
) -> list[TrainingShard]:
    """Annotated shards with their labels, those of samples that were rejected left out."""
    found = []
    for one, labeled in zip(annotated, checked, strict=True):
        assert labeled.labels_N is not None
        rejected = store.read_rejects(one.shard.name)["index"].to_numpy()
        found.append(replace(one, labels_N=np.delete(labeled.labels_N, rejected)))
    return found


def _selected(shard: TrainingShard, selection: Selection) -> TrainingShard:
    """The shard with as many rows as are selected. Raises `SelectionError` if it wasn't there to be selected from."""
    if shard.shard.name not in selection.rows:
        raise SelectionError(
            f"{shard.shard.where}: was not in the store when {selection.root} was made; select anew, or leave it out"
        )
    return replace(shard, rows=selection.rows[shard.shard.name])


def _is_annotated(shard: TrainingShard, store: Store) -> bool:
    """Whether the store's part of that name, if any, is of this very shard: another may be called so, too.

    Raises:
        StoreMismatch: it is of these samples, and they were changed since.
    """
    name = shard.shard.name
    if not store.part_path(name).exists():
        return False
    info = store.info(name)
    if info.sha256 != shard.sha256 and info.samples == shard.rows:
        with ShardFile(shard.shard) as opened:
            known = {*store.read_view(name, ["key"])["key"].to_pylist(), *store.read_rejects(name)["key"].to_pylist()}
            if known == set(opened.keys):
                check_annotated([shard.shard], store)
    return info.sha256 == shard.sha256


def read_label(opened: ShardFile, index: int, num_classes: int | None = None) -> int:
    """A labeled sample's class. Raises `LabelError` if it has none, or one that is no class number or out of range."""
    where = f"{opened.shard.where}: sample {opened.keys[index]!r}"
    label = read_class(opened, index)
    if label is None:
        raise LabelError(
            f"{where} has no label (no `cls` file); pack the labeled set with labels, or pass it as --unlabeled"
        )
    if isinstance(label, str):
        raise LabelError(f"{where}: its label is {label!r}; a class number from 0 is wanted")
    if num_classes is not None and label >= num_classes:
        raise LabelError(
            f"{where}: its label is {label}, but there are {num_classes} classes (0 to "
            f"{num_classes - 1}); mend the label or --num-classes"
        )
    return label


def check_labeled(shards: Sequence[Shard], num_classes: int | None) -> tuple[list[TrainingShard], int]:
    """Read every label of a labeled set. Returns the shards and 1 + the largest label. Raises `LabelError`,
    `DamagedShard`.
    """

    def check(shard: Shard) -> TrainingShard:
        with ShardFile(shard) as opened:
            labels_N = np.array([read_label(opened, index, num_classes) for index in range(len(opened))], np.int64)
            return TrainingShard(shard, opened.sha256(), len(opened), version=opened.version, labels_N=labels_N)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(check, shards))
    return found, 1 + max(int(one.labels_N.max()) for one in found if one.labels_N is not None)


def check_annotated(shards: Sequence[Shard], store: Store) -> list[TrainingShard]:
    """Compare every shard with what was annotated, content and all.

    Raises:
        StoreMismatch: a shard has no part, or another content than when it was annotated.
    """

    def check(shard: Shard) -> TrainingShard:
        if not store.part_path(shard.name).exists():
            raise StoreMismatch(
                f"{shard.where}: not annotated in {store.root}; run `pseudolabel annotate` on these "
                "shards into this store first"
            )
        info = store.info(shard.name)
        with ShardFile(shard) as opened:
            sha256 = opened.sha256()
            if sha256 != info.sha256 or len(opened) != info.samples:
                raise StoreMismatch(
                    f"{shard.where}: its content is not what was annotated (sha256 {sha256[:12]}, "
                    f"{len(opened)} samples; "
                    f"annotated {info.sha256[:12]}, {info.samples})\nput the old shard back, or "
                    f"delete {store.part_path(shard.name)} and annotate again"
                )
            version = opened.version
        return TrainingShard(shard, sha256, info.samples - info.rejects, info, version)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(check, shards))


def join(opened: ShardFile, part: pa.Table, rejects: pa.Table) -> list[int]:
    """The positions in the shard of a part's rows of one view; keys are compared one by one, the rejects' too.

    Raises:
        StoreMismatch: a key differs, a sample is in neither or in both.
    """
    positions: list[int] = part["index"].to_pylist()
    rejected: list[int] = rejects["index"].to_pylist()
    pairs = list(zip(positions + rejected, part["key"].to_pylist() + rejects["key"].to_pylist(), strict=True))
    if sorted(index for index, _ in pairs) != list(range(len(opened))):
        raise StoreMismatch(
            f"{opened.shard.where}: the store has {len(pairs)} rows and rejects for {len(opened)} "
            "samples; annotate this shard again"
        )
    for index, key in pairs:
        if opened.keys[index] != key:
            raise StoreMismatch(
                f"{opened.shard.where}: sample {index} is {opened.keys[index]!r}, the store's label is of {key!r}\n"
                "these labels are of another shard: use the store that was made from these shards"
            )
    return positions
