"""Make data/fashion-mnist: the demo's images, and the teacher it starts with.

    python data/make_fashion_mnist.py images /usr/share/datasets/fashion-mnist     seconds
    python data/make_fashion_mnist.py teacher /usr/share/datasets/fashion-mnist    18 minutes on one core

The directory holds the four original files (Debian: `apt-get install dataset-fashion-mnist`). Of the 60,000 training
images one seeded permutation gives 40,000 to the teacher alone; from the other 20,000 come the demo's 13,500 (1,350 a
class: pack splits them into 500 labeled, 12,000 unlabeled and 1,000 for validation). 3,500 of the test set (350 a
class) are the demo's test set. So nothing that the teacher saw is seen again.
"""

from __future__ import annotations

import gzip
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pseudolabel.evaluate import evaluate
from pseudolabel.pack import pack
from pseudolabel.settings import AugmentSettings, TrainSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.sources import read_idx
from pseudolabel.train import train

OUT = Path(__file__).parent / "fashion-mnist"
SEED = 20261123
TEACHER = TrainSettings(
    student="small:resnet20?width=32&stem_stride=2",
    image_size=28,
    channels=1,
    epochs=18,
    batch_size=256,
    lr=3e-3,
    ema=0.998,
    augment=AugmentSettings(erasing=0.5),
)


def main(what: str, source: Path) -> None:
    images, labels = (
        read_idx(source / "train-images-idx3-ubyte.gz", 3),
        read_idx(source / "train-labels-idx1-ubyte.gz", 1),
    )
    order = np.random.default_rng(SEED).permutation(len(images))
    for_teacher, rest = order[:40_000], order[40_000:]
    if what == "images":
        test_images, test_labels = (
            read_idx(source / "t10k-images-idx3-ubyte.gz", 3),
            read_idx(source / "t10k-labels-idx1-ubyte.gz", 1),
        )
        write(OUT, "train", images, labels, balanced(labels, rest, 1350))
        test_order = np.random.default_rng(SEED + 1).permutation(len(test_images))
        write(OUT, "test", test_images, test_labels, balanced(test_labels, test_order, 350))
    elif what == "teacher":
        make_teacher(images, labels, for_teacher)
    else:
        raise SystemExit(__doc__)


def balanced(labels: NDArray[np.uint8], candidates: NDArray[np.int64], per_class: int) -> NDArray[np.int64]:
    """The first `per_class` candidates of each class, in their original order."""
    return np.sort(np.concatenate([candidates[labels[candidates] == label][:per_class] for label in range(10)]))


def write(
    directory: Path, name: str, images: NDArray[np.uint8], labels: NDArray[np.uint8], chosen: NDArray[np.int64]
) -> None:
    """A pair of gzipped IDX files, byte-reproducible."""
    directory.mkdir(parents=True, exist_ok=True)
    for kind, values in (("images-idx3", images[chosen]), ("labels-idx1", labels[chosen])):
        header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
        (directory / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + values.tobytes(), 9, mtime=0))


def make_teacher(images: NDArray[np.uint8], labels: NDArray[np.uint8], chosen: NDArray[np.int64]) -> None:
    """Train on the 40,000; the demo's validation and test images only measure it, they choose nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        write(work, "teacher", images, labels, chosen)
        pack(work / "teacher-images-idx3-ubyte.gz", work / "shards")
        classes = (OUT / "classes.txt").read_text().split("\n")[:-1]
        result = train(
            TEACHER,
            work / "run",
            labeled=list_shards(work / "shards" / "labeled"),
            classes=classes,
            threads=int(sys.argv[3]) if sys.argv[3:] else None,
            on_progress=print,
        )
        (OUT / "teacher").mkdir(exist_ok=True)
        for file in ("model.json", "model.safetensors", "recipe.toml"):
            shutil.copyfile(work / "run" / file, OUT / "teacher" / file)
        pack(OUT / "test-images-idx3-ubyte.gz", work / "test", test_fraction=1.0)
        print(result)
        print(evaluate(OUT / "teacher", list_shards(work / "test" / "test")))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], Path(sys.argv[2]))
