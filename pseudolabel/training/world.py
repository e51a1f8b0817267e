"""Which of how many processes this is, where a launcher such as `torchrun` started several for one training, and which
rows of a batch are its own. Needs no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from pseudolabel.errors import LaunchError

_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`, of which `local_size` run on this machine; one alone if nothing is said."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether it is this process that writes, and shows what goes on."""
        return self.rank == 0

    def share(self, count: int, before: int = 0) -> range:
        """Which of `count` rows are this process's, where `before` rows of the same batch come before them.

        Dealt like cards, over the whole batch: no two processes differ by more than a row, and each gets its part of
        the labeled rows, which come first, and of the others.
        """
        return range((self.rank - before) % self.size, count, self.size)


ALONE = World()


def started_together() -> bool:
    """Whether `torchrun`, or what sets the same variables, started this process as one of several."""
    return "LOCAL_RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def starts_again() -> bool:
    """Whether `torchrun` has restarts left, should this process fail: its end is then not the command's."""
    used, most = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return started_together() and used.isdecimal() and most.isdecimal() and int(used) < int(most)


def world_from_environment() -> World:
    """What the launcher says. Raises `LaunchError` if it says half of it."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return World()
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise LaunchError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {' and '.join(missing)} not set: start several processes "
            "with torchrun, or unset WORLD_SIZE to train in this one"
        )
    try:
        size, rank, local_rank = (int(os.environ[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except ValueError as error:
        raise LaunchError(f"the launcher's variables are not whole numbers: {error}; start with torchrun") from error
    if not (0 <= rank < size and local_rank >= 0 and local_size >= 1):
        raise LaunchError(f"the launcher says rank {rank} of {size}; start with torchrun")
    return World(rank, size, local_rank, local_size)
