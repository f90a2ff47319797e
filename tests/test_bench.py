"""`trimllm bench`: bytes read and cache sizes against sums by hand, kinds of cache against each other, the command."""

import functools
import json
import os
import re
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from tiny import SHAPE, build
from torch.testing._internal.two_tensor import TwoTensor
from transformers import BitsAndBytesConfig
from transformers.quantizers import quantizer_bnb_8bit

from trimllm import cli, commands, config, plot
from trimllm.bench import benching, reads, shapes, tables, timing
from trimllm.checkpoints import models
from trimllm.errors import InputError, TrimError
from trimllm.startup import Terminated


def bytes_of(model):
    """Parameters, each once, and the frequencies of RoPE."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()) if t.dim() != 0)


def shape(folder, **changes):
    """A config on disk, as the command takes it."""
    path = folder / f"shape-{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(SHAPE | changes))
    return f"config:{path}"


@pytest.mark.parametrize("batch", [1, 2])
def test_an_untied_embedding_is_read_by_the_row_and_everything_else_whole(batch):
    model = build("llama")
    table = model.get_input_embeddings().weight
    rows = timing.random_ids(model, batch, 20)[:, -1].unique().numel()
    found = reads.footprint(model, batch=batch, sequence=20)
    inverse_frequencies = 4 * model.config.head_dim // 2
    buffers = sum(4 * b.numel() for b in model.buffers())
    assert found.weights == bytes_of(model) - buffers + inverse_frequencies - table.nbytes + rows * table[0].nbytes


def test_a_tied_embedding_is_the_head_and_read_whole():
    model = build("llama-tied")
    parameters = sum(p.nbytes for p in model.parameters())
    assert reads.footprint(model, batch=1, sequence=8).weights == parameters + 4 * model.config.head_dim // 2


def test_of_a_mixture_only_the_chosen_experts_are_read():
    model = build("mixtral")
    experts = [p for name, p in model.named_parameters() if "experts" in name]
    assert all(p.shape[0] == 4 for p in experts)
    dense = sum(p.nbytes for p in model.parameters()) - sum(p.nbytes for p in experts)
    table = model.get_input_embeddings().weight
    wanted = dense - table.nbytes + table[0].nbytes + sum(p.nbytes for p in experts) // 2 + 4 * 8 // 2
    assert reads.footprint(model, batch=1, sequence=8).weights == wanted


class Int8Linear(torch.nn.Module):
    """Weights as quantizers keep them: integers and scales in buffers, widened at every step."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.packed.to(x.dtype) * self.scale).t()


def test_weights_in_int8_count_as_they_are_stored():
    model = build("llama")
    before = reads.footprint(model, batch=1, sequence=8).weights
    less = 0
    for block in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(block.mlp, name)
            setattr(block.mlp, name, Int8Linear(linear))
            less += 3 * linear.weight.numel() - 4 * linear.weight.shape[0]
    assert reads.footprint(model, batch=1, sequence=8).weights == before - less


def test_of_a_tensor_made_of_others_these_are_what_is_read():
    one, other = torch.randn(6, 8), torch.randn(6, 8)
    with torch.inference_mode(), reads._Watch([]) as watch:
        TwoTensor(one, other).t().clone()
    assert sorted(watch.bytes_by_storage().values()) == [one.nbytes, other.nbytes]


def test_a_weight_and_its_transpose_are_one_read_and_two_halves_are_two():
    weight = torch.randn(6, 8)
    with reads._Watch([]) as watch:
        (weight.t() @ weight).sum()
        weight[:3].clone()
    assert watch.bytes_by_storage() == {weight.untyped_storage().data_ptr(): weight.nbytes}
    with reads._Watch([]) as watch:
        weight[:, :4].clone()
        weight[:, :4].t().clone()
        weight[:2, 4:].clone()
        weight.view(-1).expand(5, 48)
    assert watch.bytes_by_storage() == {weight.untyped_storage().data_ptr(): 4 * (24 + 8)}


@pytest.mark.parametrize(
    ("family", "growth", "size"),
    [
        ("llama", 6 * 128, 6 * 128 * 24),
        ("gemma3_text", 4 * 128, 4 * 128 * 24 + 2 * 128 * 3),  # windows of 4 keep 3
        ("mistral", 0, 6 * 128 * 3),
        ("deepseek_v3", 6 * 4 * (16 + 4), 6 * 4 * (16 + 4) * 24),  # the compressed keys and values
        ("qwen3_5_text", 2 * 128, None),
        ("mamba", 0, 6 * 4 * 64 * (16 - 16 + 8 + 4)),  # states of 8 and convolutions of 4 per channel
    ],
)
def test_cache_is_measured_on_the_object_whatever_the_layers_are(family, growth, size):
    one, two = (reads.footprint(build(family), batch=batch, sequence=24) for batch in (1, 2))
    assert (one.growth, one.cache) == (two.growth, two.cache)
    assert one.growth == growth
    assert size is None or one.cache == size
    later = reads.footprint(build(family), batch=1, sequence=25)
    assert later.cache - one.cache == growth
    assert 0 < one.cache_read <= one.cache


def test_a_model_that_keeps_its_state_in_its_modules_has_no_cache_size():
    found = reads.footprint(build("recurrent_gemma"), batch=1, sequence=8)
    assert (found.cache, found.growth, found.cache_read) == (None, None, 0)


SIZES = {"batch": 2, "prompt": 9, "new": 5}


def test_static_cache_decodes_the_same_again_and_again():
    model = build("llama")
    static, plain = timing.runner(model, cache="static", **SIZES), timing.runner(model, **SIZES)
    assert static.static is not None
    assert plain.static is None
    for _ in range(2):
        assert torch.allclose(static.logits(), plain.logits(), atol=1e-4)
    full = model(input_ids=plain.ids[:, :12]).logits[:, 9:]
    assert torch.allclose(plain.logits(), full, atol=1e-4)
    assert int(static.static.get_seq_length()) == 9 + 3, "the cache is emptied before every prompt"


def test_compiled_steps_are_compiled_and_give_the_same_logits(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    made = timing.runner(build("llama", depth=1), cache="static", compiled=True, **SIZES)
    assert isinstance(made.step, torch._dynamo.eval_frame.OptimizedModule)
    assert len(made.run().steps) == 5


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gpt_neo", {"cache": "static"}, r"--cache static: .*: use --cache dynamic$"),
        ("olmo_hybrid", {"cache": "static"}, r"--cache static: .* cache of its own kind"),
        (
            "llama",
            {"cache": "static", "compiled": True},
            r"--compile: it failed with this model, here \(no compiler\): leave it out",
        ),
    ],
)
def test_what_a_model_cannot_do_is_a_line_and_not_ignored(monkeypatch, family, options, message):
    def broken(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(InputError, match=message):
        timing.runner(build(family), **options, **SIZES)


def test_a_way_of_decoding_with_other_logits_is_refused(monkeypatch):
    other = build("llama", seed=1)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: other)
    with pytest.raises(InputError, match=r"--compile: the model's logits differ by [\d.]+ from the plain ones"):
        timing.runner(build("llama"), cache="static", compiled=True, **SIZES)


def test_every_token_has_its_time():
    done = timing.runner(build("llama"), **SIZES).run()
    assert len(done.steps) == 5
    assert min(done.first, *done.steps) > 0
    assert done.decode == pytest.approx(2 * 5 / sum(done.steps))
    assert done.prefill == pytest.approx(2 * 9 / done.first)
    assert len(timing.Runner(build("llama"), **SIZES).run(limit=0).steps) == 1


def test_models_are_measured_in_turn_and_the_warm_up_is_left_out(monkeypatch):
    models, order = {"a": build("llama", depth=2), "b": build("gpt2", depth=2)}, []

    def once(model, **settings):
        assert settings == {"new": 3}
        order.append(model.config.model_type)
        return float(len(order))

    monkeypatch.setattr(timing, "decode_once", once)
    speeds = timing.decode_speed(models, repeats=2, new=3)
    assert order == ["llama", "gpt2"] * 3
    assert speeds == {"a": [3, 5], "b": [4, 6]}
    assert timing.ratio(speeds, "b", "a") == (pytest.approx((4 / 3 + 6 / 5) / 2), 6 / 5, 4 / 3)


def made_up(steps, first=0.5, weights=900):
    one = timing.Pass(2, 10, first, tuple(steps))
    seen = reads.Footprint(weights, 100, 64, 8)
    return {"passes": [one, replace(one, steps=tuple(2 * s for s in steps))], "peak_bytes": 5 * 10**8, "reads": seen}


def test_ratios_are_round_by_round_and_the_ideal_is_that_of_the_bytes():
    command = config.BenchConfig(models=("m", "n"), repeats=2)
    known = [{"model": name, "layers": 2, "parameters": 10, "dtype": "float32", "device": "cpu"} for name in "mn"]
    known = [one | {"disk_bytes": None, "stored_bytes": 10**6} for one in known]
    fast = made_up([0.1, 0.1], weights=400)
    fast["passes"][1] = replace(fast["passes"][1], steps=(0.1, 0.1), first=0.25)
    found = tables.record(command, benching.Lengths(512, 64), known, {2: [made_up([0.2, 0.2]), fast]})
    first, other = found["rows"]
    assert first["ratio"] == {"median": 1, "min": 1, "max": 1, "ideal": 1}
    assert first["prefill_ratio"] == {"median": 1, "min": 1, "max": 1}
    assert other["prefill_ratio"] == {"median": pytest.approx(1.5), "min": pytest.approx(1), "max": pytest.approx(2)}
    assert other["ratio"] == {"median": pytest.approx(3), "min": pytest.approx(2), "max": pytest.approx(4), "ideal": 2}
    assert first["decode_tokens_per_second"] == pytest.approx((10 + 5) / 2)
    assert first["prefill_tokens_per_second"] == pytest.approx(2 * 10 / 0.5)
    assert first["token_ms"] == {"p50": pytest.approx(200), "p90": pytest.approx(400), "p99": pytest.approx(400)}
    assert other["read_bytes_per_second"] == pytest.approx(500 * 20 / 2), "a step reads for the whole batch"
    text = tables.report(found)
    assert "1.50x (1.00-2.00)" in text
    assert "3.00x (2.00-4.00)  2.00x" in text
    assert "200 / 400 / 400" in text


@pytest.mark.parametrize("count", [1, 5, 100, 320])
def test_percentiles_are_the_least_sample_that_so_many_do_not_exceed(count):
    samples = torch.rand(count, generator=torch.Generator().manual_seed(0)).tolist()
    for name, value in benching.percentiles(samples).items():
        share = int(name[1:]) / 100
        enough = [s for s in samples if sum(t <= s for t in samples) / count >= share - 1e-12]
        assert value == 1000 * min(enough)


def test_a_shape_is_built_in_its_dtype_with_the_same_weights_every_time(tmp_path):
    file = shape(tmp_path).removeprefix(shapes.PREFIX)
    one, two = (shapes.random_model(file, dtype=None, device=torch.device("cpu")) for _ in range(2))
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.model.layers[0].mlp.up_proj.weight.detach().float().std().item() == pytest.approx(0.02, rel=0.1)
    assert not one.training
    wide = shapes.random_model(file, dtype=torch.float32, device=torch.device("cpu"))
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory: check the path"),
        ("{", "no model can be built from it"),
        ("[]", "not a model's config.json"),
        ('{"model_type": "lama"}', "no model can be built from it"),
        ('{"model_type": "clip"}', "no model can be built from it"),
    ],
)
def test_a_shape_that_cannot_be_built_is_one_line(tmp_path, text, message):
    path = tmp_path / "c.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        shapes.random_model(path, dtype=None, device=torch.device("cpu"))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"config:{path}: ")


def test_bench_measures_every_model_in_its_own_memory(tmp_path, capsys):
    build("llama", depth=2).save_pretrained(tmp_path / "small")
    large = shape(tmp_path, hidden_size=512, intermediate_size=2048, vocab_size=10000, num_hidden_layers=4)
    words = [large, str(tmp_path / "small"), "--batch-size", "2,1", "--sequence", "24", "--new-tokens", "6"]
    words += ["--dtype", "float32", "--repeats", "2", "--cache", "static", "--threads", "1", "--device", "cpu"]
    words += ["--output", str(tmp_path / "out")]
    assert cli.main(["bench", *words]) == 0
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "bench.json").read_text(), parse_constant=pytest.fail)
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert [(row["batch"], row["model"]) for row in record["rows"]] == [
        (batch, name) for batch in (1, 2) for name in (large, str(tmp_path / "small"))
    ]
    assert (record["threads"], record["attention"]) == (1, "auto")
    assert set(record["machine"]) == {"platform", "processor", "torch", "date"}
    assert all(record["machine"].values())
    if (info := Path("/proc/cpuinfo")).exists() and (
        named := re.search(r"^model name\s*: (.+)$", info.read_text(), re.M)
    ):
        assert record["machine"]["processor"] == named[1]
    big, small = record["models"]
    weights = 4 * big["parameters"]
    assert weights > 10**8
    assert big["stored_bytes"] == weights
    assert f"  {weights / 1e6:.0f}  " in out
    assert small["disk_bytes"] == (tmp_path / "small" / "model.safetensors").stat().st_size
    assert big["disk_bytes"] is None
    for first, other in (record["rows"][:2], record["rows"][2:]):
        assert len(first["decode_rounds"]) == len(other["decode_rounds"]) == 2
        reads_ = [sum(row["read_bytes_per_step"].values()) for row in (first, other)]
        assert other["ratio"]["ideal"] == reads_[0] / reads_[1] > 100
        assert other["ratio"]["median"] > 1
        assert weights < first["peak_bytes"] < 1.3 * weights
        assert other["peak_bytes"] < 10**8
    assert "cpu, static cache; 6 tokens decoded at the end of rows of 24, 2 rounds in turn" in out
    assert f"{tmp_path / 'small'}, batch 2" in out


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process cannot forget its peak")
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_peak_is_that_of_decoding_with_the_weights_however_they_were_loaded(tmp_path, monkeypatch, dtype):
    """Weights in the dtype they were saved in lie in memory only once they are used; others need more to be loaded."""
    large = {"hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 4000, "num_hidden_layers": 2}
    file = shape(tmp_path, **large).removeprefix(shapes.PREFIX)
    shapes.random_model(file, dtype=None, device=torch.device("cpu")).save_pretrained(tmp_path / "large")
    monkeypatch.setattr(benching, "_HERE", {})
    command = config.BenchConfig(models=(str(tmp_path / "large"),), device="cpu", dtype=dtype)
    known = benching.load(str(tmp_path / "large"), command)
    assert known["stored_bytes"] == (2 if dtype == "auto" else 4) * known["parameters"] > 5 * 10**7
    benching.prepare(command, row := benching.Lengths(16, 4), 1)
    benching.run()
    peak, _ = benching.finish(row, 1)
    assert 0.9 * known["stored_bytes"] < peak < 1.2 * known["stored_bytes"]


def test_memory_begins_with_the_library_of_a_quantized_model(tmp_path, monkeypatch):
    """What reading its code takes is no model's own memory: it is there before the first is loaded."""
    pytest.importorskip("bitsandbytes")
    build("llama", depth=1).save_pretrained(tmp_path / "plain")
    stored = tmp_path / "plain" / "config.json"
    asked = BitsAndBytesConfig(load_in_8bit=True).to_dict()
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"quantization_config": asked}))
    seen = []
    monkeypatch.setattr(
        quantizer_bnb_8bit.Bnb8BitHfQuantizer, "validate_environment", lambda self, **_: seen.append(self)
    )
    benching._wake(torch.device("cpu"), models.config_of(str(tmp_path / "plain")))
    assert seen


def test_an_adapter_takes_its_bases_place_on_the_disk_too(tmp_path):
    build("llama", depth=2).save_pretrained(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    (adapter / "adapter_model.safetensors").write_bytes(b"x" * 100)
    base = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert benching.disk_bytes(str(adapter), False) == base + 100
    assert benching.disk_bytes(str(tmp_path / "base"), False) == base


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "--compile"], "--compile needs --cache static"),
        (["demo", "--sequence", "64", "--new-tokens", "64"], "--new-tokens 64 leave no prompt in --sequence 64"),
        (["demo", "--batch-size", "1,0"], "--batch-size 0: must be greater than 0"),
        (["demo", "--cache", "statik"], "(did you mean 'static'?)"),
        ([], "required"),
        (["demo", "--output", "."], "it already holds bench.json"),
    ],
)
def test_bench_refuses_before_it_starts_a_process(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bench.json").write_text("{}")
    monkeypatch.setattr(benching, "measure", lambda *_: pytest.fail("measured"))
    assert cli.main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "context", "expected"),
    [
        ({}, 4096, (512, 64)),
        ({}, 96, (96, 48)),
        ({"sequence": 32}, 96, (32, 16)),
        ({"new_tokens": 80}, 96, (96, 80)),
    ],
)
def test_a_row_fits_the_context_and_keeps_a_prompt(asked, context, expected):
    assert benching.Lengths.of(config.SpeedSettings(**asked), context, "m") == benching.Lengths(*expected)


def test_all_models_of_a_bench_have_the_row_that_the_one_with_the_shortest_context_takes(tmp_path):
    names = shape(tmp_path, max_position_embeddings=96), shape(tmp_path)
    command = config.BenchConfig(models=names, device="cpu", repeats=1, threads=1)
    length, known, measured = benching.measure(command)
    assert length == benching.Lengths(64, 32)
    assert all(len(one["passes"][0].steps) == 32 for one in measured[1])
    assert "32 tokens decoded at the end of rows of 64" in tables.report(
        tables.record(command, length, known, measured)
    )


def test_a_row_longer_than_a_context_is_refused_before_a_process_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(benching, "_pool", lambda: pytest.fail("started"))
    names = shape(tmp_path, max_position_embeddings=96), shape(tmp_path)
    with pytest.raises(InputError, match=r"^--sequence 65: config:.*shape-1.* takes at most 64 tokens: ask for less$"):
        benching.measure(config.BenchConfig(models=names, sequence=65, device="cpu"))


def test_a_process_that_ends_is_a_line_with_the_model():
    with (
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
        pytest.raises(TrimError, match=r"process of m was ended"),
    ):
        benching._ask(pool, "m", os._exit, 9)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_process_of_a_model_without_a_traceback(capfd):
    with benching._pool() as pool:
        os.kill(pool.submit(os.getpid).result(), signal.SIGINT)
        with pytest.raises(BrokenProcessPool):
            pool.submit(os.getpid).result()
    assert capfd.readouterr().err == ""


def test_a_scheduler_that_ends_bench_ends_what_a_models_process_is_doing(monkeypatch):
    monkeypatch.setattr(benching, "get_context", lambda _: get_context("fork"))  # a new one imports torch
    found = []

    def ended():
        with benching._pool() as pool:
            found.extend([pool.submit(os.getpid).result(), pool.submit(time.sleep, 600)])
            raise Terminated

    with pytest.raises(Terminated):
        ended()
    process, doing = found
    assert isinstance(doing.exception(timeout=0), BrokenProcessPool)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_bench_writes_before_it_prints(tmp_path, monkeypatch):
    def gone(_):
        raise OSError("no terminal")

    monkeypatch.setattr(benching, "measure", lambda *_: ())
    monkeypatch.setattr(tables, "record", lambda *_: {"models": []})
    monkeypatch.setattr(tables, "report", gone)
    with pytest.raises(OSError, match="no terminal"):
        commands.carry_out("bench", config.BenchConfig(models=("demo",), output=str(tmp_path / "out")))
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == {"models": []}


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["demo", "runs/mine/model"], ["demo", "model"]),
        (["runs/a/model", "runs/b/model/", "runs/b/model/"], ["a/model", "b/model", "b/model"]),
        (["one/x/model", "two/x/model", "base"], ["one/x/model", "two/x/model", "base"]),
        (["model", "old/model", "."], ["model", "old/model", "."]),
    ],
)
def test_models_have_names_of_their_own_in_the_picture(paths, names):
    assert [plot.short_names(paths)[path] for path in paths] == names


def test_refusals_name_the_model_once():
    class Pool:
        def __init__(self, text):
            self.text = text

        def submit(self, *_):
            raise InputError(self.text)

    for text in ("x: no", "no"):
        with pytest.raises(InputError, match=r"^x: no$"):
            benching._ask(Pool(text), "x", print)
