"""Kill real work with SIGKILL, go on with it, compare with an undisturbed run. A program, since it forks:

    python tests/killing.py annotate|train|run commit_steps|random DIRECTORY

The work runs in forked children, so that one import of torch serves a hundred kills. It is killed just before each
step of the commit protocol (every fsync, rename, unlink and mkdir), or at 8 random moments. After each kill the
same work runs again to its end, and what it leaves must equal the undisturbed result byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torchmetrics.classification  # noqa: F401 (imported once here, not in every child)

sys.path.insert(0, str(Path(__file__).parent.parent))

from pseudolabel.annotate import annotate
from pseudolabel.display import Display
from pseudolabel.engines.local import LocalEngine
from pseudolabel.labels.store import open_store
from pseudolabel.labels.verify import verify
from pseudolabel.place import Place
from pseudolabel.recipe import load_recipe
from pseudolabel.rounds import run
from pseudolabel.settings import AnnotateSettings, AugmentSettings, TrainSettings
from pseudolabel.shard_lists import list_shards
from pseudolabel.teachers import parse_teachers
from pseudolabel.train import train

Work = Callable[[Path], None]
_COMMIT_STEPS = ("fsync", "replace", "unlink", "mkdir")
RANDOM_KILLS = 8


def in_child(work: Work, out: Path, *, kill_at_step: int | None = None, kill_after: float | None = None) -> bool:
    """Run `work` in a forked child; returns whether it reached its end. Any other end is a failure."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2 if kill_at_step or kill_after else 1)
        try:
            if kill_at_step is not None:
                _kill_before_commit_step(kill_at_step)
            work(out)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"ended by signal {os.WTERMSIG(status)}"
        return False
    assert os.WEXITSTATUS(status) == 0, f"the work failed with {os.WEXITSTATUS(status)}"
    return True


def _kill_before_commit_step(number: int) -> None:
    """From now on the `number`-th (from 0) call that changes the disk durably kills this process instead."""
    calls = [0]

    def deadly(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            calls[0] += 1
            return real(*args, **kwargs)

        return call

    for name in _COMMIT_STEPS:
        setattr(os, name, deadly(getattr(os, name)))


def prove(work: Work, look: Callable[[Path], dict[str, str]], scratch: Path, moments: str, stride: int) -> int:
    """Kill at every `stride`-th commit step, or at random moments; each time the resumed result must be the same.
    Returns how often it struck.
    """
    started = time.monotonic()
    assert in_child(work, scratch / "undisturbed")
    duration = time.monotonic() - started
    wanted = look(scratch / "undisturbed")
    assert wanted
    struck = 0
    if moments == "commit_steps":
        while _killed_and_resumed(work, look, scratch / "killed", wanted, kill_at_step=struck * stride):
            struck += 1
        return struck
    dice, tries = random.Random(0), 0
    while struck < RANDOM_KILLS:
        tries += 1
        assert tries < 5 * RANDOM_KILLS
        killed = _killed_and_resumed(work, look, scratch / "killed", wanted, kill_after=dice.uniform(0.0, duration))
        struck += killed
        duration *= 1.0 if killed else 0.9  # the machine was busier when it was measured
    return struck


def _killed_and_resumed(
    work: Work, look: Callable[[Path], dict[str, str]], out: Path, wanted: dict[str, str], **kill: float
) -> bool:
    shutil.rmtree(out, ignore_errors=True)
    finished = in_child(work, out, **kill)  # type: ignore[arg-type]
    assert in_child(work, out)
    found = look(out)
    different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    assert not different, f"after {kill}: {different} differ"
    return not finished


def files(root: Path, *patterns: str) -> dict[str, str]:
    """Hashes of the matching files by relative path; a leftover temporary file is a failure."""
    leftover = list(root.rglob(".*.tmp-*"))
    assert not leftover, leftover
    paths = (path for pattern in patterns for path in root.glob(pattern))
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def annotate_corpus(corpus: Path, views: int = 1) -> tuple[Work, Callable[[Path], dict[str, str]]]:
    def work(out: Path) -> None:
        teacher = parse_teachers([f"checkpoint:{corpus / 'teacher'}"])
        settings = AnnotateSettings(encoding="topk:3", batch_size=5, views=views)
        annotate(
            list_shards(corpus / "unlabeled"),
            teacher,
            out,
            engine=LocalEngine("cpu", 1),
            settings=settings,
            max_reject_fraction=1,
        )

    def look(out: Path) -> dict[str, str]:
        assert verify(open_store(out), list_shards(corpus / "unlabeled")).ok
        return files(out, "store.json", "parts/*.parquet", "rejects/*.parquet")

    return work, look


def train_corpus(corpus: Path) -> tuple[Work, Callable[[Path], dict[str, str]]]:
    settings = TrainSettings(
        student="small:resnet8?width=4",
        image_size=12,
        channels=1,
        steps=20,
        batch_size=16,
        eval_every=4,
        augment=AugmentSettings(erasing=0.5),
        replay=2,
        mixup=0.2,
        label_sampling="balanced",
    )
    store = corpus / "store"
    annotate_corpus(corpus, views=3)[0](store)

    def work(out: Path) -> None:
        shards = {
            split: list_shards(corpus / split) for split in ("labeled", "unlabeled")
        }  # no val: the last weights are kept
        train(settings, out, store=open_store(store), threads=1, **shards)

    return work, lambda out: {**files(out, "model.*", "recipe.toml"), "metrics": _metrics(out / "run.json")}


def run_corpus(corpus: Path) -> tuple[Work, Callable[[Path], dict[str, str]]]:
    small = (
        'student = "small:resnet8?width=4"\nimage_size = 12\nchannels = 1\nbatch_size = 16\nsteps = 6\neval_every = 3\n'
    )
    data = "".join(f'{split} = "{corpus / split}"\n' for split in ("labeled", "unlabeled", "val"))
    recipe = corpus / "recipe.toml"
    tables = f'[teacher.train]\n{small}[train]\n{small}[rounds]\ncount = 2\ninit = "warm"\nmax_reject_fraction = 1.0\n'
    recipe.write_text(f'[data]\n{data}test = "{corpus / "val"}"\n{tables}')

    def work(out: Path) -> None:
        run(load_recipe(recipe), out, Place(LocalEngine("cpu", 1), threads=1), Display())

    def look(out: Path) -> dict[str, str]:
        found = files(
            out, "*/model.*", "*/student/model.*", "*/store/store.json", "*/store/parts/*.parquet", "recipe.toml"
        )
        return {**found, "metrics": _metrics(out / "run.json")}

    return work, look


def _metrics(path: Path) -> str:
    """A run.json without what depends on time and place."""

    def strip(value: object) -> object:
        if isinstance(value, dict):
            return {name: strip(one) for name, one in value.items() if name not in ("seconds", "run", "teacher")}
        return [strip(one) for one in value] if isinstance(value, list) else value

    return json.dumps(strip(json.loads(path.read_text())), sort_keys=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    scenario = {"annotate": annotate_corpus, "train": train_corpus, "run": run_corpus}[sys.argv[1]]
    directory = Path(sys.argv[3])
    stride = 10 if sys.argv[1] == "run" else 1  # its stages' steps are those of the other two
    print(json.dumps({"kills": prove(*scenario(directory), directory / "scratch", sys.argv[2], stride)}))
