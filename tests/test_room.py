"""A model that does not fit into memory is refused, or noted, before a weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers_run as h
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from trimllm import cli
from trimllm.bench import benching
from trimllm.checkpoints import room
from trimllm.checkpoints.loading import load_model
from trimllm.config import BenchConfig, TrimConfig
from trimllm.console import Console
from trimllm.errors import InputError
from trimllm.run import checks, progressive, recording

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return h.save_base(tmp_path_factory.mktemp("base"), depth=3, dtype=torch.bfloat16)


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    monkeypatch.setattr(benching, "_ask", None)


def weights(folder: Path, dtype: torch.dtype | None = None) -> int:
    return sum(p.numel() * p.element_size() for p in load_model(folder, dtype=dtype).parameters())


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_the_estimate_is_what_the_loaded_weights_take(dtype: torch.dtype | None, base: Path) -> None:
    assert room.weights(str(base), dtype) == weights(base, dtype)
    assert room.weights_of_config(str(base / "config.json"), dtype) == weights(base, dtype)


def test_an_adapter_counts_its_base_and_quantized_weights_as_they_are(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert room.weights(str(tmp_path / "adapter"), torch.float32) == weights(base, torch.float32)
    from safetensors.torch import save_file

    (tmp_path / "int8").mkdir()
    save_file({"a": torch.zeros(8, dtype=torch.int8), "b": torch.zeros(4)}, tmp_path / "int8" / "model.safetensors")
    assert room.weights(str(tmp_path / "int8"), torch.float32) == 8 + 16


def test_a_model_for_another_device_is_loaded_there_without_a_copy_in_main_memory(base: Path, monkeypatch: Any) -> None:
    asked: dict[str, Any] = {}
    load = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: asked.update(k) or load(*a, **k))
    elsewhere: Any = load_model(base, device="meta")
    assert asked["device_map"] == {"": torch.device("meta")}
    assert {parameter.device.type for parameter in elsewhere.parameters()} == {"meta"}
    load_model(base, device="cpu")
    assert asked["device_map"] is None


def test_where_nothing_is_known_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    (tmp_path / "config.json").write_text("{}")
    for name in (str(tmp_path), str(tmp_path / "none")):
        assert room.weights(name, None) is None
    assert room.weights_of_config(str(tmp_path / "config.json"), None) is None
    room.check("x", None, CPU, "remedy")
    assert room.free_bytes(torch.device("meta")) is None


NO_LIMIT = "9223372036854771712\n"


@pytest.mark.parametrize("inner", ["", "system.slice/job", "system.slice"])
@pytest.mark.parametrize(
    ("own", "folder", "limit_file", "used_file", "cached", "none"),
    [
        ("0::/", "", "memory.max", "memory.current", "inactive_file", "max\n"),
        ("4:cpu,memory:/", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", NO_LIMIT),
    ],
    ids=["version 2", "version 1"],
)
def test_what_is_free_is_that_of_the_machine_or_of_its_container(
    tmp_path: Path,
    monkeypatch: Any,
    inner: str,
    own: str,
    folder: str,
    limit_file: str,
    used_file: str,
    cached: str,
    none: str,
) -> None:
    """Or of a job's control group, or of one around it."""
    (tmp_path / "own").write_text(f"9:pids:/elsewhere\n{own}system.slice/job\n")
    monkeypatch.setattr(room, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(room, "_CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    monkeypatch.setattr(psutil, "swap_memory", lambda: SimpleNamespace(free=200))
    assert room.free_bytes(CPU) == 1200
    place = tmp_path / folder / inner
    place.mkdir(parents=True, exist_ok=True)
    (place / used_file).write_text("700\n")
    (place / "memory.stat").write_text(f"anon 500\ninactive_file 15\n{cached} 150\n")
    for limit, expected in ((none, 1200), ("800\n", 250), ("9000\n", 1200), ("100\n", 1)):
        (place / limit_file).write_text(limit)
        assert room.free_bytes(CPU) == expected
    monkeypatch.setattr(room, "_OWN_GROUPS", tmp_path / "none")
    assert room.free_bytes(CPU) == (1200 if inner else 1)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_bench_of_a_shape_larger_than_any_memory_is_refused_by_its_name(
    base: Path, tmp_path: Path, capsys: Any
) -> None:
    huge = {
        "hidden_size": 2**20,
        "intermediate_size": 2**22,
        "num_attention_heads": 2**13,
        "num_key_value_heads": 2**13,
    }
    values = json.loads((base / "config.json").read_text()) | huge | {"head_dim": 128}
    (tmp_path / "huge.json").write_text(json.dumps(values))
    said = h.line(capsys, "bench", str(base), f"config:{tmp_path / 'huge.json'}", "--device", "cpu")
    assert f"config:{tmp_path / 'huge.json'} beside {base}: the weights alone take 1" in said
    assert " GB are free on cpu: measure fewer or smaller models, or give a narrower --dtype" in said


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize(("models", "copies"), [(1, 0.9), (2, 1.9)])
def test_a_bench_of_directories_larger_than_memory_is_refused(
    models: int, copies: float, base: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(room, "free_bytes", lambda _: int(copies * weights_once))
    weights_once = room.weights(str(base), None)
    said = h.line(capsys, "bench", *[str(base)] * models, "--device", "cpu")
    assert said.startswith(f"trimllm: {base}")
    assert "the weights alone take" in said


def test_a_bench_that_fits_is_let_through(base: Path) -> None:
    benching._check(BenchConfig(models=(str(base), f"config:{base / 'config.json'}"), device="cpu"))


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.parametrize("command", ["trim", "scan", "eval", "drop"])
def test_weights_larger_than_memory_are_refused(
    command: str, base: Path, task: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    needed = room.weights(str(base), torch.float32 if command == "trim" else None)
    assert needed is not None
    monkeypatch.setattr(room, "free_bytes", lambda _: needed - 1)
    given = ["--layers", "1"] if command == "drop" else ["--task", str(task)]
    output = [] if command == "eval" else ["--output", str(tmp_path / "out")]
    assert cli.main([command, "--model", str(base), *given, *output, "--device", "cpu"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"--model {base}: the weights alone take 0.0 GB, and 0.0 GB are free on cpu: free memory, or give" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_speed_target_needs_room_for_two_models_when_a_run_begins(
    base: Path, task: Path, tmp_path: Path, monkeypatch: Any, resume: bool
) -> None:
    """Also with --resume, as queues start a job for the first time."""
    monkeypatch.setattr(room, "free_bytes", lambda _: int(1.5 * weights(base, torch.float32)))
    asked = TrimConfig(**h.settings(base, task, tmp_path / "run", target_speedup=1.5, resume=resume))
    with pytest.raises(InputError, match=r"^--target-speedup 1\.5 measures the base beside the model"):
        progressive.trim(asked, console=Console(quiet=True))
    assert not [note for note in checks.memory(asked, torch.device("cpu"), measured=True) if "speedup" in note], (
        "it has fitted by then"
    )


def test_a_run_with_a_speed_target_that_goes_on_has_fitted(
    base: Path, task: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    h.fast(monkeypatch)
    h.killed_run((recording.Recorder, "record", 3), base, task, tmp_path / "run", target_speedup=1.2)
    monkeypatch.setattr(room, "free_bytes", lambda *_, **__: int(1.5 * weights(base, torch.float32)))
    h.run(base, task, tmp_path / "run", target_speedup=1.2, resume=True)
    assert h.result(tmp_path / "run")["drops"][-1]["ended_by"] == "target_speedup"


@pytest.mark.parametrize(
    ("share", "changes", "noted"),
    [
        (3.9, {}, True),
        (4.1, {}, False),
        (0.9, {}, False),
        (3.9, {"warmup_epochs": 0}, False),
        (3.9, {"warmup_epochs": 0, "sparse_update": "off"}, True),
    ],
)
def test_a_run_whose_full_fine_tuning_cannot_fit_is_told_before_it_loads(
    share: float, changes: dict[str, Any], noted: bool, base: Path, task: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    needed = weights(base, torch.float32)
    monkeypatch.setattr(room, "free_bytes", lambda _: int(share * needed))
    said: list[str] = []

    def load(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt  # it has gone on: the note is no error

    monkeypatch.setattr(progressive, "load", load)
    monkeypatch.setattr(Console, "say", lambda _, text: said.append(text))
    settings = TrimConfig(**h.settings(base, task, tmp_path / "run", **{"warmup_epochs": 1} | changes))
    with pytest.raises(KeyboardInterrupt):
        progressive.trim(settings, console=Console())
    assert [("full fine-tuning takes" in text) for text in said] == [True] * noted
    for text in said:
        assert text.index("--warmup-epochs 0, --no-train-embeddings and a small --train-ratio") < text.index("bfloat16")
