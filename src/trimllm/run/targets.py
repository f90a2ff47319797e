"""When a run stops: efficiency targets and accuracy floors. Pure decisions."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from trimllm.config import TrimConfig
from trimllm.config.shared import option_of
from trimllm.config.trim import FLOORS, MEASURED, SIZES
from trimllm.errors import InputError

GIB = 2**30
LATE_SHARE = 2 / 3
"""Share of the training after drops that waits for the last drop with --schedule late; see docs/earlier.md."""


@dataclass(frozen=True)
class End:
    """What ends the drops."""

    by: str
    """The setting that is met (`depth` stands for keep, too), `min_depth`, or `stuck`."""
    words: str
    speedup: float | None = None
    """How many times the base's speed it was, where that ends them."""

    @classmethod
    def of(cls, drop: dict[str, Any]) -> End | None:
        """What a journaled drop says."""
        words = drop["reached"]
        return cls(drop["ended_by"], words, drop["speedup"]) if words else None

    @classmethod
    def least(cls, config: TrimConfig, depth: int) -> End:
        """At this depth no layer may go, for --min-depth; where that is less, layers go several at a time."""
        below = ": the next drop would leave fewer layers" if depth > config.min_depth else ""
        return cls("min_depth", f"the minimum depth, {config.min_depth}{below}")


STUCK = End("stuck", "every layer that remains is protected or cannot be removed")


@dataclass(frozen=True)
class Size:
    """How large a model is: blocks, parameters, bytes of weights as saved, decode speed-up over the base."""

    depth: int
    parameters: int
    bytes: int
    speedup: float | None = None


def asked_depth(config: TrimConfig, base_depth: int) -> int | None:
    """Blocks that --depth or --keep asks for; None for other targets.

    Raises:
        InputError: if that is not less than the base has.
    """
    if config.depth is not None:
        wanted, option = config.depth, f"--depth {config.depth}"
    elif config.keep is not None:
        wanted, option = max(1, round(config.keep * base_depth)), f"--keep {config.keep}"
    else:
        return None
    if wanted >= base_depth:
        raise InputError(f"{option}: the model has only {base_depth} layers, so nothing would be dropped: ask for less")
    return wanted


def wanted_depth(config: TrimConfig, base_depth: int) -> int | None:
    """Blocks to end with: what is asked for, but not below --min-depth. Raises as `asked_depth` does."""
    asked = asked_depth(config, base_depth)
    return None if asked is None else max(asked, config.min_depth)


def reached(config: TrimConfig, base_depth: int, size: Size) -> End | None:
    """The target that `size` meets, or None if the run goes on."""
    asked = asked_depth(config, base_depth)
    if asked is not None and size.depth <= asked:
        return End("depth", f"depth {size.depth}")
    if config.max_params is not None and size.parameters <= config.max_params:
        return End("max_params", f"{size.parameters:,} parameters")
    if config.max_memory is not None and size.bytes <= config.max_memory * GIB:
        return End("max_memory", f"{size.bytes / GIB:.3f} GiB")
    if config.target_speedup is not None and size.speedup is not None and size.speedup >= config.target_speedup:
        return End("target_speedup", f"{size.speedup:.2f} times the base's speed", size.speedup)
    return End.least(config, size.depth) if size.depth <= config.min_depth else None


def check_possible(config: TrimConfig, base_depth: int, least: Size) -> None:
    """Refuse sizes that no drop leads to; `least` is the smallest layer alone. (That --min-depth leaves more is a wish,
    and ends the drops with a warning.)

    Raises:
        InputError: if that is more than was asked for, or the speed more than the others' time can give.
    """
    if config.max_params is not None and least.parameters > config.max_params:
        raise InputError(
            f"--max-params {config.max_params}: with one layer alone the model has {least.parameters:,}: allow more"
        )
    if config.max_memory is not None and least.bytes > config.max_memory * GIB:
        raise InputError(
            f"--max-memory {config.max_memory:g}: with one layer alone the model takes {least.bytes / GIB:.3g} GiB: "
            "allow more"
        )
    if config.target_speedup is not None and config.target_speedup > base_depth:
        raise InputError(
            f"--target-speedup {config.target_speedup:g}: one of {base_depth} layers cannot be more than {base_depth} "
            "times as fast: ask for less"
        )


def missed(config: TrimConfig, end: End) -> str | None:
    """One line where what ended the drops is none of the sizes that were asked for."""
    asked = [option_of(name, value) for name in SIZES if (value := getattr(config, name)) is not None]
    if not asked or end.by not in ("min_depth", "stuck"):
        return None
    return f"{' and '.join(asked)}: not met, since the drops ended before: {end.words}"


def slower(config: TrimConfig, end: End | None, speedup: dict[str, float] | None) -> str | None:
    """One line where the drops ended at the speed that was asked for, and the saved model has less in every round."""
    if config.target_speedup is None or not speedup or end is None or end.speedup is None:
        return None
    if speedup["max"] >= config.target_speedup:
        return None
    return (
        f"--target-speedup {config.target_speedup}: the saved model decodes {speedup['median']:.2f} times as fast as "
        f"the base; when the drops ended it was {end.speedup:.2f}: measure it with trimllm bench"
    )


def least_depth(config: TrimConfig, base_depth: int) -> int:
    """Blocks that are left when the target in depth, or for a speed the target at its very best, is met.

    Decoding takes at most all of its time in the blocks: half of them cannot be more than twice as fast.
    """
    least = [config.min_depth, wanted_depth(config, base_depth) or 1]
    if config.target_speedup is not None:
        least.append(math.floor(base_depth / config.target_speedup))
    return max(least)


def stage_epochs(config: TrimConfig, units: int, stage: int, *, last: bool) -> float:
    """Epochs of the stage after `units` dropped together, the `stage`-th with a drop (with --schedule recover: at
    most)."""
    if config.schedule == "recover":
        return max(config.epochs_per_drop, config.final_epochs) if last else config.epochs_per_drop * units
    own = config.epochs_per_drop * (units if config.one_shot else 1)  # one stage in place of one per unit
    before = config.epochs_per_drop * (stage - 1)
    final = config.final_epochs if last else 0.0
    if config.schedule != "late":
        return own + final
    return own + LATE_SHARE * before + final if last else (1 - LATE_SHARE) * own


def stages_ahead(config: TrimConfig, base_depth: int, length: int = 1) -> list[tuple[int, float]]:
    """Blocks and epochs of every stage after drops, of `length` layers at a time; none for targets that are no depth.

    At most those: see `ends_sooner`.
    """
    left, wanted, stages = base_depth, wanted_depth(config, base_depth), list[tuple[int, float]]()
    while wanted is not None and left > wanted:
        units = math.ceil((left - wanted) / length)
        if not config.one_shot:
            units = min(units, config.drops_per_stage)
        left -= units * length
        stages.append((left, stage_epochs(config, units, len(stages) + 1, last=left <= wanted)))
    return stages


def drops_end_sooner(config: TrimConfig) -> bool:
    """Whether drops may end before the wanted depth: by a floor, or another size."""
    return any(getattr(config, name) is not None for name in (*FLOORS, *MEASURED))


def ends_sooner(config: TrimConfig) -> bool:
    """Whether training may end before the wanted depth, or a stage before its epochs."""
    return config.schedule == "recover" or drops_end_sooner(config)


def last_good(config: TrimConfig, stages: Sequence[dict[str, Any]], kept: Collection[int]) -> dict[str, Any]:
    """The last journaled stage that meets the floor; `kept` are the depths whose weights are there.

    Raises:
        InputError: if a floor that was raised since asks for one whose weights are gone.
    """
    limit = floor(config, [stage["calibration"]["value"] for stage in stages])
    good = [stage for stage in stages if stage["calibration"]["value"] >= limit]
    here = [stage for stage in stages if len(stage["layout"]) in kept]
    if not good or good[-1] not in here:
        known = ", ".join(f"{len(one['layout'])} layers: {one['calibration']['value']:.1f}" for one in here)
        why = "the weights of the depth that meets it are gone" if good else "no depth meets it"
        raise InputError(
            f"a floor of {limit:.1f} on the calibration set: {why}; there are those of {known}: lower "
            "--min-accuracy or give a larger --max-drop, or start another run"
        )
    return good[-1]


def floor(config: TrimConfig, values: Sequence[float]) -> float:
    """The calibration accuracy (percent) below which a depth does not count; `values` are those of all so far."""
    floors = [-math.inf]
    if config.min_accuracy is not None:
        floors.append(config.min_accuracy)
    if config.max_drop is not None:
        floors.append(max(values) - config.max_drop)
    return max(floors)
