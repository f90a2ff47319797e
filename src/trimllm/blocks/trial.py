"""Take decoder blocks, or halves of them, out of a model on trial: within a context, without copying anything.

from trimllm.blocks.trial import trial
with trial(model, layout):
    logits = model(input_ids=tokens, use_cache=False).logits
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trimllm.blocks import families
from trimllm.blocks.changes import Changes
from trimllm.blocks.decoder import (
    blocks,
    container,
    depth,
    half_names,
    hidden_argument,
    hidden_of,
    plain_attributes,
    text_config,
    text_decoder,
)
from trimllm.blocks.layout import HALVES, Block, Layout, places
from trimllm.blocks.legality import check_layout
from trimllm.blocks.surgery import assemble, describe, install


class Injection(nn.Module):
    """Stands for the first blocks of a trial: ignores its input and returns `hidden`."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None
        """(batch, seq, hidden): the residual stream after the blocks that are not computed."""
        self._returns_tuple = returns_tuple

    def stand_for(self, block: nn.Module) -> None:
        """Take over the plain attributes that a model may read from its blocks."""
        self.__dict__.update({name: v for name, v in plain_attributes(block).items() if name != "hidden"})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.hidden is None:
            raise ValueError("set injection.hidden before the forward pass")
        return (self.hidden, None) if self._returns_tuple else self.hidden


_STRUCTURE: weakref.WeakKeyDictionary[nn.Module, tuple[int, int]] = weakref.WeakKeyDictionary()
"""What a module returns: the length of its tuple (0: a tensor) and the last dimension."""


class _Bypassed(nn.Module):
    """Stands for a submodule of a half that is bypassed: zeros in the structure the submodule returns.

    The structure is learnt from the first call, which does run the submodule. A submodule that adds the residual itself
    returns that residual.
    """

    def __init__(self, module: nn.Module, adds_residual: bool) -> None:
        super().__init__()
        self._original = (module,)  # in a tuple: not a submodule
        self._adds_residual = adds_residual

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self._original[0]
        if module not in _STRUCTURE:
            output = module(*args, **kwargs)
            length = len(output) if isinstance(output, tuple) else 0
            _STRUCTURE[module] = (length, hidden_of(output).shape[-1])
        length, width = _STRUCTURE[module]
        stream = hidden_argument(args, kwargs)
        zeros = args[1] if self._adds_residual else stream.new_zeros(*stream.shape[:-1], width)
        return (zeros, *[None] * (length - 1)) if length else zeros


@contextmanager
def trial(model: nn.Module, layout: Layout, resume_from: int = 0) -> Iterator[Injection]:
    """Within the context, `model(..., use_cache=False)` computes `layout`; on exit all is as it was, bit for bit.

    Nothing is copied: a trial costs its forward pass.

    Args:
        model: a causal language model of transformers.
        layout: in terms of the model's present blocks; halves may be None (bypassed).
        resume_from: do not compute this many leading blocks of `layout`: one module that returns `injection.hidden`
            stands for them.

    Yields:
        The injection. With `resume_from > 0` set its `.hidden` (batch, seq, hidden) before the forward pass.

    Raises:
        ValueError: if this family's forward pass cannot be resumed: use a plain trial.
        InputError: if the layout cannot be tried on this family.
    """
    check_layout(model, tuple(block for block in layout if block != (None, None)), bypass=True)
    row = families.family(text_config(model))
    injection = Injection(row.block_returns_tuple)
    if resume_from and not row.resumable:
        raise ValueError(f"the forward pass of model type {text_config(model).model_type!r} cannot be resumed")
    if not 0 <= resume_from <= len(layout):
        raise ValueError(f"resume_from is {resume_from}: the layout has {len(layout)} blocks")
    rest = tuple(block for block in layout[resume_from:] if block != (None, None))
    changes = Changes()
    try:
        owner, name = container(model)
        effective = rest
        computed = assemble(model, rest, changes)
        _bypass(model, rest, computed, changes)
        if resume_from:
            # The config describes every block by its index: the injected one passes as any block that is not in use.
            place = next(i for i in (*layout[resume_from - 1], 0) if i is not None)
            effective = (Block(place, place), *rest)
            injection.stand_for(blocks(model)[place])
            computed = [injection, *computed]
        _select_slices(model, effective, changes)
        install(owner, name, computed, changes)
        describe(model, owner, effective, changes)
        yield injection
    finally:
        changes.undo()


def _bypass(model: nn.Module, layout: Layout, shells: list[nn.Module], changes: Changes) -> None:
    """Put zeros in the place of the halves that the layout leaves out."""
    row = families.family(text_config(model))
    for block, shell in zip(layout, shells, strict=True):
        for half in HALVES:
            if getattr(block, half) is None:
                changes.snapshot(shell._modules)
                for name in half_names(model, half, shell):
                    shell._modules[name] = _Bypassed(shell.get_submodule(name), name in row.adds_residual)


def _select_slices(model: nn.Module, layout: Layout, changes: Changes) -> None:
    """On trial, keep the kept layers' slices of what per-layer weights give, instead of cutting the weights."""
    row = families.family(text_config(model))
    decoder = text_decoder(model)
    kept, count = places(layout, "attention"), depth(model)

    def select(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.unflatten(-1, (count, -1))[..., kept, :].flatten(-2)

    for name in row.per_layer_weights:
        if decoder._modules.get(name) is not None:
            changes.hook(decoder._modules[name].register_forward_hook(select))  # type: ignore[union-attr]
