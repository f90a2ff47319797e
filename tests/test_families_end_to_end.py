"""Whole runs on a tiny random checkpoint of each family: trimmed, reloaded by stock transformers, generating."""

import helpers_run as h
import pytest
import torch
from tiny import CONFIGS, randomize
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trimllm.bench import timing
from trimllm.checkpoints.loading import DEMO, load_tokenizer

pytestmark = pytest.mark.usefixtures("fast")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "opt", "gpt_neox", "mixtral")
IDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return h.save_task(tmp_path_factory.mktemp("task"), train=10, test=4)


def checkpoint(family, folder, dtype=torch.float32):
    """Four layers with the vocabulary of the embedded model's tokenizer."""
    values = {name: value(4) if callable(value) else value for name, value in CONFIGS[family].items()}
    values |= {"vocab_size": len(load_tokenizer(DEMO)), **IDS}
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, num_hidden_layers=4, **values))
    return h.save_model(randomize(made.float()).to(dtype), folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_trimmed_by_two_blocks_and_stays_stock(family, task, tmp_path):
    base = checkpoint(family, tmp_path / "base")
    returned, history = h.run(
        base, task, tmp_path / "run", depth=2, calibration_size=3, batch_size=256, max_length=64, drops_per_stage=2
    )
    assert [row["depth"] for row in history] == [4, 4, 2, 2]
    assert_stock(tmp_path / "run" / "model", returned, 2, torch.float32)
    assert (tmp_path / "run" / "model" / "config.json").read_text().count("trimllm") == 0


def test_bfloat16_checkpoint_with_pairs_is_trimmed_in_bfloat16(task, tmp_path):
    base = checkpoint("qwen3", tmp_path / "base", torch.bfloat16)
    returned, _ = h.run(base, task, tmp_path / "run", depth=3, calibration_size=3, dtype="bfloat16", unit="pair")
    assert_stock(tmp_path / "run" / "model", returned, 3, torch.bfloat16)


def assert_stock(folder, returned, depth, dtype):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (model.config.num_hidden_layers, model.dtype) == (depth, dtype)
    prompt = AutoTokenizer.from_pretrained(folder)("Question: who?\nAnswer:", return_tensors="pt")
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape[1] == ids.shape[1] + 5
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, returned(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "recurrent_gemma"])
def test_decode_speed_is_measured_whatever_the_model_calls_its_cache(family, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family, tmp_path / "base"))
    assert timing.decode_once(model, new=3) > 0
