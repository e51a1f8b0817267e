"""Where work runs. To add an engine, write `engines/x.py` with a `map` as in `interfaces.Engine`, and its name on the
command line.
"""

from __future__ import annotations

import importlib

from pseudolabel.errors import SpecError
from pseudolabel.interfaces import Engine

ENGINES = ("local", "ray")


def make_engine(name: str, device: str = "auto", workers: int | None = None, address: str | None = None) -> Engine:
    """The engine of that name; `address` is of a Ray cluster. Raises `SpecError` for other names, and for a device or a
    cluster that isn't there.
    """
    if name == "ray":
        made: Engine = importlib.import_module("pseudolabel.engines.ray").RayEngine(device, workers, address)
        return made
    if name != "local":
        raise SpecError(f"--engine {name}: write {' or '.join(ENGINES)}")
    if address is not None:
        raise SpecError(f"--address {address}: is of a Ray cluster; add --engine ray")
    local = importlib.import_module("pseudolabel.engines.local")
    made = local.LocalEngine(local.resolve_device(device), workers)
    return made


def default_engine() -> Engine:
    """This machine: a process per GPU, or per CPU core."""
    engine: Engine = importlib.import_module("pseudolabel.engines.local").LocalEngine()
    return engine
