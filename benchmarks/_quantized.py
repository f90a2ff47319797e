"""Ways to keep the weights of a model's blocks, for benchmarks: sparse, in 8 bits or in 4, rounded to nearest.

Speed does not depend on how well weights were chosen, so no method's search is run: GPTQ and AWQ stand here for the
formats that they write and the kernels that read them (gptqmodel's, which transformers uses). Embeddings and output
head stay as they are, as all of these methods leave them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from trimllm.blocks import decoder

GROUP = 128
"""Weights with a scale of their own, in 4 bits: what GPTQ's and AWQ's published models have."""
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of 8 neighbouring columns each 4 bits of a word in AWQ's format hold, lowest first."""


Packer = Callable[[torch.Tensor], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Way:
    """How the weights of the linear layers in the blocks are kept."""

    bits: float
    """per weight, scales included: an estimate, to see whether a model fits"""
    package: str | None = None
    only_cuda: bool = False
    change: Callable[[Any], None] | None = None
    """does it to a model, in place"""

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot be tried here at all; None: it can."""
        if self.only_cuda and device.type != "cuda":
            return "its kernels need an NVIDIA GPU"
        if self.package and find_spec(self.package) is None:
            return f"needs {self.package}: pip install {self.package}"
        return None


def linears(model: Any) -> list[tuple[nn.Module, str, nn.Linear]]:
    """All linear layers in the blocks: the module each is in, its name there, itself."""
    return [
        (module, name, child)
        for block in decoder.blocks(model)
        for module in block.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.Linear)
    ]


def prune_2_4(weight: torch.Tensor) -> torch.Tensor:
    """The two smallest of every four neighbouring weights of a row set to zero: the pattern of SparseGPT 2:4."""
    fours = weight.unflatten(-1, (-1, 4))
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, fours.abs().topk(2, dim=-1).indices, True)
    return (fours * kept).flatten(-2)


def sparse(model: Any) -> None:
    """2:4 sparse weights in the layout of NVIDIA's sparse tensor cores."""
    from torch.sparse import to_sparse_semi_structured

    for _, _, linear in linears(model):
        packed: Any = to_sparse_semi_structured(prune_2_4(linear.weight.detach()))
        linear.weight = nn.Parameter(packed, requires_grad=False)


def llm_int8(model: Any) -> None:
    """LLM.int8(): a scale per row, columns of large activations in 16 bits (threshold 6, as published)."""
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    for parent, name, linear in linears(model):
        sizes, device = (linear.in_features, linear.out_features), linear.weight.device
        new = Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, threshold=6.0, device="meta")
        new.bias = linear.bias
        # It quantizes on the way from the CPU to the device.
        new.weight = Int8Params(linear.weight.detach().cpu(), requires_grad=False).to(device)
        setattr(parent, name, new)


def torchao_int8(model: Any) -> None:
    """A scale per row; activations stay in 16 bits."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for block in decoder.blocks(model):
        quantize_(block, Int8WeightOnlyConfig())


def torchao_int4(model: Any) -> None:
    """A scale and a zero point per `GROUP` weights; activations stay in 16 bits."""
    from torchao.quantization import quantize_

    if model.device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        settings: Any = PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)
    else:
        from torchao.quantization import Int4WeightOnlyConfig

        settings = Int4WeightOnlyConfig(group_size=GROUP, int4_packing_format="tile_packed_to_4d")
        for _, _, linear in linears(model):
            linear.to(torch.bfloat16)  # it packs nothing else; what goes in is cast, and comes back as it was
    for block in decoder.blocks(model):
        quantize_(block, settings)


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest of 16 values around zero: codes (in, out) from 0 to 15, 8 being zero; scales (in / `GROUP`, out)."""
    groups = weight.t().float().unflatten(0, (-1, GROUP))
    scale = groups.abs().amax(1, keepdim=True).clamp(min=1e-8) / 7
    codes = (groups / scale).round().clamp(-8, 7).to(torch.int32) + 8
    return codes.flatten(0, 1), scale.squeeze(1)


def words(codes: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight codes along `dim` in each 32 bits."""
    eights = codes.movedim(dim, -1).unflatten(-1, (-1, 8))[..., list(order)]
    packed = torch.zeros_like(eights[..., 0])
    for place in range(8):
        packed |= eights[..., place] << 4 * place
    return packed.movedim(-1, dim).contiguous()


def gptq_tensors(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A matrix (out, in) as GPTQ checkpoints hold it: rows of inputs packed, zero points less one."""
    codes, scales = rounded(weight)
    return {
        "qweight": words(codes, 0),
        "qzeros": words(torch.full_like(scales, 7, dtype=torch.int32), 1),
        "scales": scales.half(),
        "g_idx": torch.arange(len(codes), dtype=torch.int32, device=weight.device) // GROUP,
    }


def awq_tensors(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """A matrix (out, in) as AWQ checkpoints hold it: columns of outputs packed in `AWQ_ORDER`, zero points as such."""
    codes, scales = rounded(weight)
    return {
        "qweight": words(codes, 1, AWQ_ORDER),
        "qzeros": words(torch.full_like(scales, 8, dtype=torch.int32), 1, AWQ_ORDER),
        "scales": scales.half(),
    }


def gptq(model: Any) -> None:
    """GPTQ's format: symmetric, rows in their order."""
    _gptqmodel(model, "gptq", "gptq", gptq_tensors)


def awq(model: Any) -> None:
    """AWQ's format: with zero points."""
    _gptqmodel(model, "awq", "gemm", awq_tensors)


def _gptqmodel(
    model: Any, method: str, layout: str, tensors: Callable[[torch.Tensor], dict[str, torch.Tensor]]
) -> None:
    """Give a model the layers that gptqmodel picks for its device, filled and made ready as if loaded from a file."""
    # Its pool for CPUs asks for two threads and refuses a process that has one.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel.utils.importer import hf_select_quant_linear_v2
    from gptqmodel.utils.model import hf_convert_gptq_v1_to_v2_format, hf_gptqmodel_post_init

    symmetric = method == "gptq"
    kind = hf_select_quant_linear_v2(
        bits=4,
        group_size=GROUP,
        desc_act=False,
        sym=symmetric,
        format=layout,
        quant_method=method,
        zero_point=None if symmetric else True,
        dtype=model.dtype,
        pack=False,
        device_map={"": str(model.device)},
    )
    for parent, name, linear in linears(model):
        new = kind(
            bits=4,
            group_size=GROUP,
            desc_act=False,
            sym=symmetric,
            in_features=linear.in_features,
            out_features=linear.out_features,
            bias=linear.bias is not None,
            register_buffers=True,
            dtype=model.dtype,
        ).to(linear.weight.device)
        filled = tensors(linear.weight.detach()) | ({} if linear.bias is None else {"bias": linear.bias.detach()})
        left = new.load_state_dict(filled, strict=False)
        if left.unexpected_keys or left.missing_keys:
            raise RuntimeError(f"{kind.__name__} has other tensors than {method} files: {left}")
        setattr(parent, name, new.eval())
    if symmetric:
        hf_convert_gptq_v1_to_v2_format(model, bits=4, qlinear_kernel=kind, checkpoint_format=layout, meta=None)
    hf_gptqmodel_post_init(model, use_act_order=False)


WAYS = {
    "plain": Way(16),
    "2:4 sparse": Way(9.0, only_cuda=True, change=sparse),  # half the values, and 2 bits for the place of each
    "LLM.int8()": Way(8.1, "bitsandbytes", change=llm_int8),
    "int8 torchao": Way(8.1, "torchao", change=torchao_int8),
    "int4 torchao": Way(4.3, "torchao", change=torchao_int4),
    "int4 GPTQ": Way(4.3, "gptqmodel", change=gptq),
    "int4 AWQ": Way(4.3, "gptqmodel", change=awq),
}
