"""Running the ``blockfit`` command in this process, and a small model that it made."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from blockfit.commands import app as cli

FEW = ("--images", "digits", "--limit", "40")
TOLD = ("images: ", "preprocessing: ", "labels", "device: ", "[")
"""How lines begin on standard error that say what a command works with and does."""


@dataclass
class Done:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one sentence of a refused call, behind what was told of the images."""
        assert self.code == 2, self.err
        assert self.out == ""
        *told, sentence = self.err.splitlines()
        assert all(line.startswith(TOLD) for line in told)
        assert sentence.startswith("blockfit: error: ")
        return sentence.removeprefix("blockfit: error: ")


def blockfit_command(*arguments: str | Path) -> Done:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.run([str(a) for a in arguments])
    return Done(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """The demo model without blocks 9 and 10, and what ``compress --json`` said of it."""
    folder = tmp_path_factory.mktemp("cli") / "small"
    done = blockfit_command(
        "compress", "demo", *FEW, "--span", "9:11", "--map", "affine", "-o", folder, "--json"
    )
    return folder, done
