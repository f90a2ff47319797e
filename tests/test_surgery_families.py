"""Every family: a trimmed model is the original with layers (or halves) bypassed, in memory and after a reload."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tiny import CONFIGS, CUT_ONLY, TOWERS, absent, build

from trimllm.blocks.decoder import blocks, depth, mid_block, text_config
from trimllm.blocks.families import branching, bypassable, family, whole_only
from trimllm.blocks.layout import Block, Layout, Unit, remove, remove_all, whole, without
from trimllm.blocks.legality import refusal
from trimllm.blocks.surgery import apply_layout, drop_layers
from trimllm.blocks.trial import trial
from trimllm.checkpoints.export import save_trimmed
from trimllm.errors import InputError

IDS = torch.randint(3, 50, (2, 11), generator=torch.Generator().manual_seed(1))
NAMES = [*CONFIGS, *TOWERS, *CUT_ONLY]
DROPS = ((0,), (5,), (2,), (0, 3))
EXACT = 1e-5
FOLDED = {"gpt2-inverse"}

NOT_EXACT = {
    "diffllama": {(0,), (2,), (0, 3)},
    "gemma3n_text": {(2,), (0, 3)},
    "gemma4_text": {(2,), (0, 3), (5,)},
    "jamba": {(2,)},
    "glm_moe_dsa": {(0,), (2,), (0, 3)},
    "hy_v4": {(0,), (2,), (0, 3)},
    "minimax": set(DROPS),
    "mistral_large4": {(0,), (0, 3)},
    "modernbert-decoder": {(0,), (0, 3)},
    "zamba2": {(0,), (2,), (0, 3)},
}
"""What must be refused: these configs cannot say it, or other layers need what would go."""


@lru_cache(maxsize=2)
def original(name: str) -> Any:
    """A model that tests must leave as it is."""
    return build(name)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def like(output: Any, value: torch.Tensor) -> Any:
    return (value, *output[1:]) if isinstance(output, tuple) else value


def given(args: Any, kwargs: Any) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def hooks(*handles: Any) -> Iterator[None]:
    with ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        yield


def skip_blocks(model: Any, dropped: Any) -> Any:
    """Oracle: the output of each of these blocks is its input."""
    swap: Callable[..., Any] = lambda module, args, kwargs, output: like(output, given(args, kwargs))  # noqa: E731
    return hooks(*(blocks(model)[i].register_forward_hook(swap, with_kwargs=True) for i in dropped))


def skip_mlp(model: Any, i: int) -> Any:
    """Oracle: the output of block i is the residual stream before its MLP."""
    seen: dict[str, torch.Tensor] = {}

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        seen["x"] = given(args, kwargs)

    def swap(module: Any, args: Any, output: Any) -> Any:
        return like(output, seen["x"].reshape(first(output).shape))

    return hooks(
        mid_block(model, i).register_forward_pre_hook(keep, with_kwargs=True),
        blocks(model)[i].register_forward_hook(swap),
    )


def skip_attention(model: Any, i: int) -> Any:
    """Oracle: what block i's attention half adds is zero."""
    row = family(text_config(model))
    block = blocks(model)[i]
    names = [name for name in row.attention if block._modules.get(name) is not None]
    seen: dict[str, torch.Tensor] = {}

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        seen["x"] = given(args, kwargs)

    def swap(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        adds = names[-1] in row.adds_residual or row.normed_residual
        return like(output, seen["x"] if adds else torch.zeros_like(first(output)))

    last = block.get_submodule(names[-1])
    handles = [
        block.register_forward_pre_hook(keep, with_kwargs=True),
        last.register_forward_hook(swap, with_kwargs=True),
    ]
    if "mamba" in names and "self_attn" in names:  # falcon_h1 sums two mixers
        other = block.get_submodule("mamba")
        handles.append(other.register_forward_hook(lambda m, a, out: like(out, torch.zeros_like(first(out)))))
    return hooks(*handles)


def residuals(model: Any) -> list[torch.Tensor]:
    """The residual stream after each block, each (batch, seq, hidden)."""
    seen: list[torch.Tensor] = []
    with hooks(*(block.register_forward_hook(lambda m, a, out: seen.append(first(out))) for block in blocks(model))):
        logits(model)
    return seen


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() <= EXACT * max(1.0, float(b.abs().max()))


def save_exactly(model: Any, folder: Path) -> None:
    report = save_trimmed(model, folder)
    assert report is not None
    assert max(report.plain, report.cached, report.static or 0.0) < 1e-4


def test_newest_release_skips_no_family() -> None:
    if Version(transformers.__version__) >= Version("5.23.0"):
        assert [name for name in NAMES if absent(name)] == []


@pytest.mark.parametrize("name", NAMES, scope="module")
def test_trial_equals_bypassed_layers_and_leaves_no_trace(name: str) -> None:
    model = original(name)
    before, config = logits(model), model.config.to_dict()
    after_block = residuals(model)
    for dropped in DROPS:
        if dropped in NOT_EXACT.get(name, ()):
            continue
        layout = without(whole(6), dropped)
        with skip_blocks(model, dropped):
            expected = logits(model)
        assert not torch.allclose(expected, before, atol=1e-2)
        with trial(model, layout):
            assert torch.equal(logits(model), expected)
        if family(text_config(model)).resumable:
            with trial(model, layout, resume_from=dropped[0]) as injection:
                injection.hidden = after_block[max(0, dropped[0] - 1)]
                assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config
    assert depth(model) == 6


@pytest.mark.parametrize("name", NAMES, scope="module")
def test_dropped_layers_equal_bypassed_layers_and_reload_exactly(name: str, tmp_path: Any) -> None:
    for dropped in DROPS:
        model = original(name)
        layout = without(whole(6), dropped)
        if dropped in NOT_EXACT.get(name, ()):
            assert refusal(model, layout)
            before = logits(model)
            with pytest.raises(InputError):
                drop_layers(model, dropped)
            assert torch.equal(logits(model), before)
            continue
        with skip_blocks(model, dropped):
            expected = logits(model)
        trimmed = deepcopy(model)
        drop_layers(trimmed, dropped)
        if name in FOLDED:
            close(logits(trimmed), expected)
        else:
            assert torch.equal(logits(trimmed), expected)
        if (dropped == (0, 3) and whole_only(text_config(model))) or name in NOT_EXACT:  # others: with a pair, below
            save_exactly(trimmed, tmp_path / "-".join(map(str, dropped)))


def pair_oracle(model: Any, i: int) -> torch.Tensor:
    with skip_mlp(model, i), skip_attention(model, i + 1):
        return logits(model)


@pytest.mark.parametrize("name", NAMES, scope="module")
def test_shifted_pairs_equal_the_stream_without_both_halves(name: str, tmp_path: Any) -> None:
    model = original(name)
    reason = whole_only(text_config(model))
    after_block = residuals(model)
    for i in (0, 3, 4):
        layout = remove(whole(6), Unit("pair", i))
        if reason or name == "minimax":
            with pytest.raises(InputError), trial(model, layout):
                pass
            assert refusal(model, layout)
            continue
        expected, before = pair_oracle(model, i), logits(model)
        refused = refusal(model, layout)
        if refused and name in NOT_EXACT:
            continue
        assert refused is None
        with trial(model, layout):
            close(logits(model), expected)
        if i and family(text_config(model)).resumable:
            with trial(model, layout, resume_from=i) as injection:
                injection.hidden = after_block[i - 1]
                close(logits(model), expected)
        assert torch.equal(logits(model), before)
        if i == 3:
            trimmed = deepcopy(model)
            gone = () if name in NOT_EXACT else (0,)
            apply_layout(trimmed, remove_all(whole(6), [Unit("pair", i), *(Unit("block", place) for place in gone)]))
            with skip_blocks(model, gone):
                close(logits(trimmed), pair_oracle(model, i))
            save_exactly(trimmed, tmp_path / str(i))


@pytest.mark.parametrize("name", NAMES, scope="module")
def test_bypassed_halves_equal_the_stream_without_them(name: str) -> None:
    model = original(name)
    if not bypassable(text_config(model)) or name == "minimax":
        with pytest.raises(InputError), trial(model, remove(whole(6), Unit("mlp", 2))):
            pass
        return
    before = logits(model)
    for i in (0, 5):
        for half, oracle in (("attention", skip_attention), ("mlp", skip_mlp)):
            with oracle(model, i):
                expected = logits(model)
            with trial(model, remove(whole(6), Unit(half, i))):
                close(logits(model), expected)
                close(logits(model), expected)
    layout: Layout = (Block(0, 0), Block(None, 1), Block(2, None), Block(3, 4), Block(5, 5))
    if name == "jamba":
        return
    with skip_attention(model, 1), skip_mlp(model, 2), skip_mlp(model, 3), skip_attention(model, 4):
        expected = logits(model)
    with trial(model, layout):
        close(logits(model), expected)
    assert torch.equal(logits(model), before)
    with pytest.raises(InputError, match="for trials"):
        apply_layout(model, layout)


@pytest.mark.parametrize("name", CONFIGS, scope="module")
def test_branches_with_a_shared_prompt_are_exact_where_and_only_where_the_table_says_so(name: str) -> None:
    """Two continuations after one prompt, in one row, within every window."""
    model = original(name)
    first_row, second_row = torch.tensor([[5, 9, 11, 12]]), torch.tensor([[5, 9, 21, 22]])
    with torch.no_grad():
        apart = [model(input_ids=row, use_cache=False).logits for row in (first_row, second_row)]
    if branching(text_config(model)):
        together = branched(model)
        close(together[:, :4], apart[0])
        close(together[:, 4:], apart[1][:, 2:])
        return
    try:
        together = branched(model)
    except (ValueError, RuntimeError):  # it takes no such mask
        return
    assert (together[:, 4:] - apart[1][:, 2:]).abs().max() > 0.01


def branched(model: Any) -> torch.Tensor:
    """Logits of both continuations after one prompt."""
    row = torch.tensor([[5, 9, 11, 12, 21, 22]])
    seen = torch.ones(6, 6, dtype=torch.bool).tril()
    seen[4:, 2:4] = False
    mask = torch.zeros(1, 1, 6, 6).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = torch.tensor([[0, 1, 2, 3, 2, 3]])
    with torch.no_grad():
        return model(input_ids=row, attention_mask=mask, position_ids=positions, use_cache=False).logits
