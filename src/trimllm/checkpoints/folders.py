"""New folders that appear whole or not at all, and whether they may be written where the user wants them.

    check_target(target, source=model_folder)
    with appearing(target, needed=size) as folder:
        ...

The files are written to `.NAME.partial-XXXX` beside the target. The end of the block gives it its own name; an error
removes it; what a kill leaves of it is removed by the next call for the same target. A kill between the two renames of
an overwrite leaves the earlier folder as `.NAME.old-XXXX/folder`, beside the place.

    with held(output):
        ...

One process at a time works in a folder that grows: a run, a comparison, a demo.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from trimllm.errors import InputError, TrimError
from trimllm.files import disk_errors, full_disk, umask


def check_target(target: str | Path, *, source: str | Path | None = None, overwrite: bool = False) -> None:
    """Whether a checkpoint may be written there; nothing is left behind.

    Args:
        target: must not exist, be empty, or (with `overwrite`) hold an earlier export.
        source: where the model comes from, if that is a folder: the target must lie apart from it.
        overwrite: an earlier export, known by its `plan.json`, may be replaced.

    Raises:
        InputError: if it is a file, in use, part of the model's folder or around it, or cannot be written.
    """
    folder = Path(target).expanduser()
    check_apart(folder, source)
    check_directory(folder, target)
    if folder.is_dir() and any(folder.iterdir()):
        export = (folder / "plan.json").exists()
        if not export or not overwrite:
            why = " (it holds an earlier export)" if export else ""
            raise InputError(f"--output {target}: the directory is not empty: choose another one{why}")
    check_writable(folder.resolve().parent, target)


def check_apart(target: str | Path, source: str | Path | None) -> None:
    """Raise InputError if `source` is a folder and `target`, through whatever links, is it, in it or around it."""
    if not source or not Path(source).is_dir():
        return
    new, model = Path(target).resolve(), Path(source).resolve()
    if new == model:
        raise InputError(f"--output {target}: the model is read from this directory: choose another one")
    if model in new.parents:
        raise InputError(f"--output {target}: it lies inside the model's directory {source}: choose another one")
    if new in model.parents:
        raise InputError(f"--output {target}: the model's directory {source} lies inside it: choose another one")


def check_directory(folder: str | Path, output: str | Path | None = None) -> None:
    """Raise InputError, which names `output`, if what should be a directory is something else."""
    path, name = Path(folder), folder if output is None else output
    if path.is_symlink() and not path.exists():
        raise InputError(f"--output {name}: it is a link to {os.readlink(path)}, which does not exist: mend it")
    if path.exists() and not path.is_dir():
        raise InputError(f"--output {name}: it is a file: name a directory")


def check_writable(directory: str | Path, output: str | Path | None = None) -> None:
    """Refuse a directory that cannot be made or written to; what was made to find out is removed again.

    Raises:
        InputError: which names `output`, by default the directory.
    """
    made: list[Path] = []
    try:
        _make(Path(directory), made)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        name = directory if output is None else output
        raise InputError(f"--output {name}: {error.strerror or error}: choose another --output") from None
    finally:
        _unmake(made)


def _make(directory: Path, made: list[Path]) -> None:
    """Make a directory and those above it; `made` gets each new one."""
    for path in reversed([directory, *directory.parents]):
        if not path.is_dir():
            if path.exists():
                raise NotADirectoryError(errno.ENOTDIR, f"{path} is a file", str(path))
            path.mkdir()
            made.append(path)


def _unmake(made: list[Path]) -> None:
    with suppress(OSError):
        for path in reversed(made):
            path.rmdir()


TRIES = 9
"""How often a folder is made anew that its last holder took away before the lock was there. Not without end: some
network file systems give a folder another inode at every look."""


@contextmanager
def held(folder: str | Path) -> Iterator[int]:
    """While the block runs, nobody else may hold this folder. It is made if it is not there; if nothing is in it when
    the block ends, it is gone again. File systems without locks are not guarded.

    Yields:
        The lock's file descriptor. A child process that inherits it (`pass_fds`) holds the folder as long as it lives;
        when all who hold it have ended, however they did, it is free.

    Raises:
        InputError: if the folder is held already, is a file, or cannot be written.
    """
    path, made = Path(folder), list[Path]()
    check_directory(path)
    check_writable(path)
    with ExitStack() as undo:
        for last in (*[False] * TRIES, True):
            try:
                _make(path, made)
                with ExitStack() as found:
                    lock = found.enter_context(_locked(path))
                    if last or os.path.samestat(os.fstat(lock), path.stat()):
                        undo.enter_context(found.pop_all())
                        break
            except BlockingIOError:
                remedy = "wait until it has ended, or choose another directory"
                raise InputError(f"--output {folder}: something is at work there already: {remedy}") from None
            except OSError as error:
                if last or not isinstance(error, FileNotFoundError):
                    raise InputError(f"--output {folder}: {error.strerror or error}: choose another --output") from None
        undo.callback(_unmake, made)  # while it is still held
        yield lock


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """Hold the folder's lock, where the file system has locks; the end of the process, however it comes, frees it.

    Raises:
        BlockingIOError: if it is held already.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def appearing(target: str | Path, *, needed: int = 0, overwrite: bool = False) -> Iterator[Path]:
    """Fill a new folder under another name; it becomes `target` when the block ends well, and is removed otherwise.

    Args:
        target: must not exist or be empty, unless `overwrite`; a link is followed.
        needed: bytes that must be free on the disk.
        overwrite: an older folder there stays until the new one is whole, and is then replaced.

    Raises:
        TrimError: if the disk is full or cannot be written.
    """
    place = Path(target).expanduser().resolve()
    made: list[Path] = []
    with ExitStack() as undo, disk_errors(target):
        undo.callback(_unmake, made)
        _make(place.parent, made)
        _remove_leftovers(place)
        free = shutil.disk_usage(place.parent).free
        if free < needed:
            raise TrimError(full_disk(target, f" ({needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free)"))
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.partial-", dir=place.parent))
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        with _locked(folder):
            yield folder
            folder.chmod(0o777 & ~umask())
            for path in (*folder.rglob("*"), folder):
                _settle(path)
            _rename(folder, place, overwrite)
            _settle(place.parent)
        made.clear()


def _settle(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk: a loss of power takes what is not, whatever a
    journal says of it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that cannot wait
            raise
    finally:
        os.close(descriptor)


def _rename(folder: Path, place: Path, overwrite: bool) -> None:
    if not (overwrite and place.exists()):
        if place.exists():
            place.rmdir()
        folder.rename(place)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{place.name}.old-", dir=place.parent))
    with _locked(old):
        place.rename(old / "folder")
        try:
            folder.rename(place)
        except BaseException:
            (old / "folder").rename(place)
            old.rmdir()
            raise
        shutil.rmtree(old, ignore_errors=True)


def _remove_leftovers(place: Path) -> None:
    """Remove the partial folders of this target that no living process holds, and what it has replaced: where a kill
    came before the new one took the place, the old one stays."""
    name = glob.escape(place.name)
    partial = place.parent.glob(f".{name}.partial-*")
    replaced = place.parent.glob(f".{name}.old-{'?' * 8}") if place.exists() else ()
    for folder in (*partial, *replaced):
        with suppress(OSError), _locked(folder):
            if ".partial-" in folder.name or all(path.name == "folder" for path in folder.iterdir()):
                shutil.rmtree(folder)
