"""Runs of adjacent blocks, which keep the pattern of layer types: found, scanned, dropped, refused."""

from __future__ import annotations

import helpers_run as h
import numpy as np
import pytest
import tiny
import torch
from transformers import AutoConfig, Gemma3ForCausalLM, Gemma3TextConfig

import trimllm
from trimllm.blocks import config_rules
from trimllm.blocks.layout import Unit, describe, remove, units, whole
from trimllm.blocks.trial import trial
from trimllm.errors import InputError
from trimllm.importance import weights
from trimllm.importance.select import touches

IDS = torch.arange(3, 15)[None]
ALTERNATE = ["sliding_attention", "full_attention"] * 3
SIX = ["sliding_attention"] * 5 + ["full_attention"]


def test_a_run_goes_as_one_unit():
    assert units("block", whole(5), 3) == [Unit("block", 0, 3), Unit("block", 1, 3), Unit("block", 2, 3)]
    run = Unit("block", 1, 3)
    assert [block.attention for block in remove(whole(5), run)] == [0, 4]
    assert (str(run), describe(run, whole(5)), touches(run, whole(5))) == ("blocks 1-3", "blocks 1 2 3", {1, 2, 3})
    repacked = remove(whole(5), Unit("pair", 1))
    assert describe(Unit("block", 0, 2), repacked) == "blocks 0 1/2"
    assert touches(Unit("block", 0, 2), repacked) == {0, 1, 2}


@pytest.mark.parametrize(
    ("kinds", "period"),
    [
        (["full_attention"] * 6, 1),
        (["sliding_attention", "full_attention"] * 3, 2),
        ((SIX * 4)[:20], 6),
        (SIX, None),
        (["full_attention", "full_attention", "sliding_attention", "full_attention"], None),
    ],
)
def test_period_of_the_layer_types(kinds, period):
    config = Gemma3TextConfig(num_hidden_layers=len(kinds), layer_types=kinds)
    assert config_rules.period(config) == period


def test_period_counts_every_list_and_every_index():
    config = tiny.build("smollm3", 6).config
    assert config_rules.period(config) == 3, "positions repeat after three layers"
    config = tiny.build("qwen3_moe", 6).config
    assert config_rules.period(config) is None, "one layer alone has no experts"


@pytest.mark.parametrize(
    ("name", "depth", "period"),
    [
        ("qwen2_moe", 6, 2),
        ("recurrent_gemma", 6, 3),
        ("jamba", 12, 6),
        ("jamba", 6, None),
        ("deepseek_v2", 6, None),
        ("gpt_neo", 6, 2),
    ],
)
def test_period_counts_every_rule_that_goes_by_the_index(name, depth, period):
    model = tiny.build(name, depth)
    assert config_rules.period(model.config) == period
    if period:
        kinds = [rule.read(model.config)[:-period] for rule in config_rules.rules(model.config)]
        trimllm.apply_layout(model, remove(whole(depth), Unit("block", 1, period)))
        assert config_rules.period(model.config) in (period, None)
        assert kinds == [rule.read(model.config) for rule in config_rules.rules(model.config)]


@pytest.mark.parametrize("start", range(5))
def test_wherever_a_run_begins_the_pattern_is_what_it_was(start, monkeypatch):
    monkeypatch.setitem(tiny.CONFIGS, "gemma2", {**tiny.CONFIGS["gemma2"], "layer_types": ALTERNATE})
    model = tiny.build("gemma2", 6)
    assert config_rules.period(model.config) == 2
    before = list(model.config.layer_types)
    trimllm.apply_layout(model, remove(whole(6), Unit("block", start, 2)))
    assert model.config.layer_types == before[:4]


def test_trial_of_a_run_is_the_model_without_its_blocks_and_weights_count_them_all():
    model = tiny.build("gemma2", 6)
    run = Unit("block", 1, 2)
    with trial(model, remove(whole(6), run)):
        tried = model(input_ids=IDS, use_cache=False).logits
    ones = weights.magnitude(model, units("block", whole(6)))
    assert weights.magnitude(model, [run]) == pytest.approx([ones[1] + ones[2]])
    trimllm.drop_layers(model, [1, 2])
    left = model(input_ids=IDS, use_cache=False).logits
    assert np.array_equal(tried.detach().numpy(), left.detach().numpy())


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """A random Gemma 3 of eight layers: three with a window, one without, and again."""
    return save_gemma(tmp_path_factory, (["sliding_attention"] * 3 + ["full_attention"]) * 2)


@pytest.fixture(scope="module")
def threes(tmp_path_factory):
    """Ten layers with a period of three: three runs of them fit, but not beside every run."""
    return save_gemma(tmp_path_factory, ((["sliding_attention"] * 2 + ["full_attention"]) * 4)[:10])


def save_gemma(tmp_path_factory, kinds):
    folder = tmp_path_factory.mktemp("windowed")
    stock = h.save_base(tmp_path_factory.mktemp("llama"))
    shape = {name: getattr(AutoConfig.from_pretrained(stock), name) for name in ("vocab_size", "hidden_size")}
    config = Gemma3TextConfig(
        **shape,
        num_hidden_layers=len(kinds),
        layer_types=kinds,
        sliding_window=512,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return h.save_model(Gemma3ForCausalLM(config), folder)


def test_run_drops_whole_periods(windowed, task, tmp_path, monkeypatch):
    h.fast(monkeypatch)
    output = tmp_path / "run"
    model, _ = h.run(windowed, task, output, keep_pattern=True, depth=4, warmup_epochs=0.2, epochs_per_drop=0.2)
    assert model.config.layer_types == ["sliding_attention"] * 3 + ["full_attention"]
    (dropped,) = h.drops(output)
    first = int(dropped[0].split()[1])
    assert dropped == ["blocks " + " ".join(str(first + i) for i in range(4))]
    (drop,) = h.journal(output, "drop")
    assert len(drop["trains"]) == 2
    assert not set(drop["trains"]) & set(range(first, first + 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 5}, "--keep-pattern drops 4 of 8 layers at a time, and the run is to end with 5: ask for --depth 4"),
        (
            {"max_params": 100_000, "min_depth": 5},
            "--min-depth 5: nothing can be dropped: layers of the 8 go 4 at a time: allow 4",
        ),
        ({"depth": 4, "unit": "pair"}, "--keep-pattern drops 4 blocks at a time: leave out --unit pair"),
    ],
)
def test_what_would_break_the_pattern_is_refused(windowed, task, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        h.run(windowed, task, tmp_path / "run", keep_pattern=True, **changes)
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_pattern_is_refused(windowed, task, tmp_path):
    model = trimllm.load_model(windowed)
    trimllm.drop_layers(model, [0])
    folder = h.save_model(model, tmp_path / "cut")
    with pytest.raises(InputError, match="follow no pattern that repeats"):
        h.run(folder, task, tmp_path / "run", keep_pattern=True, depth=4)


TOGETHER = {"schedule": "recover", "joint_tolerance": 100.0, "tie_tolerance": 100.0}


@pytest.mark.parametrize("changes", [{"one_shot": True}, TOGETHER], ids=["one-shot", "recover"])
def test_runs_that_go_at_once_do_not_overlap(task, tmp_path, monkeypatch, changes):
    h.fast(monkeypatch)
    base = tmp_path / "base"
    base.mkdir()
    config = AutoConfig.from_pretrained(h.save_base(tmp_path / "llama"))
    values = config.to_dict() | {"num_hidden_layers": 8, "layer_types": ["sliding_attention", "full_attention"] * 4}
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "layer_types", "pad_token_id")
    gemma = Gemma3TextConfig(**{name: values[name] for name in kept}, num_attention_heads=4, num_key_value_heads=2)
    gemma.update({"head_dim": 8, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 0})
    h.save_model(Gemma3ForCausalLM(gemma), base)
    model, _ = h.run(base, task, tmp_path / "run", keep_pattern=True, depth=4, warmup_epochs=0.2, **changes)
    assert model.config.layer_types == ["sliding_attention", "full_attention"] * 2
    (dropped,) = h.drops(tmp_path / "run")
    gone = [int(name) for unit in dropped for name in unit.split()[1:]]
    assert len(dropped) == 2
    assert len(set(gone)) == 4


def test_no_run_goes_at_once_with_another_below_the_least_depth(tmp_path_factory, task, tmp_path, monkeypatch):
    """Of six layers a run of two leaves four; another one would leave two."""
    h.fast(monkeypatch)
    twos = save_gemma(tmp_path_factory, ALTERNATE)
    quick = {"keep_pattern": True, "warmup_epochs": 0, "epochs_per_drop": 0, **TOGETHER}
    h.run(twos, task, tmp_path / "run", max_params=58_000, min_depth=3, **quick)
    (drop,) = h.journal(tmp_path / "run", "drop")
    assert (len(drop["units"]), h.result(tmp_path / "run")["depth"]) == (1, 4)


def test_a_run_that_would_leave_too_few_layers_ends_the_drops_and_is_named(tmp_path_factory, task, tmp_path, capsys):
    twos = save_gemma(tmp_path_factory, ALTERNATE)
    quick = {"keep_pattern": True, "warmup_epochs": 0, "epochs_per_drop": 0}
    h.run(twos, task, tmp_path / "run", max_params=57_500, min_depth=3, **quick)
    assert (
        "--max-params 57500: not met, since the drops ended before: the minimum depth, 3: the next drop would leave "
        "fewer layers"
    ) in h.result(tmp_path / "run")["warnings"]


@pytest.mark.parametrize("seed", range(3))
def test_no_run_is_taken_at_once_that_leaves_no_room_for_the_others(threes, task, tmp_path, seed, monkeypatch):
    h.fast(monkeypatch)
    quick = {"keep_pattern": True, "one_shot": True, "warmup_epochs": 0, "epochs_per_drop": 0}
    h.run(threes, task, tmp_path / "run", depth=1, strategy="random", seed=seed, **quick)
    (dropped,) = h.drops(tmp_path / "run")
    assert len({name for unit in dropped for name in unit.split()[1:]}) == 9
    with pytest.raises(InputError, match="--one-shot: no 9 layers may all go at once: protect fewer, or ask for a sma"):
        h.run(threes, task, tmp_path / "other", depth=1, strategy="random", seed=seed, protect=(1,), **quick)
    assert not (tmp_path / "other").exists()
