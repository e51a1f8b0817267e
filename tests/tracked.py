"""A training with a tracker, interrupted at step 4 and gone on with from its checkpoint at 2. A program: such packages
start threads and services, and read their settings when they are imported.

    python tests/tracked.py SPEC CORPUS RUN
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from pseudolabel.settings import TrainSettings
from pseudolabel.trackers import parse_tracker
from pseudolabel.train import train
from pseudolabel.training.loop import TrainProgress

SMALL = TrainSettings(student="small:resnet8?width=4", image_size=12, channels=1, steps=6, batch_size=8, eval_every=2)


def _stop(progress: TrainProgress) -> None:
    if progress.step == 4:
        raise KeyboardInterrupt


def main(spec: str, corpus: str, out: str) -> None:
    data = {"labeled": f"{corpus}/labeled", "val": f"{corpus}/val"}
    for on_progress in (_stop, None):
        try:
            train(SMALL, out, **data, threads=1, trackers=[parse_tracker(spec)], on_progress=on_progress)
        except KeyboardInterrupt:
            assert on_progress is not None


if __name__ == "__main__":
    main(*sys.argv[1:])
