"""Files that somebody else may have written: JSON and safetensors, opened within limits.

Nothing here runs anything, follows a name into another folder or believes a length that a file
claims. What a value means is checked by whoever asked for it.
"""

from __future__ import annotations

import codecs
import json
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from blockfit.errors import BlockfitError, first_line

MOST_JSON = 16 << 20
"""Bytes of a JSON file; a saved folder's holds a few thousand."""

MOST_HEADER = 16 << 20
"""Bytes of a safetensors header; one of 1,000 tensors holds about 100,000."""

DEEPEST = 64
"""Levels of lists and objects inside one another."""

LARGEST = 2**63 - 1
"""Magnitude of whole numbers; nothing that is counted here comes near it."""


def read_text(path: Path) -> str:
    """A text file in UTF-8, or in UTF-16 as PowerShell writes it, with a line feed at each end.

    Raises:
        OSError: where it cannot be read.
        UnicodeDecodeError: where it is neither.
    """
    raw = path.read_bytes()
    marked = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = raw.decode("utf-16" if marked else "utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, exact: bool = True) -> Any:
    """The value in a JSON file.

    Args:
        exact: refuse what Python reads but JSON does not hold or does not settle: NaN, infinity,
            numbers that become infinite, a key that appears twice.

    Raises:
        BlockfitError: names the file; where it cannot be read, is larger than ``MOST_JSON``, is
            no JSON, or holds more levels than ``DEEPEST`` or numbers beyond ``LARGEST``.
    """
    size = _regular_size(path)
    if size > MOST_JSON:
        raise BlockfitError(
            f"{path} holds {size} bytes, more than the {MOST_JSON} that are read as JSON"
        )
    hooks: dict[str, Any] = {"parse_int": _whole}
    if exact:
        hooks |= {
            "object_pairs_hook": _unique,
            "parse_constant": _no_number,
            "parse_float": _finite,
        }
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(MOST_JSON).decode("utf-8"), **hooks)
    except OSError as error:
        raise BlockfitError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise BlockfitError(f"{path} is not valid JSON: {error}") from error
    if _deeper(value, DEEPEST):
        raise BlockfitError(f"{path} is not valid JSON: it has more than {DEEPEST} levels")
    return value


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, open for reading; tensors are loaded when they are asked for.

    Raises:
        BlockfitError: names the file; where it cannot be read, claims a header longer than
            ``MOST_HEADER`` or than itself, or is damaged. Errors inside the ``with`` that come
            from the file, too.
    """
    size = _regular_size(path)
    try:
        with path.open("rb") as file:
            claimed = int.from_bytes(file.read(8), "little")
        if size < 8 or claimed > size - 8:
            raise BlockfitError(f"{path} cannot be read: it ends within its header")
        if claimed > MOST_HEADER:
            raise BlockfitError(
                f"{path} cannot be read: its header of {claimed} bytes is longer than {MOST_HEADER}"
            )
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise BlockfitError(f"{path} cannot be read: {first_line(error)}") from error


def _regular_size(path: Path) -> int:
    """Bytes of a file that has an end: no pipe, no device."""
    try:
        state = path.stat()
    except (OSError, ValueError) as error:
        raise BlockfitError(f"cannot read {path}: {first_line(error)}") from error
    if not stat.S_ISREG(state.st_mode):
        raise BlockfitError(f"cannot read {path}: it is no regular file")
    return state.st_size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {twice!r} appears twice")
    return values


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is too large a number")
    return value


def _whole(text: str) -> int:
    if len(text) > 20 or abs(value := int(text)) > LARGEST:
        raise ValueError(f"{text:.30} is too large a number")
    return value


def _deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects lie inside one another more than ``levels`` deep."""
    layer = [value]
    for _ in range(levels + 1):
        layer = [
            inner
            for outer in layer
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not layer:
            return False
    return True
