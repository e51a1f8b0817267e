"""Lines of JSON that grow while something goes on, for people to read beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pseudolabel.errors import StorageError
from pseudolabel.storage import local
from pseudolabel.storage.remote import RemotePath

_EVERY = 60.0  # seconds between two versions of an object, which can't be appended to
_LINES = 5000  # of an object; what follows goes into another one


class Journal:
    """A file of lines. On a disk each is there at once; an object is written anew now and then, and by `close`."""

    def __init__(self, path: Path | RemotePath) -> None:
        self._path = path
        self._lines: list[str] = []  # of an object only
        self._full = 0  # objects before this one
        self._written = time.monotonic()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line. Raises `StorageError`."""
        line = json.dumps(record) + "\n"
        if isinstance(self._path, RemotePath):
            self._lines.append(line)
            if time.monotonic() - self._written > _EVERY or len(self._lines) == _LINES:
                self.close()
            if len(self._lines) == _LINES:
                self._full += 1
                self._lines = []
            return
        with local.explain_os_errors(self._path, "writing"):
            self._path.parent.mkdir(exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line)

    def close(self) -> None:
        """Write what is missing. A journal that can't be written is no reason to end in an error."""
        if isinstance(self._path, RemotePath) and self._lines:
            name = self._path.name if not self._full else f"{self._full}-{self._path.name}"
            with suppress(StorageError):
                self._path.with_name(name).write_bytes("".join(self._lines).encode())
            self._written = time.monotonic()
