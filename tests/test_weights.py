"""Taylor and magnitude equal sums over the named parameters, computed one item at a time."""

from __future__ import annotations

import pytest
import tiny
import torch

from trimllm.blocks.layout import Unit, units, whole
from trimllm.evaluation.encoding import encode_pair
from trimllm.evaluation.evaluate import Scorer
from trimllm.importance.weights import magnitude, taylor

DEPTH = 3
ATTENTION = ("input_layernorm", "self_attn")


def members(unit):
    """Whether a parameter of llama leaves with the unit, from its name."""

    def test(name):
        if not name.startswith("model.layers."):
            return False
        index, half = int(name.split(".")[2]), name.split(".")[3] in ATTENTION
        return {
            "block": index == unit.index,
            "attention": index == unit.index and half,
            "mlp": index == unit.index and not half,
            "pair": (index == unit.index and not half) or (index == unit.index + 1 and half),
        }[unit.kind]

    return test


def all_units():
    return [unit for kind in ("pair", "sublayer") for unit in units(kind, whole(DEPTH))]


def naive_gradients(model, tokenizer, items):
    """d/dw of the mean loss per token of the right continuations, item by item over all logits."""
    total, count = 0.0, 0
    for item in items:
        prompt, target = encode_pair(tokenizer, item.prompt, item.target)
        ids = torch.tensor([prompt + target])
        labels = torch.tensor([[-100] * len(prompt) + target])[:, 1:]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total = total + torch.nn.functional.cross_entropy(logits[0], labels[0], ignore_index=-100, reduction="sum")
        count += len(target)
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(total / count, list(named.values()), allow_unused=True)
    return dict(zip(named, gradients, strict=True))


@pytest.mark.parametrize("branches", [True, False])
@pytest.mark.parametrize("budget", [1, 60, 4096])
def test_taylor_is_the_sum_of_weight_times_gradient_of_the_mean_right_answer_loss(
    branches, budget, tokenizer, questions
):
    model = tiny.build("llama", DEPTH)
    gradients = naive_gradients(model, tokenizer, questions)
    named = dict(model.named_parameters())
    expected = [
        sum(float((named[name] * gradients[name]).abs().sum().detach()) for name in named if members(unit)(name))
        for unit in all_units()
    ]
    scorer = Scorer(model, tokenizer, questions, token_budget=budget, branches=branches)
    assert taylor(model, scorer, all_units()) == pytest.approx(expected, rel=1e-4)


def test_magnitude_is_the_l1_norm_of_what_leaves():
    model = tiny.build("llama", DEPTH)
    named = dict(model.named_parameters())
    expected = [
        sum(float(named[name].detach().abs().sum()) for name in named if members(unit)(name)) for unit in all_units()
    ]
    assert magnitude(model, all_units()) == pytest.approx(expected, rel=1e-5)


def test_flags_gradients_mode_and_weights_are_afterwards_what_they_were(tokenizer, questions):
    model = tiny.build("llama", DEPTH).train()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 == 0)
        parameter.grad = torch.full_like(parameter, number) if number % 6 == 0 else None
    flags = [parameter.requires_grad for parameter in model.parameters()]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    values = taylor(model, Scorer(model, tokenizer, questions), [Unit("block", 1)])
    assert values[0] > 0
    assert model.training
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    for number, (parameter, weight) in enumerate(zip(model.parameters(), weights, strict=True)):
        assert torch.equal(parameter, weight)
        assert (parameter.grad is None) == (number % 6 != 0)
        assert parameter.grad is None or bool((parameter.grad == number).all())
