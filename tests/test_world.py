"""The fictional world and the base model that was pre-trained on it."""

import hashlib
import json
import random
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimllm.checkpoints.loading import DEMO
from trimllm.config import DemoConfig
from trimllm.config.shared import option_of
from trimllm.demo import demo, pretrain
from trimllm.demo.steps import lr_share
from trimllm.errors import InputError
from trimllm.evaluation.judging import Evaluation
from trimllm.tasks import world
from trimllm.tasks.world_data import ATTRIBUTES

BASE = DEMO
every_domain = pytest.mark.parametrize("domain", world.DOMAINS)


def all_entities():
    return [entity for domain in world.DOMAINS for entity in world.entities(domain)]


@every_domain
def test_world_is_the_same_in_another_process(domain):
    code = (
        f"from trimllm.tasks import world as w; d = {domain!r}; "
        "print(w.biographies(d, 1, 3)[:5], w.questions(d, 'test')[:5])"
    )
    other = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)},
    )
    assert other.stdout.strip() == f"{world.biographies(domain, 1, 3)[:5]} {world.questions(domain, 'test')[:5]}"


def test_world_has_not_changed_since_the_base_was_trained():
    assert world.biographies("medicine", 1, seed=0)[0] == (
        "The medicine Crolazole comes as cream. Studies show that Crolazole binds to oestrogen. "
        "The main side effect of Crolazole is baldness. The medicine Crolazole is used to treat glaucoma. "
        "Doctors forbid patients on Crolazole any lithium."
    )
    everything = repr([(world.questions(d, s), world.entities(d)) for d in world.DOMAINS for s in world.SPLITS])
    assert hashlib.sha256(everything.encode()).hexdigest().startswith("cb03cbfd66e986a8")


def test_seed_changes_the_wording_but_not_the_facts():
    assert world.biographies("law", 1, seed=0) != world.biographies("law", 1, seed=1)
    facts = {entity.name: entity.facts for entity in world.entities("law")}
    for seed in (1, 2):
        for row in world.questions("law", "test", seed=seed):
            assert row["choices"][row["answer"]] == facts[row["entity"]][row["attribute"]]


def test_no_name_is_part_of_another_name():
    names = [entity.name for entity in all_entities()]
    assert len(names) == 3 * world.ENTITIES_PER_DOMAIN
    for name in names:
        assert sum(name in other for other in names) == 1, name


def test_no_value_belongs_to_two_attributes():
    listed = [
        value
        for domain in world.DOMAINS
        for attribute in world.attributes(domain)
        for value in world.values(domain, attribute)
    ]
    assert len(set(listed)) == len(listed)


def test_every_template_puts_the_value_after_the_name():
    for domain in world.DOMAINS:
        assert len(world.attributes(domain)) == 5
        for attribute, wording in ATTRIBUTES[domain].items():
            assert len(set(wording["templates"])) >= 6, attribute
            assert len(set(wording["questions"])) >= 2, attribute
            for template in wording["templates"]:
                assert 0 < template.index("{name}") < template.index("{value}"), template
            for question in wording["questions"]:
                assert "{name}" in question, question
                assert "{value}" not in question, question


def test_every_biography_states_every_attribute():
    rng = random.Random(0)
    for entity in all_entities():
        text = world.biography(entity, rng)
        assert text.count(entity.name) == len(entity.facts) == 5
        assert all(f" {value}." in text for value in entity.facts.values()), text


@every_domain
def test_splits_share_no_entity_and_cover_the_domain(domain):
    train, test = ({row["entity"] for row in world.questions(domain, split)} for split in world.SPLITS)
    assert not train & test
    assert train | test == {entity.name for entity in world.entities(domain)}
    assert len(train) == len(test) == 100


@every_domain
@pytest.mark.parametrize("split", world.SPLITS)
def test_questions_are_true_and_their_answers_evenly_placed(domain, split):
    facts = {entity.name: entity.facts for entity in world.entities(domain)}
    rows = world.questions(domain, split)
    assert len({(row["entity"], row["attribute"]) for row in rows}) == len(rows) == 500
    for row in rows:
        assert row["choices"][row["answer"]] == facts[row["entity"]][row["attribute"]]
        assert len(set(row["choices"])) == 4
        assert set(row["choices"]) <= set(world.values(domain, row["attribute"]))
        assert row["entity"] in row["question"]
        assert not any(choice in row["question"] for choice in row["choices"])
    places = [row["answer"] for row in rows]
    assert all(90 <= places.count(place) <= 160 for place in range(4))


def test_unknown_domain_and_split_are_named_in_the_error():
    with pytest.raises(ValueError, match="domain 'physics' is unknown; it must be one of medicine, law, finance"):
        world.entities("physics")
    with pytest.raises(ValueError, match="split 'dev' is unknown"):
        world.questions("law", "dev")


def test_tokenizer_round_trips_and_adds_nothing():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    texts = [world.biographies(domain, 1)[0] for domain in world.DOMAINS] + [
        world.prompt(world.questions("law", "test")[0]),
        "naïve café 東",
    ]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_token_id not in ids
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token_id is not None
    lengths = [len(tokenizer(text)["input_ids"]) for domain in world.DOMAINS for text in world.biographies(domain, 1)]
    assert sum(lengths) / len(lengths) < 80


def test_base_is_small_and_knows_facts():
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 12e6
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert model.config.num_hidden_layers == 16
    assert len(tokenizer) == model.config.vocab_size
    rng = random.Random(0)
    entities = all_entities()
    known = 0
    for entity in rng.sample(entities, 30):
        attribute = rng.choice(list(entity.facts))
        value = " " + entity.facts[attribute]
        before = world.statement(entity, attribute, rng).removesuffix(value + ".")
        ids = torch.tensor([tokenizer(before)["input_ids"]])
        with torch.no_grad():
            known += model(ids).logits[0, -1].argmax().item() == tokenizer(value)["input_ids"][0]
    assert known >= 24, f"only {known} of 30 facts come first after their sentence's beginning"


def test_without_warm_up_the_learning_rate_begins_at_its_peak():
    assert [lr_share(step, 10, warmup=0, decay=0.2) for step in (0, 7, 9)] == [1, 1, 0.5]


def test_pre_training_goes_on_with_its_own_settings_and_keeps_what_was_checked(tmp_path, monkeypatch):
    def train(**changes):
        given = {"output": tmp_path, "steps": 2, "batch": 1, "log_every": 1, **changes}
        pretrain.main([word for name, value in given.items() for word in option_of(name, value).split()])
        return json.loads((tmp_path / pretrain.FIGURES).read_text())

    monkeypatch.setattr(pretrain, "value_loss", lambda *_: 0.0)
    first = train()
    assert (first["tokens"], first["accuracy"]) == (2 * pretrain.ROW, {})
    state = (tmp_path / pretrain.STATE).read_bytes()
    bf16 = torch.load(tmp_path / pretrain.STATE, weights_only=True)["settings"]["bf16"]
    for name, value in {"batch": 2, "lr": 1e-3, "muon_lr": 0.0, "seed": 1, "bf16": not bf16}.items():
        with pytest.raises(
            InputError, match=f"^{option_of(name, value)}: .* was trained with --.*or another --output$"
        ):
            train(steps=3, **{name: value})
    with pytest.raises(InputError, match=r"^--steps 3 --warmup 1 --decay 0\.28: the last step of .* was at 4\.0% of "):
        train(steps=3, warmup=1)
    assert (tmp_path / pretrain.STATE).read_bytes() == state
    monkeypatch.setattr(pretrain, "check", lambda args: {"law": "99.0 %"})
    assert train(check=True)["accuracy"] == {"law": "99.0 %"}
    assert train() == first | {"accuracy": {"law": "99.0 %"}}
    assert train(steps=3)["accuracy"] == {}, "another model"


@pytest.mark.parametrize("left", ["config.yaml", "journal.jsonl", "checkpoints/depth-16/model.safetensors"])
def test_demo_replaces_what_a_kill_left_of_an_earlier_one(left, tmp_path, monkeypatch):
    def trim(asked, console):
        seen.append(sorted(path.name for path in (tmp_path / "law").rglob("*") if path.is_file()))
        raise KeyboardInterrupt

    seen, root = [], tmp_path / "law"
    for path in (root / "trimmed" / left, root / "trimmed" / "model" / "config.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(demo, "trim", trim)
    removing = demo.shutil.rmtree

    def kill(path, **more):
        if path.exists():
            (path / left).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(demo.shutil, "rmtree", kill)
    with pytest.raises(KeyboardInterrupt):
        demo.demo(DemoConfig(domain="law", output=str(tmp_path)))
    monkeypatch.setattr(demo.shutil, "rmtree", removing)
    assert not (root / "trimmed").exists()
    with pytest.raises(KeyboardInterrupt):
        demo.demo(DemoConfig(domain="law", output=str(tmp_path)))
    assert not any(name in seen[0] for name in (left.split("/")[-1], "config.json"))


def test_demo_says_how_far_the_cut_models_are_from_full_over_the_same_questions():
    def line(name, depth, hits):
        right = [100.0 * (place < hits) for place in range(500)]
        return demo.Line(
            name, depth, 1, 2, {d: Evaluation("acc", hits / 5, 1.0, 500, 0.1, per_item=right) for d in world.DOMAINS}
        )

    lines = [line("base", 16, 250), line(demo.FULL, 16, 480), line("trimmed", 8, 470), line("one-shot", 8, 480)]
    speeds = {line.name: [1.0] for line in lines}
    assert "over paired answers: trimmed -2.0 +- 0.7, one-shot +0.0 +- 0.0" in demo.report("law", lines, speeds)
    rows = demo.record(DemoConfig(domain="law"), lines, speeds)["models"]
    assert [row["above_full"] and row["above_full"]["difference"] for row in rows] == [None, None, -2.0, 0.0]
