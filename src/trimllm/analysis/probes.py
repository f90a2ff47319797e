"""Reading and setting what modules give at chosen positions of a batch, through hooks that leave nothing behind.

A position here is a flat index into (rows * length), as in `batches.Batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from trimllm.blocks import decoder, families


def like(output: Any, hidden: torch.Tensor) -> Any:
    """What a module returns, with another hidden state."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def at_places(tensor: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """(k, width) of (rows, length, width), or of (rows * length, width); dimensions before these stay."""
    flat = tensor.flatten(-3, -2) if tensor.dim() > 2 else tensor
    return flat.index_select(-2, where.to(tensor.device))


def states_at(stream: Mapping[float, torch.Tensor], where: torch.Tensor) -> dict[float, torch.Tensor]:
    """The residual stream of `activations.keeping_stream` at `where` only: (k, hidden) per key."""
    return {key: at_places(hidden, where) for key, hidden in stream.items()}


def agree(model: Any, a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same up to the rounding of the model's dtype."""
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    apart = (a.float() - b.to(a.device).float()).abs().max()
    return bool(apart <= tolerance * b.float().abs().max().clamp(min=1e-6))


def half_modules(model: Any, half: str, i: int) -> list[str]:
    """Names of the modules of block `i` by whose outputs the half adds to the residual stream.

    The first of a half is fed the stream (its norm, as a rule) and writes nothing to it.
    """
    names = decoder.half_names(model, half, decoder.blocks(model)[i])
    return names[1:] or names


def _residual(model: Any, name: str, args: tuple[Any, ...]) -> torch.Tensor | None:
    """What a submodule that adds the residual itself adds."""
    return args[1] if name in families.family(decoder.text_config(model)).adds_residual else None


@contextmanager
def reading(model: Any, modules: Iterable[tuple[int, str]], where: torch.Tensor) -> Iterator[dict[Any, torch.Tensor]]:
    """Within, a forward pass fills in what these modules (block, name) write: (k, width), the residual left out."""
    found: dict[tuple[int, str], torch.Tensor] = {}

    def keep(place: tuple[int, str]) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            written = at_places(decoder.hidden_of(output), where)  # a copy: some blocks add to this tensor in place
            residual = _residual(model, place[1], args)
            found[place] = written if residual is None else written - at_places(residual, where)

        return hook

    with ExitStack() as hooks:
        for i, name in modules:
            module = decoder.blocks(model)[i].get_submodule(name)
            hooks.callback(module.register_forward_hook(keep((i, name))).remove)
        yield found


@contextmanager
def writing(model: Any, values: Mapping[tuple[int, str], torch.Tensor], where: torch.Tensor) -> Iterator[None]:
    """Within, these modules (block, name; the empty name is the block itself) write (k, width) `values` at `where`.

    A submodule that adds the residual still adds the residual of the pass.
    """

    def put(name: str, value: torch.Tensor) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            hidden = decoder.hidden_of(output).clone(memory_format=torch.contiguous_format)
            flat = hidden.flatten(-3, -2) if hidden.dim() > 2 else hidden
            residual = _residual(model, name, args)
            whole = value if residual is None else value + at_places(residual, where)
            flat[..., where.to(hidden.device), :] = whole.to(hidden)
            return like(output, hidden)

        return hook

    with ExitStack() as hooks:
        for (i, name), value in values.items():
            module = decoder.blocks(model)[i].get_submodule(name)
            hooks.callback(module.register_forward_hook(put(name, value)).remove)
        yield


@torch.no_grad()
def tail_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (k, vocabulary) in float32 that the model's own tail reads from states (k, hidden).

    Rows of one token go through the model, and the states take the place of its last block's output: whatever comes
    after it (norms, projections, scales, soft caps) is computed as in any forward pass.
    """
    count = hidden.shape[-2]
    ids = torch.zeros((count, 1), dtype=torch.long, device=model.device)
    last = (decoder.depth(model) - 1, "")
    with writing(model, {last: hidden}, torch.arange(count)):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[:, 0].float()
