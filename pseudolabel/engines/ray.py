"""A Ray cluster: an actor per GPU, or per CPU core, that lives as long as there is work for it.

Items are handed out one at a time as actors ask for them, so a fast node takes more. An actor that dies with its node
is replaced, and what it had not reported finished is handed out again; an item that ends three actors is given up with
an error. Which nodes there are, and how many, is Ray's business: actors that wait for a place (an autoscaler may be
fetching one) hold nothing, and the others go on without them.

The cluster's nodes need this package, and see the same paths or URLs; they work in the driver's directory if they have
it, so that relative paths mean the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, TypeVar

from pseudolabel.errors import PseudolabelError, SpecError, WorkerDied

Item = TypeVar("Item")
Result = TypeVar("Result")
Event = tuple[str, Any]  # asks for an item; result; done; error

_TRIES = 3  # actors that one item may end
_PATIENCE = 30.0  # seconds without a single actor before saying so
_LAST_WORDS = 10.0  # seconds for an actor to be gone when it is told to


@dataclass(frozen=True)
class RayEngine:
    """`device`: auto (GPUs if the cluster has any), cpu, cuda. `workers`: actors, or None for one per GPU or core that
    the cluster has now. `address` as `ray.init` takes it, such as `auto` or `ray://head:10001`; None for RAY_ADDRESS,
    or a cluster of this machine alone.
    """

    device: str = "auto"
    workers: int | None = None
    address: str | None = None

    def devices(self) -> list[str]:
        """Those of the node that has most: they share its cores. Raises `SpecError` without Ray or such a device."""
        ray = self._connect()
        if self.device not in ("auto", "cpu", "cuda"):
            raise SpecError(f"--device {self.device}: with --engine ray write auto, cpu or cuda")
        gpus = max((int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
        if self.device == "cuda" and not gpus:
            raise SpecError("--device cuda: no node of this Ray cluster has a GPU; add one, or write --device cpu")
        return ["cpu"] if self.device == "cpu" or not gpus else ["cuda:0"] * gpus

    def map(
        self, work: Callable[[Iterator[Item], str], Iterator[Result]], items: Sequence[Item]
    ) -> Generator[Result, None, None]:
        """Raises whatever `work` raises, and `WorkerDied` if an item ends one actor after another."""
        if not items:
            return
        ray = self._connect()
        device = self.devices()[0]
        needs = {"num_cpus": 1.0, "num_gpus": 0.0 if device == "cpu" else 1.0}
        there = ray.cluster_resources().get("CPU" if device == "cpu" else "GPU", 1)
        count = min(self.workers or max(int(there), 1), len(items))
        actors = ray.remote(max_restarts=0, max_concurrency=1, **needs)(_Worker)
        pool = _Pool(ray, actors, count, work, device, deque(items))
        try:
            yield from pool.run()
        finally:
            pool.end()

    def _connect(self) -> Any:
        try:
            import ray
        except ImportError as error:
            raise SpecError("--engine ray: Ray isn't installed; pip install 'pseudolabel[ray]'") from error
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            address = self.address or os.environ.get("RAY_ADDRESS") or "local"
            before = signal.getsignal(signal.SIGTERM)
            try:
                _knock(address)
                ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
            except (OSError, ValueError, RuntimeError) as error:
                why = (str(error) or type(error).__name__).splitlines()[0]
                raise SpecError(f"--address {address}: no Ray cluster can be reached there: {why}") from error
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # Ray sets its own, which would not end as the command does
        return ray


@dataclass
class _Actor:
    """An actor as the driver knows it: the call it is answering, and the items it has not reported finished."""

    handle: Any
    call: Any
    holds: list[Any] = field(default_factory=list)
    started: bool = False


class _Pool:
    """The driver's side: hands items out, collects results, replaces what died."""

    def __init__(self, ray: Any, actor_class: Any, count: int, work: Any, device: str, items: deque[Any]) -> None:
        self._ray, self._class, self._count, self._device, self._items = ray, actor_class, count, device, items
        self._arguments = (ray.put(work), device, os.getcwd())
        self._actors: list[_Actor] = []
        self._false_starts = 0
        self._deaths: list[Any] = []  # an item for each actor that died while it had it

    def run(self) -> Iterator[Any]:
        """All results. Ends when every item is done."""
        for _ in range(self._count):
            self._start()
        while self._actors:
            calls = {actor.call: actor for actor in self._actors}
            ready, _ = self._ray.wait(list(calls), timeout=_PATIENCE)
            if not ready and not any(actor.started for actor in self._actors):
                self._complain()
            for call in ready:
                yield from self._answered(calls[call])
            if not self._items and not any(actor.holds for actor in self._actors if actor.started):
                return  # what still waits for a place isn't needed any more

    def end(self) -> None:
        """Kill the actors and see them gone."""
        for actor in self._actors:
            self._ray.kill(actor.handle)
        for actor in self._actors:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.get(actor.call, timeout=_LAST_WORDS)

    def _start(self) -> None:
        handle = self._class.remote(*self._arguments)
        self._actors.append(_Actor(handle, handle.turn.remote([], 0)))

    def _answered(self, actor: _Actor) -> Iterator[Any]:
        try:
            events: list[Event] = self._ray.get(actor.call)
        except self._ray.exceptions.RayActorError as death:
            self._bury(actor, death)
            return
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, PseudolabelError) else error from None
        actor.started, self._false_starts = True, 0
        given: list[Any] = []
        ends = 0
        for kind, value in events:
            if kind == "asks":
                if self._items:
                    given.append(self._items.popleft())
                else:
                    ends += 1
            elif kind == "error":
                raise value
            elif kind == "result":
                finished = getattr(value, "ends", None)
                if finished in actor.holds:
                    actor.holds.remove(finished)
                yield value
            elif kind == "done":
                self._actors.remove(actor)
                self._ray.kill(actor.handle)  # or its place is free only when the handle is collected
                return
        actor.holds += given
        actor.call = actor.handle.turn.remote(given, ends)

    def _bury(self, actor: _Actor, death: Exception) -> None:
        self._actors.remove(actor)
        self._false_starts += not actor.started
        if self._false_starts >= _TRIES * self._count:  # with one node many may go
            raise WorkerDied(
                f"{self._false_starts} workers on the Ray cluster ended before they had begun\n"
                f"the last one: {_short(death)}\n"
                "does every node have this package and its dependencies, and memory for the teacher?"
            ) from death
        for item in actor.holds:
            self._deaths.append(item)
            if (times := self._deaths.count(item)) >= _TRIES:
                raise WorkerDied(
                    f"{getattr(item, 'path', item)}: {times} workers ended while they had it (killed, or out of "
                    "memory?)\n"
                    f"the last one: {_short(death)}\n"
                    "run the same command again: finished shards are kept; a smaller --batch-size needs less memory"
                ) from death
        if actor.holds or self._items or not actor.started:
            self._items.extendleft(reversed(actor.holds))
            self._start()

    def _complain(self) -> None:
        wanted = "a CPU" if self._device == "cpu" else "a GPU and a CPU"
        free = {name: amount for name, amount in self._ray.available_resources().items() if name in ("CPU", "GPU")}
        warnings.warn(
            f"no worker has a place on the Ray cluster yet: each needs {wanted}, free are {free}", stacklevel=2
        )


def _knock(address: str) -> None:
    """Raise `OSError` soon if nobody listens at a host and port: Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=_LAST_WORDS).close()


def _short(death: Exception) -> str:
    """One line of Ray's page: the last, where a traceback ends."""
    lines = [line.strip() for line in str(death).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(death).__name__


class _Worker:
    """The actor: runs the work in a thread, and tells in turns what has happened there."""

    def __init__(self, work: Any, device: str, directory: str) -> None:
        import torch

        from pseudolabel.allocator import keep_freed_memory

        with contextlib.suppress(OSError):  # this node may not have it
            os.chdir(directory)
        keep_freed_memory()
        if device == "cpu":
            torch.set_num_threads(1)
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._given: SimpleQueue[Any] = SimpleQueue()
        threading.Thread(target=self._run, args=(work, device), daemon=True).start()

    def turn(self, given: list[Any], ends: int) -> list[Event]:
        """Take items, or the word that there are no more; tell what has happened, at least one event."""
        for item in given:
            self._given.put((item,))
        for _ in range(ends):
            self._given.put(None)
        events = [self._events.get()]
        while not self._events.empty():
            events.append(self._events.get())
        return events

    def _run(self, work: Any, device: str) -> None:
        try:
            for value in work(self._ask(), device):
                self._events.put(("result", value))
            self._events.put(("done", None))
        except BaseException as error:  # whatever ends the work is raised again at the driver
            if not isinstance(error, PseudolabelError):
                error = RuntimeError(f"in a worker:\n{traceback.format_exc()}")
            self._events.put(("error", error))

    def _ask(self) -> Iterator[Any]:
        while True:
            self._events.put(("asks", None))
            answer = self._given.get()
            if answer is None:
                return
            yield answer[0]
