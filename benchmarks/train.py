"""What training from cached soft labels costs beside supervised training, and beside a teacher in the loop.

    python benchmarks/train.py [--quick] [--json] [--device cuda]

The demo's student on its images, batch size and augmentation, trained in turns of some seconds:

    supervised    all rows of a batch have labels
    cached        an eighth has; the soft labels of the rest come from a store of the encoding that the row names
    online        the same batches, but the teacher makes the soft labels in the loop, of the augmented images

All are driven by the loader (images kept in memory) and the step of `pseudolabel.train`; batches are loaded in the loop
on a CPU, by processes beside a GPU. On a CPU everything has one thread, and CPU time counts: a busy machine distorts it
less. Read it so:

    cached ÷ supervised   time of a step, its batch's loading included; wanted: at most about 1.03
    cached ÷ online       the same: the less, the more the cache saves
    floor                 of cached ÷ online, if the cache cost nothing: 1 − the teacher's share of an online step
    loading, cached       the share of a cached step that is loading; – beside a GPU, where it is done ahead
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
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
from pseudolabel.labels.encodings import Dense
from pseudolabel.labels.store import open_store
from pseudolabel.labels.targets import StoredTargets
from pseudolabel.loop import TrainingLoop
from pseudolabel.pack import pack
from pseudolabel.rundir import RunDirectory
from pseudolabel.settings import AnnotateSettings, AugmentSettings, TrainSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.teachers import parse_teacher
from pseudolabel.training_setup import preprocessing_of

ENCODINGS = ("dense", "topk:5")
AUGMENT = AugmentSettings(erasing=0.25)
SETTINGS = TrainSettings(student="small:resnet8?width=16&stem_stride=2", image_size=28, channels=1, augment=AUGMENT)


class Variant:
    """A training run that goes on step by step. With a teacher it is an online one."""

    def __init__(self, data: TrainingData, device: str, teacher: LoadedTeacher | None = None) -> None:
        self._device, self._teacher = torch.device(device), teacher
        self.workers = 0 if device == "cpu" else max(1, min(8, available_cores() - 1))
        card = ModelCard(SETTINGS.student, tuple(map(str, range(data.num_classes))), preprocessing_of(SETTINGS))
        unused = RunDirectory(Path("unused"), "train", {})
        self._loop = TrainingLoop(
            SETTINGS, card, data, None, unused, 1_000_000, self._device, self.workers, cache="auto"
        )
        self._batches = self._loop.batches_from(0)

    def load(self) -> Batch:
        return next(self._batches).to(self._device)

    def step(self) -> None:
        """Load a batch and learn from it."""
        self._loop.learner.step(self.soften(self.load()), SETTINGS.lr, 0, self._loop.times)

    def soften(self, batch: Batch) -> Batch:
        """Let the teacher, if there is one, label the unlabeled rows of a batch, which are the last."""
        if self._teacher is None:
            return batch
        count = self._loop._batches.num_pseudo
        with torch.no_grad():
            logits_BC = self._teacher.logits((batch.pixels_BCHW[-count:],))
        targets = StoredTargets(Dense(), {"logits": logits_BC, "pred": logits_BC.argmax(-1)})
        weights = torch.ones(count, device=self._device)
        return replace(batch, targets=targets, soft_weight_B=weights, num_soft=count)


def make_variants(scratch: Path, teacher: str, device: str, *, quick: bool) -> dict[str, Variant]:
    """The runs to compare, on the same images: the labels of the first shard are known, or all are."""
    pack(bundled("data/fashion-mnist") / "train-images-idx3-ubyte.gz", scratch / "data")
    shards = list_shards(scratch / "data" / "labeled")[: 2 if quick else None]
    labeled, unlabeled = shards[:1], shards[1:]
    data, _ = gather(shards, (), None, None, None)
    variants = {"supervised": Variant(data, device)}
    for encoding in ENCODINGS:
        out = scratch / encoding.replace(":", "-")
        settings, engine = AnnotateSettings(encoding=encoding), LocalEngine(device)
        annotate(unlabeled, parse_teacher(teacher), out, engine=engine, settings=settings)
        data, _ = gather(labeled, unlabeled, open_store(out), None, None)
        variants[encoding] = Variant(data, device)
    data = replace(data, unlabeled=[replace(one, part=None) for one in data.unlabeled], store=None)
    return variants | {"online": Variant(data, device, parse_teacher(teacher).load(torch.device(device)))}


def measure(variants: dict[str, Variant], device: str, *, quick: bool) -> list[setup.Row]:
    """A row of the table for each encoding."""
    seconds, repetitions = (0.5, 2) if quick else (3.0, 9)
    online, batch = variants["online"], variants["online"].load()

    def rate(work: Callable[[], object]) -> float:
        """How often a second; on a device in rows of twenty, so that it needn't be waited for each time."""
        times = 1 if device == "cpu" else 20
        rates = setup.rates_of(lambda: len([work() for _ in range(times)]), device, seconds)
        return rates.cpu if device == "cpu" else rates.wall

    rates: dict[str, list[float]] = {}
    for repetition in range(repetitions + 1):  # the first one warms up
        found = {"teacher": rate(lambda: online.soften(batch))}
        for name, variant in list(variants.items())[:: (-1) ** repetition]:
            for _ in range(2 * variant.workers):  # what was loaded while others ran doesn't count
                variant.step()
            found[name] = rate(variant.step)
            if name in ENCODINGS and device == "cpu":
                found[f"load {name}"] = rate(variant.load)
        for name, value in found.items() if repetition else ():
            rates.setdefault(name, []).append(value)

    def ratio(one: str, other: str) -> float:
        """The time of `one` ÷ the time of `other`."""
        return setup.median(b / a for a, b in zip(rates[one], rates[other], strict=True))

    def row(encoding: str) -> setup.Row:
        return {
            "store": encoding,
            "cached ÷ supervised": ratio(encoding, "supervised"),
            "cached ÷ online": ratio(encoding, "online"),
            "floor": round(1 - ratio("teacher", "online"), 4),
            "loading, cached": ratio(f"load {encoding}", encoding) if device == "cpu" else None,
        }

    return [row(encoding) for encoding in ENCODINGS]


def main() -> None:
    arguments = setup.parse_arguments(__doc__)
    device, quick = arguments.device, arguments.quick
    if device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        variants = make_variants(Path(scratch), made.bundled_teacher(Path(scratch)), device, quick=quick)
        rows = measure(variants, device, quick=quick)
    setup.Report("train", {"device": device, "quick": quick}, rows).print(as_json=arguments.json)


if __name__ == "__main__":
    main()
