"""From items to rows: the same ids in training and evaluation, every token once, branches apart from each other."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import make_tokenizer
from tiny import build

from trimllm.errors import InputError
from trimllm.evaluation.batches import Batches, make_rows
from trimllm.evaluation.encoding import Encoded, attention_window, context_length, cut, encode, encode_pair, row_notes
from trimllm.tasks.items import Item
from trimllm.training.training_rows import task_examples


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def text_item(text, place="doc:1"):
    return Item(place, "", (text,))


def test_spaces_at_the_prompts_end_move_to_the_continuation(tokenizer):
    prompt, continuation = encode_pair(tokenizer, "the cat  ", "sat")
    assert prompt == ids(tokenizer, "the cat")
    assert prompt + continuation == ids(tokenizer, "the cat  sat")
    assert encode_pair(tokenizer, "the cat ", "sat") == encode_pair(tokenizer, "the cat", " sat")


def test_prompt_and_continuation_are_tokenized_together(tokenizer):
    prompt, continuation = encode_pair(tokenizer, "th", "e cat")
    assert continuation == ids(tokenizer, "the cat")[len(prompt) :]
    assert continuation != ids(tokenizer, "e cat")


@pytest.mark.parametrize(("template", "lead"), [("$A", []), ("<s> $A", [1]), ("<s> $A </s>", [1])])
def test_what_every_text_begins_with_stays_before_a_prompt_that_is_cut(tokenizer, template, lead):
    made, item = make_tokenizer(template), Item("r:1", "the cat sat on the mat and the dog", (" sat", " on"))
    whole = encode(made, [item], 64)[0]
    (short,) = encode(made, [item], 12, truncate=True)
    space = 13 - max(map(len, whole.continuations))
    assert short.prompt == (*lead, *whole.prompt[-(space - len(lead)) :])
    assert len(short.prompt) == space < len(whole.prompt)
    assert list(cut(made, whole.prompt, 1)) == [whole.prompt[-1]], "no room for both"
    assert cut(made, whole.prompt, 64) == whole.prompt


def test_a_chat_templates_own_start_stays_before_a_prompt_that_is_cut():
    made = make_tokenizer()
    assert list(cut(made, [1, 5, 6, 7, 8], 3)) == [1, 7, 8]


def test_empty_prompt_is_the_start_token(tokenizer):
    assert encode_pair(tokenizer, "", "the cat") == ([1], ids(tokenizer, "the cat"))
    without_bos = make_tokenizer()
    without_bos.bos_token = None
    assert encode_pair(without_bos, "", "the cat")[0] == [2]
    without_bos.eos_token = None
    with pytest.raises(InputError, match="neither a BOS nor an EOS"):
        encode_pair(without_bos, "", "the cat")


@pytest.mark.parametrize("end", ["</s>", "<pad>", "</s> <pad>"])
def test_special_tokens_that_the_tokenizer_adds_stay_before_the_prompt_and_never_between(tokenizer, end):
    """Also those that end a text with another token than EOS, as BERT's do."""
    wrapping = make_tokenizer(f"<s> $A {end}")
    prompt, continuation = encode_pair(wrapping, "the cat", " sat")
    assert prompt == [1, *ids(tokenizer, "the cat")]
    assert continuation == ids(tokenizer, " sat")


@pytest.mark.parametrize("template", ["$A", "<s> $A", "<s> $A </s>"])
def test_training_learns_the_ids_that_evaluation_scores_then_eos(template, questions):
    tokenizer = make_tokenizer(template)
    for item, example in zip(questions, task_examples(tokenizer, questions, 64), strict=True):
        prompt, continuation = encode_pair(tokenizer, item.prompt, item.target)
        assert list(example.ids) == [*prompt, *continuation, tokenizer.eos_token_id]
        assert list(example.ids[example.start :]) == [*continuation, tokenizer.eos_token_id]
        assert example.targets == len(continuation) + 1


def test_choices_without_a_prompt_keep_all_choices(tokenizer):
    (one,) = encode(tokenizer, [Item("r:1", "", ("the cat", "a dog ran", "no"), 2)], 64)
    assert one.prompt == (1,)
    assert [list(choice) for choice in one.continuations] == [ids(tokenizer, t) for t in ("the cat", "a dog ran", "no")]
    assert one.target == one.continuations[2]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 24, 30])
def test_windows_of_a_document_predict_each_token_once_from_the_one_before(tokenizer, length):
    text = ("qzxwvkj" * 5)[:length]
    document = ids(tokenizer, text)
    assert len(document) == length
    encoded = encode(tokenizer, [text_item(text)], 8)
    assert [token for one in encoded for token in one.target] == document
    assert [one.prompt for one in encoded] == [((1, *document)[8 * n],) for n in range(len(encoded))]
    assert max(len(row.ids) for row in make_rows(encoded)) <= 8
    assert {one.item for one in encoded} == {0}


def test_too_long_prompts_are_an_error_with_count_place_and_remedy(tokenizer, questions):
    needed = [len(one.prompt) + max(map(len, one.continuations)) for one in encode(tokenizer, questions, 64)]
    limit = sorted(needed)[-3]
    first = next(n for n, length in enumerate(needed) if length > limit + 1)
    count = sum(length > limit + 1 for length in needed)
    with pytest.raises(InputError) as failure:
        encode(tokenizer, questions, limit)
    for part in (
        f"{count} of 6",
        questions[first].place,
        f"{needed[first]} tokens",
        f"context of {limit}",
        "--truncate",
    ):
        assert part in str(failure.value)


def test_the_last_token_needs_no_room_and_one_more_token_does(tokenizer):
    item = Item("r:1", "the cat sat on", (" the mat", " a"))
    (one,) = encode(tokenizer, [item], 64)
    total = len(one.prompt) + max(map(len, one.continuations))
    (tight,) = encode(tokenizer, [item], total - 1)
    assert tight == one
    assert max(len(row.ids) for row in make_rows([tight], branches=False)) == total - 1
    with pytest.raises(InputError, match="do not fit"):
        encode(tokenizer, [item], total - 2)
    with pytest.raises(InputError, match="do not fit"):
        encode(tokenizer, [item], total - 1, room=1)


def test_truncate_cuts_prompts_from_the_left_and_leaves_choices_whole(tokenizer, questions):
    intact = encode(tokenizer, questions, 64)
    cut = encode(tokenizer, questions, 12, truncate=True)
    assert any(one != other for one, other in zip(cut, intact, strict=True))
    for one, other in zip(cut, intact, strict=True):
        assert one.continuations == other.continuations
        assert one.prompt == other.prompt[-len(one.prompt) :]
        longest = len(one.prompt) + max(map(len, one.continuations)) - 1
        assert longest == 12 or (longest < 12 and one.prompt == other.prompt)


def test_a_choice_that_fills_the_context_alone_is_an_error_even_with_truncate(tokenizer):
    for choices in ((" qwxz qwxz",), (" a", " qwxz qwxz")):
        with pytest.raises(InputError, match=r"r:7: a choice alone fills the context of 4 tokens"):
            encode(tokenizer, [Item("r:7", "a", choices)], 4, truncate=True)


@pytest.mark.parametrize("room", [0, 1])
@pytest.mark.parametrize(("prompt", "answer"), [(4, 30), (30, 4), (30, 30), (10, 9), (8, 7), (4, 4)])
def test_truncate_leaves_a_prompt_half_of_the_context_and_a_written_answer_the_rest(tokenizer, prompt, answer, room):
    item = Item("r:1", " ".join("q" * prompt), (" " + " ".join("w" * answer),), references=("w",))
    (whole,) = encode(tokenizer, [item], 512)
    asked, told = len(whole.prompt), len(whole.target)
    (cut,) = encode(tokenizer, [item], 16, truncate=True, room=room)
    assert cut.prompt == whole.prompt[asked - len(cut.prompt) :]
    assert cut.target == whole.target[: len(cut.target)]
    space, half = 16 + 1, min(asked, 8)
    fits = told + room <= space - half
    assert len(cut.target) == (told if fits else min(told, space - half))
    assert len(cut.prompt) == (min(asked, space - told - room) if fits else half)
    assert (cut.prompt_cut, cut.answer_cut) == (cut.prompt != whole.prompt, not fits)
    assert (not row_notes(reported=[cut])) is (asked + told + room <= space)


def test_what_was_cut_is_counted_by_rows(tokenizer):
    asked, told = " ".join("q" * 30), " " + " ".join("w" * 30)
    items = [
        Item(f"r:{i}", p, (a,), references=("w",)) for i, (p, a) in enumerate([(asked, told), ("q", told), ("q", " w")])
    ]
    note = "--truncate, 3 reported rows: prompts cut from the left: 1, answers cut at their end: 2"
    assert row_notes(reported=encode(tokenizer, items, 16, truncate=True), training=[]) == [note]
    with pytest.raises(InputError, match=r"2 of 3 rows do not fit .*long written answers at their end"):
        encode(tokenizer, items, 16)


def test_right_choices_that_read_as_others_are_counted(tokenizer):
    choices = [(" yes", " no"), (" yes", " yes"), (" no", " yes", " yes"), (" é", " à")]  # unknown letters
    items = [Item(f"r:{i}", "q", each, answer=0) for i, each in enumerate(choices)]
    encoded = encode(tokenizer, items, 16)
    assert row_notes(training=[], calibration=encoded[:1]) == []
    (note,) = row_notes(reported=encoded)
    alike = sum(len(set(one.continuations)) < len(one.continuations) for one in encoded) - 1
    assert note.startswith(f"in {alike} of 4 reported rows another choice has the same tokens as the right one: ")


def test_a_choice_without_tokens_is_an_error(tokenizer):
    with pytest.raises(InputError, match="r:3: a choice or target has no tokens"):
        encode(tokenizer, [Item("r:3", "a", (" yes", ""))], 64)


@pytest.mark.parametrize("branches", [True, False])
@pytest.mark.parametrize("budget", [1, 20, 60, 10_000])
def test_batches_keep_to_the_budget_and_hold_every_continuation_once(tokenizer, questions, branches, budget):
    encoded = encode(tokenizer, questions, 64)
    made = Batches(make_rows(encoded, branches=branches), budget)
    for batch in made:
        count, length = batch.real.shape
        assert count * length <= budget or count == 1
        assert len(batch.targets) == len(batch.where) == len(batch.segment)
        for number, (item, choice) in enumerate(batch.owners):
            assert batch.targets[batch.segment == number].tolist() == list(encoded[item].continuations[choice])
    owners = sorted(owner for batch in made for owner in batch.owners)
    assert owners == [(n, c) for n, item in enumerate(questions) for c in range(len(item.continuations))]
    assert len(made) == len(list(made))


def test_branches_see_the_prompt_and_themselves_at_positions_behind_the_prompt():
    one = Encoded(0, (5, 6, 7), ((10, 11, 12), (20,), (30, 31)))
    other = Encoded(1, (8,), ((40, 41), (50, 51)))
    (batch,) = Batches(make_rows([one, other]), 100, pad_id=0)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 10, 11, 30], [8, 40, 50, 0, 0, 0]]
    assert batch.inputs["position_ids"].tolist()[0] == [0, 1, 2, 3, 4, 3]
    assert batch.inputs["position_ids"].tolist()[1][:3] == [0, 1, 1]
    seen = (batch.inputs["attention_mask"][:, 0] == 0).int().tolist()
    assert seen[0] == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 0, 0, 1],
    ]
    assert [row[:3] for row in seen[1][:3]] == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    assert batch.owners == ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))
    assert batch.where.tolist() == [2, 3, 4, 2, 2, 5, 6, 7, 6, 8]
    assert batch.targets.tolist() == [10, 11, 12, 20, 30, 31, 40, 41, 50, 51]


def test_padding_is_seen_by_no_real_token():
    short, long = Encoded(0, (5,), ((10, 11), (20, 21))), Encoded(1, tuple(range(3, 9)), ((10, 11), (20, 21)))
    (batch,) = Batches(make_rows([short, long]), 100)
    seen = batch.inputs["attention_mask"][:, 0] == 0
    padded = ~batch.real
    assert not (seen & batch.real[:, :, None] & padded[:, None, :]).any()
    assert seen.any(-1).all(), "a query that sees nothing gives NaN"


def test_windows_of_one_document_in_one_batch_share_their_owner(tokenizer):
    encoded = encode(tokenizer, [text_item("the cat sat on the mat. a dog ran to the cat;")], 4)
    (batch,) = Batches(make_rows(encoded), 1000)
    assert batch.owners == ((0, 0),)
    assert set(batch.segment.tolist()) == {0}
    assert sorted(batch.targets.tolist()) == sorted(token for one in encoded for token in one.target)


def test_context_length_is_the_configs_unless_less_is_asked():
    config = build("gpt2", depth=1).config
    assert context_length(config) == 64
    assert context_length(config, 16) == 16
    assert context_length(config, 1000) == 64
    assert context_length(build("bloom", depth=1).config) == 2048
    for family in ("mpt", "dbrx"):
        assert context_length(build(family, depth=1).config) == 64
        assert context_length(build(family, depth=1).config, 16) == 16


def test_attention_window_is_the_shortest_that_is_in_use():
    assert attention_window(build("qwen2-sliding", depth=3).config) == 4
    assert attention_window(build("qwen2", depth=1).config) is None
    assert attention_window(build("llama", depth=1).config) is None
    both = SimpleNamespace(sliding_window=9, attention_chunk_size=6)
    assert attention_window(SimpleNamespace(get_text_config=lambda decoder: both)) == 6


def test_batches_move_with_their_dtype():
    one = Encoded(0, (5,), ((10, 11), (20, 21)))
    batch = Batches(make_rows([one]), 100, dtype=torch.bfloat16)[0]
    assert batch.inputs["attention_mask"].dtype == torch.bfloat16
    assert torch.isfinite(batch.inputs["attention_mask"]).all()
    assert replace(batch).to("cpu").owners == batch.owners
