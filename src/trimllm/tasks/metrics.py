"""Numbers about answers: exact match, ROUGE-L and repetition. Pure functions; no model here."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1.0 if the normalized answer is one of the normalized references, else 0.0 (SQuAD's normalization). Texts of
    which that leaves nothing (`A`, `+`) are compared as they stand, but for case and white space."""
    return float(_compared(answer) in {_compared(reference) for reference in references})


def _compared(text: str) -> tuple[str, str]:
    bare = normalize_answer(text)
    return bare, "" if bare else " ".join(text.lower().split())


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, the articles a / an / the, and surplus white space (Rajpurkar et al., 2016)."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Characters of scripts that put no spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")
"""What white space separates; where a script puts none between words, a character."""


def words(text: str) -> list[str]:
    """The words of a text, as `WORD` has them."""
    return WORD.findall(text)


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """The best ROUGE-L F-measure (0 to 1, stemmed) over the references (Lin, 2004); `words` in other scripts than the
    Latin one count as they stand, since the library's own tokenizer knows a to z and digits alone."""
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

    class AnyScript(Tokenizer):
        latin = DefaultTokenizer(use_stemmer=True)

        def tokenize(self, text: str) -> list[str]:
            text = unicodedata.normalize("NFC", text.lower())
            letters = (c if c.isalnum() or unicodedata.category(c).startswith("M") else " " for c in text)
            spaced = words("".join(letters))
            return [token for word in spaced for token in (self.latin.tokenize(word) if word.isascii() else [word])]

    scorer = RougeScorer(["rougeL"], tokenizer=AnyScript())
    return max((scorer.score(reference, answer)["rougeL"].fmeasure for reference in references), default=0.0)


def repetition(tokens: Sequence[object]) -> float:
    """Share (0 to 1) of 4-grams that occurred before in the same sequence; 0.0 when it has fewer than 4 tokens."""
    grams = [tuple(tokens[start : start + 4]) for start in range(len(tokens) - 3)]
    if not grams:
        return 0.0
    return sum(count - 1 for count in Counter(grams).values()) / len(grams)
