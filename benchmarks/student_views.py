"""What a student learns from the clean view's labels, from replayed views', and with the teacher in the loop.

    python benchmarks/student_views.py [--quick] [--json] [--images DIR] [--steps N] [--seeds N]

Images of DIR (Fashion-MNIST's four IDX files; the bundled 12,500 + 3,500 if not given). A teacher (small:resnet14) is
trained on all labels of the training images, then labels them in 17 views. Every student learns from soft labels alone,
for as many steps of 128 images, at the same temperature; they differ in what they see:

    clean        the teacher's label of the clean image, the student's own crop and flip
    replay 1     one augmented view of each image, in the pixels that the teacher labeled (FKD, TinyViT)
    replay 4     four, another one each epoch
    replay 16    sixteen
    online       the student's own crop and flip, labeled by the teacher in the loop: no cache

`accuracy` is on the test images, mean ± s.d. over the seeds; `of online` the time of a run, the same one-thread
processes side by side, a run of annotate not counted.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import setup
import torch

from pseudolabel.allocator import keep_freed_memory
from pseudolabel.annotate import annotate
from pseudolabel.checkpoint import ModelCard, load_model, save_model
from pseudolabel.dataset import TrainingBatches
from pseudolabel.demo import bundled
from pseudolabel.engines.local import LocalEngine
from pseudolabel.evaluate import evaluate
from pseudolabel.labels.encodings import Dense
from pseudolabel.labels.store import open_store
from pseudolabel.labels.targets import StoredTargets
from pseudolabel.pack import pack
from pseudolabel.settings import AnnotateSettings, TrainSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.train import train
from pseudolabel.training.distributed import Team
from pseudolabel.training.inputs import gather
from pseudolabel.training.learner import Learner
from pseudolabel.training.optim import learning_rate
from pseudolabel.training.setup import preprocessing_of
from pseudolabel.training.step_times import StepTimes

VIEWS = 17  # the clean one and sixteen
TEACHER = TrainSettings(student="small:resnet14?width=16&stem_stride=2", image_size=28, channels=1, lr=8e-3)
STUDENT = TrainSettings(
    student="small:resnet8?width=8&stem_stride=2",
    image_size=28,
    channels=1,
    batch_size=128,
    labeled_fraction=0.0,
    alpha=1.0,
    temperature=2.0,
    lr=8e-3,
)
VARIANTS: dict[str, int | None] = {"clean": None, "replay 1": 1, "replay 4": 4, "replay 16": 16, "online": None}


def one_run(scratch: Path, variant: str, steps: int, seed: int) -> tuple[float, float]:
    """Test accuracy in percent and seconds of one student."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as the command does
    settings = STUDENT.model_copy(update={"steps": steps, "seed": seed, "replay": VARIANTS[variant]})
    out, started = scratch / f"{variant}-{seed}", time.monotonic()
    if variant == "online":
        online(settings, scratch, out)
    else:
        train(settings, out, unlabeled=scratch / "train", store=scratch / "store", threads=1)
    seconds = time.monotonic() - started
    return 100 * evaluate(out, scratch / "test").accuracy, seconds


def online(settings: TrainSettings, scratch: Path, out: Path) -> None:
    """The same steps by the same learner, but the teacher labels what the student sees."""
    store, steps = open_store(scratch / "store"), settings.steps or 0
    data, names = gather((), list_shards(scratch / "train"), store)
    card = ModelCard(settings.student, names, preprocessing_of(settings))
    device = torch.device("cpu")
    learner, times = Learner(settings, card, data, device, Team()), StepTimes(device, on=False)
    teacher = load_model(scratch / "teacher", device)
    batches = TrainingBatches(
        data,
        card.preprocessing,
        settings.augment,
        batch_size=settings.batch_size,
        labeled_fraction=0.0,
        seed=settings.seed,
        steps=steps,
    )
    batches.keep_images("auto", workers=0, on_note=lambda note: None)
    for step in range(steps):
        batch = batches[step]
        with torch.no_grad():
            logits_BC = teacher.logits((batch.pixels_BCHW,))
        targets = StoredTargets(Dense(), {"logits": logits_BC, "pred": logits_BC.argmax(-1)})
        learner.seed(step)
        learner.step(replace(batch, targets=targets), learning_rate(settings, step, steps), step, times)
    save_model(out, card, learner.averaged_body)


def prepare(images: Path, scratch: Path, *, views: int = VIEWS, quick: bool) -> None:
    """train/ and test/ shards, a teacher, a store of so many of its views."""
    second = next(images / f"{name}-images-idx3-ubyte.gz" for name in ("t10k", "test")
                  if (images / f"{name}-images-idx3-ubyte.gz").exists())  # fmt: skip
    pack(images / "train-images-idx3-ubyte.gz", scratch / "packed")
    pack(second, scratch / "second", test_fraction=1.0)
    (scratch / "packed" / "labeled").rename(scratch / "train")
    (scratch / "second" / "test").rename(scratch / "test")
    shards = list_shards(scratch / "train")[: 2 if quick else None]
    teacher = TEACHER.model_copy(update={"steps": 20 if quick else 1500})
    train(teacher, scratch / "teacher", labeled=shards, workers=1, threads=1)
    asked = AnnotateSettings(views=views, crop_scale=(0.5, 1.0), precision="fp32")
    annotate(shards, f"checkpoint:{scratch / 'teacher'}", scratch / "store", engine=LocalEngine("cpu"), settings=asked)
    for shard in list_shards(scratch / "train"):
        if shard.name not in {one.name for one in shards}:
            Path(shard.path).unlink()


def main() -> None:
    parser = setup.seeded_parser(__doc__, 8000, bundled("data/fashion-mnist"))
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    steps, seeds = (10, 1) if arguments.quick else (arguments.steps, arguments.seeds)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        prepare(arguments.images, scratch, quick=arguments.quick)
        teacher = 100 * evaluate(scratch / "teacher", scratch / "test").accuracy
        found: dict[str, list[tuple[float, float]]] = {}
        with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
            asked = {
                (name, seed): pool.submit(one_run, scratch, name, steps, seed)
                for seed in range(seeds)
                for name in VARIANTS
            }
            for (name, seed), future in asked.items():
                found.setdefault(name, []).append(future.result())
                print(name, seed, *future.result(), file=sys.stderr, flush=True)
    report = setup.Report("student views", {"steps": steps, "seeds": seeds, "teacher": f"{teacher:.2f}"})
    online_seconds = statistics.fmean(seconds for _, seconds in found["online"])
    for name, runs in found.items():
        accuracies = [accuracy for accuracy, _ in runs]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if seeds > 1 else ""
        report.rows.append(
            {
                "student sees": name,
                "accuracy": f"{statistics.fmean(accuracies):.2f}{spread}",
                "of online": setup.median([statistics.fmean(seconds for _, seconds in runs) / online_seconds]),
            }
        )
    report.print(as_json=arguments.json)


if __name__ == "__main__":
    main()
