"""The family table: what is dropped, and whether the saved checkpoint is the model without it.

    python tests/family_table.py            # Markdown; with the installed release of transformers

Each cell is computed: the cut, the bypass oracle (the original model whose blocks are skipped by hooks), the saved
checkpoint loaded again. `exact` says that all agree; a number is the largest difference where it is not 0; a refusal is
explained below the table; `not saved` is the verification's own verdict.

    python tests/family_table.py llama gemma2       # some of them
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import transformers
from test_surgery_families import NAMES, logits, original, skip_blocks
from tiny import absent, build

from trimllm.blocks.layout import Unit, remove, whole
from trimllm.blocks.surgery import apply_layout, drop_layers
from trimllm.checkpoints.export import save_trimmed
from trimllm.errors import InputError, TrimError

DROPS = {"first": (0,), "last": (5,), "middle": (2,), "scattered": (0, 3)}
LIMIT = 1e-5


def cell(name: str, dropped: tuple[int, ...]) -> tuple[str, str | None]:
    """What stands in the table, and the reason of a refusal."""
    with skip_blocks(original(name), dropped):
        expected = logits(original(name))
    model = build(name)
    try:
        drop_layers(model, dropped)
    except InputError as error:
        return "refused", str(error)
    return _saved(model, float((logits(model) - expected).abs().max() / expected.abs().max().clamp(min=1)))


def pairs(name: str) -> tuple[str, str | None]:
    """The same for the shifted pair M2 + A3; in memory it is compared by the tests, here it is saved and reloaded."""
    model = build(name)
    try:
        apply_layout(model, remove(whole(6), Unit("pair", 2)))
    except InputError as error:
        return "refused", str(error)
    return _saved(model, 0.0)


def _saved(model: torch.nn.Module, difference: float) -> tuple[str, str | None]:
    try:
        with tempfile.TemporaryDirectory() as folder:
            report = save_trimmed(model, Path(folder) / "cut")
    except TrimError as error:
        return "not saved", str(error)
    assert report is not None
    worst = max(difference, report.plain, report.cached, report.static or 0.0)
    return ("exact" if worst == 0 else f"{worst:.0e}" if worst <= LIMIT else f"WRONG {worst:.1e}"), None


def main() -> int:
    torch.set_num_threads(1)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}\n")
    print("| family | " + " | ".join([*DROPS, "pair"]) + " |\n|---" * 1 + "|---" * (len(DROPS) + 1) + "|")
    reasons: dict[str, list[str]] = {}
    wrong = 0
    for name in sys.argv[1:] or NAMES:
        if reason := absent(name):
            print(f"| {name} | " + " | ".join(["absent"] * (len(DROPS) + 1)) + " |")
            reasons.setdefault(str(reason), []).append(name)
            continue
        row = []
        for what, (text, why) in {**{w: cell(name, d) for w, d in DROPS.items()}, "pair": pairs(name)}.items():
            row.append(text)
            wrong += text.startswith("WRONG")
            if why is not None:
                reasons.setdefault(why, []).append(f"{name} ({what})")
        print(f"| {name} | " + " | ".join(row) + " |", flush=True)
    print("\nRefused or absent, and why:\n")
    for why, names in reasons.items():
        print(f"- {', '.join(names)}: {why}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
