"""What answers at once: importing the package, help, the version, a typing error, completion."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import blockfit
from blockfit import api

SLOW = ("torch", "numpy", "sklearn", "transformers", "timm", "torchvision", "matplotlib", "PIL")
VERBS = {
    "analyze", "bench", "calibrate", "compare", "compress", "evaluate", "export_hub", "export_onnx",
    "export_plain", "export_program", "find_blocks", "from_sweep", "images", "load", "push_to_hub",
    "report", "reproduce", "save", "sweep",
}  # fmt: skip
LONGEST_S = 0.3
AT_EXIT = (
    "import atexit, json, sys; atexit.register(lambda: print(json.dumps("
    "sorted({n.split('.')[0] for n in sys.modules}))))"
)


def loaded(code: str, *arguments: str, env: dict[str, str] | None = None) -> tuple[int, set[str]]:
    """Exit code of a process of its own, and the packages that it had loaded at its end."""
    done = subprocess.run(
        [sys.executable, "-c", f"{AT_EXIT}\n{code}", *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, **(env or {})},
    )  # fmt: skip
    return done.returncode, set(json.loads(done.stdout.splitlines()[-1]))


MAIN = "from blockfit.commands.app import main; sys.argv[0] = 'blockfit'; main()"


def test_importing_the_package_loads_nothing_slow() -> None:
    code, found = loaded("import blockfit; dir(blockfit); blockfit.__version__")
    assert code == 0
    assert found.isdisjoint(SLOW)
    assert "torch" in loaded("import blockfit; blockfit.compress")[1]  # the probe can tell


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), 0),
        (("--help",), 0),
        (("--version",), 0),
        (("compres",), 2),
        (("compress", "--help"), 0),
        (("compress", "demo", "--imags", "digits"), 2),
        (("sweep", "demo"), 2),
        (("reproduce", "-h"), 0),
    ],
)
def test_help_version_and_typing_errors_load_nothing_slow(
    arguments: tuple[str, ...], code: int
) -> None:
    done, found = loaded(MAIN, *arguments)
    assert done == code
    assert found.isdisjoint(SLOW)


@pytest.mark.parametrize("words", ["blockfit swe", "blockfit compress --rep"])
def test_completion_loads_nothing_slow(words: str) -> None:
    place = str(len(words.split()) - 1)
    env = {"_BLOCKFIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": place}
    assert loaded(MAIN, env=env)[1].isdisjoint(SLOW)


@pytest.mark.parametrize("module", ["blockfit", "blockfit.commands.app"])
def test_the_import_takes_less_than_a_third_of_a_second(module: str) -> None:
    code = f"import time; a = time.process_time(); import {module}; print(time.process_time() - a)"

    def seconds() -> float:  # of the processor, for others may keep it busy
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        return float(run.stdout)

    assert min(seconds() for _ in range(3)) < LONGEST_S


def test_dir_shows_the_public_names_and_nothing_internal() -> None:
    import blockfit.search.session

    assert blockfit.search.session
    names = set(dir(blockfit))
    assert names == {*blockfit.__all__, "__version__"}
    assert names >= VERBS
    assert all(getattr(blockfit, name) is not None for name in names)
    assert {name for name in names if inspect.ismodule(getattr(blockfit, name))} == set()
    with pytest.raises(AttributeError, match="no attribute 'shrink'"):
        blockfit.shrink  # noqa: B018


def test_every_verb_is_documented_with_every_parameter() -> None:
    for name in VERBS:
        verb = getattr(blockfit, name)
        text = inspect.getdoc(verb) or ""
        assert text, name
        if verb.__module__ == api.__name__:
            for parameter in inspect.signature(verb).parameters:
                assert re.search(rf"^ +{parameter}: ", text, re.MULTILINE), (name, parameter)


def test_type_checkers_see_the_names_that_are_there() -> None:
    """The names under ``TYPE_CHECKING`` are those of ``__all__``, from the same modules."""
    import ast

    tree = ast.parse(Path(blockfit.__file__).read_text("utf-8"))
    seen = {
        alias.name: f"{node.module}"
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(seen) == set(blockfit.__all__)
    for name, module in seen.items():
        assert getattr(importlib.import_module(module), name) is getattr(blockfit, name)
