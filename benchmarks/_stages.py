"""What train_stage.py and memory.py share: rows of real data, a Llama with random weights, three ways to train it."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _sides
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from trimllm import tasks
from trimllm.blocks.layout import whole
from trimllm.checkpoints.loading import path_of
from trimllm.config import TrainSettings
from trimllm.training import sparse, train, training_rows
from trimllm.training.packing import Example
from trimllm.training.step import Means

VOCABULARY, CONTEXT, RATIO, LR = 8192, 1024, 0.25, 1e-4
SPECIAL = ["<pad>", "<s>", "</s>"]


@dataclass(frozen=True)
class Data:
    """Training rows as ids: a seeded sample, and the longest of the whole set in tokens."""

    name: str
    tokenizer: Any
    rows: list[Example]
    longest: int


def parser(doc: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", default="demo_medicine", help="task: a file or directory with rows, or a built-in name")
    made.add_argument("--rows", type=int, default=64, help="training rows of a stage (seeded sample)")
    made.add_argument("--blocks", type=int, default=24)
    made.add_argument("--hidden", type=int, default=256)
    return made


def changed(parser: argparse.ArgumentParser, options: argparse.Namespace, *free: str, **kept: Any) -> list[str]:
    """As `_sides.changed`; the kept results are of contract clauses, wherever their folder lies."""
    clauses = Path(options.data).name == "cuad_clause_type"
    return _sides.changed(parser, options, *free, data=options.data if clauses else None, **kept)


def tokenizer_for(data: str) -> Any:
    """Byte-pair encoding learnt from the files of `data`; the embedded model's tokenizer for the embedded data."""
    path = Path(data)
    if not path.exists():
        return AutoTokenizer.from_pretrained(path_of("demo"))
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator((file.read_text(encoding="utf-8")[:2_000_000] for file in files), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def data(name: str, rows: int) -> Data:
    """Rows as training sees them. The longest row is that of all the training data."""
    tokenizer = tokenizer_for(name)
    items = tasks.load_task(name, tokenizer=tokenizer).train
    examples = training_rows.task_examples(tokenizer, items, CONTEXT, truncate=True)
    generator = torch.Generator().manual_seed(0)
    picked = [examples[i] for i in torch.randperm(len(examples), generator=generator)[:rows].tolist()]
    return Data(Path(name).name, tokenizer, picked, max(len(row.ids) for row in examples))


def model(vocabulary: int, blocks: int, hidden: int) -> Any:
    """A Llama with random weights, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2 * CONTEXT,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def trained_blocks(blocks: int, *, top: bool = False) -> list[int]:
    """A quarter of the blocks: spread evenly, or the last ones."""
    count = sparse.count(RATIO, blocks)
    return list(range(blocks - count, blocks)) if top else [(2 * i + 1) * blocks // (2 * count) for i in range(count)]


def freeze(net: Any, chosen: list[int] | None, *, embeddings: bool = True) -> list[torch.nn.Parameter]:
    return sparse.freeze(net, whole(net.config.num_hidden_layers), chosen, embeddings=embeddings)


def tokens(rows: Sequence[Example]) -> int:
    """Real tokens; padding is none."""
    return sum(len(row.ids) for row in rows)


def ours(net: Any, parameters: Sequence[Any], rows: Sequence[Example], batch: int, epochs: int, **more: Any) -> Any:
    """Our stage; returns its report."""
    settings = TrainSettings(lr=LR, batch_size=batch, text_ratio=0.0, **more)
    plan = training_rows.steps(rows, [], settings, epochs, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        return train.train_stage(net, parameters, plan, settings, Accelerator(cpu=True), Means(folder=folder))


def padded(rows: Sequence[Example], length: int) -> dict[str, torch.Tensor]:
    """Rows padded to `length`, labels at their targets only."""
    ids = torch.zeros((len(rows), length), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for number, row in enumerate(rows):
        end = len(row.ids)
        ids[number, :end] = torch.tensor(row.ids)
        mask[number, :end] = 1
        labels[number, row.start : end] = ids[number, row.start : end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def recipe(net: Any, parameters: Sequence[Any], rows: Sequence[Example], longest: int, batch: int) -> None:
    """Full fine-tuning as the authors' scripts do it: `batch` rows a step, each padded to the longest row of the data,
    all logits, AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)
    net.train()
    for begin in range(0, len(rows), batch):
        net(**padded(rows[begin : begin + batch], longest), use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def trainer(net: Any, rows: Sequence[Example], tokenizer: Any, batch: int, epochs: int) -> float:
    """`transformers.Trainer` with dynamic padding; returns the seconds of `train()`, without its construction."""
    made = [{"input_ids": list(row.ids), "labels": [-100] * row.start + list(row.ids[row.start :])} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch,
            num_train_epochs=epochs,
            learning_rate=LR,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        collator = DataCollatorForSeq2Seq(tokenizer, padding="longest")
        runner = Trainer(model=net, args=arguments, train_dataset=made, data_collator=collator)
        started = time.perf_counter()
        runner.train()
        return time.perf_counter() - started
