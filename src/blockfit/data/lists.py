"""Text files that list pictures, and NumPy files that hold them."""

from __future__ import annotations

import csv
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from blockfit.data.decode import IMAGE_SUFFIXES, OTHER_SUFFIXES
from blockfit.data.records import (
    LABEL_NAMES,
    PATH_NAMES,
    UNNAMED,
    Columns,
    Picture,
    Records,
    from_arrays,
    from_pictures,
    split_in,
    used,
)
from blockfit.errors import BlockfitError, first_line
from blockfit.untrusted import read_text

_IMAGE_NAMES = (*PATH_NAMES, "image", "img")
_SUFFIXES = IMAGE_SUFFIXES | OTHER_SUFFIXES
_ENDINGS = "|".join(re.escape(suffix) for suffix in sorted(_SUFFIXES))
_PATH_AND_LABEL = re.compile(rf"(.*(?:{_ENDINGS}))(?:\s*[,;]\s*|\s+)(\S.*)", re.IGNORECASE)


def from_list(file: Path, asked: Columns = UNNAMED) -> Records:
    """A text file with one path per line, from the file's own folder, and perhaps a label.

    A tab, a space or a comma stands before the label: a number, or a text that is the same for all
    images of a class. Empty lines do not count. A first line that names columns makes it a table.

    Args:
        file: in UTF-8, or UTF-16 with its mark.
        asked: columns, where the first line names them.

    Raises:
        BlockfitError: where it is no text, some lines have a label and some have none, or its
            first picture is not there.
    """
    try:
        text = read_text(file)
    except (OSError, UnicodeDecodeError) as error:
        raise BlockfitError(
            f"cannot read the list {file}: {first_line(error)}; save it as UTF-8"
        ) from error
    lines = text.split("\n")
    parsed = _rows(file, text, asked)
    if parsed is None:
        if asked.named:
            raise BlockfitError(f"{file}: its first line names no columns; leave them out")
        parsed = [
            (i, *_path_and_label(line.strip())) for i, line in enumerate(lines, 1) if line.strip()
        ]
    if not parsed:
        raise BlockfitError(f"the list {file} names no images; write one path per line")
    first, path, label = parsed[0]
    for number, _, other in parsed:
        if (other is None) != (label is None):
            one, none = (first, number) if other is None else (number, first)
            raise BlockfitError(
                f"{file}: line {none} has no label and line {one} has; give all of them, or none"
            )
    if not (file.parent / path).exists() and (file.parent / path.replace("\\", "/")).exists():
        parsed = [(i, path.replace("\\", "/"), label) for i, path, label in parsed]
    elif not (file.parent / path).exists():
        raise BlockfitError(
            f"{file}: line {first} names {path}, which is not there; "
            f"paths count from the folder of the list, {file.parent}"
        )
    paths = [file.parent / path for _, path, _ in parsed]
    labels = None if label is None else [_number(text) for _, _, text in parsed]
    return from_pictures(paths, str(file), labels)


def from_numpy(file: Path, asked: Columns) -> Records:
    """Pictures of uint8 in a ``.npy`` file, or in a ``.npz`` file with their labels.

    A ``.npy`` file is not read into memory as a whole.

    Raises:
        BlockfitError: where there are no such pictures or several; pickled objects are not read.
    """
    try:
        if zipfile.is_zipfile(file):
            return _from_npz(file, asked)
        if asked != UNNAMED:
            raise BlockfitError(f"{file}: one array has neither columns nor splits; leave both out")
        images = np.load(file, mmap_mode="r", allow_pickle=False)
        checked = from_arrays(images)
        return replace(checked, source=str(file), read=_Mapped(file))
    except BlockfitError as error:
        raise BlockfitError(f"{file}: {str(error).removeprefix(f'{file}: ')}") from error
    except Exception as error:  # zipfile, zlib and NumPy share no base class of errors
        raise BlockfitError(f"cannot read {file}: {first_line(error)}") from error


@dataclass(frozen=True, eq=False)
class _Mapped:
    """One picture of a ``.npy`` file; opened again, so that processes are sent a path only."""

    file: Path

    def __call__(self, position: int) -> tuple[Picture, int | None]:
        images = np.load(self.file, mmap_mode="r", allow_pickle=False)
        return np.array(images[position]), None


def _rows(file: Path, text: str, asked: Columns) -> list[tuple[int, str, str | None]] | None:
    """Line, path and label of each row of a table; ``None`` where the first line names none."""
    first = text.partition("\n")[0]
    sign = max("\t,;", key=first.count)
    reader = csv.reader(text.splitlines(), delimiter=sign)
    names = [name.strip() for name in next(reader, [])]
    second = next(csv.reader(text.splitlines()[1:2], delimiter=sign), [])
    pictures = [n for n, cell in zip(names, second, strict=False) if _is_path(cell)]
    pictures = [] if len(names) == 1 or any(map(_is_path, names)) else pictures
    usual = [n for n in names if n.lower() in _IMAGE_NAMES]
    image = asked.image or next(iter([*usual, *pictures]), None)
    if image not in names or (len(names) == 1 and (file.parent / first.strip()).exists()):
        return None
    label = asked.label or next((n for n in names if n.lower() in LABEL_NAMES), None)
    if label is not None and label not in names:
        raise BlockfitError(f"{file} has no column {label!r}; it has {', '.join(names)}")
    rows = [(reader.line_num, dict(zip(names, row, strict=False))) for row in reader if any(row)]
    if short := next((i for i, row in rows if not {image, label or image} <= row.keys()), None):
        raise BlockfitError(f"{file}: line {short} has fewer columns than the first line")
    return [(i, row[image].strip(), row[label].strip() if label else None) for i, row in rows]


def _is_path(text: str) -> bool:
    return text.strip().lower().endswith(tuple(_SUFFIXES))


def _path_and_label(line: str) -> tuple[str, str | None]:
    if "\t" in line:
        path, _, label = line.rpartition("\t")
        return path.strip(), label.strip()
    if _is_path(line):
        return line, None
    found = _PATH_AND_LABEL.fullmatch(line)
    return (found[1], found[2]) if found else (line, None)


def _number(text: str | None) -> int | str | None:
    """A label as it is meant; whole numbers with ``.0`` are how tables write them beside gaps."""
    found = re.fullmatch(r"(-?\d{1,9})(?:\.0+)?", text or "", re.ASCII)
    return int(found[1]) if found else text or None


def _from_npz(file: Path, asked: Columns) -> Records:
    with np.load(file, allow_pickle=False) as archive:
        shapes = _shapes(file)
        for given in asked[:2]:
            if given is not None and given not in shapes:
                raise BlockfitError(f"has no array {given!r}; it has {', '.join(shapes)}")
        pictures = [
            n for n, (shape, kind) in shapes.items() if len(shape) in (3, 4) and kind == "u1"
        ]
        image = asked.image or _the_one(pictures, asked.split, shapes)
        count = shapes[image][0][:1]
        whole = [
            name
            for name, (shape, kind) in shapes.items()
            if kind[0] in "iu"
            and shape in (count, (*count, 1))
            and split_in(name) == split_in(image)
        ]
        usual = [name for name in whole if name in LABEL_NAMES]
        label = asked.label or next(iter(whole if len(whole) == 1 else usual), None)
        labels = None if label is None else archive[label].reshape(-1).astype(np.int64)
        records = from_arrays(archive[image], labels)
    return replace(records, source=str(file), columns=used(image, label))


def _shapes(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and kind (``u1``, ``i8``, …) of every array, from the headers."""
    found = {}
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                version = np.lib.format.read_magic(member)
                header: Any = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = header(member)
                found[name.removesuffix(".npy")] = (shape, dtype.str[1:])
    return found


def _the_one(pictures: list[str], split: str | None, arrays: Mapping[str, Any]) -> str:
    fitting = [n for n in pictures if split is None or split_in(n) == split]
    if len(fitting) == 1:
        return fitting[0]
    if not pictures:
        raise BlockfitError(
            "holds no array of images, uint8 (images, height, width[, channels]); "
            f"it has {', '.join(arrays) or 'no arrays'}"
        )
    raise BlockfitError(
        f"holds the arrays of images {', '.join(pictures)}; "
        "name one with image_column= or by its split"
    )
