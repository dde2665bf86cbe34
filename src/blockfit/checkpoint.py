"""What a run writes down while it goes, so that it can go on after a stop.

A ``Checkpoint``'s folder holds one safetensors file per part of the run and process: tensors, and
JSON in the file's metadata. A file appears whole or not at all, so a run may be killed at any
moment.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from blockfit import processes as ranks
from blockfit.errors import BlockfitError, first_line
from blockfit.files import PARTIAL, check_kept, is_unfinished, kept_file, resolved, short_name
from blockfit.units import seconds_set
from blockfit.untrusted import open_tensors

SAVE_EVERY_S = 20.0
"""Seconds between two saves of a pass over images."""

EVERY_NAME = "BLOCKFIT_SAVE_EVERY"
"""The environment variable that changes ``SAVE_EVERY_S``."""

ENDING = ".blockfit-resume"
FORMAT = "1"
KEYS = {"blockfit", "run", "value"}
_NAMES = re.compile(r".+-\d+\.safetensors")


def place_beside(target: Path) -> Path:
    """Where the progress of a run that writes ``target`` lies: hidden, in the same folder."""
    whole = resolved(target)
    name = short_name(whole.name)
    if name != whole.name:  # two long names may begin alike
        name += "-" + hashlib.sha256(os.fsencode(whole.name)).hexdigest()[:16]
    return whole.parent / f".{name}{ENDING}"


CONTENT = "digest"
OF_THE_FIRST = "content"
"""Where earlier versions noted a hash of the first four images."""


WALKED = ("skipped", "used", "labels", "labels_unused")
"""What only a walk over the images finds out, or earlier versions did not note."""


def settled(description: Mapping[str, Any], content: str | None) -> dict[str, Any]:
    """``Images.description`` without what only a walk over the images finds out.

    Args:
        description: it.
        content: ``Images.digest``: other images may come from the same place.
    """
    told = {k: v for k, v in description.items() if k not in WALKED}
    return {**told, CONTENT: content}


def same(known: Any, wanted: Any) -> bool:
    """Whether a run is about the same; earlier versions noted little of the images' content."""
    if isinstance(known, Mapping) and isinstance(wanted, Mapping) and CONTENT not in known:
        wanted = {key: value for key, value in wanted.items() if key != CONTENT}
        known = {key: value for key, value in known.items() if key != OF_THE_FIRST}
    return bool(known == wanted)


class Checkpoint:
    """The state of one run.

    Args:
        folder: for its files; made at the first save.
        run: JSON values that say which run it is; the state of another one is refused.

    Raises:
        BlockfitError: where ``folder`` is a file, holds anything that is no progress of a run, or
            cannot be written.
    """

    def __init__(self, folder: str | Path, run: Mapping[str, Any]) -> None:
        self.folder = check_kept(folder)
        for entry in self.folder.iterdir() if self.folder.exists() else ():
            if not _NAMES.fullmatch(entry.name) and not is_unfinished(entry.name):
                raise BlockfitError(
                    f"{folder} holds {entry.name}, which is no progress of a run; choose a folder "
                    "of its own"
                )
        self._own: set[Path] = set()
        self._run = json.loads(json.dumps({**run, "processes": ranks.count()}))
        self._every = seconds_set(EVERY_NAME, SAVE_EVERY_S)
        self._saved = time.monotonic()

    def due(self) -> bool:
        """Whether it is time to save a pass that goes on."""
        return time.monotonic() - self._saved >= self._every

    def save(self, name: str, value: Any, tensors: Mapping[str, Tensor] | None = None) -> None:
        """Replace what this process has saved under ``name``.

        Raises:
            BlockfitError: where the file system refuses.
        """
        path = self._path(name)
        if path not in self._own and path.exists() and not _is_progress(path):
            raise BlockfitError(f"{path} is no progress of a run; choose a folder of its own")
        told = {"blockfit": FORMAT, "run": json.dumps(self._run), "value": json.dumps(value)}
        with kept_file(path) as partial:
            save_file(dict(tensors or {}), partial, told)
        self._own.add(path)
        self._saved = time.monotonic()

    def load(self, name: str) -> tuple[Any, dict[str, Tensor]] | None:
        """What this process had saved under ``name``; ``None`` where there is nothing.

        Raises:
            BlockfitError: where the file is damaged or of another run.
        """
        path = self._path(name)
        if not path.exists():
            return None
        hint = f"delete {self.folder} to start again"
        try:
            with open_tensors(path) as stored:
                told = stored.metadata() or {}
                if set(told) != KEYS or told["blockfit"] != FORMAT:
                    raise BlockfitError(f"{path} is no progress of a run of this version; {hint}")
                run, value = json.loads(told["run"]), json.loads(told["value"])
                tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        except (ValueError, RecursionError) as error:
            raise BlockfitError(f"{path} is damaged ({first_line(error)}); {hint}") from error
        known = run if isinstance(run, dict) else {}
        other = [key for key in self._run if not same(known.get(key), self._run[key])]
        if other or known.keys() != self._run.keys():
            raise BlockfitError(
                f"{self.folder} holds the progress of a run with another "
                f"{' and '.join(other) or 'setting'}; repeat that run to go on, or {hint}"
            )
        return value, tensors

    def forget(self) -> None:
        """Delete what was saved; the run has come to its end."""
        forget(self.folder)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}-{ranks.rank()}.safetensors"


def forget(folder: Path) -> None:
    """Delete the progress in ``folder`` once the first process gets here."""
    ranks.agreed(lambda: None)
    folder = resolved(folder)
    for path in folder.glob(f"*-{ranks.rank()}.safetensors"):
        if _is_progress(path):
            path.unlink(missing_ok=True)
    for path in folder.glob(f".*-{ranks.rank()}.safetensors{PARTIAL}"):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # others may still have files there
        folder.rmdir()


def _is_progress(path: Path) -> bool:
    """Whether a file is what a ``Checkpoint`` has saved."""
    try:
        with open_tensors(path) as stored:
            return set(stored.metadata() or {}) == KEYS
    except BlockfitError:
        return False
