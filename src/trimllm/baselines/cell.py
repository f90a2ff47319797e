"""One row of the comparison, in a process of its own: make the checkpoint, evaluate it, time it, write `row.json`.

    python -m trimllm.baselines.cell OUTPUT METHOD [KEEP]

`OUTPUT/config.yaml` holds the settings. A method that cannot run leaves a row that says why; a traceback, with another
exit code than 0, is for bugs.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimllm import startup
from trimllm.baselines import METHODS, Cell
from trimllm.config import CompareConfig, plain_settings
from trimllm.errors import InputError, TrimError, one_line
from trimllm.run import placing

if TYPE_CHECKING:
    from trimllm.baselines.job import Job, Product


def main(arguments: list[str]) -> int:
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported: a bar per layer says little here
    root, name, *keep = arguments
    command = plain_settings.make(CompareConfig, placing.stored_settings(root, CompareConfig))
    cell = Cell(METHODS[name], float(keep[0]) if keep else None)
    try:
        check_libraries(cell)
        with startup.termination_raises(again=signal.SIG_IGN):  # it may have come to both, and comes once more
            row = measure(command, cell, Path(root))
    except TrimError as error:
        row = {"status": "not run", "why": one_line(error)}
    except RuntimeError as error:
        from trimllm import memory

        if not memory.is_out_of_memory(error):
            raise
        row = {"status": "not run", "why": "out of memory on the device: a smaller --micro-batch-size may help"}
    except startup.Terminated:  # the comparison, which sends it, says so
        return 128 + signal.SIGTERM
    from trimllm import files

    files.write_json(cell.file(Path(root)), {"method": name, "keep": cell.keep, **row})
    if row["status"] == "done":  # until then it is gone on with
        cell.file(Path(root)).with_name(placing.STAGE).unlink(missing_ok=True)
    return 0


def missing(cell: Cell) -> list[str]:
    """Libraries of the method that are not in this environment."""
    return [library for library in cell.method.needs if find_spec(library) is None]


def check_libraries(cell: Cell) -> None:
    """Raises InputError if a library of the method is not here; the line names the extra that brings it."""
    if absent := missing(cell):
        raise InputError(
            f"needs {', '.join(absent)}: pip install 'trimllm[{cell.method.extra}]', here or in another environment "
            "that --baselines-python names"
        )


def measure(command: CompareConfig, cell: Cell, root: Path) -> dict[str, Any]:
    """The row: what the method made, how good, how large and how fast it is, and what making it took."""
    with startup.uncollected():
        import torch
        import transformers

        from trimllm import memory
        from trimllm.baselines.job import Job

    transformers.utils.logging.disable_progress_bar()
    if command.threads:
        torch.set_num_threads(command.threads)
    job = Job(command, cell, root)
    for name in cell.method.after:
        job.check_earlier(name)
    module = importlib.import_module(f"trimllm.baselines.{cell.method.module}")
    job.folder.mkdir(parents=True, exist_ok=True)
    product: Product = module.run(job)
    memory.release()
    found = evaluate(job, product)
    memory.release()  # the processes that measure the speed share the device with this one
    made = {key: value for key, value in asdict(product).items() if key != "checkpoint"}
    return {
        "status": "done",
        "checkpoint": relative(product.checkpoint, root),
        **made,
        "conditions": conditions(command),
        **found,
        "speed": speed(command, product),
    }


def relative(path: str | Path, root: Path) -> str:
    """A path inside the comparison from there on, so that its folder can be moved; others as they are."""
    inside = Path(path).is_absolute() is root.is_absolute() and Path(path).is_relative_to(root)
    return str(Path(path).relative_to(root) if inside else path)


def evaluate(job: Job, product: Product) -> dict[str, Any]:
    """The reported split of the task and of those of --also, by the checkpoint as it stands on the disk; what it
    answered to each item goes into a file beside the row."""
    from trimllm import files
    from trimllm.bench import benching
    from trimllm.blocks import decoder
    from trimllm.evaluation import inputs, paired

    loaded = job.load(product.checkpoint, training=False, evaluating=True)
    found, answers = {}, {}
    for settings in tasks(job.command):
        data = inputs.task_data(settings, loaded.tokenizer, reported_only=True)
        scorer = inputs.scorer(settings, loaded.model, loaded.tokenizer, data.test)
        evaluation = scorer.evaluate(loaded.model, data.metric)
        found[data.name] = evaluation.summary()
        answers[data.name] = paired.answers(evaluation.per_item, data.test)
    files.write_json(job.cell.answers(job.root), answers)
    return {
        "accuracy": found,
        "depth": decoder.depth(loaded.model),
        "parameters": benching.parameters(loaded.model, trust_remote_code=job.command.trust_remote_code),
        "disk_bytes": benching.disk_bytes(str(product.checkpoint), job.command.allow_pickle),
    }


def tasks(command: CompareConfig) -> list[CompareConfig]:
    """The settings for each task that models are evaluated on: the comparison's own, and those of --also."""
    also = [{"task": task, "task_files": None, "metric": None} for task in command.also]
    return [command, *(command.model_copy(update=changes) for changes in also)]


def conditions(command: CompareConfig) -> dict[str, Any]:
    """What times depend on, and accuracies a little: rows of one table have the same."""
    import torch

    from trimllm.checkpoints import models

    device = models.device_of(command.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "threads": command.threads or torch.get_num_threads()}


def speed(command: CompareConfig, product: Product) -> dict[str, Any]:
    """Prefill, decode and peak memory at batch 1, in turn with the base, and its speeds in the same rounds."""
    from trimllm.bench import benching, tables
    from trimllm.checkpoints import loading
    from trimllm.config import BenchConfig

    base = loading.path_of(command.model)
    settings = BenchConfig(
        models=(base, str(product.checkpoint)),
        dtype=command.dtype,
        sequence=command.sequence,
        new_tokens=command.new_tokens,
        repeats=command.repeats,
        attention=command.attention,
        device=command.device,
        threads=command.threads,
        trust_remote_code=command.trust_remote_code,
        allow_pickle=command.allow_pickle,
    )
    lengths, known, measured = benching.measure(settings)
    of_base, row = tables.record(settings, lengths, known, measured)["rows"]
    speeds = ("prefill_tokens_per_second", "decode_tokens_per_second")
    wanted = (*speeds, "prefill_ratio", "ratio", "peak_bytes", "read_bytes_per_step")
    return {
        "sequence": lengths.sequence,
        "new_tokens": lengths.new_tokens,
        "dtype": known[1]["dtype"],
        "slowdown": max(model["slowdown"] for model in known),
        "base": {name: of_base[name] for name in speeds},
        **{name: row[name] for name in wanted},
    }


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the comparison gets Ctrl-C, too, and asks this process to end
    sys.exit(main(sys.argv[1:]))
