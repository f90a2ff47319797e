"""The card says what the model is, in a form that the Hub's own library reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers_run as h
import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from trimllm import cli
from trimllm.blocks.layout import dump_layout, whole
from trimllm.checkpoints.origin import Origin
from trimllm.config import TrimConfig
from trimllm.run import licences, model_card
from trimllm.run.outcome import Outcome
from trimllm.tasks import TaskData

SUMMARY = {"value": 81.25, "stderr": 1.5, "n": 500, "metric": "acc"}


def loaded(text: str) -> ModelCard:
    """The card, read by the Hub's library without leave to skip what it does not understand."""
    return ModelCard(text, ignore_metadata_errors=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a base with a licence, all depths kept."""
    root = tmp_path_factory.mktemp("card")
    with pytest.MonkeyPatch.context() as patch:
        h.fast(patch)
        base = h.save_base(root / "base", depth=4)
        (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
        (base / "LICENSE").write_text("Apache License")
        (base / "NOTICE.txt").write_text("by its authors")
        (base / "LICENSES").mkdir()
        more = {"depth": 2, "keep_checkpoints": True, "report_depths": True, "warmup_epochs": 0.2}
        h.run(base, h.save_task(root / "task"), root / "run", epochs_per_drop=0.2, **more)
    return root / "run"


def has_terms(folder: Path) -> bool:
    return [(folder / name).read_text() for name in ("LICENSE", "NOTICE.txt")] == ["Apache License", "by its authors"]


def test_card_of_a_run_names_base_licence_layers_scores_and_accuracy(run: Path) -> None:
    card, result = loaded((run / "model" / "README.md").read_text()), h.result(run)
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.data.get("base_model") is None, "a directory is no name on the Hub"
    measured = card.data.eval_results[0]
    assert measured.metric_value == pytest.approx(result["test"]["value"], abs=1e-3)
    assert measured.metric_args["standard_error"] == pytest.approx(result["test"]["stderr"], abs=1e-3)
    assert measured.metric_args["rows"] == result["test"]["n"] == 8
    assert (measured.metric_type, measured.metric_name, measured.dataset_split) == ("accuracy", "acc", "test")
    assert f"layers {result['layers']} of the base" in card.text
    assert result["base"]["sha256"] in card.text
    assert f"Base: `{result['base']['name']}`" in card.text
    assert "it was fine-tuned on `task` while layers were dropped" in card.text
    assert has_terms(run / "model")
    assert "AutoModelForCausalLM.from_pretrained" in card.text
    for drop in result["drops"]:
        assert f"| {drop['units'][0]} | {drop['value'][0]:.1f} | {drop['importance'][0]:.4g} |" in card.text


def outcome(config: TrimConfig, task: str, *, kept: int, **rows: Any) -> Outcome:
    """A run that ended with so many layers of an adapter's base."""
    return Outcome(
        config=config,
        data=TaskData(task, "choice", "acc", (), (), ()),
        origin=Origin("org/base-7B", adapter="org/lora", sha256="abc"),
        good={"layout": dump_layout(whole(kept))},
        **{"saved": {}, "warned": (), "drops": [], "above": None, "speedup": None, "verified": None, **rows},
    )


@pytest.mark.parametrize(
    ("warm", "after", "changes", "made"),
    [
        (3, 0, {}, "it was fine-tuned on `task`, then layers were dropped, and nothing was trained since\n(TrimLLM"),
        (0, 2, {}, "it was fine-tuned on `task` while layers were dropped\n(TrimLLM"),
        (3, 2, {"one_shot": True}, "it was fine-tuned on `task`, layers were dropped at once, and it was trained on\n"),
        (0, 2, {"one_shot": True}, "layers were dropped at once, then it was fine-tuned on `task`\n"),
        (0, 0, {"one_shot": True}, "layers were dropped at once by what they are worth on `task`, and nothing was"),
    ],
)
def test_card_says_what_was_trained_and_when(
    warm: int, after: int, changes: dict[str, bool], made: str, tmp_path: Path
) -> None:
    stages = [
        {"depth": 4, "dropped": [], "train": {"steps": warm}},
        {"depth": 2, "dropped": [{"units": ["block 1", "block 2"]}], "train": {"steps": after}},
    ]
    config = TrimConfig(model="m", task="t", output=str(tmp_path), keep=0.5, **changes)
    told = model_card._made(outcome(config, "task", base={"depth": 4}, stages=stages, kept=2))
    assert told.startswith(made)
    assert ("sparse update" in told) == (after > 0)


def test_card_of_a_kept_depth_lists_only_the_drops_down_to_it(run: Path, tmp_path: Path) -> None:
    assert cli.main(["export", str(run), "--depth", "3", "--output", str(tmp_path / "three")]) == 0
    card = loaded((tmp_path / "three" / "README.md").read_text())
    first, second = (drop["units"][0] for drop in h.result(run)["drops"])
    assert has_terms(tmp_path / "three")
    assert f"| {first} |" in card.text
    assert f"| {second} |" not in card.text
    assert f"layers {json.loads((tmp_path / 'three' / 'plan.json').read_text())['layers']}" in card.text
    stage = next(stage for stage in h.journal(run, "stage") if stage["depth"] == 3)
    assert f"{stage['test']['value']:.1f} +- {stage['test']['stderr']:.1f} on the 8 reported ones" in card.text
    assert card.data.license == "apache-2.0"


def test_a_kept_depth_carries_the_terms_of_a_base_that_was_named_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h.fast(monkeypatch)
    monkeypatch.chdir(tmp_path)
    base = h.save_base(Path("base"), depth=4)
    (base / "LICENSE").write_text("Apache License")
    (base / "NOTICE.txt").write_text("by its authors")
    h.run(base, h.save_task(Path("task")), Path("run"), depth=3, warmup_epochs=0, epochs_per_drop=0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(licences, "hf_hub_download", lambda *_: pytest.fail("asked the Hub"))
    assert cli.main(["export", "../run", "--depth", "3", "--output", "three"]) == 0
    assert has_terms(Path("three"))
    card = loaded(Path("three/README.md").read_text())
    assert card.data.license == "apache-2.0"
    assert card.data.base_model is None
    assert "Base: `base`" in card.text


@pytest.mark.parametrize("more", [[], ["--streaming"]], ids=["in memory", "streaming"])
def test_card_of_a_bare_cut_says_that_nothing_was_trained(run: Path, tmp_path: Path, more: list[str]) -> None:
    words = ["--model", str(run.parent / "base"), "--layers", "1,2", "--output", str(tmp_path / "cut")]
    assert cli.main(["drop", *words, *more]) == 0
    card = loaded((tmp_path / "cut" / "README.md").read_text())
    assert has_terms(tmp_path / "cut")
    assert "cut to 2 of 4 layers" in card.text
    assert "nothing was trained since" in card.text
    assert "layers [0, 3] of the base" in card.text
    assert card.data.license == "apache-2.0"
    assert not card.data.eval_results


def test_names_on_the_hub_of_base_and_data_become_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(licences, "_file", lambda base, name: None)
    config = TrimConfig(model="org/base-7B", task="pubmedqa", output="o")
    row: dict[str, Any] = {"depth": 3, "event": "saved", "calibration": SUMMARY, "test": SUMMARY}
    row |= {"parameters": 1, "bytes": 1, "tokens_per_second": 1.0}
    made = outcome(config, "pubmedqa", base=row | {"event": "base"}, stages=[], kept=3, saved=row)
    card = loaded(model_card.trimmed(made))
    assert card.data.base_model == "org/base-7B"
    assert card.data.datasets == ["qiaojin/PubMedQA"]
    assert card.data.eval_results[0].dataset_type == "qiaojin/PubMedQA"
    assert card.data.eval_results[0].dataset_config == "pqa_labeled"
    assert card.data.eval_results[0].metric_value == 81.25
    assert card.data.metrics == ["accuracy"]
    assert "acc 81.2 +- 1.5 (n=500)" in card.text
    assert "with the adapter `org/lora` merged" in card.text


@pytest.mark.parametrize(
    ("files", "expected", "says"),
    [
        ({"README.md": "---\nlicense: mit\n---\n"}, {"license": "mit"}, "card of the base"),
        (
            {"README.md": "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---\n"},
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
            "Licence: llama3",
        ),
        ({"config.json": '{"license": "gemma"}'}, {"license": "gemma"}, "config of the base"),
        ({"LICENSE": "\n   Apache License\n   Version 2.0"}, {"license": "apache-2.0"}, "file LICENSE"),
        ({"LICENSE": "GNU GENERAL PUBLIC LICENSE\n  Version 2, June 1991"}, {"license": "gpl-2.0"}, "gpl-2.0"),
        ({"LICENCE": "GNU LESSER GENERAL PUBLIC LICENSE\nVersion 2.1,"}, {"license": "lgpl-2.1"}, "file LICENCE"),
        ({"LICENSE": "GNU GENERAL PUBLIC LICENSE\nVersion 9"}, {"license": "other"}, "read it before"),
        ({"README.md": "---\nlicense: [mit, apache-2.0]\n---\n"}, {"license": "other"}, "Licence: mit, apache-2.0, as"),
        ({"README.md": "---\nlicense: [mit\n---\n# Hi"}, {"license": "other"}, "Licence: unknown"),
        (
            {"README.md": "---\nlicense: [mit\n---\n\n---\nlicense: [mit\n---\n# Hi"},
            {"license": "other"},
            "Licence: unknown",
        ),
        ({"README.md": "---\n- license\n---\n# Hi"}, {"license": "other"}, "Licence: unknown"),
        ({"README.md": "---\nlicense: mit\n---\n\udcff"}, {"license": "mit"}, "Licence: mit"),
        ({"LICENSE.txt": "My own terms"}, {"license": "other", "license_link": "LICENSE.txt"}, "read it before"),
        ({"README.md": "# No metadata"}, {"license": "other", "license_name": "unknown"}, "Licence: unknown"),
        ({}, {"license": "other", "license_name": "unknown"}, "Licence: unknown"),
    ],
)
def test_licence_is_that_of_the_base_or_said_to_be_unknown(
    tmp_path: Path, files: dict[str, str], expected: dict[str, str], says: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    card = loaded(model_card.cut(Origin(str(tmp_path)), whole(2), 3))
    assert {name: card.data.get(name) for name in expected} == expected
    assert says in card.text


def test_licence_of_a_base_on_the_hub_is_read_there_if_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: llama3\n---\n")
    asked = []

    def download(repo: str, name: str) -> str:
        asked.append((repo, name))
        if name != "README.md" or repo != "org/base":
            raise huggingface_hub.errors.LocalEntryNotFoundError("no network")
        return str(tmp_path / name)

    monkeypatch.setattr(licences, "hf_hub_download", download)
    assert licences.licence(Origin("org/base")).id == "llama3"
    assert asked == [("org/base", "README.md")]
    assert licences.licence(Origin("org/other")).more == {"license_name": "unknown"}


def test_a_drop_that_a_floor_took_back_is_not_in_the_card() -> None:
    def stage(depth: int, unit: str, metric: str = "acc") -> dict[str, Any]:
        drop = {"units": [unit], "metric": metric, "value": [50.0], "importance": [0.1], "why": ["least"]}
        return {"depth": depth, "dropped": [drop]}

    rows = [stage(3, "block 1"), stage(2, "block 0")]
    config = TrimConfig(model="m", task="t", output="o")
    text = model_card._scores(config, rows, 3)
    assert "| block 1 | 50.0 | 0.1 | least |" in text
    assert "block 0" not in text
    decided = "; importance, the score that decided, is 100 less the mean probability of the right choice:"
    papers = config.model_copy(update={"strategy": "scan+norm"})
    asked = [(config, "acc"), (config, "likelihood"), (papers, "acc")]
    told = [model_card._scores(one, [stage(3, "block 1", metric)], 3) for one, metric in asked]
    assert [decided in text for text in told] == [True, False, False]


def test_the_embedded_model_is_its_own_origin_without_a_licence_of_its_own() -> None:
    assert licences.licence(Origin("demo")).id == "other"
    assert Origin.of("demo").record() == "demo"


@pytest.mark.parametrize(
    "record", ["org/base", {"name": "org/base", "adapter": "a"}, {"name": "b", "adapter": "a", "sha256": "c"}]
)
def test_an_origin_is_what_its_record_says(record: Any) -> None:
    assert Origin.load(record).record() == record


def test_a_base_is_on_the_hub_if_its_name_can_only_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    there = {"gpt2": tmp_path}
    monkeypatch.setattr(model_card.loading, "on_disk", there.get)
    named = ("org/base", "gpt2", "here", "./base", "demo", "gone-folder")
    assert [model_card._on_hub(name) for name in named] == [True, True, False, False, False, False]
