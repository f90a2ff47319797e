"""A fictional knowledge world: three domains of invented entities, their biographies, and four-way questions.

A base model is pre-trained on the biographies alone (`trimllm.demo.pretrain`), so whatever it answers about an entity
that was never in a training question has come out of biographies: those of pre-training, and those that a run mixes in
as domain text (`--text demo_law`), which state the facts of all entities again, the held-out ones included. That makes
the world a tiny stand-in for "a language model that knows things":

    >>> from trimllm.tasks import world
    >>> world.biographies("medicine", 1, seed=0)[0]
    'The medicine Crolazole comes as cream. Studies show that Crolazole binds to oestrogen. ...'
    >>> world.questions("medicine", "test")[0]["question"]
    'What does the medicine Pudavir interact with?'

Every domain has 200 entities with 5 attributes; a value comes from a closed list of 12. The entities are split in two
halves: questions about the first 100 are for training (500 questions), questions about the other 100 are held out (500
questions). Biographies cover all.

Only the standard library is used, and only `Random.choice` and `Random.shuffle` seeded by a string: the world is the
same on every supported Python version.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from trimllm.tasks.world_data import ATTRIBUTES, HEAD_CODAS, HEAD_ONSETS, HEAD_VOWELS, NAMES

WORLD_SEED = 2026
DOMAINS = tuple(ATTRIBUTES)
ENTITIES_PER_DOMAIN = 200
TRAIN_ENTITIES = 100
CHOICES = 4
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Entity:
    """One invented drug, statute or company.

    Args:
        name (`str`): full name, unique in the world and never a part of another name.
        domain (`str`): one of `DOMAINS`.
        facts (`dict[str, str]`): attribute -> value, in the order of `attributes(domain)`.
    """

    name: str
    domain: str
    facts: dict[str, str]


def attributes(domain: str) -> tuple[str, ...]:
    """Names of a domain's five attributes."""
    _check("domain", domain, DOMAINS)
    return tuple(ATTRIBUTES[domain])


def values(domain: str, attribute: str) -> tuple[str, ...]:
    """The closed list of values of an attribute (12, shared with no other attribute)."""
    _check("attribute", attribute, attributes(domain))
    return tuple(ATTRIBUTES[domain][attribute]["values"])


@cache
def _names() -> dict[str, tuple[str, ...]]:
    """Names of all entities by domain; each takes a head of its own, so that no name is a part of another."""
    rng = random.Random(f"{WORLD_SEED}:names")
    heads = [onset + vowel + coda for onset in HEAD_ONSETS for vowel in HEAD_VOWELS for coda in HEAD_CODAS]
    rng.shuffle(heads)
    return {
        domain: tuple(
            rng.choice(recipe["patterns"]).format(stem=heads.pop() + rng.choice(recipe["endings"]))
            for _ in range(ENTITIES_PER_DOMAIN)
        )
        for domain, recipe in NAMES.items()
    }


@cache
def entities(domain: str) -> tuple[Entity, ...]:
    """The 200 entities of a domain, in a fixed order; every value is drawn independently and uniformly."""
    _check("domain", domain, DOMAINS)
    rng = random.Random(f"{WORLD_SEED}:{domain}:facts")
    return tuple(
        Entity(name, domain, {attribute: rng.choice(values(domain, attribute)) for attribute in attributes(domain)})
        for name in _names()[domain]
    )


def entity_split(domain: str, split: str) -> tuple[Entity, ...]:
    """The 100 entities whose questions are for training (`"train"`) or held out (`"test"`)."""
    _check("split", split, SPLITS)
    shuffled = list(entities(domain))
    random.Random(f"{WORLD_SEED}:{domain}:split").shuffle(shuffled)
    return tuple(shuffled[:TRAIN_ENTITIES] if split == "train" else shuffled[TRAIN_ENTITIES:])


def statement(entity: Entity, attribute: str, rng: random.Random) -> str:
    """One sentence that states one fact, in one of the attribute's six wordings; the value follows the name."""
    template = rng.choice(ATTRIBUTES[entity.domain][attribute]["templates"])
    return template.format(name=entity.name, value=entity.facts[attribute])


def biography(entity: Entity, rng: random.Random) -> str:
    """All facts of an entity: one sentence per attribute, random wordings, shuffled sentences."""
    sentences = [statement(entity, attribute, rng) for attribute in entity.facts]
    rng.shuffle(sentences)
    return " ".join(sentences)


def biographies(domain: str, n_per_entity: int, seed: int = 0) -> list[str]:
    """`n_per_entity` biographies of each of the domain's 200 entities (both splits), shuffled.

    `seed` picks wordings and order only; the facts are always those of `WORLD_SEED`.
    """
    rng = random.Random(f"{seed}:{domain}:biographies")
    texts = [biography(entity, rng) for entity in entities(domain) for _ in range(n_per_entity)]
    rng.shuffle(texts)
    return texts


def questions(domain: str, split: str, seed: int = WORLD_SEED) -> list[dict]:
    """Four-way questions, one per (entity, attribute) of the split: 500 rows in a shuffled order.

    The options are not part of the prompt: score `" " + choice` as the continuation of `prompt(row)`.

    Args:
        domain (`str`): one of `DOMAINS`.
        split (`str`): `"train"` or `"test"`; the two share no entity, whatever the seed.
        seed (`int`, *optional*, defaults to `WORLD_SEED`): picks wordings, distractors, the answer's position and the
            order; never the facts or the split.

    Returns:
        `list[dict]`: rows with `question` (`str`), `choices` (4 different `str` of one closed list), `answer` (`int`,
        index of the true choice), `entity` (`str`, its name) and `attribute` (`str`).
    """
    rng = random.Random(f"{seed}:{domain}:{split}:questions")
    rows = []
    for entity in entity_split(domain, split):
        for attribute, value in entity.facts.items():
            wrong = [other for other in values(domain, attribute) if other != value]
            rng.shuffle(wrong)
            choices = [value, *wrong[: CHOICES - 1]]
            rng.shuffle(choices)
            wording = rng.choice(ATTRIBUTES[domain][attribute]["questions"])
            rows.append(
                {
                    "question": wording.format(name=entity.name),
                    "choices": choices,
                    "answer": choices.index(value),
                    "entity": entity.name,
                    "attribute": attribute,
                }
            )
    rng.shuffle(rows)
    return rows


def prompt(row: dict) -> str:
    """The text a question row's choices continue; a continuation is a space and the choice."""
    return f"Question: {row['question']}\nAnswer:"


def _check(what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} {value!r} is unknown; it must be one of {', '.join(allowed)}")
