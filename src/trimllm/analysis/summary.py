"""What `trimllm scan --analysis` says: every measure per unit, and how its ranks agree with those of the exact scan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trimllm.analysis import lens, ranks, tracing
from trimllm.blocks import decoder
from trimllm.config import ScanConfig
from trimllm.console import table
from trimllm.errors import InputError
from trimllm.evaluation import forward
from trimllm.evaluation.encoding import Encoded
from trimllm.evaluation.evaluate import Scorer
from trimllm.importance import scan
from trimllm.importance.scan import ScanResult
from trimllm.importance.scores import Array, block_influence, s_norm

HALVINGS = 200
"""Random halves of the questions on which the scan is compared with itself."""
FORMS = (("rho", "+.2f"), ("p", ".4f"))
"""Columns of a correlation, and how they are written."""
MEASURES = {
    "tracing_state": ("state restored", "points"),
    "tracing_output": ("output restored", "points"),
    "promotion": ("promotion", "logits"),
    "lens_probability": ("lens", "%"),
    "lens_gain": ("lens gain", "points"),
    "lens_accuracy": ("lens accuracy", "%"),
    "block_influence": ("block influence", "1 - cosine"),
    "norm": ("activation norm", "100 min / norm"),
    "depth": ("depth", "blocks"),
}
"""Name in analysis.json -> what tables and pictures call it, and its unit. `depth`, the unit's position, is the
control: what grows with depth agrees with everything else that does."""
VERDICTS = {"value": -1, "probability": -1, "loss": 1}
"""What a scan says of a unit by what is found without it -> 1 if the unit is worth more the higher that is, else -1."""


def measure(
    command: ScanConfig,
    model: Any,
    scorer: Scorer,
    asked: Sequence[Encoded],
    result: ScanResult,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """All measures that the family allows, of the units of a scan.

    `asked` are the scorer's questions (see `lens.questions`), of which at most `command.analysis_items` that the
    model answers are traced.

    Returns:
        `measures`: name -> (units, questions), or (units,) where nothing is told apart by question; `notes`: why others
        are missing; what was traced; and how well the scan agrees with itself (see `halves`).
    """
    units, notes = result.candidates, list[str]()
    measures: dict[str, Array] = {}
    with forward.evaluating(model):
        made = lens.batches(model, scorer, asked)
        for look in (lens.logit_lens, lens.promotion):
            try:
                measures |= look(model, made, units)
            except InputError as error:
                notes.append(str(error))
        known = lens.answered(model, scorer, asked, result.intact, command.analysis_items)
        traced: dict[str, Array] = {}
        if not known:
            notes.append("causal tracing: the model answers none of the calibration questions")
        else:
            own, rows = tracing.spans(asked), lens.batches(model, scorer, known)
            try:
                traced = tracing.trace(model, rows, own, units, seed=command.seed, progress=progress)
            except InputError as error:
                notes.append(str(error))
    measures |= {name: values for name, values in traced.items() if name in MEASURES}
    measures |= {"block_influence": block_influence(result.cosine), "norm": s_norm(result.norm)}
    measures["depth"] = scan.positions(units, range(decoder.depth(model)))
    return {
        "questions": len(asked),
        "traced": len(known) if traced else 0,
        "noise": tracing.NOISE,
        "samples": tracing.SAMPLES,
        "clean": float(traced["clean"].mean()) if traced else None,
        "corrupted": float(traced["corrupted"].mean()) if traced else None,
        "halves": halves(np.array([trial.correct for trial in result.trials], float), command.seed),
        "measures": {name: measures[name] for name in MEASURES if name in measures},
        "notes": notes,
    }


def halves(hits: Array, seed: int) -> float:
    """Rank correlation of a scan on half of its questions with that on the other half, the mean over random halvings:
    how well the scan agrees with itself. `hits` (units, questions); NaN where no half tells units apart."""
    count, generator = hits.shape[1] // 2, np.random.default_rng(seed % 2**32)
    orders = [generator.permutation(hits.shape[1]) for _ in range(HALVINGS if count else 0)]
    both = [(hits[:, order[:count]].mean(axis=1), hits[:, order[count:]].mean(axis=1)) for order in orders]
    found = [rho for one, other in both if np.isfinite(rho := ranks.spearman(one, other))]
    return float(np.mean(found)) if found else float("nan")


def ceiling(halves: float) -> float:
    """The rank correlation with the whole scan that a perfect measure may be expected to reach, by how well its halves
    agree: the square root of their reliability stepped up to the whole (Spearman-Brown); NaN where they do not."""
    return float(np.sqrt(2 * halves / (1 + halves))) if halves > 0 else float("nan")


def record(found: dict[str, Any], scanned: dict[str, Any], seed: int) -> dict[str, Any]:
    """The contents of analysis.json.

    Args:
        found: what `measure` returns.
        scanned: the contents of scan.json.
        seed: of the permutations.

    Returns:
        `units`: per unit of the scan its value, probability and loss when deleted and the mean of every measure, with
        the standard error over questions; `correlations`: per measure Spearman's rank correlation with what the scan
        says of the units by each of `VERDICTS` that it has, and p by permutation; `among_verdicts`: of the others with
        the first.
    """
    measures: dict[str, Array] = found["measures"]
    rows = [{name: row.get(name) for name in ("unit", *VERDICTS)} for row in scanned["units"]]
    means = {name: values.mean(axis=1) if values.ndim == 2 else values for name, values in measures.items()}
    for name, values in measures.items():
        for i, row in enumerate(rows):
            row[name] = float(means[name][i])
            if values.ndim == 2 and values.shape[1] > 1:
                row[f"{name}_stderr"] = float(values[i].std(ddof=1) / np.sqrt(values.shape[1]))
    worths = {name: sign * np.array([row[name] for row in rows], float) for name, sign in VERDICTS.items()}
    verdicts = {name: worth for name, worth in worths.items() if not np.isnan(worth).all()}
    correlations = [
        {"measure": name, **{by: _agreement(values, worth, seed) for by, worth in verdicts.items()}}
        for name, values in means.items()
    ]
    first, *others = verdicts
    among = {name: _agreement(verdicts[first], verdicts[name], seed) for name in others}
    about = {name: scanned[name] for name in ("model", "task", "metric", "intact")}
    named = {name: {"label": MEASURES[name][0], "unit": MEASURES[name][1]} for name in measures}
    agreement = {"correlations": correlations, "among_verdicts": among}
    return about | found | {"measures": named, "units": rows} | agreement


def _agreement(measured: Array, scanned: Array, seed: int) -> dict[str, float]:
    return {"rho": ranks.spearman(measured, scanned), "p": ranks.permutation_p(measured, scanned, seed)}


def report(found: dict[str, Any]) -> str:
    """The tables of an analysis: the measures by depth, then their rank correlations with the scan."""
    names = [name for name in MEASURES if name in found["units"][0] and name != "depth"]
    verdicts = [name for name in VERDICTS if name in found["correlations"][0]]
    called = [found["metric"] if name == "value" else name for name in verdicts]
    header = ["unit", f"{called[0]} without it", *called[1:], *(MEASURES[name][0] for name in names)]
    rows = [[row["unit"], *(_number(row[name], ".4g") for name in (*verdicts, *names))] for row in found["units"]]
    pairs = [
        [MEASURES[row["measure"]][0], *(_number(row[by][name], form) for by in verdicts for name, form in FORMS)]
        for row in found["correlations"]
    ]
    for other, both in found["among_verdicts"].items():
        pairs.append([f"{other} without it", *(_number(both[name], form) for name, form in FORMS)])
    pairs.append(["the scan, half against half", _number(found["halves"], "+.2f")])
    pairs.append(["... so a perfect measure", _number(ceiling(found["halves"]), "+.2f")])
    columns = [f"rank correlation with {', '.join(called)}", *["rho", "p"] * len(verdicts)]
    parts = [table(header, rows), table(columns, [row + [""] * (len(columns) - len(row)) for row in pairs])]
    if found["traced"]:
        parts.append(
            f"traced: {found['traced']} questions, probability of the answer {found['clean']:.1f} %, "
            f"{found['corrupted']:.1f} % with noise on the question"
        )
    return "\n\n".join(parts)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None or not np.isfinite(value) else format(value, form)
