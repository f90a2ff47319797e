"""`benchmarks/throughput.py`: formats of quantized weights and their bytes, what fits where, rows that say why not."""

from __future__ import annotations

import copy
import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimllm.bench import benching, reads, timing
from trimllm.config import BenchConfig
from trimllm.errors import InputError

SHAPE = tiny.SHAPE | {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module")
def quantized() -> ModuleType:
    return load("_quantized")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("throughput")


def load(name: str) -> ModuleType:
    folder = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).eval()


@pytest.fixture
def shape(tmp_path):
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(SHAPE))
    return path


def unpacked(words: torch.Tensor, dim: int, order: tuple[int, ...] = tuple(range(8))) -> list[list[int]]:
    """Word by word, four bits at a time."""
    rows = words.tolist() if dim == 1 else words.t().tolist()
    found = []
    for row in rows:
        line = [0] * (8 * len(row))
        for i, word in enumerate(row):
            for place, column in enumerate(order):
                line[8 * i + column] = (word >> 4 * place) & 15
        found.append(line)
    return found if dim == 1 else [list(column) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_packed_weights_are_the_nearest_of_sixteen_when_unpacked_as_the_format_says(quantized, method):
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    if method == "gptq":
        held = quantized.gptq_tensors(weight)
        codes, zeros = unpacked(held["qweight"], 0), unpacked(held["qzeros"], 1)
        zeros = [[zero + 1 for zero in row] for row in zeros]  # files of this format hold them less one
        groups = held["g_idx"].tolist()
    else:
        held = quantized.awq_tensors(weight)
        codes, zeros = (unpacked(held[name], 1, quantized.AWQ_ORDER) for name in ("qweight", "qzeros"))
        groups = [i // 128 for i in range(256)]
    scales = held["scales"].tolist()
    for i, group in enumerate(groups):
        for j in range(16):
            value = (codes[i][j] - zeros[group][j]) * scales[group][j]
            assert abs(value - weight[j, i]) <= 0.502 * scales[group][j], (i, j)
    assert {min(map(min, codes)), max(map(max, codes))} == {1, 15}


def test_of_every_four_weights_the_two_largest_stay(quantized):
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    found = quantized.prune_2_4(weight)
    for row, kept in zip(weight.tolist(), found.tolist(), strict=True):
        for start in range(0, 16, 4):
            four = row[start : start + 4]
            least = sorted(map(abs, four))[1]
            assert kept[start : start + 4] == [value if abs(value) > least else 0 for value in four]


def test_llm_int8_reads_and_stores_a_byte_a_weight_and_a_scale_a_row(quantized, model):
    made = copy.deepcopy(model)
    inside = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    rows = sum(p.shape[0] for name, p in model.named_parameters() if "proj" in name)
    quantized.llm_int8(made)
    less = 2 * inside - (inside + 4 * rows)
    before, after = (reads.footprint(one, batch=1, sequence=8).weights for one in (model, made))
    assert before - after == less
    flags = 7 * 4  # a byte per layer that says how its weights lie
    assert reads.stored_bytes(model) == sum(p.nbytes for p in model.parameters())
    assert reads.stored_bytes(model) - reads.stored_bytes(made) == less - flags


def test_a_tied_matrix_is_stored_once():
    model = tiny.build("llama-tied")
    assert reads.stored_bytes(model) == sum(p.nbytes for p in model.parameters())


def test_bits_per_weight_are_those_of_the_tensors(quantized):
    weight = torch.randn(256, 512)
    for way, pack in (("int4 GPTQ", quantized.gptq_tensors), ("int4 AWQ", quantized.awq_tensors)):
        bits = 8 * sum(t.nbytes for name, t in pack(weight).items() if name != "g_idx") / weight.numel()
        assert bits <= quantized.WAYS[way].bits < bits + 0.2


def test_a_shape_is_counted_as_it_is_built(script, shape, model):
    size = script.sizes(shape)
    assert size.depth == 4
    assert size.building(script.Row("plain")) == sum(p.nbytes for p in model.parameters())
    assert size.stored(script.Row("plain")) == size.building(script.Row("plain"))
    half = size.stored(script.Row("plain", 0.5))
    assert size.stored(script.Row("plain")) - half == sum(p.nbytes for p in model.model.layers[2:].parameters()) - (
        2 * 2 * 2 * 128  # norms are counted with the rest
    )


def test_every_group_has_the_plain_model_and_fits(script):
    size = script.Sizes(depth=32, block=202_375_168, rest=262_000_000)
    for free in (20e9, 30e9, 80e9):
        made, refused = script.groups(script.ROWS, size, free)
        assert all(group[0] == script.ROWS[0] for group in made)
        members = [row for group in made for row in group[1:]]
        assert sorted([*map(str, members), *map(str, refused)]) == sorted(map(str, script.ROWS[1:]))
        for group in made:
            held = 0.0
            for row in group:
                assert held + size.building(row) <= free, "while this one is made"
                held += size.stored(row) + script.PROCESS
            assert held <= free
        assert all("GB with the plain model" in line for line in refused.values())
    assert len(script.groups(script.ROWS, size, 80e9)[0]) < len(script.groups(script.ROWS, size, 30e9)[0])


def test_where_the_plain_model_does_not_fit_all_rows_say_so(script):
    size = script.Sizes(depth=32, block=202_375_168, rest=262_000_000)
    made, refused = script.groups(script.ROWS, size, 8e9)
    assert not made
    assert set(refused.values()) == {"needs 14.1 GB, 8.0 are free"}


def test_what_a_machine_lacks_is_said(quantized, monkeypatch):
    cpu = torch.device("cpu")
    assert quantized.WAYS["plain"].missing(cpu) is None
    assert quantized.WAYS["2:4 sparse"].missing(cpu) == "its kernels need an NVIDIA GPU"
    monkeypatch.setattr(quantized, "find_spec", lambda name: None)
    assert quantized.WAYS["int4 AWQ"].missing(cpu) == "needs gptqmodel: pip install gptqmodel"


def test_a_row_without_a_measurement_shows_why_and_no_number(script):
    rows = [
        script.entry("plain", 4, [10.0, 8.0, 9.0], [10.0, 8.0, 9.0], ideal=1.0, read=9, stored=9, peak=None),
        script.entry("half", 2, [15.0, 16.0, 9.0], [10.0, 8.0, 9.0], ideal=2.0, read=9, stored=9, peak=10**6),
        {"row": "2:4 sparse", "why_not": "its kernels need an NVIDIA GPU"},
    ]
    assert (rows[1]["ratio"], rows[1]["share_of_ideal"]) == (1.5, 0.75)
    text = script.show(rows).splitlines()
    assert "15.00 (9.00-16.00)  1.50x (1.00-2.00)  2.00x      75%" in text[3]
    assert text[4] == "2:4 sparse: its kernels need an NVIDIA GPU"


def test_the_papers_ratios_follow_from_its_figures(script):
    speeds = {gpu: script.PAPER[gpu] for gpu in ("A100", "V100", "RTX 3090")}
    assert [round(row[-1] / row[0], 1) for row in speeds.values()] == [2.4, 2.1, 2.0]


ROUNDS = {"plain": [10.0, 10.0], "trimmed to 50%": [30.0, 30.0]}


def whole(script, shape, tmp_path, monkeypatch, *words, made=None, works=True):
    """The record of a call in which rows fit into the groups `made` and nothing is loaded."""
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--shape", str(shape), "--device", "cpu", *words])
    monkeypatch.setattr(load("_sides"), "RESULTS", tmp_path / "results")
    monkeypatch.setattr(script, "failure", lambda *_: None if works else "fails here: no kernel")
    monkeypatch.setattr(script, "llamacpp_missing", lambda *_: "needs llama-cpp-python")
    if made is not None:
        held = {row for group in made for row in group}
        refused = {row: "needs 9.0 GB with the plain model, 1.0 are free" for row in script.ROWS if row not in held}
        monkeypatch.setattr(script, "groups", lambda *_: (made, refused))
    turns = iter((1.0, 2.0))

    def measure(rows, *_):
        turn = next(turns)  # in the second group the machine is twice as fast
        each = {row: [turn * speed for speed in ROUNDS[row.name]] for row in rows}
        sizes = {"ideal": 3.0, "read": 1, "stored": 1, "peak": None}
        return [script.entry(row.name, 4, each[row], each[rows[0]], **sizes) for row in rows]

    monkeypatch.setattr(script, "measure", measure)
    script.main()


PLAIN_ONLY = ["--only", "plain"]


def test_rows_are_recorded_where_memory_does_not_hold_half_the_model(script, shape, tmp_path, monkeypatch, capsys):
    plain = script.Row("plain")
    whole(script, shape, tmp_path, monkeypatch, *PLAIN_ONLY, made=[[plain]])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (record["ours"], record["ratio"], record["ideal"]) == (None, None, None)
    assert [row.get("tokens_per_second") for row in record["rows"]][:2] == [10.0, None]
    assert record["rows"][1]["why_not"] == "needs 9.0 GB with the plain model, 1.0 are free"


def test_the_headline_is_against_the_plain_model_of_its_own_group(script, shape, tmp_path, monkeypatch, capsys):
    plain, half = script.Row("plain"), script.Row("plain", 0.5)
    whole(script, shape, tmp_path, monkeypatch, *PLAIN_ONLY, made=[[plain], [plain, half]])
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    (row,) = (row for row in record["rows"] if row["row"] == half.name)
    assert record["ratio"] == row["ratio"] == 3.0
    assert (record["ours"], record["other"]) == (60.0, 20.0)
    assert not (tmp_path / "results").exists(), "other options than those of the kept result"


def test_a_device_that_is_not_there_or_runs_nothing_is_one_line(script, shape, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"^shape.json: the plain model fails here: no kernel: give another --shape"):
        whole(script, shape, tmp_path, monkeypatch, works=False)
    with pytest.raises(InputError, match=r"^--device cuda:99: there is no such device here"):
        whole(script, shape, tmp_path, monkeypatch, "--device", "cuda:99")


def test_a_prompt_read_once_gives_the_same_steps_in_every_round(model, monkeypatch):
    lengths = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda **given: lengths.append(given["input_ids"].shape[1]) or forward(**given)
    )
    sizes = {"batch": 1, "prompt": 10, "new": 4}
    want = timing.Runner(model, **sizes).logits()
    once = timing.Runner(model, **sizes, once=True)
    for _ in range(3):
        assert len(once.run().steps) == 4
        torch.testing.assert_close(once.logits(), want, rtol=0, atol=0)
    assert lengths.count(10) == 2, "one for each runner"
    assert once.prompt_cache().get_seq_length() == 10


def test_with_a_cache_at_hand_the_same_bytes_are_read(model):
    runner = timing.Runner(model, batch=1, prompt=10, new=4, once=True)
    runner.run()
    found = reads.footprint(model, batch=1, sequence=11, cache=runner.prompt_cache())
    assert found == reads.footprint(model, batch=1, sequence=11)


def to_one_block(model):
    model.model.layers = model.model.layers[:1]


def test_a_change_is_measured_and_the_limit_kept(shape, monkeypatch):
    monkeypatch.setattr(benching, "_HERE", {})
    name = f"config:{shape}"
    command, row = BenchConfig(models=(name,), device="cpu"), benching.Lengths(20, 10)
    plain = benching.load(name, command)
    changed = benching.load(name, command, to_one_block)
    assert changed["stored_bytes"] < plain["stored_bytes"] == 2 * plain["parameters"]
    benching.prepare(command, row, 1, once=True)
    assert len(benching.run().steps) == 10
    assert len(benching.run(limit=0.0).steps) == 1
    _, seen = benching.finish(row, 1)
    per_block = 2 * 2 * 32 * 2  # keys and values of two heads of 32, two bytes each
    assert seen.growth == per_block
    assert seen.cache == 11 * per_block, "the first token after the prompt"
    assert math.isclose(seen.cache_read, 11 * per_block, rel_tol=0.2)
