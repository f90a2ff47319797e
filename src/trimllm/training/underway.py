"""A stage that is under way, on disk from time to time, so that a run that ends within it does not train it anew.

    underway = Underway(run / "stage.pt", minutes=15, number=3, remedies={"lr": 2e-5})
    train_stage(..., underway=underway)
    underway.delete()

The file holds the weights that train, what AdamW knows of them, and how far the stage is. The rest of the model is what
the stage begins with, and the order of rows comes from its seed: a stage that goes on ends with the weights that it
would have had.
"""

from __future__ import annotations

import glob
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from trimllm import files
from trimllm.config.shared import option
from trimllm.errors import TrimError, one_line
from trimllm.training import optimizer_state

SHARE = 0.05
"""Largest share of a stage's time that saving takes: where it takes long, it is done more seldom than asked for."""

UNREADABLE = (
    *(OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError),
    *(pickle.PickleError, zipfile.BadZipFile),
)
"""What `torch.load` raises for damaged files, and what it then means to take them for what they were."""

SAVED_AS_THEY_ARE = ("cpu", "cuda", "xpu", "mps")
"""Kinds of devices whose tensors `torch.save` copies one by one; others need not know how."""


@dataclass
class Progress:
    """How far a stage is."""

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    """Of every step."""
    tokens: int = 0
    """Ids of the rows, over all processes."""
    computed: int = 0
    """Tokens that this process has computed, without padding."""
    cells: int = 0
    """The same with padding."""
    seconds: float = 0.0
    """Of training, until the process that trains now went on with it."""
    watched: list[float] = field(default_factory=list)
    """What the stage's watch has seen (see `recovery.Recovery`)."""


@dataclass(frozen=True)
class Training:
    """A stage that trains."""

    model: Any
    parameters: Sequence[torch.nn.Parameter]
    """Those that train."""
    optimizer: torch.optim.Optimizer
    steps: int
    """Of the whole stage."""

    def named(self) -> dict[str, torch.nn.Parameter]:
        """The parameters by their names in the model."""
        wanted = set(self.parameters)
        return {name: one for name, one in self.model.named_parameters() if one in wanted}


@dataclass(frozen=True)
class Saved:
    """A stage as the file holds it. Tensors stay on the disk until they are asked for."""

    progress: Progress
    weights: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]

    def restore(self, training: Training) -> None:
        """Take up the weights, and what the optimizer knew of them."""
        known = optimizer_state.Moments()
        with torch.no_grad():
            for name, parameter in training.named().items():
                parameter.copy_(self.weights[name])
                if name in self.moments:
                    state = self.moments[name].items()
                    known[parameter] = {key: _apart(key, value, parameter.device) for key, value in state}
        optimizer_state.restore(training.optimizer, known)


class Underway:
    """The file of one stage.

    Args:
        path: of the file.
        minutes: how often it is written; 0: never.
        number: of the stage, which one that goes on must have in common with the one that was saved.
        remedies: settings by name that it must have in common, too; a run may go on with others.
        reserve: bytes that are to stay free on the disk for what is saved at the end.
        say: called with a line that the user should see.
        writes: false in processes other than the first.
    """

    def __init__(
        self,
        path: Path,
        minutes: float,
        *,
        number: int = 0,
        remedies: dict[str, float] | None = None,
        reserve: int = 0,
        say: Callable[[str], None] = lambda line: None,
        writes: bool = True,
    ) -> None:
        self.path, self.minutes, self.reserve = path, minutes, reserve
        self.number, self.remedies = number, remedies or {}
        self.say, self.writes = say, writes
        self.saved, self.took = time.monotonic(), 0.0
        self.step = 0
        """Where the stage would go on."""
        self.warned = self.told = False

    def find(self, training: Training, accelerator: Any) -> Saved | None:
        """What is saved of this stage, if all processes see the same; every one must call it."""
        found = self._read(training)
        here = 0 if found is None else found.progress.steps
        seen = accelerator.gather(torch.tensor([here], device=accelerator.device)).tolist()
        if found is None or min(seen) != max(seen):
            return None
        self.step = here
        self.say(f"  going on after step {here} of {training.steps}")
        return found

    def _read(self, training: Training) -> Saved | None:
        if not self.path.exists():
            return None
        try:
            if self.writes:  # one process reads all of it
                _check(self.path)
            found = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
            number, remedies, of = found["number"], dict(found["remedies"]), found["of"]
            saved = Saved(Progress(**found["progress"]), found["weights"], found["moments"])
            shapes = {name: (value.shape, value.dtype) for name, value in saved.weights.items()}
        except UNREADABLE as error:
            why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else "it is damaged"
            self.say(f"  {self.path} cannot be read ({why}): the stage begins anew")
            return None
        now = {name: (one.shape, one.dtype) for name, one in training.named().items()}
        if (number, remedies, of, shapes) == (self.number, self.remedies, training.steps, now):
            return saved
        others = [name for name, value in remedies.items() if value != self.remedies.get(name)]
        if others and number == self.number:
            options = ", ".join(map(option, others))
            self.say(f"  with another {options} the stage begins anew ({saved.progress.steps} of {of} steps were done)")
        return None

    def due(self) -> bool:
        """Whether it is time to write it."""
        pause = max(60 * self.minutes, self.took / SHARE)
        return self.writes and self.minutes > 0 and time.monotonic() - self.saved >= pause

    def write(self, training: Training, progress: Progress) -> None:
        """Write it. Where the disk has no room, a line says so once, and what was saved before stays."""
        begun = self.saved = time.monotonic()  # where it fails, it is tried again after as long
        named, known = training.named(), training.optimizer.state
        moments = {name: known[one] for name, one in named.items() if one in known}
        tensors = [*named.values(), *(value for state in moments.values() for value in state.values())]
        needed, free = sum(one.nbytes for one in tensors), shutil.disk_usage(self.path.parent).free
        if free < needed + self.reserve:
            self._warn(f"{files.size(needed + self.reserve)} needed, {files.size(free)} free")
            return
        record = {
            "number": self.number,
            "remedies": self.remedies,
            "of": training.steps,
            "progress": asdict(progress),
            "weights": {name: _alone(one.detach()) for name, one in named.items()},
            "moments": {name: {key: _alone(value) for key, value in state.items()} for name, state in moments.items()},
        }
        try:
            with files.atomic(self.path) as file:
                torch.save(record, file)
        except TrimError as error:
            self._warn(one_line(error))
        else:
            self.saved = time.monotonic()
            self.took, self.step = self.saved - begun, progress.steps
            if not self.told:
                self.say(f"  saved within the stage, after step {self.step} of {training.steps} ({files.size(needed)})")
            self.told = True

    def end(self, training: Training, progress: Progress) -> None:
        """Write it once more, since the process is to end."""
        if self.writes and self.minutes > 0 and progress.steps > self.step:
            self.told = False
            self.write(training, progress)

    def _warn(self, why: str) -> None:
        if not self.warned:
            begin = f"goes on after step {self.step}" if self.step else "begins anew"
            self.say(f"  how far the stage is cannot be saved ({why}): if it is cut, it {begin}")
        self.warned = True

    def delete(self) -> None:
        """The stage is over, and saved."""
        if self.writes:
            self.path.unlink(missing_ok=True)


def partial(path: Path) -> list[Path]:
    """What kills left of writing the file."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))


def remove_partial(path: Path) -> None:
    """Remove what kills left of writing the file."""
    for each in partial(path):
        each.unlink(missing_ok=True)


def _check(path: Path) -> None:
    """Raises zipfile.BadZipFile if what the file holds is not what was written."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(damaged)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor without the rest of a larger storage that it lies in: storages are saved whole."""
    if tensor.device.type not in SAVED_AS_THEY_ARE:
        return tensor.cpu()
    return tensor if tensor.untyped_storage().nbytes() <= tensor.nbytes else tensor.clone()


def _apart(key: str, value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a moment on the device of its parameter; of the count of steps where it was, as AdamW wants it."""
    return value.clone() if key == "step" else value.to(device, copy=True)
