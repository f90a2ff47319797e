"""A tokenizer in a GGUF file: llama.cpp rebuilds it from tokens, merges or scores, and a name for how text is split.

What it cannot rebuild is refused: tokens that differ are worse than no file. Two kinds exist (`src/llama-vocab.cpp`):
byte-level BPE ("gpt2"), whose split is one of a fixed list of regular expressions, and SentencePiece BPE ("llama"),
which merges whatever neighbours make a token, best score first.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from trimllm.checkpoints import loading
from trimllm.errors import InputError, one_line

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens, numbered as in the format."""
SPACE = "▁"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")

_ENDING = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HEAD = r"[^\r\n\p{L}\p{N}]?"
_PATH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS: dict[str, tuple[list[str], bool]] = {
    "gpt-2": ([_GPT2], False),
    "llama-bpe": ([rf"{_SUFFIX}|{_HEAD}\p{{L}}+|\p{{N}}{{1,3}}|{_ENDING}"], True),
    "qwen2": ([rf"{_SUFFIX}|{_HEAD}\p{{L}}+|\p{{N}}|{_ENDING}"], False),
    "smollm": ([r"\p{N}", _GPT2], False),
    "tekken": ([rf"{_HEAD}{_UPPER}*{_LOWER}+|{_HEAD}{_UPPER}+{_LOWER}*|\p{{N}}|{_PATH}"], True),
    "gpt-4o": (
        [rf"{_HEAD}{_UPPER}*{_LOWER}+{_SUFFIX}?|{_HEAD}{_UPPER}+{_LOWER}*{_SUFFIX}?|\p{{N}}{{1,3}}|{_PATH}"],
        False,
    ),
    "qwen35": (
        [
            rf"{_SUFFIX}|{_HEAD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        ],
        False,
    ),
    "seed-coder": ([rf"{_SUFFIX}|{_HEAD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"], False),
    "deepseek-coder": ([r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"], False),
}
"""`tokenizer.ggml.pre` -> regular expressions that split a text one after the other, and whether llama.cpp takes words
that are tokens as they are, whatever the merges say. Those of the families we write, as their tokenizers state them."""

ATOMS = (
    "a",
    "B",
    "é",
    "中",
    "\u0301",
    "1",
    "٣",
    " ",
    "\u00a0",
    "\n",
    "\r",
    "\t",
    "'",
    "s",
    "LL",
    ".",
    "/",
    "-",
    "$",
    "🙂",
)
"""Letters, marks, digits, spaces, line ends and signs of every kind that the expressions tell apart."""


def describe(folder: Path, size: int, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Keys that follow `tokenizer.` for the tokenizer in `folder`, of a model with `size` embeddings.

    Raises:
        InputError: if there is none, or llama.cpp cannot do what it does, naming what and the remedy.
    """
    tokenizer = loading.load_tokenizer(folder, trust_remote_code=trust_remote_code)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refuse(type(tokenizer).__name__, "is not one of the `tokenizers` library")
    stated = json.loads(backend.to_str())
    model = stated["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("end_of_word_suffix"):
        raise _refuse(f"model {model['type']}", "rebuilds BPE only, without dropout and suffixes")
    pieces = model.get("byte_fallback") or SPACE in json.dumps(stated["normalizer"], ensure_ascii=False)
    keys = _vocabulary(backend, stated, size) | _special(tokenizer, folder, size)
    return keys | (_sentencepiece(backend, stated, keys["ggml.tokens"]) if pieces else _byte_level(backend, stated))


def _refuse(what: str, why: str) -> InputError:
    return InputError(
        f"--to gguf: {what} of the tokenizer: llama.cpp {why}: take --to onnx or openvino, or the checkpoint"
    )


def _vocabulary(backend: Any, stated: dict[str, Any], size: int) -> dict[str, Any]:
    """Tokens by id, and what they are. Ids without a token are named, ids without an embedding left out."""
    tokens = {number: token for token, number in backend.get_vocab(with_added_tokens=True).items()}
    types = dict.fromkeys(tokens, NORMAL)
    if stated["model"].get("byte_fallback"):
        types |= {number: BYTE for number, token in tokens.items() if BYTE_TOKEN.fullmatch(token)}
    for added in stated["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise _refuse(f"token {added['content']!r} with lstrip, rstrip or single_word", "knows no such tokens")
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
        if added["normalized"] and not added["special"] and SPACE in added["content"]:
            tokens[added["id"]] = added["content"].replace(SPACE, " ")  # as it looks in the text
    unknown = stated["model"].get("unk_token")
    types |= {number: UNKNOWN for number, token in tokens.items() if token == unknown}
    filled = [tokens.get(number) or f"[PAD{number}]" for number in range(size)]
    return {"ggml.tokens": filled, "ggml.token_type": [types.get(number, UNUSED) for number in range(size)]}


def _special(tokenizer: Any, folder: Path, size: int) -> dict[str, Any]:
    """Special ids, what surrounds a text, and the chat template."""
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    ends = _ends(folder)
    if ids["eos_token_id"] is None and ends:
        ids["eos_token_id"] = ends[0]
    others = [number for number in ends if number != ids["eos_token_id"]]
    ids |= dict(zip(("eot_token_id", "eom_token_id"), others, strict=False))
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    starts, stops = whole[:1] == [ids["bos_token_id"]], whole[-1:] == [ids["eos_token_id"]]
    if whole != whole[:starts] + bare + whole[len(whole) - stops :]:
        raise _refuse(f"what it puts around a text ({whole} for {bare})", "puts one token before a text and one after")
    keys = {f"ggml.{name}": number for name, number in ids.items() if number is not None and number < size}
    keys |= {"ggml.add_bos_token": starts, "ggml.add_eos_token": stops}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return keys | ({"chat_template": template} if template else {})


def _ends(folder: Path) -> list[int]:
    """The ids that end a generated text, by the generation config or else by the config."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        try:
            ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {one_line(error)}") from error
        if ends is not None:
            return [ends] if isinstance(ends, int) else list(ends)
    return []


def _byte_level(backend: Any, stated: dict[str, Any]) -> dict[str, Any]:
    normalizer = (stated["normalizer"] or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise _refuse(f"normalizer {normalizer}", "normalizes no text of a byte-level tokenizer")
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in stated["model"]["merges"]]
    return {"ggml.model": "gpt2", "ggml.pre": split_name(backend, stated), "ggml.merges": merges}


def split_name(backend: Any, stated: dict[str, Any]) -> str:
    """The name under which llama.cpp splits text as this tokenizer does, found by trying.

    Raises:
        InputError: if it has none that we know.
    """
    fitting = [name for name, (expressions, _) in SPLITS.items() if _same_split(backend.pre_tokenizer, expressions)]
    if not fitting:
        raise _refuse(f"pre-tokenizer {_shortened(stated['pre_tokenizer'])}", f"splits as one of {', '.join(SPLITS)}")
    ignores = bool(stated["model"].get("ignore_merges"))
    for name in fitting:
        if SPLITS[name][1] == ignores or _all_merged(stated):
            return name
    raise _refuse(f"ignore_merges: {ignores}".lower(), f"takes the opposite with the split {fitting[0]}")


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 120 else f"{text[:117]}..."


def _same_split(own: Any, expressions: list[str]) -> bool:
    steps = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    other = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if own is None:
        return False
    return all(_pieces(own, text) == _pieces(other, text) for text in probes())


def _pieces(pre_tokenizer: Any, text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)]


def probes() -> Iterator[str]:
    """Texts that tell the known splits apart: every three atoms in a row, twice, and runs of digits."""
    yield from ("1234567890", " 12 345 6789", "aB1 aB'S ab's AB'LL don'T", "a" * 40 + " " * 9 + "b\n\n\n  c")
    for atoms in itertools.product(ATOMS, repeat=3):
        yield "".join((*atoms, "a", *atoms))


def _all_merged(stated: dict[str, Any]) -> bool:
    """Whether the merges make every token, so that it does not matter if they are ignored."""
    merging = Tokenizer.from_str(json.dumps(stated | {"model": stated["model"] | {"ignore_merges": False}})).model
    added = {token["content"] for token in stated["added_tokens"]}
    return all(len(merging.tokenize(word)) == 1 for word in stated["model"]["vocab"] if word not in added)


def _sentencepiece(backend: Any, stated: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    model = stated["model"]
    if not model.get("byte_fallback"):
        raise _refuse("byte_fallback: false", "writes unknown letters as bytes")
    prefixed = _spelled(backend, "a") == [f"{SPACE}a"]
    for text in ("a", "a b", "a  b\tc\n\nd", "é 中\u00a0x 🙂", "a\r\n b ", "1 22", "Ａ ﬁ ½ e\u0301"):
        if _spelled(backend, text) != [SPACE * prefixed + text.replace(" ", SPACE)]:
            raise _refuse(
                f"spelling of {text!r} as {_spelled(backend, text)}", "splits no text, and replaces spaces only"
            )
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    added = {token["content"] for token in stated["added_tokens"]}
    ranks = _ranks(pairs, model["vocab"], added)
    fixed = {number for number, token in enumerate(tokens) if token in added or BYTE_TOKEN.fullmatch(token)}
    scores = [0.0 if i in fixed else -float(ranks.get(token, len(ranks))) for i, token in enumerate(tokens)]
    return {"ggml.model": "llama", "ggml.pre": "default", "ggml.scores": scores, "ggml.add_space_prefix": prefixed}


def _spelled(backend: Any, text: str) -> list[str]:
    """What the merges see of a text."""
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return [text] if backend.pre_tokenizer is None else _pieces(backend.pre_tokenizer, text)


def _ranks(pairs: list[tuple[str, ...]], vocabulary: Iterable[str], added: set[str]) -> dict[str, int]:
    """Token -> how many tokens are merged before it. llama.cpp knows tokens by score alone, so this must be all.

    Raises:
        InputError: if two tokens take turns in the merges, or a pair that makes a token is not among them.
    """
    ranks: dict[str, int] = {}
    last = None
    for pair in pairs:
        token = "".join(pair)
        if token != last and token in ranks and token not in added:
            raise _refuse(f"merges of {token!r} before and after those of others", "merges by one score per token")
        ranks.setdefault(token, len(ranks))
        last = token
    known, merged = set(vocabulary), set(pairs)
    for token in known - added:
        if BYTE_TOKEN.fullmatch(token):
            continue
        for cut in range(1, len(token)):
            pair = (token[:cut], token[cut:])
            if pair[0] in known and pair[1] in known and pair not in merged:
                raise _refuse(f"merges (they lack {pair[0]!r} with {pair[1]!r})", "merges all that make a token")
    return ranks
