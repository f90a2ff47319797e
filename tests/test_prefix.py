"""Blocks below the lowest that trains are computed once per row, and the stage ends at the same weights."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from accelerate import Accelerator

from trimllm.blocks import decoder
from trimllm.blocks.layout import whole
from trimllm.config import TrainSettings, TrimConfig
from trimllm.config.plain_settings import make
from trimllm.errors import InputError
from trimllm.training import losses, packing, prefix, sparse, train, training_rows
from trimllm.training.packing import Example
from trimllm.training.step import Means

TASK = [Example(tuple((7 * n + 3 * i) % 60 + 3 for i in range(3 + n % 9)), 1 + n % 2) for n in range(12)]


def stage(model, chosen, tmp_path, epochs=3, **more):
    """Train; returns the report, what was said, and how many tokens went through the first block and the last."""
    settings = TrainSettings(lr=1e-2, batch_size=40, train_embeddings=False, **more)
    parameters = sparse.freeze(model, whole(decoder.depth(model)), chosen, embeddings=False)
    said, passed = [], [0, 0]
    handles = []
    for place, block in enumerate((decoder.blocks(model)[0], decoder.blocks(model)[-1])):

        def count(module, args, output, place=place):
            passed[place] += (output[0] if isinstance(output, tuple) else output).shape[:2].numel() * module.training

        handles.append(block.register_forward_hook(count))
    plan = training_rows.steps(TASK, [], settings, epochs, 0)
    means = Means(folder=tmp_path, say=said.append)
    report = train.train_stage(model, parameters, plan, settings, Accelerator(cpu=True), means)
    for handle in handles:
        handle.remove()
    return report, said, passed


def decides(model, name, weight):
    """Which elements of a weight any logit depends on.

    A bias of keys that are not rotated adds the same to all scores of a query, and softmax takes that away: its
    gradient is rounding, of which AdamW makes steps of the full size, other ones on another CPU.
    """
    found = torch.ones_like(weight, dtype=torch.bool)
    if name.endswith("attention.query_key_value.bias"):  # per head: query, key, value
        attention = model.get_submodule(name.rsplit(".", 2)[0])
        heads = found.view(-1, 3, attention.head_size)
        heads[:, 1, attention.rotary_ndims :] = False
    return found


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon", "qwen3_next", "gpt_neox"])
def test_a_cached_prefix_gives_the_same_weights_and_is_computed_once(family, where, tmp_path):
    plain = tiny.build(family, 4)
    cached, before = copy.deepcopy(plain), copy.deepcopy(plain.state_dict())
    stage(plain, [2, 3], tmp_path)
    report, said, (first, last) = stage(cached, [2, 3], tmp_path, cache_frozen_prefix=where)
    assert not [line for line in said if "frozen" in line]
    assert report.cached == pytest.approx(2 / 3)
    assert last > 2.5 * first > 0, "one epoch in three passes the frozen blocks"
    wanted = plain.state_dict()
    for name, weight in cached.state_dict().items():
        differences = (weight - wanted[name])[decides(cached, name, weight)]
        assert float(differences.abs().max()) < 1e-6, name
    ids = torch.tensor([[5, 6, 7, 9, 11, 8, 20, 3]])
    with torch.no_grad():
        assert float((cached(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max()) < 1e-5
    assert any(not torch.equal(weight, before[name]) for name, weight in cached.state_dict().items())
    assert list(tmp_path.iterdir()) == []
    assert len(decoder.blocks(cached)) == 4


def test_the_backward_pass_ends_at_the_lowest_block_that_trains():
    model = tiny.build("llama", 4)
    sparse.freeze(model, whole(4), [2, 3], embeddings=False)
    grads = []
    for block in decoder.blocks(model):
        block.register_forward_hook(lambda module, args, output: grads.append(output.requires_grad))
    model(input_ids=torch.tensor([[5, 6, 7]]))
    assert grads == [False, False, True, True]
    assert prefix.frozen_blocks(model) == 2


def test_nothing_is_cached_where_something_at_the_start_trains():
    model = tiny.build("llama", 4)
    sparse.freeze(model, whole(4), [2], embeddings=True)
    assert prefix.frozen_blocks(model) == 0
    sparse.freeze(model, whole(4), [0, 2], embeddings=False)
    assert prefix.frozen_blocks(model) == 0


@pytest.mark.parametrize(
    ("family", "chosen", "reason"),
    [
        ("gpt2", [3], "dropout"),
        ("gemma3n_text", [3], "cannot be resumed"),
        ("llama", [0, 3], "the first block"),
    ],
)
def test_what_cannot_be_cached_is_said_and_trained_all_the_same(family, chosen, reason, tmp_path):
    model = tiny.build(family, 4)
    report, said, _ = stage(model, chosen, tmp_path, epochs=1, cache_frozen_prefix="memory")
    (line,) = [line for line in said if "frozen blocks" in line]
    assert reason in line
    assert (report.cached, report.loss > 0) == (0.0, True)


@pytest.mark.parametrize("noise", ["attention_dropout", "layerdrop", "router_jitter_noise"])
def test_a_block_that_computes_something_else_every_time_is_not_cached(noise):
    model = tiny.build("llama", 4)
    sparse.freeze(model, whole(4), [3], embeddings=False)
    assert prefix.refusal(model) is None
    setattr(decoder.blocks(model)[0].mlp, noise, 0.1)
    assert prefix.refusal(model) == "the model trains with dropout or noise"


def test_every_process_of_a_machine_keeps_rows(monkeypatch):
    model, row = tiny.build("llama", 2), Example((5, 6, 7, 8), 1)
    once = row.inputs * model.config.hidden_size * 4
    monkeypatch.setattr(prefix.room, "free_bytes", lambda device, swap: round(1.5 * once))
    assert prefix.no_room(model, [row, row], None, copies=1) is None
    assert "GiB needed" in str(prefix.no_room(model, [row, row], None, copies=2))


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(prefix.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    _, said, _ = stage(tiny.build("llama", 4), [3], tmp_path, cache_frozen_prefix="disk")
    assert "GiB free" in said[-1]


def test_memory_without_room_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(prefix.room, "free_bytes", lambda device, swap: 10)
    report, said, _ = stage(tiny.build("llama", 4), [3], tmp_path, cache_frozen_prefix="memory")
    assert "GiB needed, 0.0 GiB free in main memory" in said[-1]
    assert report.cached == 0


def test_a_step_that_is_taken_back_leaves_its_rows_to_come(tmp_path):
    model = tiny.build("llama", 3)
    sparse.freeze(model, whole(3), [2], embeddings=False)
    kept = prefix.Prefix(model, [TASK[0], TASK[0], TASK[1], TASK[1]])
    packed = packing.pack(TASK[:2], packing.ALONE, 0)
    kept.begin()
    for _ in range(2):
        with kept.resumed(packed):
            pass
        assert kept.left[TASK[0]] == kept.left[TASK[1]]
    assert (kept.left[TASK[0]], kept.read) == (0, packed.tokens)
    kept.take_back()
    assert (kept.left[TASK[0]], kept.left[TASK[1]], kept.read) == (2, 2, 0)


def test_a_step_that_memory_ended_is_not_counted_twice(tmp_path, monkeypatch):
    plain, ended = tiny.build("llama", 4), tiny.build("llama", 4)
    report, _, _ = stage(plain, [3], tmp_path, cache_frozen_prefix="memory")
    backward, calls = losses.backward, []

    def ending(*arguments):
        calls.append(1)
        if len(calls) == 5:  # in the second micro-batch of a step
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return backward(*arguments)

    monkeypatch.setattr(losses, "backward", ending)
    kept, made = [], prefix.Prefix.__init__
    monkeypatch.setattr(prefix.Prefix, "__init__", lambda self, *a, **k: (made(self, *a, **k), kept.append(self))[0])
    again, said, _ = stage(ended, [3], tmp_path, cache_frozen_prefix="memory", micro_batch_size=24)
    assert any("out of memory" in line for line in said)
    assert set(kept[0].left.values()) == {0}
    assert report.cached < again.cached < 1, "what the first try kept is read"


def test_only_rows_that_come_again_are_kept(tmp_path):
    model = tiny.build("llama", 3)
    sparse.freeze(model, whole(3), [2], embeddings=False)
    uses = [TASK[0], TASK[1], TASK[1]]
    kept = prefix.Prefix(model, uses)
    packed = packing.pack(uses[:2], packing.ALONE, 0)
    with kept.resumed(packed):
        pass
    assert set(kept.place) == {TASK[1]}
    assert kept._store.shape[0] == TASK[1].inputs


def test_the_cache_needs_frozen_embeddings():
    values = {"model": "m", "task": "t", "output": "o", "cache_frozen_prefix": "disk"}
    with pytest.raises(InputError, match="add --no-train-embeddings"):
        make(TrimConfig, values)
    assert make(TrimConfig, values | {"train_embeddings": False}).cache_frozen_prefix == "disk"
