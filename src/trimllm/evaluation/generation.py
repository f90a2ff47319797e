"""What a model answers when it writes freely: greedy decoding of many prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from trimllm.errors import InputError
from trimllm.evaluation import encoding
from trimllm.evaluation.evaluate import evaluating
from trimllm.tasks.items import Item


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    max_new_tokens: int = 128,
    max_length: int | None = None,
    batch_size: int = 16,
) -> list[str]:
    """Greedy continuations of the items' prompts, decoded, cut at EOS; prompts are cut from the left to fit the
    context, or `max_length` if that is less.

    Raises:
        InputError: if `max_new_tokens` leave no room for a prompt.
    """
    context = encoding.context_length(model.config, max_length)
    space = context - max_new_tokens
    if space < 1:
        raise InputError(f"--max-new-tokens {max_new_tokens} fill the {context} tokens of a row: ask for fewer")
    prompts = [encoding.encode_pair(tokenizer, item.prompt, " x")[0][-space:] for item in items]
    order = sorted(range(len(items)), key=lambda i: len(prompts[i]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    answers = [""] * len(items)
    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id
    greedy = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=pad)
    with evaluating(model):
        for begin in range(0, len(order), batch_size):
            group = order[begin : begin + batch_size]
            length = max(len(prompts[i]) for i in group)
            ids = torch.tensor([[pad] * (length - len(prompts[i])) + prompts[i] for i in group])
            mask = torch.tensor([[0] * (length - len(prompts[i])) + [1] * len(prompts[i]) for i in group])
            out = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=greedy
            )
            for row, i in zip(out[:, length:], group, strict=True):
                answers[i] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return answers
