"""The rows of a store as scores in a scratch database: what every rule of a selection asks about.

    scores(part, index, pred, confidence, entropy, margin, disagreement, label, excluded)

One row a sample, that of its clean view; `part` counts the shards by name. Without a calibration the columns are those
that annotate stored, nothing else is read, and torch is not loaded. With one they are computed from the logits.
`disagreement` of an ensemble is the Jensen–Shannon divergence of its members, in nats: the entropy of their mean less
their mean entropy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pseudolabel.calibration import Calibration
from pseudolabel.errors import SelectionError
from pseudolabel.interfaces import Encoding
from pseudolabel.labels.rows import check_labels, clean_rows
from pseudolabel.labels.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from pseudolabel.database import Connection

SCHEMA = pa.schema(
    [
        ("part", pa.int32()),
        ("index", pa.int32()),
        ("pred", pa.int32()),
        ("confidence", pa.float32()),
        ("entropy", pa.float32()),
        ("margin", pa.float32()),
        ("disagreement", pa.float32()),
        ("label", pa.int32()),
        ("excluded", pa.bool_()),
    ]
)
_STORED = ("pred", "confidence", "entropy", "margin")
_AT_ONCE = 4096  # rows whose logits are looked at
_INSERTED = 200_000  # rows that go into the database at once
_AHEAD = 4  # parts


@dataclass(frozen=True)
class Scoring:
    """How rows are scored: calibrated or not, with the members' disagreement or without."""

    store: Store
    calibration: Calibration | None = None
    disagreement: bool = False

    def part(self, shard: str) -> pa.Table:
        """The scores of a shard's clean view, without `part` and `excluded`."""
        plain = self.calibration is None
        names = ["index", "view", "label", *(_STORED if plain else self._logits)]
        names += [name for member in self._members for name in member.values()]
        table = clean_rows(self.store.read_columns(shard, list(dict.fromkeys(names))))
        check_labels(self.store, shard, table)
        pieces = [self._scored(table.slice(start, _AT_ONCE)) for start in range(0, len(table), _AT_ONCE)]
        return pa.concat_tables(pieces) if pieces else SCHEMA.empty_table()

    @cached_property
    def _encoding(self) -> Encoding:
        from pseudolabel.labels.encodings import parse_encoding

        return parse_encoding(self.store.identity.encoding)

    @cached_property
    def _logits(self) -> list[str]:
        return [field.name for field in self._encoding.fields(self.store.identity.num_classes)]

    @cached_property
    def _members(self) -> list[dict[str, str]]:
        """For each member, the encoding's columns by the names they have for it. Raises `SelectionError`."""
        teacher = self.store.identity.teacher
        if not self.disagreement:
            return []
        if not teacher.get("members_kept"):
            raise SelectionError(
                f"{self.store.root}: --max-disagreement needs the logits of an ensemble's members; annotate with "
                "--keep-members"
            )
        return [{name: f"member{number}_{name}" for name in self._logits} for number in range(len(teacher["members"]))]

    def _scored(self, table: pa.Table) -> pa.Table:
        columns = {name: table[name] for name in ("index", "label")}
        if self.calibration is None:
            columns |= {name: table[name] for name in _STORED}
        else:
            from pseudolabel.labels.facts import summarize

            tensors = self._encoding.tensors(table, self._classes)
            log_probs_BC = self.calibration.log_probs(self._encoding, tensors, self._classes)
            columns |= {name: pa.array(one.numpy()) for name, one in summarize(log_probs_BC).items()}
        if self._members:
            columns["disagreement"] = pa.array(self._disagreement(table).numpy())
        else:
            columns["disagreement"] = pa.nulls(len(table), pa.float32())
        return pa.table(columns)

    @property
    def _classes(self) -> int:
        return self.store.identity.num_classes

    def _disagreement(self, table: pa.Table) -> Tensor:
        import torch

        probs, entropies = [], []
        for member in self._members:
            own = table.select(list(member.values())).rename_columns(list(member))
            tensors = self._encoding.tensors(own, self._classes)
            probs_BC = self._encoding.full_log_probs(tensors, self._encoding.temperatures[0], self._classes).exp()
            probs.append(probs_BC)
            entropies.append(_entropy(probs_BC))
        spread_B = _entropy(torch.stack(probs).mean(0)) - torch.stack(entropies).mean(0)
        return spread_B.clamp(min=0.0)


def load_scores(
    connection: Connection,
    scoring: Scoring,
    shards: Sequence[str],
    excluded: Mapping[str, Sequence[int]],
) -> None:
    """Fill the table `scores`, shard by shard. Raises what reading a part raises, and `SelectionError`."""
    connection.register("batch", SCHEMA.empty_table())
    connection.execute("create table scores as select * from batch")
    waiting: list[pa.Table] = []
    for part, table in enumerate(_read_ahead(scoring, shards)):
        if not len(table):
            continue
        bad = np.isin(table["index"].to_numpy(), np.asarray(excluded.get(shards[part], ()), np.int32))
        table = table.append_column("part", pa.array(np.full(len(table), part, np.int32)))
        table = table.append_column("excluded", pa.array(bad))
        waiting.append(table.select(SCHEMA.names).cast(SCHEMA))
        if sum(map(len, waiting)) >= _INSERTED:
            _insert(connection, waiting)
            waiting = []
    _insert(connection, waiting)


def _read_ahead(scoring: Scoring, shards: Sequence[str]) -> Iterator[pa.Table]:
    """The parts in their order, some read while others are used."""
    with ThreadPoolExecutor(2) as pool:
        under_way = deque(pool.submit(scoring.part, shard) for shard in shards[:_AHEAD])
        for shard in [*shards[_AHEAD:], *[None] * _AHEAD]:
            if not under_way:
                return
            yield under_way.popleft().result()
            if shard is not None:
                under_way.append(pool.submit(scoring.part, shard))


def _insert(connection: Connection, tables: Sequence[pa.Table]) -> None:
    if tables:
        connection.register("batch", pa.concat_tables(tables))
        connection.execute("insert into scores select * from batch")
        connection.unregister("batch")


def _entropy(probs_BC: Tensor) -> Tensor:
    from torch.special import entr

    terms_BC: Tensor = entr(probs_BC)
    return terms_BC.sum(dim=-1)
