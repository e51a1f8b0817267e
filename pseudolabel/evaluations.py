"""What each model of a run reached on which shards, kept until the model or the shards change.

DIR/<model>.json           hashes of the model and of each shard, and what `evaluate` found
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pseudolabel import storage
from pseudolabel.checkpoint import read_card
from pseudolabel.errors import StorageError
from pseudolabel.evaluate import evaluate
from pseudolabel.shard_lists import Shard
from pseudolabel.shards import shard_sha256
from pseudolabel.storage import Location


@dataclass(frozen=True)
class Evaluations:
    """Evaluations in a directory, measured on `device`."""

    directory: Location
    device: str

    def accuracy(
        self, name: str, model: Location, shards: Sequence[Shard] | None, *, trust_code: bool = False
    ) -> float | None:
        """Of a model on `shards`; found if it was measured before on the same content. None without shards."""
        if shards is None:
            return None
        path = self.directory / f"{name}.json"
        inputs = {"model": read_card(model)[1], "shards": {shard.name: shard_sha256(shard) for shard in shards}}
        if (known := _read(path, inputs)) is not None:
            return known
        found = evaluate(model, shards, device=self.device, trust_code=trust_code)
        storage.write_atomic(path, json.dumps({**inputs, **asdict(found)}, indent=1) + "\n")
        return found.accuracy


def _read(path: Location, inputs: dict[str, Any]) -> float | None:
    """The accuracy in an evaluation of just these inputs."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return float(known["accuracy"]) if {name: known[name] for name in inputs} == inputs else None
    except (OSError, StorageError, ValueError, KeyError, TypeError):
        return None  # none there, or not ours: it is measured anew
