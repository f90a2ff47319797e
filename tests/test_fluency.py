"""The guard on open-ended writing: what it measures, and when it warns."""

import helpers_run as h
import pytest

from trimllm.evaluation import fluency, generation
from trimllm.run import progressive
from trimllm.tasks.items import Item

GOOD = {"repetition": 5.0, "silence": 0.0}


def said(monkeypatch, texts):
    """`measure` with these texts in place of generated ones, and the prompts that were gone on with."""
    asked = []

    def answers(model, tokenizer, items, max_new_tokens):
        asked.extend(item.prompt for item in items)
        return texts[: len(items)]

    monkeypatch.setattr(fluency, "generate", answers)
    monkeypatch.setattr(fluency.encoding, "context_length", lambda config: 64)
    model = type("Model", (), {"config": None})
    items = [Item(f"a:{n}", "one two three four", (" yes",)) for n in range(len(texts))]
    return fluency.measure(model, None, items), asked


def test_repeated_four_grams_and_empty_texts_are_counted_in_percent(monkeypatch):
    found, asked = said(monkeypatch, ["a b c d a b c d", "a b c d e f g h", "", ""])
    assert found == {"repetition": pytest.approx(100 * (1 / 5) / 4), "silence": 50.0}
    assert asked == ["one two"] * 4


def test_scripts_without_spaces_are_counted_by_character(monkeypatch):
    found, _ = said(monkeypatch, ["\u597d" * 100, "\u533b\u751f\u8bf4\u75c5\u4eba\u9700\u8981\u4f11\u606f"])
    assert found["repetition"] == pytest.approx(100 * (96 / 97) / 2)
    assert fluency._beginning(Item("a:1", "\u533b" * 10, ("x",))) == "\u533b" * 5
    assert fluency._beginning(Item("a:1", "\u533b" * 100, ("x",))) == "\u533b" * fluency.WORDS
    mixed = "Which is the capital? \u5317\u4eac or another one of the cities"
    assert fluency._beginning(Item("a:1", mixed, ("x",))) == "Which is the capital? \u5317\u4eac"
    assert fluency._beginning(Item("a:1", "\n" * 40 + "a b", ("x",))) == "a"


def test_a_document_without_prompt_is_gone_on_with_from_its_beginning(monkeypatch):
    asked = []
    monkeypatch.setattr(fluency, "generate", lambda m, t, items, max_new_tokens: [asked.append(items[0].prompt) or "x"])
    monkeypatch.setattr(fluency.encoding, "context_length", lambda config: 64)
    fluency.measure(type("Model", (), {"config": None}), None, [Item("a:1", "", ("the first half of it",))])
    assert asked == ["the first"]


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (GOOD, None),
        (GOOD | {"repetition": 25.0}, None),
        (GOOD | {"repetition": 26.0}, "repeats itself (26 %, the base 5 %)"),
        (GOOD | {"silence": 51.0}, "says nothing (51 %, the base 0 %)"),
    ],
)
def test_only_a_change_since_the_base_is_warned_of(now, expected):
    found = fluency.warning(GOOD, now)
    assert found is None if expected is None else expected in found


def test_a_run_records_it_for_base_and_result_and_says_when_it_collapsed(tmp_path, monkeypatch, capsys):
    h.fast(monkeypatch)
    base, task = h.save_base(tmp_path / "base"), h.save_task(tmp_path / "task")
    outcomes = iter([GOOD, {"repetition": 90.0, "silence": 0.0}])
    monkeypatch.setattr(fluency, "measure", lambda *_: next(outcomes))
    asked = h.settings(base, task, tmp_path / "run", depth=3, warmup_epochs=0, epochs_per_drop=0)
    _, history = progressive.trim(**asked)
    assert [history[0]["fluency"]["repetition"], history[-1]["fluency"]["repetition"]] == [5.0, 90.0]
    assert "warning: the trimmed model repeats itself (90 %, the base 5 %)" in capsys.readouterr().err


def test_it_generates_with_the_real_thing(tmp_path):
    from trimllm.checkpoints import loading

    folder = h.save_base(tmp_path)
    model, tokenizer = loading.load_model(folder), loading.load_tokenizer(folder)
    items = [Item("a:1", "what is it that it is", (" it",))] * 2
    found = fluency.measure(model, tokenizer, items)
    texts = generation.generate(model, tokenizer, [Item("a:1", "what is it", (" it",))] * 2, max_new_tokens=32)
    assert found["silence"] == 100 * sum(not text for text in texts) / 2
