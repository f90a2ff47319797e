"""When memory runs out, batches are halved and nothing else changes."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import helpers_run as h
import numpy as np
import pytest
import tiny
import torch

from trimllm import cli, memory
from trimllm.bench import benching
from trimllm.blocks.layout import units, whole
from trimllm.checkpoints.loading import load_model
from trimllm.config import EvalConfig, TrimConfig
from trimllm.errors import InputError, TrimError
from trimllm.evaluation.evaluate import Scorer
from trimllm.evaluation.inputs import scorer as scorer_of
from trimllm.importance import scan, weights
from trimllm.run import finishing, recording


class Small:
    """Makes a model's forward fail like a device with room for `cells` positions; counts both outcomes."""

    def __init__(self, model, cells, error):
        self.model, self.cells, self.error = model, cells, error
        self.failed = self.worked = 0
        self.forward = model.forward
        model.forward = self

    def __call__(self, *arguments, **named):
        if named["input_ids"].numel() > self.cells:
            self.failed += 1
            raise self.error
        self.worked += 1
        return self.forward(*arguments, **named)


CUDA = torch.OutOfMemoryError("CUDA out of memory")
CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")


OTHERS = [
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", [CUDA, CPU, *OTHERS], ids=["cuda", "cpu", "mps", "cublas"])
def test_evaluation_goes_on_in_halves_and_does_not_try_again_what_failed(error, tokenizer, questions):
    model = tiny.build("llama", 4)
    scorer = Scorer(model, tokenizer, questions, token_budget=4096)
    scorer.batches = type(scorer.batches)([row for group in scorer.batches._groups for row in group], 4096)
    expected = scorer.score(model)
    longest = scorer.batches.longest().real.numel()
    small = Small(model, 2 * longest, error)
    found = scorer.score(model)
    assert np.allclose(np.concatenate(found.loglik), np.concatenate(expected.loglik), atol=1e-5)
    assert found.tokens == expected.tokens
    assert small.failed > 0
    before = small.failed
    scorer.score(model)
    assert small.failed == before, "the size that failed is known"


def test_a_row_is_tried_alone_however_large_what_failed_before_was(tokenizer, questions):
    """Memory also depends on how many targets a batch has, not on its length alone."""
    batches = type(Scorer(tiny.build("llama", 2), tokenizer, questions).batches)
    rows = [row for group in Scorer(tiny.build("llama", 2), tokenizer, questions).batches._groups for row in group]
    made = batches(rows, 4096)
    longest = max(len(row.ids) for row in rows)

    def work(batch):
        if batch.real.shape[0] > 1:
            raise CUDA
        return batch.real.shape[1]

    for _ in range(2):
        assert max(max(made.compute(number, work)) for number in range(len(made))) == longest
    assert made._fits < 2 * longest


def test_scan_in_halves_is_the_scan(tokenizer, questions):
    model = tiny.build("llama", 4)
    expected = scan.scan(model, Scorer(model, tokenizer, questions), "acc", "pair")
    scorer = Scorer(model, tokenizer, questions)
    small = Small(model, 2 * scorer.batches.longest().real.numel(), CUDA)
    found = scan.scan(model, scorer, "acc", "pair")
    assert small.failed > 0
    assert [trial.correct for trial in found.trials] == [trial.correct for trial in expected.trials]
    assert [trial.loss for trial in found.trials] == pytest.approx([trial.loss for trial in expected.trials], abs=1e-5)
    for name in ("norm", "cosine", "run_cosine", "run_angle"):
        assert np.allclose(getattr(found, name), getattr(expected, name), atol=1e-5, equal_nan=True)


def test_windows_of_one_document_in_several_pieces_are_added_up(tokenizer):
    from trimllm.tasks import Item

    model = tiny.build("llama", 4)
    document = [Item("text:0", "", ("abcdefgh ijklmno pqrstu vwxyz " * 4,))]
    settings = {"max_length": 8, "token_budget": 256}
    expected = scan.scan(model, Scorer(model, tokenizer, document, **settings), "likelihood")
    scorer = Scorer(model, tokenizer, document, **settings)
    small = Small(model, 16, CUDA)
    found = scan.scan(model, scorer, "likelihood")
    assert small.failed > 0
    assert [trial.loss for trial in found.trials] == pytest.approx([trial.loss for trial in expected.trials], abs=1e-5)


def test_a_single_row_that_does_not_fit_is_one_line(tokenizer, questions):
    model = tiny.build("llama", 4)
    scorer = Scorer(model, tokenizer, questions)
    Small(model, 3, CUDA)
    with pytest.raises(TrimError, match=r"one row of \d+ tokens does not fit the device: cut rows with --max-length"):
        scorer.score(model)


def test_gradients_of_a_batch_that_failed_midway_are_not_counted_twice(tokenizer, questions):
    """The embeddings' gradient comes last in a backward pass: by then those of all blocks are added."""
    model = tiny.build("llama", 3)
    candidates = units("block", whole(3))
    expected = weights.taylor(model, Scorer(model, tokenizer, questions), candidates)
    forward, large, failed = model.forward, [False], []

    def watched(*arguments, **named):
        large[0] = len(named["input_ids"]) > 1
        return forward(*arguments, **named)

    def fail(gradient):
        if large[0]:
            failed.append(1)
            raise CUDA
        return gradient

    model.forward = watched
    model.get_input_embeddings().weight.register_hook(fail)
    scorer = Scorer(model, tokenizer, questions)
    assert weights.taylor(model, scorer, candidates) == pytest.approx(expected, rel=1e-4)
    assert failed


def test_other_errors_are_not_taken_for_the_end_of_memory():
    with pytest.raises(RuntimeError, match="shapes"):
        memory.attempt(lambda: (_ for _ in ()).throw(RuntimeError("shapes do not fit")))
    assert memory.attempt(lambda: 3) == 3


def raising(error):
    def work(*_, **__):
        raise error

    return work


OTHER = RuntimeError("shapes do not fit")


@pytest.mark.parametrize("error", [CUDA, CPU], ids=["cuda", "cpu"])
def test_commands_say_in_one_line_that_memory_ended(error, monkeypatch, capsys):
    monkeypatch.setattr(cli, "parse", lambda _: None)
    monkeypatch.setattr(cli, "run", raising(error))
    remedies = {
        "trim": "a smaller --micro-batch-size or a smaller --eval-batch-size or --gradient-checkpointing; what is done "
        "is kept: go on with --resume",
        "drop": "--streaming or a narrower --dtype",
        "export": "use a device that has more",
    }
    for name, remedy in remedies.items():
        assert cli.main([name]) == 1
        assert capsys.readouterr().err == f"trimllm: out of memory on the device: {remedy}\n"
    monkeypatch.setattr(cli, "first_to_fail", lambda: False)
    assert cli.main(["trim"]) == 1
    assert capsys.readouterr().err == "", "another process has said it"
    with pytest.raises(TrimError, match="m: out of memory on the device"):
        benching._ask(SimpleNamespace(submit=raising(error)), "m", print)
    said = []
    recorder = SimpleNamespace(against_base=raising(error), console=SimpleNamespace(say=said.append))
    assert recording.Recorder.final_speedup(recorder, None) is None
    assert said[0].startswith("the decode speed was not compared")


@pytest.mark.parametrize("error", [CUDA, CPU])
def test_a_model_that_does_not_fit_when_it_is_loaded_is_out_of_memory_too(base, tmp_path, monkeypatch, error):
    """Base and result need not fit together: the speeds are then not compared, and the run ends well."""
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", raising(error))
    with pytest.raises(type(error)):
        load_model(base)
    said = []
    config = TrimConfig(model=str(base), task="t", output=str(tmp_path))
    console = SimpleNamespace(say=said.append)
    recorder = recording.Recorder(config, None, console, None, None, torch.device("cpu"))
    assert recorder.final_speedup(tiny.build("llama", 2)) is None
    assert said[0].startswith("the decode speed was not compared")


def test_commands_do_not_say_so_of_other_errors(monkeypatch):
    monkeypatch.setattr(cli, "parse", lambda _: None)
    monkeypatch.setattr(cli, "run", raising(OTHER))
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main([])
    with pytest.raises(RuntimeError, match="shapes"):
        benching._ask(SimpleNamespace(submit=raising(OTHER)), "m", print)
    with pytest.raises(RuntimeError, match="shapes"):
        recording.Recorder.final_speedup(SimpleNamespace(against_base=raising(OTHER)), None)


def test_a_budget_below_the_longest_row_is_refused(tokenizer, questions):
    model = tiny.build("llama", 4)
    longest = Scorer(model, tokenizer, questions).batches.longest().real.numel()
    settings = {"model": "x", "task": "x"}
    with pytest.raises(InputError, match=f"--eval-batch-size 3: the longest row has {longest} tokens"):
        scorer_of(EvalConfig(**settings, eval_batch_size=3), model, tokenizer, questions)
    scorer_of(EvalConfig(**settings, eval_batch_size=longest), model, tokenizer, questions)


def test_the_model_that_was_saved_is_gone_when_others_are_loaded(tmp_path, monkeypatch):
    save, record, refs = finishing.save, recording.Recorder.record, []

    def saved(run, ready, model, *arguments):
        refs.append(weakref.ref(model))
        return save(run, ready, model, *arguments)

    def recorded(self, event, *arguments, **more):
        if event == "saved":
            gc.collect()
            assert refs[0]() is None
        return record(self, event, *arguments, **more)

    monkeypatch.setattr(finishing, "save", saved)
    monkeypatch.setattr(recording.Recorder, "record", recorded)
    h.run(
        h.save_base(tmp_path / "base"), h.save_task(tmp_path / "task"), tmp_path / "run", depth=4, epochs_per_drop=0.2
    )
    assert refs
