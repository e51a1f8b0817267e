"""The process that our workers and helpers are forked from, with torch imported once for all of them.

Importing torch and torchvision takes each process two to four seconds; forked from a server that has done it, a worker
is ready at once.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import signal
import tempfile
from multiprocessing.context import ForkServerContext

# pandas, where it is installed: pyarrow imports it with the first array it makes
_PRELOADED = ["pseudolabel.labeling.work", "pseudolabel.dataset", "pandas"]
_LONGEST = 60  # bytes of TMPDIR: a socket's path has at most 107, and multiprocessing adds up to 40


def fork_server() -> ForkServerContext:
    """Start the server, if it isn't running, and return the context in which to start processes. Called early, it
    imports while its parent does. Ctrl-C is the parent's to handle: it reaches neither the server nor what is forked.
    """
    _fit_sockets()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    multiprocessing.resource_tracker.ensure_running()  # which unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # inherited by what is started
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def _fit_sockets() -> None:
    """Let multiprocessing put its sockets into /tmp where TMPDIR is too long a path for them, as batch systems' are."""
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST:
        before, tempfile.tempdir = tempfile.tempdir, "/tmp"
        try:
            multiprocessing.util.get_temp_dir()  # which keeps to it, in children, too
        finally:
            tempfile.tempdir = before
