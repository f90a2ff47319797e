"""Slow, obvious references: one continuation at a time, no padding, no shared prompt, log-softmax over all logits."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from trimllm.blocks import decoder, surgery
from trimllm.blocks.layout import Unit, remove, whole
from trimllm.evaluation.encoding import encode_pair
from trimllm.parallel import Share
from trimllm.tasks.items import Item


@torch.no_grad()
def token_logprobs(model: Any, prompt: Sequence[int], continuation: Sequence[int]) -> tuple[torch.Tensor, bool]:
    """Log-probability of each id of the continuation, and whether all are the most likely ones."""
    ids = torch.tensor([[*prompt, *continuation]])
    logprobs = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    before = range(len(prompt) - 1, ids.shape[1] - 1)
    picked = torch.stack([logprobs[place, token] for place, token in zip(before, continuation, strict=True)])
    greedy = all(int(logprobs[p].argmax()) == token for p, token in zip(before, continuation, strict=True))
    return picked, greedy


@torch.no_grad()
def logliks(model: Any, tokenizer: Any, items: Sequence[Item]) -> list[list[float]]:
    """Summed log-likelihood of every continuation of every item."""
    return [
        [
            float(token_logprobs(model, *encode_pair(tokenizer, item.prompt, text))[0].sum())
            for text in item.continuations
        ]
        for item in items
    ]


def correct(table: Sequence[Sequence[float]], items: Sequence[Item]) -> tuple[bool, ...]:
    """Per item, whether the right continuation has the highest log-likelihood."""
    return tuple(max(range(len(r)), key=lambda i: r[i]) == one.answer for r, one in zip(table, items, strict=True))


OUTPUTS = {"attention": ("self_attn.o_proj", "attn.c_proj"), "mlp": ("mlp.down_proj", "mlp.c_proj")}
"""The projections by which a half adds to the residual stream."""


@torch.no_grad()
def deleted(model: Any, unit: Unit) -> Any:
    """A copy of the model without the unit: whole blocks and pairs removed, a sub-layer's output projection zeroed."""
    twin = copy.deepcopy(model)
    if unit.kind in ("block", "pair"):
        return surgery.apply_layout(twin, remove(whole(decoder.depth(twin)), unit))
    modules = dict(decoder.blocks(twin)[unit.index].named_modules())
    (found,) = [modules[name] for name in OUTPUTS[unit.kind] if name in modules]
    for parameter in found.parameters():
        parameter.zero_()
    return twin


@torch.no_grad()
def stream(model: Any, ids: Sequence[int]) -> list[torch.Tensor]:
    """The residual stream (seq, hidden) before each block, and after the last."""
    seen: list[torch.Tensor] = []
    first = lambda output: output[0] if isinstance(output, tuple) else output  # noqa: E731
    with ExitStack() as hooks:
        for number, block in enumerate(decoder.blocks(model)):
            if number == 0:
                handle = block.register_forward_pre_hook(
                    lambda m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
                )
                hooks.callback(handle.remove)
            hooks.callback(block.register_forward_hook(lambda m, args, output: seen.append(first(output))).remove)
        model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    return [hidden[0] for hidden in seen]


def in_ranks(world: int, work: Callable[[Share], Any]) -> list[Any]:
    """What `work` returns in each of `world` processes, played by threads that exchange lists."""
    slots: list[list[Any]] = [[] for _ in range(world)]
    results: list[Any] = [None] * world
    barrier = threading.Barrier(world, timeout=30)

    class Joined(Share):
        def gather(self, mine: list[Any]) -> list[Any]:
            slots[self.rank] = mine
            barrier.wait()
            everything = [one for slot in slots for one in slot]
            barrier.wait()
            return everything

    def run(rank: int) -> None:
        try:
            results[rank] = work(Joined(rank, world))
        except BaseException as error:
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
