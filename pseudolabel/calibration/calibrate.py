"""`calibrate`: from the rows of a store that carry labels to a calibration, and how well it does.

The figures are cross-fitted: rows are dealt into five folds by a hash of their key, the map is fitted without a fold
and measured on it, so nothing is measured on what it was fitted to. The map that is kept is fitted to all rows.

A prior correction (distribution alignment: Berthelot et al. 2020, arXiv:1911.09785, §3.2) multiplies each class's
probability by target / marginal: the target is the classes' share among the labels, or even; the marginal is the mean
calibrated probability over the store's rows without a label.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.compute as pc
import torch
from torch import Tensor

from pseudolabel import storage
from pseudolabel.calibration import Calibration, read_calibration
from pseudolabel.calibration.evidence import FOLDS, Evidence, labeled_evidence
from pseudolabel.calibration.fit import fit
from pseudolabel.calibration.metrics import measure
from pseudolabel.errors import CalibrationError
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.rows import clean_rows
from pseudolabel.labels.store import Store, open_store
from pseudolabel.outputs import check_output
from pseudolabel.settings import CalibrateSettings

_AT_ONCE = 4096  # rows whose probabilities are summed


@dataclass(frozen=True)
class CalibrateResult:
    """`before` and `after` as `metrics.measure` gives them, `after` without and `aligned` with the prior correction;
    `rows` were used of `labeled_rows` that there are.
    """

    out: str | None
    method: str
    temperature: float
    rows: int
    labeled_rows: int
    accuracy: float
    before: dict[str, Any]
    after: dict[str, Any]
    aligned: dict[str, Any] | None
    calibration: Calibration


def calibrate(
    store: Store | str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    settings: CalibrateSettings | None = None,
    *,
    evidence: Sequence[str] | None = None,
    overwrite: bool = False,
) -> CalibrateResult:
    """Calibrate a store's teacher on its labeled rows of the clean view, all or those of the shards named `evidence`,
    and write the calibration to the file `out`.

    Raises:
        CalibrationError: too few labeled rows, or labels that were drawn.
        LabelError: a label that is none of the teacher's classes.
        OutputExists: `out` is there, and not to be overwritten.
    """
    settings = settings or CalibrateSettings()
    method, prior = settings.method, settings.prior
    path = storage.location(out) if out is not None else None
    if path is not None:
        check_output(path, overwrite=overwrite, read=read_calibration, what="calibration")
    store = store if isinstance(store, Store) else open_store(store)
    encoding = parse_encoding(store.identity.encoding)
    if encoding.draws:
        raise CalibrationError(
            f"{store.root}: holds draws ({encoding.name}), which have no logits to calibrate; annotate with dense, "
            "dense8 or topk:K"
        )
    rows, labeled_rows = labeled_evidence(store, encoding, evidence)
    found = fit(method, rows, store.fingerprint)
    shift_C = _shift(store, found, rows, prior) if prior != "none" else None
    before, after, aligned = _measured(rows, method, shift_C, prior, store.fingerprint)
    facts = {
        "method": method,
        "prior": prior,
        "evidence": sorted(evidence) if evidence is not None else None,
        "rows": len(rows),
        "labeled_rows": labeled_rows,
        "folds": FOLDS,
        "before": before,
        "after": after,
        "aligned": aligned,
    }
    shift = None if shift_C is None else tuple(round(value, 6) for value in shift_C.tolist())
    found = replace(found, shift=shift, facts=facts)
    if path is not None:
        check_output(path, overwrite=overwrite, read=read_calibration, what="calibration")  # one may have been quicker
        storage.write_atomic(path, json.dumps(found.to_json(), indent=1) + "\n")
    return CalibrateResult(
        out=None if out is None else storage.shown(os.fspath(out)),
        method=method,
        temperature=found.temperature,
        rows=len(rows),
        labeled_rows=labeled_rows,
        accuracy=before["accuracy"],
        before=before,
        after=after,
        aligned=aligned,
        calibration=found,
    )


def _measured(
    rows: Evidence, method: str, shift_C: Tensor | None, target: str, store: str
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]:
    """Before, after and after the prior correction. Each row's map, and target, come from the other folds."""
    plain = rows.log_probs(Calibration(store))
    after, aligned = torch.empty_like(plain), torch.empty_like(plain)
    overall_C = target_share(rows.label_N, rows.num_classes, target)
    for fold in range(FOLDS):
        held_out = rows.fold_N == fold
        if not held_out.any():
            continue
        others = rows.where(~held_out)
        after[held_out] = rows.where(held_out).log_probs(fit(method, others, store)).to(after.dtype)
        if shift_C is not None:
            own_C = shift_C + (target_share(others.label_N, rows.num_classes, target) / overall_C).log()
            aligned[held_out] = torch.log_softmax(after[held_out] + own_C.to(after.dtype), dim=-1)
    return (
        measure(plain, rows.label_N),
        measure(after, rows.label_N),
        measure(aligned, rows.label_N) if shift_C is not None else None,
    )


def target_share(label_N: Tensor, num_classes: int, target: str) -> Tensor:
    """What share of the rows each class should have (C): even, or the labels' with one added to each class."""
    if target == "uniform":
        return torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
    count_C = torch.bincount(label_N, minlength=num_classes).double() + 1
    return count_C / count_C.sum()


def _shift(store: Store, calibration: Calibration, rows: Evidence, target: str) -> Tensor:
    """log(target / marginal), (C)."""
    total_C = torch.zeros(rows.num_classes, dtype=torch.float64)
    count = 0
    names = [field.name for field in rows.encoding.fields(rows.num_classes)]
    for shard in store.part_names():
        table = clean_rows(store.read_columns(shard, ["view", "label", *names]))
        table = table.filter(pc.is_null(table["label"]))
        for start in range(0, len(table), _AT_ONCE):
            columns = rows.encoding.tensors(table.slice(start, _AT_ONCE), rows.num_classes)
            total_C += calibration.log_probs(rows.encoding, columns, rows.num_classes).double().exp().sum(0)
        count += len(table)
    if not count:
        raise CalibrationError(
            f"{store.root}: every row carries a label, so there is no marginal to correct; leave out --prior, or "
            "annotate the unlabeled shards into this store first"
        )
    if not total_C.all():
        name = store.identity.classes[int(total_C.argmin())]
        raise CalibrationError(
            f"{store.root}: the unlabeled rows give the class {name!r} no probability at all, so there is none to "
            "correct; leave out --prior"
        )
    return target_share(rows.label_N, rows.num_classes, target).log() - (total_C / count).log()
