"""A run directory: what training leaves behind, and how it tells finished from interrupted.

run.json          written last: the run is complete; metrics and fingerprint
recipe.toml       the settings, resolved
metrics.jsonl     a line every few steps
model.safetensors, model.json
trackers.json     what finds this run with each of its trackers, if it has some
events/           what TensorBoard reads, if it is one of them
checkpoint/       state.safetensors, to resume from; removed when the run is complete
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from pseudolabel import storage
from pseudolabel.errors import OutputExists, TrackerError
from pseudolabel.storage import Location, Mirror

FORMAT_VERSION = 1
_STATE = "checkpoint/state.safetensors"
_BEGUN = "checkpoint/begun"  # at a URL, where an empty directory is none
_TRACKERS = "trackers.json"
_EVENTS = "events.out.tfevents.*"
_FILES = (
    "run.json",
    "recipe.toml",
    "metrics.jsonl",
    _TRACKERS,
    "model.safetensors",
    "model.json",
    "report.html",
)
_TORN = 1 << 62  # the step of a line that a kill cut short: after all others


@dataclass(frozen=True)
class RunDirectory:
    """The directory of a run that is what `identity` says (settings and hashes of all inputs). At a URL it is worked on
    in a copy, and what a resumed run needs is put there with each checkpoint, run.json last.
    """

    mirror: Mirror
    kind: str
    identity: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """On this machine."""
        return self.mirror.path

    @property
    def place(self) -> Location:
        """What the user called it."""
        return self.mirror.place

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps({"kind": self.kind, **self.identity}, sort_keys=True).encode()).hexdigest()

    @property
    def state_path(self) -> Path:
        return self.path / _STATE

    def check_place(self) -> None:
        """Raises `OutputExists` if the path is a file's."""
        with storage.explain_os_errors(self.path, "making"):
            if self.path.exists() and not self.path.is_dir():
                raise OutputExists(f"{self.place}: is a file; choose another --out")

    def start(self, *, overwrite: bool = False) -> dict[str, Any] | None:
        """Make the directory, or find the run in it. Returns run.json's content if this very run is complete.

        Raises:
            OutputExists: something else is there.
        """
        self.mirror.pull("run.json")
        marker = self.path / "run.json"
        if marker.exists() and not overwrite:
            try:
                found = json.loads(marker.read_text(encoding="utf-8"))
                fingerprint = found["fingerprint"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise OutputExists(
                    f"{self.place / marker.name}: can't be read ({error}); choose another --out, or replace it with "
                    "--overwrite"
                ) from error
            if fingerprint != self.fingerprint:
                raise OutputExists(self._other_run(found.get("identity", {})))
            return dict(found)
        names = self.mirror.names()
        begun = overwrite or "checkpoint" in names  # or else its files are somebody's own
        own = self._own_names() if begun else set()
        strangers = [name for name in names if name not in own]
        if strangers:
            raise OutputExists(
                f"{self.place}: holds {sorted(strangers)[0]!r}, which is not of a training run; choose "
                "an empty or new --out"
            )
        if overwrite:
            with storage.explain_os_errors(self.path, "clearing"):
                self._clear()
        with storage.explain_os_errors(self.path, "making"):
            (self.path / "checkpoint").mkdir(parents=True, exist_ok=True)
        self.mirror.claim(_BEGUN)
        self.mirror.pull("recipe.toml", "metrics.jsonl", _TRACKERS, _STATE)
        for directory in (self.path, self.path / "checkpoint"):
            storage.remove_stale(directory)
        if not self.state_path.exists():
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
        return None

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        path = self.path / "recipe.toml"
        if self.state_path.exists() and path.exists():
            return  # of the run that is resumed, or of another one, which `check` will refuse
        storage.write_atomic(path, tomli_w.dumps({"train": settings}))
        self.mirror.push(path.name)

    def log(self, record: Mapping[str, Any]) -> None:
        path = self.path / "metrics.jsonl"
        with storage.explain_os_errors(path, "writing"), open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({name: value for name, value in record.items() if value is not None}) + "\n")

    def cut_log(self, step: int) -> None:
        """Drop what was logged after the checkpoint at `step`: those steps are done again."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        storage.write_atomic(path, "".join(line + "\n" for line in kept))

    def save(self, write: Callable[[Path, dict[str, Any]], None]) -> None:
        """Replace the checkpoint; `write` gets the path and the facts that `check` wants to find in it."""
        write(self.state_path, {"fingerprint": self.fingerprint, "identity": dict(self.identity)})
        self.mirror.push("metrics.jsonl", *self._events(), _STATE)

    def check(self, facts: Mapping[str, Any]) -> None:
        """Raises `OutputExists` if a checkpoint is of another run."""
        if facts.get("fingerprint") != self.fingerprint:
            raise OutputExists(self._other_run(facts.get("identity", {})))

    def finish(self, content: Mapping[str, Any]) -> None:
        """Mark the run complete, then drop the checkpoint."""
        marker = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            **content,
            "fingerprint": self.fingerprint,
            "identity": dict(self.identity),
        }
        storage.write_atomic(self.path / "run.json", json.dumps(marker, indent=1) + "\n")
        self.mirror.push("metrics.jsonl", *self._events(), "model.safetensors", "model.json", "run.json")
        self.mirror.remove(_STATE, _BEGUN)
        shutil.rmtree(self.path / "checkpoint", ignore_errors=True)

    def tracked(self) -> dict[str, str]:
        """What finds this run with its trackers, by their names. Raises `TrackerError`."""
        path = self.path / _TRACKERS
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            same = found["fingerprint"] == self.fingerprint  # or of one that was stopped before its first checkpoint
            return {str(name): str(earlier) for name, earlier in found["runs"].items()} if same else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrackerError(
                f"{self.place / _TRACKERS}: can't be read ({error}); delete it, and trackers begin anew"
            ) from error

    def keep_tracked(self, runs: Mapping[str, str]) -> None:
        """Keep it for a resume."""
        content = {"fingerprint": self.fingerprint, "runs": dict(runs)}
        storage.write_atomic(self.path / _TRACKERS, json.dumps(content, indent=1) + "\n")
        self.mirror.push(_TRACKERS)

    def _events(self) -> list[str]:
        return [f"events/{path.name}" for path in sorted((self.path / "events").glob(_EVENTS))]

    def _own_names(self) -> set[str]:
        own = {*_FILES, "checkpoint", "events"}
        return own | {path.name for path in self.path.glob(".*.tmp-*")}

    def _clear(self) -> None:
        """Remove a run's own files, and nothing else."""
        events = [f"events/{name}" for name in self.mirror.names("events") if fnmatch.fnmatch(name, _EVENTS)]
        self.mirror.remove(*_FILES, *events, _STATE, _BEGUN)
        for name in (*_FILES, *events):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / "checkpoint", ignore_errors=True)

    def _other_run(self, identity: Mapping[str, Any]) -> str:
        all_names = {**identity, **self.identity}  # some are there only where they matter
        different = [name for name in all_names if identity.get(name) != self.identity.get(name)]
        if "settings" in different:
            old, new = identity.get("settings") or {}, self.identity["settings"]
            names = [name for name in new if old.get(name) != new[name]]
            different += [f"{name}: {old.get(name)} there, {new[name]} now" for name in names[:3]]
            different.remove("settings")
        what = "; ".join(different)
        remedy = "choose another --out, or replace it with --overwrite"
        return f"{self.place}: holds a run that differs from this one ({what})\n{remedy}"


def read_metrics(path: Location) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that are whole, in order."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [json.loads(line) for line in lines if _step_of(line) != _TORN]


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return _TORN
