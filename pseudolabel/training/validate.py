"""Accuracy on a validation set during training: decoded once if it is small, streamed if not. Processes that train
together divide its shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pseudolabel.decoding import Decoding, ShardEnd, ahead, decode_shards
from pseudolabel.errors import DamagedShard, LabelError, StorageError
from pseudolabel.shard_lists import Shard
from pseudolabel.training.distributed import Team
from pseudolabel.training.inputs import check_labeled
from pseudolabel.views.image import PrepareFor, Preprocessing

_BATCH = 256
_KEPT_BYTES = 256 << 20


class Validation:
    """A labeled set seen through a model's clean view. Raises `LabelError`, `DamagedShard` at once for what can't be
    used.
    """

    def __init__(
        self, shards: Sequence[Shard], preprocessing: Preprocessing, num_classes: int, device: str, team: Team
    ) -> None:
        checked, _ = check_labeled(shards, num_classes)
        self.sha256 = hashlib.sha256(
            "\n".join(f"{one.shard.name} {one.sha256}" for one in checked).encode()
        ).hexdigest()
        self._shards = list(shards)[team.world.rank :: team.world.size]
        self._preprocessing, self._device, self._team = preprocessing, torch.device(device), team
        rows = sum(one.rows for one in checked)
        small = rows * preprocessing.channels * preprocessing.crop**2 <= _KEPT_BYTES
        self._kept = list(self._decoded()) if small else None

    def accuracy(self, model: nn.Module) -> float:
        """Share of samples whose class the model gets right; `model` maps uint8 pixels to logits and is left in its
        mode. All processes get the same answer, to the sample.
        """
        was_training = model.training
        model.eval()
        right = total = 0
        with torch.inference_mode():
            for pixels_BCHW, labels_B in self._kept if self._kept is not None else self._decoded():
                logits_BC = model(pixels_BCHW.to(self._device))
                right += int((logits_BC.argmax(-1).cpu() == labels_B).sum())
                total += len(labels_B)
        model.train(was_training)
        right, total = self._team.sums(right, total)
        return right / total

    def _decoded(self) -> Iterator[tuple[Tensor, Tensor]]:
        return labeled_batches(self._shards, self._preprocessing, _BATCH)


def labeled_batches(
    shards: Sequence[Shard], preprocessing: Preprocessing, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """uint8 pixels and labels of a labeled set, in order, decoded ahead in a thread. Raises `DamagedShard`,
    `StorageError`, `LabelError`.
    """
    for shard, batch in ahead(decode_shards(iter(shards), Decoding(batch_size, PrepareFor((preprocessing,))))):
        if isinstance(batch, (DamagedShard, StorageError)):
            raise batch
        if isinstance(batch, ShardEnd):
            continue
        if batch.rejects:
            first = batch.rejects[0]
            raise LabelError(f"{shard.where}: sample {first.key!r} can't be used: {first.detail}; remove or replace it")
        yield batch.inputs[0], torch.tensor(batch.labels)
