"""Processes of our own: what they are forked from, and the memory they keep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from conftest import REPOSITORY, Cli, wait_until_gone

from pseudolabel.engines.local import LocalEngine
from pseudolabel.forkserver import fork_server

FORWARD_PASSES = """
import resource, sys, torch, torchvision
from pseudolabel.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.set_num_threads(1)
network, pixels = torchvision.models.mobilenet_v3_small(weights=None).eval(), torch.rand(16, 3, 128, 128)
with torch.inference_mode():
    for turn in range(13):
        if turn == 3:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        network(pixels)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _page_faults(how: str) -> int:
    command = [sys.executable, "-c", FORWARD_PASSES, how]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def test_kept_memory_spares_forward_passes_their_page_faults():
    assert _page_faults("keep") < _page_faults("default") / 10


def _report(answer: Connection) -> None:
    answer.send(("torch" in sys.modules, signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())))


def test_workers_are_forked_with_torch_imported_and_out_of_reach_of_ctrl_c():
    context = fork_server()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    mine, theirs = context.Pipe()
    process = context.Process(target=_report, args=(theirs,))
    process.start()
    assert mine.recv() == (True, True)
    process.join()


LAUNCHED = """
import sys, time
from pseudolabel.processes import end_with_launcher
end_with_launcher()
print("ready", flush=True)
time.sleep(60)
"""


def test_what_a_launcher_started_ends_with_it():
    """torchrun was killed, its processes trained on and kept the run directory from the next start."""
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LAUNCHED!r}])"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    options = {"env": environment, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", launcher], **options)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.communicate()
    wait_until_gone(process.pid)


def test_a_temporary_directory_too_long_for_sockets_is_no_obstacle(
    cli: Cli, corpus: Path, teacher_dir: Path, tmp_path: Path
):
    long = tmp_path / ("x" * 120)
    long.mkdir()
    options = ("--teacher", f"checkpoint:{teacher_dir}", "--out", "store", "--workers", 2)
    result, _ = cli("annotate", corpus / "unlabeled", *options, env={"TMPDIR": str(long)})
    assert result["parts_written"] == 3


UNGUARDED = """
import sys
from pseudolabel.engines.local import LocalEngine
print(list(LocalEngine("cpu", 2).map(print, [1, 2])))
"""


def test_a_script_that_starts_workers_while_it_is_imported_is_told(tmp_path: Path):
    """Workers import the script, too."""
    (tmp_path / "script.py").write_text(UNGUARDED)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, tmp_path / "script.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert 'what starts workers belongs under if __name__ == "__main__":' in done.stderr


def _environment(items: Iterator[str], device: str) -> Iterator[str]:
    for name in items:
        yield os.environ.get(name, "unset")


def test_workers_have_the_environment_of_now(monkeypatch: pytest.MonkeyPatch):
    """Not that of when the server was started: credentials may have come since."""
    fork_server()
    monkeypatch.setenv("A_KEY_OF_NOW", "here")
    assert list(LocalEngine("cpu", 2).map(_environment, ["A_KEY_OF_NOW", "A_KEY_OF_NOW"])) == ["here", "here"]
