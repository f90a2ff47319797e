"""How work is shared between the processes of one run: each does its part, everyone learns all of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from trimllm.errors import TrimError

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """This process's part: number `rank` of `world`."""

    rank: int = 0
    world: int = 1

    def gather(self, mine: list[Any]) -> list[Any]:
        """The lists of all processes, one after the other; every process must call it."""
        if self.world == 1:
            return mine
        from accelerate.utils import gather_object

        return gather_object(mine)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, known to all; every process must call it.

        A TrimError of the first process is raised in all of them. Any other exception is raised in the first process
        alone, and the others wait until the launcher ends them.
        """
        if self.world == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        box: list[Any] = [None]
        if self.first:
            try:
                box = [make()]
            except TrimError as error:
                box = [error]
        broadcast_object_list(box)
        if isinstance(box[0], TrimError):
            raise box[0]
        return box[0]


ALONE = Share()


def is_first() -> bool:
    """Whether this is the process that prints; known before any process group is."""
    return int(os.environ.get("RANK", "0")) == 0


def processes() -> int:
    """How many processes torchrun or accelerate has started for this command."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def first_to_fail() -> bool:
    """Whether this process is the one that reports an error: the first of all that asks.

    An error may strike every process, or one while the others wait for it; the launcher then ends them.
    """
    failures = _failures(1)
    return is_first() if failures is None else failures == 1


def another_failed() -> bool:
    """Whether another process has reported an error, so that what went wrong here (a lost connection) is its echo."""
    return bool(_failures(0))


def _failures(more: int) -> int | None:
    """How many processes have failed, counting `more`; None while there is no process group."""
    if "torch" not in sys.modules:
        return None
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    try:
        return distributed.distributed_c10d._get_default_store().add("trimllm/failed", more)
    except RuntimeError:  # the store went with the process that held it
        return 2
