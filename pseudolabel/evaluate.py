"""Evaluating a model on labeled shards: accuracy, top-5, NLL, calibration error, per class, confusion; agreement with
a store.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pseudolabel.checkpoint import load_model
from pseudolabel.classes.space import check_names
from pseudolabel.errors import StoreMismatch
from pseudolabel.labels.store import Store, open_store
from pseudolabel.shard_lists import Shard, ShardsLike, as_shards
from pseudolabel.training.inputs import check_annotated, check_labeled
from pseudolabel.training.validate import labeled_batches

ECE_BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """Fractions in [0, 1]; `nll` in nats; `ece` over 15 equal bins (Guo et al. 2017). `confusion[i][j]`: class i
    taken for class j.
    """

    samples: int
    accuracy: float
    top5: float
    nll: float
    ece: float
    classes: tuple[str, ...]
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    agreement: float | None = None


def evaluate(
    model: str | os.PathLike[str],
    shards: ShardsLike,
    *,
    store: Store | str | os.PathLike[str] | None = None,
    device: str = "cpu",
    batch_size: int = 256,
    trust_code: bool = False,
) -> Evaluation:
    """Run a finished run's model over labeled `shards`. With `store`, also how often it agrees with the store's
    teacher on them. `trust_code` as in `load_model`.

    Raises:
        DamagedModel, DamagedShard: what is read is not whole.
        LabelError: a label is missing or out of range.
        StoreMismatch: the store is not of these shards.
    """
    from torchmetrics.classification import MulticlassCalibrationError, MulticlassConfusionMatrix

    shards = as_shards(shards)
    store = open_store(store) if isinstance(store, (str, os.PathLike)) else store
    classifier = load_model(model, torch.device(device), trust_code=trust_code)
    num_classes = len(classifier.classes)
    if store is not None and store.identity.num_classes != num_classes:
        raise StoreMismatch(
            f"{store.root}: its labels have {store.identity.num_classes} classes, the model has {num_classes}; "
            "use a store of the same classes"
        )
    check_names(shards, classifier.classes)
    check_labeled(shards, num_classes)
    calibration = MulticlassCalibrationError(num_classes, n_bins=ECE_BINS, norm="l1", validate_args=False)
    confusion = MulticlassConfusionMatrix(num_classes, validate_args=False)
    predictions: list[Tensor] = []
    in_top5 = 0
    nll = 0.0
    with torch.inference_mode():
        for pixels_BCHW, labels_B in labeled_batches(shards, classifier.preprocessing, batch_size):
            logits_BC = classifier.logits((pixels_BCHW,)).cpu()
            probs_BC = logits_BC.softmax(-1)
            calibration.update(probs_BC, labels_B)
            confusion.update(probs_BC, labels_B)
            nll += float(torch.nn.functional.cross_entropy(logits_BC, labels_B, reduction="sum"))
            in_top5 += int((logits_BC.topk(min(5, num_classes), -1).indices == labels_B[:, None]).any(-1).sum())
            predictions.append(logits_BC.argmax(-1))
    counts_CC = confusion.compute()
    samples = int(counts_CC.sum())
    right, of_class = counts_CC.diag().tolist(), counts_CC.sum(1).tolist()
    per_class = [hits / total if total else None for hits, total in zip(right, of_class, strict=True)]
    return Evaluation(
        samples=samples,
        accuracy=sum(right) / samples,
        top5=in_top5 / samples,
        nll=nll / samples,
        ece=float(calibration.compute()),
        classes=classifier.classes,
        per_class=tuple(per_class),
        confusion=tuple(tuple(row) for row in counts_CC.tolist()),
        agreement=_agreement(torch.cat(predictions), shards, store) if store is not None else None,
    )


def _agreement(predicted_N: Tensor, shards: Sequence[Shard], store: Store) -> float:
    """Share of the store's rows of view 0 (of these shards) whose class the model predicts, too."""
    same = rows = start = 0
    for checked in check_annotated(shards, store):
        part = store.read_view(checked.shard.name, ["index", "pred"])
        positions = torch.from_numpy(part["index"].to_numpy().copy()).long()
        taught = torch.from_numpy(part["pred"].to_numpy().copy())
        same += int((predicted_N[start + positions] == taught).sum())
        rows += len(taught)
        assert checked.part is not None
        start += checked.part.samples
    return same / max(rows, 1)
