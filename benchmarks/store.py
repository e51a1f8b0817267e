"""What the store costs: bytes a row, speed beside plain files of float32 logits, and what rounding and tails lose.

    python benchmarks/store.py [--quick] [--json]

All forms keep the same logits (`made.peaked_logits` says how they are made; how peaked they are stands above the
table): `np.save`, `torch.save`, pyarrow's default Parquet of a list<float> column, and parts as annotate writes them,
with keys, summaries, checksums and hash. One thread each, in turns, files synced, page cache warm. Read the table so:

    bytes/row    of the whole file; float32 logits are 4·C
    write, read  MB/s of float32 logits (4·C bytes a row), whatever the form takes. Of a part the columns are read that
                 training reads, and the whole file is verified
    …, ×         that as a multiple of default Parquet in the same turn, which holds on other machines, too
    encode       MB/s of what annotate does to a batch's logits before: encode, sum up, measure the loss, make a table
    KL           mean nats of KL(full ‖ stored) at T = 1, 2 and 4, as `labels.facts.divergence` measures it; of draws
                 KL(stored ‖ full) at T = 1
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import made
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import setup
import torch
from torch import Tensor

from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.part import AnnotatedShard
from pseudolabel.labels.schema import write_sealed
from pseudolabel.labels.store import Store, StoreIdentity

STORED = {
    10: ("dense", "dense8", "topk:5", "sampled:50"),
    1000: ("dense", "dense8", "topk:10", "topk:50", "sampled:50"),
}
BASELINE = "Parquet, default"


@dataclass(frozen=True)
class Form:
    """One way to keep logits: what writes the file at `path`, and what reads it again."""

    path: Path
    write: Callable[[], object]
    read: Callable[[], object]


def plain_forms(directory: Path, logits_NC: Tensor) -> dict[str, Form]:
    """What one would write without a store."""
    npy, pt, parquet = (directory / f"logits.{kind}" for kind in ("npy", "pt", "parquet"))
    array = logits_NC.numpy()
    table = pa.table({"logits": pa.array(list(array), pa.list_(pa.float32()))})
    return {
        "np.save": Form(npy, partial(np.save, npy, array), partial(np.load, npy)),
        "torch.save": Form(pt, partial(torch.save, logits_NC, pt), partial(torch.load, pt, weights_only=True)),
        BASELINE: Form(parquet, partial(pq.write_table, table, parquet), partial(pq.read_table, parquet)),
    }


def stored_form(directory: Path, part: AnnotatedShard) -> Form:
    """A part in a store of its own."""
    encoding, num_classes = part.info.encoding, part.info.num_classes
    classes = tuple(map(str, range(num_classes)))
    store = Store(directory / encoding.replace(":", "-"), StoreIdentity({}, classes, encoding, {"count": 1}, "fp32"))
    columns = ["key", "index", "pred", *(one.name for one in parse_encoding(encoding).fields(num_classes))]
    path = Path(str(store.part_path("shard")))
    return Form(
        path, partial(write_sealed, path, part.part, part.info.to_json()), partial(store.read, "shard", columns)
    )


def write_synced(form: Form) -> None:
    """The store syncs its files anyway; forms are to be compared, not that."""
    form.write()
    with open(form.path, "rb") as file:
        os.fsync(file.fileno())


def megabytes_per_second(work: Callable[[], object], logits_NC: Tensor) -> float:
    started = time.perf_counter()
    work()
    return logits_NC.nbytes / 1e6 / (time.perf_counter() - started)


def measure(directory: Path, logits_NC: Tensor, repetitions: int) -> list[setup.Row]:
    """A row of the table for each form."""
    count, num_classes = logits_NC.shape
    parts = {encoding: made.build_part("shard", logits_NC, encoding) for encoding in STORED[num_classes]}
    forms = plain_forms(directory, logits_NC) | {name: stored_form(directory, part) for name, part in parts.items()}
    speeds: dict[tuple[str, str], list[float]] = {}
    for _ in range(repetitions):
        works: dict[tuple[str, str], Callable[[], object]] = {}
        works |= {("write", name): partial(write_synced, form) for name, form in forms.items()}
        works |= {("read", name): form.read for name, form in forms.items()}
        works |= {("encode", name): partial(made.build_part, "shard", logits_NC, name) for name in parts}
        for key, work in works.items():
            speeds.setdefault(key, []).append(megabytes_per_second(work, logits_NC))

    def speed(verb: str, name: str) -> tuple[float, float]:
        """MB/s, and as a multiple of default Parquet's."""
        own = speeds[verb, name]
        return setup.median(own), setup.median(a / b for a, b in zip(own, speeds[verb, BASELINE], strict=True))

    rows: list[setup.Row] = []
    for name, form in forms.items():
        row: setup.Row = {"C": str(num_classes), "form": name, "bytes/row": form.path.stat().st_size / count}
        row["write"], row["write, ×"] = speed("write", name)
        row["read"], row["read, ×"] = speed("read", name)
        row["encode"] = setup.median(speeds["encode", name]) if name in parts else None
        lost = parts[name].info.fidelity["mean"] if name in parts else {}
        rows.append(row | {f"KL, T={t}": lost.get(t) for t in ("1", "2", "4")})
    return rows


def main() -> None:
    arguments = setup.parse_arguments(__doc__, device=False)
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    count, repetitions = (2000, 3) if arguments.quick else (10_000, 9)
    report = setup.Report("store", {"rows": count, "repetitions": repetitions})
    for num_classes in STORED:
        logits_NC = made.peaked_logits(count, num_classes)
        top_N5 = logits_NC.softmax(-1).topk(5).values
        peaked = f"mean confidence {top_N5[:, 0].mean():.2f}, top 5 hold {top_N5.sum(-1).mean():.2f}"
        report.settings[f"C={num_classes}:"] = peaked
        with tempfile.TemporaryDirectory() as scratch:
            report.rows += measure(Path(scratch), logits_NC, repetitions)
    report.print(as_json=arguments.json)


if __name__ == "__main__":
    main()
