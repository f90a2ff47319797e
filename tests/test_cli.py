"""The command line: help, settings from YAML, and one line with exit code 2 for everything that cannot be used."""

import dataclasses
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import get_origin

import helpers_run as h
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from trimllm import cli, config, console, files, parsing
from trimllm.blocks import legality
from trimllm.checkpoints import models
from trimllm.commands import eval as eval_command
from trimllm.commands import export as export_command
from trimllm.commands import scan as scan_command
from trimllm.config import plain_settings
from trimllm.errors import InputError, TrimError
from trimllm.evaluation.paired import shown
from trimllm.importance import deletion, scan
from trimllm.run import placing, rundir
from trimllm.run.scan_file import ScanFile

pytestmark = pytest.mark.usefixtures("fast")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return h.save_base(tmp_path_factory.mktemp("base"), depth=4)


def call(capsys, *words):
    """(exit code, standard output, standard error)."""
    code = cli.main([str(word) for word in words])
    return code, *capsys.readouterr()


def refusal(capsys, *words, code=2):
    """The one line of a refusal."""
    got, out, err = call(capsys, *words)
    lines = [line for line in err.splitlines() if line.startswith("trimllm: ")]
    assert got == code, err
    assert out == ""
    assert len(lines) == 1
    assert err.splitlines()[-1] == lines[0]
    return lines[0].removeprefix("trimllm: ")


def test_a_cuda_build_of_torch_without_a_gpu_computes_on_the_cpu(monkeypatch):
    """What `pip install torch` brings on Linux, on a machine without a GPU: torch names an accelerator all the same."""

    def current(check_available=False):
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current)
    assert models.device_of("auto") == torch.device("cpu")


def test_lists_are_of_a_type_that_every_allowed_pydantic_settings_splits():
    """Before 2.16 it splits no `tuple`: `--layers 3,7` was refused on Python 3.10."""
    lists = {}
    for name, kind in cli.COMMANDS.items():
        for field, about in kind.model_fields.items():
            assert get_origin(about.annotation) is not tuple, f"{name} --{field}"
            if get_origin(about.annotation) is Sequence:
                lists[name, field] = about
    assert {("drop", "layers"), ("trim", "protect"), ("compare", "keep"), ("bench", "models")} <= set(lists)
    assert cli.parse([*DROP[:3], "--layers", "3,-7", "--output", "o"]).layers == (3, -7)


def test_what_a_parser_prints_before_it_ends_is_one_line(monkeypatch, capsys):
    """pydantic-settings before 2.16 ends the process for what is wrong after a command."""

    def run(*_, **__):
        print(
            "usage: trimllm drop [-h]\ntrimllm drop: error: argument --layers: expected one argument", file=sys.stderr
        )
        raise SystemExit(2)

    monkeypatch.setattr(parsing.CliApp, "run", run)
    with pytest.raises(InputError, match=r"^argument --layers: expected one argument: see trimllm drop --help$"):
        cli.parse(DROP)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_shows_an_example_and_describes_every_option(capsys, name):
    code, out, err = call(capsys, name, "--help")
    assert (code, err) == (0, "")
    assert re.search(rf"Example:\n +trimllm {name}", out)
    for field, info in cli.COMMANDS[name].model_fields.items():
        assert info.description, f"{name} {field}"
        if (name, field) not in {("export", "source"), ("push", "directory"), ("push", "repo_id"), ("bench", "models")}:
            assert f"--{field.replace('_', '-')}" in out


def test_help_lists_every_command_with_what_it_does(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0
    for name in cli.COMMANDS:
        assert re.search(rf"^    {name} +\w+", out, re.MULTILINE)
    assert call(capsys)[1] == out


def test_version_is_that_of_the_package(capsys):
    code, out, _ = call(capsys, "--version")
    assert (code, out) == (0, f"trimllm {metadata.version('trimllm')}\n")


def test_unknown_first_option_is_one_line(capsys):
    code, _, err = call(capsys, "--verbose")
    assert (code, err) == (2, "trimllm: unrecognized arguments: --verbose: see trimllm --help\n")


def test_help_tasks_and_import_do_not_load_torch():
    program = (
        "import sys, time, trimllm; from trimllm import cli; code = cli.main(['--help'])\n"
        "seconds = time.process_time(); code += cli.main(['tasks'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "print(code, heavy, seconds, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    code, heavy, seconds = done.stderr.split()
    assert (code, heavy) == ("0", "set()")
    assert float(seconds) < 1, "half a second on a machine that does nothing else"


def test_examples_in_help_are_accepted_by_the_parser():
    for kind in cli.COMMANDS.values():
        lines = re.findall(r"^ +trimllm (.+)$", kind.__doc__ or "", re.MULTILINE)
        assert lines
        for line in lines:
            if "--resume" not in line:
                assert isinstance(cli.parse(line.split()), kind)


def test_yaml_is_what_safe_load_reads_but_for_doubled_keys():
    merged = "x: &x {k: 1}\nouter: {a: &a {<<: *x, k: 2}}\nb: {<<: *a}\n"
    for text in (merged, "1: a\n'1': b\n", "[a, a]", ""):
        assert files.parse_yaml(text) == yaml.safe_load(text)
    for text in ("a: 1\na: 2", "x: {a: 1, 'a': 2}", "- {a: 1, a: 1}"):
        with pytest.raises(yaml.YAMLError, match="'a' stands there twice"):
            files.parse_yaml(text)


def test_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: demo\ntask: demo_law\nlr: 1e-3\nkeep: 0.25\nprotect: [0, -1]\ntask-files: {train: a}\n")
    parsed = cli.parse(["trim", "--config", str(path), "--output", "o", "--lr", "5e-4", "--no-report-depths"])
    assert isinstance(parsed, config.TrimConfig)
    assert (parsed.lr, parsed.keep, parsed.protect, parsed.output) == (5e-4, 0.25, (0, -1), "o")
    assert (parsed.task_files, parsed.report_depths, parsed.batch_size) == ({"train": "a"}, False, 4096)


def test_resolved_settings_can_be_read_back(tmp_path):
    mine = config.TrimConfig(model="m", task="t", output="o", protect=(0, -1), lr=2e-5, task_files={"train": "a"})
    (tmp_path / "config.yaml").write_text(plain_settings.to_yaml(mine))
    assert cli.parse(["trim", f"--config={tmp_path / 'config.yaml'}"]) == mine


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: demo\n", r"unknown setting 'modle' \(did you mean 'model'\?\)"),
        ("max_new_tokens: 3\n", r"unknown setting 'max_new_tokens' \(of eval, and not of trim\)"),
        ("model: [\n", r"run\.yaml:2: not valid YAML: expected the node content"),
        ("model: x\nlr: 1\nmodel: y\n", r"run\.yaml:3: not valid YAML: 'model' stands there twice"),
        ("max-train: 5\nmax_train: 6\n", r"run\.yaml: 'max_train' stands there twice"),
        ("- a\n", r"expected `name: value` lines"),
        ("model: demo\ntask: t\noutput: o\nlr: fast\n", r"--lr fast: .*number"),
        ("model: demo\ntask: t\noutput: o\nbatch_size: [1]\n", r"--batch-size \[1\]: "),
        ("model: demo\ntask: t\noutput: o\nprotect: 0\n", r"--protect 0: write a list, as \[0\]"),
        ("model: demo\ntask: t\noutput: o\nprotect: '0,-1'\n", r"--protect 0,-1: write a list, as \[0,-1\]"),
        ("model: demo\ntask: ''\noutput: o\n", r"--task: empty"),
    ],
)
def test_bad_yaml_is_one_line(capsys, tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    assert re.search(message, refusal(capsys, "trim", "--config", tmp_path / "run.yaml"))


@pytest.fixture
def begun(tmp_path):
    """What writes the stored settings of a run or comparison in `tmp_path / "run"`, and returns them."""

    def write(name):
        made = cli.COMMANDS[name](model="demo", task="demo_law", output=str(tmp_path / "run"), lr=1e-3)
        (tmp_path / "run").mkdir()
        rundir.RunDir(tmp_path / "run").config.write_text(plain_settings.to_yaml(made))
        return made.model_copy(update={"resume": True})

    return write


@pytest.mark.parametrize("name", cli.RESUMABLE)
def test_a_run_goes_on_with_its_settings_wherever_its_output_is_named(tmp_path, begun, name):
    wanted, output, path = begun(name), str(tmp_path / "run"), tmp_path / "c.yaml"
    path.write_text(f"output: {output}\n")
    assert cli.parse([name, "--config", str(path), "--resume"]) == wanted
    for yes in ("true", "yes", "y", "1"):
        path.write_text(f"output: {output}\nresume: {yes}\n")
        assert cli.parse([name, "--config", str(path)]) == wanted
    for words in (["--config", str(path), "--no-resume"], ["--output", output]):
        with pytest.raises(InputError, match=f"--model is required: to go on with the run in {output}, add --resume"):
            cli.parse([name, *words])
    with pytest.raises(InputError, match=f"--model is required: see trimllm {name} --help"):
        cli.parse([name, "--output", "another"])
    path.write_text("output: another\nbatch_size: 64\n")
    assert cli.parse([name, f"--config={path}", "--resume", "--output", output]).lr == 1e-3, "the command line wins"
    assert cli.parse([name, f"--config={path}", "--resume", "--output", output]).batch_size == 64
    assert cli.parse([name, "--output", "another", f"--output={output}", "--resume"]) == wanted, "the last one counts"


def test_a_yaml_that_names_no_run_to_go_on_with_is_one_line(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("output: no/such/run\n")
    line = refusal(capsys, "trim", "--config", tmp_path / "c.yaml", "--resume")
    assert line == "--resume: there is no run in no/such/run: check --output"
    (tmp_path / "c.yaml").write_text("output: [no]\n")
    assert "--output" in refusal(capsys, "trim", "--config", tmp_path / "c.yaml", "--resume")


def test_a_tilde_is_the_home_folder_in_every_setting_that_is_a_path(tmp_path, monkeypatch, begun):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {"output": "~/run", "task": "~/rows", "text": "~/text", "also": ["~/a", "b"], "task_files": {"test": "~/t"}}
    there = {name: str(tmp_path / name) for name in ("run", "rows", "text", "a", "t")}
    wanted = {"output": there["run"], "task": there["rows"], "text": there["text"], "also": (there["a"], "b")}
    wanted |= {"task_files": {"test": there["t"]}}
    needed = {"model": "demo", "layers": [1], "models": ["demo"], "source": "s", "depth": 2}
    needed |= {"directory": "d", "repo_id": "a/b", "task": "demo_law"}
    for kind in cli.COMMANDS.values():
        required = {
            name: needed[name] for name, field in kind.model_fields.items() if field.is_required() and name in needed
        }
        required |= {"to": "int8"} if kind is config.ExportConfig else {}
        given = {name: value for name, value in paths.items() if name in kind.model_fields}
        made = plain_settings.make(kind, required | given)
        assert {name: getattr(made, name) for name in given} == {name: wanted[name] for name in given}, kind
    begun("trim")
    assert cli.parse(["trim", "--output=~/run", "--resume"]).lr == 1e-3
    assert placing.same("model", "~/m", str(tmp_path / "m"))


def test_yaml_that_is_missing_or_not_text_is_one_line(capsys, tmp_path):
    assert "No such file" in refusal(capsys, "scan", "--config", tmp_path / "no.yaml")
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x81")
    assert "not a text file" in refusal(capsys, "scan", "--config", tmp_path / "x.yaml")


TRIM = ["trim", "--model", "demo", "--task", "demo_law", "--output", "o"]
DROP = ["drop", "--model", "demo", "--layers", "1", "--output", "o"]


EVAL, SCAN, COMPARE = (["eval", *TRIM[1:]], ["scan", *TRIM[1:]], ["compare", *TRIM[1:]])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trm"], "unknown command 'trm' (did you mean 'trim'?)"),
        (["trim", "--modle", "x"], "unknown option --modle (did you mean '--model'?)"),
        (["trim", "--learning-rate", "1"], "unknown option --learning-rate (did you mean '--lr'?)"),
        ([*TRIM, "--leer=3"], "unknown option --leer"),
        (
            ["eval", "--model", "demo", "--max-train", "9"],
            "unknown option --max-train (of trim, compare, and not of eval)",
        ),
        ([*TRIM, "--max_train", "5"], "unknown option --max_train (did you mean '--max-train'?)"),
        ([*TRIM, "--protect", "0-3"], "--protect 0-3: a range is not read: write every number, as 0,1,2,3"),
        (["drop", "--model", "x", "--output", "y", "--layers", "0-3"], "--layers 0-3: a range is not read"),
        (["bench", "--model", "x"], "unknown option --model (did you mean '--models'?)"),
        ([*EVAL, "--no-seed"], "unknown option --no-seed"),
        (["scan", "--no-report-depths"], "unknown option --no-report-depths (of trim, and not of scan)"),
        ([*TRIM, "stray"], "unexpected argument 'stray'"),
        ([*TRIM, ""], "unexpected argument ''"),
        (["eval", "runs/law", "--task", "t"], "unexpected argument 'runs/law' (did you mean --model runs/law?): see"),
        (["trim", "--task", "demo_law", "--output", "o"], "--model is required"),
        (["export", "--depth", "3"], "required: SOURCE"),
        ([*TRIM, "--lr", "fast"], "--lr fast: must be a valid number"),
        ([*TRIM, "--lr", "-1"], "--lr -1: must be greater than 0"),
        ([*TRIM, "--keep", "50"], "--keep 50: must be less than 1 (a share: 0.5 for 50 %)"),
        ([*TRIM, "--keep", "2000"], "--keep 2000: must be less than 1: see"),
        ([*TRIM, "--depth", "0"], "--depth 0: must be greater than 0"),
        ([*TRIM, "--distill", "1.5"], "--distill 1.5: must be less than or equal to 1"),
        ([*TRIM, "--distill", "-0.1"], "--distill -0.1: must be greater than or equal to 0"),
        ([*TRIM, "--optimizer-state", "carry"], "(did you mean 'carried'?)"),
        ([*TRIM, "--depth", "2.5"], "--depth 2.5: must be a valid integer"),
        ([*TRIM, "--protect", "0,x"], "--protect x: must be a valid integer"),
        ([*TRIM, "--keep", "0.5", "--depth", "3"], "give --keep or --depth, not both"),
        ([*TRIM, "--sparse-update", "dinamic"], "(did you mean 'dynamic'?)"),
        ([*TRIM, "--metric", "acc_nrm"], "--metric acc_nrm: must be 'acc', 'acc_norm' or 'likelihood' (did you mean"),
        ([*TRIM, "--task-files", "train"], "--task-files cannot be read"),
        ([*TRIM, "--strategy", "scan+nrom"], "unknown strategy 'scan+nrom' (did you mean 'scan+norm'?)"),
        (["trim", "--output", "no/such/run", "--resume"], "there is no run in no/such/run"),
        (["drop", "--model", "demo", "--output", "o", "--layers"], "--layers: expected one argument"),
        ([*DROP, "--max-shard-size", "1GB"], "--max-shard-size 1GB is for --streaming"),
        ([*DROP, "--streaming", "--dtype", "float16"], "--dtype float16 is not for --streaming"),
        ([*DROP, "--streaming", "--device", "cpu"], "--device cpu is not for --streaming"),
        ([*DROP, "--streaming", "--threads", "2"], "--threads 2 is not for --streaming"),
        ([*DROP, "--streaming", "--allow-pickle"], "--allow-pickle is not for --streaming"),
        (["scan", *TRIM[1:], "--run", "2"], "--run 2 is for --strategy angular"),
        (["eval", "--model", "", "--task", "t"], "--model: empty: give a value, or leave it out"),
        (["eval", "--model", " ", "--task", "t"], "--model: empty"),
        (["eval", "--model", "demo", "--task="], "--task: empty"),
        ([*TRIM, "--text", ""], "--text: empty"),
        ([*COMPARE, "--also", ""], "--also ['']: empty: give a value"),
        (["scan", *TRIM[1:5], "--output", ""], "--output: empty"),
        ([*TRIM, "--seed", "99999999999999999"], "--seed 99999999999999999: must be less than or equal to"),
        ([*TRIM, "--threads", "99999999999999999999999"], "--threads 99999999999999999999999: must be less than"),
        ([*TRIM, "--protect", "nan"], "a value cannot be read: write several with commas, as 0,-1"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_words_that_cannot_be_used(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *words)
    assert not list(tmp_path.iterdir())


ONE_SHOT = [*TRIM, "--one-shot", "--depth", "3"]
RESOLUTION = ["--resolution", "2", "--calibration-size", "50"]
IDLE = [
    (
        [*ONE_SHOT, "--max-params", "9"],
        "--max-params 9 cannot end --one-shot, which drops everything at once, to --depth 3",
    ),
    ([*ONE_SHOT, "--max-memory", "2.5"], "--max-memory 2.5 cannot end --one-shot"),
    (
        [*TRIM, "--one-shot", "--keep", "0.25", "--target-speedup", "2"],
        "drops everything at once, to --keep 0.25: leave",
    ),
    ([*ONE_SHOT, "--drops-per-stage", "2"], "--drops-per-stage 2 is for several stages, and --one-shot"),
    (
        [*ONE_SHOT, "--sparse-update", "dynamic"],
        "--sparse-update dynamic is for several scans, and --one-shot makes one",
    ),
    *(
        ([*command, *words], message)
        for command in (TRIM, COMPARE)
        for words, message in (
            (["--sparse-update", "off", "--train-ratio", "0.5"], "--train-ratio 0.5 is for some of the blocks, and"),
            (["--text-ratio", "3"], "--text-ratio 3.0 is for --text: leave it out, or add --text"),
        )
    ),
    *(
        (
            [*command, *RESOLUTION],
            "--resolution 2.0 finds out how many calibration rows are held out, and --calibration-size",
        )
        for command in (TRIM, COMPARE, SCAN)
    ),
    (["scan", *TRIM[1:], "--strategy", "angulr", "--run", "3"], "unknown strategy 'angulr' (did you mean 'angular'?)"),
    *(
        ([*command, "--text", "demo_law", "--text-ratio", "0"], "--text demo_law is not trained on with --text-ratio 0")
        for command in (TRIM, COMPARE)
    ),
    (
        [*TRIM, "--optimizer-state", "fresh", "--epochs-per-drop", "0", "--final-epochs", "1"],
        "--optimizer-state fresh is for several stages after drops, and with --epochs-per-drop 0 there is one",
    ),
    *(
        (
            [*command, "--strategy", "scan", "--scan", "racing", "--tie-tolerance", "2"],
            "--tie-tolerance 2.0 is for two scores, and --strategy scan has nothing that breaks ties",
        )
        for command in (TRIM, SCAN)
    ),
    *(
        (
            [*command, "--strategy", "bi", "--tie-tolerance", "2"],
            "--tie-tolerance 2.0 is for two scores, and --strategy bi has nothing that breaks ties",
        )
        for command in (TRIM, SCAN)
    ),
    *(
        (
            [*TRIM, "--epochs-per-drop", "0", *words],
            f"{' '.join(words)} is about the training after drops, and there is",
        )
        for words in (
            ["--train-ratio", "0.5"],
            ["--sparse-update", "off"],
            ["--no-train-embeddings"],
            ["--optimizer-state", "fresh"],
            ["--distill", "0.5"],
        )
    ),
    (
        [*TRIM, "--epochs-per-drop", "0", "--warmup-epochs", "0", "--text", "demo_law"],
        "--text demo_law is for training, and nothing trains: leave it out, or train",
    ),
    *(
        (
            [*TRIM, "--epochs-per-drop", "0", "--warmup-epochs", "0", *words],
            f"{' '.join(words)} is for training, and nothing trains: leave it out, or train",
        )
        for words in (["--lr", "0.1"], ["--batch-size", "64"], ["--gradient-checkpointing"])
    ),
    (
        [*TRIM, "--epochs-per-drop", "0", "--schedule", "epoch"],
        "--schedule epoch is about training after every drop, and with --epochs-per-drop 0 there is none",
    ),
    (
        [*ONE_SHOT, "--schedule", "epoch"],
        "--schedule epoch is about several stages, and --one-shot has one: leave one of them out",
    ),
    (
        [*ONE_SHOT, "--optimizer-state", "fresh"],
        "--optimizer-state fresh is for several stages, and --one-shot has one",
    ),
    ([*EVAL, "--max-new-tokens", "9"], "--max-new-tokens 9 is for --generate: leave it out, or add --generate"),
]


@pytest.mark.parametrize(
    ("words", "message"), IDLE, ids=lambda value: " ".join(value[:1] + value[7:]) if isinstance(value, list) else ""
)
def test_options_without_effect_are_refused(capsys, words, message):
    assert message in refusal(capsys, *words)


@pytest.mark.parametrize(
    "words",
    [
        [*ONE_SHOT, "--sparse-update", "off"],
        [*TRIM, "--max-params", "9", "--depth", "3", "--drops-per-stage", "2", "--sparse-update", "dynamic"],
        [*TRIM, "--text", "demo_law", "--text-ratio", "3", "--train-ratio", "0.5"],
        [*TRIM, "--text-ratio", "0", "--resolution", "2"],
        [*TRIM, "--strategy", "scan+norm", "--tie-tolerance", "2"],
        [*TRIM, "--schedule", "recover", "--tie-tolerance", "2"],
        [*TRIM, "--strategy", "loss", "--schedule", "recover", "--tie-tolerance", "2"],
        [*EVAL, "--generate", "--max-new-tokens", "9"],
        [*EVAL, "--max-test", "50"],
    ],
    ids=lambda value: " ".join(value[7:]),
)
def test_options_with_an_effect_are_taken(words):
    cli.parse(words)


def test_lists_that_begin_with_a_negative_number_are_lists():
    assert cli.parse([*TRIM, "--protect", "-1,0"]).protect == (-1, 0)
    assert cli.parse([*TRIM, "--protect", "-1"]).protect == (-1,)
    with pytest.raises(InputError, match="-1,0"):
        cli.parse([*TRIM[:-2], "--output=o", "-1,0"])
    assert cli.parse(["drop", "--model", "demo", "--layers", "-2,-1", "--output", "x"]).layers == (-2, -1)


@pytest.mark.parametrize("words", [["--epochs-per-drop", "inf"], ["--text", "demo_law", "--text-ratio", "inf"]])
def test_infinite_numbers_are_refused(capsys, words):
    assert f"{words[-2]} inf: " in (line := refusal(capsys, *TRIM, *words))
    assert "finite" in line


@pytest.mark.parametrize("command", [TRIM, SCAN, ["compare", *TRIM[1:]]], ids=lambda value: value[0])
def test_an_unknown_strategy_is_refused_when_the_settings_are_made(command):
    known = "unknown strategy 'bogus': use one of probability, scan+norm, scan+probability, scan+loss, scan, norm, bi,"
    with pytest.raises(InputError, match=re.escape(known)):
        cli.parse([*command, "--strategy", "bogus"])


@pytest.mark.parametrize("command", [TRIM, COMPARE], ids=lambda value: value[0])
def test_weights_that_cannot_train_are_refused(command):
    with pytest.raises(
        InputError, match=r"--dtype float16 cannot train: .*give float32 with --mixed-precision bf16, or"
    ):
        cli.parse([*command, "--dtype", "float16"])
    with pytest.raises(InputError, match="--mixed-precision bf16 is for float32 weights: leave out --dtype bfloat16"):
        cli.parse([*command, "--dtype", "bfloat16", "--mixed-precision", "bf16"])


@pytest.mark.parametrize(("name", "kind"), [("trim", config.TrimConfig), ("compare", config.CompareConfig)])
def test_what_goes_on_has_the_settings_that_it_began_with(tmp_path, name, kind):
    fresh, begun = (
        kind(model="demo", task="demo_law", output=str(tmp_path)),
        {"sparse_update": "off", "calibration_size": 50},
    )
    rundir.RunDir(tmp_path).config.write_text(plain_settings.to_yaml(fresh.model_copy(update=begun)))
    resumed = cli.parse([name, "--output", str(tmp_path), "--resume"])
    assert (resumed.sparse_update, resumed.calibration_size) == ("off", 50)
    rundir.same_settings(resumed, tmp_path, ["resume"])
    with pytest.raises(InputError, match=r"--train-ratio 0\.5 is for some"):
        cli.parse([name, "--output", str(tmp_path), "--resume", "--train-ratio", "0.5"])
    what = {"trim": "run", "compare": "comparison"}[name]
    with pytest.raises(InputError, match=rf"--sparse-update static: the {what} in .* has off: .* another {what}"):
        rundir.same_settings(resumed.model_copy(update={"sparse_update": "static"}), tmp_path, ["resume"])


def folder(tmp_path, name, model):
    return h.save_model(model, tmp_path / name)


BERT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def strange(base, tmp_path_factory):
    """Folders that are not what the tool wants."""
    root = tmp_path_factory.mktemp("strange")
    h.save_model(BertForMaskedLM(BertConfig(vocab_size=1536, **BERT)), root / "bert")
    t5 = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, vocab_size=1536, decoder_start_token_id=0)
    h.save_model(T5ForConditionalGeneration(t5), root / "t5")
    shutil.copytree(base, root / "pickle")
    torch.save(AutoModelForCausalLM.from_pretrained(base).state_dict(), root / "pickle" / "pytorch_model.bin")
    (root / "pickle" / "model.safetensors").unlink()
    (root / "empty").mkdir()
    return root


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "demo_lwa"}, r"unknown task 'demo_lwa'.*demo_law"),
        ({"task": "no/such.jsonl"}, r"no/such\.jsonl does not exist"),
        ({"depth": 4}, r"--depth 4: the model has only 4 layers"),
        ({"depth": 7}, r"--depth 7: the model has only 4 layers"),
        ({"protect": "0,4"}, r"--protect 4: the model has layers 0 to 3"),
        ({"model": "STRANGE/bert"}, r"STRANGE/bert.*not a causal language model"),
        ({"model": "STRANGE/t5"}, r"STRANGE/t5.*not a causal language model"),
        ({"model": "STRANGE/pickle"}, r"STRANGE/pickle.*no safetensors weights.*allow.pickle"),
        ({"model": "STRANGE/empty"}, r"STRANGE/empty.*no config\.json"),
        ({"model": "STRANGE/none"}, r"STRANGE/none.*no such folder"),
        ({"calibration_size": 24}, r"calibration_size 24 needs more than the 24 training rows"),
        ({"device": "cuda:7"}, r"--device cuda:7: there is no such device"),
        ({"device": "gpu"}, r"--device gpu: there is no such device"),
        ({"device": "meta"}, r"--device meta: there is no such device"),
        ({"text": "no/text.txt"}, r"no/text\.txt"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_trim_refuses_before_it_writes_or_computes(base, task, strange, tmp_path, capsys, changes, message):
    changes = {k: v.replace("STRANGE", str(strange)) if isinstance(v, str) else v for k, v in changes.items()}
    words = h.arguments(h.settings(base, task, tmp_path / "run", depth=3) | changes)
    line = refusal(capsys, "trim", *words)
    assert re.search(message.replace("STRANGE", re.escape(str(strange))), line), line
    assert not (tmp_path / "run").exists()


PLACES = [
    "trim --model PLACE --task demo_law --output o",
    "trim --model BASE --task PLACE/rows.jsonl --output o",
    "trim --model BASE --task TASK --text PLACE/text.txt --output o",
    "trim --model BASE --task TASK --output PLACE",
    "trim --output PLACE --resume",
    "compare --output PLACE --resume",
    "compare --model BASE --task TASK --output PLACE",
    "scan --model PLACE --task TASK --output o",
    "scan --model BASE --task TASK --output PLACE",
    "drop --model PLACE --layers 1 --output o",
    "drop --model PLACE --layers 1 --output o --streaming",
    "drop --model BASE --layers 1 --output PLACE",
    "eval --model BASE --task PLACE",
    "eval --model BASE --task TASK --output PLACE/e.json",
    "bench PLACE",
    "bench BASE --output PLACE",
    "export PLACE --depth 2",
    "export PLACE --to gguf",
    "export BASE --to gguf --output PLACE",
    "push PLACE a/b",
    "demo --output PLACE",
]


def lock(monkeypatch, place):
    """As if this user might not look into `place`: no permission binds root."""

    def guarded(look):
        def denied(path, *arguments, **options):
            if str(place) in str(path):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return look(path, *arguments, **options)

        return denied

    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))


@pytest.mark.parametrize("kind", ["locked", "long"])
@pytest.mark.parametrize("line", PLACES)
def test_a_path_that_cannot_be_looked_at_is_one_line(base, task, tmp_path, capsys, monkeypatch, line, kind):
    monkeypatch.chdir(tmp_path)
    place = tmp_path / ("x" * 300 if kind == "long" else "locked")
    if kind == "locked":
        lock(monkeypatch, place)
    named = {"PLACE": str(place), "BASE": str(base), "TASK": str(task)}
    said = refusal(capsys, *re.sub("PLACE|BASE|TASK", lambda found: named[found[0]], line).split())
    assert place.name in said
    assert not re.search("there is no run|holds no run", said)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "a/b"),
            2,
            "trimllm: a/b: Permission denied: check the path\n",
        ),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", b"a"),
            2,
            "trimllm: a: File name too long: check the path\n",
        ),
        (OSError(errno.EIO, "Input/output error", "a"), 1, "trimllm: a: Input/output error: check the path\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "trimllm: No space left on device: free some space\n"),
        (OSError(errno.EIO, "Input/output error"), 1, "trimllm: Input/output error\n"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, ""),
    ],
)
def test_what_the_system_refuses_is_one_line(capsys, monkeypatch, error, code, line):
    def refuse(_):
        raise error

    monkeypatch.setattr(cli, "run", refuse)
    assert call(capsys, "tasks") == (code, "", line)


def test_an_error_that_is_not_of_the_system_stays_a_traceback(monkeypatch):
    monkeypatch.setattr(cli, "run", lambda _: (_ for _ in ()).throw(OSError("a bug")))
    with pytest.raises(OSError, match="a bug"):
        cli.main(["tasks"])


def test_a_full_disk_behind_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "trimllm", "tasks"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": ""},
        )
    assert (done.returncode, done.stderr) == (1, "trimllm: No space left on device: free some space\n")


@pytest.mark.parametrize(("error", "code"), [(InputError("the reason"), 2), (TrimError("the reason"), 1)])
def test_a_full_disk_behind_standard_output_hides_no_other_error(monkeypatch, capsys, error, code):
    def fail(_):
        print("a line that waits")
        raise error

    monkeypatch.setattr(cli, "run", fail)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["tasks"]) == code
    assert capsys.readouterr().err == "trimllm: the reason\n"


def test_what_the_encoding_lacks_is_escaped(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(cli, "run", lambda _: print("\u0437: done"))
    assert cli.main(["tasks"]) == 0
    assert out.buffer.getvalue() == b"\\u0437: done\n"


def test_row_with_an_answer_out_of_range_is_named(base, tmp_path, capsys):
    rows = [{"question": f"Which {i}?", "choices": ["a", "b"], "answer": i % 2} for i in range(20)]
    rows[6]["answer"] = 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = h.arguments(h.settings(base, tmp_path / "rows.jsonl", tmp_path / "run"))
    assert re.search(r"rows\.jsonl:7.*2", refusal(capsys, "trim", *words))


def test_too_few_rows_are_counted(base, tmp_path, capsys):
    rows = [{"question": f"Which {i}?", "choices": ["a", "b"], "answer": i % 2} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = h.arguments(h.settings(base, tmp_path / "rows.jsonl", tmp_path / "run", calibration_size=8))
    assert f"3 training rows (from {tmp_path}/rows.jsonl:" in refusal(capsys, "trim", *words)


def test_prompts_longer_than_the_context_are_counted_and_work_with_truncate(base, task, tmp_path, capsys):
    words = h.arguments(h.settings(base, task, tmp_path / "run", depth=3, max_length=16, epochs_per_drop=0))
    line = refusal(capsys, "trim", *words)
    assert re.search(r"^\d+ of \d+ rows do not fit the context of 16 tokens \(first: .*jsonl:\d+, \d+ tokens\)", line)
    assert "--truncate" in line
    code, _, err = call(capsys, "trim", *words, "--truncate")
    assert code == 0
    for name in ("training", "calibration", "reported"):
        assert re.search(rf"--truncate, \d+ {name} rows: prompts cut from the left: [1-9]\d*, answers .*: 0", err)


def test_a_scan_by_loss_says_what_truncate_cuts_too(base, task, tmp_path, capsys):
    words = ["scan", "--model", base, "--task", task, "--max-length", 16, "--truncate", "--calibration-size", 6]
    code, _, err = call(capsys, *words, "--strategy", "loss", "--device", "cpu", "--output", tmp_path / "scan")
    assert code == 0
    assert re.search(r"--truncate, 6 calibration rows: prompts cut from the left: [1-9]", err)


def test_written_answers_longer_than_the_context_work_with_truncate(base, tmp_path, capsys):
    rows = [{"question": f"What is {i}?", "answer_text": f"It is {i}. " * 9 * (i % 2 + 1)} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = h.settings(base, tmp_path / "rows.jsonl", tmp_path / "run", depth=3, max_length=48, epochs_per_drop=0)
    words = h.arguments(settings | {"calibration_size": 4})
    assert "rows do not fit the context of 48 tokens" in refusal(capsys, "trim", *words)
    code, _, err = call(capsys, "trim", *words, "--truncate")
    assert code == 0
    cut = r"rows: prompts cut from the left: 0, answers cut at their end: [1-9]\d*"
    assert re.search(rf"--truncate, \d+ training {cut}", err)
    assert any("--truncate" in note for note in h.result(tmp_path / "run")["notes"])
    trimmed = ["eval", "--model", str(tmp_path / "run" / "model"), *words[words.index("--task") :][:2]]
    code, _, err = call(capsys, *trimmed, "--max-length", "48", "--truncate")
    assert code == 0
    assert re.search(rf"--truncate, \d+ reported {cut}", err)


def test_pickled_weights_are_read_when_they_are_allowed(strange, task, tmp_path, capsys):
    words = h.arguments(h.settings(strange / "pickle", task, tmp_path / "run", depth=3, warmup_epochs=0))
    code, out, err = call(capsys, "trim", *words, "--allow-pickle")
    assert code == 0, err
    assert "trimmed checkpoint:" in out
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_output_of_another_run_is_refused_before_the_model_is_loaded(task, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: x\n")
    words = h.arguments(h.settings(tmp_path / "no such model", task, tmp_path / "run"))
    assert "already holds a run: add --resume" in refusal(capsys, "trim", *words)


def test_drop_saves_what_is_left(base, tmp_path, capsys):
    code, out, _ = call(capsys, "drop", "--model", base, "--layers", "1,-1", "--output", tmp_path / "cut")
    assert code == 0
    assert "2 of 4 layers, reloaded and compared" in out
    mine, original = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "cut", base))
    for place, layer in enumerate((0, 2)):
        for a, b in zip(mine.model.layers[place].parameters(), original.model.layers[layer].parameters(), strict=True):
            assert torch.equal(a, b)
    assert json.loads((tmp_path / "cut" / "plan.json").read_text())["layers"] == [0, 2]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("4", "layer 4 does not exist: the model has layers 0 to 3 (or -4 to -1)"),
        ("-5", "layer -5 does not exist"),
        ("0,1,2,3", "cannot drop all 4 layers"),
    ],
)
def test_drop_refuses_layers_that_are_not_there(base, tmp_path, capsys, layers, message):
    assert message in refusal(capsys, "drop", "--model", base, f"--layers={layers}", "--output", tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("more", [[], ["--streaming"]], ids=["in memory", "streaming"])
@pytest.mark.parametrize("holds", ["notes.txt", "plan.json"])
def test_drop_refuses_a_directory_in_use_before_it_loads_the_model(tmp_path, capsys, no_model, more, holds):
    (tmp_path / holds).write_text("")
    line = refusal(capsys, "drop", "--model", "demo", "--layers", "1", "--output", tmp_path, *more)
    assert line.startswith(f"--output {tmp_path}: the directory is not empty: choose another one")
    assert "overwrite" not in line


def test_drop_with_a_full_disk_is_exit_code_1(base, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    line = refusal(capsys, "drop", "--model", base, "--layers", "1", "--output", tmp_path / "cut", code=1)
    assert "disk is full" in line
    assert not list(tmp_path.iterdir())


def test_eval_with_a_full_disk_prints_what_it_found(base, task, tmp_path, capsys, monkeypatch):
    def full(path, _):
        raise TrimError(files.full_disk(path))

    monkeypatch.setattr(files, "write_json", full)
    code, out, err = call(capsys, "eval", "--model", base, "--task", task, "--output", tmp_path / "found.json")
    assert (code, "found.json: the disk is full" in err) == (1, True)
    assert out.startswith(f"{task.name}: acc ")


def test_a_bare_off_in_yaml_is_the_word(base, task, tmp_path):
    (tmp_path / "run.yaml").write_text("sparse_update: off\ncache_frozen_prefix: off\nmixed_precision: no\n")
    read = plain_settings.read_yaml(tmp_path / "run.yaml")
    made = plain_settings.make(config.TrimConfig, {"model": "m", "task": "t", "output": "o", **read})
    assert (made.sparse_update, made.cache_frozen_prefix, made.mixed_precision) == ("off", "off", "no")
    with pytest.raises(InputError, match="--schedule False: must be"):
        plain_settings.make(config.TrimConfig, {"model": "m", "task": "t", "output": "o", "schedule": False})


def test_scan_writes_table_and_picture_and_refuses_to_do_it_twice(base, task, tmp_path, capsys):
    words = ["--model", base, "--task", task, "--calibration-size", "6", "--output", tmp_path / "scan"]
    assert "--protect 9" in refusal(capsys, "scan", *words, "--protect", "9")
    assert not (tmp_path / "scan").exists()
    code, out, _ = call(capsys, "scan", *words, "--unit", "sublayer", "--protect", "0,-1")
    assert code == 0
    record = json.loads((tmp_path / "scan" / "scan.json").read_text(), parse_constant=pytest.fail)
    assert len(record["units"]) == 8
    assert record["first"] in {row["unit"] for row in record["units"]}
    assert record["first"][-1] in "12"
    assert f"least important: {record['first']}" in out, "no sub-layer goes alone"
    assert "would go first" not in out
    assert (tmp_path / "scan" / "scan.png").read_bytes().startswith(b"\x89PNG")
    row = next(row for row in record["units"] if row["unit"] == "mlp 1")
    shown = next(line.split() for line in out.splitlines() if line.startswith("mlp 1 "))
    assert shown[2:4] == [f"{row['importance']:.4g}", f"{row['probability']:.1f}"], "what decides is shown"
    assert "already holds scan.json" in refusal(capsys, "scan", *words)


def test_a_scan_that_was_cut_goes_on_and_so_does_its_analysis(base, task, tmp_path, capsys, monkeypatch):
    words = ["scan", "--model", base, "--task", task, "--calibration-size", "12", "--eval-batch-size", "96"]
    words += ["--analysis", "--analysis-items", "4", "--output"]
    assert call(capsys, *words, tmp_path / "straight")[0] == 0
    wanted = json.loads((tmp_path / "straight" / "scan.json").read_text())
    measured, measure, explain = [], deletion.measure, scan_command.summary.measure

    def cut(*arguments, **named):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(arguments)
        return measure(*arguments, **named)

    def late(*_):
        raise KeyboardInterrupt

    output = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(deletion, "measure", cut)
        assert refusal(capsys, *words, output, code=1) == "interrupted; the same command goes on"
    (kept,) = output.iterdir()
    assert kept.match("scan-*.jsonl")
    assert len(kept.read_text().splitlines()) == 2

    measured.clear()
    monkeypatch.setattr(deletion, "measure", lambda *a, **k: measured.append(a) or measure(*a, **k))
    monkeypatch.setattr(scan_command.summary, "measure", late)
    code, _, err = call(capsys, *words, output)
    assert code == 1
    assert "  goes on with a scan that was cut: 2 batches are there" in err
    count = len(measured) + 2
    assert json.loads((output / "scan.json").read_text())["units"] == wanted["units"]

    other = [word if word != "4" else "5" for word in words]  # the same trials
    measured.clear()
    monkeypatch.setattr(scan_command.summary, "measure", explain)
    code, _, err = call(capsys, *other, output)
    assert code == 0, err
    assert f"{count} batches are there" in err
    assert not measured
    assert sorted(path.name for path in output.iterdir()) == sorted(
        [f"{name}.{kind}" for name in ("scan", "analysis") for kind in ("json", "png")]
    )


def test_a_scan_of_something_else_does_not_take_up_what_was_cut(base, task, tmp_path, capsys, monkeypatch):
    model = shutil.copytree(base, tmp_path / "model")
    words = ["scan", "--task", task, "--calibration-size", "6", "--output", tmp_path / "scan", "--model", model]
    keep = ScanFile.keep_batch

    def cut(*arguments):
        keep(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ScanFile, "keep_batch", cut)
        assert call(capsys, *words)[0] == 1
    code, _, err = call(capsys, *words, "--unit", "sublayer")
    assert code == 0, err
    assert "goes on with" not in err
    assert "already holds scan.json" in refusal(capsys, *words, "--unit", "sublayer")

    (tmp_path / "scan" / "scan.json").unlink()
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    code, _, err = call(capsys, *words)
    assert code == 0, err
    assert "goes on with" not in err, "weights that changed since"
    assert len(list((tmp_path / "scan").glob("scan-*.jsonl"))) == 1, "what was cut is kept for its own"


def test_scan_by_loss_shows_likelihoods_and_an_analysis_accuracies(base, task, tmp_path, capsys):
    words = ["--model", base, "--task", task, "--calibration-size", "6", "--strategy", "loss"]
    for more, metric in ([], "likelihood"), (["--analysis"], "acc"), (["--metric", "acc_norm"], "acc_norm"):
        code, out, _ = call(capsys, "scan", *words, *more, "--output", tmp_path / metric)
        assert code == 0
        assert f"intact: {metric} " in out
        assert f"{metric} without it" in out
        assert json.loads((tmp_path / metric / "scan.json").read_text())["metric"] == metric


def test_scan_points_out_dozens_of_choices(base, task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scan, "MANY_CHOICES", 2)
    words = ["--model", base, "--task", task, "--calibration-size", "6"]
    papers = ["--strategy", "scan+norm"]
    ways = {
        "plain": [],
        "analysis": ["--analysis"],
        "racing": ["--scan", "racing", *papers],
        "loss": ["--strategy", "loss"],
    }
    for name, more in ways.items():
        _, _, err = call(capsys, "scan", *words, *more, "--output", tmp_path / name)
        assert ("--strategy loss asks the right one only" in err) == (name == "plain"), name


def test_scan_with_every_layer_protected_still_keeps_its_table(base, task, tmp_path, capsys):
    words = ["--model", base, "--task", task, "--calibration-size", "6", "--output", tmp_path / "scan"]
    code, out, _ = call(capsys, "scan", *words, "--protect", "0,1,2,3", "--strategy", "angular")
    assert code == 0
    assert "nothing: every layer is protected" in out
    assert len(json.loads((tmp_path / "scan" / "scan.json").read_text())["units"]) == 4


@pytest.fixture
def no_model(monkeypatch):
    """Fails where a model is loaded."""

    def load(*_, **__):
        pytest.fail("a model was loaded")

    monkeypatch.setattr(models, "load", load)


def test_scan_and_eval_refuse_an_output_that_cannot_be_written_before_they_compute(task, tmp_path, capsys, no_model):
    (tmp_path / "file").write_text("")
    words = ["--model", "demo", "--task", task, "--output"]
    for name, output in (("scan", "file/scan"), ("eval", "file/results/e.json"), ("scan", "file")):
        line = refusal(capsys, name, *words, tmp_path / output)
        assert re.search(r"--output .*file.*(choose another --output|name a directory)$", line)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("task", "expected"),
    [("hellaswg", "did you mean 'hellaswag'"), ("a/b.csv", "a/b.csv does not exist"), ("task.yaml", "task.yaml")],
)
def test_a_task_that_is_none_is_refused_before_the_model_is_loaded(task, expected, tmp_path, capsys, no_model):
    model = tmp_path / "no such model"  # trim loads by another name, and would say so of this one
    for name, output in (("scan", "scan"), ("eval", "e.json"), ("trim", "run")):
        depth = ["--keep", "0.5"] if name == "trim" else []
        assert expected in refusal(
            capsys, name, "--model", model, "--task", task, *depth, "--output", tmp_path / output
        )


def test_scan_prints_its_table_before_it_writes(base, task, tmp_path, capsys, monkeypatch):
    def denied(*_):
        raise TrimError("cannot write")

    monkeypatch.setattr(files, "write_json", denied)
    words = ["--model", base, "--task", task, "--calibration-size", "6", "--output", tmp_path / "scan"]
    code, out, err = call(capsys, "scan", *words)
    assert (code, "would go first: block" in out, "block 3" in out) == (1, True, True), err


@pytest.mark.parametrize("unit", ["block", "pair"])
def test_scan_recommends_only_what_a_cut_can_express(base, task, tmp_path, capsys, monkeypatch, unit):
    def only_the_second(_, layout):
        return None if layout == ((0, 0), (2, 2), (3, 3)) else "not this one"

    monkeypatch.setattr(legality, "refusal", only_the_second)
    words = ["--model", base, "--task", task, "--calibration-size", "6", "--output", tmp_path / "scan", "--unit", unit]
    assert "would go first: block 1 (" in call(capsys, "scan", *words)[1]
    monkeypatch.setattr(legality, "refusal", lambda *_: "no such config")
    words[-3] = tmp_path / "again"
    assert "would go first: nothing: no such config" in call(capsys, "scan", *words)[1]
    assert json.loads((tmp_path / "again" / "scan.json").read_text())["first"] is None


def test_scan_says_its_notes_and_compares_runs_of_half_the_depth(base, task, tmp_path, capsys, monkeypatch):
    original, runs = scan.scan, []

    def noted(*arguments, run, **more):
        runs.append(run)
        return dataclasses.replace(original(*arguments, run=run, **more), notes=("layer 0 must stay",))

    monkeypatch.setattr(scan, "scan", noted)
    words = ["--model", base, "--task", task, "--calibration-size", "6", "--strategy", "angular"]
    code, out, err = call(capsys, "scan", *words, "--output", tmp_path / "half")
    assert code == 0, err
    assert "  layer 0 must stay\n" in err
    assert re.search(r"would go first: block [012] ", out), "no run of two begins at the last block"
    code, out, err = call(capsys, "scan", *words, "--output", tmp_path / "three", "--run", "3", "--protect", "0,1")
    assert code == 0, err
    assert "would go first: nothing: no run fits" in out
    assert runs == [2, 3]
    assert "--run 5: the model has only 4 layers" in refusal(capsys, "scan", *words, "--output", "x", "--run", "5")


def test_eval_prints_and_writes_the_same_numbers(base, task, tmp_path, capsys):
    words = ["--model", base, "--task", task]
    code, out, _ = call(capsys, "eval", *words, "--output", tmp_path / "e.json")
    record = json.loads((tmp_path / "e.json").read_text())
    assert code == 0
    assert f"acc {record['value']:.1f} +- {record['stderr']:.1f} (n=8)" in out
    assert "this is a directory" in refusal(capsys, "eval", *words, "--output", tmp_path)
    assert "needs a generation task" in refusal(capsys, "eval", *words, "--generate")


def test_eval_against_another_model_tells_the_difference_of_paired_answers(base, task, tmp_path, capsys):
    words = ["--task", task, "--output", tmp_path / "e.json"]
    call(capsys, "drop", "--model", base, "--layers", "0,2", "--output", tmp_path / "cut")
    found = []
    for one, other in ((base, tmp_path / "cut"), (tmp_path / "cut", base), (base, base)):
        code, out, err = call(capsys, "eval", "--model", one, "--against", other, *words)
        assert code == 0, err
        found.append(json.loads((tmp_path / "e.json").read_text()))
        against = found[-1]["against"]
        assert f"against {other}: acc {against['value']:.1f} +- " in out
        same = one == other
        assert ("every item scores the same" in out) is same, "of which an error of 0 would say that it is certain"
        assert same or f"difference: {shown(against['above'])} points (paired)" in out
        assert against["above"]["difference"] == pytest.approx(found[-1]["value"] - against["value"])
    there, back, none = found
    assert there["loss"] == back["against"]["loss"] == none["loss"] == none["against"]["loss"]
    assert there["against"]["loss"] == back["loss"] != none["loss"]
    assert there["against"]["above"]["difference"] == -back["against"]["above"]["difference"]
    assert none["against"]["above"] == {"difference": 0, "stderr": 0}


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ("everything", "cannot load "),
        ("model.safetensors", "the folder has no model.safetensors"),
        ("tokenizer.json", "cannot load a tokenizer from"),
    ],
)
def test_eval_against_what_cannot_be_asked_is_refused_before_the_first_is(
    base, task, tmp_path, capsys, no_model, lacks, said
):
    other = tmp_path / "other"
    if lacks != "everything":
        shutil.copytree(base, other, ignore=shutil.ignore_patterns(lacks))
    message = refusal(capsys, "eval", "--model", base, "--task", task, "--against", other)
    assert message.startswith(f"--against {other}: ")
    assert said in message
    assert "--model" not in message


def test_eval_against_a_model_with_another_template_says_so(base, tmp_path, capsys):
    for name, user in (("one", "user: "), ("other", "[user] ")):
        shutil.copytree(base, tmp_path / name)
        template = "{%- for m in messages %}{{ (WHO if m.role == 'user' else '> ') + m.content }}\n{% endfor %}"
        template += "{%- if add_generation_prompt %}{{ '> ' }}{% endif %}"
        (tmp_path / name / "chat_template.jinja").write_text(template.replace("WHO", repr(user)))
    talk = [{"role": "user", "content": "who is it?"}, {"role": "assistant", "content": "a cat"}]
    rows = [json.dumps({"messages": [talk[0] | {"content": f"who is it {n}?"}, talk[1]]}) for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    words = ["eval", "--task", tmp_path / "rows.jsonl", "--model", tmp_path / "one", "--against"]
    for name in ("one", "other"):
        code, _, err = call(capsys, *words, tmp_path / name)
        assert code == 0, err
        assert ("is asked in other words: the two have different chat templates" in err) == (name == "other")


def test_eval_against_a_model_for_which_other_rows_are_drawn_is_refused(base, tmp_path, capsys):
    """A template that leaves out what the system says makes rows alike, of which one is drawn."""
    for name, roles in (("one", ("system", "user", "assistant")), ("other", ("user", "assistant"))):
        shutil.copytree(base, tmp_path / name)
        template = "{%- for m in messages %}{% if m.role in ROLES %}{{ m.content }}\n{% endif %}{% endfor %}"
        (tmp_path / name / "chat_template.jinja").write_text(template.replace("ROLES", repr(roles)))
    system = [{"role": "system", "content": f"you are the cat {n}."} for n in range(40)]
    talk = [{"role": "user", "content": "who is it?"}, {"role": "assistant", "content": "a cat"}]
    rows = [[one, talk[0] | {"content": f"who is it {n % 20}?"}, talk[1]] for n, one in enumerate(system)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"messages": each}) for each in rows))
    words = ["eval", "--task", tmp_path / "rows.jsonl", "--model", tmp_path / "one", "--against", tmp_path / "other"]
    code, out, err = call(capsys, *words)
    assert (code, "likelihood" in out) == (2, True), "what is known of the first is told"
    assert f"trimllm: --against {tmp_path / 'other'}: its chat template makes other rows alike" in err


def test_likelihoods_of_other_tokens_are_not_compared(base, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:50]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "text.txt").write_text("it was a long, long day. " * 400)
    words = ["eval", "--model", base, "--task", tmp_path / "text.txt", "--against", other]
    code, out, err = call(capsys, *words, "--output", tmp_path / "e.json")
    assert code == 2
    assert out.startswith("text: likelihood ")
    assert f"trimllm: --against {other}: its tokenizer, chat template or context makes other tokens of" in err
    assert json.loads((tmp_path / "e.json").read_text())["metric"] == "likelihood"


def test_the_same_tokens_in_other_pieces_are_compared_and_that_is_said(base, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(base, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    (tmp_path / "text.txt").write_text("it was a long, long day. " * 400)
    words = ["eval", "--model", base, "--task", tmp_path / "text.txt", "--against", other]
    words += ["--output", tmp_path / "e.json"]
    for more, told in (([], True), (["--max-length", "16"], False)):
        code, _, err = call(capsys, *words, *more)
        assert code == 0, err
        assert (f"{other} reads in other pieces: contexts differ" in err) == told
        assert (json.loads((tmp_path / "e.json").read_text())["against"]["above"]["difference"] != 0) == told


def test_eval_writes_before_it_prints(base, task, tmp_path, capsys, monkeypatch):
    def gone(*_, **__):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(eval_command, "print", gone, raising=False)
    words = ["eval", "--model", base, "--task", task, "--output", tmp_path / "e.json"]
    assert refusal(capsys, *words, code=1) == "Input/output error"
    assert json.loads((tmp_path / "e.json").read_text())["n"] == 8
    monkeypatch.setattr(eval_command, "print", lambda text: gone() if text.startswith("against") else None)
    assert refusal(capsys, *words, "--against", base, code=1) == "Input/output error"
    assert json.loads((tmp_path / "e.json").read_text())["against"]["n"] == 8


def test_prompts_that_leave_no_room_for_an_answer_are_refused_or_counted(base, tmp_path, capsys):
    rows = [{"question": f"Name {i}? " * (1 + 10 * (i == 3)), "answer": "whale"} for i in range(4)]
    (tmp_path / "task").mkdir()
    for name in ("train", "test"):
        (tmp_path / "task" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = models.config_of(str(base)).max_position_embeddings - 25
    words = ["eval", "--model", base, "--task", tmp_path / "task", "--generate", "--max-new-tokens", more]
    said = refusal(capsys, *words)
    assert re.search(
        rf"1 of 4 prompts leave no room for --max-new-tokens {more} \(first: .*:4\): pass --truncate", said
    )
    code, _, err = call(capsys, *words, "--truncate")
    assert code == 0, err
    assert f"4 prompts: cut from the left, to leave room for --max-new-tokens {more}: 1" in err


def test_generated_answers_are_judged_against_every_reference(base, tmp_path, capsys, monkeypatch):
    rows = [{"question": f"Name {i}?", "answer": ["the blue whale", "whale"]} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = ["Whale", "the red whale"] * 20
    monkeypatch.setattr(eval_command, "generate", lambda *arguments, **_: answers[: len(arguments[2])])
    words = ["eval", "--model", base, "--task", tmp_path / "rows.jsonl", "--generate", "--max-new-tokens", "4"]
    code, out, err = call(capsys, *words, "--output", tmp_path / "e.json")
    assert code == 0, err
    alone = json.loads((tmp_path / "e.json").read_text())
    found = alone["generation"]
    assert found["exact_match"] == 50
    assert 50 < found["rouge_l"] < 100
    assert found["repetition"] == 0
    assert "generated: exact_match 50.0" in out

    monkeypatch.setattr(eval_command, "generate", lambda *arguments, **_: [answers.pop(0)] * len(arguments[2]))
    code, out, err = call(capsys, *words, "--output", tmp_path / "e.json", "--against", base)
    assert code == 0, err
    both = json.loads((tmp_path / "e.json").read_text())
    assert (both["generation"]["exact_match"], both["against"]["generation"]["exact_match"]) == (100, 0)
    assert f"against {base}: generated: exact_match 0.0" in out, "each model writes"


def test_generation_runs_on_the_model(base, tmp_path, capsys):
    rows = [{"question": f"Name {i}?", "answer": "whale"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", "--model", base, "--task", tmp_path / "rows.jsonl", "--generate", "--max-new-tokens", "4"]
    code, out, err = call(capsys, *words)
    assert code == 0, err
    assert "generated: exact_match" in out


def test_tasks_lists_the_built_in_ones(capsys):
    code, out, _ = call(capsys, "tasks")
    assert code == 0
    assert "demo_medicine" in out


def test_export_of_a_directory_without_a_run(capsys, tmp_path):
    assert "holds no run" in refusal(capsys, "export", tmp_path, "--depth", "3")


def test_export_of_a_depth_that_is_trained_and_not_measured_says_so(base, task, tmp_path, capsys):
    output = tmp_path / "run"
    h.run(base, task, output, depth=3, warmup_epochs=0, epochs_per_drop=0)
    says = f"--depth 3: it is trained, and not measured yet: go on with trimllm trim --output {output} --resume"
    whole = (output / "journal.jsonl").read_text()
    kept = [line for line in whole.splitlines(keepends=True) if '"stage", "depth": 3' not in line]
    assert len(kept) < len(whole.splitlines())
    (output / "journal.jsonl").write_text("".join(kept))
    assert refusal(capsys, "export", output, "--depth", 3) == says
    (output / "journal.jsonl").write_text(whole)
    (output / "plans" / "depth-3.json").unlink()
    assert refusal(capsys, "export", output, "--depth", 3) == says


@pytest.mark.parametrize("source", [".", "./", "../here", "../here/..", "sub/.."])
def test_what_is_exported_lies_beside_its_source_not_in_it(source, tmp_path, monkeypatch):
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    target = export_command._default_target(config.ExportConfig(source=source, to="onnx"))
    assert target.resolve() == Path(source).resolve().with_name(f"{Path(source).resolve().name}-onnx")


def test_export_needs_no_base_and_takes_the_dtype_of_the_run(task, tmp_path, capsys):
    base, output = h.save_base(tmp_path / "base", depth=4), tmp_path / "run"
    h.run(base, task, output, depth=3, warmup_epochs=0, epochs_per_drop=0)
    start, *others = h.journal(output)
    lines = [start | {"save_dtype": "bfloat16"}, *others]
    (output / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.rmtree(base)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "plan.json").write_text("{}")
    line = refusal(capsys, "export", output, "--depth", "3", "--output", tmp_path / "used")
    assert line.startswith(f"--output {tmp_path / 'used'}: the directory is not empty: choose another one")
    code, _, err = call(capsys, "export", output, "--depth", "3")
    assert code == 0, err
    assert AutoModelForCausalLM.from_pretrained(output / "model-depth-3").dtype == torch.bfloat16
    assert (output / "model-depth-3" / "tokenizer.json").exists()
    card = (output / "model-depth-3" / "README.md").read_text()
    assert "on the way train for 33% of `--epochs-per-drop`" in card


@pytest.mark.parametrize("name", ["trim", "compare", "bench", "tasks"])
def test_an_interruption_is_1_and_names_resume_where_there_is_one(capsys, monkeypatch, name):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse", stop)
    remedy = "; a run that has begun goes on with --resume" if "resume" in cli.COMMANDS[name].model_fields else ""
    assert call(capsys, name) == (1, "", f"trimllm: interrupted{remedy}\n")


@pytest.fixture
def terminal(monkeypatch):
    """A console on a terminal of 40 columns, and the time it reads."""
    now = [0.0]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    return console.Console(), now


def test_a_live_line_fits_the_terminal_and_makes_way_for_a_note(capsys, terminal, monkeypatch):
    shown, now = terminal
    with shown.progress("bench") as show:
        now[0] = 1
        show(1, 4, "a/very/long/path/of/a/model/that/does/not/fit")
        shown.say("a note")
    line, note, end = capsys.readouterr().err.split(console.CLEAR)[1:]
    assert line == "bench  1/4  a/very/long/path/of/a/model"
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda stream: os.terminal_size((20 if stream == 2 else 80, 24)))
    assert console._columns() == 20, "of the terminal of standard error, whatever standard output is"
    assert (note, end) == ("a note\n", "")


def test_time_left_is_that_of_what_is_done_since_the_first_call(capsys, terminal):
    shown, now = terminal
    with shown.progress("scan") as show:
        for seconds, done in (1, 0), (2, 90), (3, 95):
            now[0] = seconds
            show(done, 100)
    with shown.progress("scan") as show:  # 90 of them in an earlier process
        for seconds, done in (4, 91), (6, 92):
            now[0] = seconds
            show(done, 100)
    lines = list(filter(None, capsys.readouterr().err.split(console.CLEAR)))
    assert lines == [
        "scan  0/100",
        "scan  90/100  0 s left",
        "scan  95/100  0 s left",
        "scan  91/100",
        "scan  92/100  16 s left",
    ]


def test_a_line_is_written_in_one_piece_where_nothing_is_buffered(monkeypatch):
    """Two processes of a run write to one standard error; `python -u`, as in many containers."""
    pieces = []

    class Pieces(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            pieces.append(bytes(data))
            return len(data)

    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(Pieces(), write_through=True))
    shown = console.Console()
    monkeypatch.setattr(console, "LOG_EVERY", 0.0)
    with shown.progress("scan") as show:
        show(1, 2)
    shown.say("a note")
    assert cli.main(["trimm"]) == 2
    said = [b"scan  1/2\n", b"a note\n"]
    assert (pieces[:2], len(pieces), pieces[2][:9], pieces[2][-1:]) == (said, 3, b"trimllm: ", b"\n")
    monkeypatch.setattr(sys, "stderr", None)  # as it is where standard error was closed
    assert (cli.main(["trimm"]), cli.main(["tasks"])) == (2, 0)


def test_every_setting_of_a_run_is_documented_and_typed():
    for name, info in config.TrimConfig.model_fields.items():
        assert info.description, name
    with pytest.raises(InputError, match="--lr 0"):
        plain_settings.make(config.TrimConfig, {"model": "m", "task": "t", "output": "o", "lr": 0})
    assert (
        yaml.safe_load(plain_settings.to_yaml(config.TrimConfig(model="m", task="t", output="o")))["strategy"]
        == "probability"
    )


def test_options_in_capitals_are_options(tmp_path):
    (tmp_path / "c.yaml").write_text("max_test: 7\n")
    command = cli.parse(["eval", "--Config", str(tmp_path / "c.yaml"), "--Model", "A/B", "--TASK=Own.jsonl"])
    assert (command.max_test, command.model, command.task) == (7, "A/B", "Own.jsonl")
    with pytest.raises(InputError, match="there is no run in"):
        cli.parse(["trim", "--Output", str(tmp_path / "none"), "--Resume"])


@pytest.mark.parametrize(("asked", "wanted"), [("--keep=0.5", (0.5, None)), ("--depth=2", (None, 2))])
def test_a_target_on_the_command_line_takes_the_place_of_the_files(tmp_path, asked, wanted):
    stands = "depth: 3" if "keep" in asked else "keep: 0.25"
    (tmp_path / "c.yaml").write_text(f"model: a\ntask: b\n{stands}\n")
    command = cli.parse(["trim", "--config", str(tmp_path / "c.yaml"), asked, "--output", "o"])
    assert (command.keep, command.depth) == wanted
    with pytest.raises(InputError, match="give --keep or --depth, not both"):
        cli.parse(["trim", "--config", str(tmp_path / "c.yaml"), "--keep=0.5", "--depth=2", "--output", "o"])


def test_a_setting_that_is_unknown_is_named_where_it_stands(tmp_path):
    (tmp_path / "config.yaml").write_text("model: a\ntask: b\nnew_option: 1\n")
    with pytest.raises(InputError, match=r"--output .*: config.yaml: unknown setting 'new_option'"):
        cli.parse(["trim", "--output", str(tmp_path), "--resume"])
