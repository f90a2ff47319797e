"""How far linear classifiers get on a task of labelled texts, and how far apart runs of the same model are.

    python benchmarks/linear.py benchmarks/base/lab --task DATA/legal/cuad_clause_type
    python benchmarks/linear.py benchmarks/base/lab --task DATA/legal/cuad_clause_type --runs CHECKPOINT CHECKPOINT ...

Logistic regression on TF-IDF of the words (lower case without signs, as usual; and as they stand), on TF-IDF of the
base's own tokens, and on the mean and maximum of its
residual stream before every fourth block: what the tokenizer costs, and what pre-training has given. With `--runs`,
fine-tuned checkpoints of one shape: the accuracy of each, of their averaged log-probabilities and of their averaged
weights, and on how many questions they agree. All train on the training rows and are asked the reported ones. The last
line is one JSON object. Needs scikit-learn, which the tests' extra brings.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _sides import machine, run
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from trimllm.checkpoints.loading import load_model, load_tokenizer
from trimllm.console import table
from trimllm.evaluation.evaluate import Scorer
from trimllm.tasks import load_task
from trimllm.tasks.items import Item

BATCH = 16
STRENGTHS = (0.003, 0.03)
"""Of the regression on states, whose better one counts: kind to it."""


def bags(train: Sequence[Item], test: Sequence[Item], ids: dict[str, list[int]]) -> dict[str, float]:
    """Accuracy of TF-IDF (sublinear) and logistic regression."""
    ways = {
        "words": TfidfVectorizer(sublinear_tf=True),
        "words, case and signs kept": TfidfVectorizer(sublinear_tf=True, lowercase=False, token_pattern=r"\w+|[^\w\s]"),
        "the base's tokens": TfidfVectorizer(analyzer=lambda text: list(map(str, ids[text])), sublinear_tf=True),
    }
    found = {}
    for name, way in ways.items():
        model = make_pipeline(way, LogisticRegression(max_iter=2000, C=10))
        model.fit([item.prompt for item in train], [item.answer for item in train])
        found[name] = 100 * float(model.score([item.prompt for item in test], [item.answer for item in test]))
    return found


@torch.inference_mode()
def states(
    model: Any, items: Sequence[Item], ids: dict[str, list[int]], places: Sequence[int]
) -> dict[int, np.ndarray]:
    """(items, 2 * hidden size) mean and maximum of the residual stream over the tokens, before each of these blocks."""
    found: dict[int, list[Any]] = {place: [None] * len(items) for place in places}
    order = sorted(range(len(items)), key=lambda i: len(ids[items[i].prompt]))
    for begin in range(0, len(order), BATCH):
        batch = order[begin : begin + BATCH]
        rows = [ids[items[i].prompt] for i in batch]
        width = max(map(len, rows))
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        stream = model.model(padded, attention_mask=real, output_hidden_states=True).hidden_states
        for place in places:
            mean = (stream[place] * real[..., None]).sum(1) / real.sum(1, keepdim=True)
            most = stream[place].masked_fill(real[..., None] == 0, -torch.inf).amax(1)
            for i, vector in zip(batch, torch.cat([mean, most], dim=1).numpy(), strict=True):
                found[place][i] = vector
    return {place: np.stack(rows) for place, rows in found.items()}


def logprobs(model: Any, tokenizer: Any, items: Sequence[Item]) -> np.ndarray:
    """(items, choices) log-probability of each choice among them."""
    scores = np.array(Scorer(model, tokenizer, items, truncate=True).score(model).loglik)
    return np.asarray(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))


def together(folders: Sequence[Path], tokenizer: Any, items: Sequence[Item]) -> dict[str, float]:
    """How good several runs are, one by one and averaged, and how far they agree; percent."""
    right = np.array([item.answer for item in items])
    models = [load_model(folder, dtype=torch.float32) for folder in folders]
    every = [logprobs(model, tokenizer, items) for model in models]
    hits = np.array([scores.argmax(1) == right for scores in every])
    found = {f"run {number + 1}": float(hit.mean()) for number, hit in enumerate(hits)}
    found["all right"], found["all wrong"] = float(hits.all(0).mean()), float((~hits).all(0).mean())
    found["averaged log-probabilities"] = float((np.sum(every, axis=0).argmax(1) == right).mean())
    weights = [model.state_dict() for model in models]
    models[0].load_state_dict({name: sum(each[name] for each in weights) / len(weights) for name in weights[0]})
    found["averaged weights"] = float((logprobs(models[0], tokenizer, items).argmax(1) == right).mean())
    return {name: 100 * value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("--task", required=True, help="rows with text and label")
    parser.add_argument(
        "--runs", nargs="+", type=Path, default=[], help="checkpoints of one shape, fully fine-tuned on it"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(arguments.base, dtype=torch.float32), load_tokenizer(arguments.base)
    data = load_task(arguments.task, tokenizer=tokenizer)
    items = [*data.train, *data.test]
    context = model.config.max_position_embeddings
    ids = {item.prompt: tokenizer(item.prompt, add_special_tokens=False)["input_ids"][:context] for item in items}
    found = bags(data.train, data.test, ids)
    places = range(0, model.config.num_hidden_layers + 1, 4)
    answers, seen = np.array([item.answer for item in items]), len(data.train)
    for place, vectors in states(model, items, ids, places).items():
        ways = [make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, C=c)) for c in STRENGTHS]
        best = max(w.fit(vectors[:seen], answers[:seen]).score(vectors[seen:], answers[seen:]) for w in ways)
        found[f"states before block {place}"] = 100 * float(best)
    if arguments.runs:
        found |= together(arguments.runs, tokenizer, data.test)
    print(table(["", "%"], [[name, f"{value:.1f}"] for name, value in found.items()]))
    print(json.dumps({"name": "linear", "unit": "percent", "rows": len(data.test), **found, "machine": machine()}))


if __name__ == "__main__":
    run(main)
