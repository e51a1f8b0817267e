"""`trackio?project=P`: trackio's database on this machine (below TRACKIO_DIR), `space=OWNER/NAME` or `server=URL`;
`trackio show` opens its page.

trackio finds a run by its name, so each gets one of its own, NAME-XXXXXX, kept for a resume. It is not told again of
steps that it has. It has no place for a result, so it isn't told of it.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

from pseudolabel import specs, storage
from pseudolabel.interfaces import TrackedRun, Tracker
from pseudolabel.specs import Spec


class Trackio:
    """A run of trackio."""

    def __init__(self, spec: Spec) -> None:
        self._args = spec.only(("project", "space", "server"))
        shown = "&".join(f"{key}={storage.shown(value)}" for key, value in self._args.items())
        self.name = f"trackio?{shown}" if self._args else "trackio"
        self._run: Any = None
        self._from = 0

    def begin(self, run: TrackedRun) -> str:
        import trackio

        self._run = trackio.init(
            self._args.get("project", "pseudolabel"),
            name=run.earlier or f"{run.name}-{secrets.token_hex(3)}",
            group=run.group,
            space_id=self._args.get("space"),
            server_url=self._args.get("server"),
            config=dict(run.settings),
            resume="must" if run.earlier is not None else "never",
            embed=False,
        )
        # The step after the last it has. Not public: were it gone, steps would be there twice after a resume.
        self._from = getattr(self._run, "_next_step", 0) if run.earlier is not None else 0
        return str(self._run.name)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step >= self._from:
            self._run.log(dict(metrics), step=step)

    def end(self, result: Mapping[str, Any] | None, failure: str | None) -> None:
        import trackio

        trackio.finish()


def make(spec: Spec) -> Tracker:
    """Check the arguments, and that the package is there. Raises `SpecError`."""
    tracker = Trackio(spec)
    try:
        import trackio  # noqa: F401
    except ImportError as error:
        raise specs.missing_package(spec, error, "trackio") from error
    return tracker
