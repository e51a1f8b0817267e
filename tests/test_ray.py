"""The Ray engine on a two-node cluster of this machine. Ray takes half a minute to start: `make test-cluster`."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli

from pseudolabel.annotate import Progress, annotate
from pseudolabel.engines.local import LocalEngine
from pseudolabel.engines.ray import RayEngine
from pseudolabel.errors import DamagedShard, SpecError, WorkerDied
from pseudolabel.settings import AnnotateSettings

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("default"),  # Ray's own, which differ from version to version
    pytest.mark.xdist_group("ray"),
]


@dataclass(frozen=True)
class Square:
    """Squares its items."""

    def __call__(self, items: Iterator[int], device: str) -> Iterator[tuple[int, str]]:
        for item in items:
            yield item * item, device


@dataclass(frozen=True)
class Done:
    value: int
    ends: int


@dataclass(frozen=True)
class Failing:
    """Raises at item 3, or kills its process there: always, or once, as a file tells. Or lingers at every item."""

    how: str
    place: str = ""

    def __call__(self, items: Iterator[int], device: str) -> Iterator[Done]:
        for item in items:
            if item == 3 and self.how == "known error":
                raise DamagedShard("shard 3: is broken\nmend it")
            if item == 3 and self.how == "bug":
                raise ZeroDivisionError("a bug")
            if item == 3 and (self.how == "always killed" or (self.how == "killed once" and self._first_time())):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "lingers":
                Path(self.place, str(os.getpid())).touch()
                time.sleep(0.05)
            yield Done(item, ends=item)

    def _first_time(self) -> bool:
        try:
            os.close(os.open(self.place, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    here = str(Path(__file__).parent)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    paths = os.pathsep.join([here, str(Path(here).parent)])
    ray.init(cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": paths}})
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_contract(cluster: Any) -> None:
    results = list(RayEngine("cpu").map(Square(), list(range(20))))
    assert sorted(results) == [(item * item, "cpu") for item in range(20)]
    assert list(RayEngine("cpu").map(Square(), [])) == []


def test_a_node_lost_in_the_middle_costs_nothing(cluster: Any, corpus: Path, teacher_dir: Path, tmp_path: Path) -> None:
    """The store equals one made in one process, byte for byte."""
    settings = AnnotateSettings(encoding="topk:3", batch_size=5, precision="fp32")
    how = {"settings": settings, "max_reject_fraction": 1.0}
    shards, teacher = [str(corpus / split) for split in ("labeled", "unlabeled", "val")], f"checkpoint:{teacher_dir}"
    annotate(shards, teacher, tmp_path / "serial", engine=LocalEngine("cpu", 1), **how)  # type: ignore[arg-type]
    node, lost = cluster.add_node(num_cpus=1), []

    def lose_a_node(progress: Progress) -> None:
        if not lost:
            lost.append(progress.shard)
            cluster.remove_node(node, allow_graceful=False)

    engine = RayEngine("cpu", workers=3)
    result = annotate(shards, teacher, tmp_path / "ray", engine=engine, on_progress=lose_a_node, **how)  # type: ignore[arg-type]
    assert lost
    assert result.parts_written == 5
    assert _hashes(tmp_path / "ray") == _hashes(tmp_path / "serial")


def _hashes(store: Path) -> dict[str, str]:
    files = [store / "store.json", *store.glob("parts/*"), *store.glob("rejects/*")]
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_command_on_the_cluster(cluster: Any, corpus: Path, teacher_dir: Path, tmp_path: Path, cli: Cli) -> None:
    """A second driver beside this process's, killed in the middle, then run again: the bytes of one process."""
    shards = [corpus / split for split in ("labeled", "unlabeled", "val")]
    common = (*shards, "--teacher", f"checkpoint:{teacher_dir}", "--precision", "fp32", "--batch-size", 5)
    cli("annotate", *common, "--out", tmp_path / "serial", "--device", "cpu", "--workers", 1)
    on_ray = ("--engine", "ray", "--address", cluster.address, "--device", "cpu")
    driver = cli.start("annotate", *common, "--out", tmp_path / "ray", *on_ray)
    parts = tmp_path / "ray" / "parts"
    while not (parts.is_dir() and any(parts.glob("[!.]*"))) and driver.poll() is None:
        time.sleep(0.01)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    done, _ = cli("annotate", *common, "--out", tmp_path / "ray", *on_ray)
    assert done["parts_written"] + done["parts_skipped"] == 5
    assert done["parts_skipped"] > 0
    assert _hashes(tmp_path / "ray") == _hashes(tmp_path / "serial")


def test_the_command_is_terminated(cluster: Any, corpus: Path, teacher_dir: Path, tmp_path: Path, cli: Cli) -> None:
    """SIGTERM ends it as it ends any other, and its actors with it; an address where nobody listens is one error."""
    command = ("annotate", corpus / "unlabeled", "--teacher", f"checkpoint:{teacher_dir}", "--out", tmp_path / "store")
    on_ray = ("--engine", "ray", "--device", "cpu", "--address")
    driver = cli.start(*command, *on_ray, cluster.address, "--json")
    while not (tmp_path / "store" / "parts").is_dir() and driver.poll() is None:
        time.sleep(0.01)
    driver.send_signal(signal.SIGTERM)
    out, err = driver.communicate(timeout=60)
    assert (driver.returncode, "Traceback" in err) in ((130, False), (0, False)), (out, err)
    error, _ = cli(*command, *on_ray, "127.0.0.1:1", code=1)
    assert "no Ray cluster can be reached there" in error["error"]["message"]


def test_a_killed_worker_is_replaced(cluster: Any, tmp_path: Path) -> None:
    results = list(RayEngine("cpu").map(Failing("killed once", str(tmp_path / "once")), list(range(8))))
    assert {result.value for result in results} == set(range(8))
    assert (tmp_path / "once").exists()


def test_an_item_that_kills_every_worker_is_given_up(cluster: Any) -> None:
    with pytest.raises(WorkerDied, match=r"^3: 3 workers ended while they had it"):
        list(RayEngine("cpu").map(Failing("always killed"), list(range(8))))


def test_what_work_raises_is_raised(cluster: Any) -> None:
    with pytest.raises(DamagedShard, match="shard 3: is broken"):
        list(RayEngine("cpu").map(Failing("known error"), list(range(8))))
    with pytest.raises(RuntimeError, match="ZeroDivisionError: a bug"):
        list(RayEngine("cpu").map(Failing("bug"), list(range(8))))


def test_closing_ends_the_workers(cluster: Any, tmp_path: Path) -> None:
    results = RayEngine("cpu").map(Failing("lingers", str(tmp_path)), list(range(1000)))
    for _ in range(6):
        next(results)
    results.close()
    begun = list(tmp_path.iterdir())
    assert begun
    deadline = time.monotonic() + 20  # Ray calls an actor dead some moments before its process is gone
    while any(_is_running(int(path.name)) for path in begun):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_devices_that_the_cluster_lacks(cluster: Any) -> None:
    assert RayEngine("auto").devices() == ["cpu"]
    with pytest.raises(SpecError, match="no node of this Ray cluster has a GPU"):
        RayEngine("cuda").devices()
    with pytest.raises(SpecError, match="write auto, cpu or cuda"):
        RayEngine("cuda:1").devices()
