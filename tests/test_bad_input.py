"""Every bad input to a cut is one line with its remedy, in memory and on disk; a failure leaves the disk as it was."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import helpers_run as h
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import build

from trimllm import cli, drop_layers, load_model, save_trimmed
from trimllm.checkpoints import models
from trimllm.checkpoints.streaming import drop_on_disk
from trimllm.errors import InputError, TrimError

WAYS = pytest.mark.parametrize("way", [[], ["--streaming"]], ids=["in memory", "streaming"])
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return h.save_base(tmp_path_factory.mktemp("base"), depth=4)


@pytest.fixture(scope="module")
def shards(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    shutil.copytree(base, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    load_model(base).save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) == 3
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *words: Any, code: int = 2) -> str:
    """The only line that the command prints."""
    capsys.readouterr()  # what the test's own saving printed
    got = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert (got, out, err.count("\n")) == (code, "", 1), err
    return err.removeprefix("trimllm: ").strip()


def drop(model: Path, output: Path, layers: str = "1") -> list[str]:
    return ["drop", "--model", str(model), f"--layers={layers}", "--output", str(output)]


def hashes(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


LAYERS = {
    "4": "layer 4 does not exist: the model has layers 0 to 3 (or -4 to -1)",
    "1,-5": "layer -5 does not exist: the model has layers 0 to 3 (or -4 to -1)",
    "2,2": "layer 2 is named twice: the model has 4 layers, name each one once",
    "3,0,-1": "layers 3 and -1 are the same one, named twice: the model has 4 layers, name each one once",
    "0,1,2,3": "cannot drop all 4 layers: leave at least one",
}


@WAYS
@pytest.mark.parametrize("layers", LAYERS)
def test_layers_that_cannot_go(base: Path, tmp_path: Path, capsys: Any, layers: str, way: list[str]) -> None:
    assert refusal(capsys, *drop(base, tmp_path / "out", layers), *way) == LAYERS[layers]
    with pytest.raises(InputError, match=re.escape(LAYERS[layers])):
        drop_layers(build("llama", depth=4), [int(layer) for layer in layers.split(",")])
    assert not list(tmp_path.iterdir())


def test_layers_are_counted_from_the_end_in_python_as_on_the_command_line() -> None:
    one, other = drop_layers(build("llama", depth=4), [-1, 0]), drop_layers(build("llama", depth=4), [3, 0])
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


@WAYS
@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_a_layer_whose_keys_and_values_others_use(
    family: str, tokenizer: Any, tmp_path: Path, capsys: Any, way: list[str]
) -> None:
    build(family).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    line = refusal(capsys, *drop(tmp_path / "model", tmp_path / "out", "2"), *way)
    assert re.search(r"layer 2\b.*keys and values", line), line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def edit(path: Path, **entries: Any) -> None:
    values = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def ghost(folder: Path) -> None:
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    edit(folder / INDEX, weight_map=places | {"model.ghost": "model-00002-of-00003.safetensors"})


def lose(folder: Path) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file, metadata={"format": "pt"})


def cut(file: str, size: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, size((folder / file).stat().st_size))


def overwrite(file: str, data: bytes, at: int = 0) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        with (folder / file).open("r+b") as stream:
            stream.seek(at)
            stream.write(data)

    return change


def remove(file: str) -> Callable[[Path], None]:
    return lambda folder: (folder / file).unlink()


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


ONE, SECOND = "model.safetensors", "model-00002-of-00003.safetensors"
TORN = r"is torn: its header asks for {size} bytes, and the file has {found}: download it again$"
BROKEN: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "empty": ("base", lambda folder: [path.unlink() for path in folder.iterdir()], "folder has no config.json; give"),
    "without config": ("base", remove("config.json"), "folder has no config.json; give"),
    "config not JSON": ("base", overwrite("config.json", b"x"), r"config\.json: it is not JSON \(.*download it again"),
    "config not text": ("base", overwrite("config.json", b"\xff"), r"config\.json: it is not JSON"),
    "config a list": ("base", lambda f: (f / "config.json").write_text("[]"), r"config\.json: it names no model_type"),
    "no model type": (
        "base",
        lambda folder: edit(folder / "config.json", model_type=None),
        r"config\.json: it names no model_type: give the folder of",
    ),
    "unknown family": (
        "base",
        lambda folder: edit(folder / "config.json", model_type="foonet"),
        r"model type 'foonet', which transformers \d.* does not know: use a newer",
    ),
    "no weights": ("base", remove(ONE), r"has no model\.safetensors; give the folder of a checkpoint$"),
    "pickled": ("base", pickled, r"only pickled ones.*convert it to safetensors, or, .*--allow-pickle"),
    "file half": ("base", cut(ONE, lambda size: size // 2), ONE + " " + TORN),
    "file too long": ("base", cut(ONE, lambda size: size + 4), ONE + " " + TORN),
    "file empty": (
        "base",
        cut(ONE, lambda _: 0),
        ONE + r" is torn: its header begins with 8 bytes, and the file has 0",
    ),
    "in the header": (
        "base",
        cut(ONE, lambda _: 100),
        ONE + r" .*asks for \d+ bytes for itself, and the file has 100:",
    ),
    "not the format": (
        "base",
        overwrite(ONE, b"\xff" * 8),
        ONE + r" is not a safetensors file \(its header would have \d+ bytes, the file has \d+\): download",
    ),
    "header not JSON": ("base", overwrite(ONE, b"x" * 9, at=8), ONE + " has no valid safetensors header.*download"),
    "shard half": ("shards", cut(SECOND, lambda size: size // 2), SECOND + " " + TORN),
    "shard missing": ("shards", remove(SECOND), SECOND + " is missing: download the checkpoint again$"),
    "shard lacks a tensor": ("shards", lose, rf"{INDEX} places '.*' in {SECOND}, which does not have it: download"),
    "index invents a tensor": ("shards", ghost, rf"{INDEX} places 'model.ghost' in {SECOND}, which does not have it"),
    "index a list": ("shards", lambda f: (f / INDEX).write_text("[1]"), INDEX + " is not an index of shards.*download"),
}


@WAYS
@pytest.mark.parametrize("case", BROKEN)
def test_folders_that_are_no_checkpoint(
    case: str, tmp_path: Path, capsys: Any, way: list[str], request: pytest.FixtureRequest
) -> None:
    source, change, words = BROKEN[case]
    model = tmp_path / "llama"  # a name by which transformers would take it for one
    shutil.copytree(request.getfixturevalue(source), model)
    file = model / (SECOND if SECOND in words else ONE)
    size = file.stat().st_size if file.exists() else 0
    change(model)
    words = words.replace("{size}", str(size)).replace("{found}", str(file.stat().st_size if file.exists() else 0))
    line = refusal(capsys, *drop(model, tmp_path / "out"), *way)
    assert re.search(words, line), line
    assert str(model) in line
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]


@pytest.mark.parametrize("name", ["trim", "scan", "eval"])
def test_a_torn_file_is_named_by_every_command(name: str, base: Path, tmp_path: Path, capsys: Any) -> None:
    model = tmp_path / "model"
    shutil.copytree(base, model)
    cut(ONE, lambda size: size - 1)(model)
    words = [name, "--model", model, "--task", h.save_task(tmp_path / "task"), "--output", tmp_path / "out"]
    line = refusal(capsys, *words, *(["--depth", "2"] if name == "trim" else []))
    assert re.search(r"model\.safetensors is torn: its header asks for \d+ bytes, and the file has \d+", line)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def places(base: Path, tmp_path: Path) -> Path:
    shutil.copytree(base, tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    return tmp_path


OUTPUTS = {
    "model": "the model is read from this directory: choose another one",
    "link": "the model is read from this directory: choose another one",
    "model/cut": "it lies inside the model's directory .*model: choose another one",
    "link/a/cut": "it lies inside the model's directory .*model: choose another one",
    ".": "the model's directory .*model lies inside it: choose another one",
    "file": "it is a file: name a directory",
    "file/cut": ".*/file is a file: choose another --output",
    "used": "the directory is not empty: choose another one|the directory already holds notes.txt: choose another one",
    "/sys/trimllm": ".*(not permitted|denied|Read-only).*: choose another --output",
}


@pytest.mark.parametrize("command", ["drop", "drop --streaming", "trim"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_output_that_cannot_be_used_is_refused_before_the_model_is_loaded(
    command: str, output: str, places: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        pytest.fail("a model was loaded")

    for name in (
        "trimllm.checkpoints.models.load",
        "trimllm.run.progressive.load",
        "trimllm.checkpoints.streaming.shards.read",
    ):
        monkeypatch.setattr(name, load)
    before = hashes(places)
    name, *more = command.split()
    more += ["--layers", "1"] if name == "drop" else ["--task", "demo_law", "--depth", "2"]
    target = str(places / output)
    line = refusal(capsys, name, "--model", places / "model", "--output", target, *more)
    assert re.search(f"^--output {re.escape(str(Path(target)))}: ({OUTPUTS[output]})$", line), line
    assert hashes(places) == before
    assert not list(places.glob("**/cut"))


def test_a_model_is_not_saved_over_the_folder_it_was_loaded_from(places: Path) -> None:
    model = drop_layers(load_model(places / "model"), [1])
    save_trimmed(model, places / "out", verify=False)
    again = drop_layers(load_model(places / "out"), [1])
    before = hashes(places)
    for target in ("model", "link", "model/cut"):
        with pytest.raises(InputError, match=r"the model is read from|lies inside the model's"):
            save_trimmed(model, places / target)
    with pytest.raises(InputError, match="the model is read from this directory"):
        save_trimmed(again, places / "out", overwrite=True)
    assert hashes(places) == before
    save_trimmed(model, places / "out", overwrite=True)


def test_eval_replaces_its_own_results_and_no_other_file(places: Path, capsys: Any) -> None:
    task = h.save_task(places / "task")
    words = ["eval", "--model", str(places / "model"), "--task", str(task), "--output"]
    (places / "scan.json").write_text('{"model": "m", "task": "t", "metric": "acc", "units": []}')
    before = hashes(places)
    for name in ("file", "model/config.json", "scan.json"):
        line = refusal(capsys, *words, places / name)
        assert line == f"--output {places / name}: the file exists, and is no earlier result: choose another one"
    assert hashes(places) == before
    for _ in range(2):
        assert cli.main([*words, str(places / "result.json")]) == 0


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel writes files up to this size and no further."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@WAYS
def test_a_disk_that_takes_no_more_half_way(base: Path, tmp_path: Path, capsys: Any, way: list[str]) -> None:
    before = hashes(base)
    with largest_file((base / ONE).stat().st_size // 2):
        line = refusal(capsys, *drop(base, tmp_path / "a" / "out"), *way, code=1)
    assert line == f"cannot write to {tmp_path / 'a' / 'out'}: File too large: choose another --output"
    assert not list(tmp_path.iterdir())
    assert hashes(base) == before


def full(disk: str) -> Callable[..., Any]:
    """`tempfile.mkdtemp`, but the second of two weight files goes to the device that is always full."""
    real = tempfile.mkdtemp

    def make(*arguments: Any, **options: Any) -> str:
        folder = real(*arguments, **options)
        os.symlink(disk, os.path.join(folder, "model-00002-of-00002.safetensors"))
        return folder

    return make


def test_a_disk_that_is_full_half_way(base: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hashes(base)
    monkeypatch.setattr(tempfile, "mkdtemp", full("/dev/full"))
    more = ["--streaming", "--max-shard-size", "200KB"]
    line = refusal(capsys, *drop(base, tmp_path / "out"), *more, code=1)
    assert line.startswith(f"cannot write to {tmp_path / 'out'}: the disk is full: free some space, then start again")
    assert not list(tmp_path.iterdir())
    assert hashes(base) == before


def test_a_disk_that_is_full_when_the_weights_are_written(
    base: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors writes to a name of its own, so here its error comes from the device itself: config.json is there."""
    from safetensors.torch import save

    def write(tensors: Any, filename: str, metadata: Any = None) -> None:
        assert Path(filename).with_name("config.json").exists()
        data = save(tensors, metadata)
        Path(filename).write_bytes(data[: len(data) // 2])
        with open("/dev/full", "wb") as stream:
            stream.write(data[len(data) // 2 :])

    before = hashes(base)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", write)
    line = refusal(capsys, *drop(base, tmp_path / "out"), code=1)
    assert line.startswith(f"cannot write to {tmp_path / 'out'}: the disk is full: free some space, then start again")
    assert not list(tmp_path.iterdir())
    assert hashes(base) == before


@pytest.mark.parametrize("way", ["in memory", "streaming"])
def test_a_kill_half_way_leaves_no_checkpoint_and_blocks_nothing(way: str, base: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "out", hashes(base)
    model = drop_layers(load_model(base), [1])

    def write() -> None:
        if way == "streaming":
            drop_on_disk(base, [1], out)
        else:
            save_trimmed(model, out, verify=False)

    child = os.fork()
    if child == 0:  # the kernel kills it in the middle of a write
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with largest_file((base / ONE).stat().st_size // 2):
            write()
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGXFSZ
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    assert any(path.stat().st_size for path in left.iterdir())
    with pytest.raises(InputError, match=r"no config\.json|no model\.safetensors|is torn"):
        load_model(left)
    write()
    assert load_model(out).config.num_hidden_layers == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert hashes(base) == before


def test_a_folder_of_a_run_names_its_model(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "run" / "model")
    with pytest.raises(InputError, match=rf"no config\.json; give {re.escape(str(tmp_path / 'run' / 'model'))}$"):
        load_model(tmp_path / "run")


def test_an_adapter_is_not_exported_and_how_to_merge_it_is_said(base: Path, tmp_path: Path, capsys: Any) -> None:
    from peft import LoraConfig, get_peft_model

    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    get_peft_model(load_model(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    line = refusal(capsys, "export", adapter, "--to", "gguf")
    assert line == (
        f'{adapter} is an adapter: make a checkpoint of it first, with python -c "from trimllm import *; '
        f"save_trimmed(load_model('{adapter}'), 'merged', tokenizer=load_tokenizer('{adapter}'))\""
    )
    code = line.split('"')[1].replace("'merged'", repr(str(merged)))
    exec(code, {})
    assert cli.main(["export", str(merged), "--to", "gguf"]) == 0


@pytest.mark.parametrize("kind", models.PACKED)
def test_quantized_weights_are_refused_for_training_before_anything_that_loads_them_is_asked_for(
    base: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    model = Path(shutil.copytree(base, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": kind, "bits": 4}}))
    said = refusal(capsys, "trim", "--model", model, "--task", task, "--output", tmp_path / "run")
    assert said.startswith(f"--model {model}: quantized weights cannot be trained: trim the unquantized model")


@pytest.mark.parametrize(("text", "said"), [("{", "it is not JSON"), ("{}", "it names no model_type")])
def test_a_broken_config_is_one_line_for_training_too(
    base: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    model = Path(shutil.copytree(base, tmp_path / "model"))
    (model / "config.json").write_text(text)
    found = refusal(capsys, "trim", "--model", model, "--task", task, "--output", tmp_path / "run")
    assert said in found
    assert "config.json" in found


def test_a_run_that_is_not_finished_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "journal.jsonl").write_text("")
    said = refusal(capsys, "eval", "--model", tmp_path, "--task", "demo_law")
    assert said.endswith(f"give one of {tmp_path / 'checkpoints'}, or finish the run with trimllm trim --resume")


@pytest.mark.parametrize("asked", [{"output_attentions": True}, {"output_hidden_states": True}, {"return_dict": False}])
def test_what_a_config_says_of_outputs_does_not_end_a_command(
    asked: dict[str, bool], base: Path, tmp_path: Path, capsys: Any
) -> None:
    folder = shutil.copytree(base, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | asked))
    words = ["--model", str(folder), "--task", "demo_law", "--max-test", "4", "--device", "cpu"]
    assert cli.main(["eval", *words]) == 0
    assert cli.main(["drop", "--model", str(folder), "--layers", "1", "--output", str(tmp_path / "cut")]) == 0
    saved = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert all(saved.get(name, not value) is not value for name, value in asked.items())


def test_weights_that_are_no_numbers_are_not_saved_as_another_model(base: Path, tmp_path: Path) -> None:
    model = load_model(base)
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(TrimError, match="gives logits that are no finite numbers"):
        save_trimmed(drop_layers(model, [1]), tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_weights_that_the_config_does_not_ask_for_are_named(base: Path, tmp_path: Path, capsys: Any) -> None:
    folder = shutil.copytree(base, tmp_path / "less")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] - 1}))
    words = ["--task", "demo_law", "--max-test", "4", "--device", "cpu", "--model"]
    for model, told in ((folder, True), (base, False)):
        assert cli.main(["eval", *words, str(model)]) == 0
        err = capsys.readouterr().err
        assert (
            "tensors of its files have no place in the model that its config describes, such as model." in err
        ) is told
