"""What a trimmed model is made of: which original attention and which original MLP each remaining block holds.

A pre-norm decoder block is `x + A(norm1(x))` followed by `x + M(norm2(x))`: two halves. Dropping whole blocks, adjacent
pairs that re-pack into stock blocks, and (on trial only) single sub-layers are all one operation on this list.
Indices are 0-based and refer to the model the layout is applied to.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from trimllm.errors import InputError

HALVES = ("attention", "mlp")
"""What a block consists of, in order of execution; the names of the fields of `Block`."""


class Block(NamedTuple):
    """One decoder block: where its attention half comes from, and its MLP half. `None` bypasses it (trial only)."""

    attention: int | None
    mlp: int | None


Layout = tuple[Block, ...]


class Unit(NamedTuple):
    """Something that can be dropped: its `kind` ("block", "pair", "attention" or "mlp") and the block it begins in.

    block i: A_i and M_i, and the `length` - 1 blocks after it (a run). pair i: M_i and A_{i+1}, the shifted pair (A_i
    then joins M_{i+1} in one stock block). attention i / mlp i: one sub-layer, for scans only.
    """

    kind: str
    index: int  # type: ignore[assignment]
    length: int = 1

    def __str__(self) -> str:
        if self.kind == "pair":
            return f"M{self.index}+A{self.index + 1}"
        return f"{self.kind} {self.index}" if self.length == 1 else f"blocks {self.index}-{self.blocks[-1]}"

    @property
    def bypassed(self) -> bool:
        """Whether the unit can only be bypassed: no stock block is without one of its sub-layers."""
        return self.kind in HALVES

    @property
    def blocks(self) -> range:
        """Indices of the blocks of which the unit holds a part."""
        return range(self.index, self.index + (2 if self.kind == "pair" else self.length))


def whole(depth: int) -> Layout:
    """The layout of an untouched model of `depth` blocks."""
    return tuple(Block(i, i) for i in range(depth))


def positions(layers: Iterable[int], depth: int) -> list[int]:
    """The layers that a user named, as indices in a model of `depth` layers; negative ones count from the end.

    Raises:
        InputError: if one is no whole number or does not exist, or two of them are the same layer.
    """
    found: dict[int, int] = {}
    for layer in _numbers(layers):
        if not -depth <= layer < depth:
            raise InputError(f"layer {layer} does not exist: the model has layers 0 to {depth - 1} (or -{depth} to -1)")
        place = layer % depth
        if place in found:
            first = found[place]
            same = f"layer {layer} is" if layer == first else f"layers {first} and {layer} are the same one,"
            raise InputError(f"{same} named twice: the model has {depth} layers, name each one once")
        found[place] = layer
    return list(found)


def _numbers(layers: Iterable[Any]) -> Iterator[int]:
    """Whole numbers, of Python, numpy or torch; a mask would otherwise be read as layers 0 and 1."""
    try:
        given = list(layers)
    except TypeError:
        raise InputError(f"{layers!r} is no list of layers: give their numbers, as [3, 7]") from None
    for layer in given:
        try:
            number = operator.index(layer)
        except (TypeError, ValueError):
            number = None
        if number is None or isinstance(layer, bool) or str(getattr(layer, "dtype", "")).endswith("bool"):
            raise InputError(f"{layer!r} is no number of a layer: give whole numbers, as [3, 7]")
        yield number


def without(layout: Layout, positions: Iterable[int]) -> Layout:
    """The layout less the blocks at `positions` (0-based indices into `layout`, not original ones).

    Raises:
        InputError: if a position does not exist or nothing would remain.
    """
    dropped = set(positions)
    for position in sorted(dropped):
        if not 0 <= position < len(layout):
            raise InputError(f"layer {position} does not exist: the model has layers 0 to {len(layout) - 1}")
    if len(dropped) == len(layout):
        raise InputError(f"cannot drop all {len(layout)} layers: leave at least one")
    return tuple(block for position, block in enumerate(layout) if position not in dropped)


def units(kind: str, layout: Layout, length: int = 1) -> list[Unit]:
    """All candidates for removal: `kind` is "block" (n of them), "pair" (2n-1, by depth) or "sublayer" (2n).

    With `length` > 1 blocks go in runs of so many, which may begin anywhere (n - length + 1 of them).
    """
    depth = len(layout)
    if kind == "block":
        return [Unit("block", i, length) for i in range(depth - length + 1)]
    if kind == "pair":
        shifted = [[Unit("block", i), Unit("pair", i)] for i in range(depth)]
        return [unit for both in shifted for unit in both][:-1]
    if kind == "sublayer":
        return [Unit(half, i) for i in range(depth) for half in HALVES]
    raise InputError(f"unknown unit {kind!r}: use block, pair or sublayer")


def remove(layout: Layout, unit: Unit) -> Layout:
    """The layout after `unit` (its index is one into `layout`) is gone; sub-layers leave a bypassed half behind."""
    i = unit.index
    if unit.kind == "block":
        return without(layout, unit.blocks)
    if unit.kind == "pair":
        merged = Block(layout[i].attention, layout[i + 1].mlp)
        return (*layout[:i], merged, *layout[i + 2 :])
    half = layout[i]._replace(**{unit.kind: None})
    return (*layout[:i], half, *layout[i + 1 :])


def halves(unit: Unit) -> set[tuple[str, int]]:
    """What the unit consists of: halves, with the indices of the blocks that hold them."""
    if unit.kind == "pair":
        return {("mlp", unit.index), ("attention", unit.index + 1)}
    if unit.kind == "block":
        return {(half, place) for half in HALVES for place in unit.blocks}
    return {(unit.kind, unit.index)}


def places(layout: Layout, half: str) -> list[int]:
    """For each block of the layout, the block that its `half` comes from; a bypassed half stands where the other is."""
    other = "mlp" if half == "attention" else "attention"
    found = []
    for block in layout:
        place = getattr(block, half)
        found.append(getattr(block, other) if place is None else place)
    return found


def remove_all(layout: Layout, units: Iterable[Unit]) -> Layout:
    """The layout after several blocks and pairs, all named by their indices in `layout`, are gone.

    Each holds neighbours in the row A_0 M_0 A_1 M_1 ..., so what is left is again an attention and an MLP in turn.

    Raises:
        InputError: if two of them have a half in common, or nothing would remain.
    """
    gone: set[tuple[str, int]] = set()
    for unit in units:
        if gone & halves(unit):
            raise InputError(f"{unit} has a part in common with another unit that is to be dropped")
        gone |= halves(unit)
    attention = [block.attention for i, block in enumerate(layout) if ("attention", i) not in gone]
    mlp = [block.mlp for i, block in enumerate(layout) if ("mlp", i) not in gone]
    if not attention:
        raise InputError(f"cannot drop all {len(layout)} layers: leave at least one")
    return tuple(Block(a, m) for a, m in zip(attention, mlp, strict=True))


def describe(unit: Unit, layout: Layout) -> str:
    """The unit in original indices: `block 7` or `MLP 3 + attention 4`."""
    here = layout[unit.index]
    if unit.kind == "pair":
        return f"MLP {here.mlp} + attention {layout[unit.index + 1].attention}"
    if unit.kind == "block":
        held = [layout[i] for i in unit.blocks]
        names = [str(b.attention) if b.attention == b.mlp else f"{b.attention}/{b.mlp}" for b in held]
        return f"block {names[0]}" if unit.length == 1 else f"blocks {' '.join(names)}"
    return f"{unit.kind} {getattr(here, unit.kind)}"


def in_short(units: Sequence[str]) -> str:
    """What `describe` calls some units, on a line: `blocks 1-4, 7`, by depth; where some are no blocks, one by one."""
    found = [re.fullmatch(r"block (\d+)", unit) for unit in units]
    numbers = sorted(int(each[1]) for each in found if each)
    if len(numbers) < max(2, len(units)):
        return ", ".join(units)
    runs = list[list[int]]()
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    shown = (f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return f"blocks {', '.join(shown)}"


def shared_prefix(before: Layout, after: Layout) -> int:
    """How many leading blocks the two layouts have in common: what a trial deletion need not compute again."""
    for position, (old, new) in enumerate(zip(before, after, strict=False)):
        if old != new:
            return position
    return min(len(before), len(after))


def compose(outer: Layout, inner: Layout) -> Layout:
    """Indices of the original model, when `inner` (in terms of the present model) is applied on top of `outer`."""
    return tuple(
        Block(
            None if block.attention is None else outer[block.attention].attention,
            None if block.mlp is None else outer[block.mlp].mlp,
        )
        for block in inner
    )


def whole_layers(layout: Layout) -> list[int] | None:
    """Original indices of whole blocks, or None if pairs were re-packed."""
    intact = all(block.attention == block.mlp for block in layout)
    return [block.attention for block in layout if block.attention is not None] if intact else None


def plan_record(layout: Layout, base: str | dict[str, Any] | None) -> dict[str, Any]:
    """The contents of a `plan.json`: the model that was trimmed, and which of its halves each block holds."""
    return {"base": base, "depth": len(layout), "blocks": dump_layout(layout), "layers": whole_layers(layout)}


def dump_layout(layout: Layout) -> list[dict[str, int | None]]:
    """For journals and plans: which original attention and MLP each block holds."""
    return [block._asdict() for block in layout]


def load_layout(record: Iterable[dict[str, int | None]]) -> Layout:
    """The layout that `dump_layout` recorded."""
    return tuple(Block(block["attention"], block["mlp"]) for block in record)


def as_layout(blocks: Iterable[Any]) -> Layout:
    """A layout as users write it: pairs of halves, or what stands in a `plan.json`."""
    return tuple(load_layout([block])[0] if isinstance(block, dict) else Block(*block) for block in blocks)
