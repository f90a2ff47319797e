"""What explains a scan, against slow and obvious references: one question at a time, hooks and sums by hand."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial

import helpers_run as h
import numpy as np
import pytest
import reference
import tiny
import torch

from trimllm import cli, config
from trimllm.analysis import lens, probes, ranks, summary, tracing
from trimllm.blocks import decoder, families
from trimllm.blocks.layout import Unit, units, whole
from trimllm.errors import InputError
from trimllm.evaluation import forward
from trimllm.evaluation.encoding import Encoded
from trimllm.evaluation.evaluate import Scorer
from trimllm.importance import activations, scan
from trimllm.tasks.items import Item

DEPTH = 3
ROWS = [
    ("q: the cat sat on a:", (" no", " mat")),
    ("q: a dog ran to a:", (" the hat", " yes")),
    ("q: man a:", (" a", " o")),
]
ITEMS = [Item(f"rows:{n}", prompt, choices, n % 2) for n, (prompt, choices) in enumerate(ROWS, start=1)]
SINGLE = [Item(f"rows:{n}", prompt, (" a",)) for n, (prompt, _) in enumerate(ROWS, start=1)]


@pytest.fixture(scope="module")
def llama():
    """Embeddings whose mean is not 0, so that their deviation is not their size."""
    model = tiny.build("llama", DEPTH)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(0.5)
    return model


def prepared(model, tokenizer, items=ITEMS, budget=24):
    """(questions, batches, spans); several rows a batch, and several batches."""
    scorer = Scorer(model, tokenizer, items, token_budget=budget, branches=False)
    asked = lens.questions(scorer)
    return asked, lens.batches(model, scorer, asked), tracing.spans(asked)


def ids_of(one: Encoded) -> torch.Tensor:
    return torch.tensor([[*one.prompt, *one.target]])


def halves_of(model, kind="sublayer"):
    return units(kind, whole(decoder.depth(model)))


def keep_input(where, module, args):
    where.append(args[0])


def keep_output(where, module, args, output):
    where.append((output[0] if isinstance(output, tuple) else output).clone())


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "cohere", "opt-post", "granite"])
def test_lens_behind_the_last_block_is_what_the_model_itself_says(family, tokenizer):
    model = tiny.build(family, DEPTH)
    asked, made, _ = prepared(model, tokenizer)
    found = lens.logit_lens(model, made, units("block", whole(DEPTH)))
    for column, one in enumerate(asked):
        logits = model(input_ids=torch.tensor([one.prompt])).logits[0, -1]
        assert found["lens_probability"][-1, column] == pytest.approx(
            100 * float(logits.softmax(-1)[one.target[0]]), rel=1e-3
        )
        assert found["lens_accuracy"][-1, column] == 100 * (int(logits.argmax()) == one.target[0])
    gains = np.diff(found["lens_probability"], axis=0)
    assert found["lens_gain"][1:] == pytest.approx(gains, abs=1e-4)
    assert np.abs(gains).max() > 1e-3


@torch.no_grad()
def test_lens_amid_the_model_is_norm_and_head_of_the_stream(llama, tokenizer):
    asked, made, _ = prepared(llama, tokenizer)
    found = lens.logit_lens(llama, made, halves_of(llama))
    for column, one in enumerate(asked):
        stream: list[torch.Tensor] = []
        with ExitStack() as hooks:
            for block in llama.model.layers:
                middle = block.post_attention_layernorm
                hooks.callback(middle.register_forward_pre_hook(partial(keep_input, stream)).remove)
                hooks.callback(block.register_forward_hook(partial(keep_output, stream)).remove)
            llama(input_ids=torch.tensor([one.prompt]))
        for row, hidden in enumerate(stream):
            logits = llama.lm_head(llama.model.norm(hidden[0, -1]))
            expected = 100 * float(logits.softmax(-1)[one.target[0]])
            assert found["lens_probability"][row, column] == pytest.approx(expected, rel=1e-3)


NORM_AND_HEAD = {
    "llama": lambda m, x: m.lm_head(m.model.norm(x)),
    "gpt2": lambda m, x: m.lm_head(m.transformer.ln_f(x)),
    "gptj": lambda m, x: m.lm_head(m.transformer.ln_f(x)),
    "granite": lambda m, x: m.lm_head(m.model.norm(m.config.residual_multiplier * x)) / m.config.logits_scaling,
    "gemma2": lambda m, x: 30 * torch.tanh(m.lm_head(m.model.norm(x)) / 30),
}
WRITES = {"gemma2": "post_feedforward_layernorm"}


@torch.no_grad()
@pytest.mark.parametrize("family", NORM_AND_HEAD)
def test_promotion_is_norm_and_head_of_what_the_mlp_module_gives(family, tokenizer):
    model = tiny.build(family, DEPTH)
    asked, made, _ = prepared(model, tokenizer)
    found = lens.promotion(model, made, units("block", whole(DEPTH)))["promotion"]
    for column, one in enumerate(asked):
        given: list[torch.Tensor] = []
        with ExitStack() as hooks:
            for block in decoder.blocks(model):
                module = getattr(block, WRITES.get(family, "mlp"))
                hooks.callback(module.register_forward_hook(partial(keep_output, given)).remove)
            model(input_ids=torch.tensor([one.prompt]))
        for row, output in enumerate(given):
            logits = NORM_AND_HEAD[family](model, output[0, -1])
            expected = float(logits[one.target[0]] - logits.mean())
            assert found[row, column] == pytest.approx(expected, rel=1e-3, abs=1e-3)


@torch.no_grad()
def test_promotion_of_attention_units_is_of_the_attention(llama, tokenizer):
    asked, made, _ = prepared(llama, tokenizer)
    found = lens.promotion(llama, made, halves_of(llama))["promotion"]
    by_block = lens.promotion(llama, made, units("block", whole(DEPTH)))["promotion"]
    assert found[1::2] == pytest.approx(by_block, rel=1e-4, abs=1e-5)
    given: list[torch.Tensor] = []
    handle = llama.model.layers[1].self_attn.register_forward_hook(partial(keep_output, given))
    llama(input_ids=torch.tensor([asked[0].prompt]))
    handle.remove()
    logits = NORM_AND_HEAD["llama"](llama, given[0][0, -1])
    assert found[2, 0] == pytest.approx(float(logits[asked[0].target[0]] - logits.mean()), rel=1e-3)


def test_states_are_read_in_chunks_as_they_are_at_once(llama, tokenizer, monkeypatch):
    _, made, _ = prepared(llama, tokenizer)
    every = halves_of(llama)
    at_once = [lens.logit_lens(llama, made, every), lens.promotion(llama, made, every)]
    monkeypatch.setattr(forward, "LOGITS", 1)
    monkeypatch.setattr(forward, "LEAST_PLACES", 5)
    for one, other in zip(
        at_once, [lens.logit_lens(llama, made, every), lens.promotion(llama, made, every)], strict=True
    ):
        for name, values in one.items():
            assert other[name] == pytest.approx(values, rel=1e-4, abs=1e-4)


def test_question_tokens_are_those_between_what_all_prompts_share():
    asked = [Encoded(n, prompt, ((9,),)) for n, prompt in enumerate([(1, 2, 5, 6, 3), (1, 2, 7, 3), (1, 2, 3)])]
    assert tracing.spans(asked) == {0: range(2, 4), 1: range(2, 3), 2: range(3)}
    assert tracing.spans(asked[:1]) == {0: range(5)}


@torch.no_grad()
def slow_trace(model, asked, own, unit, seed, samples):
    """Per question: clean, corrupted, state restored, output restored; module by module of a Llama."""
    blocks, embed = model.model.layers, model.model.embed_tokens
    spread = 3 * torch.cat([embed(torch.tensor(o.prompt))[list(own[o.item])].flatten() for o in asked]).std(
        correction=0
    )
    rows = []
    for one in asked:
        place = len(one.prompt) - 1

        def answer(embedded, module=None, value=None, one=one, place=place):
            seen = {}

            def put(m, args, output):
                hidden = output[0] if isinstance(output, tuple) else output
                hidden = hidden.clone()
                hidden[0, place] = value(hidden[0, place], seen["in"])
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            with ExitStack() as hooks:
                block = blocks[unit.index]
                hooks.callback(block.register_forward_pre_hook(lambda m, a: seen.update({"in": a[0][0, place]})).remove)
                if module is not None:
                    hooks.callback(module.register_forward_hook(put).remove)
                hooks.callback(block.register_forward_hook(lambda m, a, o: seen.update(out=o[0, place])).remove)
                hooks.callback(block.mlp.register_forward_hook(lambda m, a, o: seen.update(mlp=o[0, place])).remove)
                hooks.callback(
                    block.self_attn.register_forward_hook(lambda m, a, o: seen.update(attention=o[0][0, place])).remove
                )
                logits = model(inputs_embeds=embedded[:, :-1]).logits[0].log_softmax(-1)
            ids = range(place, place + len(one.target))
            picked = torch.stack([logits[i, token] for i, token in zip(ids, one.target, strict=True)])
            return 100 * float(picked.mean().exp()), seen

        plain = embed(ids_of(one))
        clean, was = answer(plain)
        found = []
        for sample in range(samples):
            span = own[one.item]
            noise = np.random.default_rng([seed, one.item, sample]).standard_normal((len(span), plain.shape[-1]))
            blurred = plain.clone()
            blurred[0, list(span)] += spread * torch.tensor(noise, dtype=torch.float32)
            corrupted, _ = answer(blurred)
            if unit.kind == "block":
                state, _ = answer(blurred, blocks[unit.index], lambda now, before, was=was: was["out"])
                added, _ = answer(
                    blurred, blocks[unit.index], lambda now, before, was=was: before + was["out"] - was["in"]
                )
                found.append([clean, corrupted, state - corrupted, added - corrupted])
            else:
                module = blocks[unit.index].mlp if unit.kind == "mlp" else blocks[unit.index].self_attn
                added, _ = answer(blurred, module, lambda now, before, was=was: was[unit.kind])
                found.append([clean, corrupted, added - corrupted])
        rows.append(np.mean(found, axis=0))
    return np.transpose(rows)


@pytest.mark.parametrize("unit", [Unit("block", 1), Unit("attention", 1), Unit("mlp", 0)], ids=str)
def test_traced_effects_are_those_of_one_question_and_one_hook_at_a_time(llama, tokenizer, unit):
    asked, made, own = prepared(llama, tokenizer)
    assert len(made) > 1
    assert len({len(one.target) for one in asked}) > 1
    every = halves_of(llama, "block" if unit.kind == "block" else "sublayer")
    found = tracing.trace(llama, made, own, every, seed=3, samples=2)
    names = ["tracing_state", "tracing_output"] if unit.kind == "block" else ["tracing_output"]
    rows = [found["clean"], found["corrupted"], *(found[name][every.index(unit)] for name in names)]
    assert set(found) == {"clean", "corrupted", *names}
    expected = slow_trace(llama, asked, own, unit, seed=3, samples=2)
    assert np.stack(rows) == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert np.abs(expected[2:]).max() > 0.1


def test_without_noise_nothing_is_corrupted_and_nothing_can_be_restored(llama, tokenizer):
    asked, made, own = prepared(llama, tokenizer)
    for kind in ("block", "sublayer"):
        found = tracing.trace(llama, made, own, halves_of(llama, kind), noise=0.0, samples=1)
        assert found["corrupted"] == pytest.approx(found["clean"])
        assert found["tracing_output"] == pytest.approx(0, abs=1e-3)
    expected = [row[item.answer] for row, item in zip(reference.logliks(llama, tokenizer, ITEMS), ITEMS, strict=True)]
    lengths = [len(one.target) for one in asked]
    assert found["clean"] == pytest.approx(100 * np.exp(np.divide(expected, lengths)), rel=1e-4)


@torch.no_grad()
def test_everything_restored_at_all_places_of_the_answer_gives_the_clean_model(llama, tokenizer):
    _, made, own = prepared(llama, tokenizer, budget=60)
    batch = made[0]
    assert len(batch.where) > len(batch.owners) == 3
    every = [(i, "") for i in range(DEPTH)]
    with probes.reading(llama, every, batch.where) as written:
        clean = forward.batch_pieces(llama, batch)
    with tracing._noisy(llama, batch, own, 3.0, 0, 0):
        corrupted = forward.batch_pieces(llama, batch)
        with probes.writing(llama, written, batch.where):
            restored = forward.batch_pieces(llama, batch)
    for owner, (loglik, _, _) in clean.items():
        assert restored[owner][0] == pytest.approx(loglik, abs=1e-4)
        assert corrupted[owner][0] != pytest.approx(loglik, abs=1e-2)


def test_the_last_state_alone_brings_an_answer_of_one_token_back_and_noise_hides_it(llama, tokenizer):
    _, made, own = prepared(llama, tokenizer, SINGLE)
    found = tracing.trace(llama, made, own, halves_of(llama, "block"), seed=1, samples=2)
    assert found["corrupted"] + found["tracing_state"][-1] == pytest.approx(found["clean"], rel=1e-4)
    assert np.abs(found["clean"] - found["corrupted"]).min() > 1e-3
    other = tracing.trace(llama, made, own, halves_of(llama, "block"), seed=2, samples=2)
    assert not np.allclose(other["corrupted"], found["corrupted"])
    alone = tracing.trace(
        llama, prepared(llama, tokenizer, SINGLE, 9)[1], own, halves_of(llama, "block"), seed=1, samples=2
    )
    assert alone["tracing_state"] == pytest.approx(found["tracing_state"], abs=1e-3)


NO_PROMOTION = {"opt-post", "bloom-post", "gemma3n_text", "gemma4_text", "nemotron_h", "nemotron_h-moe", "dbrx"} | {
    "mamba", "mamba2", "recurrent_gemma", "olmo_hybrid",
}  # fmt: skip
NO_TRACING = {"gemma3n_text", "gemma4_text"}
DEPTHS = {"gemma3n_text": 4, "gemma4_text": 4, "llama4_text": 3}
"""Where two layers cannot be, or do not see the question (only every third sees past a chunk of four tokens)."""
NAMES = [name for name in (*tiny.CONFIGS, *tiny.TOWERS) if name != "minimax"]  # cannot be cut, so it is never scanned


@torch.no_grad()
@pytest.mark.parametrize("family", NAMES)
def test_family_is_measured_or_refused(family, tokenizer):
    model = tiny.build(family, DEPTHS.get(family, 2))
    _, made, own = prepared(model, tokenizer, SINGLE[:2], 60)
    kind = "sublayer" if families.bypassable(decoder.text_config(model)) else "block"
    every = halves_of(model, kind)
    looked = lens.logit_lens(model, made, every)["lens_probability"][-1]
    expected = [row[0] for row in reference.logliks(model, tokenizer, SINGLE[:2])]
    assert looked == pytest.approx(100 * np.exp(expected), rel=1e-2)
    if family in NO_PROMOTION:
        with pytest.raises(InputError, match=r"^promotion: .*(opt|bloom|gemma|nemotron|dbrx|mamba|olmo)"):
            lens.promotion(model, made, every)
    else:
        assert np.isfinite(lens.promotion(model, made, every)["promotion"]).all()
    if family in NO_TRACING:
        with pytest.raises(InputError, match="causal tracing: the blocks of gemma"):
            tracing.trace(model, made, own, every, samples=1)
        return
    found = tracing.trace(model, made, own, every[-2:], samples=1)
    assert np.isfinite(found["tracing_output" if "tracing_output" in found else "tracing_state"]).all()
    restored = everything_restored(model, made[0], own, every)
    assert restored == pytest.approx(found["clean"], rel=1e-2)
    assert found["corrupted"] != pytest.approx(found["clean"], rel=1e-2)


def everything_restored(model, batch, own, every):
    """Probability (percent) of the answers under noise when all units write at the last token what they do without."""
    at, _ = lens.last_tokens(batch)
    modules = [
        (unit.index, name)
        for unit in every
        for name in ([""] if unit.kind == "block" else probes.half_modules(model, unit.kind, unit.index))
    ]
    with probes.reading(model, modules, at) as written:
        clean = forward.batch_pieces(model, batch)
    with tracing._noisy(model, batch, own, 1.0, 0, 0), probes.writing(model, written, at):
        pieces = forward.batch_pieces(model, batch)
    assert set(pieces) == set(clean)
    return [100 * np.exp(pieces[item, 0][0]) for item in sorted(item for item, _ in batch.owners)]


def test_a_tail_or_a_half_that_is_not_as_thought_is_refused(tokenizer, monkeypatch):
    model = tiny.build("llama", DEPTH)
    _, made, own = prepared(model, tokenizer)
    monkeypatch.setattr(probes, "half_modules", lambda model, half, i: ["input_layernorm"])
    with pytest.raises(InputError, match="what the attention 0 of llama adds cannot be set alone"):
        tracing.trace(model, made, own, halves_of(model), samples=1)
    kept = activations.keeping_stream
    monkeypatch.setattr(
        activations,
        "keeping_stream",
        lambda *a, **n: (kept(*a, **n)[0], {k: 2 + v for k, v in kept(*a, **n)[1].items()}),
    )
    for measure, name in ((lens.logit_lens, "logit lens"), (lens.promotion, "promotion")):
        with pytest.raises(InputError, match=f"{name}: the tail of llama does not give its logits"):
            measure(model, made, halves_of(model))


def test_ties_share_the_mean_of_their_places():
    assert ranks.ranks(np.array([3.0, 1.0, 3.0, 2.0, 3.0])).tolist() == [4, 1, 4, 2, 4]


def test_rank_correlation_with_ties_is_the_one_by_hand():
    # ranks 1, 2.5, 2.5, 4 and 2, 1, 3.5, 3.5; less 2.5: sum of products 2.25, of squares 4.5 and 4.5
    assert ranks.spearman(np.array([1.0, 5, 5, 9]), np.array([2.0, 1, 7, 7])) == pytest.approx(2.25 / 4.5)
    assert ranks.spearman(np.arange(5.0), np.exp(np.arange(5.0))) == pytest.approx(1)
    assert ranks.spearman(np.arange(5.0), -np.arange(5.0)) == pytest.approx(-1)
    for bad in ([1.0, 1, 1], [1.0, np.nan, 2]):
        assert np.isnan(ranks.spearman(np.arange(3.0), np.array(bad)))
        assert np.isnan(ranks.permutation_p(np.arange(3.0), np.array(bad), 0))
    assert np.isnan(ranks.spearman(np.arange(2.0), np.arange(2.0)))


def test_p_is_the_share_of_orders_that_agree_as_much():
    # of the 24 orders of four values 2 give +-1, and 8 at least 0.8 or at most -0.8
    grow = np.arange(4.0)
    assert ranks.permutation_p(grow, grow, 0) == pytest.approx(2 / 24, abs=0.01)
    assert ranks.permutation_p(grow, np.array([0.0, 1, 3, 2]), 0) == pytest.approx(8 / 24, abs=0.02)
    assert ranks.permutation_p(np.arange(30.0), np.arange(30.0), 0) == 1 / (1 + ranks.ROUNDS)


def test_a_scan_agrees_with_itself_as_far_as_its_halves_order_the_units_alike():
    same = np.repeat([[0.0], [1], [0.5]], 8, axis=1)
    assert summary.halves(same, 0) == pytest.approx(1)
    noise = np.random.default_rng(0).integers(0, 2, (30, 100)).astype(float)
    assert abs(summary.halves(noise, 0)) < 0.2
    for nothing in (np.ones((4, 10)), np.ones((4, 0)), np.ones((4, 1))):
        assert np.isnan(summary.halves(nothing, 0))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return h.save_base(tmp_path_factory.mktemp("base"), depth=4)


def call(capsys, *words):
    code = cli.main(["scan", *map(str, words)])
    return code, *capsys.readouterr()


def test_scan_with_analysis_writes_measures_and_their_rank_correlations(base, tmp_path, capsys):
    task, output = h.save_task(tmp_path / "task"), tmp_path / "out"
    words = ["--model", base, "--task", task, "--calibration-size", 12, "--output", output]
    code, out, err = call(capsys, *words, "--analysis", "--analysis-items", 2)
    assert code == 0, err
    made = json.loads((output / "analysis.json").read_text())
    scanned = json.loads((output / "scan.json").read_text())
    assert (output / "analysis.png").read_bytes().startswith(b"\x89PNG")
    names = list(summary.MEASURES)
    assert [row["measure"] for row in made["correlations"]] == list(made["measures"]) == names
    assert (made["questions"], made["traced"], made["notes"]) == (12, 2, [])
    assert [row["unit"] for row in made["units"]] == [row["unit"] for row in scanned["units"]]
    values, sure, losses = (
        np.array([row[name] for row in scanned["units"]]) for name in ("value", "probability", "loss")
    )
    for row in made["correlations"]:
        measured = np.array([one[row["measure"]] for one in made["units"]])
        for kind, scan_says in (("value", -values), ("probability", -sure), ("loss", losses)):
            expected = ranks.spearman(measured, scan_says)
            assert row[kind]["rho"] == (None if np.isnan(expected) else pytest.approx(expected))
        shown = "-" if row["loss"]["rho"] is None else f"{row['loss']['rho']:+.2f}  {row['loss']['p']:.4f}"
        assert any(
            line.startswith(made["measures"][row["measure"]]["label"]) and shown in line for line in out.splitlines()
        )
    assert [row["block_influence"] for row in made["units"]] == pytest.approx(
        [1 - r["cosine"] for r in scanned["units"]]
    )
    assert [row["norm"] for row in made["units"]] == pytest.approx([row["s_norm"] for row in scanned["units"]])
    assert made["among_verdicts"]["probability"]["rho"] == pytest.approx(ranks.spearman(values, sure))
    assert "rank correlation with acc, probability, loss" in out
    assert "traced: 2 questions, probability of the answer" in out
    assert call(capsys, *words, "--analysis")[0] == 2


def measured(model, tokenizer, unit):
    """An analysis of a scan, without files."""
    scorer = Scorer(model, tokenizer, ITEMS, branches=False)
    command = config.ScanConfig(model="m", task="t", output="o", unit=unit, analysis=True)
    result = scan.scan(model, scorer, "acc", unit)
    return result, summary.measure(command, model, scorer, lens.questions(scorer), result)


def test_sublayers_are_measured_one_by_one_with_the_spread_over_questions(llama, tokenizer):
    result, found = measured(llama, tokenizer, "sublayer")
    assert list(found["measures"]) == [name for name in summary.MEASURES if name != "tracing_state"]
    rows = [{"unit": str(unit), "value": 50.0, "loss": float(n)} for n, unit in enumerate(result.candidates)]
    made = summary.record(found, {"model": "m", "task": "t", "metric": "acc", "intact": {}, "units": rows}, 0)
    for name, values in found["measures"].items():
        assert [row[name] for row in made["units"]] == pytest.approx(values.mean(axis=1) if values.ndim > 1 else values)
    spread = found["measures"]["promotion"][2].std(ddof=1) / np.sqrt(len(ITEMS))
    assert made["units"][2]["promotion_stderr"] == pytest.approx(spread)
    by_name = {row["measure"]: row for row in made["correlations"]}
    assert by_name["depth"]["loss"]["rho"] == pytest.approx(1)
    assert np.isnan(by_name["depth"]["value"]["rho"])
    assert "mlp 2" in summary.report(made)


def test_only_answered_questions_are_traced(base, tokenizer, llama):
    scorer = Scorer(llama, tokenizer, ITEMS, branches=False)
    asked, result = lens.questions(scorer), scorer.evaluate(llama, "acc")
    right = [number for number, hit in enumerate(result.correct) if hit]
    assert [one.item for one in lens.answered(llama, scorer, asked, result, 9)] == right
    assert len(right) < len(ITEMS)
    greedy = [Item("rows:1", "the cat", (" qz",)), Item("rows:2", "the cat", (best(llama, tokenizer, "the cat"),))]
    scorer = Scorer(llama, tokenizer, greedy)
    known = lens.answered(llama, scorer, lens.questions(scorer), scorer.evaluate(llama, "likelihood"), 9)
    assert [one.item for one in known] == [1]


def best(model, tokenizer, prompt):
    """The one-token continuation that is most likely."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1]
    return tokenizer.decode([int(logits.argmax())])


def test_what_a_family_refuses_is_noted_and_the_rest_is_reported(tokenizer):
    _, found = measured(tiny.build("gemma4_text", 4), tokenizer, "block")
    assert [note.partition(":")[0] for note in found["notes"]] == ["promotion", "causal tracing"]
    assert "lens_gain" in found["measures"]
    assert not {"promotion", "tracing_state", "tracing_output"} & set(found["measures"])


REFUSALS = [
    (["--analysis", "--unit", "pair"], "--analysis is of blocks or sublayers: leave out --unit pair"),
    (
        ["--analysis", "--scan", "racing", "--strategy", "scan+norm"],
        "--analysis compares all candidates, and --scan racing finds one",
    ),
    (["--analysis", "--keep-pattern"], "--analysis is of single layers: leave out --keep-pattern"),
    (["--analysis-items", "5"], "--analysis-items 5 is for --analysis: leave it out, or add --analysis"),
    (["--analysis", "--analysis-items", "0"], "--analysis-items"),
    (["--analysis"], "--analysis is of prompts and their answers, and the task's rows are plain text: leave it out"),
]


@pytest.mark.parametrize(
    ("words", "line"), REFUSALS, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_an_analysis_that_cannot_be_is_refused_in_one_line(base, tmp_path, capsys, words, line):
    task = tmp_path / "text.jsonl"
    task.write_text("".join(json.dumps({"text": f"the cat number {n} sat on the mat"}) + "\n" for n in range(30)))
    code, out, err = call(capsys, "--model", base, "--task", task, "--output", tmp_path / "out", *words)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("trimllm: ")
    assert line in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_ceiling_is_what_the_true_importance_reaches_against_a_noisy_scan():
    generator, found, halved = np.random.default_rng(0), [], []
    for _ in range(100):
        true = generator.uniform(0.6, 0.95, 16)
        hits = (generator.random((16, 100)) < true[:, None]).astype(float)
        halved.append(summary.halves(hits, 0))
        found.append(ranks.spearman(true, hits.mean(axis=1)))
    assert summary.ceiling(np.mean(halved)) == pytest.approx(np.mean(found), abs=0.05)
    assert np.isnan(summary.ceiling(-0.1))
