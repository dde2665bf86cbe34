"""The only writer: folders and files that appear whole or not at all, and take nobody's place.

A target is resolved once (``~``, links, ``..``), and that path is what is checked and written. What
blockfit did not write is never replaced or deleted, whatever was asked for: a folder or file counts
as written by blockfit where it holds the ``sign`` of its form.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from blockfit.errors import BlockfitError, first_line

if sys.platform != "win32":
    import fcntl

PARTIAL = ".blockfit-partial"
"""How the names of unfinished folders and files end; they lie hidden beside what they become."""

SAVED = "blockfit.json"
"""The file by which a folder is known as one of blockfit's own form."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class FolderForm:
    """A kind of folder that is written whole.

    Args:
        mark: the file that such a folder always holds.
        sign: what the mark says of itself wherever blockfit wrote it.
        files: the names of all files that such a folder may hold.
    """

    mark: str
    sign: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class FileForm:
    """A kind of file that is written whole.

    Args:
        suffix: how its name ends; any name where ``None``.
        sign: what the file holds somewhere wherever blockfit wrote it.
        beside: endings of files that may lie beside it under its own name, and are named in it.
    """

    suffix: str | None
    sign: str
    beside: tuple[str, ...] = ()


def expanded(path: str | Path) -> Path:
    """The path with ``~`` and ``~user`` as the home folders that they stand for.

    Raises:
        BlockfitError: where there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise BlockfitError(
            f"there is no home folder for {path}; write the path in full"
        ) from error


def resolved(path: str | Path) -> Path:
    """The one path that a target stands for: absolute, without ``~``, ``..`` and links.

    Raises:
        BlockfitError: where a path holds what no path can hold or is no UTF-8, or the working
            folder is gone.
    """
    try:
        before, real = "", os.path.realpath(expanded(path))  # resolve() fails on links in a circle
        while before != real:  # after such links, further ones are left as they are
            before, real = real, os.path.realpath(real)
        real.encode("utf-8")
        return Path(real)
    except UnicodeEncodeError as error:
        raise BlockfitError(
            f"cannot write {path}: the path is not UTF-8, and not all that is written could be "
            "read again from it; give another path"
        ) from error
    except (OSError, ValueError) as error:
        raise BlockfitError(
            f"cannot write {path}: {first_line(error)}; give another path"
        ) from error


def check_target(folder: str | Path, form: FolderForm, overwrite: bool) -> Path:
    """Refuse to write a folder where something would be lost or the file system would refuse.

    A new or empty folder is free. One that blockfit wrote in this form may be replaced with
    ``overwrite``, unless anything else lies in it.

    Returns:
        The resolved path, which is to be written.

    Raises:
        BlockfitError: where ``folder`` cannot be taken.
    """
    target = resolved(folder)
    state = _state(target, folder)
    if state is None:
        _check_parent(target, folder)
        return target
    if not stat.S_ISDIR(state.st_mode):
        raise BlockfitError(f"{folder} is a file; give a folder to save to")
    names = _names(target, folder)
    if names and (why := foreign(target, form)) is not None:
        raise BlockfitError(f"{folder} {why}")
    if names and not overwrite:
        raise BlockfitError(
            f"{folder} holds what an earlier run wrote; choose another folder, or replace it with "
            "overwrite=True"
        )
    if _is_here(target):
        raise BlockfitError(
            f"{folder} is the folder that you are in, which cannot be replaced; give another, "
            f"such as {Path(folder) / 'small'}"
        )
    _check_mount(target, folder)
    _check_parent(target, folder)
    return target


def foreign(folder: Path, form: FolderForm) -> str | None:
    """What in a folder was not written by blockfit, as the end of a sentence; else ``None``."""
    names = sorted(entry.name for entry in folder.iterdir())
    if form.mark not in names or not _signed(folder / form.mark, form.sign):
        return "is not empty and was not saved by blockfit; choose a new folder"
    for name in names:
        if name not in form.files or not _is_regular(folder / name):
            return (
                f"also holds {name}, which overwriting would delete; move it away or choose "
                "another folder"
            )
    return None


@contextmanager
def new_folder(folder: str | Path, form: FolderForm, overwrite: bool = False) -> Iterator[Path]:
    """Fill a hidden folder beside ``folder``; it takes that name when the ``with`` ends well.

    Everything is on the disk before the name changes, and what had the name is deleted after,
    file by file. Whatever goes wrong, the unfinished folder is removed and ``folder`` is as it was;
    a process that is killed leaves a folder whose name ends in ``PARTIAL``. Of several runs that
    write to one folder at a time, the first to end has it.

    Raises:
        BlockfitError: as ``check_target``; where the file system refuses, it says why; where
            another run has written ``folder`` since the ``with`` began.
    """
    target = check_target(folder, form, overwrite)
    with _beside(folder, target, lambda partial: _take_name(partial, target, form)) as partial:
        yield partial


def check_file(path: str | Path, form: FileForm, overwrite: bool) -> Path:
    """Refuse to write a file where something would be lost or the file system would refuse.

    Returns:
        The resolved path, which is to be written.

    Raises:
        BlockfitError: where the name does not end as it must, or is taken.
    """
    named = Path(path)
    if form.suffix is not None and named.suffix != form.suffix:
        small = f"{named.stem or 'small'}{form.suffix}"
        raise BlockfitError(f"{path} must end in {form.suffix}; write -o {small}")
    target = resolved(path)
    state = _state(target, path)
    if state is not None:
        if stat.S_ISDIR(state.st_mode):
            raise BlockfitError(
                f"{path} is a folder; give a file to write, such as "
                f"{named / ('small' + (form.suffix or '.html'))}"
            )
        if not stat.S_ISREG(state.st_mode):
            raise BlockfitError(f"{path} is no regular file; choose another name")
        if not overwrite:
            raise BlockfitError(
                f"{path} is there already; choose another name, or replace it with overwrite=True"
            )
        if state.st_size and not _signed(target, form.sign):
            raise BlockfitError(f"{path} was not written by blockfit; choose a new name")
        _check_mount(target, path)
    for ending in form.beside:
        _check_companion(target, target.with_name(target.name + ending))
    _check_parent(target, path)
    return target


@contextmanager
def new_file(path: str | Path, form: FileForm, overwrite: bool = False) -> Iterator[Path]:
    """Write a file in a hidden folder beside ``path``; it takes that name when all went well.

    What else was written in the hidden folder (weights that a file refers to) takes its place
    beside it first. Whatever goes wrong, the hidden folder is removed and ``path`` is as it was.

    Raises:
        BlockfitError: as ``check_file``; where the file system refuses, it says why.
    """
    target = check_file(path, form, overwrite)
    with _beside(path, target, lambda hidden: _take_names(hidden, target)) as hidden:
        yield hidden / target.name


@contextmanager
def _beside(told: str | Path, target: Path, take: Callable[[Path], None]) -> Iterator[Path]:
    """A hidden folder beside ``target``; when all went well, ``take`` gives its content names."""
    made: list[Path] = []
    hidden: Path | None = None
    try:
        made = _make_parents(target)
        before = _which(target)
        hidden = _hidden(target)
        yield hidden
        for entry in hidden.iterdir():
            _open_to_others(entry)
            _to_disk(entry)
        _to_disk(hidden)
        with _alone(target.parent):
            if _which(target) != before:
                raise BlockfitError(
                    f"another run has written {told} meanwhile; nothing was saved, choose another "
                    "place"
                )
            take(hidden)
        made = []
        _to_disk(target.parent)
    except (OSError, SafetensorError) as error:
        raise _cannot_write(told, error) from error
    finally:
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)  # not there any more where it took a name
        _unmake(made)


def check_kept(folder: str | Path) -> Path:
    """Refuse now a folder to which files could not be added one by one; the resolved path.

    Whose files lie in it is for the caller to check.

    Raises:
        BlockfitError: where ``folder`` is a file, or the file system would refuse.
    """
    target = resolved(folder)
    state = _state(target, folder)
    if state is None:
        _check_parent(target, folder)
        return target
    if not stat.S_ISDIR(state.st_mode):
        raise BlockfitError(f"{folder} is a file; give a folder to write to")
    _names(target, folder)
    _check_parent(target / "file", folder)
    return target


@contextmanager
def kept_file(path: Path) -> Iterator[Path]:
    """Write one file of a folder that grows, whole or not at all; it replaces the one before it.

    The folder is made where there is none.

    Raises:
        BlockfitError: where the file system refuses; it says why.
    """
    partial = path.with_name(f".{short_name(path.name)}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        _open_to_others(partial)
        _to_disk(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise BlockfitError(
            f"cannot write {path}: {_reason(error)}; make room or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, with the line ends of ``text``.

    Bytes of file names that are no UTF-8 become ``\\udc80`` to ``\\udcff``, which JSON reads back.
    """
    path.write_bytes(encoded(text))


def encoded(text: str) -> bytes:
    """What ``write_text`` writes."""
    return text.encode("utf-8", "backslashreplace")


_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")
"""What safetensors calls a file that it has not finished."""


def is_unfinished(name: str) -> bool:
    """Whether a killed run left something of this name; ``.partial`` is of older versions.

    safetensors writes to a temporary file of its own beside the one that it was given.
    """
    return name.endswith((PARTIAL, ".partial")) or _SAFETENSORS.fullmatch(name) is not None


def short_name(name: str) -> str:
    """The beginning of a name, so short that something fits before and after it."""
    return os.fsencode(name)[:100].decode("utf-8", "ignore")


def _state(target: Path, told: str | Path) -> os.stat_result | None:
    """What lies at a resolved path, ``None`` where there is nothing."""
    try:
        return target.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise _cannot_write(told, error) from error


def _names(folder: Path, told: str | Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError as error:
        raise _cannot_write(told, error) from error


def _is_regular(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode) or (path.is_symlink() and path.is_file())


def _signed(path: Path, sign: str) -> bool:
    """Whether a regular file holds ``sign`` somewhere."""
    wanted, rest = sign.encode(), b""
    try:
        if not _is_regular(path):
            return False
        with path.open("rb") as file:
            while part := file.read(_CHUNK):
                if wanted in rest + part:
                    return True
                rest = part[-len(wanted) :]
    except OSError as error:
        raise BlockfitError(
            f"cannot read {path}: {_reason(error)}; choose another place"
        ) from error
    return False


def _check_companion(target: Path, companion: Path) -> None:
    """A file beside the target may be replaced only where the target before it names it."""
    if not os.path.lexists(companion):
        return
    if not (target.is_file() and _is_regular(companion) and _signed(target, companion.name)):
        raise BlockfitError(
            f"{companion} is there already and does not belong to {target.name}; choose another "
            "name"
        )


def _check_parent(target: Path, told: str | Path) -> None:
    """Refuse where the folder around the target is a file, or nothing can be made in it."""
    nearest = target.parent
    while _state(nearest, told) is None and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise BlockfitError(f"cannot write {told}: {nearest} is a file; choose another place")
    longest = max(len(os.fsencode(name)) for name in target.relative_to(nearest).parts)
    try:
        if os.name != "nt" and longest > os.pathconf(nearest, "PC_NAME_MAX"):
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        os.rmdir(tempfile.mkdtemp(prefix=".", suffix=PARTIAL, dir=nearest))
    except OSError as error:
        raise _cannot_write(told, error) from error


def _check_mount(target: Path, told: str | Path) -> None:
    if os.path.ismount(target) or str(target) in _mounts():
        raise BlockfitError(
            f"{told} is a mount point, which cannot be replaced as a whole; give a place inside "
            f"it, such as {Path(told) / 'small'}"
        )


def _mounts() -> set[str]:
    """Where file systems are mounted, single files too; empty where the system does not tell."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return set()
    places = (line.split()[4].decode("unicode_escape").encode("latin-1") for line in lines)
    return {os.fsdecode(place) for place in places}


def _is_here(target: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(target, os.curdir)
    return False


def _make_parents(target: Path) -> list[Path]:
    """Make the folders around the target; those that were made, the innermost first."""
    missing = []
    for parent in target.parents:
        if parent.exists():
            break
        missing.append(parent)
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _unmake(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # somebody else has put something in it
            folder.rmdir()


def _which(path: Path) -> int | None:
    """What tells one folder or file of a name from a later one; ``None`` where there is none."""
    if path.is_dir() and not any(path.iterdir()):
        return None
    return path.stat().st_ino if path.exists() else None


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


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _hidden(target: Path) -> Path:
    made = tempfile.mkdtemp(
        prefix=f".{short_name(target.name)}.", suffix=PARTIAL, dir=target.parent
    )
    os.chmod(made, 0o777 & ~_umask())  # mkdtemp's folders are private
    return Path(made)


def _open_to_others(path: Path) -> None:
    """The mode that the umask gives: some libraries write files that only their owner reads."""
    if path.is_file():
        os.chmod(path, 0o666 & ~_umask())


def _to_disk(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_name(partial: Path, target: Path, form: FolderForm) -> None:
    if not target.exists():
        partial.rename(target)
        return
    aside = _hidden(target)
    old = aside / "old"
    try:
        target.rename(old)
        if any(old.iterdir()) and (why := foreign(old, form)) is not None:
            raise BlockfitError(f"{target} {why}")
        partial.rename(target)
    except BaseException:
        if old.exists():
            _give_back(old, target)
        aside.rmdir()
        raise
    with contextlib.suppress(OSError):  # what appeared there in the last moment stays
        for entry in old.iterdir():
            if entry.name in form.files:
                entry.unlink()
        old.rmdir()
        aside.rmdir()


def _take_names(hidden: Path, target: Path) -> None:
    """The file itself comes last: what lies beside it is there when it appears."""
    for entry in sorted(hidden.iterdir(), key=lambda entry: entry.name == target.name):
        if entry.name != target.name:
            _check_companion(target, target.with_name(entry.name))
        entry.replace(target.with_name(entry.name))


def _give_back(old: Path, target: Path) -> None:
    try:
        old.rename(target)
    except OSError as error:
        raise BlockfitError(
            f"cannot write {target}: {error.strerror or error}; what it held is now at {old}"
        ) from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or first_line(error)


def _cannot_write(target: str | Path, error: Exception) -> BlockfitError:
    return BlockfitError(
        f"cannot write {target}: {_reason(error)}; nothing was saved, make room or choose another "
        "place"
    )
