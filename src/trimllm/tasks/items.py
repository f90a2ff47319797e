"""What every task comes down to: items with a prompt and continuations that a model scores, in disjoint splits."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["choice", "generation", "text"]


@dataclass(frozen=True)
class Item:
    """One question, document or dialogue as the model sees it.

    `continuations` are scored by log-likelihood after `prompt` and carry their own delimiter (usually a leading space).
    choice: one per choice. generation: the one target. text: `prompt` is empty, the one continuation is the document.
    """

    place: str
    """Where the row stands (`file.jsonl:17`): named in errors, and the identity of the item."""
    prompt: str
    continuations: tuple[str, ...]
    answer: int = 0
    """Index of the right continuation (0 for generation and text)."""
    lengths: tuple[int, ...] = ()
    """Characters of each choice without its delimiter, by which acc_norm divides."""
    references: tuple[str, ...] = ()
    """generation: every accepted answer (exact match, ROUGE-L); empty otherwise."""
    group: str | None = None
    """Items of one group never stand on two sides of a split (an entity, an article)."""

    @property
    def target(self) -> str:
        """What training teaches: the right continuation."""
        return self.continuations[self.answer]

    def right_only(self) -> Item:
        """The item without its wrong choices."""
        lengths = self.lengths[self.answer :][:1]
        return replace(self, continuations=(self.target,), answer=0, lengths=lengths)


@dataclass(frozen=True)
class TaskData:
    """A task, loaded and split. The splits are disjoint in items, groups and texts."""

    name: str
    kind: Kind
    metric: str
    """What is reported: `acc`, `acc_norm` (choice), `likelihood` (generation, text: 100 * exp(-loss), the geometric
    mean probability of a target token)."""
    train: tuple[Item, ...]
    calibration: tuple[Item, ...]
    """Held out of train; every decision (scan, accuracy floor) is taken on it."""
    test: tuple[Item, ...]
    """Reported, never used for a decision."""
    left_out: tuple[str, ...] = ()
    """Places of training rows dropped because their text also stands in the calibration or the reported set."""
    drawn: bool = False
    """Whether the reported rows were drawn, by the seed, from rows that were all in one split."""
    notes: tuple[str, ...] = ()
    """Lines the user should see (default calibration size and its resolution, where the test split came from ...)."""

    def digest(self) -> str:
        """SHA-256 of what is asked in which split and how it is judged, wherever the rows lie."""
        made = hashlib.sha256(f"{self.kind} {self.metric}".encode())
        for items in (self.train, self.calibration, self.test):
            made.update(f"{len(items)} items".encode())
            for item in items:
                asked = (item.prompt, item.continuations, item.answer, item.references)
                made.update(json.dumps(asked).encode())
        return made.hexdigest()
