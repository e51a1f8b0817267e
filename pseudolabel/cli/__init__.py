"""The command line: each command parses, calls one function, prints. torch is imported only by commands that need it.

Exit codes: 0 done; 1 a known error (one to five lines: what, where, remedy); 2 usage; 130 interrupted, resumable.
With `--json` stdout carries one JSON object and nothing else; what people read goes to stderr.
"""

from pseudolabel.cli import data, annotating, stores, trust, leaks, training, whole  # isort: skip (help lists them in this order)
from pseudolabel.cli.command import app, main

__all__ = ["annotating", "app", "data", "leaks", "main", "stores", "training", "trust", "whole"]
