"""What annotating costs beside the teacher's own forward pass, and beside what people write themselves.

    python benchmarks/annotate.py [--quick] [--json] [--device cuda] [--rivals]

For teachers from light to heavy, in turns: the bare forward pass over decoded, stacked batches that lie on the device;
reading and decoding alone; annotate in one process; annotate with a process per core (or GPU). On a CPU a process has
one thread. The shards hold 28-pixel PNGs (Fashion-MNIST) or made JPEGs of 256 pixels. Read the table so:

    read+decode ÷ forward    time for the same images; where it is above 1, decoding bounds annotate
    of the bound             images/s of annotate ÷ what the hardware allows. On a CPU all work is on the same cores, so
                             the bound is 1 ÷ (decode + forward) images per CPU-second; on a GPU it is the bare forward
                             rate, or the decode rate of all cores if that is lower
    all ÷ one                images/s, all processes to one; – with a single GPU
    all, of the bound        on a CPU, images/s of all processes ÷ the bound times the cores
    ÷ DataLoader             annotate (all processes) ÷ a webdataset + DataLoader + torch.save loop (baselines.py)
    ÷ Ray Data               annotate ÷ Ray Data's map_batches into Parquet; – without --rivals, or without Ray
    start-up                 in forward passes: how many images the teacher could label before annotate's first batch

Rates are taken while every worker is busy: from when each has labeled a batch to when the last shard is begun.
Rivals run in a process of their own, as they would. The loop has torch's default threads, or one, whichever is faster.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import baselines
import made
import setup
import torch

from pseudolabel.allocator import keep_freed_memory
from pseudolabel.annotate import Progress, annotate
from pseudolabel.decode_processes import decode_in_processes, decoding_processes
from pseudolabel.decoding import DecodedBatch, Decoding, decode_shard
from pseudolabel.demo import pack_bundled
from pseudolabel.engines.local import LocalEngine, available_cores
from pseudolabel.interfaces import LoadedTeacher
from pseudolabel.labeling.work import settle
from pseudolabel.precision import autocast
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import Shard, list_shards
from pseudolabel.teachers import parse_teacher
from pseudolabel.views.augment import preprocessings
from pseudolabel.views.image import PrepareFor

COLUMNS = (
    "read+decode ÷ forward",
    "of the bound",
    "all, of the bound",
    "all ÷ one",
    "÷ DataLoader",
    "÷ Ray Data",
    "start-up",
)
RIVAL_TURNS = 2


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


def forward(
    teacher: LoadedTeacher, resident: Iterator[tuple[torch.Tensor, ...]], batches: int, device: str, precision: str
) -> int:
    """The bare forward pass over the next batches."""
    with torch.inference_mode(), autocast(precision, device):
        return sum(len(teacher.logits(inputs)) for inputs in islice(resident, batches))


def decode(decoding: Decoding, shards: Sequence[Shard]) -> int:
    """Reading and decoding shards in turns, as a CPU's worker does."""
    return sum(
        len(batch.keys)
        for shard in shards
        for batch in decode_shard(shard, decoding)
        if isinstance(batch, DecodedBatch)
    )


def decode_rate(decoding: Decoding, shards: Sequence[Shard], device: str, seconds: float) -> setup.Rates:
    """Of reading and decoding: on a CPU of one core, beside a GPU of all processes that decode for it."""
    if device == "cpu":
        return setup.rates_of(lambda: decode(decoding, shards[:1]), device, seconds)
    stream = decode_in_processes(cycle(shards), decoding, decoding_processes(1), pin=True)
    rows = (len(batch.keys) for _, batch in stream if isinstance(batch, DecodedBatch))
    next(rows)  # starts the processes
    return setup.rates_of(lambda: next(rows), device, seconds)


def annotate_run(uri: str, shards: Sequence[Shard], device: str, workers: int) -> Window:
    """Annotate into a new store, watched."""
    window = Window(workers, len(shards))
    with tempfile.TemporaryDirectory() as out:
        annotate(shards, parse_teacher(uri), out, engine=LocalEngine(device, workers), on_progress=window)
    return window


def measure(uri: str, images: Sequence[bytes], device: str, *, quick: bool, rivals: bool) -> setup.Row:
    """What the columns say, medians over repetitions."""
    seconds, repetitions = 0.5 if quick else 3.0, 1 if quick else 5
    workers = available_cores() if device == "cpu" else len(LocalEngine(device).devices())
    teacher = parse_teacher(uri).load(torch.device(device))
    settings = settle(AnnotateSettings(), device, teacher)
    batch_size, decoding = (
        settings.samples_per_batch,
        Decoding(settings.samples_per_batch, PrepareFor(preprocessings(teacher.identity))),
    )
    ratios: dict[str, list[float]] = {column: [] for column in COLUMNS}
    with tempfile.TemporaryDirectory() as scratch:
        (probe,) = made.write_shards(Path(scratch) / "probe", images, rows=4 * batch_size, count=1)
        decoded = [one for one in decode_shard(probe, decoding) if isinstance(one, DecodedBatch)]
        resident = [tuple(column.to(device) for column in batch.inputs) for batch in decoded]
        bare = partial(forward, teacher, cycle(resident), 1 if device == "cpu" else 20, device, settings.precision)
        setup.rates_of(bare, device, seconds / 4)  # warms up
        rate = min(setup.rates_of(bare, device, seconds / 4).wall, decode_rate(decoding, [probe], device, 0.2).wall)
        rows = batch_size * min(max(round(rate * seconds / 4 / batch_size), 1), max(1024 // batch_size, 1))
        count = max(3, math.ceil(rate * seconds / rows) + 1)
        shards = made.write_shards(Path(scratch) / "shards", images, rows=rows, count=count * workers)
        annotate_run(uri, [probe], device, 1)  # imports what a process needs once
        for turn in range(repetitions):
            by_forward = setup.rates_of(bare, device, seconds)
            by_decode = decode_rate(decoding, shards, device, seconds / 2)
            one = annotate_run(uri, shards[:count], device, 1)
            if device == "cpu":
                bound, reached = 1 / (1 / by_forward.cpu + 1 / by_decode.cpu), one.rates.cpu
            else:
                bound, reached = min(by_forward.wall, by_decode.wall), one.rates.wall
            found: dict[str, float | None] = {
                "read+decode ÷ forward": by_forward.wall / by_decode.wall,
                "of the bound": reached / bound,
                "start-up": one.startup * by_forward.wall,
            }
            every = one
            if workers > 1:
                every = annotate_run(uri, shards, device, workers)
                found["all ÷ one"] = every.rates.wall / one.rates.wall
            if device == "cpu":
                found["all, of the bound"] = every.rates.wall / (bound * workers)
            if rivals and turn < RIVAL_TURNS:
                how = (uri, shards, device, batch_size)
                loop = max(setup.in_new_process(baselines.dataloader_loop, *how, threads) for threads in (None, 1))
                ray = setup.in_new_process(baselines.ray_data, *how)
                found |= {"÷ DataLoader": every.rates.wall / loop, "÷ Ray Data": ray and every.rates.wall / ray}
            for column, value in found.items():
                if value is not None:
                    ratios[column].append(value)
    return {column: setup.median(values) if values else None for column, values in ratios.items()}


def main() -> None:
    arguments = setup.parse_arguments(__doc__, flags={"--rivals": "also run what people write themselves"})
    keep_freed_memory()  # as the command does
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    report = setup.Report("annotate", {"device": arguments.device, "quick": arguments.quick})
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        pack_bundled(directory / "data")
        garments = made.garments(list_shards(directory / "data" / "unlabeled")[0])
        student = made.random_model(directory / "student", "small:resnet8?width=16&stem_stride=2")
        cases = [("the demo's student", student, garments), ("its teacher", made.bundled_teacher(directory), garments)]
        for name in ("mobilenet_v3_small", "resnet18") if arguments.device == "cpu" else ("resnet50", "vit_b_16"):
            heavy = made.random_model(directory / name, f"torchvision:{name}", made.IMAGENET)
            cases.append((name, heavy, made.photos(64)))
        for name, uri, images in cases[::2] if arguments.quick else cases:
            report.rows.append(
                {
                    "teacher": name,
                    **measure(uri, images, arguments.device, quick=arguments.quick, rivals=arguments.rivals),
                }
            )
    report.print(as_json=arguments.json)


if __name__ == "__main__":
    main()
