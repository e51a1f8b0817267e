"""Arguments of short commands, and types of the fixtures that run them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pseudolabel.annotate import annotate
from pseudolabel.engines.local import LocalEngine
from pseudolabel.shard_lists import list_shards
from pseudolabel.teachers import parse_teacher

SMALL = ("--student", "small:resnet8?width=4", "--image-size", 12, "--channels", 1)
HERE = ("--device", "cpu", "--threads", 1)
FEW = (*SMALL, "--batch-size", 8, *HERE)
Invoke = Callable[..., tuple[int, str, str]]
Refuse = Callable[..., str]


def annotated(shards: Path, teacher: Path, out: Path) -> Path:
    annotate(list_shards(shards), parse_teacher(f"checkpoint:{teacher}"), out, engine=LocalEngine("cpu", 1))
    return out


def distill(corpus: Path, store: Path, out: Path, *more: object, steps: int = 2) -> tuple[object, ...]:
    """The arguments of a short training from soft labels and labels."""
    data = ("--labeled", corpus / "labeled", "--unlabeled", corpus / "unlabeled", "--labels", store)
    return ("train", "--out", out, *data, *FEW, "--steps", steps, *more)


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]
