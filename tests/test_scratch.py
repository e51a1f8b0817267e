"""Scratch directories: each goes with its process, that of a killed one with the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

from pseudolabel import storage

_HOLDER = """
import time
from pseudolabel.storage import scratch_directory
with scratch_directory("plan") as path:
    (path / "part.parquet").write_bytes(b"x")
    print(path, flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_goes_and_what_is_in_use_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "pseudolabel-scratch.txt").write_text("mine")
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    processes = [
        subprocess.Popen([sys.executable, "-c", _HOLDER], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    try:
        killed, living = (Path(process.stdout.readline().strip()) for process in processes if process.stdout)
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        assert killed.is_dir()
        with storage.scratch_directory("write") as own:
            assert sorted(tmp_path.iterdir()) == sorted([living, own, tmp_path / "pseudolabel-scratch.txt"])
        assert (living / "part.parquet").read_bytes() == b"x"
        assert not own.exists()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
