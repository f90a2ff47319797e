"""A model by the name the user gave: weights, tokenizer, and what it was before anything was done to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trimllm.blocks import adapters
from trimllm.checkpoints import arithmetic, backends, loading, room, shards
from trimllm.checkpoints.dtypes import DTYPES
from trimllm.config import EMBEDDED, ModelSettings, TrainedModel
from trimllm.errors import InputError
from trimllm.offline import hub_or_cache

TOO_LARGE = "free memory, or give a narrower --dtype (trimllm drop --streaming cuts a model without loading it)"

PACKED = ("gptq", "awq", "bitsandbytes", "compressed-tensors")
"""Kinds of quantization that are never undone on loading; what loads them need not be here to know that."""
PATIENCE = timedelta(days=1)
"""How long the processes of a run wait for one that writes a checkpoint or measures; NCCL would give up after ten
minutes, and end them all."""


@dataclass(frozen=True)
class Loaded:
    """A model in memory, its tokenizer, and what the user should know."""

    settings: ModelSettings
    model: Any
    tokenizer: Any
    notes: tuple[str, ...] = ()

    @cached_property
    def saved(self) -> torch.dtype:
        """The dtype it was saved in."""
        own_code = self.settings.trust_remote_code
        return saved_dtype(loading.path_of(self.settings.model), trust_remote_code=own_code) or self.model.dtype

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of its weights; to be asked for before they are changed."""
        path = loading.path_of(self.settings.model)
        if (base := adapters.base_of(path)) is not None:
            return loading.fingerprint_of_adapter(path, base, self.model)
        folder = loading.on_disk(path)
        return loading.fingerprint(folder if folder and loading.weight_files(folder) else self.model)


def device_of(name: str) -> torch.device:
    """The device for commands that do not train; auto takes the first accelerator that is there, which a CUDA build of
    torch alone is not.

    Raises:
        InputError: if there is no such device.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # meta holds no numbers
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name}: there is no such device here: use cpu or auto") from None
    return device


def training_device(name: str) -> torch.device:
    """The device of commands that train; auto takes CUDA, or the CPU.

    Raises:
        InputError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device_of(name)


def accelerator(settings: TrainedModel) -> Any:
    """The accelerate object of this process: device, mixed precision, number of processes.

    Raises:
        InputError: if there is no such device, or an earlier run of this process had others.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    wanted = training_device(settings.device)
    if settings.device != "auto" and wanted.type == "cuda" and wanted.index is not None:
        torch.cuda.set_device(wanted)
    on_cpu = wanted.type == "cpu"
    mixed = settings.mixed_precision
    if mixed == "auto":  # GPUs before Ampere emulate bfloat16
        own = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        mixed = "bf16" if own and not on_cpu and settings.dtype == "auto" else "no"
    try:
        patience = InitProcessGroupKwargs(timeout=PATIENCE)
        return Accelerator(cpu=on_cpu, mixed_precision=mixed, kwargs_handlers=[patience])
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise
        asked = f"--device {wanted.type} and --mixed-precision {mixed}"
        raise InputError(
            f"{asked}: an earlier run of this Python process had others, and accelerate fixes them per process: "
            "restart Python for this run"
        ) from None


def load(
    settings: ModelSettings,
    *,
    training: bool = False,
    evaluating: bool = False,
    device: torch.device | None = None,
) -> Loaded:
    """Load model and tokenizer. Where `dtype` is auto, weights to be trained are float32, others as saved; with
    `evaluating` (nothing is saved or timed) in float32, too, where a CPU emulates the 16 bits they were saved in and
    memory has room for it.

    Raises:
        InputError: if it cannot be used; see `loading.load_model`.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    path = loading.path_of(settings.model)
    base = adapters.base_of(path)
    device = device or device_of(settings.device)
    dtype = DTYPES.get(settings.dtype) or (torch.float32 if training else None)
    backends.check(settings.attention, device, dtype, training=training)
    if training and quantization_of(path, settings) in PACKED:
        raise _cannot_train(settings)
    room.check(f"--model {settings.model}", room.weights(path, dtype), device, TOO_LARGE)
    model: Any = loading.load_model(
        path,
        dtype=dtype,
        device=device,
        trust_remote_code=settings.trust_remote_code,
        allow_pickle=settings.allow_pickle,
        attention=settings.attention,
    )
    if training and getattr(model, "is_quantized", False):
        raise _cannot_train(settings)
    tokenizer = loading.load_tokenizer(path, trust_remote_code=settings.trust_remote_code)
    backends.probe(model, settings.attention, training=training)
    _check_causal(model, settings.model)
    notes = [f"{settings.model} is an adapter: merged into its base {base}"] if base is not None else []
    if settings.model == EMBEDDED and Path(EMBEDDED).exists():
        notes.append(f"{EMBEDDED} is the embedded model: what has this name here would be ./{EMBEDDED}")
    if unread := getattr(model, "unread", ()):
        few = f"{len(unread)} tensor{'s' if len(unread) > 1 else ''} of its files"
        notes.append(f"{few} have no place in the model that its config describes, such as {unread[0]}: not read")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        notes.append(f"the tokenizer has {len(tokenizer):,} tokens, the model embeddings for {vocabulary:,} of them")
    if evaluating and (slow := arithmetic.asked_note(settings.dtype, device)):
        notes.append(slow)
    if evaluating and (reason := arithmetic.reason_for_float32(model, settings.dtype)):
        notes.append(reason)
        cast(model, torch.float32)
    return Loaded(settings, model, tokenizer, tuple(notes))


def _cannot_train(settings: ModelSettings) -> InputError:
    return InputError(
        f"--model {settings.model}: quantized weights cannot be trained: trim the unquantized model, then quantize "
        "the result with trimllm export --to int8 or int4"
    )


def quantization_of(path: str, settings: ModelSettings) -> str | None:
    """How the weights of a checkpoint are quantized, by its config; None where they are not.

    Raises:
        InputError: if there is no checkpoint, or its config cannot be read.
    """
    if (folder := Path(adapters.base_or_self(path))).is_dir():
        loading.check_folder(folder)
    config = config_of(path, trust_remote_code=settings.trust_remote_code)
    found = getattr(config, "quantization_config", None) or {}
    return (found if isinstance(found, dict) else vars(found)).get("quant_method")


@torch.no_grad()
def _check_causal(model: Any, name: str) -> None:
    """Refuse an encoder with a language-model head: transformers loads BERT and its like as causal models, too."""
    ids = torch.tensor([[3, 5, 7, 9], [3, 5, 7, 11]], device=model.device) % model.get_input_embeddings().num_embeddings
    one, other = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    tolerance = 1e-4 if model.dtype == torch.float32 else 2e-2
    if getattr(model, "is_quantized", False):
        tolerance = 0.25  # LLM.int8 chooses the columns that it does not round by all tokens
    if (one - other).abs().max() > one.std() * tolerance:
        raise InputError(f"cannot use model {name!r}: its tokens see later ones; it is not a causal language model")


def cast(model: Any, dtype: torch.dtype) -> Any:
    """Turn the weights into `dtype` in place, but for those that its class names to be loaded in float32 all the same.

    `model.to(dtype)` would round them, too, and rotary frequencies and other buffers that no checkpoint holds.
    """
    kept = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    names = [name for name in _saved_floats(model) if not any(f".{part}." in f".{name}." for part in kept)]
    _convert(model, dict.fromkeys(names, dtype))
    return model


@contextmanager
def widened(model: Any) -> Iterator[None]:
    """Within, the model computes in float32 by the same weights; then every one is in its own dtype again."""
    before = {name: tensor.dtype for name, tensor in _saved_floats(model).items()}
    try:
        _convert(model, dict.fromkeys(before, torch.float32))
        yield
    finally:
        _convert(model, before)


def _saved_floats(model: Any) -> dict[str, torch.Tensor]:
    """The floating-point parameters and buffers that checkpoints hold, by name."""
    transient = {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: one for name, one in named if one.is_floating_point() and name not in transient}


def _convert(model: Any, dtypes: dict[str, torch.dtype]) -> None:
    """Turn these parameters and buffers into these dtypes, in place."""
    tensors = _saved_floats(model)
    for name, dtype in dtypes.items():
        tensors[name].data = tensors[name].data.to(dtype)


def config_of(path: str, *, trust_remote_code: bool = False) -> Any:
    """The config of a checkpoint; of an adapter, its base's.

    Raises:
        InputError: if there is none, or transformers cannot read it.
    """
    from transformers import AutoConfig

    name = adapters.base_or_self(path)
    loading.check_path(name)
    try:
        with hub_or_cache(name):
            return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(loading.explain(name, error)) from error


def checked_config(path: str, settings: ModelSettings) -> Any:
    """The config of a model whose weights, where it is a folder (of an adapter, its base's), are there.

    Raises:
        InputError: if they are missing, torn, or not of a kind that the settings allow; see also `config_of`.
    """
    config = config_of(path, trust_remote_code=settings.trust_remote_code)
    folder = Path(adapters.base_or_self(path))
    if folder.is_dir():
        loading.check_folder(folder)
        if not shards.present(folder) and not settings.allow_pickle:
            raise InputError(loading.no_safetensors(str(folder)))
    return config


def saved_dtype(path: str, *, trust_remote_code: bool) -> torch.dtype | None:
    """The dtype that the checkpoint's config names, or else that most of its weights have; of an adapter, its base's.
    None where neither is known."""
    config = config_of(path, trust_remote_code=trust_remote_code)
    named = config.dtype or config.get_text_config(decoder=True).dtype
    return named or room.dtype_of_weights(adapters.base_or_self(path))
