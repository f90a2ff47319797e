"""The fast scan gives what the slow one gives: copy the model, take the unit out, score everything anew."""

from __future__ import annotations

import copy
import json
import math
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
import reference
import tiny
import torch

from trimllm.blocks import decoder, families
from trimllm.blocks.layout import Unit, units, whole
from trimllm.blocks.surgery import drop_layers
from trimllm.errors import InputError, TrimError
from trimllm.evaluation import evaluate, forward
from trimllm.evaluation.batches import make_rows
from trimllm.evaluation.evaluate import Scorer
from trimllm.importance import deletion, scan
from trimllm.importance.deletion import Part
from trimllm.importance.scan import positions, table
from trimllm.tasks.items import Item

DEPTH = 4
CASES = [
    ("llama", "pair", True, True),
    ("llama", "sublayer", True, True),
    ("gpt2", "pair", True, True),
    ("gpt2", "sublayer", True, True),
    ("gemma2", "pair", False, True),
    ("gemma2", "sublayer", False, True),
    ("olmo2", "pair", True, True),
    ("olmo2", "sublayer", True, True),
    ("opt", "pair", True, True),
    ("gpt_neox", "block", True, True),
    ("bloom", "pair", False, True),
    ("mamba", "block", False, False),
]


def run(model, tokenizer, items, unit="block", metric="acc", budget=60, **settings):
    """A scan, with the log-likelihoods of every trial: (result, intact table, one table per candidate)."""
    parts = {}
    scorer = Scorer(model, tokenizer, items, token_budget=budget, branches=settings.pop("branches", None))
    settings.setdefault("on_part", lambda number, part: parts.__setitem__(number, part))
    result = scan.scan(model, scorer, metric, unit, **settings)
    tables = [
        evaluate.gather([parts[n].trials[i] for n in parts], scorer.encoded).loglik
        for i in range(len(result.candidates) if result.trials and parts else 0)
    ]
    return result, tables


@pytest.mark.parametrize(("family", "unit", "branches", "resumes"), CASES)
def test_every_candidate_scores_as_if_really_deleted(family, unit, branches, resumes, tokenizer, questions):
    model = tiny.build(family, DEPTH)
    result, tables = run(model, tokenizer, questions, unit)
    assert result.candidates == units(unit, whole(DEPTH))
    assert ("one by one" not in " ".join(result.notes)) is branches
    assert ("cannot be resumed" not in " ".join(result.notes)) is resumes
    intact = reference.logliks(model, tokenizer, questions)
    assert result.intact.correct == reference.correct(intact, questions)
    for candidate, trial, found in zip(result.candidates, result.trials, tables, strict=True):
        expected = reference.logliks(reference.deleted(model, candidate), tokenizer, questions)
        for row, other in zip(found, expected, strict=True):
            assert row == pytest.approx(other, abs=1e-4), candidate
        assert trial.correct == reference.correct(expected, questions), candidate
        assert trial.value == pytest.approx(100 * np.mean(trial.correct))
        assert found != intact
        right = -sum(row[item.answer] for row, item in zip(expected, questions, strict=True))
        assert trial.loss == pytest.approx(right / _right_tokens(tokenizer, questions), abs=1e-4)
        odds = [np.exp(np.array(row) - row[item.answer]) for row, item in zip(expected, questions, strict=True)]
        assert trial.probability == pytest.approx(100 * np.mean([1 / each.sum() for each in odds]), abs=0.01)
    evidence = result.evidence(np.arange(float(len(result.candidates))), DEPTH)
    assert evidence.probability.tolist() == [trial.probability for trial in result.trials]


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "gpt_oss", "phi3"])
def test_a_long_row_without_branches_keeps_its_window_in_every_trial(family, tokenizer, monkeypatch):
    monkeypatch.setitem(tiny.CONFIGS, f"{family}-window", tiny.CONFIGS[family] | {"sliding_window": 12})
    model = tiny.build(f"{family}-window", DEPTH)
    items = [
        Item("r:1", "the cat", (" ran to", " the hat"), 0, (6, 7)),
        Item("r:2", "the cat sat on the mat a dog ran to the hat. no hat? yes or no:", (" a", " s"), 0, (1, 1)),
    ]
    result, tables = run(model, tokenizer, items, budget=4096)
    for candidate, trial, found in zip(result.candidates, result.trials, tables, strict=True):
        expected = reference.logliks(reference.deleted(model, candidate), tokenizer, items)
        for row, other in zip(found, expected, strict=True):
            assert row == pytest.approx(other, abs=1e-4), candidate
        right = -sum(row[item.answer] for row, item in zip(expected, items, strict=True))
        assert trial.loss == pytest.approx(right / _right_tokens(tokenizer, items), abs=1e-4)


def _right_tokens(tokenizer, items):
    return sum(len(evaluate.encoding.encode_pair(tokenizer, item.prompt, item.target)[1]) for item in items)


def test_generation_items_scan_by_likelihood(tokenizer, targets):
    model = tiny.build("llama", DEPTH)
    result, _ = run(model, tokenizer, targets, metric="likelihood")
    for candidate, trial in zip(result.candidates, result.trials, strict=True):
        lost = sum(row[0] for row in reference.logliks(reference.deleted(model, candidate), tokenizer, targets))
        assert trial.value == pytest.approx(100 * np.exp(lost / _right_tokens(tokenizer, targets)), rel=1e-4)


@pytest.mark.parametrize(("family", "unit"), [("llama", "pair"), ("mamba", "block")])
def test_a_scan_by_loss_asks_right_answers_only_and_finds_the_same_losses(family, unit, tokenizer, questions):
    model = tiny.build(family, DEPTH)
    scorer = Scorer(model, tokenizer, questions)
    right, metric = scan.asked(model, scorer, "acc", "loss")
    asked = sum(int(batch.real.sum()) for batch in right.batches)
    assert asked < sum(int(batch.real.sum()) for batch in scorer.batches)
    assert metric == "likelihood"
    assert [item.continuations for item in right.items] == [(item.target,) for item in questions]
    found, whole_scan = scan.scan(model, right, metric, unit), scan.scan(model, scorer, "acc", unit)
    assert found.intact.loss == pytest.approx(whole_scan.intact.loss, abs=1e-5)
    for candidate, trial, other in zip(found.candidates, found.trials, whole_scan.trials, strict=True):
        lost = reference.logliks(reference.deleted(model, candidate), tokenizer, questions)
        expected = -sum(row[item.answer] for row, item in zip(lost, questions, strict=True))
        assert trial.loss == pytest.approx(expected / _right_tokens(tokenizer, questions), abs=1e-4)
        assert trial.loss == pytest.approx(other.loss, abs=1e-4)
        assert trial.value == pytest.approx(100 * np.exp(-trial.loss))


def test_dozens_of_choices_are_pointed_out_where_accuracy_is_asked(tokenizer, questions, monkeypatch):
    scorer = Scorer(tiny.build("llama", DEPTH), tokenizer, questions)
    assert scan.many_choices_note(scorer, "scan+norm") is None
    monkeypatch.setattr(scan, "MANY_CHOICES", 3)
    assert scan.many_choices_note(scorer, "scan+norm").startswith(
        "a scan asks all 3 choices a question; --strategy loss"
    )
    assert scan.many_choices_note(scorer, "loss") is None


def test_a_scan_by_accuracy_or_of_written_answers_asks_what_it_is_given(tokenizer, questions, targets):
    model = tiny.build("llama", DEPTH)
    scorer = Scorer(model, tokenizer, questions)
    for strategy in ("scan", "scan+norm", "bi", "taylor", "random"):
        assert scan.asked(model, scorer, "acc_norm", strategy) == (scorer, "acc_norm")
    assert scan.asked(model, scorer, "likelihood", "perplexity") == (scorer, "likelihood")
    written = Scorer(model, tokenizer, targets)
    assert written.right_only(model) is written


def test_layers_that_others_need_are_no_candidates_and_the_rest_is_scanned(tokenizer, questions):
    model = tiny.build("gemma4_text", DEPTH)
    result, tables = run(model, tokenizer, questions)
    assert 0 < len(result.candidates) < DEPTH
    refused = [i for i in range(DEPTH) if Unit("block", i) not in result.candidates]
    for index in refused:
        assert any(note.startswith(f"block {index} must stay: ") for note in result.notes)
    assert any("cannot be resumed" in note for note in result.notes)
    for candidate, found in zip(result.candidates, tables, strict=True):
        expected = reference.logliks(reference.deleted(model, candidate), tokenizer, questions)
        for row, other in zip(found, expected, strict=True):
            assert row == pytest.approx(other, abs=1e-4)


def cuts(model):
    """The single blocks that can really be dropped."""
    found = []
    for unit in units("block", whole(decoder.depth(model))):
        try:
            drop_layers(copy.deepcopy(model), [unit.index])
        except InputError:
            continue
        found.append(unit)
    return found


@pytest.mark.parametrize("family", ["jamba", "zamba2"])
def test_what_cannot_even_be_tried_is_no_candidate_and_every_cut_is(family, tokenizer, questions):
    model = tiny.build(family, 6)
    result, _ = run(model, tokenizer, questions)
    assert 0 < len(cuts(model)) < 6
    assert set(cuts(model)) <= set(result.candidates)
    assert sum("must stay" in note for note in result.notes) == 6 - len(result.candidates) > 0


def test_what_can_be_tried_is_measured_also_where_no_checkpoint_could_hold_it(tokenizer, questions):
    model = tiny.build("diffllama", DEPTH)
    assert cuts(model) == [Unit("block", DEPTH - 1)]
    result, _ = run(model, tokenizer, questions)
    assert result.candidates == units("block", whole(DEPTH)), "their importance ranks the blocks that train"


def test_a_scan_without_trials_measures_blocks_that_cannot_be_tried(tokenizer, questions):
    model = tiny.build("jamba", 6)
    result, _ = run(model, tokenizer, questions, trials=False, run=3)
    assert result.candidates == units("block", whole(6)), "a run of three may begin at a block that cannot go alone"
    assert np.isfinite(result.run_cosine[:4]).all()


def test_streams_beside_each_other_are_one_wide_stream(tokenizer, questions):
    """Hyper-connections carry (rows, tokens, streams, hidden); with as many rows as streams, too."""
    model = tiny.build("hy_v4", DEPTH)
    streams = model.config.hc_mult
    (alone, _), (together, _) = (run(model, tokenizer, questions[:streams], budget=b, trials=False) for b in (1, 10**6))
    np.testing.assert_allclose(alone.norm, together.norm, rtol=1e-4)
    np.testing.assert_allclose(alone.cosine, together.cosine, rtol=1e-4)
    assert np.isfinite(alone.norm).all()


def test_progress_counts_batches_that_are_done_not_those_of_other_rows(tokenizer, questions):
    model = tiny.build("llama", DEPTH)
    scorer = Scorer(model, tokenizer, questions, token_budget=60)
    found, steps = {}, []
    scan.scan(model, scorer, "acc", on_part=found.__setitem__)
    count = len(scorer.batches)
    stale = {n: replace(found[n % count], rows="other rows") for n in range(3 * count)}
    stale[0] = replace(found[0], trials=found[0].trials[1:])  # of other candidates
    scan.scan(model, scorer, "acc", finished=stale, progress=lambda done, of: steps.append((done, of)))
    assert steps == [(n, count) for n in range(1, count + 1)]


def test_parts_of_other_candidates_are_computed_again(tokenizer, questions):
    model = tiny.build("llama", DEPTH)
    scorer = Scorer(model, tokenizer, questions)
    found = {}
    whole_scan = scan.scan(model, scorer, "acc", trials=False, on_part=found.__setitem__)
    fewer = {n: replace(part, sums={k: v[1:] for k, v in part.sums.items()}) for n, part in found.items()}
    again = scan.scan(model, scorer, "acc", trials=False, finished=fewer)
    np.testing.assert_array_equal(again.norm, whole_scan.norm)


def test_a_family_without_halves_or_without_cuts_is_refused_with_the_reason(tokenizer, questions):
    with pytest.raises(InputError, match="run in parallel"):
        run(tiny.build("gpt_neox", DEPTH), tokenizer, questions, "pair")
    with pytest.raises(InputError, match="linear attention decays"):
        run(tiny.build("minimax", DEPTH), tokenizer, questions)


def test_a_resumed_forward_that_gives_other_numbers_is_not_used(tokenizer, questions, monkeypatch):
    model = tiny.build("llama", DEPTH)
    true_pieces, calls = forward.batch_pieces, []

    def second_differs(model, batch):
        pieces = true_pieces(model, batch)
        calls.append(1)
        shift = 0.1 if len(calls) == 2 else 0.0
        return {owner: (loglik + shift, *rest) for owner, (loglik, *rest) in pieces.items()}

    scorer = Scorer(model, tokenizer, questions)
    monkeypatch.setattr(forward, "batch_pieces", second_differs)
    result = scan.scan(model, scorer, "acc")
    assert any("cannot be resumed" in note for note in result.notes)


def test_a_forward_that_does_not_resume_exactly_is_noticed_and_not_used(tokenizer, questions, monkeypatch):
    """gemma3n's later layers reuse keys of earlier ones; say that it resumes, and the check must find out."""
    model = tiny.build("gemma3n_text", DEPTH)
    row = replace(families.family(decoder.text_config(model)), resumable=True)
    monkeypatch.setitem(families.FAMILIES, "gemma3n_text", row)
    try:
        result, tables = run(model, tokenizer, questions)
    except Exception as error:
        pytest.fail(f"the check must fall back, not raise {error!r}")
    for candidate, found in zip(result.candidates, tables, strict=True):
        expected = reference.logliks(reference.deleted(model, candidate), tokenizer, questions)
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
    assert any("cannot be resumed" in note for note in result.notes)


@pytest.mark.parametrize(("family", "unit"), [("llama", "sublayer"), ("gpt2", "pair"), ("gemma3n_text", "block")])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_bit_for_bit_what_it_was(family, unit, training, tokenizer, questions):
    model = tiny.build(family, DEPTH).train(training)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [
        (name, id(module), len(module._forward_hooks), len(module._forward_pre_hooks), module.training)
        for name, module in model.named_modules()
    ]
    config = copy.deepcopy(model.config.to_dict())
    run(model, tokenizer, questions, unit)
    assert model.config.to_dict() == config
    assert modules == [
        (name, id(module), len(module._forward_hooks), len(module._forward_pre_hooks), module.training)
        for name, module in model.named_modules()
    ]
    state = model.state_dict()
    assert list(state) == list(weights)
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def naive_activations(model, scorer):
    """Mean norm after each block and mean cosine over it: question by question, over its prompt and right choice."""
    streams = [reference.stream(model, row.ids) for row in make_rows([one.right_only() for one in scorer.encoded])]
    joined = [torch.cat([one[key] for one in streams]).double() for key in range(DEPTH + 1)]
    norms = [float(joined[i + 1].norm(dim=-1).mean()) for i in range(DEPTH)]

    def cosine(a, b):
        return float(torch.nn.functional.cosine_similarity(joined[a], joined[b], dim=-1).mean())

    def angle(i):
        """Between the ends of two blocks' run, at the last token, averaged over the rows; in half turns."""
        ends = [[one[key].double().reshape(-1, one[key].shape[-1])[-1] for key in (i, i + 2)] for one in streams]
        return sum(math.acos(a @ b / (a.norm() * b.norm())) for a, b in ends) / len(ends) / math.pi

    runs = range(DEPTH - 1)
    return norms, [cosine(i, i + 1) for i in range(DEPTH)], [cosine(i, i + 2) for i in runs], [angle(i) for i in runs]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_activations_are_means_over_prompts_and_right_choices_whatever_else_is_asked(
    family, budget, tokenizer, questions
):
    model = tiny.build(family, DEPTH)
    scorer = Scorer(model, tokenizer, questions, branches=False)
    norms, cosines, runs, angles = naive_activations(model, scorer)
    result, _ = run(model, tokenizer, questions, trials=False, run=2, budget=budget, branches=False)
    shared, _ = run(model, tokenizer, questions, trials=False, run=2, budget=budget)
    assert result.trials == []
    for one in (result, shared):
        assert one.norm == pytest.approx(norms, rel=1e-5)
        assert one.cosine == pytest.approx(cosines, abs=1e-5)
        assert one.run_cosine[:-1] == pytest.approx(runs, abs=1e-5)
        assert np.isnan(one.run_cosine[-1])
        assert one.run_angle[:-1] == pytest.approx(angles, abs=1e-4)
        assert np.isnan(one.run_angle[-1])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_activations_of_halves_and_pairs_are_read_between_the_halves(family, tokenizer, questions):
    model = tiny.build(family, DEPTH)
    halves = [run(model, tokenizer, questions, unit, trials=False)[0] for unit in ("sublayer", "pair", "block")]
    sublayer, pair, block = halves
    assert sublayer.norm[1::2] == pytest.approx(block.norm, rel=1e-6)
    assert pair.norm[::2] == pytest.approx(block.norm, rel=1e-6)
    assert pair.norm[1::2] == pytest.approx(sublayer.norm[2::2], rel=1e-6)
    mids = []
    for i in range(DEPTH):
        twin = reference.deleted(model, Unit("mlp", i)) if family != "opt" else _without_fc2(model, i)
        mids.append(run(twin, tokenizer, questions, trials=False)[0].norm[i])
    assert sublayer.norm[::2] == pytest.approx(mids, rel=1e-5)


def _without_fc2(model, i):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in decoder.blocks(twin)[i].fc2.parameters():
            parameter.zero_()
    return twin


def counting(model):
    """Counts block forwards in the list it yields."""
    counts = [0]

    def count(*_):
        counts[0] += 1

    stack = ExitStack()
    for block in decoder.blocks(model):
        stack.callback(block.register_forward_pre_hook(count).remove)
    return stack, counts


def test_a_batch_costs_each_block_once_and_each_candidate_only_what_lies_behind_it(tokenizer, questions):
    model = tiny.build("llama", 6)
    scorer = Scorer(model, tokenizer, questions, token_budget=30)
    batches = len(scorer.batches)
    assert batches > 2
    stack, counts = counting(model)
    with stack:
        scan.scan(model, scorer, "acc")
    check = 6 + 3
    assert counts[0] == batches * (6 + 6 * 5 // 2) + check


def test_finished_parts_are_not_computed_again_and_give_the_same_result(tokenizer, questions):
    model = tiny.build("llama", DEPTH)
    scorer = Scorer(model, tokenizer, questions, token_budget=60)
    lines, steps = {}, []
    full = scan.scan(
        model,
        scorer,
        "acc",
        "pair",
        on_part=lambda number, part: lines.__setitem__(number, json.dumps(part.dump())),
        progress=lambda done, of: steps.append((done, of)),
    )
    count = len(scorer.batches)
    assert steps == [(n, count) for n in range(1, count + 1)]
    done = {number: Part.load(json.loads(line)) for number, line in lines.items()}
    stack, counts = counting(model)
    fresh = []
    with stack:
        for known in (done, {n: part for n, part in done.items() if n != 1}):
            before = counts[0]
            again = scan.scan(model, scorer, "acc", "pair", finished=known, on_part=lambda n, part: fresh.append(n))
            check, batch = DEPTH + DEPTH // 2, DEPTH + sum(DEPTH - 1 - i for i in range(DEPTH)) + _pair_work()
            assert counts[0] - before == check + (count - len(known)) * batch
            assert again.trials == full.trials
            assert again.intact == full.intact
            for name in ("norm", "cosine", "run_cosine", "run_angle"):
                np.testing.assert_array_equal(getattr(again, name), getattr(full, name))
    assert fresh == [1]


def _pair_work():
    """Blocks that shifted pairs compute: from the merged block on."""
    return sum(DEPTH - 1 - i for i in range(DEPTH - 1))


def test_two_processes_share_the_batches_and_learn_the_same(tokenizer, questions):
    model = tiny.build("llama", DEPTH)
    alone, _ = run(model, tokenizer, questions, "pair")

    def work(share):
        parts = []
        own = copy.deepcopy(model)
        result, _ = run(own, tokenizer, questions, "pair", share=share, on_part=lambda n, part: parts.append(n))
        return result, parts

    for result, parts in reference.in_ranks(2, work):
        assert result.trials == alone.trials
        assert result.intact == alone.intact
        np.testing.assert_array_equal(result.norm, alone.norm)
        assert parts == list(range(len(Scorer(model, tokenizer, questions, token_budget=60).batches)))


def test_positions_are_places_in_the_original_model():
    candidates = [Unit("block", 0), Unit("pair", 1), Unit("mlp", 2), Unit("attention", 2)]
    assert positions(candidates, [0, 3, 7]).tolist() == [0.0, 3.5, 7.25, 7.0]


def test_a_trial_without_finite_scores_names_the_unit(tokenizer, questions, monkeypatch):
    """In 16 bits the model may overflow without one block only."""
    model, ran = tiny.build("llama", 4), []
    blocks = decoder.blocks(model)
    for number in (1, 2):
        blocks[number].register_forward_hook(lambda *_, number=number: ran.append(number))

    def overflow(module, args, output):
        alone, ran[:] = ran == [2], []
        return output * float("nan") if alone else output

    blocks[3].register_forward_hook(overflow)
    monkeypatch.setattr(deletion, "resumes_exactly", lambda model, batch: False)
    with pytest.raises(TrimError, match=r"^without block 1 of the 4 that there are, the model's .*: try --dtype"):
        scan.scan(model, Scorer(model, tokenizer, questions), "acc")


def test_the_table_is_json_that_every_reader_takes(tokenizer, questions):
    model = tiny.build("llama", DEPTH)
    result, _ = run(model, tokenizer, questions, run=2)
    evidence = result.evidence(positions(result.candidates, range(DEPTH)), DEPTH)
    names = [str(unit) for unit in result.candidates]
    for strategy in ("scan+norm", "angular"):
        made = json.loads(json.dumps(table(result, evidence, strategy, names), allow_nan=False))
        assert [row["unit"] for row in made["units"]] == names
        assert made["strategy"] == strategy
    assert made["units"][-1]["importance"] is None
    assert made["units"][0]["value"] == result.trials[0].value


@pytest.mark.parametrize("asked", ["the whole forward pass", "the resumed one"])
def test_lack_of_memory_is_not_taken_for_a_model_that_cannot_be_resumed(asked, tokenizer, questions, monkeypatch):
    model, compute = tiny.build("llama", 3), forward.batch_pieces
    batch = Scorer(model, tokenizer, questions).batches.longest()
    assert deletion.resumes_exactly(model, batch)
    calls = []

    def tight(*arguments):
        calls.append(arguments)
        if len(calls) == 1 + (asked == "the resumed one"):
            raise torch.OutOfMemoryError("no memory")
        return compute(*arguments)

    monkeypatch.setattr(forward, "batch_pieces", tight)
    assert deletion.resumes_exactly(model, batch)
