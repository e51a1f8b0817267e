"""Files that a command makes: none is written over unasked, and none that the command did not make."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pseudolabel import storage
from pseudolabel.errors import OutputExists, PseudolabelError, StorageError
from pseudolabel.labels.store import is_store
from pseudolabel.storage import Location


def check_output(path: Location, *, overwrite: bool, read: Callable[[Location], object], what: str) -> None:
    """Raise `OutputExists` if `path` is there and not to be overwritten, if `read` finds that it isn't `what`, or if it
    lies in a store. What a killed command has left half-written beside it is removed.
    """
    check_outside_stores(path)
    storage.remove_stale(path.parent, of=path.name)
    if not path.exists():
        return
    if not overwrite:
        raise OutputExists(f"{path}: is there already; add --overwrite, or choose another --out")
    try:
        read(path)
    except PseudolabelError as error:
        raise OutputExists(f"{path}: holds no {what}, so it isn't overwritten; choose another --out") from error


def check_outside_stores(path: Location) -> None:
    """Raise `OutputExists` if `path` lies in the directory of a store: among its parts it would be taken for one."""
    for above in _above(path):
        try:
            found = is_store(above)
        except (StorageError, PermissionError) as error:
            if not storage.is_refused(error):
                raise
            found = False  # whoever may write below may not be allowed to look there
        if found:
            raise OutputExists(
                f"{path}: lies in the store {above}, which holds nothing but its own labels; choose another --out"
            )


def _above(path: Location) -> Iterator[Location]:
    """The directories that `path` is in. At a URL two, as deep as a store is: to ask costs time there."""
    if not isinstance(path, storage.RemotePath):
        yield from Path(os.path.realpath(path)).parents
        return
    for _ in range(2):
        path = path.parent
        yield path
