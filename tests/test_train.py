"""A stage of training equals plain PyTorch written out, and touches nothing that is frozen."""

from __future__ import annotations

import contextlib
import copy
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate import Accelerator

from trimllm.blocks import surgery
from trimllm.blocks.layout import Block, whole
from trimllm.config import TrainSettings, TrimConfig
from trimllm.errors import InputError, TrimError
from trimllm.tasks.items import Item
from trimllm.training import losses, packing, sparse, train
from trimllm.training.packing import Example
from trimllm.training.step import Means, Stepper
from trimllm.training.train import rounding_note, train_stage
from trimllm.training.training_rows import examples, steps, task_examples, text_examples

TEXTS = ["the cat sat on the mat. a dog ran", "no hat", "yes or no: maybe yes. the man had a dog; the dog had a hat"]


@pytest.fixture
def settings():
    return TrainSettings(lr=1e-2, batch_size=40, text_ratio=1.0)


@pytest.fixture
def task(tokenizer, questions):
    return task_examples(tokenizer, questions, 64)


@pytest.fixture
def text(tokenizer):
    return text_examples(tokenizer, TEXTS, 12)


def stage(model, parameters, plan, settings, seed=0, **more):
    return train_stage(model, parameters, plan, settings, Accelerator(cpu=True), seed=seed, **more)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def apart(one, other):
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def naive_loss(model, rows):
    """Mean over all target tokens of the step, row by row, over all logits."""
    total = 0.0
    for row in rows:
        ids = torch.tensor([row.ids])
        labels = ids.clone()
        labels[0, : row.start] = -100
        logits = model(input_ids=ids, use_cache=False).logits
        total = total + torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    return total / sum(len(row.ids) - row.start for row in rows)


def naive_stage(model, parameters, plan, settings):
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    warm, losses = max(1, round(0.06 * len(plan))), []
    for number, rows in enumerate(plan):
        up, down = (number + 1) / warm, (len(plan) - number) / (len(plan) - warm + 1)
        optimizer.param_groups[0]["lr"] = settings.lr * min(up, down)
        optimizer.zero_grad()
        loss = naive_loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_only_target_and_eos_are_learnt(tokenizer):
    (example,) = task_examples(tokenizer, [Item("r:1", "the cat", (" no", " sat"), 1)], 64)
    prompt, target = tokenizer("the cat")["input_ids"], tokenizer(" sat")["input_ids"]
    assert example.ids == (*prompt, *target, 2)
    assert example.start == len(prompt)
    assert example.targets == len(target) + 1


def test_prompts_that_leave_no_room_for_eos_are_an_error_or_cut(tokenizer):
    item = Item("r:9", "the cat sat on", (" the mat",))
    (whole_row,) = task_examples(tokenizer, [item], 64)
    fits = len(whole_row.ids) - 1
    assert task_examples(tokenizer, [item], fits) == [whole_row]
    with pytest.raises(InputError, match="r:9"):
        task_examples(tokenizer, [item], fits - 1)
    (cut,) = task_examples(tokenizer, [item], fits - 1, truncate=True)
    assert cut.ids == whole_row.ids[1:]
    assert cut.targets == whole_row.targets


def test_a_written_answer_whose_end_is_cut_off_does_not_teach_to_stop(tokenizer):
    item = Item("r:9", "the cat", (" sat on the mat" * 9,), references=("sat",))
    (whole_row,) = task_examples(tokenizer, [item], 512)
    assert whole_row.ids[-1] == tokenizer.eos_token_id
    for context in (16, len(whole_row.ids) - 2):  # the last id is never an input; in the second, only EOS has no room
        (cut,) = task_examples(tokenizer, [item], context, truncate=True)
        assert cut.ids == whole_row.ids[: context + 1]
        assert (cut.start, cut.answer_cut) == (whole_row.start, True)
    assert task_examples(tokenizer, [item], len(whole_row.ids) - 1, truncate=True) == [whole_row]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_documents_longer_than_the_context_train_on_every_token(family, tokenizer, settings):
    """The last id of a row is never an input, so a full window is a legal row even for learnt positions."""
    document = "qzxwvkj" * 30
    examples = task_examples(tokenizer, [Item("doc:1", "", (document,))], 64)
    assert [token for row in examples for token in row.ids[row.start :]] == tokenizer(document)["input_ids"]
    model = tiny.build(family, 1)
    report = stage(model, list(model.parameters()), [examples], settings)
    assert report.loss > 0


def test_text_is_packed_without_loss_and_closed_by_eos(tokenizer):
    rows = text_examples(tokenizer, TEXTS, 7)
    stream = [token for text in TEXTS for token in [*tokenizer(text)["input_ids"], 2]]
    packed = [token for row in rows for token in row.ids]
    assert packed == stream[: len(packed)]
    assert len(stream) - len(packed) <= 1
    assert {len(row.ids) for row in rows[:-1]} == {7}
    assert {row.start for row in rows} == {1}


def test_no_training_rows_is_an_error(tokenizer):
    model = tiny.build("llama", 1)
    with pytest.raises(InputError, match="no training rows"):
        examples(TrimConfig(model="m", task="t", output="o"), tokenizer, model.config, [], 16)


def rows_of(kind, count):
    """Distinct rows of 3 to 9 ids; all their ids say which kind they are of."""
    return [Example(tuple(range(10**6 * kind + 100 * n, 10**6 * kind + 100 * n + 3 + n % 7)), 1) for n in range(count)]


def kind_of(row):
    return row.ids[0] // 10**6


def test_every_row_stands_once_in_an_epoch_and_batches_keep_to_the_budget(settings):
    task = rows_of(1, 50)
    plan = steps(task, [], settings, 2, seed=3)
    seen = Counter(row for batch in plan for row in batch)
    assert seen == Counter(task + task)
    assert all(len(batch) * max(len(row.ids) for row in batch) <= 40 for batch in plan)
    first = plan[: len(plan) // 2]
    assert Counter(row for batch in steps(task, [], settings, 1, seed=3) for row in batch) == Counter(task)
    assert len(first) > 3


def test_text_takes_its_ratio_in_tokens_and_never_shares_a_step(settings):
    task, text = rows_of(1, 40), rows_of(2, 500)
    for ratio in (0.5, 1.0, 3.0):
        plan = steps(task, text, settings.model_copy(update={"text_ratio": ratio}), 2, seed=0)
        tokens = Counter()
        for batch in plan:
            assert len({kind_of(row) for row in batch}) == 1
            tokens[kind_of(batch[0])] += sum(len(row.ids) for row in batch)
        assert tokens[2] == pytest.approx(ratio * tokens[1], abs=2)
    drawn = [row for batch in plan for row in batch if row in text]
    assert (
        max(Counter(drawn).values()) - min(Counter(drawn).values()) <= 1
        if len(drawn) >= 500
        else len(set(drawn)) == len(drawn)
    )
    assert all(
        kind_of(row) == 1
        for batch in steps(task, text, settings.model_copy(update={"text_ratio": 0.0}), 1, 0)
        for row in batch
    )


def test_text_rows_are_used_again_only_when_all_were_used(settings):
    text = rows_of(2, 10)
    drawn = Counter(row for batch in steps(rows_of(1, 40), text, settings, 1, 0) for row in batch if row in text)
    assert len(drawn) == 10
    assert max(drawn.values()) - min(drawn.values()) <= 1


@pytest.mark.parametrize("length", [4, 30, 900])
def test_many_short_stages_take_as_much_text_as_a_long_one(settings, length):
    """Rows of text may be longer than all the text that a stage takes: a piece of one is taken, each time another."""
    task, text = rows_of(1, 40), [Example(tuple(range(2 * 10**6, 2 * 10**6 + length)), 1)]
    stages = [steps(task, text, settings, share, seed) for seed, share in enumerate([0.1] * 8 + [3.2])]
    tokens, pieces = Counter(), set()
    for row in (row for plan in stages for batch in plan for row in batch):
        tokens[kind_of(row)] += len(row.ids)
        pieces.add(row)
    assert tokens[2] == pytest.approx(tokens[1], abs=2 * (len(stages) + 3))
    seen = {number for row in pieces if kind_of(row) == 2 for number in row.ids}
    assert len(seen) > length / 3


def test_no_step_is_of_a_few_words_of_text(settings):
    """Such a step would count as much as one of a whole batch."""
    text = [Example(tuple(range(2 * 10**6 + 10**4 * n, 2 * 10**6 + 10**4 * n + 320)), 1) for n in range(50)]
    for count in range(100, 200):
        plan = steps(rows_of(1, count), text, settings, 1, 0)
        assert min(len(row.ids) for batch in plan for row in batch if kind_of(row) == 2) >= 20


def test_a_fraction_of_an_epoch_takes_that_share_of_the_rows(settings):
    task = rows_of(1, 40)
    counts = Counter(row for batch in steps(task, [], settings, 1.25, 0) for row in batch)
    assert sorted(counts.values()) == [1] * 30 + [2] * 10
    assert sum(len(batch) for batch in steps(task, [], settings, 0.5, 0)) == 20
    assert steps(task, [], settings, 0, 0) == []


def test_the_plan_depends_on_the_seed_and_mixes_both_kinds(settings):
    task, text = rows_of(1, 60), rows_of(2, 60)
    plans = [steps(task, text, settings, 1, seed) for seed in (5, 5, 6)]
    assert plans[0] == plans[1] != plans[2]
    kinds = [kind_of(batch[0]) for batch in plans[0]]
    assert kinds != sorted(kinds)
    assert kinds != sorted(kinds, reverse=True)


def test_the_learning_rate_rises_then_falls_and_is_never_zero():
    for total in (1, 2, 5, 50, 400):
        rates = [train.schedule(step, total) for step in range(total)]
        top = rates.index(max(rates))
        assert max(rates) == 1.0
        assert min(rates) > 0
        assert top == max(1, round(0.06 * total)) - 1
        assert rates[: top + 1] == sorted(rates[: top + 1])
        assert rates[top:] == sorted(rates[top:], reverse=True)


@pytest.mark.parametrize("family", ["llama", "gpt2", "llama-tied"])
@pytest.mark.usefixtures("steady")
def test_a_stage_equals_plain_pytorch(family, task, text, settings):
    model = tiny.build(family, 3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    twin, before = copy.deepcopy(model), weights(model)
    plan = steps(task, text, settings, 2, seed=1)
    seen = []
    report = stage(model, list(model.parameters()), plan, settings, on_step=lambda *state: seen.append(state))
    losses = naive_stage(twin, list(twin.parameters()), plan, settings)
    assert [loss for _, _, loss, _ in seen] == pytest.approx(losses, abs=1e-5)
    assert apart(weights(model), weights(twin)) < 1e-6
    assert apart(weights(model), before) > 1e-3
    tail = losses[-max(1, len(losses) // 10) :]
    assert report.loss == pytest.approx(sum(tail) / len(tail), abs=1e-5)
    assert [(step, of) for step, of, _, _ in seen] == [(n, len(plan)) for n in range(1, len(plan) + 1)]
    assert all(tokens_per_second > 0 for *_, tokens_per_second in seen)
    assert report.steps == len(plan)
    assert report.tokens == sum(len(row.ids) for rows in plan for row in rows)
    assert not model.training


def test_the_first_loss_is_the_mean_over_target_tokens(task, settings):
    model = tiny.build("llama", 2)
    expected = float(naive_loss(model, task).detach())
    assert stage(model, list(model.parameters()), [task], settings).loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "llama-tied", "gpt_neox"])
def test_frozen_parameters_stay_bit_for_bit_and_every_other_one_changes(family, task, text, settings, monkeypatch):
    model = tiny.build(family, 4)
    parameters = sparse.freeze(model, whole(4), [1, 3], embeddings=False)
    before, optimizers = weights(model), []
    adamw = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda *a, **k: optimizers.append(adamw(*a, **k)) or optimizers[0])
    stage(model, parameters, steps(task, text, settings, 1, 0), settings)
    (optimizer,) = optimizers
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        trains = any(parameter is one for one in parameters)
        assert (id(parameter) in held) == trains
        assert torch.equal(parameter, before[name]) != trains, name
        assert parameter.grad is None
        assert trains or not parameter.requires_grad
    assert {id(parameter) for parameter in optimizer.state} <= held


def test_tied_embeddings_are_updated_once_per_step(task, settings):
    """Held twice, AdamW would move them twice; the plain-PyTorch test above compares the values."""
    model = tiny.build("llama-tied", 2)
    parameters = sparse.freeze(model, whole(2), [])
    assert len({id(parameter) for parameter in parameters}) == len(parameters)
    stage(model, parameters, [task], settings)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_repacked_block_trains_only_its_chosen_half(task, settings):
    layout = (Block(0, 1), Block(2, 2))
    model = surgery.apply_layout(tiny.build("llama", 3), layout)
    before = weights(model)
    stage(model, sparse.freeze(model, layout, [1], embeddings=False), [task, task], settings)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert all(name.startswith(("model.layers.0.post_attention_layernorm", "model.layers.0.mlp")) for name in changed)
    assert len(changed) == 4


@pytest.mark.usefixtures("steady")
def test_micro_batches_change_nothing(task, text, settings):
    plan = steps(task, text, settings, 1, 0)
    results = []
    for micro in (None, 12, 1):
        model = tiny.build("llama", 2)
        stage(model, list(model.parameters()), plan[:2], settings.model_copy(update={"micro_batch_size": micro}))
        results.append(weights(model))
    assert apart(results[0], results[1]) < 1e-6
    assert apart(results[0], results[2]) < 1e-6


def machine(world=1, rank=0, reduce=lambda tensor, reduction: tensor):
    return SimpleNamespace(num_processes=world, process_index=rank, device=torch.device("cpu"), reduce=reduce)


def stepper(model, accelerator, micro=None):
    return Stepper(model, accelerator, packing.Way(64), micro or 10_000, 10_000)


def gradient(model, rows, micro=None, world=1):
    """The gradient of one step, added up over the processes, and the loss that each of them adds."""
    losses, collected = [], []
    for rank in range(world):
        model.zero_grad(set_to_none=True)
        losses.append(stepper(model, machine(world, rank), micro).gradients([], rows))
        collected.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()])
    return [torch.stack(grads).sum(0) for grads in zip(*collected, strict=True)], losses


@pytest.mark.parametrize("micro", [None, 12, 1])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradients_of_all_processes_add_up_to_the_gradient_of_the_mean_loss(world, micro, task):
    model = tiny.build("llama", 2)
    for rows in (task, task[:1], task[:3]):
        model.zero_grad(set_to_none=True)
        loss = naive_loss(model, rows)
        loss.backward()
        expected = [parameter.grad.clone() for parameter in model.parameters()]
        found, losses = gradient(model, rows, micro, world)
        assert sum(losses) == pytest.approx(float(loss.detach()), abs=1e-5)
        assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < 1e-5


@pytest.fixture
def small_memory(monkeypatch):
    """Backward runs out of memory, after the fact, for micro-batches of more than two rows; it keeps the sizes."""
    work, sizes = losses.backward, []

    def backward(model, packed, scale, places, *rest):
        sizes.append(len(packed.spans))
        loss = work(model, packed, scale, places, *rest)
        if len(packed.spans) > small_memory_rows[0]:
            raise small_memory_rows[1]
        return loss

    small_memory_rows = [2, torch.OutOfMemoryError("no memory")]
    monkeypatch.setattr(losses, "backward", backward)
    backward.sizes, backward.limit = sizes, small_memory_rows
    return backward


@pytest.mark.usefixtures("steady")
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_out_of_memory_halves_the_micro_batches_and_the_step_stays_the_same(task, text, settings, small_memory, error):
    plan = [rows for rows in steps(task, text, settings, 1, 0) if len(rows) > 2][:2]
    small_memory.limit[:] = [100, error]
    plain, model, said = tiny.build("llama", 2), tiny.build("llama", 2), []
    stage(plain, list(plain.parameters()), plan, settings)
    small_memory.limit[0] = 2
    small_memory.sizes.clear()
    report = stage(model, list(model.parameters()), plan, settings, means=Means(say=said.append))
    assert apart(weights(model), weights(plain)) < 1e-6
    assert said == [f"  out of memory: micro-batches of at most {report.micro_batch_size} tokens from here on"]
    assert report.micro_batch_size <= settings.batch_size // 2
    assert small_memory.sizes[0] > 2 >= max(small_memory.sizes[1:]), "halved once, and it stays so"


def test_a_single_row_that_does_not_fit_ends_the_stage(task, settings, small_memory):
    small_memory.limit[0] = 0
    model = tiny.build("llama", 1)
    line = r"out of memory: the training of one row of \d+ tokens does not fit the device: go on with --resume --grad"
    with pytest.raises(TrimError, match=line):
        stage(model, list(model.parameters()), [task], settings)
    assert not model.training


def test_a_stage_cut_between_a_step_and_the_look_after_it_is_not_saved_there(task, settings):
    """What goes on from there would never take that look."""
    ended = []
    saves = SimpleNamespace(find=lambda *_: None, due=lambda: False, end=lambda *a: ended.append(a[-1].steps))

    class Look:
        cycle, losses = 2, ()

        def __call__(self):
            return False

    for at in (1, 2, 3):
        model = tiny.build("llama", 1)

        def cut(number, *_, at=at):
            if number == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            stage(model, list(model.parameters()), [task] * 4, settings, watch=Look(), underway=saves, on_step=cut)
    assert ended == [1, 3]


def test_other_errors_of_the_backward_pass_are_not_taken_for_memory(task, settings, small_memory):
    small_memory.limit[:] = [0, RuntimeError("a bug")]
    model = tiny.build("llama", 1)
    with pytest.raises(RuntimeError, match="a bug"):
        stage(model, list(model.parameters()), [task], settings)


def test_out_of_memory_in_one_process_halves_them_in_all(task, small_memory):
    """This process has room; another says that it ran out, once."""
    small_memory.limit[0] = 100
    model, said, cached = tiny.build("llama", 1), [], []
    answers = [torch.tensor(1.0), torch.tensor(0.0)]

    def reduce(tensor, reduction):
        return answers.pop(0) if answers else tensor

    model.zero_grad()
    steps = stepper(model, machine(2, 0, reduce))
    steps.say = said.append
    steps.prefix = SimpleNamespace(
        begin=lambda: cached.append("begun"),
        take_back=lambda: cached.append("taken back"),
        resumed=lambda packed: contextlib.nullcontext(),
    )
    steps.gradients(list(model.parameters()), task)
    assert len(said) == 1
    assert steps.size < 10_000
    assert cached == ["begun", "taken back", "begun"]
    assert steps.progress.computed == sum(len(row.ids) - 1 for row in task[::2]), "what is done again counts once"
    assert small_memory.sizes[0] > max(small_memory.sizes[1:])
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    stepper(model, machine(2, 0)).gradients(list(model.parameters()), task)
    pairs = zip(found, (parameter.grad for parameter in model.parameters()), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-5, "nothing of the step that failed is left"


def test_a_stage_reports_its_padding(task, settings):
    rows = [Example((5, 6, 7, 8, 9), 1), Example((5, 6, 7), 1)]
    model = tiny.build("mamba", 1)
    said = []
    report = stage(model, list(model.parameters()), [rows * 2], settings, means=Means(say=said.append))
    assert report.padding == pytest.approx(1 - 12 / 16)
    assert said == [
        "  rows are batched by length, not packed: model type mamba does not keep rows apart by their positions"
    ]
    model = tiny.build("llama", 1)
    assert stage(model, list(model.parameters()), [rows * 2], settings).padding == 0


@pytest.mark.usefixtures("steady")
def test_bf16_mixed_precision_computes_in_bf16_and_leaves_float32_weights(task, settings):
    model, plain, seen = tiny.build("llama", 2), tiny.build("llama", 2), set()
    mlp = model.model.layers[0].mlp
    handle = mlp.register_forward_hook(lambda module, args, out: seen.add(out.dtype) if module.training else None)
    mixed = machine()
    mixed.mixed_precision, mixed.autocast = "bf16", lambda: torch.autocast("cpu", torch.bfloat16)
    mixed.distributed_type = SimpleNamespace(value="NO")
    train_stage(model, list(model.parameters()), [task] * 3, settings, mixed)
    handle.remove()
    stage(plain, list(plain.parameters()), [task] * 3, settings)
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert 0 < apart(weights(model), weights(plain)) < 1e-2
    assert "forward" not in vars(model)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(task, text, settings):
    results = []
    for seed in (1, 1, 2):
        model = tiny.build("gpt2", 2)
        torch.manual_seed(torch.randint(1000, (1,)).item())
        stage(model, list(model.parameters()), steps(task, text, settings, 1, seed), settings, seed=seed)
        results.append(weights(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert apart(results[0], results[2]) > 1e-4


def test_dropout_follows_the_stages_seed(task, settings):
    results = []
    for seed in (1, 1, 2):
        model = tiny.build("gpt2", 1)
        stage(model, list(model.parameters()), [task], settings, seed=seed)
        results.append(weights(model))
    assert apart(results[0], results[1]) == 0
    assert apart(results[0], results[2]) > 0


@pytest.mark.parametrize("chosen", [None, [1]])
def test_gradient_checkpointing_gives_the_same_weights_and_is_off_afterwards(chosen, task, text, settings):
    plan = steps(task, text, settings, 1, 0)
    results = []
    for recompute in (False, True):
        model = tiny.build("llama", 2)
        parameters = sparse.freeze(model, whole(2), chosen, embeddings=chosen is None)
        stage(model, parameters, plan, settings.model_copy(update={"gradient_checkpointing": recompute}))
        assert not model.is_gradient_checkpointing
        results.append(weights(model))
    assert apart(*results) < 1e-6


def test_a_loss_that_is_not_a_number_stops_the_stage_naming_the_step_before_it_does_harm(task, settings):
    model = tiny.build("llama", 2)

    def poison(step, of, loss, tokens):
        if step == 2:
            model.model.norm.weight.data[0] = float("nan")
            seen.update(weights(model))

    seen = {}
    with pytest.raises(TrimError, match=r"step 3 of 5: lower --lr"):
        stage(model, list(model.parameters()), [task] * 5, settings, on_step=poison)
    after = weights(model)
    assert all(torch.equal(after[name], seen[name]) for name in seen if not name.endswith("model.norm.weight"))
    assert not model.training


def test_a_gradient_that_is_not_finite_stops_the_stage_before_it_does_harm(task, settings):
    model = tiny.build("llama", 2)
    before, plan = weights(model), steps(task, [], settings, 1, seed=0)[:1]
    head = model.get_input_embeddings().weight
    head.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrimError, match=r"^the norm of the gradients became nan at step 1 of 1: lower --lr"):
        stage(model, list(model.parameters()), plan, settings)
    assert apart(weights(model), before) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_optimizer_knows_of_a_large_gradient_fades_in_every_dtype(dtype, settings):
    weight = torch.nn.Parameter(torch.zeros(8, dtype=dtype))
    optimizer = train.adamw([weight], settings, torch.device("cpu"))
    for size in (1.0, *[0.01] * 5000):
        weight.grad = torch.full_like(weight, size)
        optimizer.step()
    assert float(optimizer.state[weight]["exp_avg_sq"].max()) < 2e-4
    assert optimizer.param_groups[0]["betas"][1] == (0.999 if dtype == torch.float32 else 0.95)


def test_nothing_to_train_is_no_stage(task, settings):
    model = tiny.build("llama", 1)
    before = weights(model)
    for parameters, plan in ((list(model.parameters()), []), ([], [task])):
        report = stage(model, parameters, plan, settings)
        assert (report.steps, report.tokens, report.loss) == (0, 0, None)
    assert apart(before, weights(model)) == 0


@pytest.mark.parametrize(("total", "cycle"), [(100, 33), (40, 13), (31, 10), (200, 33), (7, 3), (5, 9), (12, None)])
def test_every_cycle_is_about_as_long_and_ends_at_its_lowest_rate(total, cycle):
    places = [train._in_cycle(step, total, cycle) for step in range(total)]
    begins = [step for step, (place, _) in enumerate(places) if place == 0]
    lengths = [places[begin][1] for begin in begins]
    assert sum(lengths) == total
    assert max(lengths) - min(lengths) <= 1
    assert len(lengths) == max(1, round(total / cycle)) if cycle else lengths == [total]
    for begin, length in zip(begins, lengths, strict=True):
        rates = [train.schedule(*places[step]) for step in range(begin, begin + length)]
        assert rates[-1] == min(rates[1:] or rates)


@pytest.mark.parametrize("lr", [2e-5, 1e-3])
def test_steps_in_bfloat16_are_rounded_away_where_the_note_says(lr):
    """A weight of twice the threshold stays, one of half of it moves; a run in float32 has no note."""
    note = rounding_note(TrimConfig(model="m", task="t", output="o", dtype="bfloat16", lr=lr))
    threshold = float(re.search(r"in weights above about (\S+):", note)[1])
    assert "--dtype bfloat16" in note
    assert "leave it out (float32 weights" in note
    large, small = 2 * threshold, threshold / 2
    weight = torch.nn.Parameter(torch.tensor([large, small]).bfloat16())
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=0.0)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert (weight.detach() != before).tolist() == [False, True]
    assert rounding_note(TrimConfig(model="m", task="t", output="o", lr=lr)) is None


def test_gradient_checkpointing_is_refused_where_the_family_has_none(settings):
    model = tiny.build("llama", 2)
    asked = settings.model_copy(update={"gradient_checkpointing": True})
    train.check(model, asked)
    model.supports_gradient_checkpointing = False  # as JetMoE's class says
    with pytest.raises(InputError, match=r"^--gradient-checkpointing: models of type llama do not support it"):
        train.check(model, asked)
    train.check(model, settings)
