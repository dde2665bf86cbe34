"""What a run writes down of itself: its command line, when, on what and with which versions."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

LIBRARIES = ("blockfit", "torch", "timm", "transformers", "torchvision")


def installed(name: str) -> str | None:
    """The installed version of a package; ``None`` where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str | None]:
    """Library → version, ``None`` where it is not installed."""
    return {name: installed(name) for name in LIBRARIES}


def made(device: str | None = None) -> dict[str, Any]:
    """Date (UTC, to the second), machine and versions, as JSON values.

    Args:
        device: that the model ran on, by ``device_name``; left out where it is the processor.
    """
    now = datetime.now(timezone.utc).replace(microsecond=0)
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count() or 1} CPU cores"
    return {
        "date": now.isoformat(),
        "machine": machine if device in (None, platform.machine()) else f"{machine}, {device}",
        "versions": {
            "python": platform.python_version(),
            **{name: found for name, found in installed_versions().items() if found is not None},
        },
    }


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
