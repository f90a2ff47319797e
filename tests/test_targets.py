"""When a run ends: pure decisions."""

import pytest
import tiny
import torch

from trimllm.blocks import decoder, legality, surgery
from trimllm.blocks.layout import Block
from trimllm.config import TrimConfig
from trimllm.errors import InputError
from trimllm.run import account
from trimllm.run.sizes import least_size
from trimllm.run.targets import STUCK, End, Size, floor, missed, reached, slower, wanted_depth


def config(**values):
    return TrimConfig(model="m", task="t", output="o", **values)


@pytest.mark.parametrize(
    ("values", "depth", "wanted"),
    [
        ({}, 16, 8),
        ({}, 5, 2),
        ({}, 2, 1),
        ({"keep": 0.5}, 16, 8),
        ({"keep": 0.01}, 16, 1),
        ({"keep": 0.8}, 16, 13),
        ({"depth": 3}, 16, 3),
        ({"depth": 3, "min_depth": 6}, 16, 6),
        ({"max_params": 10}, 16, None),
        ({"max_drop": 2}, 16, None),
        ({"max_drop": 2, "keep": 0.25}, 16, 4),
    ],
    ids=str,
)
def test_wanted_depth(values, depth, wanted):
    assert wanted_depth(config(**values), depth) == wanted


@pytest.mark.parametrize(
    ("values", "depth", "message"),
    [
        ({"depth": 4}, 4, "--depth 4"),
        ({"depth": 9}, 4, "--depth 9"),
        ({"keep": 0.99}, 4, "--keep 0.99"),
        ({}, 1, "--keep 0.5"),
    ],
    ids=str,
)
def test_target_that_drops_nothing_is_an_error_with_the_depth(values, depth, message):
    with pytest.raises(InputError, match=f"{message}.*the model has only {depth} layers"):
        wanted_depth(config(**values), depth)


@pytest.mark.parametrize(
    ("values", "size", "words"),
    [
        ({"depth": 3}, Size(4, 0, 0), None),
        ({"depth": 3}, Size(3, 0, 0), "depth 3"),
        ({"depth": 3}, Size(2, 0, 0), "depth 2"),
        ({"max_params": 1000}, Size(4, 1001, 0), None),
        ({"max_params": 1000}, Size(4, 1000, 0), "1,000 parameters"),
        ({"max_memory": 1}, Size(4, 0, 2**30 + 1), None),
        ({"max_memory": 1}, Size(4, 0, 2**30), "1.000 GiB"),
        ({"target_speedup": 1.5}, Size(4, 0, 0, None), None),
        ({"target_speedup": 1.5}, Size(4, 0, 0, 1.49), None),
        ({"target_speedup": 1.5}, Size(4, 0, 0, 1.5), "1.50 times the base's speed"),
        ({"depth": 3, "min_depth": 6}, Size(6, 0, 0), "the minimum depth, 6"),
        ({"depth": 3, "min_depth": 3}, Size(3, 0, 0), "depth 3"),
        ({"max_params": 1}, Size(2, 9, 0), None),
        ({"max_params": 1}, Size(1, 9, 0), "the minimum depth, 1"),
        ({"max_params": 1, "min_depth": 4}, Size(4, 9, 0), "the minimum depth, 4"),
        ({"min_accuracy": 50}, Size(1, 9, 0), "the minimum depth, 1"),
        ({"max_params": 10, "depth": 2}, Size(3, 9, 0), "9 parameters"),
    ],
    ids=str,
)
def test_reached(values, size, words):
    end = reached(config(**values), 16, size)
    assert (end and end.words) == words
    drop = {"reached": words, "ended_by": end and end.by, "speedup": end and end.speedup}
    assert End.of(drop) == end, "as it stands in a journal"


def test_a_target_that_is_not_met_is_said():
    size = Size(4, 2_000_000, 9)
    for values, asked in (
        ({"max_params": 1234567, "min_depth": 4}, "--max-params 1234567"),
        ({"keep": 0.1, "target_speedup": 3.0, "min_depth": 4}, "--keep 0.1 and --target-speedup 3.0"),
    ):
        end = reached(config(**values), 16, size)
        assert missed(config(**values), end) == f"{asked}: not met, since the drops ended before: the minimum depth, 4"
    assert missed(config(depth=2), STUCK).startswith("--depth 2: not met, since the drops ended before: every layer ")
    assert missed(config(max_params=1, depth=4, min_depth=4), reached(config(depth=4, min_depth=4), 16, size)) is None
    assert missed(config(min_accuracy=9, min_depth=4), End.least(config(min_depth=4), 4)) is None, (
        "a floor is all that was asked"
    )


def test_a_drop_that_nothing_can_exceed_is_pointed_out():
    warm = {"calibration": {"value": 16.4, "metric": "likelihood"}}
    assert account.loose(config(max_drop=20.0), warm).startswith("--max-drop 20: likelihood is 16.4 on the calibration")
    assert account.loose(config(max_drop=2.0), warm) is account.loose(config(min_accuracy=90), warm) is None


def test_floor_is_the_stricter_of_both_and_follows_the_best_depth():
    assert floor(config(), [90.0]) == -float("inf")
    assert floor(config(min_accuracy=70), [90.0, 60.0]) == 70
    assert floor(config(max_drop=5), [80.0, 90.0, 60.0]) == 85
    assert floor(config(max_drop=5, min_accuracy=88), [80.0, 90.0]) == 88
    assert floor(config(max_drop=0), [80.0]) == 80


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3n_text", "gemma4_text"])
def test_the_least_size_is_that_of_no_larger_a_model_than_one_layer_leaves(family):
    """Also where tables outside the blocks have a part for each of them (Gemma 3n and 4)."""
    model = tiny.build(family)
    depth = decoder.depth(model)
    least = least_size(model, torch.float32)
    sizes = []
    for layer in range(depth):
        if legality.refusal(model, (Block(layer, layer),)) is None:
            cut = surgery.apply_layout(tiny.build(family), [(layer, layer)])
            sizes.append(sum(parameter.numel() for parameter in cut.parameters()))
    assert sizes
    assert least.parameters <= min(sizes)
    if family in ("llama", "gpt2"):
        assert least.parameters == min(sizes)
    assert least.bytes == 4 * least.parameters


def test_a_saved_model_is_slower_where_no_round_has_the_speed():
    asked = config(target_speedup=1.6)
    ended = reached(asked, 5, Size(3, 0, 0, 1.67))
    assert slower(asked, ended, {"median": 1.55, "min": 1.5, "max": 1.6}) is None
    assert "decodes 1.55 times as fast" in slower(asked, ended, {"median": 1.55, "min": 1.5, "max": 1.59})
    assert slower(asked, End.least(asked, 1), {"median": 1.5, "max": 1.5}) is None, "that is said otherwise"
    assert slower(asked, None, {"median": 1.5, "max": 1.5}) is slower(asked, ended, None) is None
