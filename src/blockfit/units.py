"""Numbers as people read them: on the command line and in reports."""

from __future__ import annotations

import os
import re

from blockfit.errors import BlockfitError


def amount(value: float | None, unit: str = "") -> str:
    """``22.1 M``, ``44.2 MB``; a dash where there is none."""
    if value is None:
        return "–"
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.2f} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def bytes_of(text: str, name: str = "memory") -> int:
    """``2GB``, ``512 MB``, ``1.5GiB`` or a plain number of bytes.

    Raises:
        BlockfitError: for anything else.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    size = 0.0
    if found:
        power = " kmgt".index(found[2].lower() or " ")
        size = float(found[1]) * (1024 if found[3] else 1000) ** power
    if size < 1:
        raise BlockfitError(f"cannot read {text!r} as {name}; write it as 2GB or 500MB")
    return int(size)


def seconds_set(name: str, usual: float, least: float = 0.0) -> float:
    """The seconds that the environment variable ``name`` sets; ``usual`` where it is not there.

    Raises:
        BlockfitError: where it is no number, or one below ``least``.
    """
    text = os.environ.get(name, str(usual))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not least <= seconds < 1e9:
        raise BlockfitError(f"{name} must be a number of seconds, got {text!r}")
    return seconds


def percent(value: float | None) -> str:
    """A fraction as percent; a dash where there is none."""
    return "–" if value is None else f"{value:.2%}"


def number(value: float | None, digits: int = 4) -> str:
    """A number; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def share(part: float | None, whole: float | None, digits: int = 1) -> str:
    """``part`` of ``whole`` in percent; a dash where either is missing."""
    return "–" if part is None or not whole else f"{part / whole:.{digits}%}"
