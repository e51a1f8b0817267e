"""A sample's class number, as its `cls` file says it."""

from __future__ import annotations

from pseudolabel.shards import ShardFile
from pseudolabel.specs import CLASSES

MAX_CLASSES = CLASSES[-1]
_MOST_DIGITS = 10


def read_class(opened: ShardFile, index: int) -> int | str | None:
    """A sample's class number; None if it has no `cls`, and the text in it, cut short, if that is no class number."""
    if "cls" not in opened.field_names(index):
        return None
    text = opened.read(index, "cls").decode(errors="replace").strip()
    digits = text.lstrip("0") or text[:1]  # int() refuses thousands of digits
    if not (text.isascii() and text.isdecimal() and len(digits) <= _MOST_DIGITS) or int(digits) >= 1 << 31:
        return text[:40]
    return int(digits)
