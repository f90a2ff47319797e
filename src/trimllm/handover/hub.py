"""A finished checkpoint, to the Hugging Face Hub: the export's own files and nothing else.

trimllm.push_to_hub("runs/law", "me/law-8-layers", private=True)
"""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import HfApi, errors
from huggingface_hub.utils import validate_repo_id

from trimllm.checkpoints import belongings
from trimllm.errors import InputError, TrimError, one_line
from trimllm.run import placing
from trimllm.run.rundir import RunDir

WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
FILES = (
    *WEIGHTS,
    *("config.json", "generation_config.json", "plan.json", "README.md"),
    *(*belongings.TOKENIZERS, *belongings.QUANTIZATION, *belongings.TERMS),
)
"""What an export consists of, beside its code."""
LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def push_to_hub(directory: str | Path, repo_id: str, *, private: bool = False) -> str:
    """Upload a checkpoint that trimllm wrote, with its model card.

    Weights that the repository holds and this checkpoint does not (another number of shards) are deleted there in the
    same commit.

    Args:
        directory: of a run, whose result is taken, or of a checkpoint.
        repo_id: `name/repository`; it is made if it is not there.
        private: make it private; one that exists stays what it is.

    Returns:
        The address of the repository.

    Raises:
        InputError: if the directory holds no export, the name cannot be one, or nobody is logged in.
        TrimError: if the Hub cannot be reached, or refuses.
    """
    folder = export_folder(Path(directory).expanduser())
    names = files(folder)
    try:
        validate_repo_id(repo_id)
    except errors.HFValidationError as error:
        raise InputError(f"{repo_id!r} cannot be a repository: {one_line(error)}: give YOUR_NAME/REPOSITORY") from None
    if "/" not in repo_id:
        raise InputError(f"{repo_id!r} names no owner: give YOUR_NAME/{repo_id}")
    api = HfApi(library_name="trimllm")
    try:
        url = api.create_repo(repo_id, private=private or None, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=names,
            delete_patterns=list(WEIGHTS),
            commit_message=f"Upload a model of {_depth(folder)} layers, trimmed by trimllm",
        )
    except (OSError, ValueError, RuntimeError, errors.HTTPError) as error:
        raise _explain(repo_id, error) from error
    return str(url)


def export_folder(directory: Path) -> Path:
    """The folder of the checkpoint that `directory` names.

    Raises:
        InputError: if there is none that trimllm wrote.
    """
    run, holds_run = RunDir(directory), placing.holds_run(directory)
    if holds_run and not run.result.exists():
        raise InputError(f"{directory}: the run is not finished: go on with trimllm trim --output {directory} --resume")
    folder = run.model if holds_run else directory
    if not folder.is_dir():
        raise InputError(f"{directory}: there is no such directory: give that of a run or of a checkpoint")
    lacking = [name for name in ("config.json", "plan.json") if not (folder / name).exists()]
    lacking += [] if any(folder.glob(WEIGHTS[0])) else ["model.safetensors"]
    if lacking:
        raise InputError(
            f"{directory} holds no export of trimllm (no {lacking[0]}): give what trim, drop or export wrote"
        )
    return folder


def files(folder: Path) -> list[str]:
    """Names of the export's files, relative to the folder; its code, if one of its configs names any."""
    own_code = any('"auto_map"' in file.read_text(encoding="utf-8") for file in folder.glob("*config.json"))
    found = belongings.found(folder, (*FILES, *(belongings.CODE if own_code else ())))
    return [file.relative_to(folder).as_posix() for file in found]


def _depth(folder: Path) -> int:
    return len(json.loads((folder / "plan.json").read_text(encoding="utf-8"))["blocks"])


def _explain(repo_id: str, error: Exception) -> TrimError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return InputError(f"cannot push to {repo_id}: nobody is logged in to the Hub: {LOGIN}")
    if status == 403:
        return InputError(f"cannot push to {repo_id}: this login may not write there: check the name, or {LOGIN}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return InputError(f"cannot push to {repo_id}: HF_HUB_OFFLINE is set: unset it")
    if status is None:
        return TrimError(f"cannot push to {repo_id}: the Hub cannot be reached ({one_line(error)}): try again later")
    return TrimError(f"cannot push to {repo_id}: the Hub refused: {one_line(error)}")
