"""Small real things to test on: shards written by the library, images made by Pillow, models made from a spec."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before its package is imported: asking a hub that isn't reached takes a minute

import numpy as np
import pytest
import torch
from commands import Invoke, Refuse, annotated
from hypothesis import settings
from object_stores import ENVIRONMENT, Bucket, Proxy, moto, rclone
from PIL import Image

from pseudolabel.checkpoint import ModelCard, save_model
from pseudolabel.cli import main
from pseudolabel.shards import write_shard
from pseudolabel.storage import asking
from pseudolabel.views.image import square

# The same examples every time, and no time limit on a loaded machine.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("repeatable")
torch.set_num_threads(1)
REPOSITORY = Path(__file__).parent.parent


def image_bytes(
    seed: int = 0, size: tuple[int, int] = (12, 12), mode: str = "L", kind: str = "PNG", **options: Any
) -> bytes:
    """A random image of Pillow's `mode` in the format `kind`."""
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels, mode).save(buffer, format=kind, **options)
    return buffer.getvalue()


def digit_like(label: int, seed: int) -> bytes:
    """A learnable image: a bright bar whose place tells the class, with noise."""
    pixels = np.random.default_rng([label, seed]).integers(0, 60, (12, 12), dtype=np.uint8)
    pixels[2 * label + 1 : 2 * label + 4] += 150
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def make_shard(tmp_path: Path) -> Callable[..., Path]:
    """Write a shard: `make_shard("a", [("key", {"png": …})])` under `tmp_path/shards` or `directory`."""

    def make(name: str, samples: Iterable[tuple[str, Mapping[str, bytes]]], directory: Path | None = None) -> Path:
        path = (directory or tmp_path / "shards") / f"{name}.tar"
        write_shard(path, samples)
        return path

    return make


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three labeled, three unlabeled and one validation shard of four learnable classes."""
    root = tmp_path / "corpus"
    for split, shards, labeled in (("labeled", 1, True), ("unlabeled", 3, False), ("val", 1, True)):
        for shard in range(shards):
            samples = []
            for index in range(24):
                label, seed = index % 4, 1000 * len(split) + 100 * shard + index
                fields = {"png": digit_like(label, seed), **({"cls": str(label).encode()} if labeled else {})}
                samples.append((f"{split}/{shard}-{index:03d}", fields))
            write_shard(root / split / f"{split}-{shard}.tar", samples)
    return root


def make_model(directory: Path, *, classes: int = 4, seed: int = 0, student: str = "small:resnet8?width=4") -> Path:
    """A model directory with random weights, usable as `checkpoint:DIR`."""
    torch.manual_seed(seed)
    card = ModelCard(student, tuple(f"class {index}" for index in range(classes)), square(12, 1))
    save_model(directory, card, card.build())
    return directory


@pytest.fixture
def teacher_dir(tmp_path: Path) -> Path:
    return make_model(tmp_path / "teacher")


class Cli:
    """Runs the real command in a real process."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd

    def start(self, *args: object, **options: Any) -> subprocess.Popen[str]:
        """Start without waiting; the process leads its own group, so a test can kill it with its children."""
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **options.pop("env", {})}
        command = [sys.executable, "-m", "pseudolabel", *map(str, args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen(command, cwd=self.cwd, env=environment, text=True, start_new_session=True, **pipes)

    def __call__(self, *args: object, code: int = 0, **options: Any) -> tuple[dict[str, Any], str]:
        """Run with --json; returns the object and stderr. There is never a traceback, and stdout is one object."""
        process = self.start(*args, "--json", **options)
        out, err = process.communicate(timeout=240)
        assert process.returncode == code, (args, process.returncode, out, err)
        assert "Traceback" not in err, err
        result = json.loads(out)
        if code:
            message = result["error"]["message"] if "error" in result else str(result["problems"])
            assert 1 <= len(message.splitlines()) <= 5, message
        return result, err


def wait_until_gone(group: int) -> None:
    """Wait until no process of the group is left; one that stays is a failure."""
    for _ in range(1500):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("a worker outlived its command")


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path)


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run the entry point in this process: exit code, stdout, stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pseudolabel", *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def answer(invoke: Invoke) -> Callable[..., dict[str, Any]]:
    """Run with --json; the object that is on stdout, and nothing else is."""

    def run(*args: object) -> dict[str, Any]:
        code, out, err = invoke(*args, "--json")
        assert code == 0, (out, err)
        assert out.count("\n") == 1
        found: dict[str, Any] = json.loads(out)
        return found

    return run


@pytest.fixture
def refuse(invoke: Invoke) -> Refuse:
    """Run a command that must fail with a known error, for people and for scripts: the same one to five lines."""

    def run(*args: object, kind: str, said: str) -> str:
        code, out, err = invoke(*args)
        assert (code, out) == (1, ""), (code, out, err)
        assert "Traceback" not in err
        shown = err[err.index("error: ") :].removeprefix("error: ").rstrip("\n")
        code, out, err = invoke(*args, "--json")
        assert (code, out.count("\n")) == (1, 1), (code, out, err)
        error = json.loads(out)["error"]
        assert error["kind"] == kind, error
        assert error["message"] == shown
        assert 1 <= len(shown.splitlines()) <= 5, shown
        assert re.search(said, shown), shown
        return shown

    return run


@pytest.fixture
def store(tmp_path: Path, corpus: Path, teacher_dir: Path) -> Path:
    """The corpus's unlabeled shards, annotated by a random teacher of four classes."""
    return annotated(corpus / "unlabeled", teacher_dir, tmp_path / "store")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """Five samples, of which one has an extended header for its long name."""
    samples = [(f"key-{index}", {"png": bytes([index]) * (300 * index), "cls": b"%d" % index}) for index in range(4)]
    write_shard(tmp_path / "whole.tar", [*samples, ("long/" * 40 + "k", {"png": b"x" * 600})])
    return tmp_path / "whole.tar"


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """The address of the server of a kind, started when it is first wanted."""
    with contextlib.ExitStack() as stack:
        start = {"moto": moto, "rclone": lambda: rclone(tmp_path_factory.mktemp("rclone"))}
        known: dict[str, str] = {}

        def address(kind: str) -> str:
            if kind not in known:
                known[kind] = stack.enter_context(start[kind]())
            return known[kind]

        yield address


@pytest.fixture(params=["moto", "rclone"])
def bucket(
    request: pytest.FixtureRequest,
    servers: Callable[[str], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Bucket]:
    """An empty bucket on each kind of server, and this process's environment set so that it is found."""
    environment = {
        **ENVIRONMENT,
        "AWS_ENDPOINT_URL": servers(request.param),
        "PSEUDOLABEL_SPOOL": str(tmp_path / "spool"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asking.file_system.cache_clear()
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    asking.call(asking.file_system("s3", os.getpid()), "mkdir", 30.0, (name,))
    yield Bucket(f"s3://{name}", request.param, environment["AWS_ENDPOINT_URL"], environment)
    asking.file_system.cache_clear()


@pytest.fixture
def proxied(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Bucket, Proxy]]:
    """The bucket behind a proxy that fails when told to."""
    proxy = Proxy(bucket.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    asking.file_system.cache_clear()
    yield Bucket(bucket.url, bucket.kind, proxy.url, {**bucket.environment, "AWS_ENDPOINT_URL": proxy.url}), proxy
    asking.file_system.cache_clear()
    proxy.close()
