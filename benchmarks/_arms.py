"""The parts of the study (domains, with the settings that all their runs share) and its arms (ways to trim)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from trimllm.baselines import METHODS
from trimllm.config import TrimConfig, plain_settings, without_idle
from trimllm.demo.demo import RECIPE
from trimllm.run.targets import LATE_SHARE

Settings = dict[str, Any]
SPREAD = {
    "keep": None,
    "schedule": "epoch",
    "epochs_per_drop": 1.0,
    "final_epochs": 0,
    "optimizer_state": "fresh",
    "strategy": "scan+norm",
    "sparse_update": "static",
}
"""What the arms change; the defaults of `trimllm trim` are the arm "late, carried, probability, filled"."""
QUESTION = 1.0
"""Points that a calibration question of the demo world is worth: within these candidates are tied, unless the arm says
otherwise (the default until 2026-11-29)."""
DEMO = plain_settings.read_yaml(RECIPE) | SPREAD | {"model": "demo", "tie_tolerance": QUESTION}
LAB = SPREAD | {
    "batch_size": 1024,
    "lr": 1e-3,
    "warmup_epochs": 4,
    "epochs_per_drop": 0.2,
    "calibration_size": 100,
    "tie_tolerance": 1.0,
    "max_test": 1000,
    "truncate": True,
}
"""Found on training rows of BANKING77 (docs/earlier.md, the first base)."""
WRITTEN = {"max_train": 2000, "max_test": 300, "tie_tolerance": None, "epochs_per_drop": 1.0}


@dataclass(frozen=True)
class Part:
    """A domain of the study: what is trimmed on what, and the settings that all its runs share."""

    settings: Settings
    files: str | None = None
    """Folder of the task under --data."""
    as_text: bool = False
    """The training rows are also learnt as plain text."""
    generation: bool = False
    """Answers are written and not chosen; accuracy is the likelihood of the reference (see benchmarks/beyond.py)."""


PARTS = {
    **{name: Part(DEMO | {"task": f"demo_{name}", "text": f"demo_{name}"}) for name in ("medicine", "law", "finance")},
    "medquad": Part(LAB | {"max_train": 5000, "warmup_epochs": 1}, "medical/medquad_qtype"),
    "cuad": Part(LAB, "legal/cuad_clause_type"),
    "banking77": Part(LAB, "finance/banking77", as_text=True),
    "medquad_gen": Part(LAB | WRITTEN, "medical/medquad_gen", generation=True),
    "tatqa_gen": Part(LAB | WRITTEN, "finance/tatqa_gen", generation=True),
    "gsm8k": Part(LAB | WRITTEN, "generation/gsm8k", generation=True),
}


@dataclass(frozen=True)
class Arm:
    """A way to trim: what it changes in the recipe, and whether it takes a run per depth."""

    changes: Settings = field(default_factory=dict)
    per_depth: bool = False
    late: float = 0.0
    """Share of the epochs after drops that comes after the last one (2/3: --schedule late); takes a run per depth."""
    longer: float = 1.0
    """Epochs after drops over those of the other arms: where it shows what more training gives, or where epochs are
    shorter."""
    rate: float = 1.0
    """Learning rate after drops over that of the full fine-tuning."""
    from_base: bool = False
    """Starts from the base: the epochs of full fine-tuning come after the drops, with the others."""

    whole: bool = False
    """Nothing is dropped: all blocks train on from the common start, for the epochs that others spend after drops. The
    control of what training alone gives. (Its run drops a block at the end, as every run must.)"""

    own_start: bool = False
    """Fully fine-tunes for itself, `longer` too: it holds out rows that the common start has learnt. What it is less
    than at full depth is less than its own; parts of the demo world only, whose number of rows `longer` is for."""

    def settings(self, given: Settings, drops: int) -> Settings:
        """The settings of a run that drops so many blocks."""
        epochs = given["epochs_per_drop"] * self.longer
        warmup = given["warmup_epochs"] * self.longer if self.own_start else 0
        spread: Settings = {"epochs_per_drop": epochs * (1 - self.late), "final_epochs": epochs * self.late * drops}
        if self.from_base:
            spread["final_epochs"] += given["warmup_epochs"]
        if self.whole:
            warmup, spread = epochs * drops, {"epochs_per_drop": 0.0, "final_epochs": 0.0}
        own = {"warmup_epochs": warmup, "lr": given["lr"] * self.rate}
        return without_idle(TrimConfig, {**given, **spread, **own, **self.changes})


def _peer(strategy: str, **more: Any) -> Arm:
    return Arm({"one_shot": True, "strategy": strategy, "sparse_update": "off", **more}, per_depth=True)


def _late(**changes: Any) -> Arm:
    return Arm(changes, per_depth=True, late=LATE_SHARE)


def _carried(**changes: Any) -> Arm:
    return _late(optimizer_state="carried", **changes)


def _default(**changes: Any) -> Arm:
    """What `trimllm trim` does, but for the changes."""
    return _carried(strategy="probability", sparse_update="filled", **changes)


ARMS = {
    "trimllm": Arm(),
    "late": _late(),
    "all late": Arm(per_depth=True, late=1.0),
    "late, r=1": _late(sparse_update="off"),
    "late, frozen embeddings": _late(train_embeddings=False),
    "late, loss scan": _late(strategy="loss"),
    "late, scan alone": _late(strategy="scan"),
    "late, pairs": _late(unit="pair"),
    "late, filled": _late(sparse_update="filled"),
    "late, pairs, filled": _late(sparse_update="filled", unit="pair"),
    "late, carried": _carried(),
    "late, carried, exact ties": _carried(tie_tolerance=0.0),
    "late, carried, probability": _carried(strategy="probability"),
    "late, carried, probability, filled": _default(),
    "late, carried, probability, r=1": _carried(strategy="probability", sparse_update="off"),
    "late, carried, probability, filled, r=1/2": _default(train_ratio=0.5),
    "late, carried, probability, filled, r=1/8": _default(train_ratio=0.125),
    "late, carried, probability, filled, distilled": _default(distill=0.5),
    "late, carried, probability, filled, half the rate": replace(_default(), rate=0.5),
    "late, carried, probability, filled, twice as long": replace(_default(), longer=2.0),
    "late, carried, probability, filled, no domain text": replace(
        _default(text=None, text_ratio=1.0),
        longer=4.0,  # the demo world's recipe has three of text to one of questions
    ),
    "late, carried, ties by loss": _carried(strategy="scan+loss"),
    "late, carried, loss scan": _carried(strategy="loss"),
    "late, carried, twice as long": replace(_carried(), longer=2.0),
    "late, carried, 200 calibration rows": replace(
        _carried(calibration_size=200, tie_tolerance=QUESTION / 2),
        longer=4 / 3,  # the demo world's training rows are then 300, not 400
        own_start=True,
    ),
    "late, pairs, carried": _carried(unit="pair"),
    "late, carried, filled": _carried(sparse_update="filled"),
    "late, pairs, twice as long": replace(_late(unit="pair"), longer=2.0),
    "one-shot": _peer("scan+norm", sparse_update="static"),
    "one-shot, twice as long": replace(_peer("scan+norm", sparse_update="static"), longer=2.0),
    "one-shot, exact ties": _peer("scan+norm", sparse_update="static", tie_tolerance=0.0),
    "one-shot, probability": _peer("probability", sparse_update="static"),
    "one-shot, probability, distilled": _peer("probability", sparse_update="static", distill=0.5),
    "one-shot, probability, half the rate": replace(_peer("probability", sparse_update="static"), rate=0.5),
    "one-shot, probability, twice as long": replace(_peer("probability", sparse_update="static"), longer=2.0),
    "one-shot, ties by loss": _peer("scan+loss", sparse_update="static"),
    "one-shot, loss scan": _peer("loss", sparse_update="static"),
    "one-shot, r=1": _peer("scan+norm"),
    "one-shot, base scanned": Arm({"one_shot": True}, per_depth=True, from_base=True),
    "shortgpt": _peer("bi"),
    "angular": _peer("angular"),
    "perplexity": _peer("perplexity"),
    "taylor": _peer("taylor"),
    "random": _peer("random"),
    "last": _peer("last"),
    **{
        f"Sajjad, {method.name}": replace(_peer(method.settings["strategy"]), from_base=True)
        for method in METHODS.values()
        if method.module == "sajjad"
    },
    "full, as long, half the rate": Arm({"strategy": "last", "one_shot": True}, per_depth=True, whole=True, rate=0.5),
    "full, as long": Arm({"strategy": "last", "one_shot": True}, per_depth=True, whole=True),
    "distilled": _late(distill=0.5),
    "pairs": Arm({"unit": "pair"}),
    "r=1/8": Arm({"train_ratio": 0.125}),
    "r=1/2": Arm({"train_ratio": 0.5}),
    "r=1": Arm({"sparse_update": "off"}),
    "dynamic": Arm({"sparse_update": "dynamic"}),
    "carried optimizer state": Arm({"optimizer_state": "carried"}),
    "scan alone": Arm({"strategy": "scan"}),
    "norm alone": Arm({"strategy": "norm"}),
    "loss scan": Arm({"strategy": "loss"}),
    "progressive random": Arm({"strategy": "random"}),
    "50 calibration rows": Arm({"calibration_size": 50, "tie_tolerance": 2 * QUESTION}),
    "late, no domain text": replace(_late(text=None, text_ratio=1.0), longer=4.0),
}
"""The first is what the others change, one thing at a time."""
