"""Several processes that train one student, started by `torchrun`: how they join, and what they tell each other.

Each takes its rows of every batch, computes its part of the loss, and the gradients are added up: after a step all
hold the same weights. Process 0 alone reads and writes the run directory. Gradients go over NCCL between GPUs, all
else over gloo: JSON and raw tensors, nothing pickled.

Gradients are added in one piece and not by torch's DistributedDataParallel: it lays out its buckets anew after its
first step, so that among three processes or more a run that was gone on with would add in another order, and end with
other last bits, than one that was not disturbed; and it takes the mean of processes whose shares may be uneven. What is
lost is that communication overlaps with the backward pass, which is little for small models.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from pseudolabel.errors import LaunchError, WorkerDied
from pseudolabel.processes import end_with_launcher
from pseudolabel.training.world import ALONE, World

_TIMEOUT = timedelta(minutes=30)  # for one answer of the others; the longest wait is for the slowest to check its input
_JOIN_SECONDS = 600.0
_STORE_TIMEOUT = timedelta(seconds=5)
_PREFIX = "pseudolabel"
_start = ""  # names this start of all processes, once they have joined
State = tuple[dict[str, Any], dict[str, dict[str, Tensor]]]


@dataclass(frozen=True)
class Team:
    """The processes that train together, seen from one of them. All call the same methods in the same order; alone,
    none of them does anything. Each raises `WorkerDied` if another process is lost.
    """

    world: World = ALONE

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """What fails in the body because another process is gone, is a `WorkerDied`."""
        try:
            yield
        except RuntimeError as error:
            if self.world.size == 1 or not _lost(error):
                raise
            raise WorkerDied(
                f"another of the {self.world.size} processes that train together ended (killed, out of memory, its "
                "machine lost?)\nrun the same command again: it goes on from the last checkpoint; torchrun "
                "--max-restarts N does so by itself"
            ) from error

    def from_first(self, value: Any) -> Any:
        """A JSON value of process 0, whatever the others give."""
        if self.world.size == 1:
            return value
        data = json.dumps(value).encode() if self.world.first else b""
        with self.watching():
            size = torch.tensor([len(data)])
            dist.broadcast(size, 0)
            content = torch.frombuffer(bytearray(data or int(size)), dtype=torch.uint8)
            dist.broadcast(content, 0)
        return json.loads(content.numpy().tobytes())

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raises `LaunchError` where `facts`, JSON values, are not those of process 0."""
        first = self.from_first(dict(facts))
        different = sorted(name for name, value in json.loads(json.dumps(dict(facts))).items() if first[name] != value)
        if different:
            raise LaunchError(
                f"process {self.world.rank} has other {' and '.join(different)} than process 0\ngive all the same "
                "command and the same files"
            )

    def sums(self, *numbers: int) -> tuple[int, ...]:
        """The sums of all processes' numbers."""
        if self.world.size == 1:
            return numbers
        with self.watching():
            total = torch.tensor(numbers)
            dist.all_reduce(total)
        return tuple(total.tolist())

    def sum(self, part: Tensor) -> list[float]:
        """The sums of all processes' numbers (N,)."""
        if self.world.size == 1:
            return [float(value) for value in part]
        with self.watching():
            total = part.detach().double().cpu()
            dist.all_reduce(total)
        return [float(value) for value in total]

    def sum_gradients(self, body: nn.Module) -> None:
        """Add up the processes' gradients of all parameters; where a process has none, it counts as zero."""
        if self.world.size == 1:
            return
        parameters = [parameter for parameter in body.parameters() if parameter.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        with self.watching():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
        pieces = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, pieces, strict=True):
            gradient.copy_(piece.view(gradient.shape))

    def take_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of process 0."""
        if self.world.size == 1:
            return
        with torch.no_grad(), self.watching():
            for tensor in tensors:
                content = tensor.detach().contiguous()
                dist.broadcast(content, 0)
                tensor.copy_(content)

    def state_from_first(self, state: State | None) -> State | None:
        """The training state that process 0 has read, if it has: facts, and groups of named tensors on the CPU."""
        if self.world.size == 1:
            return state
        facts, groups = state if state is not None else (None, {})
        listed = [
            [group, name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            for group, named in groups.items()
            for name, tensor in named.items()
        ]
        facts, names, listed = self.from_first([facts, list(groups), listed])
        if facts is None:
            return None
        found: dict[str, dict[str, Tensor]] = {group: {} for group in names}
        for group, name, kind, shape in listed:
            tensor = groups[group][name] if self.world.first else torch.empty(shape, dtype=getattr(torch, kind))
            found[group][name] = tensor.contiguous()
            if tensor.numel():
                with self.watching():
                    dist.broadcast(found[group][name].reshape(-1).view(torch.uint8), 0)
        return facts, found

    def with_shared_norms(self, body: nn.Module, device: torch.device) -> nn.Module:
        """On GPUs batch norms see the whole batch; torch has no such layer for CPUs, where each sees its share."""
        if self.world.size == 1 or device.type != "cuda":
            return body
        shared: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(body)  # type: ignore[no-untyped-call]
        return shared


@contextlib.contextmanager
def joined(world: World, device: torch.device) -> Iterator[Team]:
    """Join the other processes; at the end all leave together. From here on this process ends with its launcher.

    After an exception nothing is torn down, for that may wait for those that are gone: the process should end.

    Raises:
        LaunchError: the others can't be reached, or train on another kind of device.
        WorkerDied: another one is lost.
    """
    team = Team(world)
    if world.size == 1:
        yield team
        return
    global _start
    end_with_launcher()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        store, _, _ = next(rendezvous("env://", timeout=_TIMEOUT))
        _start = _meet(store, world)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "cpu:gloo",
            store=dist.PrefixStore(f"{_PREFIX}/{_start}", store),  # type: ignore[attr-defined]
            timeout=_TIMEOUT,
            rank=world.rank,
            world_size=world.size,
        )
    except (RuntimeError, ValueError, TimeoutError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LaunchError(
            f"process {world.rank} of {world.size} can't join the others at {where}: {why}\nstart with torchrun; on "
            "several machines, see that they reach each other (GLOO_SOCKET_IFNAME names the network to use)"
        ) from error
    team.check_same({"kind of device": device.type})
    yield team
    team.sums(0)  # nobody leaves before all are done
    dist.destroy_process_group()


def _meet(store: Any, world: World) -> str:
    """Wait for all processes, and agree on a name for this start of them.

    `torchrun` keeps one store over restarts, counts them on each machine for itself, and leaves in it where the
    processes of the last start could be reached, which the next would try (pytorch/pytorch#135712). So each process
    asks under a name that was never used, and only a process 0 that lives can answer.
    """
    mine, until = uuid.uuid4().hex, time.monotonic() + _JOIN_SECONDS

    def there(key: str) -> bool:
        if time.monotonic() > until:
            raise TimeoutError(f"not all have come within {_JOIN_SECONDS / 60:.0f} minutes")
        return bool(store.check([f"{_PREFIX}/{key}"]))

    def read(key: str) -> str:
        return str(store.get(f"{_PREFIX}/{key}").decode())

    if not world.first:
        store.set(f"{_PREFIX}/asking/{world.rank}", mine)
        while not there(f"answer/{mine}"):
            time.sleep(0.02)
        start = read(f"answer/{mine}")
        store.set(f"{_PREFIX}/{start}/came/{world.rank}", "")
        return start
    missing = list(range(1, world.size))
    while missing:
        for rank in missing:
            if there(f"asking/{rank}"):
                store.set(f"{_PREFIX}/answer/{read(f'asking/{rank}')}", mine)
        time.sleep(0.02)
        missing = [rank for rank in missing if not there(f"{mine}/came/{rank}")]
    return mine


def first_to_fail() -> bool:
    """Whether no other of the processes that were started together has asked this before: one tells why they all end.

    Asks the store that `torchrun` keeps, which no process takes with it. Without an answer each tells for itself.
    """
    start = _start or f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=_STORE_TIMEOUT,
            wait_for_workers=False,
        )
        return int(store.add(f"{_PREFIX}/{start}/failed", 1)) == 1
    except (RuntimeError, KeyError, ValueError):
        return True


def _lost(error: RuntimeError) -> bool:
    """Whether an error is of the network between processes: gloo's has no class of its own."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error) or "Connection closed by peer" in str(error)
