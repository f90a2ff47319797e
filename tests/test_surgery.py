"""What surgery must not break, beyond the families: restoration, refusals, hooks, ties, dtypes, halves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from tiny import COMMON, CUT_ONLY, GPT2, VOCAB, build, randomize
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, MllamaForCausalLM
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from trimllm.blocks import config_rules, legality
from trimllm.blocks.config_rules import config_updates
from trimllm.blocks.decoder import blocks, depth, halves, mid_block, parameters_of, text_config
from trimllm.blocks.families import FAMILIES, Family, branching
from trimllm.blocks.layout import Block, Unit, remove, whole, without
from trimllm.blocks.legality import refusal
from trimllm.blocks.surgery import apply_layout, drop_layers
from trimllm.blocks.trial import trial
from trimllm.errors import InputError

IDS = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(autouse=True)
def _judge_anew() -> Iterator[None]:
    """What other rules said of a cut is nothing here, and the rules that a test changes are nothing elsewhere."""
    legality._JUDGED.clear()
    yield
    legality._JUDGED.clear()


def test_trial_restores_the_model_when_its_body_fails() -> None:
    model = build("gemma2")
    before, config, modules = logits(model), model.config.to_dict(), [*model.named_modules()]
    with pytest.raises(RuntimeError, match="body"), trial(model, remove(whole(6), Unit("pair", 1))):
        raise RuntimeError("body")
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config
    assert [name for name, _ in model.named_modules()] == [name for name, _ in modules]
    assert all(a is b for (_, a), (_, b) in zip(model.named_modules(), modules, strict=True))


def test_trial_that_cannot_begin_leaves_no_trace() -> None:
    model = build("jamba")
    before = logits(model)
    with pytest.raises(InputError, match="period"), trial(model, without(whole(6), [2])):
        pass
    assert torch.equal(logits(model), before)


def test_trial_without_injected_hidden_state_says_so() -> None:
    model = build("llama")
    with trial(model, without(whole(6), [3]), resume_from=2), pytest.raises(ValueError, match="hidden"):
        logits(model)


def test_trial_refuses_to_resume_a_family_whose_blocks_need_more_than_the_hidden_state() -> None:
    model = build("gemma3n_text")
    with pytest.raises(ValueError, match="cannot be resumed"), trial(model, without(whole(6), [1]), resume_from=1):
        pass


def test_trial_gives_gradients_to_the_original_weights() -> None:
    model = build("llama")
    with trial(model, without(whole(6), [3])):
        model(input_ids=IDS, use_cache=False).logits.sum().backward()
    assert next(blocks(model)[2].parameters()).grad is not None
    assert next(blocks(model)[3].parameters()).grad is None


def test_trial_keeps_blocks_that_lost_both_halves_out() -> None:
    model = build("llama")
    with trial(model, without(whole(6), [2])):
        expected = logits(model)
    layout = tuple(Block(None, None) if i == 2 else Block(i, i) for i in range(6))
    with trial(model, layout):
        assert torch.equal(logits(model), expected)


def test_refused_cut_changes_nothing() -> None:
    model = build("diffllama")
    before, config = logits(model), model.config.to_dict()
    with pytest.raises(InputError, match=r"layer 2 cannot become layer 1: its self_attn\.lambda_init"):
        drop_layers(model, [1])
    assert torch.equal(logits(model), before)
    assert model.config.to_dict() == config


class Growing(LlamaForCausalLM):
    """Custom code: a parameter that is longer in every block, and gets its shape from a function of `nn.init`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for place, block in enumerate(self.model.layers):
            block.extra = torch.nn.Parameter(torch.nn.init.ones_(torch.empty(4 + place)))


def test_what_custom_code_builds_by_place_is_refused() -> None:
    model = Growing(build("llama").config)
    reason = "layer 1 cannot become layer 0: its extra is (5,), and the config can only give (4,) there"
    assert refusal(model, without(whole(6), [0])) == reason
    assert refusal(model, without(whole(6), [5])) is None


def test_the_uncut_model_is_built_once_however_many_cuts_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    model, built, facts = build("llama", depth=8), list[int](), legality._held
    for known in (legality._BUILT, legality._JUDGED):
        known.clear()  # type: ignore[attr-defined]
    monkeypatch.setattr(legality, "_held", lambda owner, config: (built.append(depth(owner)), facts(owner, config))[1])
    for count in range(1, 8):
        assert refusal(model, without(whole(8), range(count))) is None
    assert sorted(built) == list(range(1, 9))


def test_refusals_name_the_layers_and_the_reason() -> None:
    model = build("gemma4_text")
    assert "layer 2 computes the keys and values that layers [4] reuse" in str(refusal(model, without(whole(6), [2])))
    assert refusal(model, without(whole(6), [2, 4])) is None
    assert "must be of type full_attention" in str(refusal(model, without(whole(6), [5])))
    hybrid = build("lfm2")
    assert "keep one of the layers [1, 4]" in str(refusal(hybrid, without(whole(6), [1, 4])))
    parallel = build("phi")
    assert "in parallel" in str(refusal(parallel, remove(whole(6), Unit("pair", 1))))


def test_dropping_nothing_everything_or_what_is_not_there() -> None:
    model = build("llama")
    before = logits(model)
    drop_layers(model, [])
    assert torch.equal(logits(model), before)
    with pytest.raises(InputError, match="layer 6 does not exist: the model has layers 0 to 5"):
        drop_layers(model, [6])
    with pytest.raises(InputError, match="cannot drop all 6 layers"):
        drop_layers(model, range(6))
    with pytest.raises(InputError, match="keep the model's order"):
        apply_layout(model, (Block(1, 1), Block(0, 0)))
    with pytest.raises(InputError, match="keep the model's order"):
        apply_layout(model, (Block(1, 1), Block(1, 1)))


def test_cuts_one_after_another_equal_one_cut() -> None:
    once, twice = build("smollm3"), build("smollm3")
    drop_layers(once, [1, 4])
    drop_layers(twice, [4])
    drop_layers(twice, [1])
    assert torch.equal(logits(once), logits(twice))
    assert once.config.to_dict() == twice.config.to_dict()
    pair, then = build("qwen3_moe"), build("qwen3_moe")
    apply_layout(pair, [(0, 1), (2, 2), (3, 5)])
    apply_layout(then, remove(whole(6), Unit("pair", 0)))
    apply_layout(then, (Block(0, 0), Block(1, 1), Block(2, 4)))
    assert torch.equal(logits(pair), logits(then))


def test_pairs_move_mlp_entries_with_the_mlp_and_attention_entries_with_the_attention() -> None:
    model = build("llama4_text")
    config = text_config(model)
    kinds, sparse = list(config.layer_types), list(config.moe_layers)
    layout = (Block(0, 1), *(Block(i, i) for i in range(2, 6)))
    updates = config_updates(config, layout)
    assert updates["layer_types"] == [kinds[i] for i in (0, 2, 3, 4, 5)]
    assert updates["moe_layers"] == [place for place, i in enumerate((1, 2, 3, 4, 5)) if i in sparse]
    assert list(updates)[-1] == "num_hidden_layers"


def test_tied_embeddings_hooks_and_frozen_weights_survive() -> None:
    model = build("llama-tied")
    model.model.layers[3].mlp.gate_proj.weight.requires_grad_(False)
    calls: list[int] = []
    model.model.layers[3].register_forward_hook(lambda *_: calls.append(1))
    drop_layers(model, [0, 2])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.model.layers[1].mlp.gate_proj.weight.requires_grad
    logits(model)
    assert calls == [1]


def test_bfloat16_is_cut_like_float32() -> None:
    model = build("qwen2-sliding").to(torch.bfloat16)
    with trial(model, without(whole(6), [1, 3])):
        expected = logits(model)
    drop_layers(model, [1, 3])
    assert torch.equal(logits(model), expected)


def test_record_of_devices_follows_the_layers() -> None:
    model = build("llama")
    model.hf_device_map = {"model.embed_tokens": 0, **{f"model.layers.{i}": i // 3 for i in range(6)}, "lm_head": 1}
    drop_layers(model, [0, 3])
    expected = {"model.layers.0": 0, "model.layers.1": 0, "model.layers.2": 1, "model.layers.3": 1}
    assert model.hf_device_map == {"model.embed_tokens": 0, "lm_head": 1, **expected}


def test_dispatched_model_with_hooks_is_cut_like_any_other() -> None:
    plain, hooked = build("qwen3"), build("qwen3")
    layout = remove(without(whole(6), [5]), Unit("pair", 2))
    apply_layout(plain, layout)
    names = [
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(6)),
    ]
    hooked = dispatch_model(hooked, dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)
    assert hasattr(blocks(hooked)[0], "_hf_hook")
    with trial(hooked, layout):
        assert torch.equal(logits(hooked), logits(plain))
    apply_layout(hooked, layout)
    assert torch.equal(logits(hooked), logits(plain))
    assert [*hooked.hf_device_map][-4:] == [f"model.layers.{i}" for i in range(4)]


def test_gpt2_index_scales_are_folded_so_that_layers_can_move_twice() -> None:
    model = build("gpt2-inverse")
    with trial(model, without(whole(6), [0, 3])):
        expected = logits(model)
    drop_layers(model, [3])
    drop_layers(model, [0])
    assert (logits(model) - expected).abs().max() < 1e-5


def test_halves_cover_a_block_and_its_parameters_once() -> None:
    for name in ("llama", "gemma2", "olmo2", "opt", "gpt2", "qwen3_next", "mpt"):
        model = build(name)
        split = halves(model, 1)
        assert split is not None
        assert mid_block(model, 1) is split[1][0]
        attention, mlp = parameters_of(model, "attention", 1), parameters_of(model, "mlp", 1)
        every = {id(parameter) for parameter in blocks(model)[1].parameters()}
        assert (
            {id(p) for p in attention} | {id(p) for p in mlp}
            == every
            == {id(p) for p in parameters_of(model, "block", 1)}
        )
        assert not {id(p) for p in attention} & {id(p) for p in mlp}
    parallel = build("gptj")
    assert halves(parallel, 0) is None
    assert mid_block(parallel, 0) is None
    with pytest.raises(InputError, match="in parallel"):
        parameters_of(parallel, "mlp", 0)


def test_family_without_a_row_is_cut_by_general_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimllm.blocks.families.FAMILIES", {})
    model = build("qwen3_moe")
    layout = without(whole(6), [0, 3])
    with trial(model, layout):
        expected = logits(model)
    drop_layers(model, [0, 3])
    assert depth(model) == 4
    assert torch.equal(logits(model), expected)
    assert "no row" in str(refusal(model, remove(whole(4), Unit("pair", 1))))


def test_unknown_rule_is_refused_instead_of_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A break test: without the rule for `no_rope_layers` the comparison of built models must notice."""
    monkeypatch.delitem(config_rules.PER_LAYER, "no_rope_layers")
    model = build("smollm3")
    assert "use_rope" in str(refusal(model, without(whole(6), [1])))


def mllama() -> Any:
    """Six layers, of which 1 and 4 attend to images, and are skipped where there are none."""
    torch.manual_seed(0)
    config = MllamaTextConfig(**COMMON, num_hidden_layers=6, cross_attention_layers=[1, 4])
    return randomize(MllamaForCausalLM(config))


def test_lists_that_modules_took_from_the_config_follow_the_layers() -> None:
    model, layout = mllama(), without(whole(6), [0, 1])
    trimmed = drop_layers(mllama(), [0, 1])
    assert trimmed.model.cross_attention_layers == trimmed.config.cross_attention_layers == [2]
    before = logits(model)
    with trial(model, layout):
        assert model.model.cross_attention_layers == [2]
        assert torch.equal(logits(model), logits(trimmed))
    assert model.model.cross_attention_layers == [1, 4]
    assert torch.equal(logits(model), before)


def test_layer_that_attends_to_images_cannot_come_first() -> None:
    assert "layer 1 attends to images" in str(refusal(mllama(), without(whole(6), [0])))
    assert refusal(mllama(), without(whole(6), [1])) is None


def test_list_per_layer_of_the_decoder_without_a_rule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(config_rules.INDICES, "rope_scaling_layers")
    model = build("molmo2")
    assert "no rule says what becomes of rope_types in its decoder" in str(refusal(model, without(whole(6), [0])))
    assert refusal(model, without(whole(6), [5])) is None


def test_numbers_of_layers_in_dicts_are_compared() -> None:
    model = build("zamba2")
    assert "layer_dic is {1: 0, 4: 1}, and the config can only" in str(refusal(model, without(whole(6), [0])))
    assert refusal(model, without(whole(6), [5])) is None


@pytest.mark.parametrize("name", ["glm_moe_dsa", "hy_v4"])
def test_layer_whose_choice_of_tokens_others_reuse_goes_after_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CUT_ONLY, name, {**CUT_ONLY[name], "index_topk": 3})
    model = build(name)
    message = r"layer 2 computes the choice of tokens that layers \[3\] reuse: keep it"
    with pytest.raises(InputError, match=message), trial(model, without(whole(6), [2])):
        pass
    with pytest.raises(InputError, match=message):
        drop_layers(model, [0, 1, 2])
    with trial(model, without(whole(6), [2, 3])):
        expected = logits(model)
    assert torch.equal(logits(drop_layers(model, [2, 3])), expected)
    assert text_config(model).indexer_types == ["full", "shared"] * 2


def test_source_of_keys_and_values_moves_with_its_layer() -> None:
    model = build("mistral_large4")
    assert "layer 3 computes the keys and values that layers [4] reuse" in str(refusal(model, without(whole(6), [3])))
    drop_layers(model, [2])
    assert text_config(model).kv_source_layers == [0, 0, 2, 2, 4]


@pytest.mark.parametrize(
    ("kind", "values", "reason"),
    [
        (
            "rwkv",
            {"vocab_size": VOCAB, "hidden_size": 32, "context_length": 64},
            "scales its weights by the layer's n",
        ),
        ("openai-gpt", {k: v for k, v in GPT2.items() if k != "n_inner"}, "it computes without a cache"),
    ],
)
def test_family_that_cannot_be_cut_says_why(kind: str, values: dict[str, Any], reason: str) -> None:
    config = AutoConfig.for_model(kind, num_hidden_layers=6, **values)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match=f"model type '{kind}' cannot be cut: .*{reason}"):
        drop_layers(model, [2])
    with pytest.raises(InputError, match=reason), trial(model, without(whole(6), [2])):
        pass


def test_a_cut_is_judged_once_but_for_what_the_model_alone_can_say(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[Any] = []
    work = legality._built_refusal
    monkeypatch.setattr(legality, "_built_refusal", lambda *a: judged.append(a) or work(*a))
    model, layout = build("llama"), without(whole(6), [1])
    assert refusal(model, layout) is None
    assert refusal(build("llama", seed=1), list(layout)) is None
    assert len(judged) == 1
    other = build("llama")
    other.config.rms_norm_eps = 0.1
    assert refusal(other, layout) is None
    assert refusal(model, without(whole(6), [2])) is None
    assert len(judged) == 3
    drop_layers(model, [5])
    assert "the model has layers 0 to 4" in str(refusal(model, layout))


def test_a_config_that_json_cannot_hold_is_refused_in_words() -> None:
    model = build("llama")
    model.config.kind = {1: 2, "a": 3}
    assert "the config of model type 'llama' refuses this cut: " in str(refusal(model, without(whole(6), [1])))


def test_family_that_this_release_computes_wrongly_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "llama", Family(since="5.999"))
    model, layout = build("llama"), without(whole(6), [1])
    message = "'llama' needs transformers 5.999 or newer"
    assert message in str(refusal(model, layout))
    with pytest.raises(InputError, match=message), trial(model, layout):
        pass


def test_number_of_the_layer_whose_keys_are_reused_follows_that_layer() -> None:
    model = build("llama")
    blocks(model)[5].self_attn.kv_shared_layer_index = 3
    drop_layers(model, [1, 4])
    assert blocks(model)[3].self_attn.kv_shared_layer_index == 2


def test_rope_parameters_of_a_layer_type_that_is_gone_are_forgotten() -> None:
    model = build("gemma3_text")
    drop_layers(model, [0, 3])
    assert set(text_config(model).layer_types) == {"full_attention"} == set(text_config(model).rope_parameters)


def test_alibi_and_recurrent_families_do_not_branch() -> None:
    names = ("llama", "falcon", "falcon-alibi", "bloom", "mpt", "qwen3_next", "lfm2")
    assert [branching(text_config(build(name, depth=3))) for name in names] == [True, True, *[False] * 5]
    assert Family().branching


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ([False, True, False], "False is no number of a layer: give whole numbers, as [3, 7]"),
        (torch.tensor([True, False]), "is no number of a layer"),
        (np.array([True, False]), "is no number of a layer"),
        ([1.0], "1.0 is no number of a layer"),
        (["1"], "'1' is no number of a layer"),
        ("1", "'1' is no number of a layer"),
        (1, "1 is no list of layers: give their numbers, as [3, 7]"),
        (torch.tensor([[0, 1]]), "is no number of a layer"),
    ],
)
def test_only_whole_numbers_name_layers(layers: Any, says: str) -> None:
    model = build("llama", depth=3)
    with pytest.raises(InputError, match=re.escape(says)):
        drop_layers(model, layers)
    assert len(model.model.layers) == 3


@pytest.mark.parametrize("layers", [torch.tensor([2, 0]), np.array([0, 2]), (2, -3), range(0, 3, 2)])
def test_layers_may_be_numbers_of_numpy_and_torch(layers: Any) -> None:
    model = build("llama", depth=3)
    kept = model.model.layers[1]
    drop_layers(model, layers)
    assert list(model.model.layers) == [kept]
