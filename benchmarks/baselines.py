"""What people write instead of `annotate`: a webdataset + DataLoader loop, and Ray Data's `map_batches`.

Both run the same model with the same preprocessing over the same shards and keep the logits; both as their own
documentation does it, with a process per core for decoding.
"""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader

from pseudolabel.engines.local import available_cores
from pseudolabel.shard_lists import Shard
from pseudolabel.shards import read_samples
from pseudolabel.teachers import parse_teacher

FIELDS = "jpg;png"


def _prepare(uri: str) -> Any:
    """A PIL image → the model's uint8 input, by the stock transforms."""
    from torchvision.transforms import v2

    preprocessing = parse_teacher(uri).load(torch.device("cpu")).preprocessing  # type: ignore[attr-defined]
    return v2.Compose(
        [
            v2.Grayscale(1) if preprocessing.channels == 1 else v2.RGB(),
            v2.Resize(preprocessing.resize),
            v2.CenterCrop(preprocessing.crop),
            v2.PILToTensor(),
        ]
    )


def dataloader_loop(
    uri: str, shards: Sequence[Shard], device: str, batch_size: int, threads: int | None = None
) -> float:
    """Images per second of the usual loop, from its second batch on, `torch.save` at the end. `threads` of torch's, or
    its default.
    """
    import webdataset as wds

    if threads is not None:
        torch.set_num_threads(threads)
    teacher, prepare = parse_teacher(uri).load(torch.device(device)), _prepare(uri)
    pipeline = wds.WebDataset([shard.path for shard in shards], shardshuffle=False, empty_check=False)
    samples = pipeline.decode("pil").to_tuple("__key__", FIELDS).map_tuple(str, prepare)
    loader = DataLoader(
        samples.batched(batch_size), batch_size=None, num_workers=available_cores(), pin_memory=device != "cpu"
    )
    keys: list[str] = []
    logits: list[torch.Tensor] = []
    started = first = 0.0
    with torch.inference_mode(), tempfile.TemporaryDirectory() as out:
        for some_keys, pixels_BCHW in loader:
            logits.append(teacher.logits((pixels_BCHW,)).cpu())
            keys += some_keys
            if not started:
                started, first = time.perf_counter(), len(keys)
        torch.save({"keys": keys, "logits": torch.cat(logits)}, Path(out) / "logits.pt")
        return (len(keys) - first) / (time.perf_counter() - started)


class _Labeler:
    """An actor of Ray Data: loads the model once, labels batches."""

    def __init__(self, uri: str, device: str) -> None:
        self._teacher, self._prepare = parse_teacher(uri).load(torch.device(device)), _prepare(uri)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        pixels = torch.stack([self._prepare(Image.open(io.BytesIO(data))) for data in batch["image"]])
        with torch.inference_mode():
            return {"key": batch["key"], "logits": self._teacher.logits((pixels,)).cpu().numpy()}


def _rows(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for sample in read_samples(Shard("any", row["item"])):
        yield {"key": sample.key, "image": next(iter(sample.fields.values()))}


def ray_data(uri: str, shards: Sequence[Shard], device: str, batch_size: int) -> float | None:
    """Images per second of Ray Data into Parquet, an actor per core (half a CPU each, or they starve their readers),
    start-up taken off by a second, smaller run. None where Ray isn't installed.
    """
    try:
        import ray
    except ImportError:
        return None
    ray.init(num_cpus=available_cores(), include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False

    def seconds(some: Sequence[Shard]) -> float:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as out:
            actors = available_cores() if device == "cpu" else 1
            share = {"num_cpus": 0.5} if device == "cpu" else {"num_gpus": 1}
            dataset = ray.data.from_items([shard.path for shard in some]).flat_map(_rows)
            labeled = dataset.map_batches(
                _Labeler,
                fn_constructor_args=(uri, device),
                batch_size=batch_size,
                compute=ray.data.ActorPoolStrategy(size=actors),
                **share,
            )
            labeled.write_parquet(out)
        return time.perf_counter() - started

    try:
        few = shards[: max(len(shards) // 4, 1)]
        rows = sum(1 for _ in read_samples(few[0]))
        return rows * (len(shards) - len(few)) / max(seconds(shards) - seconds(few), 1e-9)
    finally:
        ray.shutdown()
