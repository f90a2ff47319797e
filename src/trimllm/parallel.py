"""How work is shared between the processes of one run: each does its part, everyone learns all of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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


ALONE = Share()
