"""The measurements of `trimllm bench`: every model in a process of its own, all of them in turn.

A process per model makes its memory its own: the peak of one process would cover all models. They wait while another
one is measured.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.quantizers import AutoHfQuantizer

from trimllm import memory, startup
from trimllm.bench import reads, shapes, timing
from trimllm.blocks import adapters, decoder
from trimllm.checkpoints import arithmetic, backends, loading, models, room
from trimllm.checkpoints.dtypes import DTYPES, name_of
from trimllm.config import BenchConfig, SpeedSettings
from trimllm.errors import InputError, TrimError
from trimllm.evaluation import encoding

SEQUENCE, NEW_TOKENS = 512, 64
"""Tokens of a row where nobody asked for others, and those of them that are decoded; 512 is the paper's row."""

Change = Callable[[Any], None]
"""Something done to a loaded model, in place, in its process: a function of a module, for it travels there by name."""


@dataclass(frozen=True)
class Manner:
    """What `trimllm bench` does not ask for, and benchmarks do."""

    changes: Sequence[Change | None] = ()
    """one per model, done to it before anything is measured; none: no model is changed"""
    once: bool = False
    """read the prompt once, and decode after it in every round"""
    limit: float = math.inf
    """seconds after which a model decodes no further token in a round"""


@dataclass(frozen=True)
class Lengths:
    """Of the rows that speed is measured on: a prompt, and tokens after it, one by one."""

    sequence: int
    """tokens of both"""
    new_tokens: int

    @classmethod
    def of(cls, asked: SpeedSettings, context: int, name: str) -> Lengths:
        """Those that were asked for, else as long as the context of the model `name` lets rows be.

        Raises:
            InputError: if they exceed the context, or nothing is left for a prompt.
        """
        sequence = asked.sequence or min(SEQUENCE, context)
        new_tokens = asked.new_tokens or min(NEW_TOKENS, sequence // 2)
        if sequence > context:
            raise InputError(f"--sequence {sequence}: {name} takes at most {context} tokens: ask for less")
        if new_tokens >= sequence:
            raise InputError(f"--new-tokens {new_tokens} leave no prompt in rows of {sequence} tokens: ask for less")
        return cls(sequence, new_tokens)


_HERE: dict[str, Any] = {}
"""The model of this process, its runner, and its memory before it was loaded."""


def load(name: str, command: BenchConfig, change: Change | None = None) -> dict[str, Any]:
    """Load the model, and change it; what is known of it without running it: layers, parameters, bytes.

    Raises:
        InputError: if it cannot be used.
    """
    if command.threads:
        torch.set_num_threads(command.threads)
    device, dtype = models.device_of(command.device), DTYPES.get(command.dtype)
    own_code = command.trust_remote_code
    path = None if name.startswith(shapes.PREFIX) else loading.path_of(name)
    _wake(device, models.config_of(path, trust_remote_code=own_code) if path else None)
    _forget_peak(device)
    _HERE["before"] = resident("VmRSS")
    ways: dict[str, Any] = {"trust_remote_code": own_code, "attention": command.attention}
    if path is None:
        model = shapes.random_model(name.removeprefix(shapes.PREFIX), dtype=dtype, device=device, **ways)
    else:
        model = loading.load_model(path, dtype=dtype, device=device, allow_pickle=command.allow_pickle, **ways)
    backends.probe(model, command.attention)
    _HERE["model"] = model
    known = {
        "model": name,
        "layers": decoder.depth(model),
        "parameters": parameters(model, trust_remote_code=own_code),
        "dtype": name_of(model.dtype),
    }
    plain = change is None and not getattr(model, "is_quantized", False)  # others have products of their own
    known["slowdown"] = arithmetic.slowdown(model.dtype, model.device) if plain else 1.0
    if change is not None:
        change(model)
    return known | {
        "device": str(model.device),
        "disk_bytes": disk_bytes(path, command.allow_pickle) if path else None,
        "stored_bytes": reads.stored_bytes(model),
    }


def parameters(model: Any, *, trust_remote_code: bool = False) -> int:
    """Weights of the model; of a quantized one as many as it would have unquantized: packed ones and scales are not
    counted."""
    if getattr(model, "is_quantized", False):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model.config, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def prepare(command: BenchConfig, lengths: Lengths, batch: int, once: bool = False) -> None:
    """Make the runner for a batch size; runners for others go, with their caches.

    What loading, a change of the model or another batch size needed does not count as memory while decoding.

    Raises:
        InputError: if the model cannot decode with the asked cache, or compiled.
    """
    _HERE.pop("runner", None)
    _forget_peak(_HERE["model"].device)
    sizes = {"batch": batch, "prompt": lengths.sequence - lengths.new_tokens, "new": lengths.new_tokens, "once": once}
    _HERE["runner"] = timing.runner(_HERE["model"], cache=command.cache, compiled=command.compile, **sizes)


def run(limit: float = math.inf) -> timing.Pass:
    """One prompt and the tokens after it, none after `limit` seconds."""
    done: timing.Pass = _HERE["runner"].run(limit=limit)
    return done


def finish(lengths: Lengths, batch: int) -> tuple[int | None, reads.Footprint]:
    """Peak memory in bytes while decoding (the weights included), and what a decode step reads: the row's last, or the
    first after a prompt that is read once."""
    peak, runner = _peak(), _HERE["runner"]
    if runner.once:
        cache = runner.prompt_cache()
        return peak, reads.footprint(_HERE["model"], batch=batch, sequence=runner.prompt + 1, cache=cache)
    return peak, reads.footprint(_HERE["model"], batch=batch, sequence=lengths.sequence)


def _wake(device: torch.device, config: Any) -> None:
    """Bring in what any model needs (code, kernels, the device's context, the library of a quantized one), which is no
    model's own memory."""
    shape = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1)
    model: Any = LlamaForCausalLM(shape)
    model.to(device)
    timing.decode_once(model, prompt=2, new=2)
    if quantization := getattr(config, "quantization_config", None):
        with contextlib.suppress(ImportError, ValueError, RuntimeError):  # loading the model says what is missing
            AutoHfQuantizer.from_config(quantization, pre_quantized=True).validate_environment(device_map=None)


def disk_bytes(path: str, allow_pickle: bool) -> int:
    """Size of the weight files that were loaded: of a directory, or of the Hub's local copy; of an adapter its base's,
    too."""
    base, folder = adapters.base_of(path), loading.on_disk(path)
    assert folder is not None  # the model was loaded from there
    files = loading.weight_files(folder) or ([*folder.glob("*.bin"), *folder.glob("*.pt")] if allow_pickle else [])
    return sum(file.stat().st_size for file in files) + (disk_bytes(base, allow_pickle) if base else 0)


def _peak() -> int | None:
    """Most memory so far, in bytes: allocated on the GPU, elsewhere how far the resident set had grown."""
    model = _HERE.get("model")
    if model is not None and model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device)
    before, peak = _HERE["before"], resident("VmHWM")
    return None if before is None or peak is None else peak - before


def _forget_peak(device: torch.device) -> None:
    """Let the peak begin with what is held now."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not every kernel lets it, not every libc can
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident(field: str) -> int | None:
    """Bytes of this process's resident set: now (VmRSS) or at most so far (VmHWM); None where the system hides it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)
    except OSError:
        if sys.platform == "win32":
            return None
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(
    command: BenchConfig, progress: Callable[..., None] = lambda *_: None, manner: Manner = Manner()
) -> tuple[Lengths, list[dict[str, Any]], dict[int, list[dict[str, Any]]]]:
    """All models at all batch sizes: the rows they were measured on, what they are, and per batch size one measurement
    per model.

    Raises:
        InputError: if a model cannot be used or cannot decode as asked; the line names it.
        TrimError: if a model's process ends.
    """
    batches, count = sorted(set(command.batch_size)), len(command.models)  # a larger batch has the higher peak
    total, done = count * (1 + len(batches) * (command.repeats + 3)), 0
    lengths = _check(command)  # before any process starts, which takes seconds
    with ExitStack() as stack:
        pools = [stack.enter_context(_pool()) for _ in command.models]
        for pool in pools:
            pool.submit(resident, "VmRSS")  # all start, and import this module, at once: that takes seconds

        def each(function: Any, *arguments: Any) -> list[Any]:
            nonlocal done
            found = []
            for pool, name in zip(pools, command.models, strict=True):
                found.append(_ask(pool, name, function, *arguments))
                done += 1
                progress(done, total, name)
            return found

        changes = manner.changes or [None] * count
        known = [
            _ask(pool, name, load, name, command, change)
            for pool, name, change in zip(pools, command.models, changes, strict=True)
        ]
        done += count
        measured = {}
        for batch in batches:
            each(prepare, command, lengths, batch, manner.once)
            rounds = [each(run, manner.limit) for _ in range(command.repeats + 1)][1:]
            ends = each(finish, lengths, batch)
            measured[batch] = [
                {"passes": [one[i] for one in rounds], "peak_bytes": ends[i][0], "reads": ends[i][1]}
                for i in range(count)
            ]
    return lengths, known, measured


@contextlib.contextmanager
def _pool() -> Iterator[ProcessPoolExecutor]:
    """The process of one model. Where a scheduler ends this one, it ends too, whatever it is doing."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=startup.child, initargs=(__name__,)) as pool:
        try:
            yield pool
        except startup.Terminated:
            for child in active_children():
                child.terminate()
            raise


def _check(command: BenchConfig) -> Lengths:
    """Rows that all models take; refused are an attention backend that no model can take, models that are not there,
    that take no such rows, or that do not fit into memory together, before any is loaded."""
    device, dtype, total = models.device_of(command.device), DTYPES.get(command.dtype), 0
    own_code, contexts = command.trust_remote_code, dict[str, int]()
    backends.check(command.attention, device, dtype)
    for name in command.models:
        if name.startswith(shapes.PREFIX):
            file = name.removeprefix(shapes.PREFIX)
            config = shapes.config_of(file, trust_remote_code=own_code)
            total += room.weights_of_config(file, dtype, trust_remote_code=own_code) or 0
        else:
            config = models.config_of(loading.path_of(name), trust_remote_code=own_code)
            total += room.weights(loading.path_of(name), dtype) or 0
        contexts[name] = encoding.context_length(config)
        before = command.models[: command.models.index(name)]
        what = f"{name} beside {', '.join(before)}" if before else name
        room.check(what, total, device, "measure fewer or smaller models, or give a narrower --dtype")
    shortest = min(contexts, key=lambda name: contexts[name])
    return Lengths.of(command, contexts[shortest], shortest)


def _ask(pool: ProcessPoolExecutor, name: str, function: Any, *arguments: Any) -> Any:
    try:
        return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise TrimError(f"the process of {name} was ended, perhaps for lack of memory: measure fewer models") from None
    except RuntimeError as error:
        if not memory.is_out_of_memory(error):
            raise
        raise TrimError(f"{name}: out of memory on the device: a smaller --batch-size, or fewer models") from None
    except InputError as error:
        text = str(error)
        raise InputError(text if name in text else f"{name}: {text}") from None


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p90 and p99 in milliseconds: the least time that so many percent of the samples do not exceed."""
    ordered = sorted(seconds)
    return {f"p{p}": 1000 * ordered[math.ceil(p / 100 * len(ordered)) - 1] for p in (50, 90, 99)}
