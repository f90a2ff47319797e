"""What pre-training is made of: a tokenizer, Muon and AdamW, a learning rate with a plateau, a step, and a state to go
on from."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import distributed
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from trimllm import files
from trimllm.checkpoints import arithmetic
from trimllm.config.shared import option_of
from trimllm.demo.muon import Muon
from trimllm.errors import InputError

EOS = "<|endoftext|>"


def byte_level_bpe(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of so many pieces, learnt from the texts; EOS closes documents, and pads."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False, model_max_length=512
    )


def optimizers(model: PreTrainedModel, lr: float, muon_lr: float, *, bf16: bool = True) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embedding and norms; with `muon_lr` 0 AdamW for everything.

    Muon computes in bfloat16, or without `bf16` in float32.
    """
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and ".layers." in name and muon_lr else rest).append(parameter)
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    built: list[torch.optim.Optimizer] = [adamw]
    if matrices:
        muon = torch.optim.Muon if bf16 else Muon
        built.append(muon(matrices, lr=muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    for optimizer in built:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return built


def lr_share(step: int, steps: int, warmup: int, decay: float) -> float:
    """Share of the peak learning rate: warm-up, plateau, linear decay to 0 over the last `decay` of the steps."""
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1.0, decay * steps))


def train_step(
    forward: Any,
    optimizers: list[torch.optim.Optimizer],
    batch: torch.Tensor,
    share: float,
    *,
    bf16: bool = True,
    micro_batch: int = 0,
) -> torch.Tensor:
    """One step on token ids `(rows, seq)` at this share of the peak learning rates; the mean loss, in nats a token.

    Of the rows, `micro_batch` at a time go through the model (0: all), which changes the gradient by rounding only. In
    a process group every process takes the step that all their rows give, of which each has as many.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
    mean = torch.zeros((), device=batch.device)
    for rows in batch.split(micro_batch or len(batch)):
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16):
            logits = forward(input_ids=rows, use_cache=False).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())
        loss = loss * (len(rows) / len(batch))
        loss.backward()
        mean += loss.detach()
    average([mean, *(parameter.grad for parameter in forward.parameters())])
    torch.nn.utils.clip_grad_norm_(forward.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return mean


def average(tensors: Sequence[torch.Tensor]) -> None:
    """Put the mean over all processes of the group, if there is one, in place of each tensor."""
    if distributed.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def write_state(path: Path, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], **more: Any) -> None:
    """What a run goes on from: weights, optimizers, and `more`, which are plain values."""
    state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in optimizers]}
    with files.atomic(path) as file:
        torch.save(state | more, file)


def read_state(path: Path, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    """Put weights and optimizers back as `write_state` found them; the other values are returned."""
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location=model.device)
    model.load_state_dict(state.pop("model"))
    for optimizer, saved in zip(optimizers, state.pop("optimizers"), strict=True):
        optimizer.load_state_dict(saved)
    return state


def fixed(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """What of the settings a state keeps."""
    return {name: getattr(args, name) for name in names}


def settle(path: Path, args: argparse.Namespace, names: Sequence[str], device: str = "cpu") -> None:
    """Check that the training whose state is `path` can go on with `args`, of which `names` stay what they were.

    `args.bf16`, if it was not given, becomes the state's, or whether the device has bfloat16.

    Raises:
        InputError: if the state is of a training with other settings, or was at another learning rate than `args` say.
    """
    if not path.exists():
        if args.bf16 is None:
            args.bf16 = arithmetic.slowdown(torch.bfloat16, torch.device(device)) == 1
        return
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    stored = state["settings"]
    if args.bf16 is None:
        args.bf16 = stored["bf16"]
    for name, value in fixed(args, names).items():
        if stored[name] != value:
            given, was = (option_of(name, one) for one in (value, stored[name]))
            raise InputError(f"{given}: {path} was trained with {was}: give that, or another --output")
    group, last = state["optimizers"][0]["param_groups"][0], state["step"] - 1
    was, now = group["lr"] / group["peak_lr"], max(0.0, lr_share(last, args.steps, args.warmup, args.decay))
    if not math.isclose(was, now):
        schedule = " ".join(option_of(name, getattr(args, name)) for name in ("steps", "warmup", "decay"))
        raise InputError(
            f"{schedule}: the last step of {path} was at {was:.1%} of the peak learning rate, by these it is at "
            f"{now:.1%}: give those that it was begun with, or another --output"
        )


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Weights in bfloat16, config, generation config and tokenizer; the model in training stays float32."""
    copy.deepcopy(model).bfloat16().save_pretrained(output)
    tokenizer.save_pretrained(output)
