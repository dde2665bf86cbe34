"""Ctrl-C is never lost, also where it falls into code whose exceptions Python drops."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

PRESSED = threading.Event()
"""Ctrl-C was pressed and may not have been heeded yet."""


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Remember Ctrl-C until the ``with`` ends: an exception inside a finalizer would be dropped.

    Changes nothing outside the main thread and where somebody else handles the signal.
    """

    def pressed(*_: Any) -> None:
        PRESSED.set()
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, pressed)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        PRESSED.clear()


def heed() -> None:
    """Raise ``KeyboardInterrupt`` where Ctrl-C was pressed and the command still runs."""
    if PRESSED.is_set():
        PRESSED.clear()
        raise KeyboardInterrupt
