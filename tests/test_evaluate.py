"""Every way of scoring gives what a naive forward per continuation gives; the metrics have their known values."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import reference
import tiny
import torch

from trimllm.blocks import decoder
from trimllm.config import EvalConfig
from trimllm.errors import InputError, TrimError
from trimllm.evaluation import batches, encoding, evaluate, forward, inputs
from trimllm.evaluation.encoding import encode_pair
from trimllm.evaluation.evaluate import Scorer
from trimllm.evaluation.generation import cut_note, generate
from trimllm.evaluation.judging import Scores, judge
from trimllm.evaluation.paired import answers, apart, difference, shown, unanimous
from trimllm.tasks.items import Item

WIDE = {"sliding_window": 48}


@pytest.fixture
def wide_gemma2(monkeypatch):
    monkeypatch.setitem(tiny.CONFIGS, "gemma2-wide", tiny.CONFIGS["gemma2"] | WIDE)
    return "gemma2-wide"


def assert_close(table, expected, tolerance=1e-4):
    assert [len(row) for row in table] == [len(row) for row in expected]
    worst = max(abs(a - b) for row, other in zip(table, expected, strict=True) for a, b in zip(row, other, strict=True))
    assert worst < tolerance


@pytest.mark.parametrize(
    ("family", "shares"),
    [
        ("llama", True),
        ("gpt2", True),
        ("opt", True),
        ("gpt_neox", True),
        ("qwen2", True),
        ("olmo2", True),
        ("gemma2-wide", True),
        ("gemma2", False),
        ("qwen2-sliding", False),
        ("bloom", False),
        ("mamba", False),
    ],
)
def test_shared_prompts_and_single_rows_equal_a_naive_forward(family, shares, tokenizer, questions, wide_gemma2):
    model = tiny.build(family, depth=3)
    expected = reference.logliks(model, tokenizer, questions)
    scorer = Scorer(model, tokenizer, questions, token_budget=100)
    assert scorer.branches is shares
    assert (scorer.note is None) is shares
    if not shares:
        assert "one by one" in scorer.note
    assert_close(scorer.score(model).loglik, expected)
    single = Scorer(model, tokenizer, questions, token_budget=70, branches=False).score(model)
    assert_close(single.loglik, expected)


def test_where_attention_takes_no_mask_choices_are_scored_one_by_one(tokenizer, questions, monkeypatch):
    model = tiny.build("llama", depth=2)
    takes = {"sdpa": True, "flex_attention": True, "kernels-community/flash-attn2": False, "flash_attention_2": False}
    for name, expected in takes.items():
        monkeypatch.setattr(model.config, "_attn_implementation_internal", name)
        assert decoder.takes_masks(model) == expected
    scorer = Scorer(model, tokenizer, questions)
    assert (scorer.branches, scorer.note) == (
        False,
        "choices are scored one by one: FlashAttention takes no mask that keeps them apart in one row",
    )
    assert all(batch.inputs["attention_mask"].dim() == 2 for batch in scorer.batches)


def test_many_choices_share_rows_of_limited_length_and_score_the_same(tokenizer, monkeypatch):
    model = tiny.build("llama", depth=2)
    choices = tuple(f" {'a cat ' * (1 + n % 3)}on" for n in range(20))
    items = [Item("rows:1", "who is it?", choices, answer=13), Item("rows:2", "a dog", choices[:2])]
    whole = Scorer(model, tokenizer, items)
    monkeypatch.setattr(batches, "WIDE", 40)
    monkeypatch.setattr(batches, "PROMPTS", 1)
    split = Scorer(model, tokenizer, items)
    rows = [row for group in split.batches._groups for row in group]
    assert len(rows) > len(items) < sum(len(row.branches) for row in rows) == 22
    assert max(sum(len(branch.targets) for branch in row.branches) for row in rows) <= 40
    assert split.batches.length < whole.batches.length
    assert_close(split.score(model).loglik, whole.score(model).loglik)
    one, other = (scorer.evaluate(model, "acc") for scorer in (split, whole))
    assert one.probability == pytest.approx(other.probability, abs=1e-4)
    assert sum(int(batch.right.sum()) for batch in split.batches) == sum(int(b.right.sum()) for b in whole.batches)


def test_wrong_branching_would_show(tokenizer, questions):
    """The tolerance above is not vacuous: where branches are not exact, forcing them gives other numbers."""
    model = tiny.build("gemma2", depth=3)
    forced = Scorer(model, tokenizer, questions, branches=True).score(model).loglik
    expected = reference.logliks(model, tokenizer, questions)
    with pytest.raises(AssertionError):
        assert_close(forced, expected, 0.01)


@pytest.mark.parametrize("family", ["qwen2-sliding", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_that_binds_forbids_shared_prompts_however_coarse_the_dtype(family, dtype, tokenizer, questions):
    scorer = Scorer(tiny.build(family, depth=3).to(dtype), tokenizer, questions)
    assert scorer.branches is False
    assert "attention window of 4 tokens" in scorer.note


@pytest.mark.parametrize("family", ["qwen2-sliding", "gemma2"])
def test_a_window_that_nobody_declared_is_noticed_on_the_data(family, tokenizer, questions, monkeypatch):
    monkeypatch.setattr(encoding, "attention_window", lambda config: None)
    model = tiny.build(family, depth=3)
    scorer = Scorer(model, tokenizer, questions)
    assert scorer.branches is False
    assert "not exact" in scorer.note
    assert_close(scorer.score(model).loglik, reference.logliks(model, tokenizer, questions))


def test_a_window_longer_than_every_row_does_not_forbid_shared_prompts(tokenizer, questions, monkeypatch):
    reach = max(
        len(encode_pair(tokenizer, item.prompt, text)[0]) + len(encode_pair(tokenizer, item.prompt, text)[1]) - 1
        for item in questions
        for text in item.continuations
    )
    for window, shares in ((reach, True), (reach - 1, False)):
        monkeypatch.setitem(tiny.CONFIGS, "mistral-window", tiny.CONFIGS["mistral"] | {"sliding_window": window})
        model = tiny.build("mistral-window", depth=2)
        scorer = Scorer(model, tokenizer, questions)
        assert scorer.branches is shares
        assert_close(scorer.score(model).loglik, reference.logliks(model, tokenizer, questions))


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text", "gpt_oss", "phi3"])
def test_rows_beyond_the_window_keep_it_whatever_shares_their_batch(family, tokenizer, monkeypatch):
    """The second question's choices are one token or two, so that no prompt is shared there; its row is long."""
    monkeypatch.setitem(tiny.CONFIGS, f"{family}-window", tiny.CONFIGS[family] | {"sliding_window": 12})
    model = tiny.build(f"{family}-window", depth=3)
    items = [
        Item("r:1", "the cat", (" ran to", " the hat"), 0, (6, 7)),
        Item("r:2", "the cat sat on the mat a dog ran to the hat. no hat? yes or no:", (" a", " s"), 0, (1, 1)),
    ]
    expected = reference.logliks(model, tokenizer, items)
    for budget in (4096, 1):
        scorer = Scorer(model, tokenizer, items, token_budget=budget)
        assert_close(scorer.score(model).loglik, expected)
        assert "rows are longer than the attention window of 12 tokens" in scorer.note
    assert Scorer(model, tokenizer, items[:1]).branches
    assert_close(Scorer(model, tokenizer, items[1:]).score(model).loglik, expected[1:])


def test_choices_that_together_exceed_the_context_still_share_their_prompt(tokenizer):
    model = tiny.build("gpt2", depth=2)
    item = Item("r:1", "the cat", tuple(" qzxv" * 3 + tail for tail in (" a", " b", " c", " d", " e", " f")))
    scorer = Scorer(model, tokenizer, [item])
    assert scorer.branches is True
    assert_close(scorer.score(model).loglik, reference.logliks(model, tokenizer, [item]))


def test_dropout_neither_hides_shared_prompts_nor_is_left_off(tokenizer, questions):
    model = tiny.build("gpt2", depth=2).train()
    scorer = Scorer(model, tokenizer, questions)
    assert scorer.branches is True
    assert model.training
    table = scorer.score(model).loglik
    assert model.training
    assert_close(table, reference.logliks(model.eval(), tokenizer, questions))


def test_batch_size_changes_nothing(tokenizer, questions):
    model = tiny.build("llama", depth=2)
    tables = [Scorer(model, tokenizer, questions, token_budget=budget).score(model).loglik for budget in (1, 64, 4096)]
    assert_close(tables[0], tables[1], 1e-5)
    assert_close(tables[0], tables[2], 1e-5)


@pytest.mark.parametrize(("made_in", "asked_in"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_model_that_was_cast_since_is_scored_as_by_a_scorer_of_its_own(made_in, asked_in, tokenizer, questions):
    model = tiny.build("llama", depth=2)
    scorer = Scorer(model.to(made_in), tokenizer, questions)
    assert scorer.branches
    cast = copy.deepcopy(model).to(asked_in)
    assert scorer.score(cast) == Scorer(cast, tokenizer, questions).score(cast)


def test_outcomes_of_other_rows_are_an_error(tokenizer, questions):
    model = tiny.build("llama", depth=2)
    scorer = Scorer(model, tokenizer, questions)
    pieces = [forward.batch_pieces(model, batch) for batch in scorer.batches]
    assert evaluate.gather(pieces, scorer.encoded) == scorer.score(model)
    for wrong in (pieces[1:], [*pieces, pieces[0]]):
        with pytest.raises(ValueError, match=r"item \d+: outcomes of .* tokens per continuation, but there are"):
            evaluate.gather(wrong, scorer.encoded)


def test_memory_that_ends_while_shared_prompts_are_tried_does_not_forbid_them(tokenizer, questions, monkeypatch):
    model, computed = tiny.build("llama", depth=2), forward.batch_pieces
    expected = Scorer(model, tokenizer, questions).score(model)

    def tight(model, batch):
        if len(batch.real) > 1:
            raise torch.OutOfMemoryError
        return computed(model, batch)

    monkeypatch.setattr(forward, "batch_pieces", tight)
    scorer = Scorer(model, tokenizer, questions)
    assert scorer.branches
    assert_close(scorer.score(model).loglik, expected.loglik)


def test_where_memory_has_no_room_for_shared_prompts_the_note_says_so(tokenizer, questions, monkeypatch):
    model, computed = tiny.build("llama", depth=2), forward.batch_pieces
    expected = Scorer(model, tokenizer, questions).score(model)

    def tight(model, batch):
        if "position_ids" in batch.inputs:
            raise torch.OutOfMemoryError
        return computed(model, batch)

    monkeypatch.setattr(forward, "batch_pieces", tight)
    scorer = Scorer(model, tokenizer, questions)
    assert scorer.note == "choices are scored one by one: memory has no room for shared prompts of llama"
    assert_close(scorer.score(model).loglik, expected.loglik)


def test_tokens_and_greedy_are_those_of_the_naive_forward(tokenizer, questions):
    model = tiny.build("llama", depth=2)
    greedy = []
    for item in questions:
        prompt = encode_pair(tokenizer, item.prompt, " x")[0]
        tail = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=1, do_sample=False)[0, len(prompt) :]
        greedy.append(Item(item.place, item.prompt, (tokenizer.decode(tail), " the", *item.continuations)))
    scores = Scorer(model, tokenizer, greedy).score(model)
    expected = [
        [reference.token_logprobs(model, *encode_pair(tokenizer, item.prompt, text)) for text in item.continuations]
        for item in greedy
    ]
    assert [list(row) for row in scores.greedy] == [[hit for _, hit in row] for row in expected]
    assert [list(row) for row in scores.tokens] == [[len(logprobs) for logprobs, _ in row] for row in expected]
    assert any(any(row) for row in scores.greedy)
    assert not all(all(row) for row in scores.greedy)


@pytest.mark.parametrize("budget", [8, 24, 1000])
def test_windows_of_a_document_are_added_up_whatever_batch_they_are_in(tokenizer, budget):
    model = tiny.build("llama", depth=2)
    items = [Item("doc:1", "", ("the cat sat on the mat. a dog ran to the cat; yes",)), Item("doc:2", "", ("no hat",))]
    scorer = Scorer(model, tokenizer, items, max_length=8, token_budget=budget)
    assert len(scorer.encoded) > 3
    scores = scorer.score(model)
    for number, item in enumerate(items):
        ids = tokenizer(item.target)["input_ids"]
        total, before = 0.0, 1
        for begin in range(0, len(ids), 8):
            window = ids[begin : begin + 8]
            total += float(reference.token_logprobs(model, [before], window)[0].sum())
            before = window[-1]
        assert scores.loglik[number][0] == pytest.approx(total, abs=1e-4)
        assert scores.tokens[number] == (len(ids),)


def test_generation_items_give_the_mean_token_likelihood(tokenizer, targets):
    model = tiny.build("llama", depth=2)
    parts = [reference.token_logprobs(model, *encode_pair(tokenizer, one.prompt, one.target))[0] for one in targets]
    loss = -float(torch.cat(parts).mean())
    result = evaluate.evaluate(model, tokenizer, targets, "likelihood")
    assert result.loss == pytest.approx(loss, abs=1e-5)
    assert result.value == pytest.approx(100 * math.exp(-loss), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_two_processes_give_what_one_gives(tokenizer, questions):
    model = tiny.build("llama", depth=2)
    alone = Scorer(model, tokenizer, questions, token_budget=40).score(model)

    def work(share):
        own = copy.deepcopy(model)
        return Scorer(own, tokenizer, questions, token_budget=40).score(own, share)

    assert reference.in_ranks(2, work) == [alone, alone]


def test_logits_taken_a_few_positions_at_a_time_score_alike(tokenizer, questions, monkeypatch):
    model = tiny.build("llama", depth=2)
    scorer = Scorer(model, tokenizer, questions)
    at_once = scorer.score(model)
    parts = []
    monkeypatch.setattr(forward, "chunk", lambda vocabulary: parts.append(vocabulary) or 2)
    apart = scorer.score(model)
    assert parts == [model.config.vocab_size] * len(scorer.batches)
    assert apart.loglik == at_once.loglik
    assert apart.greedy == at_once.greedy


def test_a_damaged_model_is_an_error(tokenizer, questions):
    model = tiny.build("llama", depth=2)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(TrimError, match=r"not finite .*\(the first: item 1 of its set\): try --dtype float32"):
        Scorer(model, tokenizer, questions[:1], branches=True).score(model)


def test_an_item_that_a_narrow_dtype_cannot_score_is_named(tokenizer, questions, monkeypatch):
    model = tiny.build("llama", depth=1)
    made = Scorer(model, tokenizer, questions, token_budget=10**6, branches=True)
    third = [number for number, (item, _) in enumerate(made.batches[0].owners) if item == 2]
    compute = forward.target_logprobs

    def overflowing(model, batch):
        logprobs, greedy = compute(model, batch)
        logprobs[batch.segment == third[0]] = -torch.inf
        return logprobs, greedy

    monkeypatch.setattr(forward, "target_logprobs", overflowing)
    with pytest.raises(TrimError, match=r"for 1 of \d+ continuations in a batch \(the first: item 3 of its set\)"):
        made.score(model)


def test_a_tokenizer_with_more_tokens_than_the_model_is_taken_and_a_row_with_one_of_them_is_not(tokenizer, questions):
    model = tiny.build("llama", depth=2)
    surplus = model.get_input_embeddings().weight.shape[0] - len(tokenizer) + 2
    more = copy.deepcopy(tokenizer)
    more.add_tokens([f"<image{n}>" for n in range(surplus)], special_tokens=True)
    more.pad_token = f"<image{surplus - 1}>"
    expected = Scorer(model, tokenizer, questions).score(model)
    assert Scorer(model, more, questions).score(model) == expected
    found = [generate(model, each, questions, max_new_tokens=2) for each in (tokenizer, more)]
    assert found[0] == found[1]
    item = Item("r:1", f"what <image{surplus - 1}>", (" a", " b"))
    for ask in (lambda: Scorer(model, more, [item]), lambda: generate(model, more, [item], max_new_tokens=2)):
        with pytest.raises(InputError, match=rf"a row holds '<image{surplus - 1}>', token \d+, and the model"):
            ask()


def test_nothing_to_evaluate_is_an_error(tokenizer):
    with pytest.raises(
        InputError, match=r"`items` has no rows: give those of a set, such as load_task\(\.\.\.\)\.test"
    ):
        Scorer(tiny.build("llama", depth=1), tokenizer, [])


def scores_of(loglik, tokens=None, greedy=None):
    loglik = tuple(tuple(map(float, row)) for row in loglik)
    tokens = tokens or tuple(tuple(1 for _ in row) for row in loglik)
    return Scores(loglik, tokens, greedy or tuple(tuple(False for _ in row) for row in loglik))


def choice_items(right, lengths):
    return [Item(f"r:{n}", "q", (" a", " b"), answer, lengths) for n, answer in enumerate(right)]


@pytest.mark.parametrize(("one", "other"), [([1.0, 2.0], [1.0]), ([1.0], [1.0, 2.0, 3.0]), ([], [])])
def test_answers_to_other_items_are_not_compared(one, other):
    with pytest.raises(InputError, match=f"{len(one)} and {len(other)} answers"):
        difference(one, other)


def test_kept_answers_name_no_group_and_compare_as_these_do():
    groups = [None, "patient 7", None, "patient 7", "1", "2", None, "1"]
    items = [Item(f"r:{n}", "q", (" a", " b"), 0, group=group) for n, group in enumerate(groups)]
    one, other = [100.0, 100, 0, 100, 0, 0, 100, 0], [0.0] * 8
    kept = [answers(values, items) for values in (one, other)]
    assert kept[0]["groups"] == [None, "1", None, "1", "2", "3", None, "2"]
    value, error = difference(one, other, groups)
    assert apart(*kept) == {"difference": value, "stderr": error}
    assert error != difference(one, other)[1], "groups count"


def test_acc_takes_the_highest_sum_and_acc_norm_the_highest_per_character():
    items = choice_items([0, 1, 1, 1], (2, 10))
    scores = scores_of([(-4, -10), (-4, -10), (-1, -30), (-9, -2)])
    acc, norm = (judge(items, scores, metric) for metric in ("acc", "acc_norm"))
    assert acc.acc == norm.acc == acc.value == 50.0
    assert acc.acc_norm == norm.acc_norm == norm.value == 50.0
    assert acc.correct == (True, False, False, True)
    assert norm.correct == (False, True, False, True)
    assert acc.stderr == pytest.approx(100 * math.sqrt(0.25 / 3))
    assert acc.loss == pytest.approx((4 + 10 + 30 + 2) / 4)
    assert acc.n == 4


def test_probability_is_that_of_the_right_choice_among_the_choices():
    items = choice_items([0, 1, 1, 1], (2, 10))
    rows = [(-4, -10), (-4, -10), (-1, -30), (-900, -902)]
    found = judge(items, scores_of(rows), "acc")
    right = [1 / (1 + math.exp(-6)), 1 / (1 + math.exp(6)), 1 / (1 + math.exp(29)), 1 / (1 + math.exp(2))]
    assert found.probability == pytest.approx(100 * np.mean(right))
    assert found.summary()["probability"] == found.probability
    by_length = judge(items, scores_of(rows), "acc_norm")  # 6 characters in the mean
    apart = [6 * (-4 / 2 + 10 / 10), 6 * (4 / 2 - 10 / 10), 6 * (1 / 2 - 30 / 10), 6 * (900 / 2 - 902 / 10)]
    right = [1 / (1 + math.exp(-apart[0])), *(1 / (1 + math.exp(-each)) for each in apart[1:])]
    assert by_length.probability == pytest.approx(100 * np.mean(right))
    sure = [(each > 0.5) for each in right]
    assert sure == list(by_length.correct), "of two choices the likelier one is said"
    text = judge([Item("r:1", "q", (" a",))], scores_of([(-1,)]), "likelihood")
    assert text.probability is None


def test_a_value_is_the_mean_of_what_each_item_gives_and_its_error_that_of_their_mean():
    numbers = np.random.default_rng(0)
    items = choice_items(numbers.integers(0, 2, 50), (3, 5))
    scores = scores_of(
        numbers.normal(-8, 4, (50, 2)), tokens=tuple(map(tuple, numbers.integers(1, 9, (50, 2)).tolist()))
    )
    for metric in ("acc", "acc_norm", "likelihood"):
        found = judge(items, scores, metric)
        assert np.mean(found.per_item) == pytest.approx(found.value)
        assert np.std(found.per_item, ddof=1) / math.sqrt(50) == pytest.approx(found.stderr)
        assert "per_item" not in found.summary()


def test_a_difference_is_as_certain_as_paired_answers_make_it():
    """Against the spread of many draws of the items, for a likelihood too, whose items have different lengths."""
    numbers = np.random.default_rng(1)
    count, items = 400, [Item(f"r:{n}", "q", (" a",)) for n in range(400)]
    length = numbers.integers(1, 9, count)
    hard = -numbers.gamma(2, 1, count)
    rows = [length * (hard + numbers.normal(shift, 0.2, count)) for shift in (-0.1, 0.0)]

    def value(row, chosen):
        return 100 * math.exp(row[chosen].sum() / length[chosen].sum())

    one, other = (judge(items, scores_of(row[:, None], [(int(n),) for n in length]), "likelihood") for row in rows)
    apart, error = difference(one.per_item, other.per_item)
    assert apart == pytest.approx(one.value - other.value)
    draws = [numbers.integers(0, count, count) for _ in range(2000)]
    assert error == pytest.approx(np.std([value(rows[0], d) - value(rows[1], d) for d in draws]), rel=0.1)
    assert error < math.hypot(one.stderr, other.stderr) / 3
    assert difference(one.per_item, one.per_item) == (0.0, 0.0)
    assert shown({"difference": -0.01, "stderr": 0.8}) == "+0.0 +- 0.8"
    assert shown({"difference": -0.31, "stderr": 0.05}) == "-0.3 +- 0.1"
    assert shown({"difference": 0.021, "stderr": 0.03}) == "+0.02 +- 0.03", "not 0.0, as of what is certain"
    assert shown({"difference": 0.021, "stderr": 0.0049}) == "+0.021 +- 0.005"
    assert unanimous({"difference": 0.0, "stderr": 0.0})
    assert not unanimous({"difference": 0.0, "stderr": 0.8}), "as many are better as are worse"


def test_a_difference_counts_questions_of_one_group_as_one():
    one, other = [100.0, 100.0, 0.0, 0.0, 100.0, 100.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 100.0, 100.0, 100.0, 100.0]
    apart, alone = difference(one, other)
    assert (apart, alone) == (0.0, pytest.approx(100 * math.sqrt(4 / 7 / 8)))
    assert difference(one, other, list("aabbccdd")) == (0.0, pytest.approx(100 * math.sqrt(8 * 4 / 3) / 8))
    ones_apart = 1 + 1 + 0 + 0 + 2**2  # an item without a group is one by itself
    assert difference(one, other, [None, None, *"bbccdd"]) == (
        0.0,
        pytest.approx(100 * math.sqrt(ones_apart * 5 / 4) / 8),
    )


def test_acc_norm_without_given_lengths_counts_the_characters_of_the_choices():
    items = [Item("r:1", "q", (" ab", " abcdefghij"), 1)]
    assert judge(items, scores_of([(-4, -10)]), "acc_norm").value == 100.0
    assert judge(items, scores_of([(-4, -21)]), "acc_norm").value == 0.0


def test_equal_choices_go_to_the_first():
    assert judge(choice_items([0, 1], (1, 1)), scores_of([(-3, -3), (-3, -3)]), "acc").correct == (True, False)


def test_likelihood_is_the_geometric_mean_probability_with_the_delta_methods_error():
    items = [Item(f"r:{n}", "q", (" a",)) for n in range(3)]
    scores = scores_of([(-2,), (-6,), (-1,)], tokens=((1,), (4,), (2,)), greedy=((True,), (False,), (False,)))
    result = judge(items, scores, "likelihood")
    loss = 9 / 7
    assert result.loss == pytest.approx(loss)
    assert result.value == pytest.approx(100 * math.exp(-loss))
    residuals = np.array([-2 + loss, -6 + 4 * loss, -1 + 2 * loss])
    assert result.stderr == pytest.approx(result.value * math.sqrt((residuals**2).sum() * 3 / 2) / 7)
    grouped = [replace(item, group=group) for item, group in zip(items, "aab", strict=True)]
    sums = np.array([residuals[0] + residuals[1], residuals[2]])
    assert judge(grouped, scores, "likelihood").stderr == pytest.approx(
        result.value * max(math.sqrt((residuals**2).sum() * 3 / 2), math.sqrt((sums**2).sum() * 2)) / 7
    )
    assert result.greedy == pytest.approx(100 / 3)
    assert result.correct == ()
    assert "perplexity" in str(result)
    assert result.summary()["perplexity"] == pytest.approx(math.exp(loss))


def test_a_metric_that_does_not_fit_is_an_error():
    one = [Item("r:1", "q", (" a",))]
    with pytest.raises(InputError, match="use likelihood"):
        judge(one, scores_of([(-1,)]), "acc")
    with pytest.raises(InputError, match="unknown metric 'f1'"):
        judge(one, scores_of([(-1,)]), "f1")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_in_batches_equals_generation_alone(family, tokenizer, questions):
    model = tiny.build(family, depth=2).train()
    together = generate(model, tokenizer, questions, max_new_tokens=5)
    assert model.training
    model.eval()
    for item, answer in zip(questions, together, strict=True):
        ids = encode_pair(tokenizer, item.prompt, " x")[0]
        for _ in range(5):
            ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
            if ids[-1] == 2:
                break
        tail = ids[len(encode_pair(tokenizer, item.prompt, " x")[0]) :]
        assert answer == tokenizer.decode(tail, skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", ["xlstm", "minimax", "recurrent_gemma", "modernbert-decoder", "mamba", "jamba"])
def test_generation_pads_no_prompt_where_a_state_takes_pads_in_or_may(family, tokenizer, questions, monkeypatch):
    model = tiny.build(family, depth=3)
    items = [item for item in questions for _ in range(2)]
    alone = generate(model, tokenizer, items, max_new_tokens=8, token_budget=1)
    work, sizes = model.generate, []

    def counted(*, input_ids, **more):
        sizes.append(len(input_ids))
        return work(input_ids=input_ids, **more)

    monkeypatch.setattr(model, "generate", counted)
    assert generate(model, tokenizer, items, max_new_tokens=8) == alone
    assert min(sizes) > 1, "prompts of one length are still a batch"
    assert (sizes == [len(items)]) is (family in ("mamba", "jamba"))


GREED = {
    "repetition_penalty": 1.5,
    "num_beams": 4,
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 5,
    "suppress_tokens": list(range(3, 30)),
    "bad_words_ids": [[number] for number in range(3, 30)],
    "do_sample": True,
}


@pytest.mark.parametrize("name", GREED)
def test_generation_is_greedy_whatever_the_checkpoint_says(name, tokenizer, questions):
    model = tiny.build("llama", depth=2)
    expected = generate(model, tokenizer, questions, max_new_tokens=12)
    own = model.generation_config
    setattr(own, name, GREED[name])
    before = own.to_dict()
    assert generate(model, tokenizer, questions, max_new_tokens=12) == expected
    with pytest.raises(InputError):
        generate(model, tokenizer, questions, max_new_tokens=64)
    assert model.generation_config is own
    assert own.to_dict() == before


def test_generation_ends_where_the_checkpoint_says_and_leaves_its_config_after_a_failure(
    tokenizer, questions, monkeypatch
):
    model = tiny.build("llama", depth=2)
    own, work, ends = model.generation_config, model.generate, []
    own.eos_token_id, own.repetition_penalty = [2, 7, 11, 13], 1.5

    def watched(*, generation_config, **more):
        ends.append(generation_config.eos_token_id)
        return work(generation_config=generation_config, **more)

    monkeypatch.setattr(model, "generate", watched)
    generate(model, tokenizer, questions, max_new_tokens=4)
    assert ends == [[2, 7, 11, 13]]

    def broken(**_):
        raise RuntimeError("broken")

    monkeypatch.setattr(model, "generate", broken)
    with pytest.raises(RuntimeError, match="broken"):
        generate(model, tokenizer, questions, max_new_tokens=4)
    assert model.generation_config is own


def test_generation_in_batches_of_any_size_is_the_same_also_where_memory_ends(tokenizer, questions, monkeypatch):
    model = tiny.build("gpt2", depth=2).eval()
    expected = generate(model, tokenizer, questions, max_new_tokens=5)
    work, sizes, room = model.generate, [], 10**6

    def tight(*, input_ids, **more):
        if input_ids.numel() > room:
            raise torch.OutOfMemoryError
        sizes.append(len(input_ids))
        return work(input_ids=input_ids, **more)

    monkeypatch.setattr(model, "generate", tight)
    assert generate(model, tokenizer, questions, max_new_tokens=5, token_budget=1) == expected
    assert sizes == [1] * len(questions)
    sizes.clear()
    room = 3 * max(len(encode_pair(tokenizer, item.prompt, " x")[0]) for item in questions)
    assert generate(model, tokenizer, questions, max_new_tokens=5) == expected
    assert 1 < max(sizes) <= 3
    room = 1
    with pytest.raises(TrimError, match=r"out of memory: one row of \d+ tokens does not fit the device"):
        generate(model, tokenizer, questions, max_new_tokens=5)


def test_what_stands_behind_an_answers_end_is_a_token_that_is_not_read(tokenizer, questions, monkeypatch):
    model, without = tiny.build("gpt2", depth=1), copy.deepcopy(tokenizer)
    without.pad_token = None
    seen = []

    def at_once(*, input_ids, generation_config, **more):
        seen.append(generation_config.pad_token_id)
        return input_ids

    monkeypatch.setattr(model, "generate", at_once)
    for each in (tokenizer, without):
        generate(model, each, questions[:1], max_new_tokens=3)
    assert seen == [tokenizer.pad_token_id, tokenizer.eos_token_id]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_generation_cuts_prompts_from_the_left_and_refuses_to_cut_all(tokenizer):
    model = tiny.build("gpt2", depth=1)
    ids = encode_pair(tokenizer, "qzx" * 30, " x")[0]
    assert len(ids) > 64
    (answer,) = generate(model, tokenizer, [Item("r:1", "qzx" * 30, (" a",))], max_new_tokens=1)
    last = int(model(input_ids=torch.tensor([ids[-63:]])).logits[0, -1].argmax())
    assert answer == tokenizer.decode([last], skip_special_tokens=True).strip()
    (short,) = generate(model, tokenizer, [Item("r:1", "qzx" * 30, (" a",))], max_new_tokens=1, max_length=16)
    last = int(model(input_ids=torch.tensor([ids[-15:]])).logits[0, -1].argmax())
    assert short == tokenizer.decode([last], skip_special_tokens=True).strip()
    with pytest.raises(InputError, match="fill the 64 tokens of a row"):
        generate(model, tokenizer, [Item("r:1", "q", (" a",))], max_new_tokens=64)


def test_a_length_above_the_context_is_said(tokenizer):
    model, item = tiny.build("gpt2", depth=1), Item("r:1", "q", (" a", " b"))
    asked = EvalConfig(model="m", task="t", max_length=1000)
    note = inputs.scorer(asked, model, tokenizer, [item]).note
    assert str(note).startswith("--max-length 1000: rows have at most the 64 tokens of the model's context")
    assert "--max" not in str(inputs.scorer(asked.model_copy(update={"max_length": 64}), model, tokenizer, [item]).note)


def test_prompts_that_generation_would_cut_are_told_to_the_token(tokenizer):
    model, items = tiny.build("gpt2", depth=1), [Item("r:1", "q", (" a",)), Item("r:2", "qzx" * 10, (" a",))]
    room = 64 - len(encode_pair(tokenizer, items[1].prompt, " x")[0])
    assert cut_note(model, tokenizer, items, room, None, truncate=False) is None
    with pytest.raises(InputError, match=r"1 of 2 prompts leave no room .* \(first: r:2\): pass --truncate"):
        cut_note(model, tokenizer, items, room + 1, None, truncate=False)
    with pytest.raises(InputError, match="1 of 2 prompts leave no room"):
        cut_note(model, tokenizer, items, room, 63, truncate=False)
    assert str(cut_note(model, tokenizer, items, room + 1, None, truncate=True)).endswith(f"{room + 1}: 1")


def test_rows_longer_than_mpts_context_are_refused_or_cut(tokenizer):
    model = tiny.build("mpt", depth=2)
    long = Item("r:1", "qzx" * 30, (" a", " the cat"), 0, (1, 7))
    with pytest.raises(InputError, match=r"1 of 1 rows do not fit the context of 64 tokens \(first: r:1"):
        Scorer(model, tokenizer, [long])
    scorer = Scorer(model, tokenizer, [long], truncate=True)
    prompt, choices = scorer.encoded[0].prompt, scorer.encoded[0].continuations
    assert max(len(prompt) + len(ids) - 1 for ids in choices) == 64
    short = float(reference.token_logprobs(model, prompt, choices[0])[0].sum())
    assert scorer.score(model).loglik[0][0] == pytest.approx(short, abs=1e-4)
    assert len(generate(model, tokenizer, [long], max_new_tokens=3)) == 1


def test_standard_error_counts_questions_of_one_group_as_dependent():
    hits = (True, True, True, False, False, False)
    items = [Item(f"r:{i}", "q", (" a", " b"), group="xy"[i // 3], lengths=(1, 1)) for i in range(6)]
    rows = tuple((0.0, -1.0) if hit else (-1.0, 0.0) for hit in hits)
    scores = Scores(rows, ((1, 1),) * 6, ((False, False),) * 6)
    together = judge(items, scores, "acc").stderr
    apart = judge([replace(item, group=None) for item in items], scores, "acc").stderr
    assert apart == pytest.approx(100 * (0.25 / 5) ** 0.5)
    assert together == pytest.approx(100 * (2 * 1.5**2 * 2) ** 0.5 / 6)
