"""Stores written by hand: logits and labels that a test chose, as annotate would have kept them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pseudolabel.decoding import DecodedBatch, ShardEnd
from pseudolabel.labeling.forward import encoded
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.part import PartBuilder
from pseudolabel.labels.store import Store, StoreIdentity, create
from pseudolabel.views.draw import CLEAN, row_seeds


def write_store(
    root: Path,
    parts: Mapping[str, tuple[Tensor, Sequence[int | None]]],
    *,
    encoding: str = "dense",
    teacher: str = "made by hand",
) -> Store:
    """A store of shards with these logits (N, C) and labels (None where a sample has none)."""
    num_classes = next(iter(parts.values()))[0].shape[-1]
    names = tuple(f"class {number}" for number in range(num_classes))
    store = create(root, StoreIdentity({"architecture": teacher}, names, encoding, {"count": 1}, "fp32"))
    for shard, (logits_NC, labels) in parts.items():
        add_part(store, shard, logits_NC, labels)
    return store


def add_part(store: Store, shard: str, logits_NC: Tensor, labels: Sequence[int | None]) -> None:
    encoding = parse_encoding(store.identity.encoding)
    rows = list(range(len(logits_NC)))
    keys = [f"{shard}/{row:06d}" for row in rows]
    builder = PartBuilder(shard, encoding, store.identity.num_classes, store.fingerprint)
    if rows:
        seed_N = torch.tensor(row_seeds(keys, [0] * len(rows)))
        batch = DecodedBatch(keys, rows, list(labels), [(CLEAN,)] * len(rows))
        builder.add(batch, encoded(encoding, logits_NC.float(), seed_N))
    made = builder.finish(ShardEnd(size=100, sha256=hashlib.sha256(shard.encode()).hexdigest(), samples=len(rows)))
    store.commit(made.info, made.part, made.rejects)


def known(
    rows: int, classes: int, seed: int, *, overconfident: float = 1.0, scale: float = 3.0
) -> tuple[Tensor, list[int]]:
    """Logits, and labels drawn from softmax(logits / overconfident): what a teacher knows exactly, told too loudly."""
    generator = torch.Generator().manual_seed(seed)
    true_NC = scale * torch.randn(rows, classes, generator=generator)
    labels = torch.multinomial(true_NC.softmax(-1), 1, generator=generator).squeeze(-1)
    return true_NC * overconfident, labels.tolist()
