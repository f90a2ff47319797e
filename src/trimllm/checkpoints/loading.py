"""Models in: load a stock checkpoint and its tokenizer, or say in one line why it cannot be used.

from trimllm import load_model
model = load_model("meta-llama/Llama-3.2-1B")
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from trimllm import files, memory
from trimllm.blocks import adapters
from trimllm.checkpoints import backends, belongings, shards
from trimllm.config import EMBEDDED
from trimllm.errors import InputError, one_line
from trimllm.offline import hub_or_cache, is_path

_NO_SAFETENSORS = ("no file named model.safetensors found in directory", "thus cannot be loaded with `safetensors`")
"""What transformers says of a folder and of a Hub repository without such weights."""
_PICKLES = ("*.bin", "*.pt", "*.pth")


DEMO = Path(__file__).parents[1] / "demo" / "base"
"""Where the embedded model is."""


def path_of(name: str | Path) -> str:
    """Where the model is: `demo` is the embedded one, others a directory (`~` is the home) or a Hub id."""
    return str(DEMO) if name == EMBEDDED else os.path.expanduser(name)


BUFFERS = (".inv_freq", ".attn.bias", ".masked_bias")
"""What older releases saved beside the weights."""
OUTPUTS = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
"""What a forward pass gives, which a config may say otherwise, and each call asks for itself."""


def load_model(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    quantization: Any = None,
    attention: str = backends.AUTO,
) -> nn.Module:
    """Load a causal language model, in evaluation mode. An adapter of PEFT is loaded as its base, and merged.

    Args:
        path_or_id: a folder with a checkpoint or an adapter, a name on the Hugging Face hub, or "demo": the embedded
            model (a folder of that name is "./demo").
        dtype: of the weights; the checkpoint's own by default.
        device: where to put it, without a copy in main memory; CPU by default.
        trust_remote_code: run the model code that the checkpoint brings.
        allow_pickle: also accept weights that are not safetensors. Unpickling can run code: trust the source.
        quantization: quantize the weights on the way, as this config of transformers says.
        attention: what computes attention (`backends.names`); by default what transformers chooses.

    Raises:
        InputError: if there is no such model, it is not a causal language model, weights are missing, or it cannot
            compute with this `attention`; also for an adapter that is to be quantized.
    """
    name, place = path_of(path_or_id), torch.device(device or "cpu")
    backends.check(attention, place, dtype if isinstance(dtype, torch.dtype) else None)
    if (base := adapters.base_of(name)) is not None:
        if quantization is not None:
            raise InputError(
                f"cannot quantize {name!r}, an adapter: merge it first, with save_trimmed(load_model(...))"
            )
        model: Any = load_model(
            base,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            attention=attention,
        )
        return adapters.merge(model, name, allow_pickle=allow_pickle).eval()
    check_path(name)
    if Path(name).is_dir():
        check_folder(Path(name))
    try:
        with quiet(), hub_or_cache(name):
            load: Any = AutoModelForCausalLM.from_pretrained
            config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
            quantized = quantization is not None or getattr(config, "quantization_config", None) is not None
            if quantized:  # bitsandbytes says of every product of matrices that it rounds
                getLogger("bitsandbytes").setLevel(ERROR)
            model, info = load(
                name,
                dtype=dtype or "auto",
                **({"quantization_config": quantization} if quantization is not None else {}),
                device_map={"": place} if quantized or place.type != "cpu" else None,
                trust_remote_code=trust_remote_code,
                attn_implementation=backends.chosen(attention),
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
            )
    except Exception as error:
        if memory.is_out_of_memory(error):  # weights go to the device here; what asks for them may do without
            raise
        refused = backends.refusal(attention, name, error)
        raise InputError(refused or explain(name, error, allow_pickle=allow_pickle)) from error
    lost = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    if lost:
        raise InputError(
            f"cannot use model {name!r}: its checkpoint lacks {len(lost)} weights that its config asks for, "
            f"such as {sorted(lost)[0]}"
        )
    model.unread = tuple(sorted(name for name in info["unexpected_keys"] if not name.endswith(BUFFERS)))
    if model.config.is_encoder_decoder:
        raise InputError(f"cannot use model {name!r}: it is an encoder-decoder, not a causal language model")
    for part in (model.config, model.config.get_text_config(decoder=True)):
        for name, usual in OUTPUTS.items():
            if getattr(part, name, usual) != usual:
                setattr(part, name, usual)
        if getattr(part, "tie_word_embeddings", False) and not quantized and _own_head(model):
            part.tie_word_embeddings = False  # as it is read; others go by the config, and would lose the head
    return model.to(device).eval() if device is not None else model.eval()


def _own_head(model: Any) -> bool:
    """Whether the weight of the output head is another one than that of the embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    one, other = (getattr(module, "weight", None) for module in (head, embeddings))
    if one is None or other is None or one is other or one.device.type == "meta":
        return False
    return one.shape != other.shape or not torch.equal(one, other)


def load_tokenizer(path_or_id: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer that belongs to a checkpoint; names are those of `load_model`.

    Raises:
        InputError: if there is none.
    """
    name = path_of(path_or_id)
    if (base := adapters.base_of(name)) is not None and not adapters.has_file(name, "tokenizer_config.json"):
        name = base
    if base is None or name == base:
        check_path(name)
    folder = Path(name)
    if folder.is_dir() and not belongings.found(folder, belongings.VOCABULARIES):
        raise InputError(f"cannot load a tokenizer from {name!r}: the folder has none; save one beside the model")
    try:
        with quiet(), hub_or_cache(name):
            return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise InputError(f"cannot load a tokenizer from {name!r}: {one_line(error)}") from error


def check_path(name: str, *, local: bool = False) -> None:
    """Fail on a path that does not exist before the hub is asked for a model of that name (never, if `local`)."""
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").exists():
            run = (path / "model" / "config.json").exists()
            wanted = path / "model" if run else "the folder of a checkpoint"
            if not run and (path / "journal.jsonl").exists():
                wanted = f"one of {path / 'checkpoints'}, or finish the run with trimllm trim --resume"
            raise InputError(f"cannot load {name!r}: the folder has no config.json; give {wanted}")
    elif path.exists():
        raise InputError(f"cannot load {name!r}: it is a file; give the folder of a checkpoint")
    elif local or is_path(name):
        raise InputError(f"cannot load {name!r}: there is no such folder")


def check_folder(folder: Path) -> None:
    """Check what transformers would report in many lines, or not at all: the config, and the sizes of weight files.

    Without a model type transformers goes by the folder's name; weights that a file lacks it makes up at random.

    Raises:
        InputError: if it is not the folder of a checkpoint, or a weight file is missing or torn.
    """
    check_path(str(folder), local=True)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: it is not JSON ({one_line(error)}): download it again") from error
    if not isinstance(config, dict) or not (config.get("model_type") or config.get("auto_map")):
        raise InputError(f"cannot use {path}: it names no model_type: give the folder of a transformers checkpoint")
    if shards.present(folder):
        shards.read(folder)


def no_safetensors(name: str) -> str:
    """What to do about a folder, or a repository on the hub, without safetensors weights."""
    folder = Path(name)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _PICKLES):
        return f"cannot load model {name!r}: the folder has no {shards.SINGLE}; give the folder of a checkpoint"
    return (
        f"cannot load model {name!r}: it has no safetensors weights, only pickled ones, which can run code: convert it "
        "to safetensors, or, if you trust its source, give --allow-pickle (in Python: allow_pickle=True), which "
        "--streaming does not take"
    )


def explain(name: str, error: Exception, *, allow_pickle: bool = False) -> str:
    """What an error of transformers about the model means, in one line, with the remedy."""
    text, whole = one_line(error), str(error)
    if "Unrecognized configuration class" in text:
        return f"cannot use model {name!r}: it is not a causal language model"
    if "trust_remote_code" in whole:
        return (
            f"cannot load model {name!r}: it brings its own code; if you trust it, give --trust-remote-code "
            "(in Python: trust_remote_code=True)"
        )
    if not allow_pickle and any(each in whole for each in _NO_SAFETENSORS):
        return no_safetensors(name)
    if found := re.search(r"model type `?'?([^`' ]+)'?`? but Transformers does not recognize", whole):
        return (
            f"cannot use model {name!r}: its config.json names the model type {found[1]!r}, which transformers "
            f"{transformers.__version__} does not know: use a newer transformers"
        )
    if re.search(r"offline|couldn't connect|(?<!_)connection(?!_)", text.lower()):  # no setting of a model
        return (
            f"cannot load model {name!r}: there is no such folder, nor is it in the cache of the hub, out of reach now"
        )
    if "is not a local folder" in text or "Repository Not Found" in text:
        return f"cannot load model {name!r}: there is no such folder, and no such public model on the hub"
    return f"cannot load model {name!r}: {text}"


def fingerprint(source: nn.Module | str | Path) -> str:
    """SHA-256 of the weights, by name: of a folder's safetensors files, or of a model's parameters and buffers."""
    if isinstance(source, nn.Module):
        digest = hashlib.sha256()
        for name, tensor in sorted(source.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()
    read = weight_files(Path(source))
    if not read:
        raise InputError(f"cannot take the fingerprint of {str(source)!r}: it has no safetensors files")
    digest = hashlib.sha256()
    for path in read:
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def fingerprint_of_adapter(name: str, base: str, merged: nn.Module) -> str:
    """SHA-256 of an adapter's files and its base's; of the merged weights where one of them has no safetensors.

    Merging rounds, perhaps otherwise with another number of threads; the files are what they are.
    """
    folders = [folder for folder in (on_disk(base), on_disk(name)) if folder and weight_files(folder)]
    if len(folders) < 2:
        return fingerprint(merged)
    return hashlib.sha256(" ".join(map(fingerprint, folders)).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that are read of a checkpoint or an adapter; others may lie beside them."""
    if (folder / shards.SINGLE).exists():
        return [folder / shards.SINGLE]
    placed = files.read_json(folder / shards.INDEX).get("weight_map", {})
    return sorted({folder / name for name in placed.values()} or folder.glob("*.safetensors"))


def on_disk(name: str) -> Path | None:
    """The folder of a model by its name: the model's own, or what was downloaded of a name on the Hub; None if nothing
    was."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except Exception:  # not a name of the Hub, or not downloaded yet
        return None


@contextmanager
def plain_generation(model: Any) -> Iterator[Any]:
    """Within, transformers' own settings of generation stand in place of the model's, which are given: `generate`
    fills up from them (penalties, beams, forbidden tokens)."""
    own = getattr(model, "generation_config", None)
    if own is not None:
        model.generation_config = GenerationConfig()
    try:
        yield own
    finally:
        if own is not None:
            model.generation_config = own


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no reports: whatever matters is raised."""
    logging = transformers.utils.logging
    hub = huggingface_hub.utils.logging
    level, hub_level, bars = logging.get_verbosity(), hub.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        hub.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()
