"""What `trimllm compare` compares: the one table of methods, each with its paper and the module that carries it out.

Methods that differ in a setting share a module. One has `run(job) -> Product`: it makes a checkpoint out of the base,
or of the fully fine-tuned model. Evaluation, speed and size are measured alike for all, outside (see `cell.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trimllm.errors import InputError, did_you_mean
from trimllm.files import read_json


@dataclass(frozen=True)
class Method:
    """One method of the comparison."""

    name: str
    title: str
    """What the table calls it, with the share after it (see `Cell.title`)."""
    module: str
    """Module of this package with `run(job)`."""
    source: str
    """Paper, as an arXiv number or a link; empty for a plain reference."""
    keeps: bool = True
    """Whether there is one for every --keep; else one only."""
    cuts: bool = True
    """Whether what it makes is smaller by that; else only its training is as long as for a model so small."""
    after: tuple[str, ...] = ("full",)
    """Methods whose product it starts from; they are done before."""
    needs: tuple[str, ...] = ()
    """Libraries, by the name they are imported by."""
    extra: str = "baselines"
    """The extra of this package that brings them."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What it tells a run of `trimllm trim` or `trimllm export`, where it is one."""


def _arxiv(number: str) -> str:
    return f"https://arxiv.org/abs/{number}"


def _by(strategy: str) -> dict[str, Any]:
    return {"settings": {"strategy": strategy, "sparse_update": "off"}}


def _to(kind: str) -> dict[str, Any]:
    return {"settings": {"to": kind}, "needs": ("bitsandbytes",), "extra": "quantize"}


def _in(unit: str) -> dict[str, Any]:
    return {"settings": {"unit": unit}}


_SAJJAD, _SHORTENED, _TRIMLLM = _arxiv("2004.03844"), _arxiv("2402.02834"), _arxiv("2412.11242")
_COMPRESSOR = ("llmcompressor",)
_PEFT: dict[str, Any] = {"needs": ("peft",), "extra": "peft"}

METHODS = {
    method.name: method
    for method in (
        Method("base", "no training", "plain", "", keeps=False, after=()),
        Method("full", "full fine-tuning", "plain", "", keeps=False, after=()),
        Method("full-long", "full fine-tuning, all blocks", "plain", "", cuts=False),
        Method("trim", "TrimLLM, blocks", "trimmed", _TRIMLLM, **_in("block")),
        Method("trim-pair", "TrimLLM, pairs", "trimmed", _TRIMLLM, **_in("pair")),
        Method("trim-int8", "TrimLLM, then int8", "quantized", _TRIMLLM, after=("trim",), **_to("int8")),
        Method("trim-int4", "TrimLLM, then int4", "quantized", _TRIMLLM, after=("trim",), **_to("int4")),
        Method("one-shot", "one-shot, by the same scan", "one_shot", _TRIMLLM),
        Method("shortgpt", "ShortGPT (block influence)", "one_shot", _arxiv("2403.03853"), **_by("bi")),
        Method("angular", "angular distance (a run)", "one_shot", _arxiv("2403.17887"), **_by("angular")),
        Method("perplexity", "Shortened LLaMA (perplexity)", "one_shot", _SHORTENED, **_by("perplexity")),
        Method("taylor", "Shortened LLaMA (Taylor)", "one_shot", _SHORTENED, **_by("taylor")),
        Method("magnitude", "Shortened LLaMA (magnitude)", "one_shot", _SHORTENED, **_by("magnitude")),
        Method("sleb", "SLEB (greedy, then training)", "greedy", _arxiv("2402.09025"), **_in("block")),
        Method(
            "blockpruner", "BlockPruner (greedy pairs, then training)", "greedy", _arxiv("2406.10594"), **_in("pair")
        ),
        Method("top", "Sajjad et al., top", "sajjad", _SAJJAD, after=(), **_by("last")),
        Method("bottom", "Sajjad et al., bottom", "sajjad", _SAJJAD, after=(), **_by("first")),
        Method("alternate", "Sajjad et al., alternate", "sajjad", _SAJJAD, after=(), **_by("alternate")),
        Method("symmetric", "Sajjad et al., symmetric", "sajjad", _SAJJAD, after=(), **_by("symmetric")),
        Method("contribution", "Sajjad et al., contribution", "sajjad", _SAJJAD, after=(), **_by("bi")),
        Method("first", "first blocks", "one_shot", "", **_by("first")),
        Method("last", "last blocks", "one_shot", "", **_by("last")),
        Method("random", "random blocks", "one_shot", "", **_by("random")),
        Method("streamline", "LLM-Streamline (replacement layer)", "streamline", _arxiv("2403.19135")),
        Method(
            *("layer-drop", "progressive layer dropping, all blocks", "layer_drop", _arxiv("2010.13369")),
            cuts=False,
            after=(),
        ),
        Method("llm-pruner", "LLM-Pruner (channels and heads)", "llm_pruner", _arxiv("2305.11627"), **_PEFT),
        Method("sparsegpt", "SparseGPT 2:4", "compressor", _arxiv("2301.00774"), keeps=False, needs=_COMPRESSOR),
        Method("wanda", "Wanda 2:4", "compressor", _arxiv("2306.11695"), keeps=False, needs=_COMPRESSOR),
        Method("gptq", "GPTQ int4", "compressor", _arxiv("2210.17323"), keeps=False, needs=_COMPRESSOR),
        Method("awq", "AWQ int4", "compressor", _arxiv("2306.00978"), keeps=False, needs=_COMPRESSOR),
        Method("llm-int8", "LLM.int8()", "quantized", _arxiv("2208.07339"), keeps=False, **_to("int8")),
    )
}
"""By name, in the order of the table."""


@dataclass(frozen=True)
class Cell:
    """A row of the table: a method, at a share of the blocks if it has one."""

    method: Method
    keep: float | None

    @property
    def name(self) -> str:
        return self.method.name + (f"-{self.keep:g}" if self.method.keeps else "")

    @property
    def title(self) -> str:
        """What the table calls it."""
        if not self.method.keeps or self.keep is None:
            return self.method.title
        return self.method.title + (
            f", {self.keep:.0%} kept" if self.method.cuts else f", as long as for {self.keep:.0%}"
        )

    def file(self, root: Path) -> Path:
        """Where the comparison in `root` keeps its row; what the method makes is beside it."""
        return root / "cells" / self.name / "row.json"

    def row(self, root: Path) -> dict[str, Any]:
        """Its row; empty if there is none yet."""
        return read_json(self.file(root))

    def answers(self, root: Path) -> Path:
        """Where it keeps what its model answered, by task (see `paired.answers`)."""
        return self.file(root).with_name("answers.json")


def cells(names: Sequence[str], keeps: Sequence[float]) -> list[Cell]:
    """The rows for the named methods (none: all), those they start from included, in an order that can be worked off.

    Raises:
        InputError: for an unknown method, with the nearest name.
    """
    for name in names:
        if name not in METHODS:
            hint = did_you_mean(name, METHODS) or f": use some of {', '.join(METHODS)}"
            raise InputError(f"--methods {name}: unknown method{hint}")
    wanted = set(names or METHODS)
    while more := {before for name in wanted for before in METHODS[name].after} - wanted:
        wanted |= more
    chosen = [method for method in METHODS.values() if method.name in wanted]
    return [Cell(method, keep) for method in chosen for keep in (sorted(keeps)[::-1] if method.keeps else [None])]
