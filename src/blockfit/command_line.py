"""The command line that a run was started with, which it writes down beside what it found."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_LINE: ContextVar[str | None] = ContextVar("blockfit_command_line", default=None)


@contextmanager
def started_with(words: Sequence[str]) -> Iterator[None]:
    """Runs inside the ``with`` write these words down as their command."""
    token = _LINE.set(shlex.join(words))
    try:
        yield
    finally:
        _LINE.reset(token)


def command_line() -> str | None:
    """As it was typed, ready for a shell; ``None`` for a run that Python started."""
    return _LINE.get()
