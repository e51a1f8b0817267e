"""Peak memory of annotating 2, 20 and 200 shards: a worker holds batches and a shard's labels, never a corpus.

    python benchmarks/memory.py [--quick] [--json]

Each row is a process of its own with one worker. Read it so:

    peak ÷ at 2 shards    resident memory at its highest; wanted: within 5% of 1
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import made
import setup

from pseudolabel.demo import pack_bundled
from pseudolabel.shard_lists import list_shards

_ONE_RUN = """
import json, resource, sys
import torch
from pseudolabel.annotate import annotate
from pseudolabel.engines.local import LocalEngine
uri, out, *paths = sys.argv[1:]
done = annotate(paths, uri, out, engine=LocalEngine("cpu", 1))
print(json.dumps({"samples": done.samples, "kilobytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def peak(uri: str, paths: list[str], out: Path) -> tuple[int, int]:
    """Samples annotated, and kilobytes at the highest, of a process of its own."""
    command = [sys.executable, "-c", _ONE_RUN, uri, str(out), *paths]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found["samples"], found["kilobytes"]


def main() -> None:
    arguments = setup.parse_arguments(__doc__, device=False)
    rows: list[setup.Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        pack_bundled(directory / "data")
        images = made.garments(list_shards(directory / "data" / "unlabeled")[0])
        uri = made.random_model(directory / "model", "small:resnet8?width=16&stem_stride=2")
        shards = made.write_shards(directory / "shards", images, rows=256 if arguments.quick else 1000, count=200)
        base = 0
        for count in (2, 20, 200):
            samples, kilobytes = peak(uri, [shard.path for shard in shards[:count]], directory / f"store-{count}")
            base = base or kilobytes
            rows.append({"shards": str(count), "samples": str(samples), "peak ÷ at 2 shards": kilobytes / base})
    setup.Report("memory", {"quick": arguments.quick}, rows).print(as_json=arguments.json)


if __name__ == "__main__":
    main()
