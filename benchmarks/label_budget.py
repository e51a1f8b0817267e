"""Bytes a row against what they cost: KL, and the accuracy of a student that learns from the labels and nothing else.

    python benchmarks/label_budget.py [--quick] [--json] [--images DIR] [--steps N] [--seeds N] [--classes C]

Two tasks, of the images in DIR (Fashion-MNIST's four IDX files; the bundled 12,500 + 3,500 if not given):

    C=10    garments, labeled by the bundled teacher
    C=100   pairs: one garment in the red channel, another in the green, labeled by the same teacher run on each; a
            class is an ordered pair, its logit the sum of both log-probabilities

Every store is written by annotate, every student trained by train with alpha 1, at the same temperature, steps, seeds
and augmentation, so that the rows of the table differ in the labels alone. `topk:K` is compared with its tail as one
bucket. Read the table so:

    bytes/row  of the part files, all columns (keys and summaries are some 30 of them)
    label      bytes of the encoding's own columns, as they lie in the file
    KL         mean nats at T = 1, 2 and 4; of sampled labels KL(stored ‖ full) at the temperature of the draws
    accuracy   on the test images, mean ± s.d. over the seeds; of dense that is the reference
"""

from __future__ import annotations

import io
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import setup
import torch
from PIL import Image
from torch import Tensor, nn

from pseudolabel.annotate import annotate
from pseudolabel.checkpoint import load_model
from pseudolabel.demo import bundled
from pseudolabel.engines.local import LocalEngine
from pseudolabel.evaluate import evaluate
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.store import open_store
from pseudolabel.labels.summary import summarize_store
from pseudolabel.pack import pack
from pseudolabel.settings import AnnotateSettings, AugmentSettings, TrainSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import read_samples, write_shard
from pseudolabel.train import train
from pseudolabel.views.image import decode, square

TEMPERATURE = 2
ENCODINGS = {
    10: ("dense", "dense8", "topk:1", "topk:2", "topk:3", "sampled:20@2", "sampled:50@2"),
    100: ("dense", "dense8", "topk:1", "topk:5", "topk:10", "topk:20", "sampled:20@2", "sampled:50@2"),
}
QUICK = ("dense", "topk:1", "sampled:20@2")
ROWS = 2000  # of a shard of pairs


class Pairs(nn.Module):
    """The bundled teacher on both channels: log p(a) + log p(b) for every ordered pair of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.of_one = load_model(bundled("data/fashion-mnist") / "teacher", torch.device("cpu"))
        self.model = self.of_one.model  # so that its weights are this model's, too
        self.preprocessing = {**square(28, 3).to_json(), "mean": [0.0] * 3, "std": [1.0] * 3}
        self.classes = [f"{a} + {b}" for a in self.of_one.classes for b in self.of_one.classes]

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        levels_BCHW = (pixels_BCHW * 255).round().to(torch.uint8)
        first_BC, second_BC = (
            self.of_one.logits((levels_BCHW[:, channel : channel + 1],)).log_softmax(-1) for channel in (0, 1)
        )
        return (first_BC[:, :, None] + second_BC[:, None, :]).flatten(1)


def pairs() -> nn.Module:
    """What `python:label_budget:pairs` calls."""
    return Pairs()


def write_pairs(garments: Path, out: Path, seed: int) -> None:
    """Each image once in red, with another in green; labels where the images have them."""
    samples = [sample for shard in list_shards(garments) for sample in read_samples(shard)]
    images = [decode(sample.fields["png"])[0] for sample in samples]
    labels = [sample.fields.get("cls") for sample in samples]
    others = np.random.default_rng(seed).permutation(len(samples))
    for start in range(0, len(samples), ROWS):
        rows = range(start, min(start + ROWS, len(samples)))
        write_shard(out / f"{out.name}-{start // ROWS:04d}.tar", (_pair(images, labels, a, others[a]) for a in rows))


def _pair(images: list[Tensor], labels: list[bytes | None], a: int, b: int) -> tuple[str, dict[str, bytes]]:
    buffer = io.BytesIO()
    red, green = images[a], images[b]
    Image.fromarray(torch.stack([red, green, torch.zeros_like(red)], -1).numpy()).save(buffer, format="PNG")
    fields = {"png": buffer.getvalue()}
    first, second = labels[a], labels[b]
    if first is not None and second is not None:
        fields["cls"] = str(10 * int(first) + int(second)).encode()
    return f"{a:06d}", fields


def prepare(images: Path, scratch: Path) -> dict[int, tuple[Path, str, TrainSettings]]:
    """Shards of both tasks, train/ and test/ in each, their teacher and their student."""
    whole = scratch / "packed"
    pack(images / "train-images-idx3-ubyte.gz", whole, labels_per_class=0)
    pack(images / "t10k-images-idx3-ubyte.gz" if (images / "t10k-images-idx3-ubyte.gz").exists() else
         images / "test-images-idx3-ubyte.gz", whole / "second", test_fraction=1.0)  # fmt: skip
    tasks = {10: scratch / "garments", 100: scratch / "pairs"}
    tasks[10].mkdir()
    shutil.move(whole / "unlabeled", tasks[10] / "train")
    shutil.move(whole / "second" / "test", tasks[10] / "test")
    for number, split in enumerate(("train", "test")):
        write_pairs(tasks[10] / split, tasks[100] / split, seed=number)
    common: dict[str, Any] = {
        "image_size": 28,
        "batch_size": 256,
        "labeled_fraction": 0.0,
        "alpha": 1.0,
        "temperature": TEMPERATURE,
    }
    common |= {"lr": 8e-3, "augment": AugmentSettings(flip=True)}
    student = "small:resnet8?width=16&stem_stride=2"
    return {
        10: (tasks[10], f"checkpoint:{bundled('data/fashion-mnist') / 'teacher'}",
             TrainSettings(student=student, channels=1, **common)),
        100: (tasks[100], "python:label_budget:pairs", TrainSettings(student=student, channels=3, **common)),
    }  # fmt: skip


def label_bytes(store: Path, encoding: str, num_classes: int) -> float:
    """Compressed bytes a row of the encoding's own columns."""
    names = {field.name for field in parse_encoding(encoding).fields(num_classes)}
    total = rows = 0
    for name in open_store(store).part_names():
        found = pq.read_metadata(store / "parts" / f"{name}.parquet")
        rows += found.num_rows
        for group in range(found.num_row_groups):
            chunks = (found.row_group(group).column(place) for place in range(found.num_columns))
            total += sum(one.total_compressed_size for one in chunks if one.path_in_schema.split(".")[0] in names)
    return total / rows


def main() -> None:
    parser = setup.seeded_parser(__doc__, 600, bundled("data/fashion-mnist"))
    parser.add_argument("--classes", type=int, choices=list(ENCODINGS), help="one of the tasks alone")
    arguments = parser.parse_args()
    steps, seeds = (10, 1) if arguments.quick else (arguments.steps, arguments.seeds)
    report = setup.Report("label budget", {"steps": steps, "seeds": seeds, "temperature": TEMPERATURE})
    engine = LocalEngine("cpu")
    here = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])  # of workers, for `pairs`
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        for num_classes, (data, teacher, settings) in prepare(arguments.images, scratch).items():
            if arguments.classes not in (None, num_classes):
                continue
            for encoding in QUICK if arguments.quick else ENCODINGS[num_classes]:
                store = scratch / f"store-{num_classes}-{encoding.replace(':', '-')}"
                asked = AnnotateSettings(encoding=encoding, precision="fp32")
                annotated = annotate(data / "train", teacher, store, engine=engine, settings=asked)
                accuracies = []
                for seed in range(seeds):
                    run = scratch / f"run-{num_classes}-{encoding.replace(':', '-')}-{seed}"
                    own = settings.model_copy(update={"steps": steps, "seed": seed})
                    train(own, run, unlabeled=data / "train", store=store, workers=1, threads=1)
                    accuracies.append(100 * evaluate(run, data / "test").accuracy)
                summary = summarize_store(store)
                report.settings[f"C={num_classes} images"] = annotated.samples
                report.rows.append(
                    {
                        "C": str(num_classes),
                        "encoding": encoding,
                        "bytes/row": summary.bytes_per_row,
                        "label": label_bytes(store, encoding, num_classes),
                        **{f"KL, T={t}": summary.fidelity["mean"].get(t) for t in ("1", "2", "4")},
                        "accuracy": f"{statistics.fmean(accuracies):.2f}"
                        + (f" ± {statistics.stdev(accuracies):.2f}" if seeds > 1 else ""),
                    }
                )
                print(report.rows[-1], file=sys.stderr, flush=True)
                shutil.rmtree(store)
    report.print(as_json=arguments.json)


if __name__ == "__main__":
    main()
