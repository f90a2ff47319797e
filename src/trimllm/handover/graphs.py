"""ONNX and OpenVINO: one graph that reads prompts and decodes with a key-value cache, by transformers' own exporters.

    trimllm export runs/medicine --to onnx
    trimllm export runs/medicine --to openvino

Rows, new tokens and cached tokens may be any number: a prompt is a step with an empty cache. Weights and arithmetic are
float32. The graph is run as it is on disk and compared with transformers before it is put into place.
"""

from __future__ import annotations

import importlib.util
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache

from trimllm.blocks import decoder
from trimllm.checkpoints import folders, loading, models
from trimllm.checkpoints.dtypes import name_of
from trimllm.checkpoints.verification import PREFILL, STEPS
from trimllm.config import ExportConfig
from trimllm.errors import InputError, TrimError, one_line
from trimllm.handover import copy_companions

SINCE = "5.23"
"""The first release of transformers whose exporters trace sliding windows right and save what they exported."""
PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}
TOLERANCE = 1e-3
"""Largest difference between logits of graph and model, as a share of the logits' standard deviation."""
PADDING = 3
"""Padded positions before the second row of the comparison."""

Array = np.ndarray[Any, np.dtype[Any]]
Step = Callable[[Array, Array, Array], Array]
"""Input ids (batch, new), attention mask (batch, past + new), position ids (batch, new) -> logits (batch, new, vocab).

Keeps the cache from call to call.
"""


def write(folder: Path, target: Path, command: ExportConfig) -> str:
    """Write the checkpoint in `folder` as a graph, with config and tokenizer beside it, to the directory `target`.

    Raises:
        InputError: if `target` is in use, a package is missing or too old, or the family cannot be exported.
        TrimError: if the export fails, or the graph on disk computes other logits than transformers.
    """
    folders.check_target(target, source=folder)
    exporter, settings = _exporter(command.to)
    own_code = command.trust_remote_code
    tokenizer = loading.load_tokenizer(folder, trust_remote_code=own_code)
    stored = models.saved_dtype(str(folder), trust_remote_code=own_code) or torch.float32
    model: Any = loading.load_model(folder, dtype=torch.float32, trust_remote_code=own_code)
    _check_family(model)
    ids, mask = _rows(model)
    wanted, layers = _logits(model, ids, mask), decoder.depth(model)
    kind, runtime = model.config.model_type, PACKAGES[command.to][-1]
    with folders.appearing(target) as graph:
        with _silent():
            _export(model, graph, exporter, settings)
            tokenizer.save_pretrained(graph)
        copy_companions(folder, graph)
        del model  # a runtime holds the weights a second time
        try:
            difference = _difference(STEPPERS[command.to](graph), ids, mask, wanted)
        except Exception as error:
            raise TrimError(
                f"{kind}: {runtime} cannot run the {command.to} graph: {one_line(error)}; {target} was not written"
            ) from error
        if not difference <= TOLERANCE * float(wanted[mask == 1].std()):
            raise TrimError(
                f"the {command.to} graph is not the model: logits differ by {difference:.3g} from transformers'; "
                f"{target} was not written"
            )
    cast = "float32" if stored == torch.float32 else f"float32 (the checkpoint is {name_of(stored)})"
    return (
        f"{layers} layers in {cast}, run by {runtime} {version(runtime)}: prompt and {STEPS} decode steps of "
        f"{len(ids)} rows differ by {difference:.2g} in the logits from transformers"
    )


def _exporter(to: str) -> tuple[Any, Any]:
    """The exporter and the class of its settings.

    Raises:
        InputError: if a package is missing or too old.
    """
    if Version(transformers.__version__) < Version(SINCE):
        raise InputError(
            f"--to {to}: transformers {transformers.__version__} has no exporter for it: "
            f"pip install 'transformers>={SINCE}'"
        )
    for package in PACKAGES[to]:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"--to {to}: {package} is not installed: pip install 'trimllm[{to}]'")
    from transformers import exporters

    try:
        with _silent():
            if to == "onnx":
                return exporters.OnnxExporter(), exporters.OnnxConfig
            return exporters.OpenVINOExporter(), exporters.OpenVINOConfig
    except ImportError as error:  # transformers checks the releases of torch and the others
        raise InputError(f"--to {to}: {one_line(error)}") from error


def _check_family(model: Any) -> None:
    """Refuse what the exporters trace without an error, and wrongly, or in several graphs.

    Raises:
        InputError: naming the family and the reason.
    """
    config, kind = model.config, model.config.model_type
    if decoder.text_config(model) is not config:
        raise InputError(f"{kind} cannot be exported as one graph: it has a tower beside its text decoder")
    ropes = getattr(config, "rope_parameters", None) or {}
    ropes = [ropes, *(value for value in ropes.values() if isinstance(value, dict))]
    if any("dynamic" in rope.get("rope_type", "") for rope in ropes):
        raise InputError(
            f"{kind} with rope_type dynamic cannot be exported: a graph keeps the frequencies of its trace"
        )
    layers = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
    if other := layers - {"DynamicLayer", "DynamicSlidingWindowLayer"}:
        raise InputError(
            f"{kind} cannot be exported: it keeps a state beside keys and values ({', '.join(sorted(other))})"
        )


def _rows(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Two fixed rows of ids (2, seq), the second padded on the left, and their attention mask."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, PREFILL + STEPS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    return ids, mask


def _positions(model: Any, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Positions (batch, seq) from the first token that is not padding, where the family's forward pass takes them."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits (batch, seq, vocab), without a cache."""
    out = model(input_ids=ids, attention_mask=mask, use_cache=False, **_positions(model, mask))
    return out.logits.float()


@torch.no_grad()
def _export(model: Any, graph: Path, exporter: Any, settings: Any) -> None:
    """Trace one step with a filled cache, and save graph, config, generation config and the exporter's manifest.

    The cache keeps all tokens also where attention has a window, which the mask applies: a cache that forgets counts
    its tokens in Python, and a trace would keep the count. Sizes differ from each other and from those compared.
    """
    batch, past, new = 3, 5, 2
    ids = torch.arange(batch * (past + new)).reshape(batch, past + new) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    places = _positions(model, mask)
    cache = DynamicCache()
    before = {name: value[:, :past] for name, value in {"attention_mask": mask, **places}.items()}
    model(input_ids=ids[:, :past], past_key_values=cache, use_cache=True, **before)
    places = {name: value[:, past:] for name, value in places.items()}
    inputs = {"input_ids": ids[:, past:], "attention_mask": mask, **places, "past_key_values": cache, "use_cache": True}

    dim = torch.export.Dim
    rows, tokens, cached = dim("batch"), dim("new"), dim("past")
    step = {0: rows, 1: tokens}
    shapes = {
        "input_ids": step,
        "attention_mask": {0: rows, 1: dim.AUTO},  # past + new, as the trace finds out
        **dict.fromkeys(places, step),
        "past_key_values": [{0: rows, 2: cached}] * (2 * len(cache.layers)),
    }
    try:
        exported = exporter.export(
            model, inputs, settings(dynamic_shapes=shapes, prefer_deferred_runtime_asserts_over_guards=True)
        )
        exported.generation_config = model.generation_config
        exported.save_pretrained(graph)
    except OSError:
        raise
    except Exception as error:
        name = type(exporter).__name__
        raise TrimError(f"{model.config.model_type}: the {name} of transformers failed: {one_line(error)}") from error


def _difference(step: Step, ids: torch.Tensor, mask: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference from `wanted` (batch, seq, vocab) outside padding: prompt, then one by one."""
    places = (mask.cumsum(1) - 1).clamp(min=0)
    ends = [PREFILL, *range(PREFILL + 1, ids.shape[1] + 1)]
    found = [
        step(ids[:, start:end].numpy(), mask[:, :end].numpy(), places[:, start:end].numpy())
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    logits = torch.from_numpy(np.concatenate(found, axis=1))
    return float((logits - wanted)[mask == 1].abs().max())


def onnx_step(graph: str | Path) -> Step:
    """The graph in ONNX Runtime on CPU; the cache is what the last call returned, and empty before the first."""
    import onnxruntime

    session = onnxruntime.InferenceSession(Path(graph) / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    shapes = {value.name: value.shape for value in session.get_inputs()}
    cache: dict[str, Array] = {}

    def step(ids: Array, mask: Array, positions: Array) -> Array:
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache}
        for name, shape in shapes.items():
            if name not in given:
                given[name] = np.zeros((len(ids), shape[1], 0, shape[3]), np.float32)
        found = dict(zip(names, session.run(None, {name: given[name] for name in shapes}), strict=True))
        logits: Array = found.pop("logits")
        cache.update({name.replace("output.", "input.", 1): value for name, value in found.items()})
        return logits

    return step


def openvino_step(graph: str | Path) -> Step:
    """The graph in OpenVINO on CPU in float32; the cache is the request's own state, which starts empty."""
    import openvino

    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}  # the default is bf16 on some CPUs
    compiled = openvino.Core().compile_model(Path(graph) / "openvino_model.xml", "CPU", exact)
    request = compiled.create_infer_request()
    names = {port.get_any_name() for port in compiled.inputs}

    def step(ids: Array, mask: Array, positions: Array) -> Array:
        order = np.arange(len(ids), dtype=np.int32)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "beam_idx": order}
        found = request.infer({name: value for name, value in given.items() if name in names})
        logits: Array = found["logits"]
        return logits.copy()

    return step


STEPPERS: dict[str, Callable[[str | Path], Step]] = {"onnx": onnx_step, "openvino": openvino_step}


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing of what the exporters print: progress, and warnings about releases and operators that are not used."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with loading.quiet(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
