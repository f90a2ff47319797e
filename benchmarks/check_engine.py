"""Does a trimmed checkpoint mean the same to vLLM or SGLang as to transformers, and how fast does it decode there?

    python benchmarks/check_engine.py --engine vllm --model runs/medicine/model --reference path/to/the/base
    python benchmarks/check_engine.py --engine sglang --model runs/medicine/model

Run it in an environment that has the engine, on a machine with a GPU (docs/engines.md). Prompts are given as token
ids, so that tokenizers have no part in it. Compared are the greedy text of each prompt and the log-probability of each
of its tokens. Where two tokens are as likely as each other, within the tolerance, engines may choose either: such a
place is counted as a tie, and the text after it is not compared. With --reference, tokens/s of the untrimmed model and
of the trimmed one follow. Each model is loaded in a process of its own, one after the other. The last line is one JSON
object; the exit code is 1 if the engine differs, and 2 if it is not there.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

PROMPTS = (
    "The first thing that a doctor asks a patient with a fever is",
    "A contract is binding when both parties",
    "Interest on a loan is paid to",
    "In the morning the train to the coast leaves at",
    "Water boils at a lower temperature in the mountains because",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "Question: Which planet is nearest to the sun?\nAnswer:",
    "The river rises in the hills, runs through two lakes and",
)
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.05}
"""Largest difference of log-probabilities, by dtype: kernels add up in another order. Not measured on these engines;
see --tolerance."""

Tokens = list[int]


class Engine(Protocol):
    """What is asked of an engine."""

    def greedy(self, prompts: list[Tokens], new: int) -> list[Tokens]:
        """The `new` tokens that follow each prompt, past any end-of-text token."""

    def logprobs(self, prompts: list[Tokens]) -> list[list[float]]:
        """The log-probability of each token of each prompt but its first."""


@dataclass(frozen=True)
class Expected:
    """What transformers computes for one prompt."""

    prompt: Tokens
    text: Tokens
    """greedy continuation"""
    margins: list[float]
    """at each token of `text`: by how much its log-probability exceeds that of the next best"""
    logprobs: list[float]
    """of the tokens of the prompt but the first"""


@dataclass(frozen=True)
class Comparison:
    """How far an engine is from transformers."""

    prompts: int
    equal: int
    """prompts whose greedy text is the same"""
    ties: int
    """prompts whose text differs from a tie on"""
    logprob_difference: float
    tolerance: float
    same: bool


def compare(engine: Engine, expected: list[Expected], tolerance: float) -> Comparison:
    """Ask `engine` for greedy text and log-probabilities and compare them with `expected`."""
    prompts = [row.prompt for row in expected]
    found = engine.greedy(prompts, len(expected[0].text))
    equal = ties = 0
    for row, text in zip(expected, found, strict=True):
        places = zip(row.text, text, row.margins, strict=True)
        margin = next((margin for ours, theirs, margin in places if ours != theirs), None)
        equal += margin is None
        ties += margin is not None and margin <= tolerance
    pairs = zip(expected, engine.logprobs(prompts), strict=True)
    differences = [abs(a - b) for row, values in pairs for a, b in zip(row.logprobs, values, strict=True)]
    largest = max(differences) if all(value == value for value in differences) else float("nan")
    same = equal + ties == len(expected) and largest <= tolerance
    return Comparison(len(expected), equal, ties, largest, tolerance, same)


def speed(engine: Engine, prompts: list[Tokens], new: int, repeats: int, clock: Callable[[], float]) -> list[float]:
    """New tokens per second over all prompts at once, prompts included in the time, after one warm-up."""
    engine.greedy(prompts, new)
    speeds = []
    for _ in range(repeats):
        began = clock()
        count = sum(map(len, engine.greedy(prompts, new)))
        speeds.append(count / (clock() - began))
    return speeds


def expect(folder: str, dtype: str, prompts: list[str], new: int) -> list[Expected]:
    """What transformers computes, one prompt at a time, without padding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    # Not as arguments of `generate`: what is None there is filled from the model's own, and its end of text with it.
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=new, pad_token_id=0)
    rows = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
        with torch.no_grad():
            whole = model.generate(ids, attention_mask=torch.ones_like(ids))
            scores = model(input_ids=whole[:, :-1], use_cache=False).logits[0].float().log_softmax(-1)
        given = scores.gather(1, whole[0, 1:, None])[:, 0]
        start = ids.shape[1] - 1
        best = scores[start:].topk(2).values
        rows.append(
            Expected(
                prompt=ids[0].tolist(),
                text=whole[0, ids.shape[1] :].tolist(),
                margins=(best[:, 0] - best[:, 1]).tolist(),
                logprobs=given[:start].tolist(),
            )
        )
    return rows


class Vllm:
    """vLLM's offline engine."""

    def __init__(self, folder: str, dtype: str, memory: float, length: int) -> None:
        import vllm

        self.parameters = vllm.SamplingParams
        self.model = vllm.LLM(
            model=folder,
            dtype=dtype,
            gpu_memory_utilization=memory,
            max_model_len=length,
            enable_prefix_caching=False,  # cached prefixes have no log-probabilities
        )

    def _run(self, prompts: list[Tokens], **settings: Any) -> list[Any]:
        rows = [{"prompt_token_ids": prompt} for prompt in prompts]
        done: list[Any] = self.model.generate(rows, self.parameters(temperature=0.0, **settings), use_tqdm=False)
        return done

    def greedy(self, prompts: list[Tokens], new: int) -> list[Tokens]:
        done = self._run(prompts, max_tokens=new, ignore_eos=True)
        return [list(row.outputs[0].token_ids) for row in done]

    def logprobs(self, prompts: list[Tokens]) -> list[list[float]]:
        done = self._run(prompts, max_tokens=1, prompt_logprobs=0)
        return [
            [place[token].logprob for token, place in zip(prompt[1:], row.prompt_logprobs[1:], strict=True)]
            for prompt, row in zip(prompts, done, strict=True)
        ]


class Sglang:
    """SGLang's offline engine."""

    def __init__(self, folder: str, dtype: str, memory: float, length: int) -> None:
        import sglang

        self.model = sglang.Engine(
            model_path=folder,
            dtype=dtype,
            mem_fraction_static=memory,
            context_length=length,
            disable_radix_cache=True,  # cached prefixes have no log-probabilities
            log_level="error",
        )

    def greedy(self, prompts: list[Tokens], new: int) -> list[Tokens]:
        settings = {"temperature": 0.0, "max_new_tokens": new, "ignore_eos": True}
        return [row["output_ids"] for row in self.model.generate(input_ids=prompts, sampling_params=settings)]

    def logprobs(self, prompts: list[Tokens]) -> list[list[float]]:
        settings = {"temperature": 0.0, "max_new_tokens": 1}
        done = self.model.generate(
            input_ids=prompts, sampling_params=settings, return_logprob=True, logprob_start_len=0
        )
        # Each place: log-probability, token id, text. The first token has none.
        return [[place[0] for place in row["meta_info"]["input_token_logprobs"][1:]] for row in done]


ENGINES: dict[str, Callable[[str, str, float, int], Engine]] = {"vllm": Vllm, "sglang": Sglang}


def measure(options: argparse.Namespace, folder: str, expected: list[Expected], check: bool) -> dict[str, Any]:
    """Load `folder` in the engine; compare it with `expected` if asked to, and measure its speed."""
    new = options.speed_tokens
    length = max(len(row.prompt) for row in expected) + max(new, options.new) + 1
    engine = ENGINES[options.engine](folder, options.dtype, options.memory, length)
    tolerance = TOLERANCE[options.dtype] if options.tolerance is None else options.tolerance
    result: dict[str, Any] = asdict(compare(engine, expected, tolerance)) if check else {}
    prompts = [row.prompt for row in expected] * options.copies
    return result | {"tokens_per_s": speed(engine, prompts, new, options.repeats, time.perf_counter)}


def alone(job: Callable[..., Any], *arguments: Any) -> Any:
    """Run `job` in a fresh process, which gives the GPU's memory back when it ends."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(job, *arguments).result()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--model", required=True, help="directory of the trimmed checkpoint")
    parser.add_argument("--reference", help="the untrimmed model, to compare speed with")
    parser.add_argument("--prompts", type=Path, help="text file with one prompt a line (default: eight short ones)")
    parser.add_argument("--new", type=int, default=32, help="tokens of greedy text to compare (default: 32)")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32", help="of both sides (default: float32)")
    parser.add_argument("--tolerance", type=float, help=f"of log-probabilities (default, by dtype: {TOLERANCE})")
    parser.add_argument("--memory", type=float, default=0.8, help="share of the GPU for the engine (default: 0.8)")
    parser.add_argument("--speed-tokens", type=int, default=256, help="new tokens per prompt when timed (default: 256)")
    parser.add_argument("--copies", type=int, default=4, help="copies of the prompts in a timed batch (default: 4)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default: 5)")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec(options.engine) is None:
        parser.error(f"{options.engine} is not installed here: install it in an environment of its own")
    for name in ("model", "reference"):
        folder = getattr(options, name)
        if folder is not None and not (Path(folder) / "config.json").exists():
            parser.error(f"--{name} {folder}: there is no config.json: give the directory of a checkpoint")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    prompts = options.prompts.read_text(encoding="utf-8").splitlines() if options.prompts else list(PROMPTS)
    expected = alone(expect, options.model, options.dtype, [line for line in prompts if line.strip()], options.new)
    record = {"engine": options.engine, "version": version(options.engine), "dtype": options.dtype}
    record |= alone(measure, options, options.model, expected, True)
    print(
        f"{options.model}: greedy text of {record['equal']} of {record['prompts']} prompts equal, "
        f"{record['ties']} more up to a tie; log-probabilities differ by {record['logprob_difference']:.2g} "
        f"(allowed: {record['tolerance']})"
    )
    trimmed = statistics.median(record["tokens_per_s"])
    print(f"trimmed: {trimmed:.0f} tokens/s, median of {options.repeats}")
    if options.reference:
        record["reference_tokens_per_s"] = alone(measure, options, options.reference, expected, False)["tokens_per_s"]
        dense = statistics.median(record["reference_tokens_per_s"])
        record["speed_up"] = trimmed / dense
        print(f"untrimmed: {dense:.0f} tokens/s; the trimmed model is {trimmed / dense:.2f} times as fast")
    print(json.dumps(record))
    return 0 if record["same"] else 1


if __name__ == "__main__":
    sys.exit(main())
