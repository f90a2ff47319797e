"""What AdamW's steps come to in 16-bit weights, against the same gradients in float32.

    python benchmarks/rounding.py

Weights of standard deviation 0.02; gradients of a fixed direction and as much noise; the rate decays to zero. By dtype,
rate and size of the gradients: the share of the weights that never moved, and the length of the whole movement over
that in float32. Then what AdamW's second moment is after gradients of 1 and many of 0.1. Some seconds on one thread;
the last line is one JSON object, nothing is written.
"""

from __future__ import annotations

import json

import torch
from _sides import machine, run

from trimllm.checkpoints.dtypes import name_of
from trimllm.config import TrainSettings
from trimllm.console import table
from trimllm.training import train

WEIGHTS, STEPS, SPREAD = 200_000, 100, 0.02
CASES = (
    *((torch.bfloat16, lr, 1e-2) for lr in (2e-5, 1e-4, 3e-4, 1e-3)),
    *((torch.float16, 2e-5, size) for size in (1e-2, 1e-4, 1e-6)),
)


def movement(dtype: torch.dtype, lr: float, size: float) -> tuple[float, float]:
    """Share of the weights that never moved, and the movement over that in float32."""
    torch.manual_seed(0)
    begin = (SPREAD * torch.randn(WEIGHTS)).to(dtype)
    both = [torch.nn.Parameter(begin.clone()), torch.nn.Parameter(begin.float())]
    settings = TrainSettings(lr=lr, weight_decay=0.0)
    optimizers = [train.adamw([each], settings, torch.device("cpu")) for each in both]
    direction = size * torch.randn(WEIGHTS)
    for step in range(STEPS):
        gradient = direction + size * torch.randn(WEIGHTS)
        for each, optimizer in zip(both, optimizers, strict=True):
            each.grad = gradient.to(each.dtype)
            optimizer.param_groups[0]["lr"] = lr * (1 - step / STEPS)
            optimizer.step()
    narrow, wide = ((each.detach().float() - begin.float()).norm().item() for each in both)
    return (both[0].detach() == begin).float().mean().item(), narrow / wide


def faded(dtype: torch.dtype, betas: tuple[float, float]) -> float:
    """The mean second moment after 300 gradients of size 1 and 3,000 of 0.1, whose mean square is 0.01."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(1000, dtype=dtype))
    optimizer = torch.optim.AdamW([weight], lr=1e-4, betas=betas, fused=True)
    for size in (*[1.0] * 300, *[0.1] * 3000):
        weight.grad = (size * torch.randn(1000)).to(dtype)
        optimizer.step()
    return optimizer.state[weight]["exp_avg_sq"].float().mean().item()


def main() -> int:
    rows, found = [], []
    for dtype, lr, size in CASES:
        still, ratio = movement(dtype, lr, size)
        name = name_of(dtype)
        rows.append([name, f"{lr:g}", f"{size:g}", f"{still:.1%}", f"{ratio:.2f}"])
        found.append({"dtype": name, "lr": lr, "gradients": size, "never_moved": still, "movement": ratio})
    print(table(["weights", "lr", "gradients", "never moved", "movement / float32"], rows))
    moments = {
        f"{name_of(dtype)}, beta2 {betas[1]}": faded(dtype, betas)
        for dtype, betas in (
            (torch.float32, train.BETAS),
            (torch.bfloat16, train.BETAS),
            (torch.bfloat16, train.BETAS_BFLOAT16),
        )
    }
    print(table(["second moment", "at the end"], [[name, f"{value:.4f}"] for name, value in moments.items()]))
    print(json.dumps({"name": "rounding", "cases": found, "second_moments": moments, "machine": machine()}))
    return 0


if __name__ == "__main__":
    run(main)
