"""A checkpoint with 8-bit or 4-bit weights, by bitsandbytes: stock transformers reads it, on CPU and on GPUs.

    trimllm export runs/law --to int8

int8: LLM.int8() (arXiv 2208.07339), a scale per row, columns of outliers in 16 bits. int4: NF4 (QLoRA, arXiv
2305.14314), a scale per 64 weights. Embeddings, output head and norms stay in 16 bits.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.base import get_keys_to_not_convert

from trimllm import config, files
from trimllm.blocks.layout import plan_record, whole
from trimllm.checkpoints import export, folders, loading, models
from trimllm.errors import InputError, TrimError, one_line
from trimllm.evaluation import encoding, inputs
from trimllm.handover import copy_companions
from trimllm.run import model_card, placing, used_rows

COLUMNS, ROWS = 64, 32
"""bitsandbytes' 4-bit kernel for CPUs takes matrices whose sizes are multiples of these; a GPU takes any."""


def write(folder: Path, target: Path, command: config.ExportConfig) -> str:
    """Quantize the checkpoint in `folder` to the directory `target`.

    Raises:
        InputError: if bitsandbytes is missing, `target` is in use, the model is quantized or has nothing to be so, or
            reported rows of --task do not fit its context or vocabulary.
        TrimError: if what was written is not smaller, or differs from the quantized model in memory.
    """
    if find_spec("bitsandbytes") is None:
        raise InputError(f"--to {command.to} needs bitsandbytes: pip install 'trimllm[quantize]'")
    folders.check_target(target, source=folder)
    own_code = command.trust_remote_code
    stock = models.config_of(str(folder), trust_remote_code=own_code)
    if getattr(stock, "quantization_config", None) is not None:
        raise InputError(f"{command.source} is quantized already: give the unquantized checkpoint")
    tokenizer = loading.load_tokenizer(folder, trust_remote_code=own_code)
    asked = _evaluation(command, folder) if command.task else None
    data = inputs.task_data(asked, tokenizer, reported_only=True) if asked else None
    notes = list[str]()
    if asked and data:  # rows that do not fit are met before the work
        encoded = encoding.encode(tokenizer, data.test, encoding.context_length(stock), truncate=command.truncate)
        encoding.check_vocabulary(tokenizer, encoding.rows_of(encoded), encoding.vocabulary_of(stock))
        seen = used_rows.warnings(command.source, data, asked.seed, at=folder)
        notes = [*data.notes, *encoding.row_notes(reported=encoded), *(f"warning: {line}" for line in seen)]
    stored = models.saved_dtype(str(folder), trust_remote_code=own_code)
    dtype = torch.float16 if stored == torch.float16 else torch.bfloat16
    kept, head = _too_odd(stock, own_code) if command.to == "int4" else ([], [])
    quantization = _settings(command.to, dtype, [*head, *kept] if kept else None)
    model: Any = loading.load_model(folder, dtype=dtype, quantization=quantization, trust_remote_code=own_code)
    share = _share(model)
    if not share:
        need = f" (inputs in multiples of {COLUMNS}, outputs of {ROWS}): take --to int8" if command.to == "int4" else ""
        raise InputError(
            f"{command.source}: nothing to quantize: its model has no linear layers that {command.to} takes{need}"
        )
    with folders.appearing(target) as scratch:
        with loading.quiet():
            # Before any forward: on CPUs that repacks the 4-bit weights, rounding scales.
            export.save_model(model, scratch)
            tokenizer.save_pretrained(scratch)
        copy_companions(folder, scratch)
        if not (scratch / "plan.json").exists():
            plan = plan_record(whole(stock.get_text_config().num_hidden_layers), command.source)
            files.write_json(scratch / "plan.json", plan)
        sizes = _bytes(folder), _bytes(scratch)
        if sizes[1] >= sizes[0]:
            raise TrimError(
                f"{command.source}: {command.to} would take {sizes[1] / 1e6:.2f} MB, not less than now "
                f"({sizes[0] / 1e6:.2f} MB): only {share:.0%} of its weights can be quantized"
            )
        difference = compare(scratch, model, trust_remote_code=own_code)
        measured, results = "", []
        if data is not None:
            settings = _evaluation(command, scratch)
            loaded = models.load(settings)
            scorer = inputs.scorer(settings, loaded.model, tokenizer, data.test)
            value = scorer.evaluate(loaded.model, data.metric)
            measured = f"{data.name}: {data.metric} {value.value:.1f} +- {value.stderr:.1f} (n={value.n})"
            results = [model_card.evaluation(data.name, data.metric, value.summary(), settings.task)]
        text = model_card.quantized(folder, command.source, command.to, share, sizes, results, measured)
        (scratch / "README.md").write_text(text, encoding="utf-8")
    odd = f", {' and '.join(kept)} in 16 bits: sizes not multiples of {COLUMNS} and {ROWS}" if kept else ""
    accuracy = "".join(f"; {line}" for line in (measured, *notes) if line)
    return (
        f"{command.to}, {sizes[1] / 1e6:.2f} MB instead of {sizes[0] / 1e6:.2f} ({share:.0%} of the weights quantized"
        f"{odd}), reloaded and compared (largest logit difference: {difference:.2g}){accuracy}"
    )


def _evaluation(command: config.ExportConfig, folder: Path) -> config.EvalConfig:
    """What is asked of the quantized model: of a run's, rows that it was not trained on."""
    assert command.task is not None
    shared: dict[str, Any] = {"truncate": command.truncate, "trust_remote_code": command.trust_remote_code}
    made = used_rows.of(command.source).seed
    seed = placing.run_of(command.source).get("seed", 0) if made is None else made
    return config.EvalConfig(model=str(folder), task=command.task, seed=seed, **shared)


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in loading.weight_files(folder))


def _settings(to: str, dtype: torch.dtype, skipped: list[str] | None) -> BitsAndBytesConfig:
    if to == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skipped
    )


def _too_odd(stock: Any, trust_remote_code: bool) -> tuple[list[str], list[str]]:
    """Names (their last two parts) of linear layers that the 4-bit kernel for CPUs cannot take, and the output head."""
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(stock, trust_remote_code=trust_remote_code)
    head = get_keys_to_not_convert(model)
    names = {
        ".".join(name.split(".")[-2:])
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name not in head
        and (module.in_features % COLUMNS or module.out_features % ROWS)
    }
    return sorted(names), head


def _share(model: nn.Module) -> float:
    """Share of the weights that is quantized."""
    import bitsandbytes

    kinds = (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)
    linear = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, kinds))
    others = {
        id(parameter): parameter.numel()
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if not (isinstance(module, kinds) and name == "weight")
    }
    return linear / (linear + sum(others.values()))


def compare(folder: Path, model: Any, *, trust_remote_code: bool = False) -> float:
    """The largest difference of logits between the checkpoint, loaded again on the model's device, and the quantized
    model in memory."""
    try:
        with loading.quiet():
            load: Any = AutoModelForCausalLM.from_pretrained
            ways: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": trust_remote_code}
            fresh, info = load(folder, device_map={"": model.device}, output_loading_info=True, **ways)
    except Exception as error:
        raise TrimError(f"the checkpoint in {folder} cannot be loaded again: {one_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise TrimError(f"the checkpoint in {folder} is wrong: {what.replace('_', ' ')}, such as {min(info[what])}")
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (1, 32), generator=torch.Generator().manual_seed(0)).to(model.device)
    with torch.no_grad():
        mine, other = (each.eval()(input_ids=ids, use_cache=False).logits.float().cpu() for each in (model, fresh))
    difference = float((mine - other).abs().max())
    if not (torch.isfinite(other).all() and difference <= 1e-3 * float(mine.std())):
        raise TrimError(f"the checkpoint in {folder} is not the quantized model: logits differ by {difference:.3g}")
    return difference
