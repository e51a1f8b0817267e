"""What verify costs, and how far labels that are made again lie from those that are stored.

    python benchmarks/verify.py

    read     a part of 10,000 rows, its hash and page checksums included: what training does, too
    check    all that verify looks at in its rows, beside that

Then KL in nats, row by row, of the bundled teacher on 3,000 of its test images, on this machine's CPU: between batches
of 256 and of 7, between precisions (more than a device can make of it), and between an image and the one before it.
verify's --tolerance has to lie between the last and the others.
"""

from __future__ import annotations

import gzip
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pseudolabel.labels import schema
from pseudolabel.labels.checks import check_part
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.facts import divergence, fidelity, summarize
from pseudolabel.labels.schema import PartInfo
from pseudolabel.labels.store import StoreIdentity, create
from pseudolabel.labels.tensors import to_arrow
from pseudolabel.precision import autocast
from pseudolabel.teachers import parse_teacher

ROWS, CLASSES = 10_000, 1000
IMAGES = Path(__file__).parent.parent / "data" / "fashion-mnist"


def cost(encoding_name: str, root: Path) -> None:
    encoding = parse_encoding(encoding_name)
    logits_BC = 3 * torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0))
    columns = {**summarize(logits_BC), **encoding.encode(logits_BC, torch.arange(ROWS))}
    lost = divergence(encoding, {name: column[:100] for name, column in columns.items()}, logits_BC[:100])
    ready = {"key": [f"some/{row}" for row in range(ROWS)], "index": range(ROWS), "view": [0] * ROWS}
    ready["label"] = [None] * ROWS
    wanted = schema.part_schema(encoding.fields(CLASSES), augmented=False)
    arrays = [
        pa.array(ready[one.name], one.type) if one.name in ready else to_arrow(columns[one.name], one.type)
        for one in wanted
    ]
    identity = StoreIdentity({}, tuple(map(str, range(CLASSES))), encoding.name, {"count": 1}, "fp32")
    store, rejects = create(root / "store", identity), schema.REJECT_SCHEMA.empty_table()
    facts = (encoding.name, CLASSES, fidelity(lost, encoding.temperatures))
    info = PartInfo(store.fingerprint, "a", 1, "0" * 64, ROWS, 0, *facts)
    store.commit(info, pa.Table.from_arrays(arrays, schema=wanted), rejects)
    part, path = store.read("a"), store.part_path("a")
    reading = fastest(lambda: store.read("a"))
    checking = fastest(lambda: check_part(path, identity, info, part, rejects))
    print(f"{encoding.name:<12} read {reading:6.1f} ms   check {checking:6.1f} ms   {checking / reading:.2f} of it")


def fastest(work: Callable[[], object]) -> float:
    found = []
    for _ in range(7):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return 1000 * min(found)


def distances() -> None:
    content = gzip.decompress((IMAGES / "test-images-idx3-ubyte.gz").read_bytes())
    images = torch.from_numpy(np.frombuffer(content, np.uint8, offset=16).reshape(-1, 1, 28, 28)[:3000].copy())
    teacher = parse_teacher(f"checkpoint:{IMAGES / 'teacher'}").load(torch.device("cpu"))
    inputs = tuple(map(torch.stack, zip(*map(teacher.prepare, images), strict=True)))

    def log_probs(precision: str, batch: int) -> Tensor:
        with torch.inference_mode(), autocast(precision, "cpu"):
            pieces = zip(*(torch.split(one, batch) for one in inputs), strict=True)
            return torch.cat([teacher.logits(piece).float() for piece in pieces]).double().log_softmax(-1)

    plain, bf16 = log_probs("fp32", 256), log_probs("bf16", 256)
    others = {
        "fp32, batches of 7": (log_probs("fp32", 7), plain),
        "bf16, batches of 7": (log_probs("bf16", 7), bf16),
        "fp16 and fp32": (log_probs("fp16", 256), plain),
        "bf16 and fp32": (bf16, plain),
        "another image": (plain.roll(1, 0), plain),
    }
    for name, (p_BC, q_BC) in others.items():
        kl_B = (p_BC.exp() * (p_BC - q_BC)).sum(-1)
        share = (kl_B > 0.01).double().mean()
        print(f"{name:<20} median {kl_B.median():.2g}   largest {kl_B.max():.2g}   above 0.01: {share:.1%}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in ("topk:10", "sampled:50", "dense", "dense8"):
        with tempfile.TemporaryDirectory() as scratch:
            cost(name, Path(scratch))
    distances()
