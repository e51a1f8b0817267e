"""Files that a command makes: none is written over unasked, and none that the command did not make."""

from __future__ import annotations

from collections.abc import Callable

from pseudolabel.errors import OutputExists, PseudolabelError
from pseudolabel.storage import Location


def check_output(path: Location, *, overwrite: bool, read: Callable[[Location], object], what: str) -> None:
    """Raise `OutputExists` if `path` is there and not to be overwritten, or if `read` finds that it isn't `what`."""
    if not path.exists():
        return
    if not overwrite:
        raise OutputExists(f"{path}: is there already; add --overwrite, or choose another --out")
    try:
        read(path)
    except PseudolabelError as error:
        raise OutputExists(f"{path}: holds no {what}, so it isn't overwritten; choose another --out") from error
