"""Child processes that don't outlive their parent, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """In a child of multiprocessing: from now on, end at once when the process that started it is gone.

    A process killed by SIGKILL or for memory can't end its children itself, and a child that waits on a queue would
    wait for ever: torch's own watchdog looks at the parent of the process, which under forkserver is the fork server.
    """
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
