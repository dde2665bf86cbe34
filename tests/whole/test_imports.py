"""What answers at once: importing the package, help, the version, a typing error, completion."""

from __future__ import annotations

import ast
import importlib
import importlib.util
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
ROOT = Path(__file__).resolve().parents[2]
VERBS = {
    "analyze", "bench", "calibrate", "compare", "compress", "evaluate", "export_hub", "export_onnx",
    "export_plain", "export_program", "find_blocks", "from_sweep", "images", "load", "push_to_hub",
    "report", "reproduce", "save", "sweep",
}  # fmt: skip
OF_TORCH = 0.15
"""Part of the time of importing torch beside it (2 s alone): 0.3 s where nothing else runs."""
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
def test_the_import_takes_a_fraction_of_what_torch_takes(module: str) -> None:
    """Once is enough; a busy machine gets three tries."""
    pairs: list[tuple[float, float]] = []
    while len(pairs) < 3 and not any(ours < OF_TORCH * theirs for ours, theirs in pairs):
        pairs.append((_seconds(module), _seconds("torch")))
    assert min(ours / theirs for ours, theirs in pairs) < OF_TORCH, pairs


def _seconds(module: str) -> float:
    """Processor time of an import in a process of its own."""
    code = f"import time; a = time.process_time(); import {module}; print(time.process_time() - a)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    return float(run.stdout)


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


def _imported(file: Path) -> list[tuple[str, str]]:
    """Names that a script takes from blockfit, with the modules that should have them."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("blockfit"):
            found += [(node.module or "", alias.name) for alias in node.names]
    return found


def test_benchmarks_and_examples_import_what_there_is() -> None:
    """They are not run by the tests as they stand, and mypy does not read them."""
    files = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]
    names = {name for file in files for name in _imported(file)}
    assert len(names) > 30
    missing = [name for name in sorted(names) if not _there(*name)]
    assert missing == []


def _there(module: str, name: str) -> bool:
    found = importlib.import_module(module)
    if hasattr(found, name):
        return True
    return hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{name}") is not None
