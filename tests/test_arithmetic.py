"""A CPU that emulates 16 bits computes in float32 where nothing is saved; where 16 bits are asked for, it says so."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import helpers_run as h
import pytest
import tiny
import torch
from accelerate import Accelerator

from trimllm import cli, config
from trimllm.baselines import METHODS, Cell, cell, cells
from trimllm.baselines.job import Job, Product
from trimllm.bench import benching, tables, timing
from trimllm.checkpoints import arithmetic, models, room
from trimllm.checkpoints.loading import load_model
from trimllm.compare import check
from trimllm.config import TrimConfig
from trimllm.errors import InputError
from trimllm.evaluation import inputs
from trimllm.run import checks, progressive

CPU = torch.device("cpu")
SLOWER = "multiplies matrices 7 times slower"
EMULATED = f"this CPU emulates bfloat16, and {SLOWER} than in float32"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return h.save_base(tmp_path_factory.mktemp("base"), depth=4, dtype=torch.bfloat16)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_measured", lambda _: 7.0)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arithmetic, "_measured", lambda _: 0.6)


def command(base: Path, task: Path, **changes: Any) -> config.EvalConfig:
    return config.EvalConfig(model=str(base), task=str(task), device="cpu", **changes)


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
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        found = arithmetic.slowdown(torch.bfloat16, CPU)
        assert torch.get_num_threads() == threads + 1
        assert found > arithmetic.SLOW if slow else found == 1
    finally:
        torch.set_num_threads(threads)
        arithmetic._measured.cache_clear()


def test_only_16_bits_on_a_cpu_are_measured(monkeypatch: Any) -> None:
    monkeypatch.setattr(arithmetic, "_measured", None)
    assert arithmetic.slowdown(torch.float32, CPU) == 1
    assert arithmetic.slowdown(torch.bfloat16, torch.device("cuda")) == 1


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
    ("changes", "evaluating", "notes"),
    [
        ({"dtype": "bfloat16"}, True, [f"--dtype bfloat16: {EMULATED}: leave it out where memory allows"]),
        ({}, False, []),
    ],
    ids=["asked for", "to be saved"],
)
def test_16_bits_stay_where_they_are_asked_for_or_saved(
    changes: dict[str, str], evaluating: bool, notes: list[str], base: Path, task: Path
) -> None:
    loaded = models.load(command(base, task, **changes), evaluating=evaluating)
    assert loaded.model.dtype == torch.bfloat16
    assert list(loaded.notes) == notes


@pytest.mark.usefixtures("native")
def test_16_bits_stay_where_the_cpu_has_them(base: Path, task: Path) -> None:
    loaded = models.load(command(base, task), evaluating=True)
    assert loaded.model.dtype == torch.bfloat16
    assert not loaded.notes


@pytest.mark.usefixtures("emulated")
def test_16_bits_stay_where_memory_has_no_room_for_32(base: Path, monkeypatch: Any) -> None:
    model: Any = load_model(base)
    needed = 4 * sum(parameter.numel() for parameter in model.parameters())
    have = [needed]
    monkeypatch.setattr(room, "free_bytes", lambda _, swap: pytest.fail("swap is no room") if swap else have[0])
    assert arithmetic.reason_for_float32(model, "auto") is None
    have = [2 * needed]
    assert arithmetic.reason_for_float32(model, "auto") == f"computed in float32: {EMULATED}"
    assert arithmetic.reason_for_float32(model, "auto", copies=2) is None
    model.is_quantized = True
    assert arithmetic.reason_for_float32(model, "auto") is None


MIXED = [
    ("llama", torch.bfloat16),
    ("deepseek_v3", torch.bfloat16),
    ("ernie4_5_moe", torch.bfloat16),
    ("gpt_oss", torch.float16),
]


def loaded_as(family: str, dtype: torch.dtype, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A tiny model of the family, saved in float32 and loaded in a dtype, which some classes do not take everywhere."""
    tiny.build(family, 3).save_pretrained(folder)
    model: Any = load_model(folder, dtype=dtype)
    return model, {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("family", "dtype"), MIXED)
def test_a_model_that_was_widened_is_bit_for_bit_what_it_was(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, before = loaded_as(family, dtype, tmp_path)
    assert (len({value.dtype for value in before.values()}) > 1) is (family != "llama")
    with models.widened(model):
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(("family", "dtype"), MIXED)
def test_a_cast_model_is_in_the_dtypes_that_loading_gives(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _, wanted = loaded_as(family, dtype, tmp_path)
    found = models.cast(load_model(tmp_path, dtype=torch.float32), dtype).state_dict()
    assert {name: value.dtype for name, value in found.items()} == {name: one.dtype for name, one in wanted.items()}
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", ["eval", "scan"])
def test_commands_that_only_measure_say_that_they_compute_in_float32(
    name: str, base: Path, task: Path, tmp_path: Path, capsys: Any
) -> None:
    words = [name, "--model", str(base), "--task", str(task), "--device", "cpu", "--output", str(tmp_path / "out")]
    assert cli.main(words) == 0
    assert f"computed in float32: {EMULATED}" in capsys.readouterr().err


@pytest.mark.usefixtures("emulated")
def test_a_cut_keeps_the_dtype_of_the_checkpoint(base: Path, tmp_path: Path) -> None:
    assert cli.main(["drop", "--model", str(base), "--layers", "1", "--output", str(tmp_path / "cut")]) == 0
    assert load_model(tmp_path / "cut").dtype == torch.bfloat16


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_run_measures_the_saved_weights_in_float32_and_gives_them_as_saved(
    dtype: str, base: Path, task: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    h.fast(monkeypatch)
    timed, speeds = [], timing.decode_speed
    monkeypatch.setattr(timing, "decode_speed", lambda given, **more: timed.append(given) or speeds(given, **more))
    said: list[str] = []
    monkeypatch.setattr(progressive.Console, "say", lambda _, line: said.append(line))
    model, history = h.run(base, task, tmp_path / "run", dtype=dtype)
    assert [row["test"]["dtype"] for row in history if row.get("test")] == ["float32"] * 2
    assert sum(SLOWER in line for line in said) == 1
    assert [one["now"].dtype for one in timed if "now" in one][-1] == torch.bfloat16
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
def test_a_run_that_was_asked_for_16_bits_is_measured_in_them(
    base: Path, task: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    h.fast(monkeypatch)
    _, history = h.run(base, task, tmp_path / "run", dtype="bfloat16")
    assert {row["test"]["dtype"] for row in history if row.get("test")} == {"bfloat16"}


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("changes", "option"),
    [({"mixed_precision": "bf16"}, "--mixed-precision bf16"), ({"dtype": "bfloat16"}, "--dtype bfloat16")],
)
def test_training_that_emulation_slows_is_said_by_its_option(
    changes: dict[str, str], option: str, base: Path, task: Path, tmp_path: Path
) -> None:
    said = checks.memory(config.TrimConfig(**h.settings(base, task, tmp_path / "run", **changes)), CPU)
    assert [line for line in said if line.startswith(f"{option}: {EMULATED}: leave it out")]
    assert not [line for line in said if "with --mixed-precision bf16" in line], "no remedy here"


FLOAT32 = f"accuracies are computed in float32, where memory has room: {EMULATED}"
MIXED_BF16 = f"--mixed-precision bf16: {EMULATED}: leave it out"
BF16 = f"--dtype bfloat16: {EMULATED}: leave it out where memory allows"


@pytest.mark.parametrize(
    ("methods", "changes", "said"),
    [
        ("base,full", {}, [FLOAT32]),
        ("base,full", {"mixed_precision": "bf16"}, [FLOAT32, MIXED_BF16]),
        ("base", {"mixed_precision": "bf16"}, [FLOAT32]),
        ("base,full", {"dtype": "bfloat16"}, [BF16]),
        ("base,full", {"dtype": "float32"}, []),
    ],
)
@pytest.mark.usefixtures("emulated")
def test_a_comparison_says_before_it_starts_what_is_computed_in_which_dtype(
    methods: str, changes: dict[str, str], said: list[str], base: Path, task: Path, tmp_path: Path
) -> None:
    asked = compare_config(base, task, tmp_path, methods=methods.split(","), **changes)
    assert [note for note in check(asked, cells(asked.methods, asked.keep)).notes if SLOWER in note] == said


def compare_config(base: Path, task: Path, output: Path, **changes: Any) -> config.CompareConfig:
    return config.CompareConfig(model=str(base), task=str(task), output=str(output), device="cpu", **changes)


@pytest.mark.usefixtures("emulated")
def test_a_row_of_a_comparison_names_the_dtype_that_its_accuracies_were_computed_in(
    base: Path, task: Path, tmp_path: Path
) -> None:
    asked = compare_config(base, task, tmp_path, methods=("base",))
    row = cell.evaluate(Job(asked, Cell(METHODS["base"], None), tmp_path), Product(base))
    assert [one["dtype"] for one in row["accuracy"].values()] == ["float32"]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("dtype", "quantized", "slowdown"), [("bfloat16", False, 7), ("bfloat16", True, 1), ("float32", False, 1)]
)
def test_a_bench_knows_what_emulation_costs_a_model(
    dtype: str, quantized: bool, slowdown: float, base: Path, monkeypatch: Any
) -> None:
    model: Any = load_model(base, dtype=getattr(torch, dtype))
    model.is_quantized = quantized
    monkeypatch.setattr(benching.loading, "load_model", lambda *_, **__: model)
    monkeypatch.setattr(benching, "_HERE", {})
    asked = config.BenchConfig(models=(str(base),), device="cpu", sequence=16, new_tokens=4)
    assert benching.load(str(base), asked)["slowdown"] == slowdown


def test_a_bench_says_what_emulation_costs(base: Path, capsys: Any, monkeypatch: Any) -> None:
    known = [{"model": name, "dtype": dtype, "slowdown": times} for name, dtype, times in KNOWN]
    monkeypatch.setattr(benching, "measure", lambda *_: ([], {}))
    monkeypatch.setattr(tables, "record", lambda *_: {"models": known})
    monkeypatch.setattr(tables, "report", lambda _: "the tables")
    assert cli.main(["bench", str(base), "--device", "cpu"]) == 0
    assert f"two, three: {EMULATED}: prefill is faster with --dtype float32" in capsys.readouterr().err
    assert arithmetic.bench_note(known[:1]) is None


KNOWN = [("one", "float32", 1.0), ("two", "bfloat16", 6.0), ("three", "bfloat16", 7.0)]


@pytest.mark.parametrize(("own", "mixed"), [(True, "bf16"), (False, "no")])
def test_a_gpu_that_would_emulate_bfloat16_trains_without(own: bool, mixed: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(models, "training_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: own or including_emulation)
    monkeypatch.setattr("accelerate.Accelerator", lambda **asked: asked)
    settings = TrimConfig(model="demo", task="demo_law", output="x")
    made = models.accelerator(settings)
    (patience,) = made.pop("kwargs_handlers")
    assert patience.timeout.days == 1
    assert made == {"cpu": False, "mixed_precision": mixed}
    asked = settings.model_copy(update={"mixed_precision": "bf16"})
    assert models.accelerator(asked)["mixed_precision"] == "bf16"


def test_another_precision_in_the_same_process_is_refused_in_one_line(base: Path, task: Path, tmp_path: Path) -> None:
    Accelerator(cpu=True, mixed_precision="no")
    with pytest.raises(
        InputError, match=r"--device cpu and --mixed-precision bf16: an earlier run .* had others.*: restart Python"
    ):
        h.run(base, task, tmp_path / "run", mixed_precision="bf16")
