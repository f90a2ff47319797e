"""A new folder is whole or not there, whatever happens; and it may only be written where nothing else is."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from trimllm.checkpoints import folders
from trimllm.checkpoints.folders import appearing, check_target, check_writable, held
from trimllm.errors import InputError, TrimError
from trimllm.files import disk_errors


def fill(target: Path, text: str, error: BaseException | None = None, **options: Any) -> None:
    with appearing(target, **options) as folder:
        (folder / "weights").write_text(text)
        (folder / "more").mkdir()
        if error is not None:
            raise error


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError(), TrimError("no"), OSError(errno.EIO, "bad disk")])
def test_a_folder_appears_whole_or_not_at_all(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(TrimError if isinstance(error, OSError) else type(error)):
        fill(tmp_path / "a" / "b" / "out", "half", error)
    assert not names(tmp_path), "nor are the folders above it"
    fill(tmp_path / "a" / "b" / "out", "whole")
    assert names(tmp_path) == ["a", "a/b", "a/b/out", "a/b/out/more", "a/b/out/weights"]


def test_all_of_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, wait, settled = tmp_path / "new", os.fsync, set()

    def waiting(descriptor: int) -> None:
        settled.add((os.fstat(descriptor).st_ino, target.exists()))
        wait(descriptor)

    monkeypatch.setattr(folders.os, "fsync", waiting)
    with folders.appearing(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
        (folder / "other").write_text("y")
    parts = [target, *target.rglob("*")]
    assert len(parts) == 4
    assert settled == {*((path.stat().st_ino, False) for path in parts), (tmp_path.stat().st_ino, True)}


def test_a_file_system_that_cannot_wait_is_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(folders.os, "fsync", refused)
    with folders.appearing(tmp_path / "new") as folder:
        (folder / "file").write_text("x")
    assert (tmp_path / "new" / "file").read_text() == "x"


def test_an_older_folder_stays_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    fill(out, "old")
    with pytest.raises(KeyboardInterrupt):
        fill(out, "half", KeyboardInterrupt(), overwrite=True)
    with pytest.raises(TrimError, match=r"^cannot write to .*out: Directory not empty$"):
        fill(out, "new")
    real = Path.rename

    def fill_where_moves_fail(*marks: str) -> None:
        def fail(path: Path, target: Path) -> Path:
            if any(mark in str(path) for mark in marks):
                raise OSError(errno.EIO, "bad disk")
            return real(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", fail)
            with pytest.raises(TrimError, match="cannot write"):
                fill(out, "new", overwrite=True)

    fill_where_moves_fail(".partial-")
    assert (out / "weights").read_text() == "old"
    fill_where_moves_fail(".partial-", ".old-")
    (kept,) = tmp_path.glob(".out.old-*/folder")
    assert (kept / "weights").read_text() == "old"
    with pytest.raises(KeyboardInterrupt):
        fill(out, "half", KeyboardInterrupt(), overwrite=True)
    assert (kept / "weights").read_text() == "old"
    fill(out, "newer")
    assert (kept / "weights").read_text() == "old"
    (tmp_path / ".out.old-elephant" / "mine").mkdir(parents=True)
    fill(out, "new", overwrite=True)
    assert (out / "weights").read_text() == "new"
    theirs = [".out.old-elephant", ".out.old-elephant/mine"]
    assert names(tmp_path) == [*theirs, "out", "out/more", "out/weights"]


def test_an_empty_folder_and_a_link_to_one_are_filled_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    check_target(tmp_path / "link")
    fill(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "real" / "weights").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_folder_has_the_users_permissions(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        fill(tmp_path / "out", "new")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~mask


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage(9, 9, 2**30))
    words = r"the disk is full \(2\.00 GiB needed, 1\.00 GiB free\): free some space, then start again"
    with pytest.raises(TrimError, match=words):
        fill(tmp_path / "a" / "out", "new", needed=2**31)
    assert not names(tmp_path)


def test_what_a_kill_leaves_is_removed_by_the_next_call_but_not_what_lives(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        with appearing(tmp_path / "out") as folder:
            (folder / "weights").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    check_target(tmp_path / "out")
    with appearing(tmp_path / "out") as alive:
        assert not left.exists()
        with appearing(tmp_path / "out") as other:
            assert alive.exists()
            assert other != alive
        os.rmdir(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_a_folder_is_held_by_one_process_and_a_kill_frees_it(tmp_path: Path) -> None:
    program = """if True:
        import signal, sys
        from pathlib import Path
        from trimllm.checkpoints.folders import held
        with held(sys.argv[1]):
            Path(sys.argv[1], "journal").touch()
            print("held", flush=True)
            signal.pause()
    """
    child = subprocess.Popen([sys.executable, "-c", program, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="something is at work there already") as refusal, held(tmp_path / "run"):
            pytest.fail("held twice")
        assert "\n" not in str(refusal.value)
    finally:
        child.kill()
        child.communicate()
    with held(tmp_path / "run"), held(tmp_path / "another"):
        pass
    assert names(tmp_path) == ["run", "run/journal"]


def test_a_folder_that_goes_away_before_its_lock_is_there_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process ends and removes what it made, between the two steps of this one."""
    real, gone = os.open, list[str]()

    def open_(path: Any, flags: int, *mode: int) -> int:
        if flags != os.O_RDONLY:
            return real(path, flags, *mode)
        if len(gone) == 0:
            gone.append("before it is opened")
            os.rmdir(path)
        descriptor = real(path, flags)
        if len(gone) == 1:
            gone.append("before it is locked")
            os.rmdir(path)
        return descriptor

    monkeypatch.setattr(os, "open", open_)
    with held(tmp_path / "run") as lock:
        assert len(gone) == 2
        assert os.path.samestat(os.fstat(lock), os.stat(tmp_path / "run"))
    assert not names(tmp_path)


def test_a_folder_whose_inode_is_another_at_every_look_is_held_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    with held(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert not names(tmp_path)


def test_a_folder_that_may_be_written_but_not_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def open_(path: Any, *arguments: Any) -> int:
        if path == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", open_)
    with pytest.raises(InputError, match="Permission denied: choose another --output"), held(tmp_path):
        pass


def test_a_folder_that_was_made_to_be_held_and_stayed_empty_is_gone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for folder in ("mine", "new/run"):
        with pytest.raises(ZeroDivisionError), held(tmp_path / folder):
            _ = 1 / 0
    assert names(tmp_path) == ["mine"]


def test_a_file_cannot_be_held(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="it is a file: name a directory"), held(tmp_path / "thesis.tex"):
        pass


def test_a_target_is_a_new_or_an_empty_directory_apart_from_the_model(tmp_path: Path) -> None:
    def refused(target: Path, words: str, **options: Any) -> None:
        with pytest.raises(InputError, match=f"^--output {target}: {words}"):
            check_target(target, source=tmp_path / "model", **options)

    model = tmp_path / "model"
    model.mkdir()
    (model / "plan.json").write_text("{}")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("")
    refused(model, "the model is read from this directory: choose another one", overwrite=True)
    refused(tmp_path / "link", "the model is read from this directory", overwrite=True)
    refused(tmp_path / "a" / ".." / "model", "the model is read from this directory")
    refused(model / "cut", "it lies inside the model's directory")
    refused(tmp_path / "link" / "a" / "cut", "it lies inside the model's directory")
    refused(tmp_path, "the model's directory .* lies inside it", overwrite=True)
    refused(tmp_path / "file", "it is a file: name a directory")
    refused(tmp_path / "nowhere", "it is a link to .*gone, which does not exist")
    refused(tmp_path / "used", "the directory is not empty: choose another one$", overwrite=True)
    refused(tmp_path / "file" / "out", f"{tmp_path / 'file'} is a file: choose another --output")
    check_target(tmp_path / "new" / "out", source=model)
    check_target(model, overwrite=True)
    with pytest.raises(InputError, match="earlier export"):
        check_target(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "model", "nowhere", "used"]


def test_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(Path("~/out"), "new")
    with pytest.raises(InputError, match="not empty"):
        check_target("~/out")
    assert (tmp_path / "out" / "weights").exists()


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, whom no permission binds."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_directory_that_is_read_only_is_refused_before_any_work() -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o555)
        try:
            with as_nobody():
                for target in (Path(name, "out"), Path(name, "a", "out")):
                    with pytest.raises(InputError, match=f"^--output {target}: Permission denied: choose another"):
                        check_target(target)
                with pytest.raises(TrimError, match=r"Permission denied.*: choose another --output$"):
                    fill(Path(name, "out"), "new")
            assert not names(Path(name))
        finally:
            Path(name).chmod(0o755)


def test_finding_out_whether_a_directory_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EIO, errno.EFBIG])
@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_disk_that_cannot_be_written_is_one_line(number: int, kind: type[Exception]) -> None:
    words = os.strerror(number)
    given = OSError(number, words) if kind is OSError else SafetensorError(f"I/O error: {words} (os error {number})")
    with pytest.raises(TrimError, match=rf"^cannot write to x: {words}") as error, disk_errors("x"):
        raise given
    assert error.value.exit_code == 1
    elsewhere = number in (errno.EACCES, errno.EROFS, errno.EFBIG)
    assert str(error.value).endswith(": choose another --output") == elsewhere


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("kind", [OSError, SafetensorError])
def test_full_disk_is_one_line_with_the_remedy(number: int, kind: type[Exception]) -> None:
    given = OSError(number, "x") if kind is OSError else SafetensorError(f"I/O error: Os {{ code: {number}, kind: X }}")
    with pytest.raises(TrimError, match=r"^cannot write to x: the disk is full: free some space"), disk_errors("x"):
        raise given


def test_file_that_is_not_the_target_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrimError, match=r"^cannot write to .*out: No such file or directory \(/no/such/file\)$"):
        fill(tmp_path / "out", "", FileNotFoundError(errno.ENOENT, "no", "/no/such/file"))


def test_other_errors_pass_through() -> None:
    with pytest.raises(ValueError), disk_errors("x"):
        raise ValueError
    with pytest.raises(InputError), disk_errors("x"):
        raise InputError("no")


def test_make_clean_leaves_the_models_of_the_user(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parents[1] / "Makefile", tmp_path)
    (tmp_path / "constraints.txt").touch()
    for name in ("runs/demo/medicine", "runs/mine/model", ".venv/bin", ".venv-llamacpp"):
        (tmp_path / name).mkdir(parents=True)
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == ["Makefile", "constraints.txt", "runs", "runs/mine", "runs/mine/model"]
