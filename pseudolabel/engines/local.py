"""This machine: one process per device; on CPUs one single-threaded process per core.

Two one-thread processes beat one process with two threads by 1.3 to 2.2 times on a CPU, and one thread makes the
results independent of how many workers there are. Items are handed out one at a time as workers ask for them. A
worker whose parent dies ends at once.
"""

from __future__ import annotations

import contextlib
import multiprocessing.reduction
import os
import signal
import sys
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from pseudolabel.allocator import keep_freed_memory
from pseudolabel.devices import resolve_device
from pseudolabel.errors import PseudolabelError, WorkerDied
from pseudolabel.forkserver import fork_server
from pseudolabel.processes import end_with_parent, take_environment

Item = TypeVar("Item")
Result = TypeVar("Result")
_Work = Callable[[Iterator[Any], str], Iterator[Any]]


@dataclass(frozen=True)
class LocalEngine:
    """`device`: auto, cpu, cuda, cuda:1, mps. `workers`: processes, or None for one per GPU or CPU core."""

    device: str = "auto"
    workers: int | None = None

    def map(
        self, work: Callable[[Iterator[Item], str], Iterator[Result]], items: Sequence[Item]
    ) -> Generator[Result, None, None]:
        """Raises `WorkerDied` if a process is killed, and whatever `work` raises."""
        devices = self.devices()
        if not items:
            return _nothing()
        count = min(self.workers or (len(devices) if devices[0] != "cpu" else available_cores()), len(items))
        if count > 1:
            return _in_processes(work, items, [devices[index % len(devices)] for index in range(count)])
        return _in_this_process(work, items, devices[0])

    def devices(self) -> list[str]:
        """The devices to use. Raises `SpecError` if the one asked for isn't there."""
        name = resolve_device(self.device)
        if name == "cuda":
            return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        return [name]


def available_cores() -> int:
    """The cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _nothing() -> Generator[Any, None, None]:
    yield from ()


def _in_this_process(work: _Work, items: Sequence[Any], device: str) -> Generator[Any, None, None]:
    threads = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield from work(iter(items), device)
    finally:
        torch.set_num_threads(threads)


def _in_processes(work: _Work, items: Sequence[Any], devices: list[str]) -> Generator[Any, None, None]:
    context = fork_server()
    processes: list[BaseProcess] = []
    requests: list[Connection] = []
    results: dict[Connection, int] = {}
    try:
        for device in devices:
            request, their_request = context.Pipe()
            result, their_result = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(
                target=_worker, args=(work, device, their_request, their_result, dict(os.environ))
            )
            process.start()
            their_request.close()
            their_result.close()
            processes.append(process)
            requests.append(request)
            results[result] = len(requests) - 1
        yield from _serve(iter(items), processes, requests, results)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def _serve(
    items: Iterator[Any],
    processes: list[BaseProcess],
    requests: list[Connection],
    results: dict[Connection, int],
) -> Iterator[Any]:
    asking: dict[Connection, int] = {request: index for index, request in enumerate(requests)}
    while results:
        for ready in wait([*asking, *results]):
            assert isinstance(ready, Connection)
            try:
                message = ready.recv()
            except (EOFError, OSError):
                asking.pop(ready, None)
                if (index := results.pop(ready, None)) is not None:  # the pipe closed without the word that all is done
                    processes[index].join(10)
                    if (code := processes[index].exitcode) == 1:
                        raise WorkerDied(
                            f"worker {index} could not start; what it wrote to stderr says why\n"
                            'in a script of your own, what starts workers belongs under if __name__ == "__main__":'
                        ) from None
                    raise WorkerDied(
                        f"worker {index} ended with exit code {code} (killed, or out of memory?)\n"
                        "run the same command again: finished shards are kept; fewer --workers or a "
                        "smaller --batch-size need less memory"
                    ) from None
                continue
            if ready in asking:
                item = next(items, None)
                with contextlib.suppress(OSError):  # it is dead: its results' pipe will say so
                    ready.send(None if item is None else (item,))
                continue
            kind, value = message
            if kind == "done":
                del results[ready]
            elif kind == "error":
                raise value
            else:
                yield value


def _worker(work: _Work, device: str, request: Connection, result: Connection, environment: Mapping[str, str]) -> None:
    take_environment(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted and ends us
    sys.stdout = sys.stderr  # stdout is the command's, and may carry JSON
    end_with_parent()
    keep_freed_memory()
    if device == "cpu":
        torch.set_num_threads(1)
    else:
        torch.set_num_threads(max(1, available_cores() // 2))

    def ask() -> Iterator[Any]:
        while True:
            request.send(None)
            answer = request.recv()
            if answer is None:
                return
            yield answer[0]

    try:
        for value in work(ask(), device):
            result.send(("result", value))
        result.send(("done", None))
    except BaseException as error:  # whatever ends a worker is raised again in the parent
        if not isinstance(error, PseudolabelError):
            error.add_note("in a worker:\n" + traceback.format_exc())
        try:
            multiprocessing.reduction.ForkingPickler.dumps(error)
        except Exception:
            error = RuntimeError(f"in a worker:\n{traceback.format_exc()}")
        result.send(("error", error))
