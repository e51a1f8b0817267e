"""What a corpus of 100,000 shards costs beside its labels: listing, going on, inspecting, planning.

    python benchmarks/scale.py [--quick] [--json]        # 100,000 shards; 10,000 with --quick

The shards are links to one small tar, the parts are real ones of four rows. Instead of labeling, an engine answers
that each shard is done: what is left is the command's own work. Everything in seconds, with this process's memory
beside it (the peak so far, which only grows).

    list              the shards in a directory
    annotate, N%      the whole command, N% of the parts there before; per open shard in µs in the last column
    known footers     the same where the command before has left the footers in one file, as it does when it makes parts
    inspect           all parts summed up
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import made
import setup
import torch

from pseudolabel.annotate import annotate
from pseudolabel.demo import pack_bundled
from pseudolabel.labeling.line import Progress
from pseudolabel.labeling.work import annotate_shard, identify, settle
from pseudolabel.labels import schema, store
from pseudolabel.labels.summary import summarize_store
from pseudolabel.plan import plan
from pseudolabel.settings import AnnotateSettings
from pseudolabel.shards import Shard, list_shards
from pseudolabel.teachers import parse_teacher

SETTINGS = AnnotateSettings(precision="fp32", batch_size=4)


@dataclass(frozen=True)
class Answers:
    """An engine that says of every shard that it is done, and does nothing."""

    def devices(self) -> list[str]:
        return ["cpu"]

    def map(self, work: Any, items: Sequence[Any]) -> Generator[Any, None, None]:
        spent = {"fetch": 0.0, "decode": 0.0, "forward": 0.0, "write": 0.0, "other": 0.0}
        for item in items:
            facts = {"samples": 4, "rejects": 0, "bytes": 10240, "seconds": spent, "device": "cpu", "pid": 0}
            yield Progress(item.name, finished=facts, ends=item, seconds=spent)


def fill(root: Path, shards: Sequence[Shard], uri: str) -> Iterator[Path]:
    """Parts of all shards, one by one, without waiting for the disk."""
    teacher = parse_teacher(uri).load(torch.device("cpu"))
    settings = settle(SETTINGS, "cpu", teacher)
    target, made_one = store.create(root, identify(teacher, settings)), annotate_shard(shards[0], teacher, settings)
    os.fsync, real = lambda fd: None, os.fsync
    try:
        for shard in shards:
            facts = {**made_one.info.to_json(), "shard": shard.name}
            schema.write_sealed(target.part_path(shard.name), made_one.part, facts)
            yield Path(str(target.part_path(shard.name)))
    finally:
        os.fsync = real


def main() -> None:
    arguments = setup.parse_arguments(__doc__, device=False)
    torch.set_num_threads(1)
    count = 10_000 if arguments.quick else 100_000
    report = setup.Report("scale", {"shards": f"{count:,}"})

    def timed(what: str, work: Callable[[], Any], open_shards: int = 0) -> Any:
        started = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        each = 1e6 * seconds / open_shards if open_shards else None
        report.rows.append({"what": what, "seconds": seconds, "peak, MB": peak, "µs per open shard": each})
        return result

    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        pack_bundled(directory / "data")
        images = made.garments(list_shards(directory / "data" / "unlabeled")[0])
        uri = made.random_model(directory / "student", "small:resnet8?width=16&stem_stride=2")
        made.write_shards(directory / "corpus", images, rows=4, count=count)
        (directory / "corpus" / "first").rename(directory / "first")
        for link in (directory / "corpus").glob("*.tar"):
            link.unlink()
            link.symlink_to(directory / "first" / "shard.tar")
        shards = timed("list", lambda: list_shards(directory / "corpus"))
        out, ready = directory / "store", 0
        parts = fill(out, shards, uri)
        for percent in (0, 10, 50, 99):
            while ready < count * percent // 100:
                next(parts)
                ready += 1
            for footers in ("", ", known footers")[: 1 + (ready > 0)]:
                work = lambda: annotate(shards, uri, out, engine=Answers(), settings=SETTINGS)  # noqa: E731
                timed(f"annotate, {percent}% done{footers}", work, count - ready)
        timed("inspect", lambda: summarize_store(store.open_store(out)))
        timed("plan", lambda: plan(shards, uri, settings=SETTINGS, probe_seconds=0.5, probe_samples=32))
    report.print(as_json=arguments.json)


if __name__ == "__main__":
    main()
