"""What a cache of images does where its first look deceives it, and where a process that fills it dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import image_bytes
from torch import Tensor

from pseudolabel.errors import SpecError, WorkerDied
from pseudolabel.shard_lists import list_shards
from pseudolabel.training.image_cache import Stream, keep_images
from pseudolabel.training.inputs import TrainingData, gather


@dataclass(frozen=True)
class Decoded:
    """Keeps images as they are decoded."""

    shrink_to: ClassVar[int] = 0

    def prepare(self, image_CHW: Tensor) -> Tensor:
        return image_CHW

    def present(self, images: Tensor | Sequence[Tensor], seed_B: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
        return torch.stack(list(images))


class Deadly(Decoded):
    """Kills a loader process, as the system does when memory runs out."""

    def prepare(self, image_CHW: Tensor) -> Tensor:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return image_CHW


@pytest.fixture
def growing(make_shard: Callable[..., Path]) -> TrainingData:
    """A shard of small images, and one of large ones, which a look at the first doesn't show."""
    shards = [
        make_shard(name, [(f"{name}-{row}", {"png": image_bytes(size=(side, side)), "cls": b"0"}) for row in range(3)])
        for name, side in (("a", 8), ("b", 64))
    ]
    return gather(list_shards([str(shard) for shard in shards]), (), None, num_classes=2)[0]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("where", ["_free_memory", "_free_shared_memory"])
def test_images_that_grow_are_refused_or_left_out(
    growing: TrainingData, monkeypatch: pytest.MonkeyPatch, workers: int, where: str
) -> None:
    """Loader processes once sent them through shared memory: where it ran full, training waited for ever."""
    if where == "_free_shared_memory" and not workers:
        pytest.skip("needs none")
    stream = Stream(growing.labeled, True, Decoded(), uses=5)
    monkeypatch.setattr(f"pseudolabel.training.image_cache.{where}", lambda: 10_000)
    with pytest.raises(SpecError, match=r"--cache ram: the decoded images would take about .* kB, free are 10 kB"):
        keep_images([stream], growing, "ram", workers=workers, on_note=pytest.fail)
    monkeypatch.setattr(f"pseudolabel.training.image_cache.{where}", lambda: 40_000)
    assert keep_images([stream], growing, "auto", workers=workers, on_note=pytest.fail) == [None]


def test_a_stream_that_comes_up_once_is_left_out(growing: TrainingData) -> None:
    often, once = (Stream(growing.labeled, True, Decoded(), uses=uses) for uses in (5, 1.0))
    said: list[str] = []
    kept = keep_images([once, often], growing, "auto", workers=0, on_note=said.append)
    assert kept[0] is None
    assert kept[1] is not None
    assert said[0].startswith("6 images decoded once")
    both = keep_images([once, often], growing, "ram", workers=0, on_note=said.append)
    assert None not in both


def test_shared_memory_that_another_takes_meanwhile(growing: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([10**9, 10_000] * 2)
    monkeypatch.setattr("pseudolabel.training.image_cache._free_shared_memory", lambda: next(free))
    stream = Stream(growing.labeled, True, Decoded(), uses=5)
    with pytest.raises(SpecError, match="--cache ram: the decoded images would take about"):
        keep_images([stream], growing, "ram", workers=1, on_note=pytest.fail)
    assert keep_images([stream], growing, "auto", workers=1, on_note=pytest.fail) == [None]


def test_a_killed_process_is_named(growing: TrainingData) -> None:
    with pytest.raises(WorkerDied, match="a loader process ended"):
        keep_images([Stream(growing.labeled, True, Deadly(), uses=5)], growing, "ram", workers=1, on_note=pytest.fail)
