"""What is pushed: the export's own files and nothing else; whatever goes wrong is one line with the remedy."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import helpers_run as h
import pytest
from huggingface_hub import HfApi, constants, errors
from huggingface_hub.utils import filter_repo_objects

import trimllm
from trimllm import cli
from trimllm.config import ExportConfig
from trimllm.errors import InputError, TrimError
from trimllm.handover import hub, source

OURS = {
    *("README.md", "config.json", "generation_config.json", "model.safetensors", "plan.json"),
    *("tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    h.save_base(root / "base", depth=3)
    assert cli.main(["drop", "--model", str(root / "base"), "--layers", "1", "--output", str(root / "cut")]) == 0
    return root / "cut"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Calls of the Hub's client, which sends nothing."""
    made: list[tuple[str, dict[str, Any]]] = []

    def create(self: HfApi, repo_id: str, **options: Any) -> str:
        made.append(("create_repo", {"repo_id": repo_id} | options))
        return f"https://hub/{repo_id}"

    def upload(self: HfApi, *, folder_path: Path, allow_patterns: list[str], **options: Any) -> None:
        there = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        sent = set(filter_repo_objects(there, allow_patterns=allow_patterns))
        made.append(("upload_folder", options | {"folder": Path(folder_path), "sent": sent}))

    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return made


def test_exactly_the_files_of_the_export_are_sent(export: Path, calls: Any, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(export, folder)
    for name in ("optimizer.pt", ".lock", "optimizer.safetensors", "notes.txt", "training_args.bin", ".model.tmp"):
        (folder / name).write_text("x")
    for name in (
        ".cache/huggingface/upload/model.safetensors.metadata",
        "checkpoint-1/config.json",
        "x/tokenizer.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    for name in ("LICENSE", "chat_template.jinja", "additional_chat_templates/tool.jinja"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("ours")
    assert trimllm.push_to_hub(folder, "me/cut") == "https://hub/me/cut"
    (create, made), (upload, sent) = calls
    assert (create, upload) == ("create_repo", "upload_folder")
    assert made == {"repo_id": "me/cut", "private": None, "exist_ok": True}
    assert sent["sent"] == OURS | {"LICENSE", "chat_template.jinja", "additional_chat_templates/tool.jinja"}
    assert (sent["repo_id"], sent["folder"]) == ("me/cut", folder)
    assert "2 layers" in sent["commit_message"]


def test_the_code_of_a_model_that_brings_its_own_is_sent_too(export: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(export, tmp_path / "cut")
    for name in ("modeling_x.py", "spm.spm"):
        (folder / name).write_text("x")
    assert set(hub.files(folder)) == OURS | {"spm.spm"}, "a script that lies about is not the model's"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}))
    assert set(hub.files(folder)) == OURS | {"spm.spm", "modeling_x.py"}
    shutil.copy(export / "config.json", folder)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"auto_map": {"AutoTokenizer": ["modeling_x.X", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | own))
    assert set(hub.files(folder)) == OURS | {"spm.spm", "modeling_x.py"}


def test_a_config_in_yaml_beside_a_checkpoint_makes_it_no_run(export: Path, calls: Any, tmp_path: Path) -> None:
    shutil.copytree(export, tmp_path / "cut")
    (tmp_path / "cut" / "config.yaml").write_text("train: {lr: 0.1\n")
    trimllm.push_to_hub(tmp_path / "cut", "me/cut")
    assert calls[1][1]["sent"] == OURS
    asked = ExportConfig(source=str(tmp_path / "cut"), to="gguf")
    with source.checkpoint(asked) as folder:
        assert folder == tmp_path / "cut"
    with pytest.raises(InputError, match="cut holds no run"):
        source.save_depth(asked.model_copy(update={"to": "checkpoint", "depth": 2}), tmp_path / "out")


def test_weights_of_an_earlier_push_that_are_not_sent_again_are_deleted(export: Path, calls: Any) -> None:
    trimllm.push_to_hub(export, "me/cut")
    remote = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", ".gitattributes", "figure.png"]
    stale = set(filter_repo_objects(remote, allow_patterns=calls[1][1]["delete_patterns"]))
    assert stale == {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}


def test_of_a_run_its_result_is_pushed_and_an_unfinished_one_is_refused(
    export: Path, calls: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: x\n")
    export_copy = run / "model"
    export_copy.mkdir()
    for file in export.iterdir():
        (export_copy / file.name).write_bytes(file.read_bytes())
    assert cli.main(["push", str(run), "me/run"]) == 2
    assert "--resume" in capsys.readouterr().err
    (run / "result.json").write_text("{}")
    assert cli.main(["push", str(run), "me/run", "--private"]) == 0
    assert "pushed: https://hub/me/run" in capsys.readouterr().out
    assert calls[0][1]["private"] is True
    assert (calls[1][1]["folder"], calls[1][1]["sent"]) == (export_copy, OURS)


@pytest.mark.parametrize("lacks", ["config.json", "plan.json", "model.safetensors"])
def test_a_directory_that_holds_no_export_is_refused(export: Path, calls: Any, tmp_path: Path, lacks: str) -> None:
    for file in export.iterdir():
        if file.name != lacks:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=f"holds no export of trimllm .no {lacks}"):
        trimllm.push_to_hub(tmp_path, "me/x")
    with pytest.raises(InputError, match="no such directory"):
        trimllm.push_to_hub(tmp_path / "absent", "me/x")
    assert calls == []


@pytest.mark.parametrize(
    ("name", "message"), [("law", "give YOUR_NAME/law"), ("a/b/c", "cannot be a repository"), ("me/--x", "cannot be")]
)
def test_names_that_cannot_be_repositories(export: Path, calls: Any, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        trimllm.push_to_hub(export, name)
    assert "\n" not in str(caught.value)
    assert calls == []


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server on this machine that answers every request with `server.status`."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            running.seen.append((self.path, json.loads(self.rfile.read(length) or b"{}")))
            body = b'{"error": "because"}'
            self.send_response(running.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    running: Any = HTTPServer(("127.0.0.1", 0), Answer)
    running.status, running.seen = 401, []
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{running.server_port}")
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


@pytest.mark.parametrize(
    ("status", "kind", "message"),
    [
        (401, InputError, "nobody is logged in to the Hub: log in with `hf auth login`, or set HF_TOKEN"),
        (403, InputError, "may not write there"),
        (400, TrimError, "the Hub refused: .*because"),
    ],
)
def test_refusals_of_the_hub_are_one_line(
    export: Path, server: Any, status: int, kind: type[TrimError], message: str
) -> None:
    server.status = status
    with pytest.raises(TrimError, match=message) as caught:
        trimllm.push_to_hub(export, "me/cut", private=True)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    path, body = server.seen[0]
    assert path == "/api/repos/create"
    assert (body["name"], body["organization"]) == ("cut", "me")
    assert body.get("private") is True or body.get("visibility") == "private"


def test_no_network_is_one_line_and_exit_code_1(
    export: Path, server: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert cli.main(["push", str(export), "me/cut"]) == 1
    err = capsys.readouterr().err
    assert "the Hub cannot be reached" in err
    assert err.count("trimllm: ") == 1
    assert isinstance(hub._explain("me/cut", errors.OfflineModeIsEnabled("offline")), InputError)
