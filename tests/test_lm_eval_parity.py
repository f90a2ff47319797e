"""The same rows through lm-evaluation-harness and through trimllm: prompts, log-likelihoods and accuracies agree.

The harness's own task YAML is used, pointed at local rows; the model is a tiny random Llama in float32.
"""

from __future__ import annotations

import ast
import json
import random
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from test_tasks_builtin import ROWS
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trimllm.evaluation import evaluate
from trimllm.tasks.catalog import find_builtin
from trimllm.tasks.render import Renderer
from trimllm.tasks.rows import Row

HARNESS = Path(lm_eval.tasks.__file__).parent
YAML = {
    "piqa": "piqa/piqa.yaml",
    "sciq": "sciq/sciq.yaml",
    "medmcqa": "medmcqa/medmcqa.yaml",
    "pubmedqa": "pubmedqa/pubmedqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "race": "race/race.yaml",
}
COUNT = 24
WORDS = [
    "light",
    "water",
    "stone",
    "river",
    "cat",
    "farm",
    "rain",
    "wind",
    "salt",
    "iron",
    "noon",
    "dusk",
    "red",
    "green",
    "seven",
    "apple",
    "bread",
    "king",
    "Ørsted",
    "42",
]
KEPT = {"label", "answerKey", "final_decision", "answer"}
"""Columns whose text is not content."""


def reworded(value, rng, name=""):
    """A row of the same form with other words; punctuation, brackets and spacing stay."""
    if isinstance(value, dict):
        return {key: each if key in KEPT else reworded(each, rng, key) for key, each in value.items()}
    if isinstance(value, list):
        return [reworded(each, rng, name) for each in value]
    if not isinstance(value, str):
        return value
    if name == "problems":
        return repr(reworded(ast.literal_eval(value), rng))
    return " ".join(rng.choice(WORDS) if word.isalpha() else word for word in value.split(" "))


def rows_of(name):
    """Rows with random words, random answers, in the columns of the public set."""
    rng = random.Random(name)
    rows = [ROWS[name]]
    for _ in range(COUNT - 1):
        row = reworded(ROWS[name], rng)
        row |= {
            key: value
            for key, value in {
                "label": str(rng.randrange(4)) if name == "hellaswag" else rng.randrange(2),
                "cop": rng.randrange(4),
                "final_decision": rng.choice(["yes", "no", "maybe"]),
                "answerKey": rng.choice(row["choices"]["label"]) if "choices" in row else "",
            }.items()
            if key in row
        }
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def tokenizer():
    words = [json.dumps(rows_of(name), ensure_ascii=False) for name in YAML]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    raw.train_from_iterator(words, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def harness(model, tokenizer, tmp_path_factory):
    """What the harness makes of the rows: per task, its samples in row order and its results."""
    folder = tmp_path_factory.mktemp("rows")
    configs = []
    for name, path in YAML.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(name)), encoding="utf-8")
        changes = {
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")},
            "training_split": None,
            "validation_split": None,
            "test_split": "test",
        }
        configs.append(load_yaml(HARNESS / path) | changes)
    done = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16),
        tasks=configs,
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    for samples in done["samples"].values():
        samples.sort(key=lambda sample: sample["doc_id"])
    return done


def items_of(name):
    renderer = Renderer(find_builtin(name))
    return [renderer.item(Row(f"{name}:{number}", row)) for number, row in enumerate(rows_of(name), 1)]


@pytest.mark.parametrize("name", YAML)
def test_prompts_continuations_and_answers_are_the_harnesss(name, harness):
    samples = harness["samples"][name]
    items = items_of(name)
    theirs = [
        [tuple(pair.values() if isinstance(pair, dict) else pair) for pair in each["arguments"]] for each in samples
    ]
    assert [[(item.prompt, text) for text in item.continuations] for item in items] == theirs
    gold = [sample["target"] for sample in samples]
    ours = [item.answer if str(gold[0]).isdigit() else item.target.strip() for item in items]
    assert [str(answer) for answer in ours] == [str(answer) for answer in gold]


@pytest.mark.parametrize("name", YAML)
def test_log_likelihoods_acc_and_acc_norm_are_the_harnesss(name, harness, model, tokenizer):
    items = items_of(name)
    ours = evaluate.Scorer(model, tokenizer, items).score(model).loglik
    theirs = [[float(reply[0][0]) for reply in sample["resps"]] for sample in harness["samples"][name]]
    worst = max(abs(a - b) for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True))
    print(f"{name}: largest difference {worst:.1e} of {sum(map(len, ours))} log-likelihoods")
    assert worst < 1e-4
    results = harness["results"][name]
    measured = evaluate.evaluate(model, tokenizer, items, "acc")
    assert measured.acc == pytest.approx(100 * results["acc,none"], abs=1e-6)
    if "acc_norm,none" in results:
        assert measured.acc_norm == pytest.approx(100 * results["acc_norm,none"], abs=1e-6)


def test_webqs_reads_as_in_the_harness():
    """There each listed answer is a choice that counts when greedy; here the first is learned, all are references."""
    config = load_yaml(HARNESS / "webqs/webqs.yaml")
    item = Renderer(find_builtin("webqs")).item(Row("webqs:1", ROWS["webqs"]))
    assert config["doc_to_text"].replace("{{question}}", ROWS["webqs"]["question"]) == item.prompt
    accepted = config["doc_to_choice"]({"answers": list(ROWS["webqs"]["answers"])})
    assert set(accepted) <= set(item.references)
    assert item.target.strip() in item.references
