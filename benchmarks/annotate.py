"""What annotating costs beside the teacher's own forward pass.

    python benchmarks/annotate.py [--quick] [--json] [--device cuda]

For teachers from light to heavy, in turns: the bare forward pass over decoded, stacked batches that lie on the device;
reading and decoding alone; annotate in one process; annotate with a process per core (or GPU). On a CPU a process has
one thread. The shards hold 28-pixel PNGs (Fashion-MNIST) or made JPEGs of 256 pixels. Read the table so:

    read+decode ÷ forward     time for the same images; where it is above 1, decoding bounds annotate
    annotate ÷ forward        images/s; near 1 where an idle core (or a fast GPU host) hides decoding
    … by CPU time             images per CPU-second: what is left where no core is idle, as with a process per core
    ceiling                   of … by CPU time, if all but decoding and the forward pass were free
    all ÷ one                 images/s, all processes to one; – with a single GPU
    start-up                  in forward passes: how many images the teacher could label before annotate's first batch

Rates are taken while every worker is busy: from when each has labeled a batch to when the last shard is begun.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import made
import setup
import torch

from pseudolabel.annotate import Progress, annotate
from pseudolabel.decoding import DecodedBatch, decode_shard
from pseudolabel.demo import pack_bundled
from pseudolabel.engines.local import LocalEngine, available_cores
from pseudolabel.interfaces import LoadedTeacher
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shards import Shard, list_shards
from pseudolabel.teachers import parse_teacher

COLUMNS = ("read+decode ÷ forward", "annotate ÷ forward", "… by CPU time", "ceiling", "all ÷ one", "start-up")


class Window:
    """Follows annotate's progress."""

    def __init__(self, workers: int, shards: int) -> None:
        self._bounds, self._begun, self._images = (workers, shards), set[str](), 0
        self._called, self.startup = time.perf_counter(), 0.0
        self._marks: list[tuple[int, float, float]] = []

    def __call__(self, progress: Progress) -> None:
        self.startup = self.startup or time.perf_counter() - self._called
        self._images += progress.samples
        if progress.samples and progress.shard not in self._begun:
            self._begun.add(progress.shard)
            if len(self._begun) in self._bounds:
                self._marks.append((self._images, time.perf_counter(), time.process_time()))

    @property
    def rates(self) -> setup.Rates:
        (first, wall, cpu), (last, wall_end, cpu_end) = self._marks
        return setup.Rates((last - first) / (wall_end - wall), (last - first) / (cpu_end - cpu))


def forward(teacher: LoadedTeacher, resident: Iterator[tuple[torch.Tensor, ...]], batches: int) -> int:
    """The bare forward pass over the next batches."""
    with torch.inference_mode():
        return sum(len(teacher.logits(inputs)) for inputs in islice(resident, batches))


def decode(teacher: LoadedTeacher, shard: Shard, batch_size: int, device: str) -> int:
    """Reading and decoding a shard, on as many threads as annotate decodes on."""
    threads = 1 if device == "cpu" else min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        stream = decode_shard(shard, teacher.prepare, batch_size, map if threads == 1 else pool.map)
        return sum(len(batch.keys) for batch in stream if isinstance(batch, DecodedBatch))


def annotate_run(uri: str, shards: Sequence[Shard], device: str, workers: int, batch_size: int) -> Window:
    """Annotate into a new store, watched."""
    window = Window(workers, len(shards))
    with tempfile.TemporaryDirectory() as out:
        engine, settings = LocalEngine(device, workers), AnnotateSettings(batch_size=batch_size)
        annotate(shards, parse_teacher(uri), out, engine=engine, settings=settings, on_progress=window)
    return window


def measure(uri: str, images: Sequence[bytes], device: str, *, quick: bool) -> setup.Row:
    """What the columns say, medians over repetitions."""
    seconds, repetitions, batch_size = 0.5 if quick else 3.0, 1 if quick else 5, 64 if device == "cpu" else 256
    workers = available_cores() if device == "cpu" else len(LocalEngine(device).devices())
    teacher = parse_teacher(uri).load(torch.device(device))
    ratios: dict[str, list[float]] = {column: [] for column in COLUMNS}
    with tempfile.TemporaryDirectory() as scratch:
        (probe,) = made.write_shards(Path(scratch) / "probe", images, rows=4 * batch_size, count=1)
        decoded = [one for one in decode_shard(probe, teacher.prepare, batch_size) if isinstance(one, DecodedBatch)]
        resident = [tuple(column.to(device) for column in batch.inputs) for batch in decoded]
        bare = partial(forward, teacher, cycle(resident), 1 if device == "cpu" else 20)
        read = partial(decode, teacher, probe, batch_size, device)
        setup.rates_of(bare, device, seconds / 4)  # warms up
        rate = min(setup.rates_of(work, device, seconds / 4).wall for work in (bare, read))
        rows = batch_size * min(max(round(rate * seconds / 4 / batch_size), 1), 1024 // batch_size)
        count = max(3, math.ceil(rate * seconds / rows) + 1)
        shards = made.write_shards(Path(scratch) / "shards", images, rows=rows, count=count * workers)
        read = partial(decode, teacher, shards[0], batch_size, device)
        for _ in range(repetitions):
            by_forward, by_decode = setup.rates_of(bare, device, seconds), setup.rates_of(read, device, seconds / 2)
            one = annotate_run(uri, shards[:count], device, 1, batch_size)
            found = {
                "read+decode ÷ forward": by_forward.wall / by_decode.wall,
                "annotate ÷ forward": one.rates.wall / by_forward.wall,
                "start-up": one.startup * by_forward.wall,
            }
            if device == "cpu":
                found["… by CPU time"] = one.rates.cpu / by_forward.cpu
                found["ceiling"] = by_decode.cpu / (by_forward.cpu + by_decode.cpu)
            if workers > 1:
                every = annotate_run(uri, shards, device, workers, batch_size)
                found["all ÷ one"] = every.rates.wall / one.rates.wall
            for column, value in found.items():
                ratios[column].append(value)
    return {column: setup.median(values) if values else None for column, values in ratios.items()}


def main() -> None:
    arguments = setup.parse_arguments(__doc__)
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    report = setup.Report("annotate", {"device": arguments.device, "quick": arguments.quick})
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        pack_bundled(directory / "data")
        garments = made.garments(list_shards(directory / "data" / "unlabeled")[0])
        student = made.random_model(directory / "student", "small:resnet8?width=16&stem_stride=2")
        cases = [("the demo's student", student, garments), ("its teacher", made.bundled_teacher(directory), garments)]
        for name in ("mobilenet_v3_small", "resnet18"):
            heavy = made.random_model(directory / name, f"torchvision:{name}", made.IMAGENET)
            cases.append((name, heavy, made.photos(64)))
        for name, uri, images in cases[::2] if arguments.quick else cases:
            report.rows.append({"teacher": name, **measure(uri, images, arguments.device, quick=arguments.quick)})
    report.print(as_json=arguments.json)


if __name__ == "__main__":
    main()
