"""A stage with a teacher equals the formula written out, and a run keeps its teacher as long as it needs it."""

from __future__ import annotations

import contextlib
import copy
from types import SimpleNamespace

import helpers_run as h
import pytest
import tiny
import torch
from accelerate import Accelerator

from trimllm import cli
from trimllm.blocks.layout import whole
from trimllm.checkpoints import room
from trimllm.config import TrainSettings
from trimllm.run import progressive
from trimllm.training import distill, losses, packing, sparse, train
from trimllm.training.distill import Teacher
from trimllm.training.packing import ALONE, Example, find_way, pack
from trimllm.training.step import Means, Stepper

pytestmark = pytest.mark.usefixtures("fast")

ROWS = [Example(tuple((7 * n + 3 * i) % 60 + 3 for i in range(3 + 2 * (n % 5))), 1 + n % 2) for n in range(8)]
SETTINGS = TrainSettings(lr=1e-2, batch_size=40)


def student_and_teacher(family="llama"):
    """A student that is shallower than its teacher, and another model."""
    return tiny.build(family, 3, seed=1), tiny.build(family, 4, seed=2)


def by_the_formula(model, teacher, rows, share):
    """Mean over the targets, place by place: (1 - share) * -log s[target] + share * sum t * (log t - log s)."""
    total = 0.0
    for row in rows:
        ids = torch.tensor([row.ids[:-1]])
        student = model(input_ids=ids, use_cache=False).logits[0]
        with torch.no_grad():
            wanted = teacher(input_ids=ids, use_cache=False).logits[0]
        for place in range(row.start - 1, len(row.ids) - 1):
            s, t = student[place].exp() / student[place].exp().sum(), wanted[place].exp() / wanted[place].exp().sum()
            divergence = (t * (t.log() - s.log())).sum()
            total = total + (1 - share) * -s[row.ids[place + 1]].log() + share * divergence
    return total / sum(row.targets for row in rows)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(one, other):
    """Difference of two sets of tensors, relative to the second."""
    a, b = (torch.cat([tensors[name].flatten() for name in sorted(other)]) for tensors in (one, other))
    return float((a - b).norm() / b.norm())


def ours(model, teacher, packed, share, places=10_000):
    model.zero_grad(set_to_none=True)
    lesson = Teacher(teacher, share).lesson(packed, places)
    return float(losses.backward(model, packed, 1 / len(packed.targets), places, lesson)), gradients(model)


def expected(model, teacher, share, rows=ROWS):
    model.zero_grad(set_to_none=True)
    loss = by_the_formula(model, teacher, rows, share)
    loss.backward()
    return float(loss.detach()), gradients(model)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma2", "mamba"])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_loss_and_gradients_are_those_of_the_formula_packed_and_in_chunks(family, share):
    model, teacher = student_and_teacher(family)
    (loss, grads) = expected(model, teacher, share)
    packed = pack(ROWS, find_way(model, ROWS, 0)[0], 0)
    for places in (10_000, 5, 1):
        found, mine = ours(model, teacher, packed, share, places)
        assert found == pytest.approx(loss, abs=1e-5)
        assert distance(mine, grads) < 2e-5
    assert not gradients(teacher)


def test_a_teacher_that_is_the_student_teaches_nothing():
    model, other = student_and_teacher()
    packed = pack(ROWS, find_way(model, ROWS, 0)[0], 0)
    for places in (10_000, 5):
        loss, grads = ours(model, copy.deepcopy(model), packed, 1.0, places)
        assert loss == pytest.approx(0, abs=1e-5)
        assert max(float(g.abs().max()) for g in grads.values()) < 1e-6
        assert max(float(g.abs().max()) for g in ours(model, other, packed, 1.0, places)[1].values()) > 1e-2


def test_no_share_of_the_teacher_is_cross_entropy():
    model, teacher = student_and_teacher()
    packed = pack(ROWS, find_way(model, ROWS, 0)[0], 0)
    loss, grads = ours(model, teacher, packed, 0.0)
    model.zero_grad(set_to_none=True)
    assert float(losses.backward(model, packed, 1 / len(packed.targets), 10_000)) == pytest.approx(loss, abs=1e-6)
    assert distance(grads, gradients(model)) < 1e-6


def test_no_chunk_of_either_model_is_larger_than_allowed():
    model, teacher = student_and_teacher()
    sizes = {True: [], False: []}
    for each in (model, teacher):
        head = each.get_output_embeddings()
        head.register_forward_hook(lambda _m, _a, out, mine=each is model: sizes[mine].append(out.shape[-2]))
    packed = pack(ROWS, ALONE, 0)
    ours(model, teacher, packed, 0.5, 5)
    for seen in sizes.values():
        assert seen[0] == 0, "the forward pass itself computes no logits"
        assert sum(seen) == sum(row.targets for row in ROWS)
        assert max(seen) == 5


def test_a_teacher_is_frozen_and_without_dropout():
    model, teacher = student_and_teacher("gpt2")
    teacher.train()
    packed = pack(ROWS, find_way(model, ROWS, 0)[0], 0)
    assert any(isinstance(module, torch.nn.Dropout) and module.p for module in teacher.modules())
    first, second = (ours(model.eval(), teacher, packed, 1.0)[0] for _ in range(2))
    assert first == second
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def stage(model, teacher, share=0.5, settings=SETTINGS, plan=(ROWS, ROWS[:3]), accelerator=None, say=print, **more):
    parameters = more.pop("parameters", None) or sparse.freeze(model, whole(3), None)
    means = Means(teacher=Teacher(teacher, share) if teacher is not None else None, say=say)
    return train.train_stage(model, parameters, plan, settings, accelerator or Accelerator(cpu=True), means, **more)


def naive_stage(model, teacher, share, plan=(ROWS, ROWS[:3])):
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for number, rows in enumerate(plan):
        optimizer.param_groups[0]["lr"] = SETTINGS.lr * train.schedule(number, len(plan))
        optimizer.zero_grad()
        by_the_formula(model, teacher, rows, share).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.max_grad_norm)
        optimizer.step()


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize("way", ["plain", "micro-batches", "recomputed", "out of memory"])
def test_a_stage_equals_plain_pytorch_and_leaves_the_teacher_alone(way, monkeypatch):
    model, teacher = student_and_teacher()
    twin, before = copy.deepcopy(model), copy.deepcopy(teacher.state_dict())
    changes = {"micro-batches": {"micro_batch_size": 8}, "recomputed": {"gradient_checkpointing": True}}
    said = []
    if way == "out of memory":  # in the teacher's own forward pass
        lesson = Teacher.lesson

        def little(self, packed, places):
            if len(packed.spans) > 2:
                raise torch.OutOfMemoryError("no memory")
            return lesson(self, packed, places)

        monkeypatch.setattr(Teacher, "lesson", little)
    stage(model, teacher, settings=SETTINGS.model_copy(update=changes.get(way, {})), say=said.append)
    naive_stage(twin, teacher, 0.5)
    assert distance(model.state_dict(), twin.state_dict()) < 1e-6
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert bool(said) == (way == "out of memory")


@pytest.mark.usefixtures("steady")
def test_a_cached_prefix_of_the_student_changes_nothing():
    results = []
    for where in ("off", "memory"):
        model, teacher = student_and_teacher()
        parameters = sparse.freeze(model, whole(3), [2], embeddings=False)
        settings = SETTINGS.model_copy(update={"cache_frozen_prefix": where, "train_embeddings": False})
        report = stage(model, teacher, settings=settings, plan=[ROWS] * 3, parameters=parameters)
        assert (report.cached > 0.5) == (where == "memory")
        results.append(model.state_dict())
    assert distance(*results) < 1e-6


def test_processes_share_the_rows_out():
    model, teacher = student_and_teacher()
    _, grads = expected(model, teacher, 0.5)
    found = {name: torch.zeros_like(grad) for name, grad in grads.items()}
    for rank in range(2):
        model.zero_grad(set_to_none=True)
        one = SimpleNamespace(
            num_processes=2, process_index=rank, device=torch.device("cpu"), reduce=lambda tensor, reduction: tensor
        )
        steps = Stepper(model, one, packing.Way(64), 10_000, 10_000, teacher=Teacher(teacher, 0.5))
        steps.gradients([], ROWS)
        for name, grad in gradients(model).items():
            found[name] += grad
    assert distance(found, grads) < 1e-5


def test_the_teacher_computes_in_the_precision_and_with_the_attention_of_the_student():
    model, teacher = student_and_teacher()
    seen = []
    for each in (model, teacher):
        each.set_attn_implementation("sdpa")

        def note(module, _args, out, each=each):
            seen.append((each is model, module.training, out.dtype, each.config._attn_implementation))

        each.model.layers[0].mlp.register_forward_hook(note)
    mixed = SimpleNamespace(
        num_processes=1,
        process_index=0,
        device=torch.device("cpu"),
        reduce=lambda tensor, reduction: tensor,
        mixed_precision="bf16",
        autocast=lambda: torch.autocast("cpu", torch.bfloat16),
        distributed_type=SimpleNamespace(value="NO"),
    )
    stage(model, teacher, accelerator=mixed)
    trained = [way for student, training, *way in seen if student and training]
    taught = [way for student, _, *way in seen if not student][-len(trained) :]
    assert len(trained) > 2
    assert taught == trained == [[torch.bfloat16, "eager"]] * len(trained)
    for each in (model, teacher):
        assert each.config._attn_implementation == "sdpa"
        assert "forward" not in vars(each)


def test_what_one_of_the_two_cannot_do_is_done_for_neither(monkeypatch):
    model, teacher = student_and_teacher()
    find, places, said, used = packing.find_way, losses.places_at_once, [], []
    monkeypatch.setattr(
        packing, "find_way", lambda m, *rest: (ALONE, "the teacher mixes rows") if m is teacher else find(m, *rest)
    )
    monkeypatch.setattr(losses, "places_at_once", lambda m, packed: 10**9 if m is teacher else places(m, packed))
    lesson = Teacher.lesson
    monkeypatch.setattr(Teacher, "lesson", lambda *a: used.append((a[1], a[2])) or lesson(*a))
    stage(model, teacher, say=said.append)
    assert said == ["  rows are batched by length, not packed: the teacher mixes rows"]
    assert used
    for packed, limit in used:
        assert len(packed.inputs["input_ids"]) == len(packed.spans)
        assert limit == 10**9


def test_a_killed_run_finds_its_teacher_again_and_ends_bit_equal(base, task, tmp_path, monkeypatch):
    straight, killed, plain = (tmp_path / name for name in ("straight", "killed", "plain"))
    made, init = [], Teacher.__post_init__

    def count(self):
        made.append({name: value.clone() for name, value in self.model.state_dict().items()})
        init(self)

    monkeypatch.setattr(Teacher, "__post_init__", count)
    plainly = {"depth": 2, "warmup_epochs": 0.4, "epochs_per_drop": 0.4, "calibration_size": 3}
    distilled = plainly | {"distill": 0.5}
    h.run(base, task, plain, **plainly)
    assert not made, "nothing is loaded where nothing is distilled"
    h.run(base, task, straight, **distilled)
    assert len(made) == 3, "one for every stage but the warm-up"
    for owner, name, call in ((progressive.Run, "_drop", 3), (distill, "loss", 2)):
        with monkeypatch.context() as patch:
            work, calls = getattr(owner, name), []

            def dying(*arguments, work=work, calls=calls, call=call, after=name == "_drop", **more):
                calls.append(1)
                value = work(*arguments, **more) if after else None
                if len(calls) == call:
                    raise h.Killed
                return value if after else work(*arguments, **more)

            patch.setattr(owner, name, dying)
            with contextlib.suppress(h.Killed):
                h.run(base, task, killed, **distilled, resume=True)
            assert sum(calls) == call, "it was killed there"
    h.run(base, task, killed, **distilled, resume=True)
    for teacher in made[1:]:
        assert all(torch.equal(value, made[0][name]) for name, value in teacher.items())
    assert h.weights_hash(killed / "model") == h.weights_hash(straight / "model")
    assert h.weights_hash(plain / "model") != h.weights_hash(straight / "model")
    kept = {path.name for path in (straight / "checkpoints").iterdir()}
    assert kept == {path.name for path in (killed / "checkpoints").iterdir()} == {"depth-5", "depth-3", "depth-2"}
    assert {path.name for path in (plain / "checkpoints").iterdir()} == {"depth-3", "depth-2"}


def test_the_base_as_it_is_teaches_a_run_without_warm_up(base, task, tmp_path, monkeypatch):
    seen, init = [], Teacher.__post_init__
    monkeypatch.setattr(Teacher, "__post_init__", lambda self: seen.append(self.model.state_dict()) or init(self))
    given = progressive.loading.load_model(base).state_dict()
    changes = {"warmup_epochs": 0, "schedule": "recover", "joint_tolerance": 100.0, "tie_tolerance": 100.0}
    h.run(base, task, tmp_path / "run", depth=2, distill=1.0, **changes)
    assert seen
    assert all(torch.equal(value, given[name]) for teacher in seen for name, value in teacher.items())


def test_a_model_that_fits_once_but_not_twice_is_refused_before_it_is_loaded(base, task, tmp_path, monkeypatch, capsys):
    needed = room.weights(str(base), torch.float32)
    monkeypatch.setattr(room, "free_bytes", lambda _: 2 * needed - 1)
    words = h.arguments(h.settings(base, task, tmp_path / "run", distill=0.25))
    assert cli.main(["trim", *words]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--distill 0.25 needs the model twice: the weights alone take 0.0 GB" in said
    words = h.arguments(h.settings(base, task, tmp_path / "run", target_speedup=1.5))
    assert cli.main(["trim", *words]) == 2
    assert "--target-speedup 1.5 measures the base beside the model: the weights" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
