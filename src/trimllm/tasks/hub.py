"""Rows of a data set on the Hugging Face Hub, by `datasets`; nothing from the Hub is ever executed."""

from __future__ import annotations

from trimllm.errors import InputError, first_line
from trimllm.offline import hub_or_cache
from trimllm.tasks.rows import Row, decoded
from trimllm.tasks.spec import Source


def read_hub(source: Source, split: str, task: str) -> list[Row]:
    """All rows of one split.

    Raises:
        InputError: if the data set cannot be loaded (no network, unknown name, gated).
    """
    import datasets

    name = f"{source.hub}/{source.config}" if source.config else str(source.hub)
    try:
        with hub_or_cache():
            data = datasets.load_dataset(source.hub, source.config, split=split, revision=source.revision)
    except Exception as error:  # whatever the Hub client raises, the remedy is the same
        raise InputError(
            f"task {task!r}: cannot load split {split!r} of {name} from the Hub ({first_line(error)}); connect once to "
            "fill the cache, or give local copies with --task-files train=FILE,test=FILE"
        ) from error
    return [Row(f"{name}[{split}]:{number}", decoded(dict(values))) for number, values in enumerate(data, 1)]
