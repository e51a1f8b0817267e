"""Many jobs at once on one store, killed and starved at random; in the end it equals an undisturbed one. A program:

    python tests/chaos.py SECONDS SEED DIRECTORY [s3://BUCKET]

Up to three annotate jobs run beside each other over all shards or over slices that overlap, each in a forked child.
Most are killed with SIGKILL at a random moment, some find the disk full at a random step of a commit, some reach their
end. After every round, whatever is in the store must be whole; after the last one, a job that nobody disturbs must make
the store equal, byte for byte, to one that was never disturbed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from killing import files

from pseudolabel import storage
from pseudolabel.annotate import annotate
from pseudolabel.engines.local import LocalEngine
from pseudolabel.errors import DamagedShard, PseudolabelError
from pseudolabel.labels.store import open_store
from pseudolabel.labels.verify import verify
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shard_lists import list_shards, slice_shards

SETTINGS = AnnotateSettings(encoding="topk:3", batch_size=5, precision="fp32")
SLICES = (None, None, "0/2", "1/2", "0/3", "1/3", "2/3")
JOBS = 3


def job(corpus: Path, store: storage.Location, part_of: str | None) -> None:
    """One annotate of this process, as the command does it. The shards lie where the store does."""
    above = store.parent if isinstance(store, storage.RemotePath) else corpus
    annotate(
        slice_shards(list_shards(above / "unlabeled"), part_of),
        f"checkpoint:{corpus / 'teacher'}",
        store,
        engine=LocalEngine("cpu", 1),
        settings=SETTINGS,
        max_reject_fraction=1,
    )


def disk_full_from(step: int) -> None:
    """From the `step`-th durable write on, the disk is full."""
    done, real = [0], os.fsync

    def fsync(descriptor: int) -> None:
        done[0] += 1
        if done[0] > step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    os.fsync = fsync


def start(corpus: Path, store: storage.Location, dice: random.Random) -> tuple[int, float | None]:
    """A job in a child, and when to kill it."""
    fate, part_of, step = (
        dice.choice(("killed", "killed", "full", "left alone")),
        dice.choice(SLICES),
        dice.randrange(12),
    )
    kill_after = dice.uniform(0.0, 0.6) if fate == "killed" else None
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        code = 0
        try:
            if fate == "full":
                disk_full_from(step)
            job(corpus, store, part_of)
        except PseudolabelError:
            code = 1
        except BaseException:
            code = 70
        os._exit(code)
    return child, kill_after


def round_of_jobs(corpus: Path, store: storage.Location, dice: random.Random) -> Counter[str]:
    """Some jobs side by side, each to its end; how they ended."""
    children = [start(corpus, store, dice) for _ in range(dice.randint(1, JOBS))]
    begun = time.monotonic()
    for child, kill_after in sorted(children, key=lambda one: one[1] or 0.0):
        if kill_after is not None:
            time.sleep(max(0.0, begun + kill_after - time.monotonic()))
            os.kill(child, signal.SIGKILL)
        if isinstance(store, storage.RemotePath):
            spoil_the_spool(dice)
    ended: Counter[str] = Counter()
    for child, _ in children:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        ended[{-signal.SIGKILL: "killed", 0: "finished", 1: "known error"}.get(code, f"code {code}")] += 1
    return ended


def undisturbed_job(corpus: Path, store: storage.Location) -> None:
    """A job to its end. What was spoiled in the spool before is found out by it, each file once, and fetched again."""
    for _ in range(10):
        try:
            job(corpus, store, None)
            return
        except DamagedShard as error:
            if "in the spool" not in str(error):
                raise
    raise AssertionError("the spool stays spoiled")


def spoil_the_spool(dice: random.Random) -> None:
    """Change, cut or remove something that was fetched, perhaps under the eyes of a job."""
    directory = Path(os.environ["PSEUDOLABEL_SPOOL"])
    there = sorted(directory.iterdir()) if directory.is_dir() else []
    if not there:
        return
    path, how = dice.choice(there), dice.choice(("flip", "cut", "remove"))
    try:
        content = bytearray(path.read_bytes())
        if how == "remove" or not content:
            path.unlink()
        elif how == "cut":
            os.truncate(path, len(content) // 2)
        else:
            content[dice.randrange(len(content))] ^= 1
            path.write_bytes(content)
    except FileNotFoundError:
        pass  # a job was quicker


def look(store: storage.Location) -> dict[str, str]:
    """What counts of a store, as hashes."""
    if not isinstance(store, storage.RemotePath):
        return files(store, "store.json", "parts/*.parquet", "rejects/*.parquet")
    names = ["store.json", *(f"{one}/{name.name}" for one in ("parts", "rejects") for name in (store / one).iterdir())]
    return {name: hashlib.sha256((store / name).read_bytes()).hexdigest() for name in names}


def main() -> None:
    seconds, seed, corpus = float(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    root: storage.Location = storage.location(sys.argv[4]) if len(sys.argv) > 4 else corpus
    torch.set_num_threads(1)
    dice, ended, rounds = random.Random(seed), Counter[str](), 0
    undisturbed, deadline = corpus / "undisturbed", time.monotonic() + seconds
    job(corpus, undisturbed, None)
    wanted = look(undisturbed)
    if isinstance(root, storage.RemotePath):
        for shard in (corpus / "unlabeled").iterdir():
            (root / "unlabeled" / shard.name).put(shard)
    while time.monotonic() < deadline:
        store = root / f"store-{rounds // 6}"  # a few rounds fill it; then another one
        ended += round_of_jobs(corpus, store, dice)
        rounds += 1
        if (store / "store.json").exists():
            found = verify(open_store(store))
            assert found.ok, (seed, rounds, found.problems)
        if rounds % 6 == 0 or time.monotonic() >= deadline:
            undisturbed_job(corpus, store)
            now = look(store)
            assert now == wanted, (seed, rounds, sorted(now.items() ^ wanted.items()))
    print(json.dumps({"seed": seed, "rounds": rounds, **ended}))
    assert set(ended) <= {"killed", "finished", "known error"}, ended


if __name__ == "__main__":
    main()
