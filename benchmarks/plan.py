"""Does the bill come true? What `plan` predicts, divided by what `annotate` then does.

    python benchmarks/plan.py [--quick] [--json] [--device cuda]

For each corpus and encoding, in turns: plan, annotate into a new store, annotate into another. Read the table so:

    bytes            predicted ÷ written (parts, rejects, store.json); within 10 % is promised
    time             predicted ÷ taken, start-up included; within 20 % on a quiet machine
    rate             predicted ÷ taken, start-up left out: the labels of the middle of the run
    annotate twice   the second run's time ÷ the first's: what the machine itself is uncertain by
    plan ÷ annotate  what the plan cost; for a real corpus it is some minutes to days

The shards hold 28-pixel PNGs (Fashion-MNIST), one in fifty of them no image, or made JPEGs of 256 pixels. Plan labels a
fraction of each, as it would of a real corpus.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import made
import setup

from pseudolabel.annotate import Progress, annotate
from pseudolabel.demo import pack_bundled
from pseudolabel.engines.local import LocalEngine
from pseudolabel.plan import plan
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import Shard, list_shards
from pseudolabel.shards import write_shard

COLUMNS = ("bytes", "time", "rate", "annotate twice", "plan ÷ annotate")


class Middle:
    """The rate from a quarter to three quarters of the samples."""

    def __init__(self, samples: int) -> None:
        self._bounds, self._done, self._marks = (samples / 4, samples * 3 / 4), 0, list[tuple[int, float]]()

    def __call__(self, progress: Progress) -> None:
        self._done += progress.samples
        if progress.samples and self._done >= self._bounds[min(len(self._marks), 1)] and len(self._marks) < 2:
            self._marks.append((self._done, time.perf_counter()))

    @property
    def rate(self) -> float:
        (first, begin), (last, end) = self._marks
        return (last - first) / (end - begin)


def corpus(directory: Path, images: Sequence[bytes], shards: int, rows: int, bad_every: int) -> list[Shard]:
    """Shards of their own samples, each a tenth longer than the one before; every so many-th is no image."""
    field, start = "png" if images[0].startswith(b"\x89PNG") else "jpg", 0
    for number in range(shards):
        length = round(rows * (1 + number / 10))
        positions = range(start, start + length)
        samples = (
            (f"{at:08d}", {field: images[at % len(images)] if not bad_every or at % bad_every else b"none"})
            for at in positions
        )
        write_shard(directory / f"shard-{number:05d}.tar", samples)
        start += length
    return list_shards(directory)


def measure(uri: str, shards: Sequence[Shard], encoding: str, device: str, *, quick: bool) -> setup.Row:
    """What the columns say, medians over repetitions."""
    settings, engine = AnnotateSettings(encoding=encoding), LocalEngine(device)
    options = {"probe_samples": 1024, "probe_seconds": 3.0 if quick else 10.0, "label_seconds": 60.0}
    ratios: dict[str, list[float]] = {column: [] for column in COLUMNS}
    for _ in range(1 if quick else 3):
        bill = plan(shards, uri, engine=engine, settings=settings, **options)  # type: ignore[arg-type]
        runs = []
        for _ in range(2):
            middle = Middle(bill.samples)
            with tempfile.TemporaryDirectory() as out:
                run = annotate(shards, uri, out, engine=engine, settings=settings, on_progress=middle)
                written = sum(
                    path.stat().st_size for path in Path(out).rglob("*") if path.suffix != ".jsonl" and path.is_file()
                )
            runs.append((run.seconds, middle.rate))
        seconds = math.sqrt(runs[0][0] * runs[1][0])
        ratios["bytes"].append(bill.store_bytes / written)
        ratios["time"].append(bill.seconds / seconds)
        ratios["rate"].append(bill.samples_per_second / math.sqrt(runs[0][1] * runs[1][1]))
        ratios["annotate twice"].append(runs[1][0] / runs[0][0])
        ratios["plan ÷ annotate"].append(bill.probe_seconds / seconds)
    return {column: setup.median(values) for column, values in ratios.items()}


def main() -> None:
    arguments = setup.parse_arguments(__doc__)
    report = setup.Report(
        "plan", {"device": arguments.device, "quick": arguments.quick, "load": f"{os.getloadavg()[0]:.1f}"}
    )
    scale = 1 if arguments.quick else 3
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        pack_bundled(directory / "data")
        garments = [png for shard in list_shards(directory / "data" / "unlabeled") for png in made.garments(shard)]
        heavy = made.random_model(directory / "mobilenet", "torchvision:mobilenet_v3_small", made.IMAGENET)
        teacher = made.bundled_teacher(directory)
        small = corpus(directory / "garments", garments, shards=12, rows=250 * scale, bad_every=50)
        photos = made.photos(1150 * scale)  # each once: what repeats compresses otherwise than a corpus does
        large = corpus(directory / "photos", photos, shards=12, rows=60 * scale, bad_every=0)
        cases = [
            ("10 classes, 28 px", teacher, small, "dense"),
            ("10 classes, 28 px", teacher, small, "topk:5"),
            ("1,000 classes, 256 px", heavy, large, "dense"),
            ("1,000 classes, 256 px", heavy, large, "topk:20"),
        ]
        for name, uri, shards, encoding in cases[::3] if arguments.quick else cases:
            found = measure(uri, shards, encoding, arguments.device, quick=arguments.quick)
            report.rows.append({"corpus": name, "encoding": encoding, **found})
    report.print(as_json=arguments.json)


if __name__ == "__main__":
    main()
