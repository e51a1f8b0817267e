"""What training from cached soft labels costs beside supervised training, and beside a teacher in the loop.

    python benchmarks/train.py [--quick] [--json] [--device cuda]

The demo's student on its images, batch size and augmentation, trained in turns of some seconds:

    supervised    all rows of a batch have labels
    cached        an eighth has; the soft labels of the rest come from a store of the encoding that the row names
    online        the same batches, but the teacher makes the soft labels in the loop, of the augmented images

All are driven by the loader and the step of `pseudolabel.train`. Batches are loaded in the loop on a CPU, by processes
beside a GPU. On a CPU everything has one thread, and it is CPU time that counts: a busy machine distorts it less. Read
the table so:

    cached ÷ supervised   time of a step, its batch's loading included; wanted: at most about 1.03
    cached ÷ online       the same; the less, the more the cache saves
    floor                 of cached ÷ online: 1 − the teacher's share of an online step, its forward pass timed alone.
                          A cache that costs nothing to read would reach it
    loading, cached       the share of a cached step that is loading, where nothing loads ahead; – beside a GPU
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import made
import setup
import torch

from pseudolabel.annotate import annotate
from pseudolabel.checkpoint import ModelCard
from pseudolabel.dataset import Batch
from pseudolabel.demo import bundled
from pseudolabel.engines.local import LocalEngine, available_cores
from pseudolabel.inputs import TrainingData, gather
from pseudolabel.interfaces import LoadedTeacher
from pseudolabel.labels.encodings import Dense, StoredTargets
from pseudolabel.labels.store import open_store
from pseudolabel.pack import pack
from pseudolabel.rundir import RunDirectory
from pseudolabel.settings import AnnotateSettings, AugmentSettings, TrainSettings
from pseudolabel.shards import list_shards
from pseudolabel.teachers import parse_teacher
from pseudolabel.train import _Loop, preprocessing_of

ENCODINGS = ("dense", "topk:5")
SETTINGS = TrainSettings(
    student="small:resnet8?width=16&stem_stride=2",
    image_size=28,
    channels=1,
    augment=AugmentSettings(erasing=0.25),
)


class Variant:
    """A training run that goes on step by step. With a teacher it is an online one."""

    def __init__(self, data: TrainingData, device: str, teacher: LoadedTeacher | None = None) -> None:
        self._device, self.teacher = torch.device(device), teacher
        self.workers = 0 if device == "cpu" else max(1, min(8, available_cores() - 1))
        card = ModelCard(SETTINGS.student, tuple(map(str, range(data.num_classes))), preprocessing_of(SETTINGS))
        unused, steps = RunDirectory(Path("unused"), "train", {}), 1_000_000
        self._loop = _Loop(SETTINGS, card, data, None, unused, steps, self._device, self.workers)
        self._batches = self._loop._loader(0)

    def load(self) -> Batch:
        """The next batch, on the device."""
        return next(self._batches).to(self._device)

    def skip(self) -> int:
        """Load a batch, and no more."""
        self.load()
        return 1

    def train(self, count: int) -> int:
        """So many steps."""
        for _ in range(count):
            batch = self.load()
            self._loop._step(batch if self.teacher is None else self.soften(batch, self.teacher), SETTINGS.lr)
        return count

    def soften(self, batch: Batch, teacher: LoadedTeacher) -> Batch:
        """The teacher's soft labels for the unlabeled rows of a batch, which are the last."""
        count = self._loop._batches.num_pseudo
        with torch.no_grad():
            logits_BC = teacher.logits((batch.pixels_BCHW[-count:],))
        targets = StoredTargets(Dense(), {"logits": logits_BC, "pred": logits_BC.argmax(-1)})
        return replace(batch, targets=targets, soft_weight_B=torch.ones(count, device=logits_BC.device))


def make_variants(scratch: Path, teacher_uri: str, device: str, *, quick: bool) -> dict[str, Variant]:
    """The runs to compare, on the same images: the first shard's labels are known, or all are."""
    pack(bundled("data/fashion-mnist") / "train-images-idx3-ubyte.gz", scratch / "data")
    shards = list_shards(scratch / "data" / "labeled")[: 2 if quick else None]
    labeled, unlabeled = shards[:1], shards[1:]
    everything, _ = gather(shards, (), None, None, None)
    variants = {"supervised": Variant(everything, device)}
    for encoding in ENCODINGS:
        out = scratch / encoding.replace(":", "-")
        settings, engine = AnnotateSettings(encoding=encoding), LocalEngine(device)
        annotate(unlabeled, parse_teacher(teacher_uri), out, engine=engine, settings=settings)
        cached, _ = gather(labeled, unlabeled, open_store(out), None, None)
        variants[encoding] = Variant(cached, device)
    bare = replace(cached, unlabeled=[replace(one, part=None) for one in cached.unlabeled], store=None)
    variants["online"] = Variant(bare, device, parse_teacher(teacher_uri).load(torch.device(device)))
    return variants


def measure(variants: dict[str, Variant], device: str, *, quick: bool) -> list[setup.Row]:
    """A row of the table for each encoding."""
    seconds, repetitions, count = 1.0 if quick else 4.0, 2 if quick else 9, 1 if device == "cpu" else 20

    def per_second(work: Callable[[], int]) -> float:
        rates = setup.rates_of(work, device, seconds)
        return rates.cpu if device == "cpu" else rates.wall

    online = variants["online"]
    batch = online.load()

    def label() -> int:
        assert online.teacher is not None
        for _ in range(count):
            online.soften(batch, online.teacher)
        return count

    steps: dict[str, list[float]] = {}
    for repetition in range(repetitions + 1):  # the first one warms up
        found = {}
        for name, variant in variants.items():
            variant.train(2 * variant.workers)  # what was loaded while others ran doesn't count
            found[name] = per_second(partial(variant.train, count))
            if name in ENCODINGS and device == "cpu":
                found[f"load {name}"] = per_second(variant.skip)
        found["teacher"] = per_second(label)
        for name, rate in found.items() if repetition else ():
            steps.setdefault(name, []).append(rate)

    def ratio(one: str, other: str) -> float:
        """The time of `one` ÷ the time of `other`."""
        return setup.median(rate / own for own, rate in zip(steps[one], steps[other], strict=True))

    return [
        {
            "store": name,
            "cached ÷ supervised": ratio(name, "supervised"),
            "cached ÷ online": ratio(name, "online"),
            "floor": 1 - ratio("teacher", "online"),
            "loading, cached": ratio(f"load {name}", name) if device == "cpu" else None,
        }
        for name in ENCODINGS
    ]


def main() -> None:
    arguments = setup.parse_arguments(__doc__)
    device = arguments.device
    if device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        teacher_uri = made.bundled_teacher(Path(scratch))
        variants = make_variants(Path(scratch), teacher_uri, device, quick=arguments.quick)
        rows = measure(variants, device, quick=arguments.quick)
    settings = {"device": device, "quick": arguments.quick, "batch size": SETTINGS.batch_size}
    setup.Report("train", settings, rows).print(as_json=arguments.json)


if __name__ == "__main__":
    main()
