"""Engines: the contract, run against every one; and what happens when a worker fails, dies or is no longer wanted."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pseudolabel.devices import resolve_device
from pseudolabel.engines.local import LocalEngine, available_cores
from pseudolabel.errors import DamagedShard, SpecError, WorkerDied

ENGINES = {"one process": LocalEngine("cpu", 1), "three processes": LocalEngine("cpu", 3)}


@dataclass(frozen=True)
class Square:
    """Squares its items; says where and with how many threads."""

    def __call__(self, items: Iterator[int], device: str) -> Iterator[tuple[int, str, int]]:
        for item in items:
            yield item * item, device, torch.get_num_threads()


@dataclass(frozen=True)
class Failing:
    """Raises, dies or lingers at an item."""

    how: str
    place: str = ""

    def __call__(self, items: Iterator[int], device: str) -> Iterator[int]:
        for item in items:
            if item == 3 and self.how == "known error":
                raise DamagedShard("shard 3: is broken\nmend it")
            if item == 3 and self.how == "bug":
                raise ZeroDivisionError("a bug")
            if item == 3 and self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "slow":
                Path(self.place, str(os.getpid())).touch()
                time.sleep(0.05)
            yield item


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
def test_contract(engine: LocalEngine) -> None:
    """The results, as a set, are those of one process; each item once; one thread a worker on a CPU."""
    results = list(engine.map(Square(), list(range(20))))
    assert sorted(value for value, _, _ in results) == [item * item for item in range(20)]
    assert {device for _, device, _ in results} == {"cpu"}
    assert {threads for _, _, threads in results} == {1}


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())
def test_what_work_raises_is_raised_here(engine: LocalEngine) -> None:
    with pytest.raises(DamagedShard, match=r"^shard 3: is broken\nmend it$"):
        list(engine.map(Failing("known error"), list(range(6))))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(engine.map(Failing("bug"), list(range(6))))


def test_a_killed_worker_is_an_error_not_a_hang() -> None:
    with pytest.raises(WorkerDied, match=r"exit code -9.*\nrun the same command again"):
        list(LocalEngine("cpu", 2).map(Failing("killed"), list(range(6))))


def test_workers_end_when_nobody_listens(tmp_path: Path) -> None:
    """The consumer stops early (too many rejects, Ctrl-C): no process goes on."""
    results = LocalEngine("cpu", 2).map(Failing("slow", str(tmp_path)), list(range(1000)))
    for _ in range(6):
        next(results)
    results.close()
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


def test_threads_are_as_before_afterwards() -> None:
    before = torch.get_num_threads()
    list(ENGINES["one process"].map(Square(), [1]))
    assert torch.get_num_threads() == before


def test_no_more_processes_than_items_or_cores() -> None:
    assert available_cores() >= 1
    assert [value for value, _, _ in LocalEngine("cpu", 8).map(Square(), [3])] == [9]
    assert list(LocalEngine("cpu").map(Square(), [])) == []


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_there(name: str) -> None:
    with pytest.raises(SpecError, match="--device"):
        resolve_device(name)
