"""The one exception that blockfit raises on purpose, and the one guard of optional imports."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable
from typing import Any

_LONGEST = 1000


class BlockfitError(ValueError):
    """Bad input, said in one sentence: what was wrong, where, and what to do.

    The command line prints it and exits with code 2; a traceback is shown only with ``--debug``.
    Whatever text of a file or a library is in the sentence, it stays one line of printable
    characters, and its middle is left out where it is very long.
    """

    def __init__(self, message: str) -> None:
        text = printable(message)
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"
        super().__init__(text)


class BlockfitWarning(UserWarning):
    """What a run's result should not be used without knowing; also in its report."""


def tell(lines: Iterable[str], stacklevel: int = 2) -> None:
    """Hand lines on as Python's warnings.

    Args:
        stacklevel: how many calls above the caller the user's own line is.
    """
    for line in lines:
        warnings.warn(line, BlockfitWarning, stacklevel=stacklevel + 1)


def printable(text: str) -> str:
    """One line: line breaks become spaces, other control characters and broken UTF-8 escapes."""
    return "".join(
        c if c.isprintable() else " " if c in "\n\r\t" else c.encode("unicode_escape").decode()
        for c in text
    )


def first_line(error: BaseException) -> str:
    """What an error of a library says in its first line, without a full stop; or its name."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def need(module: str, extra: str, what: str | None = None) -> Any:
    """Import a module that an extra of blockfit brings.

    Args:
        module: dotted name.
        extra: that installs it.
        what: needs it, for the message: "a report".

    Raises:
        BlockfitError: where it cannot be imported; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        subject = f"{package} is" if what is None else f"{what} needs {package}, which is"
        raise BlockfitError(f'{subject} not installed; pip install "blockfit[{extra}]"') from error
