"""Methods that `trimllm compare` sets beside ours: what they make is stock, and what they compute is what they say."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import helpers_run as h
import pytest
import tiny
import torch
from test_weights import naive_gradients
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from trimllm.baselines import METHODS, Cell, compressor, layer_drop, llm_pruner, one_shot, streamline, trimmed, width
from trimllm.baselines.job import SHARED, Job
from trimllm.blocks import decoder
from trimllm.blocks.layout import whole, without
from trimllm.config import CompareConfig, TrimConfig
from trimllm.errors import InputError
from trimllm.evaluation.evaluate import Scorer
from trimllm.training import packing

pytestmark = pytest.mark.usefixtures("fast")


@pytest.fixture(scope="module")
def job_of(tmp_path_factory):
    """A job of the named method, in a comparison whose fully fine-tuned model is the random base."""
    root = tmp_path_factory.mktemp("compare")
    base = h.save_base(root / "base", depth=4)
    task = h.save_task(root / "task", train=24, test=8)
    full = root / "cells" / "full"
    h.save_base(full / "trained", depth=4)
    (full / "row.json").write_text(json.dumps({"status": "done", "checkpoint": "cells/full/model"}), encoding="utf-8")

    def make(name, keep=0.5, **changes):
        quick = {"calibration_size": 6, "lr": 1e-3, "batch_size": 128, "eval_batch_size": 96, "device": "cpu"}
        command = CompareConfig(model=str(base), task=str(task), output=str(root), **(quick | changes))
        job = Job(command, Cell(METHODS[name], keep), root)
        job.folder.mkdir(parents=True, exist_ok=True)
        return job

    return make


def reloaded(product):
    return AutoModelForCausalLM.from_pretrained(product.checkpoint).eval()


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def logits(model):
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_layer_drop_makes_a_stock_checkpoint_of_full_depth_without_traces(job_of):
    job = job_of("layer-drop")
    product = layer_drop.run(job)
    model = reloaded(product)
    assert decoder.depth(model) == 4
    before = job.load().model
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in before.parameters())
    assert not torch.equal(
        model.state_dict()["model.layers.3.mlp.up_proj.weight"], before.model.layers[3].mlp.up_proj.weight
    )
    assert product.tokens > 0
    # Late in the training block l of 4 is skipped with probability l / 8: 31 % on average.
    assert 20 < int(product.note.partition("%")[0]) < 42


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layer_drop_that_keeps_everything_is_plain_tuning_bit_for_bit(job_of, checkpointing):
    job = job_of("layer-drop", gradient_checkpointing=checkpointing)
    plain, dropped = job.load(), job.load()
    job.tune(plain, 1, stage=0)
    with layer_drop.dropping(dropped.model, seed=0, limit=1.0) as drops:
        job.tune(dropped, 1, stage=0, on_step=drops.progress)
    expected = weights(plain.model)
    assert drops.drawn > drops.skipped == 0
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(dropped.model).items())
    assert not any("forward" in vars(block) for block in decoder.blocks(dropped.model))
    hooks = [one.model.get_input_embeddings()._forward_hooks for one in (plain, dropped)]
    assert len(hooks[0]) == len(hooks[1])


def test_theta_falls_from_one_to_its_limit_as_published():
    assert layer_drop.theta(0, 0.5) == 1
    assert layer_drop.theta(0.01, 0.5) == pytest.approx(0.5 * 2.718281828**-1 + 0.5)
    assert layer_drop.theta(1, 0.5) == pytest.approx(0.5)


def test_a_kept_block_is_scaled_and_a_skipped_one_is_the_identity(job_of):
    model = job_of("layer-drop").load().model.eval()
    kept = {place: [] for place in range(4)}
    with layer_drop.dropping(model, seed=3, limit=0.5) as drops:
        drops.progress(1, 1)
        stream = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
        block = decoder.blocks(model)[3]
        positions = model.model.rotary_emb(stream, torch.arange(5)[None])
        whole = block(stream, position_embeddings=positions)
        model.train()
        outputs = []
        for _ in range(2000):
            drops.draw()
            for place in kept:
                kept[place].append(drops.kept[place])
        for drops.kept in ([True] * 4, [False] * 4):
            outputs.append(block(stream, position_embeddings=positions))
        model.eval()
        assert torch.equal(block(stream, position_embeddings=positions), whole)
    torch.testing.assert_close(outputs[0], stream + 2 * (whole - stream))
    assert torch.equal(outputs[1], stream)
    torch.testing.assert_close((outputs[0] + outputs[1]) / 2, whole)  # p = 1/2: right on average
    shares = [sum(kept[place]) / 2000 for place in range(4)]
    assert shares == pytest.approx([7 / 8, 6 / 8, 5 / 8, 4 / 8], abs=0.04)


@pytest.mark.parametrize("way", ["own", "around"])
def test_with_gradient_checkpointing_the_same_blocks_are_skipped_again(job_of, way):
    """Newer releases of transformers checkpoint inside of what skips, so that it runs once; older ones around it."""
    trained, passes, drawn = [], [], []
    for checkpointing in (False, True):
        job = job_of("layer-drop", gradient_checkpointing=checkpointing and way == "own")
        loaded, attended = job.load(), []
        loaded.model.model.layers[0].mlp.register_forward_pre_hook(lambda m, *_: attended.append(m.training))  # noqa: B023
        with layer_drop.dropping(loaded.model, seed=1) as drops:
            for block in decoder.blocks(loaded.model) if checkpointing and way == "around" else ():
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            job.tune(loaded, 4, stage=0, on_step=drops.progress)
        assert drops.skipped > 0
        passes.append(sum(attended))
        trained.append(weights(loaded.model))
        drawn.append((drops.drawn, drops.skipped, drops.generator.get_state().tolist()))
    assert passes[1] > passes[0]
    assert drawn[1] == drawn[0]
    for name, tensor in trained[0].items():
        torch.testing.assert_close(tensor, trained[1][name], msg=name)


def test_streamline_makes_a_stock_checkpoint_of_the_kept_depth(job_of):
    job = job_of("streamline", epochs_per_drop=5.0)
    product = streamline.run(job)
    assert decoder.depth(reloaded(product)) == 2
    first, last = product.note.split()[1], product.note.split()[3]
    assert int(last) - int(first) == 2
    assert "; its mean squared error went from " in product.note
    kept = [i for i in range(4) if not int(first) < i <= int(last)]
    plan = json.loads((product.checkpoint / "plan.json").read_text(encoding="utf-8"))
    assert plan["layers"] == kept
    # Ten epochs in all, as other methods train; one of them is of the replacement.
    assert product.tokens == pytest.approx(10 * sum(len(row.ids) for row in one_epoch(job)), rel=0.01)


def one_epoch(job):
    return [row for rows in job.plan(job.load(job.full), 1, 0) for row in rows]


def states_of(model, inputs):
    """Before every block and after the last one, by hand."""
    states = []
    hooks = [block.register_forward_pre_hook(lambda _, args: states.append(args[0])) for block in decoder.blocks(model)]
    hooks.append(decoder.blocks(model)[-1].register_forward_hook(lambda _, _args, output: states.append(output)))
    with torch.no_grad():
        model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize("length", [2, 3, 4])
def test_streamline_finds_the_run_with_the_largest_cosine(job_of, length):
    job = job_of("streamline")
    loaded = job.load(job.full)
    scorer, _ = job.calibration(loaded)
    sums, right = torch.zeros(4 - length + 1), scorer.right_only(loaded.model)
    for batch in right.batches:
        states = states_of(loaded.model, batch.inputs)
        for start in range(len(sums)):
            cosine = torch.nn.functional.cosine_similarity(states[start], states[start + length], dim=-1)
            sums[start] += cosine[batch.real].sum()
    tokens = sum(int(batch.real.sum()) for batch in right.batches)
    start, cosine = streamline.find_run(job, loaded, length)
    assert start == int(sums.argmax())
    assert cosine == pytest.approx(float(sums.max()) / tokens, abs=1e-5)


def test_a_run_that_surgery_refuses_is_not_chosen(job_of, monkeypatch):
    job = job_of("streamline")
    loaded = job.load(job.full)
    best, _ = streamline.find_run(job, loaded, 2)
    lost = without(whole(decoder.depth(loaded.model)), [best + 1])
    one = SimpleNamespace(refusal=lambda _, layout: "no period" if layout == lost else None)
    monkeypatch.setattr(streamline, "legality", one)
    assert streamline.find_run(job, loaded, 2)[0] != best
    monkeypatch.setattr(streamline, "legality", SimpleNamespace(refusal=lambda *_: "no period"))
    with pytest.raises(InputError, match="no run of 2 blocks can become one"):
        streamline.find_run(job, loaded, 2)


def reference_error(model, block, start, length, rows):
    """Mean squared error of `block` against the run, one row at a time, no packing, no padding."""
    total = count = 0
    for row in rows:
        states = states_of(model, {"input_ids": torch.tensor([row.ids[:-1]])})
        positions = model.model.rotary_emb(states[0], torch.arange(row.inputs)[None])
        with torch.no_grad():
            found = block(states[start], position_embeddings=positions)
        total += float((found - states[start + length]).square().sum())
        count += found.numel()
    return total / count


def test_the_trained_replacement_is_nearer_to_the_run_than_its_first_block(job_of, monkeypatch):
    job, made, stages = job_of("streamline"), [], streamline.train.adamw
    monkeypatch.setattr(streamline.train, "adamw", lambda *asked: made.append(asked) or stages(*asked))
    loaded = job.load(job.full)
    before = weights(loaded.model)
    steps = job.plan(loaded, 6, 0)
    block, errors = streamline.train_replacement(loaded.model, 1, 3, steps, job.trim_settings(keep=0.5), 0)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(loaded.model).items())
    first, rows = decoder.blocks(loaded.model)[1], one_epoch(job)
    untrained, trained = (reference_error(loaded.model, one, 1, 3, rows) for one in (first, block))
    assert trained < 0.8 * untrained
    assert [len(parameters) for parameters, *_ in made] == [len(list(block.parameters()))], "a stage's optimizer"
    # The first step is taken with the first block as it is.
    assert errors[0] == pytest.approx(reference_error(loaded.model, first, 1, 3, steps[0]), rel=1e-3)


def test_the_error_leaves_padding_out_and_does_not_depend_on_packing_or_micro_batches(job_of):
    job = job_of("streamline")
    loaded = job.load(job.full)
    rows = sorted(one_epoch(job), key=lambda row: row.inputs)[::6]
    expected = reference_error(loaded.model, decoder.blocks(loaded.model)[0], 0, 2, rows)
    for way in (packing.ALONE, packing.Way(128)):
        packed = packing.pack(rows, way, 0)
        found = streamline.mean_squared(loaded.model, 0, 2, decoder.blocks(loaded.model)[0], packed)
        assert found.item() == pytest.approx(expected, rel=1e-4)
    errors = []
    for size in (None, 1):
        settings = job.trim_settings(keep=0.5, micro_batch_size=size)
        errors.append(streamline.train_replacement(loaded.model, 0, 2, [rows, rows], settings, 0)[1])
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_llm_pruner_makes_a_narrow_stock_checkpoint_recovered_by_lora(job_of, monkeypatch):
    pruned = {}
    prune = width.prune

    def keeping(model, *arguments):
        prune(model, *arguments)
        pruned.update(weights(model))

    monkeypatch.setattr(width, "prune", keeping)
    job = job_of("llm-pruner")
    product = llm_pruner.run(job)
    model, before = reloaded(product), job.load(job.full).model
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (4, 2, 1)
    assert (config.head_dim, config.intermediate_size) == (8, 24)
    share = width.block_parameters(model) / width.block_parameters(before)
    assert share == pytest.approx(0.5, abs=0.01)
    assert product.note == f"1 of 2 KV heads, 24 of 48 MLP channels: {share:.1%} of the blocks' parameters left"
    after = weights(model)
    assert after.keys() == pruned.keys()
    for name, tensor in after.items():
        change = tensor - pruned[name]
        if name.endswith("_proj.weight"):
            assert 0 < torch.linalg.matrix_rank(change.double(), rtol=1e-4) <= llm_pruner.RANK
        else:
            assert not change.any()


def reference_importance(model, gradients, place, name, rows):
    """Importance of some rows (of the output projections: columns) of a layer, weight by weight."""
    total = 0.0
    for kind in ("weight", "bias"):
        full = f"model.layers.{place}.{name}.{kind}"
        if full in gradients and not (kind == "bias" and name.endswith(("o_proj", "down_proj"))):
            product = (model.get_parameter(full) * gradients[full]).abs().double().detach()
            total += float((product[:, rows] if name.endswith(("o_proj", "down_proj")) else product[rows]).sum())
    return total


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_groups_of_largest_importance_stay(family, tokenizer, questions):
    model, old = (tiny.build(family, 2) for _ in range(2))
    gradients = naive_gradients(old, tokenizer, questions)
    scorer = Scorer(model, tokenizer, questions)
    new = width.wanted(model, 0.5)
    width.prune(model, llm_pruner.importance(model, scorer), new)
    assert new == width.widths(model) == width.Widths(2, 1, 24)
    for place in range(2):
        heads = []
        for head in range(2):
            queries, keys = slice(16 * head, 16 * head + 16), slice(8 * head, 8 * head + 8)
            parts = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}
            heads.append(
                sum(reference_importance(old, gradients, place, f"self_attn.{n}", r) for n, r in parts.items())
            )
        channels = [
            sum(reference_importance(old, gradients, place, f"mlp.{n}", [channel]) for n in width.MLP)
            for channel in range(48)
        ]
        kept = sorted(sorted(range(48), key=lambda channel: -channels[channel])[:24])
        best = heads.index(max(heads))
        before, after = old.model.layers[place], model.model.layers[place]
        assert torch.equal(after.mlp.up_proj.weight, before.mlp.up_proj.weight[kept])
        assert torch.equal(after.mlp.gate_proj.weight, before.mlp.gate_proj.weight[kept])
        assert torch.equal(after.mlp.down_proj.weight, before.mlp.down_proj.weight[:, kept])
        queries, keys = slice(16 * best, 16 * best + 16), slice(8 * best, 8 * best + 8)
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            one, other = getattr(after.self_attn, name), getattr(before.self_attn, name)
            assert torch.equal(one.weight, other.weight[rows])
            assert one.bias is None or torch.equal(one.bias, other.bias[rows])
        assert torch.equal(after.self_attn.o_proj.weight, before.self_attn.o_proj.weight[:, queries])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2"])
def test_pruning_zeroed_groups_and_pruning_nothing_leave_the_logits(family, tokenizer, questions):
    model = tiny.build(family, 2)
    expected = logits(model)
    everything = width.wanted(model, 1.0)
    assert everything == width.widths(model)
    width.prune(model, llm_pruner.importance(model, Scorer(model, tokenizer, questions)), everything)
    assert torch.equal(logits(model), expected)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight[:, :16] = 0
            block.mlp.down_proj.weight[:, ::2] = 0
    expected = logits(model)
    scores = [(torch.tensor([0.0, 1.0]), torch.arange(48) % 2 * 1.0) for _ in range(2)]
    width.prune(model, scores, width.Widths(2, 1, 24))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**tiny.COMMON, "num_hidden_layers": 1, **changes}))


def test_what_heads_cannot_give_channels_do():
    # Of 7232 parameters 2560 are the attention's, 64 the norms', and 96 every channel's.
    one_head = llama(num_key_value_heads=1)
    new = width.wanted(one_head, 0.75)
    assert (new.heads, new.channels) == (1, 29)
    before, scores = width.block_parameters(one_head), [(torch.ones(1), torch.ones(48))]
    width.prune(one_head, scores, new)
    assert width.block_parameters(one_head) / before == pytest.approx(0.75, abs=0.01)
    with pytest.raises(InputError, match=r"--keep 0.2: with 1 KV heads a block cannot get below 38%: keep more"):
        width.wanted(llama(num_key_value_heads=1), 0.2)
    # 3 of 4 heads do not divide the hidden size of 32: 2 or 4.
    assert width.wanted(llama(num_key_value_heads=4), 0.7).heads in (2, 4)
    # Wide MLPs keep a multiple of eight.
    assert width.wanted(llama(intermediate_size=1000), 0.3).channels % 8 == 0


@pytest.mark.parametrize("family", ["gpt2", "phi3", "olmo2", "mixtral", "stablelm", "diffllama", "qwen3_5_text"])
def test_families_with_other_layers_are_refused(family):
    with pytest.raises(InputError, match="model type"):
        width.wanted(tiny.build(family, 4), 0.5)


@pytest.mark.parametrize("name", ["wanda", "gptq"])
def test_compressing_takes_as_long_as_it_does_without_loading_and_saving(job_of, monkeypatch, name):
    now = [0.0]

    def takes(seconds, result=None):
        def work(*_, **__):
            now[0] += seconds
            return result

        return work

    job = job_of(name, None)
    loaded = job.load(job.full)
    monkeypatch.setattr(compressor, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(job, "load", takes(100, loaded))
    for step, seconds in (("calibration", 1), ("compress", 20), ("save_sparse", 100), ("save_quantized", 100)):
        monkeypatch.setattr(compressor, step, takes(seconds, []))
    monkeypatch.setattr(compressor, "recipe", lambda *_: [])
    assert compressor.run(job).compress_seconds == 21


def test_rows_of_trimllm_choose_by_the_strategy_that_is_asked_for_and_peers_by_their_own(job_of, monkeypatch):
    asked = {}

    def trim(job, start, folder=None, **changes):
        asked[job.cell.method.name] = job.trim_settings(**{"keep": 0.5, **changes}).strategy

    monkeypatch.setattr(Job, "trim", trim)
    for module, names in ((trimmed, ("trim", "trim-pair")), (one_shot, ("one-shot", "shortgpt", "taylor"))):
        for name in names:
            module.run(job_of(name, strategy="loss"))
    assert asked == {"trim": "loss", "trim-pair": "loss", "one-shot": "loss", "shortgpt": "bi", "taylor": "taylor"}


def test_settings_of_the_comparison_that_mean_nothing_to_a_method_do_not_stop_it(job_of):
    job = job_of("random", train_ratio=0.5)
    assert job.trim_settings(keep=0.5).train_ratio == 0.5
    assert job.trim_settings(keep=0.5, sparse_update="off").sparse_update == "off"
    one = job_of("one-shot", sparse_update="dynamic").trim_settings(keep=0.5, one_shot=True, sparse_update="dynamic")
    assert one.sparse_update == "filled"  # the default: by its only scan


def test_settings_that_a_comparison_hands_to_its_runs_have_the_defaults_of_these():
    assert len(SHARED) > 30
    for name in SHARED:
        ours, theirs = CompareConfig.model_fields[name], TrimConfig.model_fields[name]
        assert ours.get_default(call_default_factory=True) == theirs.get_default(call_default_factory=True), name
