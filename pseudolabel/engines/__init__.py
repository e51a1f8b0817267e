"""Where work runs. To add an engine, write `engines/x.py` with a `map` as in `interfaces.Engine`, and its name on the
command line.
"""

from __future__ import annotations

import importlib

from pseudolabel.interfaces import Engine


def default_engine() -> Engine:
    """This machine: a process per GPU, or per CPU core."""
    engine: Engine = importlib.import_module("pseudolabel.engines.local").LocalEngine()
    return engine
