"""Distillation: a stage also learns what a larger model, here the fully fine-tuned one, would say at every position.

The loss of a target is (1 - share) * cross-entropy + share * KL(teacher || student) over the whole vocabulary: Hinton,
Vinyals, Dean 2015 (arXiv 1503.02531) at temperature 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from trimllm.training import losses
from trimllm.training.packing import Packed, target_logits


@dataclass(frozen=True)
class Teacher:
    """A frozen model, and the share of the loss that is about agreeing with it."""

    model: Any
    share: float

    def __post_init__(self) -> None:
        self.model.requires_grad_(False).eval()

    @torch.no_grad()
    def lesson(self, packed: Packed, places: int) -> losses.Loss:
        """The loss over `packed`, for `losses.backward` with the same `places`.

        The teacher's decoder has run when this returns, before anything of the student is in memory; logits are made
        as they are asked for, of no more positions at a time than the student's.
        """
        if len(packed.targets) <= places:
            everything = target_logits(self.model, packed)
            return lambda logits, targets, _begin: loss(logits, targets, everything, self.share)
        hidden, output = losses.decode(self.model, packed)

        def of_chunk(logits: torch.Tensor, targets: torch.Tensor, begin: int) -> torch.Tensor:
            with torch.no_grad():
                wanted = losses.logits_of(self.model, hidden[begin : begin + len(targets)], output)
            return loss(logits, targets, wanted, self.share)

        return of_chunk


def loss(logits: torch.Tensor, targets: torch.Tensor, teacher: torch.Tensor, share: float) -> torch.Tensor:
    """Summed over the k positions, in nats. `logits` of the student and `teacher`: (k, vocabulary); `targets`: (k,)."""
    student, wanted = logits.float().log_softmax(-1), teacher.float().log_softmax(-1)
    apart = torch.nn.functional.kl_div(student, wanted, reduction="sum", log_target=True)
    return (1 - share) * torch.nn.functional.nll_loss(student, targets, reduction="sum") + share * apart
