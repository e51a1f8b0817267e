"""How many training samples a second are loaded, beside a stock webdataset pipeline.

    python benchmarks/loader.py [--quick] [--json]

Images with cached soft labels, shuffled, augmented (crop, flip, erasing at a quarter) and batched, by one process with
one thread; CPU time counts. The pipelines decode with the same function:

    stock            webdataset: read, shuffle 1,000, decode, torchvision's transforms, batch; no soft labels
    stock, by key    the same, and each sample's soft label looked up by its key in a dict of tensors
    off              ours, decoding (`--cache off`)
    ram              ours, decoded once (`--cache ram`; an epoch of decoding before is not counted)

Read it so: samples a CPU-second of ours, and the multiple of both stock pipelines; wanted: at least 3 of `ram` on small
images. `decoding` is the share of stock's time that is decoding: what remains to be gained.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import made
import setup
import torch
from torch import Tensor
from torchvision.transforms import v2

from pseudolabel.allocator import keep_freed_memory
from pseudolabel.annotate import annotate
from pseudolabel.dataset import TrainingBatches
from pseudolabel.engines.local import LocalEngine
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.store import Store, open_store
from pseudolabel.settings import AnnotateSettings, AugmentSettings
from pseudolabel.shard_lists import Shard
from pseudolabel.training.inputs import TrainingData, gather
from pseudolabel.views.image import Preprocessing, decode

BATCH, ENCODING, SHUFFLED = 256, "topk:5", 1000


@dataclass(frozen=True)
class Task:
    """Images to load: their shards, as a student wants them, the labels of some teacher."""

    name: str
    shards: list[Shard]
    preprocessing: Preprocessing
    augment: AugmentSettings
    store: Store

    @property
    def data(self) -> TrainingData:
        return gather((), self.shards, self.store)[0]


@dataclass
class Stock:
    """The usual pipeline."""

    task: Task
    by_key: dict[str, dict[str, Tensor]] | None = None
    decoding: float = field(default=0.0)

    def batches(self) -> Iterator[Any]:
        import webdataset as wds

        size = self.task.preprocessing.crop
        crop = (
            v2.RandomCrop(size, padding=max(size // 8, 1))
            if self.task.augment.crop == "pad"
            else v2.RandomResizedCrop(size, scale=(0.25, 1.0), antialias=True)
        )
        self._seen = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.RandomErasing(self.task.augment.erasing)])
        paths = [shard.path for shard in self.task.shards]
        pipeline = wds.WebDataset(paths, shardshuffle=100, empty_check=False).shuffle(SHUFFLED).repeat()
        samples = pipeline.to_tuple("__key__", "jpg;png").map(self._sample)
        return iter(samples.batched(BATCH, partial=False))

    def _sample(self, pair: tuple[str, bytes]) -> tuple[Tensor, ...]:
        started = time.process_time()
        image_CHW = decode(pair[1])
        if self.task.augment.crop == "pad":
            image_CHW = self.task.preprocessing.prepare(image_CHW)
        self.decoding += time.process_time() - started
        labels = () if self.by_key is None else tuple(self.by_key[pair[0]].values())
        return (self._seen(image_CHW), *labels)


def ours(task: Task, cache: str) -> Iterator[Any]:
    """Batches as `train` loads them."""
    batches = TrainingBatches(
        task.data, task.preprocessing, task.augment, batch_size=BATCH, labeled_fraction=0.0, seed=0, steps=1_000_000
    )
    batches.keep_images(cache, workers=0, on_note=lambda note: None)  # type: ignore[arg-type]
    return (batches[step] for step in range(1_000_000))


def labels_by_key(task: Task) -> dict[str, dict[str, Tensor]]:
    """Every sample's stored columns, row by row: the dict that scripts load from a pickle."""
    found = {}
    encoding, num_classes = parse_encoding(ENCODING), task.store.identity.num_classes
    for shard in task.shards:
        part = task.store.read(shard.name)
        columns = encoding.tensors(part, num_classes)
        for row, key in enumerate(part["key"].to_pylist()):
            found[key] = {name: values[row] for name, values in columns.items()}
    return found


def make_tasks(scratch: Path, *, quick: bool) -> Iterator[Task]:
    """Garments of 28 pixels as PNG, made photographs of 256 pixels as JPEG for a student of 224."""
    from pseudolabel.demo import bundled
    from pseudolabel.pack import pack
    from pseudolabel.shard_lists import list_shards

    pack(bundled("data/fashion-mnist") / "train-images-idx3-ubyte.gz", scratch / "data")
    garments = list_shards(scratch / "data" / "labeled")[: 2 if quick else None]
    photos = made.write_shards(scratch / "photos", made.photos(20 if quick else 200), rows=200, count=2)
    teachers = (
        made.bundled_teacher(scratch),
        made.random_model(scratch / "m", "torchvision:mobilenet_v3_small", made.IMAGENET),
    )
    pad, resized = AugmentSettings(crop="pad", erasing=0.25), AugmentSettings(crop="resized", erasing=0.25)
    for name, shards, teacher, preprocessing, augment in (
        ("garments, 28 pixels", garments, teachers[0], made.GARMENTS, pad),
        ("photographs, 256 → 224", photos, teachers[1], made.IMAGENET, resized),
    ):
        out, settings = scratch / f"store-{name[:3]}", AnnotateSettings(encoding=ENCODING)
        annotate(shards, teacher, out, engine=LocalEngine("cpu"), settings=settings)
        yield Task(name, shards, preprocessing, augment, open_store(out))


def measure(task: Task, *, quick: bool) -> setup.Row:
    """A row of the table: medians of ratios between neighbours in time."""
    seconds, repetitions = (0.5, 2) if quick else (2.0, 7)
    stock = Stock(task)
    streams: dict[str, Iterator[Any]] = {
        "stock": stock.batches(),
        "by key": Stock(task, labels_by_key(task)).batches(),
        "off": ours(task, "off"),
        "ram": ours(task, "ram"),
    }
    rates: dict[str, list[float]] = {name: [] for name in streams}
    shares = []
    for repetition in range(repetitions + 1):  # the first one warms up
        for name, stream in list(streams.items())[:: (-1) ** repetition]:
            stock.decoding, started = 0.0, time.process_time()
            rate = setup.rates_of(_take(stream), "cpu", seconds).cpu
            if repetition:
                rates[name].append(rate)
                if name == "stock":
                    shares.append(stock.decoding / (time.process_time() - started))

    def ratio(one: str, other: str) -> float:
        return setup.median(a / b for a, b in zip(rates[one], rates[other], strict=True))

    return {
        "images": task.name,
        "stock/s": setup.median(rates["stock"]),
        "decoding": setup.median(shares),
        "off/s": setup.median(rates["off"]),
        "off ÷ stock": ratio("off", "stock"),
        "off ÷ by key": ratio("off", "by key"),
        "ram/s": setup.median(rates["ram"]),
        "ram ÷ stock": ratio("ram", "stock"),
        "ram ÷ by key": ratio("ram", "by key"),
    }


def _take(stream: Iterator[Any]) -> Callable[[], int]:
    def take() -> int:
        next(stream)
        return BATCH

    return take


def main() -> None:
    arguments = setup.parse_arguments(__doc__, device=False)
    torch.set_num_threads(1)
    keep_freed_memory()  # as the command does
    with tempfile.TemporaryDirectory() as scratch:
        rows = [measure(task, quick=arguments.quick) for task in make_tasks(Path(scratch), quick=arguments.quick)]
    setup.Report("loader", {"batch": BATCH, "encoding": ENCODING, "quick": arguments.quick}, rows).print(
        as_json=arguments.json
    )


if __name__ == "__main__":
    main()
