"""Where a run of Python's tells how far it is: a bar of tqdm, the log, functions of the user's."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from blockfit import processes as ranks

P = ParamSpec("P")
R = TypeVar("R")

Say = Callable[[str], None]
"""Called with one line on what is being done."""

Progress = Callable[[int, int], None]
"""Called with how many of how many (images, blocks) are done of what was said last."""

LOG = logging.getLogger("blockfit")


def silent(*told: object) -> None:
    """Takes what a run tells where nobody listens; a ``Say`` and a ``Progress``."""


SWITCH = "BLOCKFIT_PROGRESS"
"""The environment variable that turns bars off where it is ``0``."""


class Teller:
    """Hands on what a run tells; inside the ``with`` there is a bar where one is wanted.

    Args:
        say: called with one line on what is being done; it goes to the log at INFO where ``None``.
        progress: called with how many of how many are done; ``True`` for a bar, ``False`` for none,
            ``None`` for one in terminals and notebooks unless ``BLOCKFIT_PROGRESS=0``. There is
            none by itself where ``say`` is given.
    """

    def __init__(self, say: Say | None = None, progress: Progress | bool | None = None) -> None:
        self._say = say
        self._progress = progress if callable(progress) else None
        self._wanted = progress if isinstance(progress, bool) else None
        if callable(progress) or (say is not None and progress is None):
            self._wanted = False
        self._bar: Any = None
        self._depth = 0

    def __enter__(self) -> Teller:
        self._depth += 1
        if self._depth == 1 and self._shows():
            self._bar = _bar()
        return self

    def __exit__(self, *raised: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self._bar is not None:
            self._bar.close()
            self._bar = None

    def say(self, line: str) -> None:
        """What is being done now."""
        (LOG.info if self._say is None else self._say)(line)
        if self._bar is not None:
            self._bar.total = None
            self._bar.reset()
            self._bar.set_description_str(line)

    def count(self, done: int, total: int) -> None:
        """How many of all are done; a smaller number than before starts again."""
        if self._progress is not None:
            self._progress(done, total)
        if self._bar is not None:
            if done < self._bar.n or self._bar.total != total:
                self._bar.reset(total)
            self._bar.update(done - self._bar.n)

    def _shows(self) -> bool:
        if not ranks.is_first():
            return False
        if self._wanted is not None:
            return self._wanted
        if os.environ.get(SWITCH, "").lower() in ("0", "off", "false", "no"):
            return False
        return sys.stderr.isatty() or in_notebook()


def told(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` with a ``Teller`` in the place of its ``say`` and ``progress``.

    Both are functions inside it, whatever the caller gave; a bar lasts as long as the call.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments
        with Teller(given.get("say"), given.get("progress")) as teller:
            own: dict[str, Any] = {"say": teller.say, "progress": teller.count}
            kwargs.update({k: v for k, v in own.items() if k in signature.parameters})
            return function(*args, **kwargs)

    return call


def in_notebook() -> bool:
    """Whether the code runs in a kernel of Jupyter."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return type(shell).__name__ == "ZMQInteractiveShell"


def _bar() -> Any:
    """A bar of tqdm's: of ipywidgets in notebooks that have them, of text elsewhere."""
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")  # tqdm's, of notebooks without ipywidgets
        from tqdm.auto import tqdm

        return tqdm(desc="starting", leave=False, dynamic_ncols=True)
    return None
