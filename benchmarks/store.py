"""What the store costs: bytes a row, speed beside plain files of float32 logits, and what rounding and tails lose.

    python benchmarks/store.py [--quick] [--json]

Each form keeps the same logits: `np.save` and `torch.save` of float32, pyarrow's default Parquet of a list<float>
column, and parts as annotate writes them (keys, labels, summaries, checksums and hash included). MB/s count the
float32 logits, 4·C bytes a row, whatever the form takes on disk. Read the columns so:

    bytes/row     the whole file; `× smaller` is 4·C over it
    write, read   MB/s on one thread, the file synced, the page cache warm; in brackets as a multiple of default
                  Parquet. Reading a part takes the columns that training takes; its hash is verified. The MB/s of two
                  machines don't compare, the multiples do
    encode        MB/s of what annotate does to a batch's logits before: encode, sum up, measure fidelity, make a table
    KL            mean nats of KL(full ‖ stored) at T = 1, 2 and 4 (`labels.encodings.divergence`)

The logits are made, not measured: class vectors w_c in 64 dimensions, in groups of ten that share a centre (cosine
about 0.5 within a group); an image of class y has the features w_y + noise, its logits are a·w_c·features with a
lognormal a. So rows differ in confidence, the runners-up are the class's relatives, and the tail is bell-shaped. The
line above the table says how peaked they are.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import setup
import torch
from torch import Tensor

from pseudolabel.decoding import DecodedBatch, ShardEnd
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.part import AnnotatedShard, PartBuilder
from pseudolabel.labels.schema import write_sealed
from pseudolabel.labels.store import Store, StoreIdentity

BASELINE = "Parquet, default"
BATCH = 256
STORED = {10: ("dense", "topk:5"), 1000: ("dense", "topk:10", "topk:50")}


def peaked_logits(rows: int, classes: int) -> Tensor:
    """Logits (rows, classes) as a trained linear head would give them, see above."""
    made = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made)

    centres = normal(-(-classes // 10), 64).repeat_interleave(10, dim=0)[:classes]
    vectors_CD = torch.nn.functional.normalize(centres + normal(classes, 64), dim=-1)
    of_class_N = torch.randint(classes, (rows,), generator=made)
    features_ND = vectors_CD[of_class_N] + 0.12 * normal(rows, 64)
    return 12.0 * (0.4 * normal(rows, 1)).exp() * (features_ND @ vectors_CD.T)


def build_part(logits_NC: Tensor, encoding: str) -> AnnotatedShard:
    """A shard's part as annotate makes it, batch by batch."""
    builder = PartBuilder("shard", parse_encoding(encoding), logits_NC.shape[1], fingerprint="0" * 64)
    for start in range(0, len(logits_NC), BATCH):
        logits_BC = logits_NC[start : start + BATCH]
        rows = range(start, start + len(logits_BC))
        builder.add(DecodedBatch([f"sample-{row:08d}" for row in rows], list(rows), [None] * len(rows)), logits_BC)
    return builder.finish(ShardEnd(size=0, sha256="0" * 64, samples=len(logits_NC)))


@dataclass(frozen=True)
class Form:
    """One way to keep logits: what writes the file at `path`, what reads it again."""

    name: str
    path: Path
    write: Callable[[], object]
    read: Callable[[], object]


def plain_forms(directory: Path, logits_NC: Tensor) -> list[Form]:
    """What one would write without a store. Synced like the store's files: the forms are compared, not the disk."""
    npy, pt, parquet = directory / "logits.npy", directory / "logits.pt", directory / "logits.parquet"
    array = logits_NC.numpy()
    table = pa.table({"logits": pa.array(list(array), pa.list_(pa.float32()))})

    def synced(path: Path, write: Callable[[], object]) -> Callable[[], object]:
        def write_and_sync() -> None:
            write()
            with open(path, "rb") as file:
                os.fsync(file.fileno())

        return write_and_sync

    return [
        Form("np.save", npy, synced(npy, lambda: np.save(npy, array)), lambda: np.load(npy)),
        Form(
            "torch.save", pt, synced(pt, lambda: torch.save(logits_NC, pt)), lambda: torch.load(pt, weights_only=True)
        ),
        Form(
            BASELINE,
            parquet,
            synced(parquet, lambda: pq.write_table(table, parquet)),
            lambda: pq.read_table(parquet),
        ),
    ]


def stored_form(directory: Path, logits_NC: Tensor, encoding: str, made: AnnotatedShard) -> Form:
    """A part in a store, read as training reads it."""
    num_classes = logits_NC.shape[1]
    classes = tuple(map(str, range(num_classes)))
    root = directory / encoding.replace(":", "-")
    store = Store(root, StoreIdentity({}, classes, encoding, {"count": 1}, "fp32"))
    columns = ["key", "index", "pred", *(one.name for one in parse_encoding(encoding).fields(num_classes))]
    path = store.part_path("shard")
    write = partial(write_sealed, path, made.part, made.info.to_json())
    return Form(encoding, path, write, partial(store.read, "shard", columns))


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(directory: Path, logits_NC: Tensor, repetitions: int) -> list[dict[str, str | float | None]]:
    """A row of the table for each form, all written and read in turns."""
    count, num_classes = logits_NC.shape
    parts = {encoding: build_part(logits_NC, encoding) for encoding in STORED[num_classes]}
    forms = plain_forms(directory, logits_NC)
    forms += [stored_form(directory, logits_NC, encoding, made) for encoding, made in parts.items()]
    write: dict[str, list[float]] = {form.name: [] for form in forms}
    read: dict[str, list[float]] = {form.name: [] for form in forms}
    encode: dict[str, list[float]] = {encoding: [] for encoding in parts}
    for _ in range(repetitions):
        for form in forms:
            write[form.name].append(seconds(form.write))
        for form in forms:
            read[form.name].append(seconds(form.read))
        for encoding in parts:
            encode[encoding].append(seconds(partial(build_part, logits_NC, encoding)))

    megabytes = logits_NC.nbytes / 1e6

    def speed(times: dict[str, list[float]], name: str) -> str:
        ratio = setup.median(base / own for base, own in zip(times[BASELINE], times[name], strict=True))
        return f"{setup.median(megabytes / one for one in times[name]):.0f} ({ratio:.2g}×)"

    rows: list[dict[str, str | float | None]] = []
    for form in forms:
        size = form.path.stat().st_size / count
        loss = parts[form.name].info.fidelity["mean"] if form.name in parts else {}
        rows.append(
            {
                "C": str(num_classes),
                "form": form.name,
                "bytes/row": round(size, 1),
                "× smaller": round(4 * num_classes / size, 2),
                "write": speed(write, form.name),
                "read": speed(read, form.name),
                "encode": f"{setup.median(megabytes / one for one in encode[form.name]):.0f}" if loss else None,
                **{f"KL, T={t}": loss.get(t) for t in ("1", "2", "4")},
            }
        )
    return rows


def main() -> None:
    arguments = setup.parse_arguments(__doc__, device=False)
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    count, repetitions = (2000, 3) if arguments.quick else (10_000, 9)
    report = setup.Report("store", {"rows": count, "repetitions": repetitions})
    for num_classes in STORED:
        logits_NC = peaked_logits(count, num_classes)
        top_NK = logits_NC.softmax(-1).topk(min(10, num_classes)).values
        report.settings[f"C={num_classes}"] = (
            f"mean confidence {top_NK[:, 0].mean():.2f}, mass of the top 5 {top_NK[:, :5].sum(-1).mean():.3f}"
        )
        with tempfile.TemporaryDirectory() as scratch:
            report.rows += measure(Path(scratch), logits_NC, repetitions)
    report.print(as_json=arguments.json)


if __name__ == "__main__":
    main()
