"""What a model answers when it writes freely: greedy decoding of many prompts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from trimllm import memory
from trimllm.blocks import decoder, families
from trimllm.checkpoints.loading import plain_generation
from trimllm.errors import InputError, TrimError
from trimllm.evaluation import encoding
from trimllm.evaluation.forward import evaluating
from trimllm.tasks.items import Item

ROWS = 16
"""Rows of a batch, unless a budget of tokens says how many."""


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    max_new_tokens: int = 128,
    max_length: int | None = None,
    token_budget: int | None = None,
) -> list[str]:
    """Greedy continuations of the items' prompts, decoded, cut at EOS; prompts are cut from the left to fit the
    context, or `max_length` if that is less. Of the model's generation config only what ends a text counts
    (see `ends_of`).

    `token_budget` is of a batch, answers and padding included (default: 16 rows, whatever their length). Where memory
    ends, batches become smaller.

    Raises:
        InputError: if `max_new_tokens` leave no room for a prompt.
        TrimError: if not even one row fits into memory.
    """
    space = _space(model, max_new_tokens, max_length)
    prompts = [encoding.cut(tokenizer, ids, space) for ids in _prompts(tokenizer, items)]
    encoding.check_vocabulary(tokenizer, prompts, encoding.vocabulary(model))
    pad = encoding.pad_id(tokenizer, model, tokenizer.eos_token_id or 0)  # also what stands after an answer's end
    ends = ends_of(model, tokenizer) or None
    greedy = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=pad)
    waiting = sorted(range(len(items)), key=lambda i: -len(prompts[i]))
    answers, most = [""] * len(items), len(items) if token_budget else ROWS
    padded = families.family(decoder.text_config(model)).left_padding
    with evaluating(model), plain_generation(model):
        while waiting:
            longest = len(prompts[waiting[0]]) + max_new_tokens
            rows = min(most, max(1, token_budget // longest)) if token_budget else most
            group = [i for i in waiting[:rows] if padded or len(prompts[i]) == len(prompts[waiting[0]])]
            found = memory.attempt(partial(_rows, model, [prompts[i] for i in group], greedy))
            if found is None:
                if len(group) == 1:
                    raise TrimError(
                        f"out of memory: one row of {longest} tokens does not fit the device: cut rows with "
                        "--max-length, or use a device with more memory"
                    )
                most = len(group) // 2
                continue
            for i, row in zip(group, found, strict=True):
                answers[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
            waiting = waiting[len(group) :]
    return answers


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a text: those of the model's generation settings, and the tokenizer's EOS, with which training
    closes an answer."""
    own = getattr(model, "generation_config", None)
    named = getattr(own, "eos_token_id", None)
    found = (*(named if isinstance(named, list | tuple) else [named]), tokenizer.eos_token_id)
    return list(dict.fromkeys(one for one in found if one is not None))


def name_ends(model: Any, tokenizer: Any) -> None:
    """Add the tokenizer's EOS to what the model's generation settings stop at, since it learns to write that."""
    own, learnt = getattr(model, "generation_config", None), tokenizer.eos_token_id
    if own is None or learnt is None:
        return
    if own.eos_token_id is None:
        own.eos_token_id = learnt
    elif learnt not in (own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]):
        own.eos_token_id = ends_of(model, tokenizer)


def cut_note(
    model: Any, tokenizer: Any, items: Sequence[Item], max_new_tokens: int, max_length: int | None, *, truncate: bool
) -> str | None:
    """A line on the prompts that `generate` cuts, if it cuts any.

    Raises:
        InputError: if it does, and `truncate` is not asked for; see also `generate`.
    """
    space = _space(model, max_new_tokens, max_length)
    places = [item.place for item, ids in zip(items, _prompts(tokenizer, items), strict=True) if len(ids) > space]
    if not places:
        return None
    room = f"--max-new-tokens {max_new_tokens}"
    if not truncate:
        raise InputError(
            f"{len(places):,} of {len(items):,} prompts leave no room for {room} (first: {places[0]}): pass --truncate "
            "to cut them from the left, or ask for fewer"
        )
    return f"--truncate, {len(items):,} prompts: cut from the left, to leave room for {room}: {len(places):,}"


def _space(model: Any, max_new_tokens: int, max_length: int | None) -> int:
    """Tokens that a prompt may have."""
    context = encoding.context_length(model.config, max_length)
    if context <= max_new_tokens:
        raise InputError(f"--max-new-tokens {max_new_tokens} fill the {context} tokens of a row: ask for fewer")
    return context - max_new_tokens


def _prompts(tokenizer: Any, items: Sequence[Item]) -> list[list[int]]:
    return [encoding.encode_pair(tokenizer, item.prompt, " x")[0] for item in items]


def _rows(model: Any, prompts: Sequence[Sequence[int]], greedy: GenerationConfig) -> torch.Tensor:
    """What follows each prompt: ids (rows, at most the new tokens)."""
    length = max(map(len, prompts))
    ids = torch.tensor([[greedy.pad_token_id] * (length - len(one)) + [*one] for one in prompts])
    mask = torch.tensor([[0] * (length - len(one)) + [1] * len(one) for one in prompts])
    made: torch.Tensor = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=greedy
    )
    return made[:, length:]
