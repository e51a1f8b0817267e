"""How many planted copies `leaks` finds among tiny images, and how many different images it takes for copies.

    python benchmarks/leaks.py
    python benchmarks/leaks.py --speed

On the bundled Fashion-MNIST (28x28): changed copies of the first 500 validation images against these, by kind of
change; then the 12,000 unlabeled images, which are others, against all validation and test images.
With --speed: how long it takes to compare images with 100,000 others, on random hashes.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from pseudolabel.demo import pack_bundled
from pseudolabel.duplicates.look import SIDE, VARIANTS, Looks
from pseudolabel.duplicates.search import Others, nearest
from pseudolabel.engines.local import LocalEngine
from pseudolabel.leaks import DISTANCE, find_leaks
from pseudolabel.shard_lists import list_shards
from pseudolabel.shards import read_samples, write_shard

COPIES = 500


def encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def half(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BILINEAR)


def cut(image: Image.Image, first: int, last: int) -> Image.Image:
    return image.crop((first, first, image.width - last, image.height - last))


CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "other encoding": lambda image: encoded(image, "BMP"),
    "JPEG of quality 60": lambda image: encoded(image, "JPEG", quality=60),
    "half the size": lambda image: encoded(half(image)),
    "a pixel cropped on all sides": lambda image: encoded(cut(image, 1, 1)),
    "a pixel cropped on two sides": lambda image: encoded(cut(image, 1, 0)),
    "30% brighter": lambda image: encoded(image.point(lambda level: min(255, level * 13 // 10))),
    "30% darker": lambda image: encoded(image.point(lambda level: level * 7 // 10)),
    "mirrored": lambda image: encoded(ImageOps.mirror(image)),
    "mirrored, JPEG of quality 60": lambda image: encoded(ImageOps.mirror(image), "JPEG", quality=60),
    "half the size, JPEG of quality 60": lambda image: encoded(half(image), "JPEG", quality=60),
    "turned by 10 degrees": lambda image: encoded(image.rotate(10, Image.Resampling.BILINEAR)),
    "10% cropped on all sides": lambda image: encoded(cut(image, 3, 3)),
}


def main() -> None:
    engine = LocalEngine("cpu")
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        pack_bundled(root / "shards")
        samples = [sample for shard in list_shards(root / "shards" / "val") for sample in read_samples(shard)]
        chosen = {sample.key: Image.open(io.BytesIO(sample.fields["png"])) for sample in samples[:COPIES]}
        write_shard(root / "val.tar", [(key, {"png": encoded(image)}) for key, image in chosen.items()])
        for number, change in enumerate(CHANGES.values()):
            copies = [(key, {"png": change(image)}) for key, image in chosen.items()]
            write_shard(root / "copies" / f"copies-{number:02d}.tar", copies)
        find_leaks(root / "copies", root / "val.tar", root / "copies.parquet", engine=engine)
        rows = pq.read_table(root / "copies.parquet").to_pylist()
        for number, name in enumerate(CHANGES):
            found = [row for row in rows if row["shard"] == f"copies-{number:02d}"]
            right = sum(row["key"] == row["against_key"] for row in found)
            print(f"{name:<36} found {len(found) / COPIES:6.1%}, of the right image {right / COPIES:6.1%}", flush=True)
        against = [root / "shards" / "val", root / "shards" / "test"]
        result = find_leaks(root / "shards" / "unlabeled", against, root / "others.parquet", engine=engine)
        print(f"different images: {result.leaks} of {result.samples} taken for one of {result.against}")
        print(f"{result.seconds:.0f} s")
        for row in sorted(pq.read_table(root / "others.parquet").to_pylist(), key=lambda row: -row["similarity"])[:10]:
            print("  {key} and {against_key}: {similarity:.4f}, {distance} bits".format(**row))


def looks(count: int, hashes: int, seed: int) -> Looks:
    random = np.random.default_rng(seed)
    thumbs = random.integers(0, 256, (count, SIDE, SIDE), dtype=np.uint8)
    chosen = random.integers(0, 1 << 63, (count, hashes), dtype=np.uint64)
    digests = tuple(random.bytes(16) for _ in range(count))
    keys = tuple(map(str, range(count)))
    return Looks(tuple(range(count)), keys, digests, chosen, thumbs, np.full((count, 2), SIDE), 0)


def speed(images: int = 1024, against: int = 100_000) -> None:
    others, asked = Others.of([looks(against, VARIANTS, 0)]), looks(images, 1, 1)
    nearest(looks(1, 1, 2), others, DISTANCE)  # what is made once
    started = time.process_time()
    nearest(asked, others, DISTANCE)
    print(f"{(time.process_time() - started) / images * 1000:.2f} ms of a core an image, against {against}")


if __name__ == "__main__":
    speed() if "--speed" in sys.argv else main()
