"""`--attention`: backends give the same losses, nothing that is saved depends on them, what cannot be is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers_run as h
import pytest
import tiny
import torch
from accelerate import Accelerator
from transformers import AttentionInterface

from trimllm import cli
from trimllm.bench import benching, shapes
from trimllm.blocks.layout import whole, without
from trimllm.blocks.legality import refusal
from trimllm.checkpoints import backends, models
from trimllm.checkpoints.loading import load_model
from trimllm.config import BenchConfig, EvalConfig, TrainSettings
from trimllm.errors import InputError
from trimllm.training import losses as losses_of
from trimllm.training import packing, step, train, training_rows
from trimllm.training.packing import Example

pytestmark = pytest.mark.usefixtures("fast")

CPU = torch.device("cpu")
SMALL = {"depth": 2, "calibration_size": 4, "max_train": 8, "max_test": 4}
FAMILIES = ("llama", "qwen2-sliding", "gemma3_text", "gpt2", "mixtral", "gemma3", "mpt", "gpt_oss", "jamba")
EAGER_ONLY = ("mpt", "gpt_oss")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return h.save_base(tmp_path_factory.mktemp("base"), depth=3)


def rows() -> list[Example]:
    """Rows of 4 to 14 inputs, longer than the windows."""
    generator = torch.Generator().manual_seed(1)
    return [Example(tuple(torch.randint(3, 60, (n,), generator=generator).tolist()), 2) for n in (5, 15, 8, 9, 12, 6)]


def losses(model: Any) -> torch.Tensor:
    """Log-probabilities of rows one by one, and packed as this model can take them."""
    way = packing.find_way(model, rows(), 0)[0]
    with torch.no_grad():
        alone = [packing._logprobs(model, packing.lay_out([[row]], 0, CPU)) for row in rows()]
        packed = packing.pack(rows(), way, 0)
        order = [example for example, _, _ in packed.spans]
        found = dict(zip(order, packing._logprobs(model, packed).split([row.targets for row in order]), strict=True))
    together = [found[row] for row in rows()]
    return torch.cat([*alone, *together])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_backend_that_a_family_takes_gives_the_losses_of_eager(family: str, tmp_path: Path) -> None:
    tiny.build(family).save_pretrained(tmp_path)
    expected = losses(load_model(tmp_path, attention="eager"))
    if family in EAGER_ONLY:
        with pytest.raises(InputError, match=f"--attention sdpa: model '{tmp_path}' cannot compute with it"):
            load_model(tmp_path, attention="sdpa")
        return
    model = load_model(tmp_path, attention="sdpa")
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    assert (losses(model) - expected).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_flex_attention_evaluates_as_eager_does(tmp_path: Path) -> None:
    tiny.build("llama", depth=2).save_pretrained(tmp_path)
    eager, flex = (load_model(tmp_path, attention=name) for name in ("eager", "flex_attention"))
    packed = packing.lay_out([rows()[:2]], 0, CPU)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiling its kernel takes a minute
        backends.probe(flex, "flex_attention")
        assert (packing.target_logits(flex, packed) - packing.target_logits(eager, packed)).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_gradients_of_a_stage_are_those_of_the_default(family: str, tmp_path: Path) -> None:
    tiny.build(family).save_pretrained(tmp_path)
    found = []
    for name in ("auto", "eager"):
        model = load_model(tmp_path, attention=name)
        settings = TrainSettings(lr=1e-3, batch_size=64, text_ratio=0)
        plan = training_rows.steps(rows(), [], settings, 2, seed=0)
        report = train.train_stage(model, list(model.parameters()), plan, settings, Accelerator(cpu=True))
        found.append((report.loss, torch.cat([p.detach().flatten() for p in model.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)
    assert (found[0][1] - found[1][1]).abs().mean() < 1e-5


@pytest.mark.parametrize("family", ["llama", "falcon", "gpt2", "gemma3", "jamba"])
def test_what_may_be_cut_does_not_depend_on_it(family: str, tmp_path: Path) -> None:
    tiny.build(family).save_pretrained(tmp_path)
    cut = without(whole(6), [4])
    one, other = (refusal(load_model(tmp_path, attention=name), cut) for name in ("auto", "eager"))
    assert one == other


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Backends that a Llama asked for in a forward pass."""
    found: set[str] = set()
    plain = AttentionInterface.get_interface

    def asked(self: Any, name: str, default: Any) -> Any:
        found.add(name)
        return plain(self, name, default)

    monkeypatch.setattr(AttentionInterface, "get_interface", asked)
    return found


@pytest.mark.parametrize(("name", "expected"), [("auto", "sdpa"), ("eager", "eager")])
def test_it_reaches_every_model_of_a_run(
    name: str, expected: str, base: Path, task: Path, tmp_path: Path, used: set[str], monkeypatch: Any
) -> None:
    def speeds(models: dict[str, Any], **_: Any) -> dict[str, list[float]]:
        used.update(model.config._attn_implementation for model in models.values())
        return {each: [1.0] for each in models}

    monkeypatch.setattr("trimllm.bench.timing.decode_speed", speeds)
    model, _ = h.run(base, task, tmp_path / "run", attention=name, **SMALL)
    assert used == {expected}
    assert model.config._attn_implementation == expected
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert not [key for key in config if "attn_impl" in key or "attention_impl" in key]


def test_a_run_goes_on_with_another_one(base: Path, task: Path, tmp_path: Path) -> None:
    h.run(base, task, tmp_path / "run", **SMALL)
    again = h.run(base, task, tmp_path / "run", **SMALL, attention="eager", resume=True)
    assert again[0].config._attn_implementation == "eager"


def test_it_reaches_scan_eval_and_drop(base: Path, task: Path, tmp_path: Path, used: set[str], capsys: Any) -> None:
    given = ["--model", str(base), "--device", "cpu", "--attention", "eager"]
    data = ["--task", str(task)]
    for words in (
        ["eval", *given, *data],
        ["scan", *given, *data, "--calibration-size", "4", "--output", str(tmp_path / "scan")],
        ["drop", *given, "--layers", "1", "--output", str(tmp_path / "cut")],
    ):
        used.clear()
        assert cli.main(words) == 0, capsys.readouterr().err
        assert used == {"eager"}
    plain = ["drop", "--model", str(base), "--device", "cpu", "--layers", "1", "--output", str(tmp_path / "plain")]
    assert cli.main(plain) == 0
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()


def test_it_reaches_the_models_of_a_bench(base: Path, tmp_path: Path) -> None:
    file = base / "config.json"
    for name in (str(base), f"config:{file}"):
        command = BenchConfig(models=(name,), sequence=16, new_tokens=4, device="cpu", attention="eager")
        benching.load(name, command)
        assert benching._HERE.pop("model").config._attn_implementation == "eager"


def test_it_reaches_an_adapters_base(base: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(load_model(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert load_model(tmp_path, attention="eager").config._attn_implementation == "eager"


REFUSED = {
    "flashy": r"--attention flashy: transformers \S+ does not know it: use auto, eager, .*flex_attention.*, sdpa$",
    "paged|eager": r"--attention paged\|eager: transformers \S+ does not know it",
    "flash_attention_2": r"--attention flash_attention_2: it computes on a GPU, and the device is cpu: leave",
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("command", ["trim", "scan", "eval", "drop", "bench", "bench config"])
def test_what_no_model_can_take_is_refused_before_any_is_read(
    command: str, name: str, base: Path, task: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(benching, "ProcessPoolExecutor", None)  # nor does any process start
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", None)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", None)
    out = str(tmp_path / "out")
    words = {
        "trim": ["trim", "--model", str(base), "--task", str(task), "--output", out],
        "scan": ["scan", "--model", str(base), "--task", str(task), "--output", out],
        "eval": ["eval", "--model", str(base), "--task", str(task)],
        "drop": ["drop", "--model", str(base), "--layers", "1", "--output", out],
        "bench": ["bench", str(base)],
        "bench config": ["bench", f"config:{base / 'config.json'}"],
    }[command]
    said = h.line(capsys, *words, "--device", "cpu", "--attention", name).strip()
    assert re.search(REFUSED[name], said), said
    assert not (tmp_path / "out").exists()


def test_a_backend_without_its_package_is_refused_before_weights_are_read(base: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("transformers.modeling_utils.load_state_dict", None)
    message = "--attention flash_attention_2: model .* cannot compute with it \\(.*package.*\\): leave"
    with pytest.raises(InputError, match=message) as caught:
        load_model(base, attention="flash_attention_2", device="cuda", dtype=torch.bfloat16)
    assert "\n" not in str(caught.value)
    file = base / "config.json"
    with pytest.raises(InputError, match=r"--attention flash_attention_2: model 'config:.*package"):
        shapes.random_model(file, dtype=torch.bfloat16, device=torch.device("meta"), attention="flash_attention_2")


@pytest.mark.parametrize(("dtype", "refused"), [(torch.float32, True), (torch.bfloat16, False), (None, False)])
def test_flash_attention_is_for_16_bits(dtype: torch.dtype | None, refused: bool) -> None:
    if refused:
        with pytest.raises(InputError, match="the weights are float32: add --dtype bfloat16"):
            backends.check("flash_attention_2", torch.device("cuda"), dtype)
    else:
        backends.check("flash_attention_2", torch.device("cuda"), dtype)


def test_flex_attention_is_not_for_training_on_a_cpu(base: Path, task: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["--model", str(base), "--task", str(task), "--device", "cpu", "--attention", "flex_attention"]
    said = h.line(capsys, "trim", *given, "--output", str(tmp_path / "out"))
    assert "--attention flex_attention: torch has no backward pass of it on the device cpu: leave" in said
    backends.check("flex_attention", CPU, torch.float32)
    backends.check("flex_attention", torch.device("cuda"), torch.float32, training=True)


def test_a_backend_that_fails_on_the_model_is_one_line(base: Path, task: Path, monkeypatch: Any) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no kernel\nfor this")

    monkeypatch.setitem(AttentionInterface._global_mapping, "broken", broken)
    with pytest.raises(InputError, match=r"--attention broken: the model cannot compute with it on cpu .no kernel for"):
        models.load(EvalConfig(model=str(base), task=str(task), device="cpu", attention="broken"))
    with pytest.raises(InputError, match="--attention broken"):
        benching.load(str(base), BenchConfig(models=(str(base),), sequence=16, new_tokens=4, attention="broken"))


def test_the_trial_of_a_model_that_will_train_includes_the_backward_pass(base: Path, monkeypatch: Any) -> None:
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(_: Any, query: torch.Tensor) -> torch.Tensor:
            return query.transpose(1, 2).clone()

        @staticmethod
        def backward(*_: Any) -> Any:
            raise NotImplementedError("no backward")

    def forward_only(_m: Any, query: torch.Tensor, *_: Any, **__: Any) -> Any:
        return Forward.apply(query), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "forward_only", forward_only)
    model = load_model(base, attention="forward_only")
    backends.probe(model, "forward_only")
    with pytest.raises(InputError, match="no backward"):
        backends.probe(model, "forward_only", training=True)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_errors_that_are_not_about_attention_keep_their_own_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no such folder"):
        load_model(tmp_path / "none", attention="eager")
    assert backends.refusal("sdpa", "m", OSError("disk")) is None


@pytest.fixture
def mixed() -> Any:
    """An accelerator that computes in bf16 on the CPU."""
    plain = Accelerator(cpu=True)
    return SimpleNamespace(
        device=CPU,
        mixed_precision="bf16",
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
        reduce=plain.reduce,
        distributed_type=plain.distributed_type,
        num_processes=1,
        process_index=0,
    )


def seen_lengths(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Backend and row length of every micro-batch that is trained."""
    found: list[tuple[str, int]] = []
    plain = losses_of.backward

    def backward(model: Any, packed: Any, *rest: Any) -> Any:
        found.append((model.config._attn_implementation, packed.inputs["input_ids"].shape[1]))
        return plain(model, packed, *rest)

    monkeypatch.setattr(losses_of, "backward", backward)
    return found


def test_auto_trains_short_rows_with_eager_on_a_cpu_in_bf16_only(mixed: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(backends, "EAGER_LENGTH", 10)
    seen = seen_lengths(monkeypatch)
    plan = [[row] for row in rows()]
    settings = TrainSettings(lr=1e-4)
    model = tiny.build("llama", 2)
    train.train_stage(model, list(model.parameters()), plan, settings, mixed)
    assert {length for name, length in seen if name == "eager"} == {4, 7, 8, 5}
    assert {length for name, length in seen if name == "sdpa"} == {14, 11}
    assert model.config._attn_implementation == "sdpa", "evaluations after the stage take SDPA again"
    for change, given in (
        ({"mixed_precision": "no"}, {}),
        ({"device": torch.device("meta")}, {}),
        ({}, {"attention": "sdpa"}),
    ):
        for name, value in change.items():
            monkeypatch.setattr(mixed, name, value)
        assert backends.eager_length(model, given.get("attention", "auto"), mixed) == 0
        mixed.mixed_precision, mixed.device = "bf16", CPU
    for family in ("mpt", "gpt_oss", "gemma3"):
        assert backends.eager_length(tiny.build(family), "auto", mixed) == 0


def test_short_rows_keep_their_backend_where_another_one_would_pack_them_otherwise(
    mixed: Any, monkeypatch: Any
) -> None:
    model, plan, length = tiny.build("llama", 2), [rows()], backends.EAGER_LENGTH
    ways = {"sdpa": packing.Way(64), "eager": packing.Way(64)}
    monkeypatch.setattr(packing, "find_way", lambda one, *_: (ways[one.config._attn_implementation], None))

    def eager() -> int:
        return step.stepper(model, plan, TrainSettings(), mixed, step.PLAIN).eager

    assert eager() == length > 0
    ways["eager"] = packing.ALONE
    assert eager() == 0


def test_logits_are_tried_on_a_row_of_few_targets_but_more_than_one(mixed: Any, monkeypatch: Any) -> None:
    tried = []
    monkeypatch.setattr(losses_of, "places_at_once", lambda model, packed: tried.append(len(packed.targets)) or 1)
    ids = tuple(range(3, 13))
    step._places([tiny.build("llama", 1)], [[Example(ids, start) for start in (1, 9, 8, 5)]], mixed, 0)
    assert tried == [2]


def test_where_memory_ends_rows_go_back_to_sdpa_before_micro_batches_are_halved(mixed: Any, monkeypatch: Any) -> None:
    seen, said = seen_lengths(monkeypatch), []
    counted = losses_of.backward

    def small(model: Any, *rest: Any) -> Any:
        loss = counted(model, *rest)
        if seen[-1][0] == "eager":
            raise torch.OutOfMemoryError("no memory")
        return loss

    monkeypatch.setattr(losses_of, "backward", small)
    model, twin = tiny.build("llama", 2), tiny.build("llama", 2)
    for net, given in ((model, {}), (twin, {"attention": "sdpa"})):
        settings = TrainSettings(lr=1e-3, batch_size=500)
        train.train_stage(
            net, list(net.parameters()), [rows()] * 2, settings, mixed, step.Means(say=said.append, **given)
        )
    assert [name for name, _ in seen] == ["eager", "sdpa", "sdpa", "sdpa", "sdpa"]
    assert said == ["  out of memory: short rows are computed with SDPA, too, from here on"]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
