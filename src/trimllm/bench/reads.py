"""What one decode step reads from memory: weights and cache, in bytes, watched operator by operator.

Decoding at a small batch is bound by these reads, so their ratio is the speed-up that a cut can give at best. Nothing
here knows a family or a quantizer: whatever an operator reads that was there before the step is counted once, by the
bytes of its storage. Of an embedding table that is the rows looked up (all of it where the head is tied to it), of a
mixture the experts chosen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from trimllm.bench import timing


@dataclass(frozen=True)
class Footprint:
    """Bytes that one decode step reads at a given position."""

    weights: int
    """read from parameters and buffers, for the whole batch"""
    cache_read: int
    """read from the cache, for the whole batch"""
    cache: int | None
    """size of the cache at this position, per sequence; None: the model keeps it in its modules, among the weights"""
    growth: int | None
    """what this token added to it, per sequence (0 where all layers look through a full window or keep a state)"""


@torch.inference_mode()
def footprint(model: Any, *, batch: int, sequence: int, cache: Any = None) -> Footprint:
    """Watch the decode step that makes the row `sequence` tokens long, with the cache that the model makes itself.

    cache: of the tokens before, if they were read already.
    """
    ids = timing.random_ids(model, batch, sequence)
    name = timing.cache_argument(model)
    if cache is None:
        cache = model(input_ids=ids[:, :-1], use_cache=True, **timing.last_logits(model)).get(name)
    before = cache_bytes(cache)
    held = {tensor.untyped_storage().data_ptr() for tensor in cache_tensors(cache)}
    token = ids[:, -1:].clone()
    watch = _Watch([token])
    with watch:
        cache = model(input_ids=token, use_cache=True, **({} if cache is None else {name: cache})).get(name)
    after = cache_bytes(cache)
    reads = watch.bytes_by_storage()
    return Footprint(
        weights=sum(size for storage, size in reads.items() if storage not in held),
        cache_read=sum(size for storage, size in reads.items() if storage in held),
        cache=None if cache is None else after // batch,
        growth=None if cache is None else (after - before) // batch,
    )


def stored_bytes(model: nn.Module) -> int:
    """Bytes of what a checkpoint of the model would hold, each tensor once; of quantized ones all that they are made
    of."""
    tensors = list(_plain(model.state_dict()))
    return sum({_storage(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def cache_bytes(cache: Any) -> int:
    """Bytes of keys, values and states in a cache of any kind."""
    return sum(tensor.numel() * tensor.element_size() for tensor in cache_tensors(cache))


def cache_tensors(cache: Any) -> list[torch.Tensor]:
    """The tensors in a cache object, each once; counters, which have no dimensions, are left out."""
    seen: dict[int, torch.Tensor] = {}
    visited: set[int] = set()
    waiting = [cache]
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, torch.Tensor):
            if thing.dim() and thing.numel():
                seen[id(thing)] = thing
            continue
        if id(thing) in visited or isinstance(thing, nn.Module | type):
            continue
        visited.add(id(thing))
        if isinstance(thing, dict):
            waiting += thing.values()
        elif isinstance(thing, list | tuple):
            waiting += thing
        elif hasattr(thing, "__dict__"):
            waiting += vars(thing).values()
    return list(seen.values())


ROWS = {"aten::embedding": 0, "aten::index_select": None, "aten::index": None, "aten::gather": None}
"""Operators that read some rows of their first argument."""
GROUPED = {"aten::_grouped_mm", "transformers::grouped_mm_fallback"}
"""Products with one matrix per expert; the offsets say which experts have tokens."""
WRITERS = {"copy_", "index_copy_", "index_put_", "scatter_", "fill_", "zero_", "masked_fill_"}
"""In-place operators that do not read what they overwrite."""


class _Watch(TorchDispatchMode):
    """Notes what operators read of storages that were there before."""

    def __init__(self, inputs: list[torch.Tensor]) -> None:
        super().__init__()
        self._new = {_storage(tensor) for tensor in inputs}
        self._views: dict[int, dict[Any, int]] = {}
        self._sizes: dict[int, int] = {}

    def bytes_by_storage(self) -> dict[int, int]:
        """Storage address -> bytes read of it, each part once."""
        return {storage: min(sum(views.values()), self._sizes[storage]) for storage, views in self._views.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {_storage(tensor) for tensor in _plain((args, kwargs))}
        result = func(*args, **kwargs)
        made = {_storage(tensor) for tensor in _plain(result)} - inputs
        if made or not func.is_view:  # operators like `to` are views by name, and copy where they must
            self._note(func, args, kwargs)
        self._new |= made
        return result

    def _note(self, func: Any, args: Any, kwargs: Any) -> None:
        name = func._schema.name
        rest = list(args)
        if name.split("::")[1] in WRITERS:
            rest = rest[1:]
        elif name in ROWS or name in GROUPED:
            place = 1 if name in GROUPED else 0
            table = rest.pop(place)
            share = _groups(args, kwargs) if name in GROUPED else _rows(name, args)
            if share is None or is_traceable_wrapper_subclass(table):
                rest.append(table)
            else:
                part, of = share
                self._add(table, (name, part), table.numel() * table.element_size() * part // of)
        for tensor in _plain((rest, kwargs)):
            self._add(tensor, *_view(tensor))

    def _add(self, tensor: torch.Tensor, view: Any, size: int) -> None:
        storage = _storage(tensor)
        if size and storage not in self._new:
            self._views.setdefault(storage, {})[view] = size
            self._sizes[storage] = tensor.untyped_storage().nbytes()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _plain(things: Any) -> Iterator[torch.Tensor]:
    """All tensors in a structure; of a quantized one, the tensors it is made of."""
    for thing in tree_leaves(things):
        if is_traceable_wrapper_subclass(thing):
            yield from _plain([getattr(thing, name) for name in thing.__tensor_flatten__()[0]])
        elif isinstance(thing, torch.Tensor) and thing.layout == torch.strided:
            yield thing


def _view(tensor: torch.Tensor) -> tuple[Any, int]:
    """Which part of its storage a tensor is, the same for a matrix and its transpose; and the bytes of that part."""
    dims: list[list[int]] = []
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride == 0 or size == 1:
            continue
        if dims and stride == dims[-1][0] * dims[-1][1]:
            dims[-1][1] *= size
        else:
            dims.append([stride, size])
    size = tensor.element_size() if tensor.numel() else 0
    for _, length in dims:
        size *= length
    start = tensor.storage_offset() * tensor.element_size()
    return (start, size, *map(tuple, dims[1:])), size


def _rows(name: str, args: Any) -> tuple[int, int] | None:
    """How many rows are looked up, of how many; None: not known, all of them."""
    table = args[0]
    if name == "aten::index":
        used = [(dim, index) for dim, index in enumerate(args[1]) if index is not None]
        if len(used) != 1 or used[0][1].dtype in (torch.bool, torch.uint8):
            return None
        dim, index = used[0]
    elif name == "aten::gather":
        return min(args[2].numel(), table.numel()), table.numel()
    else:
        dim, index = (0, args[1]) if name == "aten::embedding" else (args[1], args[2])
    return (index.unique().numel(), table.shape[dim]) if table.dim() else None


def _groups(args: Any, kwargs: Any) -> tuple[int, int] | None:
    """How many experts have tokens, of how many."""
    offsets = args[2] if len(args) > 2 else kwargs.get("offs")
    if offsets is None:
        return None
    counts = torch.diff(offsets, prepend=offsets.new_zeros(1))
    return int((counts > 0).sum()), args[1].shape[0]
