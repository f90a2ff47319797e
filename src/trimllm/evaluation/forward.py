"""One forward pass: log-probabilities of target tokens, which alone are computed at the head."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trimllm.errors import TrimError
from trimllm.evaluation.batches import Batch

LOGITS = 2**22
"""Logits of a chunk, where not all are held at once: 16 MiB in float32."""
LEAST_PLACES = 256
"""Positions of a chunk, however large the vocabulary: fewer would read the head's weights too often."""

UNFIT = (TrimError, LookupError, TypeError, ValueError, RuntimeError)
"""What a forward pass raises in a model that cannot take a short cut that is tried on it."""


def chunk(vocabulary: int) -> int:
    """Positions of which a chunk holds the logits."""
    return max(LEAST_PLACES, LOGITS // vocabulary)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Within, the model is in evaluation mode; afterwards in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def head_only_at(model: Any, where: torch.Tensor) -> Iterator[list[bool]]:
    """Within, the output head sees only hidden states at the flat positions `where`: logits are (1, k, vocabulary)."""
    used: list[bool] = []

    def select(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        used.append(True)
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1]).index_select(0, where).unsqueeze(0), *args[1:])

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(select) if head is not None else None
    try:
        yield used
    finally:
        if handle is not None:
            handle.remove()


def target_logprobs(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability (k,) of every target token of the batch in float32, and whether it is the most likely one (k,).

    Gradients flow unless the caller turns them off.
    """
    with head_only_at(model, batch.where) as used:
        logits = model(**batch.inputs, use_cache=False).logits
    logits = logits.flatten(0, 1)
    if not used:
        logits = logits.index_select(0, batch.where)
    found = list[torch.Tensor]()
    places = chunk(logits.shape[-1])  # what is computed from logits takes as much memory again, or twice that
    for some, targets in zip(logits.split(places), batch.targets.split(places), strict=True):
        exact = some.float()
        found.append(exact.gather(1, targets[:, None])[:, 0] - exact.logsumexp(1))
    return torch.cat(found), logits.argmax(1) == batch.targets


class NotFiniteError(TrimError):
    """A model gives log-probabilities that are no numbers."""


Pieces = dict[tuple[int, int], tuple[float, int, bool]]
"""(item, choice) -> summed log-likelihood, tokens, greedy: the outcome of one batch."""


@torch.no_grad()
def batch_pieces(model: Any, batch: Batch) -> Pieces:
    """Scores of one batch. The model's device decides where it is computed.

    Raises:
        NotFiniteError: if the model gives a log-probability that is not a number.
    """
    logprobs, greedy = target_logprobs(model, batch)
    count = len(batch.owners)
    logprobs, greedy, segment = logprobs.cpu(), greedy.cpu(), batch.segment.cpu()  # not every device adds in float64
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, segment, logprobs.double())
    misses = torch.zeros(count, dtype=torch.long).index_add_(0, segment, (~greedy).long())
    lengths = torch.bincount(segment, minlength=count)
    if len(bad := (~torch.isfinite(total)).nonzero()):
        raise NotFiniteError(
            f"the model's log-likelihoods are not finite numbers, for {len(bad)} of {count} continuations in a batch "
            f"(the first: item {batch.owners[int(bad[0])][0] + 1} of its set): try --dtype float32; if that does not "
            "help, the weights are damaged, or were trained at far too high an --lr"
        )
    columns = zip(total.tolist(), lengths.tolist(), (misses == 0).tolist(), strict=True)
    return dict(zip(batch.owners, columns, strict=True))


def add_up(pieces: Iterable[Pieces]) -> Pieces:
    """Outcomes of batches as if they had been one: windows of the same document are added up."""
    total: Pieces = {}
    for outcome in pieces:
        for owner, (loglik, tokens, greedy) in outcome.items():
            before = total.get(owner, (0.0, 0, True))
            total[owner] = (before[0] + loglik, before[1] + tokens, before[2] and greedy)
    return total
