"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from blockfit.errors import BlockfitError

if sys.platform != "win32":
    import fcntl

PARTIAL = ".blockfit-partial"
"""How the names of unfinished folders end; they lie hidden beside the folder that they become."""


def check_target(folder: Path, mark: str, own: Collection[str], overwrite: bool) -> None:
    """Refuse to write where something would be lost.

    A new or empty folder is free. One that holds the file ``mark`` may be replaced with
    ``overwrite``, unless it also holds files that are not among ``own``.

    Raises:
        BlockfitError: where ``folder`` cannot be taken.
    """
    try:
        if not folder.exists():
            return
        if not folder.is_dir():
            raise BlockfitError(f"{folder} is a file; give a folder to save to")
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise _cannot_write(folder, error) from error
    if not names:
        return
    if mark not in names:
        raise BlockfitError(
            f"{folder} is not empty and was not saved by blockfit; choose a new folder"
        )
    if not overwrite:
        raise BlockfitError(
            f"{folder} holds what an earlier run wrote; choose another folder, or replace it with "
            "overwrite=True"
        )
    if foreign := [name for name in names if name not in own]:
        raise BlockfitError(
            f"{folder} also holds {foreign[0]}, which overwriting would delete; "
            "move it away or choose another folder"
        )


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a hidden folder beside ``folder``; it takes that name when the ``with`` ends well.

    Everything is on the disk before the name changes, and what had the name is deleted after.
    Whatever goes wrong, the unfinished folder is removed and ``folder`` is as it was; a process
    that is killed leaves a folder whose name ends in ``PARTIAL``. Of several runs that write to one
    folder at a time, the first to end has it.

    Raises:
        BlockfitError: where the file system refuses, it says why; where another run has written
            ``folder`` since the ``with`` began.
    """
    target = Path(os.path.realpath(folder))  # resolve() fails where links run in a circle
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        before = _which(target)
        partial = _hidden(target)
        yield partial
        for entry in (*partial.iterdir(), partial):
            _to_disk(entry)
        with _alone(target.parent):
            if _which(target) != before:
                raise BlockfitError(
                    f"another run has written {folder} meanwhile; nothing was saved, choose "
                    "another folder"
                )
            _take_name(partial, target)
        _to_disk(target.parent)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(folder, error) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)  # not there any more where all went well


def check_file(path: Path, suffix: str, overwrite: bool) -> None:
    """Refuse to write a file where something would be lost.

    Raises:
        BlockfitError: where the name does not end in ``suffix``, or is taken.
    """
    if path.suffix != suffix:
        raise BlockfitError(f"{path} must end in {suffix}; write -o {path.stem or 'small'}{suffix}")
    if path.is_dir():
        raise BlockfitError(f"{path} is a folder; give a file to write")
    if path.exists() and not overwrite:
        raise BlockfitError(
            f"{path} is there already; choose another name, or replace it with overwrite=True"
        )


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Write a file in a hidden folder beside ``path``; it takes that name when all went well.

    What else was written in the hidden folder (weights that a file refers to) takes its place
    beside it first. Whatever goes wrong, the hidden folder is removed and ``path`` is as it was.

    Raises:
        BlockfitError: where the file system refuses; it says why.
    """
    target = path.resolve()
    hidden: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden = _hidden(target)
        yield hidden / target.name
        for entry in sorted(hidden.iterdir(), key=lambda entry: entry.name == target.name):
            _to_disk(entry)
            entry.replace(target.with_name(entry.name))
        _to_disk(target.parent)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(path, error) from error
    finally:
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)


def _which(folder: Path) -> int | None:
    """What tells one folder of a name from a later one; ``None`` where there is none or nothing."""
    if folder.is_dir() and not any(folder.iterdir()):
        return None
    return folder.stat().st_ino if folder.exists() else None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other run of blockfit gives a name in ``folder`` meanwhile, where the system has locks."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _hidden(target: Path) -> Path:
    made = tempfile.mkdtemp(prefix=f".{target.name[:100]}.", suffix=PARTIAL, dir=target.parent)
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(made, 0o777 & ~umask)  # mkdtemp's folders are private
    return Path(made)


def _to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_name(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    aside = _hidden(target)
    old = aside / "old"
    try:
        target.rename(old)
        partial.rename(target)
    except BaseException:
        if old.exists():
            _give_back(old, target)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _give_back(old: Path, target: Path) -> None:
    try:
        old.rename(target)
    except OSError as error:
        raise BlockfitError(
            f"cannot write {target}: {error.strerror or error}; what it held is now at {old}"
        ) from error


def _cannot_write(target: Path, error: Exception) -> BlockfitError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return BlockfitError(
        f"cannot write {target}: {reason}; nothing was saved, make room or choose another place"
    )
