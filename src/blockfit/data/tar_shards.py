"""Pictures in tar shards, as WebDataset writes them, read by position without unpacking.

One walk over the headers notes where each picture lies; after that a picture is one seek and one
read, in any order and any process. Nothing is ever extracted by name, so a member's name, whatever
it holds, is only a text.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from blockfit.data.decode import Unreadable, is_picture, why_left_out
from blockfit.data.records import LABEL_NAMES, UNNAMED, Columns, Picture, Records, numbered
from blockfit.errors import BlockfitError, first_line

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
"""Files with these endings (in any case) are read as shards."""

_LARGEST = 2**29  # bytes of one picture, and no more: a header may claim anything
_LARGEST_LABEL = 2**20
_UNPACK: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
_PREFERRED = ("jpg", "jpeg", "png", "webp")

Label = int | str | None


def is_shard(path: str | Path) -> bool:
    """Whether a file's name says that it is a shard."""
    return str(path).lower().endswith(SHARD_SUFFIXES)


def from_shards(paths: Sequence[Path], source: str, asked: Columns = UNNAMED) -> Records:
    """Tar shards, one after the other.

    The members ``KEY.jpg`` (or another image ending) and ``KEY.cls`` or ``KEY.json`` belong
    together; KEY goes up to the first dot of the file's name.

    Args:
        paths: of the shards; compressed ones are unpacked into a temporary file for the time of
            the run.
        asked: the image is the ending of the pictures, such as ``jpg`` or ``left.png``, where a key
            has several; the label the key of it in ``KEY.json``, a usual one by default.

    Raises:
        BlockfitError: where a shard cannot be read to its end, or a label is none.
    """
    where: list[tuple[int, int, int]] = []
    names: list[str] = []
    labels: list[Label] = []
    left_out: list[tuple[str, str]] = []
    read = _Shards([])
    for number, path in enumerate(paths):
        file = _plain_tar(path, read)
        read.files.append(str(file))
        for sample in _samples(file, path, asked.label, left_out):
            for name, offset, size in sample.chosen(asked.image):
                where.append((number, offset, size))
                names.append(f"{path}/{_printable(name)}")
                labels.append(sample.label)
    if asked.label is not None and not any(label is not None for label in labels):
        raise BlockfitError(f"{source}: no .json of an image has the key {asked.label!r}")
    numbers, class_names = numbered(labels)
    read.where = np.array(where, dtype=np.int64).reshape(-1, 3)
    read.labels = numbers if any(n is not None for n in numbers) else None
    columns = {name: own for name, own in asked._asdict().items() if own and name != "split"}
    return Records(
        source, len(names), read, names, class_names, columns,
        labels=read.labels, own_numbers=class_names is None, left_out=left_out,
    )  # fmt: skip


@dataclass(eq=False)
class _Shards:
    """Reads a picture's bytes; opens the file again, so that processes share no position in it."""

    files: list[str]
    where: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), dtype=np.int64))
    labels: list[int | None] | None = None

    def __call__(self, position: int) -> tuple[Picture, int | None]:
        number, offset, size = self.where[position].tolist()
        if size > _LARGEST:
            raise Unreadable(f"{size} bytes are too many for an image")
        try:
            with open(self.files[number], "rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise Unreadable(f"{type(error).__name__}: {error}") from error
        if len(content) < size:
            raise Unreadable(f"the shard ends after {len(content)} of {size} bytes")
        return content, self.labels[position] if self.labels else None


@dataclass(eq=False)
class _Sample:
    """The members of one key: ending, offset and size of each picture, and the labels found."""

    pictures: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    labels: dict[str, Label] = field(default_factory=dict)

    @property
    def label(self) -> Label:
        found = self.labels.get("cls")
        return self.labels.get("json") if found is None else found

    def chosen(self, wanted: str | None) -> Iterator[tuple[str, int, int]]:
        """``KEY.jpg`` before ``KEY.png``; ``KEY.left.png`` only where there is no such one."""
        ending = {name: picture[0] for name, picture in self.pictures.items()}
        if wanted is not None:
            kept = [name for name in ending if ending[name] == wanted.lower().lstrip(".")]
        else:
            order = {ending: i for i, ending in enumerate(_PREFERRED)}
            plain = [name for name in ending if "." not in ending[name]]
            plain.sort(key=lambda name: order.get(ending[name], len(order)))
            kept = plain[:1] or list(ending)
        return ((name, *self.pictures[name][1:]) for name in kept)


def _plain_tar(path: Path, owner: _Shards) -> Path:
    """The shard; a compressed one unpacked into a temporary file that goes with ``owner``."""
    try:
        with open(path, "rb") as file:
            start = file.read(6)
    except OSError as error:
        raise BlockfitError(
            f"cannot read the shard {path}: {first_line(error)}; download or write it again"
        ) from error
    unpack = next((unpack for magic, unpack in _UNPACK.items() if start.startswith(magic)), None)
    if unpack is None:
        return path
    handle, name = tempfile.mkstemp(prefix="blockfit-", suffix=".tar")
    weakref.finalize(owner, _remove, name, os.getpid())
    try:
        with open(handle, "wb") as file, unpack(path) as content:
            shutil.copyfileobj(content, file, 2**20)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise BlockfitError(
            f"cannot unpack the shard {path} into {tempfile.gettempdir()}: {first_line(error)}; "
            "give shards that are not compressed"
        ) from error
    return Path(name)


def _samples(
    file: Path, path: Path, label_key: str | None, left_out: list[tuple[str, str]]
) -> list[_Sample]:
    """The samples of a plain tar, in the order of their first members."""
    samples: dict[str, _Sample] = {}
    try:
        with open(file, "rb") as content, tarfile.open(fileobj=content, mode="r:") as tar:
            for member in _members(tar, content):
                key, ending = _key(member.name)
                sample = samples.setdefault(key, _Sample())
                if (why := why_left_out(member.name)) is not None:
                    left_out.append((f"{path}/{_printable(member.name)}", why))
                elif is_picture(member.name):
                    place = (ending, member.offset_data, member.size)
                    sample.pictures[member.name] = place  # a later one of that name replaces it
                elif ending in ("cls", "json") and member.size <= _LARGEST_LABEL:
                    content.seek(member.offset_data)
                    name = f"{path}/{_printable(member.name)}"
                    sample.labels[ending] = _label(
                        ending, content.read(member.size), label_key, name
                    )
    except BlockfitError:
        raise
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise BlockfitError(
            f"cannot read the shard {path}: {first_line(error)}; download or write it again"
        ) from error
    return list(samples.values())


def _members(tar: tarfile.TarFile, content: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The regular files that are not hidden (as macOS's ``._x`` are).

    Raises:
        tarfile.ReadError: for a broken header, too, where ``tarfile`` itself takes it for the end.
    """
    last = -1
    while (member := tar.next()) is not None:
        if member.offset_data <= last or member.size < 0:
            raise tarfile.ReadError(f"the header of {_printable(member.name)} is broken")
        last = member.offset_data
        tar.members = []  # type: ignore[attr-defined]  # or it keeps every header
        hidden = member.name.rpartition("/")[2].startswith(".")
        if member.isreg() and not member.issparse() and not hidden:
            yield member
    content.seek(tar.offset)
    if content.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"the header at byte {tar.offset} is broken")


def _key(name: str) -> tuple[str, str]:
    """``dir/a.left.PNG`` as ``dir/a`` and ``left.png``."""
    folder, _, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return f"{folder}/{stem}", ending.lower()


def _label(ending: str, content: bytes, key: str | None, name: str) -> Label:
    text = content.decode("utf-8", "replace").strip()
    if ending == "cls":
        return _as_label(text) if key in (None, "cls") else None
    if key == "cls":
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BlockfitError(f"{name} is no JSON: {first_line(error)}") from error
    if isinstance(value, dict):
        value = value.get(key or next((k for k in LABEL_NAMES if k in value), ""))
    if isinstance(value, bool | float | list | dict):
        if key is None:
            return None  # boxes, several labels: nobody asked for them
        raise BlockfitError(f"{name}: {key!r} holds no label; a label is a whole number or a text")
    return None if value is None else _as_label(str(value))


def _as_label(text: str) -> Label:
    return int(text) if re.fullmatch(r"-?\d{1,9}", text, re.ASCII) else text or None


def _remove(path: str, maker: int) -> None:
    if os.getpid() == maker:  # a worker that ends must not take it from the others
        Path(path).unlink(missing_ok=True)


def _printable(name: str) -> str:
    """A member's name for people and JSON: control characters and broken UTF-8 are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
