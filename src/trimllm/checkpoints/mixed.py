"""Forward passes in mixed precision: matrices are multiplied in bfloat16, by weights and with sums in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

Autocast = Callable[[], AbstractContextManager[None]]
"""Makes what a forward pass runs within."""


def training(accelerator: Any) -> Autocast | None:
    """Of the accelerator's mixed precision, None where it has none. Copies of weights last as long as a forward pass,
    and those that its backward pass needs until then."""
    return None if accelerator.mixed_precision == "no" else accelerator.autocast


def measuring(accelerator: Any) -> Autocast | None:
    """The same for passes without a backward pass: a copy of a weight goes when its product is there."""
    if accelerator.mixed_precision == "no":
        return None
    from accelerate.utils import AutocastKwargs

    return partial(accelerator.autocast, autocast_handler=AutocastKwargs(enabled=True, cache_enabled=False))


@contextmanager
def casting(model: Any, autocast: Autocast | None) -> Iterator[None]:
    """Within, forward passes of the model, and the backward passes that follow them, compute in mixed precision; what
    is made of their outputs does not."""
    if autocast is None:
        yield
        return
    plain, before = model.forward, vars(model).get("forward")

    def forward(*arguments: Any, **named: Any) -> Any:
        with autocast():
            return plain(*arguments, **named)

    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before
