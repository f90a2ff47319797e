"""Muon in float32: what torch's own does in bfloat16, its state, and what makes it Muon."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch

from trimllm.demo.muon import Muon, orthogonal
from trimllm.demo.steps import optimizers, train_step

SETTINGS = {"lr": 0.1, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}


def steps(
    kind: type[torch.optim.Muon], parameters: list[torch.nn.Parameter], count: int, **settings
) -> torch.optim.Muon:
    optimizer = kind(parameters, **(SETTINGS | settings))
    draw = torch.Generator().manual_seed(1)
    for _ in range(count):
        for parameter in parameters[:-1]:  # the last one has no gradient
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(
    "settings", [{}, {"nesterov": False}, {"weight_decay": 0.5}], ids=["default", "plain", "decay"]
)
def test_steps_are_those_of_torch_within_bfloat16(settings):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(16, 48), (48, 16), (16, 48), (32, 32), (8, 8)]]
    theirs, first = copy.deepcopy(ours), copy.deepcopy(ours)
    state = steps(Muon, ours, 3, **settings).state_dict()
    expected = steps(torch.optim.Muon, theirs, 3, **settings).state_dict()
    for one, other, start in zip(ours[:-1], theirs, first, strict=False):
        assert (other - start).norm() > 0
        assert (one - other).norm() < 0.03 * (other - start).norm()
    assert torch.equal(ours[-1], first[-1])
    torch.testing.assert_close(state["state"], expected["state"])
    assert state["param_groups"] == expected["param_groups"]


def test_a_state_of_torchs_goes_on():
    torch.manual_seed(0)
    theirs = [torch.nn.Parameter(torch.randn(16, 32)), torch.nn.Parameter(torch.randn(8, 8))]
    going_on = steps(torch.optim.Muon, theirs, 2)
    ours = copy.deepcopy(theirs)
    resumed = Muon(ours, **SETTINGS)
    resumed.load_state_dict(copy.deepcopy(going_on.state_dict()))
    before = theirs[0].detach().clone()
    for parameters, optimizer in ((theirs, going_on), (ours, resumed)):
        parameters[0].grad = torch.ones(16, 32)  # alone, it would take another step than after the two
        optimizer.step()
    assert (ours[0] - theirs[0]).norm() < 0.03 * (theirs[0] - before).norm()
    torch.testing.assert_close(resumed.state_dict()["state"], going_on.state_dict()["state"])


def test_singular_values_come_near_one():
    group = Muon([torch.nn.Parameter(torch.zeros(2, 2))], **SETTINGS).param_groups[0]
    drawn = torch.randn(3, 24, 64, generator=torch.Generator().manual_seed(0))
    for matrices in (drawn, drawn.mT):
        values = torch.linalg.svdvals(orthogonal(matrices, group))
        assert values.shape == (3, 24)
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_without_bfloat16_the_matrices_have_this_one():
    model = tiny.build("llama", 2)
    assert [type(one) for one in optimizers(model, 1e-3, 1e-3)] == [torch.optim.AdamW, torch.optim.Muon]
    assert [type(one) for one in optimizers(model, 1e-3, 1e-3, bf16=False)] == [torch.optim.AdamW, Muon]


def test_other_learning_rates_of_shapes_are_refused():
    with pytest.raises(ValueError, match="adjust_lr_fn None"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))])


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="closure"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))], **SETTINGS).step(lambda: 0.0)


def test_a_step_in_micro_batches_is_the_step_of_the_whole_batch():
    whole = tiny.build("llama", 2)
    parts = copy.deepcopy(whole)
    batch = torch.randint(0, whole.config.vocab_size, (7, 9), generator=torch.Generator().manual_seed(0))
    losses = []
    for model, micro_batch in ((whole, 0), (parts, 3)):
        # an update that follows the gradient: Muon's and AdamW's first ones hardly depend on its size
        losses.append(train_step(model, [sgd(model)], batch, 0.5, bf16=False, micro_batch=micro_batch))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(parts.state_dict(), whole.state_dict())


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer.param_groups[0]["peak_lr"] = 0.5
    return optimizer
