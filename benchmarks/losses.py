"""What a student reaches with each loss, from the same soft labels in as many steps.

    python benchmarks/losses.py [--quick] [--json] [--images DIR] [--steps N] [--seeds N] [--lr X]

Images of DIR (Fashion-MNIST's four IDX files; the bundled 12,500 + 3,500 if not given) and the teacher of
`student_views.py`, trained on all labels. Every student has the same images, augmentation, steps and learning rate, and
learns from soft labels alone with the loss's own parameters as they are by default; `labels` is cross-entropy with the
true labels instead. One data set says little about another: the order here is no ranking, but a loss far below the rest
wants another learning rate or parameter.

`accuracy` is on the test images, mean ± s.d. over the seeds.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import setup
import student_views
import torch

from pseudolabel.allocator import keep_freed_memory
from pseudolabel.demo import bundled
from pseudolabel.evaluate import evaluate
from pseudolabel.losses import LOSSES
from pseudolabel.train import train

LABELS = "labels"
OF_TEACHER = ("dkd", "nkd")  # whose target is the label, or else the teacher's class
STANDARDIZED = "kd, standardized"


def loss_of(name: str) -> str:
    return f"{name}?target=teacher" if name in OF_TEACHER else name.partition(",")[0]


def one_run(scratch: Path, name: str, steps: int, seed: int, lr: float) -> float:
    """Test accuracy in percent of one student."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as the command does
    update: dict[str, Any] = {"steps": steps, "seed": seed, "lr": lr}
    out = scratch / f"{name}-{seed}"
    if name == LABELS:
        settings = student_views.STUDENT.model_copy(update={**update, "labeled_fraction": 1.0})
        train(settings, out, labeled=scratch / "train", threads=1)
    else:
        update |= {"loss": loss_of(name), "standardize": name == STANDARDIZED}
        settings = student_views.STUDENT.model_copy(update=update)
        train(settings, out, unlabeled=scratch / "train", store=scratch / "store", threads=1)
    return 100 * evaluate(out, scratch / "test").accuracy


def main() -> None:
    parser = setup.seeded_parser(__doc__, 2500, bundled("data/fashion-mnist"))
    parser.add_argument("--lr", type=float, default=student_views.STUDENT.lr)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    steps, seeds = (10, 1) if arguments.quick else (arguments.steps, arguments.seeds)
    names = [*LOSSES, STANDARDIZED, LABELS]
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        student_views.prepare(arguments.images, scratch, views=1, quick=arguments.quick)
        teacher = 100 * evaluate(scratch / "teacher", scratch / "test").accuracy
        found: dict[str, list[float]] = {name: [] for name in names}
        with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
            asked = {
                (name, seed): pool.submit(one_run, scratch, name, steps, seed, arguments.lr)
                for seed in range(seeds)
                for name in names
            }
            for (name, seed), future in asked.items():
                found[name].append(future.result())
                print(name, seed, found[name][-1], file=sys.stderr, flush=True)
    report = setup.Report("losses", {"steps": steps, "seeds": seeds, "lr": arguments.lr, "teacher": f"{teacher:.2f}"})
    for name, accuracies in found.items():
        spread = f" ± {statistics.stdev(accuracies):.2f}" if seeds > 1 else ""
        report.rows.append({"loss": name, "accuracy": f"{statistics.fmean(accuracies):.2f}{spread}"})
    report.print(as_json=arguments.json)


if __name__ == "__main__":
    main()
