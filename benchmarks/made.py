"""What the benchmarks run on: shards of the bundled or of made images, untrained models, made logits. All seeded."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pseudolabel.checkpoint import ModelCard, save_model
from pseudolabel.decoding import DecodedBatch, ShardEnd
from pseudolabel.demo import bundled
from pseudolabel.labeling.forward import encoded
from pseudolabel.labels.encodings import parse_encoding
from pseudolabel.labels.part import AnnotatedShard, PartBuilder
from pseudolabel.labels.store import Store, StoreIdentity, create
from pseudolabel.shard_lists import Shard
from pseudolabel.shards import read_samples, write_shard
from pseudolabel.views.draw import CLEAN, row_seeds
from pseudolabel.views.image import Preprocessing, square

GARMENTS = square(28, 1)
IMAGENET = Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def bundled_teacher(scratch: Path) -> str:
    """The spec of the pretrained Fashion-MNIST teacher; without one, of a random model of the same size."""
    trained = bundled("data/fashion-mnist") / "teacher"
    if (trained / "model.json").exists():
        return f"checkpoint:{trained}"
    return random_model(scratch / "teacher", "small:resnet20?width=32")


def random_model(directory: Path, student: str, preprocessing: Preprocessing = GARMENTS) -> str:
    """The spec of an untrained model: ten classes for grey images, a thousand for RGB."""
    torch.manual_seed(0)
    num_classes = 10 if preprocessing.channels == 1 else 1000
    card = ModelCard(student, tuple(f"class {index}" for index in range(num_classes)), preprocessing)
    save_model(directory, card, card.build())
    return f"checkpoint:{directory}"


def photos(count: int, side: int = 256) -> list[bytes]:
    """JPEGs of `count` made pictures at quality 90, about 20 kB each as photographs are: soft shapes, some noise."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        soft = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
        buffer = io.BytesIO()
        noisy = soft + rng.normal(0, 8, soft.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, format="JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


def garments(shard: Shard) -> list[bytes]:
    """The PNGs of a shard of the bundled Fashion-MNIST."""
    return [sample.fields["png"] for sample in read_samples(shard)]


def write_shards(directory: Path, images: Sequence[bytes], *, rows: int, count: int) -> list[Shard]:
    """`count` shards with names of their own, all of the same `rows` samples: `images` over and over."""
    first, field = directory / "first" / "shard.tar", "png" if images[0].startswith(b"\x89PNG") else "jpg"
    write_shard(first, ((f"{row:06d}", {field: images[row % len(images)]}) for row in range(rows)))
    shards = []
    for number in range(count):
        path = directory / f"shard-{number:05d}.tar"
        path.symlink_to(first)
        shards.append(Shard(path.stem, str(path)))
    return shards


def peaked_logits(rows: int, classes: int, seed: int = 0) -> Tensor:
    """Logits (rows, classes) as a trained linear head gives them.

    Class vectors w_c in 64 dimensions come in groups of ten that share a centre (cosine about 0.5). An image of class
    y has the features w_y + noise; its logits are a·w_c·features, with a lognormal. So rows differ in confidence, the
    runners-up are mostly relatives of the class, and the tail is bell-shaped.
    """
    made = torch.Generator().manual_seed(seed)
    centres = torch.randn(-(-classes // 10), 64, generator=made).repeat_interleave(10, dim=0)[:classes]
    vectors_CD = torch.nn.functional.normalize(centres + torch.randn(classes, 64, generator=made), dim=-1)
    of_class_N = torch.randint(classes, (rows,), generator=made)
    features_ND = vectors_CD[of_class_N] + 0.12 * torch.randn(rows, 64, generator=made)
    scale_N1 = 12.0 * (0.4 * torch.randn(rows, 1, generator=made)).exp()
    return scale_N1 * (features_ND @ vectors_CD.T)


def build_part(
    shard: str,
    logits_NC: Tensor,
    encoding: str,
    *,
    labels: Sequence[int | None] | None = None,
    fingerprint: str = "0" * 64,
    batch: int = 256,
) -> AnnotatedShard:
    """A shard's part as annotate makes it of these logits, batch by batch."""
    made_as = parse_encoding(encoding)
    builder = PartBuilder(shard, made_as, logits_NC.shape[1], fingerprint)
    for start in range(0, len(logits_NC), batch):
        logits_BC = logits_NC[start : start + batch]
        rows = list(range(start, start + len(logits_BC)))
        keys = [f"sample-{row:08d}" for row in rows]
        own: list[int | None] = list(labels[start : start + batch]) if labels is not None else [None] * len(rows)
        seed_B = torch.tensor(row_seeds(keys, [0] * len(rows)))
        builder.add(DecodedBatch(keys, rows, own, [(CLEAN,)] * len(rows)), encoded(made_as, logits_BC, seed_B))
    sha256 = hashlib.sha256(shard.encode()).hexdigest()
    return builder.finish(ShardEnd(size=0, sha256=sha256, samples=len(logits_NC)))


def store_of(
    root: Path, parts: Mapping[str, tuple[Tensor, Sequence[int | None] | None]], encoding: str = "dense"
) -> Store:
    """A store of shards with these logits (N, C) and labels."""
    num_classes = next(iter(parts.values()))[0].shape[1]
    identity = StoreIdentity({}, tuple(map(str, range(num_classes))), encoding, {"count": 1}, "fp32")
    store = create(root, identity)
    for shard, (logits_NC, labels) in parts.items():
        made = build_part(shard, logits_NC, encoding, labels=labels, fingerprint=store.fingerprint)
        store.commit(made.info, made.part, made.rejects)
    return store
