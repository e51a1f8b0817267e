"""Processes that don't outlive their parent, however it ends."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TypeVar

import torch

from pseudolabel.allocator import keep_freed_memory
from pseudolabel.errors import WorkerDied

LOOK_EVERY = 5.0
"""Seconds between two looks at loader processes."""

Item = TypeVar("Item")


def end_with_parent() -> None:
    """In a child of multiprocessing: from now on, end at once when the process that started it is gone.

    A process killed by SIGKILL or for memory can't end its children itself, and a child that waits on a queue would
    wait for ever: torch's own watchdog looks at the parent of the process, which under forkserver is the fork server.
    """
    threading.Thread(target=_wait_and_end, daemon=True).start()


def take_environment(environment: Mapping[str, str]) -> None:
    """Have the parent's environment as it is now. What is forked from a server has the one of the server's start, in
    which credentials that were set since are missing.
    """
    os.environ.clear()
    os.environ.update(environment)


def helper_start() -> Callable[[int], None]:
    """What a DataLoader's process is to do first: take this process's environment, then `become_helper`."""
    return partial(_start_helper, dict(os.environ))


def _start_helper(environment: Mapping[str, str], _: int) -> None:
    take_environment(environment)
    become_helper()


def become_helper() -> None:
    """In a process that loads or decodes for its parent: Ctrl-C is the parent's to handle, the complaint of torch's
    sharing thread when the parent ends is noise (what a batch raises travels to the parent all the same), and one
    thread is what it gets.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *_: None
    torch.set_num_threads(1)
    keep_freed_memory()
    end_with_parent()


@contextlib.contextmanager
def explained_loader_deaths() -> Iterator[None]:
    """Raises `WorkerDied` where a DataLoader says that one of its processes is gone."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if isinstance(error, RuntimeError) and "DataLoader" not in str(error):
            raise
        raise WorkerDied(
            "a loader process ended (killed, out of memory, or /dev/shm full?)\n"
            "run the same command again, perhaps with --workers 0: it goes on from the last checkpoint"
        ) from error


def wait_for(arriving: Iterator[Item], patience: float) -> Item:
    """The next item of a DataLoader whose timeout is `LOOK_EVERY`, waited for at most `patience` seconds.

    A DataLoader looks whether its processes are alive only when its timeout has run out: with the whole patience for a
    timeout, a process that was killed would be missed only then.
    """
    until = time.monotonic() + patience
    while True:
        try:
            return next(arriving)
        except RuntimeError as error:
            if "DataLoader timed out" not in str(error) or time.monotonic() > until:
                raise


def end_with_launcher() -> None:
    """In a process that a launcher such as `torchrun` started: end at once when the launcher is gone. It would train
    on, keep its run directory, and the launcher's next start would be refused there.
    """
    threading.Thread(target=_watch_and_end, args=(os.getppid(),), daemon=True).start()


def _watch_and_end(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.5)
    os._exit(1)


def _wait_and_end() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
