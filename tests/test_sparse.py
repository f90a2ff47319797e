"""Which parameters train: blocks by their original index, re-packed ones by halves, tied weights once."""

from __future__ import annotations

import pytest
import tiny
import torch

from trimllm.blocks import decoder, surgery
from trimllm.blocks.layout import Block, whole
from trimllm.training.sparse import choose, count, freeze

ATTENTION = ("input_layernorm", "self_attn")


@pytest.mark.parametrize(
    ("ratio", "depth", "expected"),
    [(0.25, 32, 8), (0.25, 16, 4), (0.25, 6, 2), (0.1, 4, 1), (1.0, 7, 7), (0.3, 10, 3), (0.07, 100, 7)],
)
def test_r_times_n_blocks_train_and_at_least_one(ratio, depth, expected):
    assert count(ratio, depth) == expected


@pytest.mark.parametrize(
    ("mode", "before", "expected"),
    [
        ("static", None, [1, 5]),
        ("static", [2, 7], [2, 7]),  # 2 was dropped, and is not replaced
        ("static", [2, 3], [1, 5]),  # nothing of it is left
        ("filled", None, [1, 5]),
        ("filled", [2, 7], [5, 7]),
        ("filled", [0, 7], [0, 7]),
        ("dynamic", [0, 7], [1, 5]),
        ("off", [0, 7], None),
    ],
)
def test_what_trains_behind_a_drop(mode, before, expected):
    assert choose(mode, [5, 1, 7, 0], 2, before, staying={0, 1, 5, 7}) == expected


@pytest.mark.parametrize(("mode", "expected"), [("static", [2, 7]), ("filled", None), ("dynamic", None)])
def test_all_train_where_no_more_are_left_than_asked_for(mode, expected):
    assert choose(mode, [5, 7], 2, [2, 7], staying={5, 7}) == expected


def training(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def place(name):
    """(index, half) of a llama parameter; None outside the blocks."""
    if not name.startswith("model.layers."):
        return None
    return int(name.split(".")[2]), "attention" if name.split(".")[3] in ATTENTION else "mlp"


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("chosen", [None, [0, 3], []])
def test_chosen_blocks_train_by_original_index(chosen, embeddings):
    model = tiny.build("llama", 3)
    layout = (Block(0, 0), Block(2, 2), Block(3, 3))
    parameters = freeze(model, layout, chosen, embeddings=embeddings)
    names = {name for name, _ in model.named_parameters()}
    sources = [0, 2, 3]
    expected = {
        name
        for name in names
        if (embeddings if place(name) is None else chosen is None or sources[place(name)[0]] in chosen)
    }
    assert training(model) == expected
    assert [id(p) for p in parameters] == [id(p) for p in model.parameters() if p.requires_grad]


def test_a_repacked_block_trains_by_halves():
    model = surgery.apply_layout(tiny.build("llama", 4), (Block(0, 1), Block(2, 2), Block(3, 3)))
    layout = (Block(0, 1), Block(2, 2), Block(3, 3))
    freeze(model, layout, [1, 3], embeddings=False)
    blocks = {place(name) for name in training(model)}
    assert blocks == {(0, "mlp"), (2, "attention"), (2, "mlp")}
    freeze(model, layout, [0], embeddings=False)
    assert {place(name) for name in training(model)} == {(0, "attention")}
    assert len(training(model)) == 5


def test_tied_embeddings_train_once_or_not_at_all():
    model = tiny.build("llama-tied", 2)
    parameters = freeze(model, whole(2), [])
    assert len({id(parameter) for parameter in parameters}) == len(parameters)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum(parameter is model.get_input_embeddings().weight for parameter in parameters) == 1
    assert freeze(model, whole(2), [], embeddings=False) == []
    assert not model.get_output_embeddings().weight.requires_grad


@pytest.mark.parametrize("family", ["gpt_neox", "mamba", "gemma3n_text"])
def test_families_of_whole_blocks_train_by_blocks(family):
    model = tiny.build(family, 4)
    freeze(model, whole(4), [1], embeddings=False)
    for number, block in enumerate(decoder.blocks(model)):
        assert {parameter.requires_grad for parameter in block.parameters()} == {number == 1}


def test_freezing_again_forgets_the_last_choice_and_old_gradients():
    model = tiny.build("llama", 3)
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    freeze(model, whole(3), [0], embeddings=False)
    freeze(model, whole(3), [2], embeddings=False)
    assert {place(name)[0] for name in training(model)} == {2}
    assert all(parameter.grad is None for parameter in model.parameters())
