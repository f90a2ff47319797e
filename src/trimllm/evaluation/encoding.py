"""From items to token ids: what fits, what is cut, and where a continuation begins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

from trimllm.errors import InputError
from trimllm.tasks.items import Item


@dataclass(frozen=True)
class Encoded:
    """Token ids of one item: the shared prompt and each continuation. `item` is its index in the encoded list."""

    item: int
    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]
    answer: int = 0
    prompt_cut: bool = False
    """The beginning of its prompt did not fit."""
    answer_cut: bool = False
    """The end of its written answer did not fit, or the `room` after it."""

    @property
    def target(self) -> tuple[int, ...]:
        return self.continuations[self.answer]

    def right_only(self) -> Encoded:
        """The item without its wrong choices."""
        return replace(self, continuations=(self.target,), answer=0)


def context_length(model_config: Any, limit: int | None = None) -> int:
    """The longest row the model takes, as its config says, or `limit` if that is less."""
    text_config = model_config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "max_seq_len")
    longest = next((length for name in names if (length := getattr(text_config, name, None))), 2048)
    return min(longest, limit) if limit else longest


def attention_window(model_config: Any) -> int | None:
    """How far back the shortest-sighted layers see, in tokens; None where all see everything.

    A 4-D mask takes the place of a window: past its length, branches would see too much.
    """
    text_config = model_config.get_text_config(decoder=True)
    names = ("sliding_window", "attention_chunk_size", "window_size")
    windows = [window for name in names if (window := getattr(text_config, name, None))]
    return min(windows, default=None)


def _start_token(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise InputError("the tokenizer has neither a BOS nor an EOS token: text without a prompt cannot be scored")


@lru_cache(maxsize=8)
def _added(tokenizer: Any) -> tuple[int, int]:
    """How many tokens the tokenizer puts before and after every text (BOS; EOS, `[SEP]`)."""
    bare, whole = (tokenizer("a", add_special_tokens=own, verbose=False)["input_ids"] for own in (False, True))
    places = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    return (places[0], len(whole) - len(bare) - places[0]) if bare and places else (0, 0)


def _ids(tokenizer: Any, text: str) -> list[int]:
    """The text's tokens after those that every text begins with; what ends every text is left out."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return ids[: len(ids) - _added(tokenizer)[1]]


def cut(tokenizer: Any, prompt: Sequence[int], space: int) -> Sequence[int]:
    """The end of a prompt for which there is so much space, after what every text begins with (BOS)."""
    lead = max(_added(tokenizer)[0], int(prompt[0] == tokenizer.bos_token_id)) if prompt else 0
    if len(prompt) <= space or space <= lead:
        return prompt[-max(space, 1) :]
    return [*prompt[:lead], *prompt[len(prompt) - space + lead :]]


def encode_pair(tokenizer: Any, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and those that the continuation adds to it (the convention of lm-evaluation-harness).

    Spaces at the prompt's end move to the continuation; both are tokenized together, so that training sees the ids that
    evaluation scores. An empty prompt becomes the BOS (or EOS) token.
    """
    if not prompt:
        bare = tokenizer(continuation, add_special_tokens=False, verbose=False)["input_ids"]
        return [_start_token(tokenizer)], bare
    stripped = prompt.rstrip()
    if stripped:
        prompt, continuation = stripped, prompt[len(stripped) :] + continuation
    before, both = _ids(tokenizer, prompt), _ids(tokenizer, prompt + continuation)
    return before, both[len(before) :]


def vocabulary(model: Any) -> int:
    """Tokens that the model has embeddings for."""
    return int(model.get_input_embeddings().weight.shape[0])


def vocabulary_of(config: Any) -> int:
    """Tokens that the model of this config has embeddings for."""
    return int(config.get_text_config(decoder=True).vocab_size)


def pad_id(tokenizer: Any, model: Any, without: int = 0) -> int:
    """What fills rows: the tokenizer's own padding, if the model has an embedding for it."""
    own = tokenizer.pad_token_id
    return own if own is not None and own < vocabulary(model) else without


def rows_of(encoded: Iterable[Encoded]) -> Iterator[tuple[int, ...]]:
    """Their prompts and continuations."""
    return (ids for one in encoded for ids in (one.prompt, *one.continuations))


def check_vocabulary(tokenizer: Any, rows: Iterable[Sequence[int]], known: int) -> None:
    """Tokenizers may have tokens that their model has no embedding for (Gemma 3 1B's has one for images).

    Raises:
        InputError: if one of them is in a row.
    """
    if len(tokenizer) <= known:
        return
    for ids in rows:
        if (largest := max(ids, default=0)) >= known:
            token = tokenizer.convert_ids_to_tokens(largest)
            raise InputError(
                f"a row holds {token!r}, token {largest}, and the model has embeddings for {known} tokens: "
                "take it out of the row, or mend the tokenizer"
            )


def encode(
    tokenizer: Any, items: Sequence[Item], max_length: int, *, truncate: bool = False, room: int = 0
) -> list[Encoded]:
    """Token ids of items, in order.

    Text longer than the context becomes several windows of it (all with the same `item`). A prompt that does not fit
    with its longest continuation and `room` more tokens is an error, or with `truncate` cut from the left, once a
    written answer that would leave it less than half of the context is cut at its end; choices never are. The last
    token takes no room, since it is never an input.

    Raises:
        InputError: naming how many rows are too long and the first of them; or a continuation without tokens.
    """
    encoded: list[Encoded] = []
    too_long: list[tuple[Item, int]] = []
    for number, item in enumerate(items):
        pairs = [encode_pair(tokenizer, item.prompt, text) for text in item.continuations]
        prompt, continuations = pairs[0][0], [tuple(ids) for _, ids in pairs]
        if not all(continuations):
            raise InputError(
                f"{item.place}: a choice or target has no tokens of its own after the prompt: check the row"
            )
        if not item.prompt and len(continuations) == 1:
            encoded.extend(_windows(number, prompt, continuations[0], max_length))
            continue
        needed = max(map(len, continuations)) + room
        if len(prompt) + needed <= max_length + 1:
            encoded.append(Encoded(number, tuple(prompt), tuple(continuations), item.answer))
            continue
        too_long.append((item, len(prompt) + needed))
        space = max_length + 1 - needed
        answer_cut = bool(item.references) and space < min(len(prompt), max_length // 2)
        if answer_cut:
            space = max(1, min(len(prompt), max_length // 2))
            continuations = [ids[: max_length + 1 - space] for ids in continuations]
        if space <= 0 and truncate:
            raise InputError(f"{item.place}: a choice alone fills the context of {max_length} tokens: drop the row")
        cuts = {"prompt_cut": len(prompt) > space, "answer_cut": answer_cut}
        encoded.append(Encoded(number, tuple(cut(tokenizer, prompt, space)), tuple(continuations), item.answer, **cuts))
    if too_long and not truncate:
        first, length = too_long[0]
        raise InputError(
            f"{len(too_long)} of {len(items)} rows do not fit the context of {max_length} tokens (first: "
            f"{first.place}, {length} tokens): pass --truncate to cut prompts from the left and long written answers "
            "at their end, or drop the rows"
        )
    return encoded


class Cut(Protocol):
    """A row of which something may have been cut off; see `Encoded`, which is one."""

    @property
    def prompt_cut(self) -> bool: ...
    @property
    def answer_cut(self) -> bool: ...


def row_notes(**sets: Sequence[Cut]) -> list[str]:
    """Lines for the user on each set, by its name, of which `truncate` cut something off, or in which right choices
    cannot be told from others."""
    notes = []
    for name, made in sets.items():
        prompts, answers = sum(row.prompt_cut for row in made), sum(row.answer_cut for row in made)
        if prompts or answers:
            notes.append(
                f"--truncate, {len(made):,} {name} rows: prompts cut from the left: {prompts:,}, "
                f"answers cut at their end: {answers:,}"
            )
        if alike := sum(isinstance(row, Encoded) and row.continuations.count(row.target) > 1 for row in made):
            notes.append(
                f"in {alike:,} of {len(made):,} {name} rows another choice has the same tokens as the right one: which "
                "is likelier says nothing there"
            )
    return notes


def _windows(number: int, start: list[int], ids: tuple[int, ...], max_length: int) -> Iterator[Encoded]:
    """Disjoint windows over a document; each is predicted from the last token before it."""
    for begin in range(0, len(ids), max_length):
        window = ids[begin : begin + max_length]
        yield Encoded(number, tuple(start), (window,))
        start = [window[-1]]
