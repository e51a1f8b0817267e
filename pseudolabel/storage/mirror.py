"""A directory at a URL, worked on in a copy: what writes many times wants a disk.

    with mirrored("s3://bucket/runs/a") as mirror:      mirror.path is a directory on this machine
        mirror.pull("checkpoint/state.safetensors")     what is there of these files
        mirror.push("checkpoint/state.safetensors")     each whole, in this order

Of a path on this machine the mirror is the path itself, and nothing is copied.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pseudolabel.storage.local import explain_os_errors, named_directory
from pseudolabel.storage.remote import RemotePath
from pseudolabel.storage.scratch import remove_abandoned

_PREFIX = "pseudolabel-run-"
_YOUNG = 60.0  # seconds: it may not be held yet


@dataclass(frozen=True)
class Mirror:
    """`path` on this machine for `remote`; None: it is the place itself."""

    path: Path
    remote: RemotePath | None = None

    @property
    def place(self) -> Path | RemotePath:
        """What the user called it."""
        return self.remote or self.path

    def names(self, below: str = "") -> list[str]:
        """What lies right below the place, or a directory of it."""
        if self.remote is not None:
            return [one.name for one in (self.remote / below if below else self.remote).iterdir()]
        directory = self.path / below
        return [one.name for one in directory.iterdir()] if directory.is_dir() else []

    def pull(self, *names: str) -> None:
        """Fetch those of these files that are there. Raises `StorageError`."""
        for name in names if self.remote is not None else ():
            assert self.remote is not None
            if (self.remote / name).is_file():
                content = (self.remote / name).read_bytes()
                with explain_os_errors(self.path / name, "writing"):
                    (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                    (self.path / name).write_bytes(content)

    def push(self, *names: str) -> None:
        """Put those of these files that are here. Raises `StorageError`."""
        for name in names if self.remote is not None else ():
            assert self.remote is not None
            if (self.path / name).exists():
                (self.remote / name).put(self.path / name)

    def claim(self, name: str) -> None:
        """Leave an empty file there: a sign that this work is begun. Raises `StorageError`."""
        if self.remote is not None:
            (self.remote / name).write_bytes(b"")

    def remove(self, *names: str) -> None:
        """Delete them at the URL. Raises `StorageError`."""
        for name in names if self.remote is not None else ():
            assert self.remote is not None
            (self.remote / name).unlink(missing_ok=True)


@contextmanager
def mirrored(place: Path | RemotePath) -> Iterator[Mirror]:
    """A place to work in that stands for `place`; hold it (`held`), for what nobody holds counts as abandoned. Raises
    `StorageError`.
    """
    if not isinstance(place, RemotePath):
        yield Mirror(place)
        return
    place.check_writable()
    above = named_directory() or Path(tempfile.gettempdir())
    with explain_os_errors(above, "making a directory in"):
        above.mkdir(parents=True, exist_ok=True)
        remove_abandoned(above, _PREFIX, older_than=_YOUNG)
        directory = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=above)
    with directory as path:
        yield Mirror(Path(path), place)
