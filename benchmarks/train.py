"""What training from cached soft labels costs beside supervised training, and beside a teacher in the loop.

    python benchmarks/train.py [--quick] [--json] [--device cuda] [--photographs]

The demo's student on its images, batch size and augmentation; with --photographs a ResNet-18 of 224 pixels on made
JPEGs of 256, a ViT-B/16 its teacher, in bf16 (real sizes, meant for a GPU). Trained in turns of some seconds:

    supervised    all rows of a batch have labels
    cached        an eighth has; the soft labels of the rest come from a store of the encoding that the row names
    online        the same batches, but the teacher makes the soft labels in the loop, of the augmented images

All are driven by the loader (images kept in memory) and the step of `pseudolabel.train`; batches are loaded in the loop
on a CPU, by processes beside a GPU. On a CPU everything has one thread, and CPU time counts: a busy machine distorts it
less. Read it so:

    cached ÷ supervised   time of a step, its batch's loading included; wanted: at most about 1.03
    cached ÷ online       the same: the less, the more the cache saves
    floor                 of cached ÷ online, if the cache cost nothing: 1 − the teacher's share of an online step,
                          timed in these very steps
    loading, cached       the share of a cached step that is loading; – beside a GPU, where it is done ahead
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import made
import setup
import torch

from pseudolabel.allocator import keep_freed_memory
from pseudolabel.annotate import annotate
from pseudolabel.checkpoint import ModelCard
from pseudolabel.dataset import Batch
from pseudolabel.demo import bundled
from pseudolabel.engines.local import LocalEngine, available_cores
from pseudolabel.interfaces import LoadedTeacher
from pseudolabel.labels.encodings import Dense
from pseudolabel.labels.store import open_store
from pseudolabel.labels.targets import StoredTargets
from pseudolabel.pack import pack
from pseudolabel.rundir import RunDirectory
from pseudolabel.settings import AnnotateSettings, AugmentSettings, TrainSettings
from pseudolabel.shard_lists import Shard, list_shards
from pseudolabel.shards import write_shard
from pseudolabel.storage.mirror import Mirror
from pseudolabel.teachers import parse_teacher
from pseudolabel.training.inputs import TrainingData, gather
from pseudolabel.training.loop import TrainingLoop
from pseudolabel.training.setup import Training, preprocessing_of

ENCODINGS = ("dense", "topk:5")
PHOTOS_A_SHARD = 250


@dataclass(frozen=True)
class Task:
    """What is trained on what: labeled shards, the first of which keeps its labels, and a teacher's spec."""

    shards: list[Shard]
    teacher: str
    settings: TrainSettings


def garments(scratch: Path, *, quick: bool) -> Task:
    """The demo's."""
    pack(bundled("data/fashion-mnist") / "train-images-idx3-ubyte.gz", scratch / "data")
    augment, student = AugmentSettings(erasing=0.25), "small:resnet8?width=16&stem_stride=2"
    settings = TrainSettings(student=student, image_size=28, channels=1, augment=augment)
    shards = list_shards(scratch / "data" / "labeled")[: 2 if quick else None]
    return Task(shards, made.bundled_teacher(scratch), settings)


def photographs(scratch: Path, *, quick: bool) -> Task:
    """Images, student and teacher as large as in earnest; random weights take as long as trained ones."""
    images = made.photos(PHOTOS_A_SHARD if not quick else 20)
    for number in range(2 if quick else 8):
        samples = ((f"{number}-{row}", {"jpg": image, "cls": str(row).encode()}) for row, image in enumerate(images))
        write_shard(scratch / "photos" / f"photos-{number}.tar", samples)
    teacher, student = ("resnet18", "mobilenet_v3_small") if quick else ("vit_b_16", "resnet18")
    settings = TrainSettings(
        student=f"torchvision:{student}",
        batch_size=8 if quick else 256,
        precision="bf16",
        augment=AugmentSettings(crop="resized"),
    )
    spec = made.random_model(scratch / "teacher", f"torchvision:{teacher}", made.IMAGENET)
    return Task(list_shards(scratch / "photos"), spec, settings)


class TeacherClock:
    """What the teacher takes of the online steps: CPU time, or the device's own."""

    def __init__(self, device: str) -> None:
        self._on_cpu, self._spans = device == "cpu", list[Callable[[], float]]()

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._on_cpu:
            before = time.process_time()
            yield
            seconds = time.process_time() - before
            self._spans.append(lambda: seconds)
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._spans.append(lambda: start.elapsed_time(end) / 1000)

    def take(self) -> float:
        """Seconds a step since the last call; waits for the device."""
        if not self._on_cpu:
            torch.cuda.synchronize()
        taken, self._spans = self._spans, []
        return sum(seconds() for seconds in taken) / max(len(taken), 1)


class Variant:
    """A training run that goes on step by step. With a teacher it is an online one."""

    def __init__(
        self, settings: TrainSettings, data: TrainingData, device: str, teacher: LoadedTeacher | None = None
    ) -> None:
        self._settings, self._device, self._teacher = settings, torch.device(device), teacher
        self.clock = TeacherClock(device)
        self.workers = 0 if device == "cpu" else max(1, min(8, available_cores() - 1))
        card = ModelCard(settings.student, tuple(map(str, range(data.num_classes))), preprocessing_of(settings))
        unused = RunDirectory(Mirror(Path("unused")), "train", {})
        training = Training(settings, card, data, steps=1_000_000)
        self._loop = TrainingLoop(training, unused, self._device, self.workers, cache="auto")
        self._batches = self._loop.batches_from(0)

    def load(self) -> Batch:
        return next(self._batches).to(self._device)

    def step(self) -> None:
        """Load a batch and learn from it."""
        self._loop.learner.step(self.soften(self.load()), self._settings.lr, 0, self._loop.times)

    def soften(self, batch: Batch) -> Batch:
        """Let the teacher, if there is one, label the unlabeled rows of a batch, which are the last."""
        if self._teacher is None:
            return batch
        count = self._loop._batches.num_pseudo
        with self.clock.running(), torch.no_grad():
            logits_BC = self._teacher.logits((batch.pixels_BCHW[-count:],))
        targets = StoredTargets(Dense(), {"logits": logits_BC, "pred": logits_BC.argmax(-1)})
        weights = torch.ones(count, device=self._device)
        return replace(batch, targets=targets, soft_weight_B=weights, num_soft=count)


def make_variants(task: Task, scratch: Path, device: str) -> dict[str, Variant]:
    """The runs to compare, on the same images: the labels of the first shard are known, or all are."""
    labeled, unlabeled = task.shards[:1], task.shards[1:]
    loaded = parse_teacher(task.teacher).load(torch.device(device))
    num_classes = len(loaded.classes)
    variants = {"supervised": Variant(task.settings, gather(task.shards, (), None, None, num_classes)[0], device)}
    for encoding in ENCODINGS:
        out = scratch / encoding.replace(":", "-")
        settings, engine = AnnotateSettings(encoding=encoding), LocalEngine(device)
        annotate(unlabeled, parse_teacher(task.teacher), out, engine=engine, settings=settings)
        data, _ = gather(labeled, unlabeled, open_store(out), None, None)
        variants[encoding] = Variant(task.settings, data, device)
    data = replace(data, unlabeled=[replace(one, part=None) for one in data.unlabeled], store=None)
    return variants | {"online": Variant(task.settings, data, device, loaded)}


def measure(variants: dict[str, Variant], device: str, *, quick: bool) -> list[setup.Row]:
    """A row of the table for each encoding."""
    seconds, repetitions = (0.5, 2) if quick else (3.0, 9)
    clock = variants["online"].clock

    def rate(work: Callable[[], object]) -> float:
        """How often a second; on a device in rows of twenty, so that it needn't be waited for each time."""
        times = 1 if device == "cpu" else 20
        rates = setup.rates_of(lambda: len([work() for _ in range(times)]), device, seconds)
        return rates.cpu if device == "cpu" else rates.wall

    rates: dict[str, list[float]] = {}
    for repetition in range(repetitions + 1):  # the first one warms up
        found: dict[str, float] = {}
        for name, variant in list(variants.items())[:: (-1) ** repetition]:
            for _ in range(2 * variant.workers):  # what was loaded while others ran doesn't count
                variant.step()
            clock.take()
            found[name] = rate(variant.step)
            if name == "online":
                found["teacher"] = 1 / clock.take()
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
    arguments = setup.parse_arguments(__doc__, flags={"--photographs": "real sizes: 224 pixels, ResNet-18, ViT-B/16"})
    device, quick = arguments.device, arguments.quick
    keep_freed_memory()  # as the command does
    if device == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        task = (photographs if arguments.photographs else garments)(Path(scratch), quick=quick)
        rows = measure(make_variants(task, Path(scratch), device), device, quick=quick)
    shown = {"student": task.settings.student, "batch": task.settings.batch_size, "device": device, "quick": quick}
    setup.Report("train", shown, rows).print(as_json=arguments.json)


if __name__ == "__main__":
    main()
