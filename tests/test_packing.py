"""Packed rows and chunked logits give the loss and the gradients of one row at a time over all logits."""

from __future__ import annotations

import random

import pytest
import tiny
import torch

from trimllm.evaluation import forward
from trimllm.training import losses, packing
from trimllm.training.packing import ALONE, Example, Way, arrange, deal, find_way, pack

RNG = random.Random(0)
ROWS = [
    Example(tuple(RNG.randrange(3, 64) for _ in range(length)), start)
    for length, start in [(12, 3), (5, 2), (9, 1), (7, 4), (4, 2), (4, 3)]
]
ALONE_ONLY = {
    *("gpt_neo", "bloom", "bloom-post", "mpt", "falcon-alibi", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"),
    *("lfm2", "lfm2_moe", "granitemoehybrid", "jamba", "nemotron_h", "nemotron_h-moe", "falcon_h1", "minimax"),
    *("mamba", "mamba2", "recurrent_gemma", "olmo_hybrid", "gpt_oss", "afmoe"),
}
"""Families whose rows are batched by length."""

ROUGH = {"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "gemma4_text"}
"""Families whose random models round so much in float32 that batches of single rows miss 1e-5 in the gradient."""


@pytest.fixture(autouse=True)
def _always_pack(monkeypatch):
    """Packing must be right, not only cheap."""
    monkeypatch.setattr(packing, "WIDTH_COST", 1e9)


def naive(model, rows):
    """Mean loss over the targets, row by row over all logits, and its gradients."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids[:-1]]), use_cache=False).logits[0, row.start - 1 :]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(row.ids[row.start :]), reduction="sum")
    total = total / sum(row.targets for row in rows)
    total.backward()
    return total.item(), gradients(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def ours(model, packed, places=10_000):
    model.zero_grad(set_to_none=True)
    return losses.backward(model, packed, 1 / len(packed.targets), places).item(), gradients(model)


def same(one, other, tolerance=1e-5):
    (loss, grads), (expected, wanted) = one, other
    assert loss == pytest.approx(expected, abs=1e-5)
    names = sorted(wanted.keys() | grads.keys())
    a, b = (torch.cat([g[name].flatten() if name in g else torch.zeros(1) for name in names]) for g in (grads, wanted))
    assert float((a - b).norm() / b.norm()) < tolerance


@pytest.mark.parametrize("family", [*tiny.CONFIGS, *tiny.TOWERS])
def test_packed_rows_give_the_loss_and_gradients_of_single_rows(family):
    model = tiny.build(family, 4)
    way, reason = find_way(model, ROWS, 0)
    assert (way == ALONE) == (reason is not None) == (family in ALONE_ONLY)
    packed = pack(ROWS, way, 0)
    assert (len(packed.inputs["input_ids"]) < len(ROWS)) == (way != ALONE)
    same(ours(model, packed), naive(model, ROWS), 5e-5 if family in ROUGH else 1e-5)


@pytest.mark.parametrize("family", [f for f in [*tiny.CONFIGS, *tiny.TOWERS] if f != "llama4_text"])
def test_logits_in_chunks_give_the_same_loss_and_gradients(family, monkeypatch):
    model = tiny.build(family, 4)
    packed = pack(ROWS[:4], ALONE, 0)
    monkeypatch.setattr(forward, "LEAST_PLACES", 3)
    monkeypatch.setattr(forward, "LOGITS", 4 * 64)
    places = losses.places_at_once(model, packed)
    assert places == 4
    same(ours(model, packed, places), ours(model, packed))


def test_no_chunk_is_larger_than_allowed():
    model, sizes = tiny.build("gemma2", 2), []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: sizes.append(out.shape[-2]))
    packed = pack(ROWS, ALONE, 0)
    losses.backward(model, packed, 1.0, 5)
    assert sizes[0] == 0, "the forward pass itself computes no logits"
    assert sum(sizes) == sum(row.targets for row in ROWS)
    assert max(sizes) == 5
    assert "forward" not in vars(model.get_decoder())


def test_a_model_whose_logits_depend_on_more_than_the_decoders_output_computes_them_whole():
    model = tiny.build("llama", 1)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(out))
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: out + len(seen))
    assert losses.places_at_once(model, pack(ROWS[:1], ALONE, 0)) > 10**9


def test_memory_that_ends_in_a_try_is_not_taken_for_a_result_that_is_not_exact(monkeypatch):
    model = tiny.build("llama", 2)
    forward, room = model.forward, max(row.inputs for row in ROWS)

    def tight(*, input_ids, **named):
        if input_ids.numel() > room:
            raise torch.OutOfMemoryError
        return forward(input_ids=input_ids, **named)

    monkeypatch.setattr(model, "forward", tight)
    assert find_way(model, ROWS, 0) == (ALONE, "memory ran out when packed rows were tried")


def test_a_family_that_lets_packed_rows_see_each_other_is_found_out(monkeypatch):
    """bloom's positions are distances in the row: were the table wrong, the check on the data would tell."""
    model = tiny.build("bloom", 4)
    monkeypatch.setattr(packing.families, "branching", lambda config: True)
    way, reason = find_way(model, ROWS, 0)
    assert (way, reason) == (ALONE, "packed rows are not exact on model type bloom")


@pytest.mark.parametrize("masks", [True, False])
def test_rows_kept_apart_in_a_single_packed_row_alone_are_found_out(masks, monkeypatch):
    """FlashAttention goes by the positions of one packed row, of several by nothing, and takes no mask for it."""
    model, ways = tiny.build("llama", 2), []

    def flash(model, packed):
        ways.append("attention_mask" in packed.inputs)
        one_row = len(packed.inputs["input_ids"]) == 1
        return right(model, packed) + (0 if one_row or "attention_mask" in packed.inputs else 1)

    right = packing._logprobs
    monkeypatch.setattr(packing, "_logprobs", flash)
    monkeypatch.setattr(packing.decoder, "takes_masks", lambda model: masks)
    found, reason = find_way(model, ROWS, 0)
    why = "packed rows are not exact with FlashAttention"
    assert (found, reason) == ((Way(64, torch.float32), None) if masks else (ALONE, why))
    assert any(ways) == masks


def test_rows_too_long_for_two_in_the_context_stay_alone():
    model = tiny.build("llama", 1)
    rows = [Example(tuple(range(3, 3 + 40)), 1)] * 3
    way, reason = find_way(model, rows, 0)
    assert way == ALONE
    assert "context of 64 tokens" in reason


def test_rows_too_long_for_three_in_the_context_stay_alone():
    rows = [Example(tuple(range(3, 3 + length)), 1) for length in (25, 26, 27)]
    assert find_way(tiny.build("llama", 1), rows, 0)[0] == ALONE


def row(length):
    return Example(tuple(range(length + 1)), 1)


def test_packed_rows_are_those_that_cost_least_by_hand(monkeypatch):
    """Two rows: alone 2 * 1000 positions of a plain causal mask, together 1200 under a block-diagonal one."""
    one, other = row(1000), row(200)
    for width_cost, together in ((1400, True), (1000, True), (600, True), (500, False), (200, False)):
        monkeypatch.setattr(packing, "WIDTH_COST", width_cost)
        alone, packed = 2000 * (1 + 500 / width_cost), 1200 * (1 + 1200 / width_cost)
        assert (packed < alone) is together
        assert (len(arrange([one, other], 8192)) == 1) is together


def test_at_most_eight_rows_share_a_packed_one():
    assert packing.MOST_PER_PACKED_ROW == 8
    assert len(arrange([row(100), *[row(1)] * 79], 8192)) == 10


def test_every_row_is_dealt_once_and_loads_are_even():
    rng = random.Random(1)
    rows = [Example(tuple(range(rng.randrange(2, 60))), 1) for _ in range(100)]
    bins = deal(rows, 20)
    assert sorted(len(row.ids) for packed in bins for row in packed) == sorted(len(row.ids) for row in rows)
    loads = [sum(row.inputs for row in packed) for packed in bins]
    assert max(loads) < 1.05 * sum(loads) / len(loads)


def test_packed_rows_keep_to_the_limit_and_hardly_pad():
    rng = random.Random(2)
    rows = [Example(tuple(range(rng.randrange(5, 100))), 1) for _ in range(60)]
    bins = arrange(rows, 200)
    widths = [sum(row.inputs for row in packed) for packed in bins]
    assert max(widths) <= 200
    assert sum(widths) / (len(bins) * max(widths)) > 0.93
    assert arrange(rows, 50) == [[row] for row in rows]
    assert pack(rows, Way(200), 0).tokens == sum(row.inputs for row in rows)


def test_long_rows_are_not_packed_to_save_a_little_padding(monkeypatch):
    monkeypatch.setattr(packing, "WIDTH_COST", 1024)
    rows = [Example(tuple(range(1000 - n)), 1) for n in range(8)]
    assert arrange(rows, 8192) == [[row] for row in rows]
