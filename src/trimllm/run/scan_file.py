"""The file of a decision that is under way: what a kill leaves of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from trimllm import files
from trimllm.importance.deletion import Part
from trimllm.importance.joint import Joint
from trimllm.parallel import Share


class ScanFile:
    """Batches that are scanned and sets of units that were tried, one JSON line each, and how long they took.

    What was measured in another precision (`mixed` or not) is not taken up again: a run may go on on another device.
    """

    def __init__(self, path: Path, share: Share, *, mixed: bool) -> None:
        self.path, self.share, self.mixed = path, share, mixed
        every: list[dict[str, Any]] = share.from_first(lambda: files.read_lines(path))
        self._found = [record for record in every if record["mixed"] == mixed]
        self._spent = sum(record.get("seconds", 0.0) for record in every)
        self._last = time.perf_counter()

    @property
    def seconds(self) -> float:
        """How long the decision has taken, with what earlier processes, which were interrupted, spent on it."""
        return self._spent + time.perf_counter() - self._last

    def batches(self, metric: str) -> dict[int, Part]:
        """Finished batches of a scan by this metric, by number."""
        return {one["batch"]: Part.load(one) for one in self._found if "batch" in one and one["metric"] == metric}

    def keep_batch(self, number: int, part: Part, metric: str) -> None:
        self._keep({"batch": number, "metric": metric, **part.dump()})

    def sets(self) -> list[Joint]:
        """Sets that were tried."""
        return [Joint.load(one["joint"]) for one in self._found if "joint" in one]

    def keep_set(self, found: Joint) -> None:
        self._keep({"joint": found.record()})

    def _keep(self, record: dict[str, Any]) -> None:
        now = time.perf_counter()
        took, self._last = now - self._last, now
        self._spent += took
        if self.share.first:
            files.append_line(self.path, {"mixed": self.mixed, **record, "seconds": took})
