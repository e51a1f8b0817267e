"""Is a target precision kept as often as its certainty says? On Fashion-MNIST's test images, over random splits.

    python benchmarks/target_precision.py [--json] [--images DIR] [--splits 20] [--labeled 1000] [--target 0.95]

The bundled teacher, which has not seen them, labels the test images in DIR (the bundled 3,500 if not given) once. In
each split so many of them, drawn at random, keep their label and are the evidence; `select --target-precision` takes
from the others, whose labels then tell the true precision of what it took. Read the table so:

    reached    splits whose true precision is at least the target, of those in which something was selected
    short by   the largest distance from the target of those that fell short, in points
    selected   mean share of the unlabeled rows that was taken; `possible` is what the labels of all would allow
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import made
import numpy as np
import setup
import torch
from torch import Tensor

from pseudolabel.annotate import annotate
from pseudolabel.calibration.calibrate import calibrate
from pseudolabel.demo import bundled
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import SelectionError
from pseudolabel.labels.store import open_store
from pseudolabel.labels.tensors import to_torch
from pseudolabel.pack import pack
from pseudolabel.selection import open_selection
from pseudolabel.selection.select import select
from pseudolabel.settings import AnnotateSettings, SelectSettings


def teacher_says(images: Path, scratch: Path) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and labels (N,) of the test images."""
    full = images / "t10k-images-idx3-ubyte.gz"
    pack(full if full.exists() else images / "test-images-idx3-ubyte.gz", scratch / "packed", test_fraction=1.0)
    teacher = f"checkpoint:{bundled('data/fashion-mnist') / 'teacher'}"
    settings = AnnotateSettings(precision="fp32")
    annotate(scratch / "packed" / "test", teacher, scratch / "all", engine=LocalEngine("cpu"), settings=settings)
    store = open_store(scratch / "all")
    tables = [store.read(name) for name in store.part_names()]
    logits = torch.cat([to_torch(table["logits"]) for table in tables])
    return logits.float(), torch.cat([to_torch(table["label"]) for table in tables]).long()


def split(
    logits_NC: Tensor, label_N: Tensor, seed: int, labeled: int, settings: SelectSettings, calibrated: bool, root: Path
) -> tuple[float | None, float]:
    """The true precision of what was selected, None if nothing was, and the share that was."""
    order_N = torch.randperm(len(label_N), generator=torch.Generator().manual_seed(seed))
    known_N, rest_N = order_N[:labeled], order_N[labeled:]
    parts = {"known": (logits_NC[known_N], label_N[known_N].tolist()), "rest": (logits_NC[rest_N], None)}
    store = made.store_of(root / "store", parts)
    calibration = calibrate(store).calibration if calibrated else None
    try:
        select(store, root / "selection", settings, calibration=calibration)
    except SelectionError:
        return None, 0.0
    chosen = open_selection(root / "selection").read("rest", store.info("rest").sha256)["index"].to_numpy()
    right_N = logits_NC[rest_N].argmax(-1) == label_N[rest_N]
    return float(right_N[torch.from_numpy(chosen.copy()).long()].double().mean()), len(chosen) / len(rest_N)


def possible(logits_NC: Tensor, label_N: Tensor, target: float) -> float:
    """The largest share of rows above one confidence of which `target` are right."""
    confidence_N, pred_N = logits_NC.softmax(-1).max(-1)
    order_N = confidence_N.argsort(descending=True)
    precision_N = (pred_N == label_N)[order_N].double().cumsum(0) / torch.arange(1, len(order_N) + 1)
    return float((precision_N >= target).nonzero().max() + 1) / len(order_N)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    parser.add_argument("--images", type=Path, default=bundled("data/fashion-mnist"), help="directory of IDX files")
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--labeled", type=int, default=1000)
    parser.add_argument("--target", type=float, default=0.95)
    arguments = parser.parse_args()
    facts = {"splits": arguments.splits, "labeled": arguments.labeled, "target": arguments.target}
    report = setup.Report("target precision", facts)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        logits_NC, label_N = teacher_says(arguments.images, scratch)
        report.settings["images"] = len(label_N)
        report.settings["teacher's accuracy"] = f"{float((logits_NC.argmax(-1) == label_N).double().mean()):.4f}"
        report.settings["possible"] = f"{possible(logits_NC, label_N, arguments.target):.3f}"
        for certainty in (0.8, 0.95):
            for calibrated in (False, True):
                settings = SelectSettings(target_precision=arguments.target, certainty=certainty)
                found = [
                    split(
                        logits_NC, label_N, seed, arguments.labeled, settings, calibrated,
                        scratch / f"{certainty}-{calibrated}-{seed}",
                    )
                    for seed in range(arguments.splits)
                ]  # fmt: skip
                precisions = [one for one, _ in found if one is not None]
                short = [100 * (arguments.target - one) for one in precisions if one < arguments.target]
                report.rows.append(
                    {
                        "certainty": f"{certainty:g}",
                        "calibrated": "yes" if calibrated else "no",
                        "reached": f"{len(precisions) - len(short)} of {len(precisions)}",
                        "short by": max(short, default=None),
                        "mean precision": float(np.mean(precisions)),
                        "selected": float(np.mean([share for _, share in found])),
                    }
                )
    report.print(as_json=arguments.json)


if __name__ == "__main__":
    main()
