"""A CPU that emulates 16 bits computes in float32 where nothing is saved; where 16 bits are asked for, it says so."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers_run as h
import pytest
import torch
from accelerate import Accelerator

from trimllm import cli, config
from trimllm.baselines import cells
from trimllm.bench import benching, tables
from trimllm.checkpoints import arithmetic, models, room
from trimllm.checkpoints.loading import load_model
from trimllm.compare import check
from trimllm.errors import InputError
from trimllm.evaluation import inputs
from trimllm.run import progressive

CPU = torch.device("cpu")
SLOWER = "multiplies matrices 7 times slower"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return h.save_base(tmp_path_factory.mktemp("base"), depth=4, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return h.save_task(tmp_path_factory.mktemp("task"))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_measured", lambda _: 7.0)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_measured", lambda _: 0.6)


def command(base: Path, task: Path, **changes: Any) -> config.EvalConfig:
    return config.EvalConfig(model=str(base), task=str(task), device="cpu", **changes)


# ---- the measurement -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "slow"), [(0.004, True), (0.0, False)])
def test_what_a_dtype_costs_is_measured_by_products_in_it(seconds: float, slow: bool, monkeypatch: Any) -> None:
    work = torch.nn.functional.linear

    def product(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if tokens.dtype == torch.float32:
            time.sleep(0.002)
            return work(tokens, weights)
        time.sleep(seconds * 5)
        return tokens

    monkeypatch.setattr(torch.nn.functional, "linear", product)
    arithmetic._measured.cache_clear()
    try:
        found = arithmetic.slowdown(torch.bfloat16, CPU)
        assert found > arithmetic.SLOW if slow else found == 1
    finally:
        arithmetic._measured.cache_clear()


def test_only_16_bits_on_a_cpu_are_measured(monkeypatch: Any) -> None:
    monkeypatch.setattr(arithmetic, "_measured", None)
    assert arithmetic.slowdown(torch.float32, CPU) == 1
    assert arithmetic.slowdown(torch.bfloat16, torch.device("cuda")) == 1


# ---- one model -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("emulated")
def test_an_evaluation_computes_the_saved_weights_in_float32(base: Path, task: Path) -> None:
    loaded = models.load(command(base, task), evaluating=True)
    stored = load_model(base).state_dict()
    assert loaded.saved == torch.bfloat16
    assert SLOWER in loaded.notes[-1]
    for name, value in loaded.model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, stored[name].float())


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("changes", "evaluating"), [({"dtype": "bfloat16"}, True), ({}, False)], ids=["asked for", "to be saved"]
)
def test_16_bits_stay_where_they_are_asked_for_or_saved(
    changes: dict[str, str], evaluating: bool, base: Path, task: Path
) -> None:
    loaded = models.load(command(base, task, **changes), evaluating=evaluating)
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.notes


@pytest.mark.usefixtures("native")
def test_16_bits_stay_where_the_cpu_has_them(base: Path, task: Path) -> None:
    loaded = models.load(command(base, task), evaluating=True)
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.notes


@pytest.mark.usefixtures("emulated")
def test_16_bits_stay_where_memory_has_no_room_for_32(base: Path, monkeypatch: Any) -> None:
    model: Any = load_model(base)
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(room, "free", lambda _: needed)
    assert arithmetic.wider(model) is None
    monkeypatch.setattr(room, "free", lambda _: 2 * needed)
    assert arithmetic.wider(model) == 7.0


@pytest.mark.usefixtures("emulated")
def test_a_model_that_was_widened_is_bit_for_bit_what_it_was(base: Path) -> None:
    model: Any = load_model(base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with models.widened(model):
        assert model.dtype == torch.float32
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["eval", "scan"])
def test_commands_that_only_measure_say_that_they_compute_in_float32(
    name: str, base: Path, task: Path, tmp_path: Path, capsys: Any
) -> None:
    words = [name, "--model", str(base), "--task", str(task), "--device", "cpu", "--output", str(tmp_path / "out")]
    assert cli.main(words) == 0
    assert f"computed in float32: this CPU {SLOWER} in bfloat16" in capsys.readouterr().err


@pytest.mark.usefixtures("emulated")
def test_a_cut_keeps_the_dtype_of_the_checkpoint(base: Path, tmp_path: Path) -> None:
    assert cli.main(["drop", "--model", str(base), "--layers", "1", "--output", str(tmp_path / "cut")]) == 0
    assert load_model(tmp_path / "cut").dtype == torch.bfloat16


@pytest.mark.usefixtures("emulated")
def test_a_run_measures_the_saved_weights_in_float32_and_gives_them_as_saved(
    base: Path, task: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    h.fast(monkeypatch)
    model, history = h.run(base, task, tmp_path / "run", dtype="auto")
    assert model.dtype == load_model(tmp_path / "run" / "model").dtype == torch.bfloat16
    wide: Any = load_model(tmp_path / "run" / "model", dtype=torch.float32)
    stored = load_model(tmp_path / "run" / "model").state_dict()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    loaded = models.load(command(base, task))
    settings = config.TrimConfig(**h.settings(base, task, tmp_path / "run"))
    data = inputs.task_data(settings, loaded.tokenizer)
    again = inputs.scorer(settings, wide, loaded.tokenizer, data.test).evaluate(wide, data.metric)
    assert history[-1]["test"]["loss"] == pytest.approx(again.loss, rel=1e-6)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("changes", "option"),
    [({"mixed_precision": "bf16"}, "--mixed-precision bf16"), ({"dtype": "bfloat16"}, "--dtype bfloat16")],
)
def test_training_that_emulation_slows_is_said_by_its_option(
    changes: dict[str, str], option: str, base: Path, task: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    said: list[str] = []
    one = SimpleNamespace(device=CPU, process_index=0, num_processes=1, is_main_process=True)
    monkeypatch.setattr(models, "accelerator", lambda _: one)
    monkeypatch.setattr(progressive.Console, "say", lambda _, line: said.append(line))
    run = progressive.Run(
        config.TrimConfig(**h.settings(base, task, tmp_path / "run", **changes)), progressive.Console()
    )
    run._check_room()
    assert [line for line in said if line.startswith(option) and SLOWER in line]


@pytest.mark.parametrize(("methods", "said"), [(("base", "full"), 1), (("base",), 0)])
@pytest.mark.usefixtures("emulated")
def test_a_comparison_says_so_once_if_it_trains(
    methods: tuple[str, ...], said: int, base: Path, task: Path, tmp_path: Path
) -> None:
    settings = {"model": str(base), "task": str(task), "output": str(tmp_path), "device": "cpu", "methods": methods}
    asked = config.CompareConfig(**settings, mixed_precision="bf16")
    notes = check(asked, cells(asked.methods, asked.keep))
    assert sum(SLOWER in note for note in notes) == said


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("dtype", "said"), [("bfloat16", True), ("float32", False)])
def test_a_bench_says_what_emulation_costs(dtype: str, said: bool, base: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(benching, "measure", lambda *_: ([], {}))
    monkeypatch.setattr(tables, "record", lambda *_: {"models": [{"dtype": "float32"}, {"dtype": dtype}]})
    monkeypatch.setattr(tables, "report", lambda _: "the tables")
    assert cli.main(["bench", str(base), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert (f"{SLOWER} than in float32: prefill is faster with --dtype float32" in out) is said


def test_another_precision_in_the_same_process_is_refused_in_one_line(base: Path, task: Path, tmp_path: Path) -> None:
    Accelerator(cpu=True, mixed_precision="no")
    with pytest.raises(InputError, match=r"an earlier run of this Python process .* than 'bf16'.*: restart Python"):
        h.run(base, task, tmp_path / "run", mixed_precision="bf16")
