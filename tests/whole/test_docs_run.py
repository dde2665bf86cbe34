"""Every block and every command of README.md, CONTRIBUTING.md and docs/ is run, or says why not.

The blocks of a page are run in order, in one folder in which ``docs_world`` has laid small models
and pictures under the names that the pages use. A block that cannot be run here stands behind

    <!-- not run: the reason -->

and what a page's first command needs, but its reader has already, behind

    <!-- run first: blockfit compress MODEL --images PHOTOS --remove 3 -o small/ -->
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from commandline import blockfit_command
from docs_pages import DATA, PAGES, PYTHON, ROOT, SHELL, Block, blocks_of, commands_of
from docs_pages import inline_commands as inline
from docs_world import world

from blockfit.commands import app as cli

pytest.importorskip("transformers")
pytest.importorskip("datasets")

COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
OPTIONS = {
    name: {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
    for name, command in COMMANDS.items()
}
EXTRAS = (ROOT / "pyproject.toml").read_text("utf-8").partition("optional-dependencies]")[2]
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)

SCRIPT_OPTIONS = {
    option
    for script in ROOT.glob("benchmarks/*.py")
    for option in re.findall(r'"(--[\w-]+)"', script.read_text("utf-8"))
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    world(folder)
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with all that the pages speak of."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def blockfit_fault(words: list[str]) -> str | None:
    """What is wrong with a ``blockfit`` command; ``…`` and a bare command are let through."""
    if len(words) == 1 or words[1].startswith("-"):
        known = {"--help", "-h", "--version", "--install-completion", "--show-completion"}
        wrong = [w for w in words[1:] if w not in known]
        return f"blockfit has no option {wrong[0]}" if wrong else None
    if words[1] not in OPTIONS:
        return f"there is no command blockfit {words[1]}"
    wrong = [w for w in words[2:] if re.match(r"--?[a-z]", w) and w not in OPTIONS[words[1]]]
    if wrong:
        return f"blockfit {words[1]} has no option {wrong[0]}"
    needed = [p.opts for p in COMMANDS[words[1]].params if p.required and p.opts[0][0] == "-"]
    whole = "-o" in words and "…" not in words  # what names its output is to be typed as it stands
    lacking = [opts[0] for opts in needed if whole and not set(opts) & set(words)]
    return f"{' '.join(words)} lacks {lacking[0]}" if lacking else None


def make_fault(words: list[str]) -> str | None:
    wrong = [w for w in words[1:] if w not in TARGETS]
    return f"the Makefile has no target {wrong[0]}" if wrong else None


def pip_fault(words: list[str]) -> str | None:
    named = re.findall(r"[\w-]+", "".join(re.findall(r"\[(.+)\]", " ".join(words))))
    wrong = [name for name in named if not re.search(rf"^{name} = ", EXTRAS, re.MULTILINE)]
    return f"pyproject.toml has no extra {wrong[0]}" if wrong else None


def python_fault(words: list[str]) -> str | None:
    """A script must exist, and know the options that it is given."""
    script = ROOT / words[1]
    if words[1].startswith("-") or "/" not in words[1]:
        return None
    if not script.is_file():
        return f"there is no script {words[1]}"
    text = "".join(p.read_text("utf-8") for p in script.parent.glob("*.py"))
    wrong = [w for w in words[2:] if w.startswith("--") and f'"{w}"' not in text]
    return f"{words[1]} has no option {wrong[0]}" if wrong else None


CHECKS: dict[str, Callable[[list[str]], str | None]] = {
    "blockfit": blockfit_fault,
    "make": make_fault,
    "pip": pip_fault,
    "python": python_fault,
}
ONLY_CHECKED = {
    "make": "sets up an environment of its own; CI is `make test`",
    "pip": "needs a network, and the tests run in what it installs",
}
"""Commands that need no comment although they are not run: that they exist is tested."""


def run_command(block: Block, words: list[str]) -> None:
    if words[0] in ONLY_CHECKED:
        return
    if words[0] != "blockfit":
        pytest.fail(
            f"{block}: cannot run {' '.join(words)!r}; write <!-- not run: why --> before the "
            "block, or mark it as `text` where it is no command"
        )
    file = None
    if ">" in words:
        at = words.index(">")
        words, file = words[:at], words[at + 1]
    make_room(words)
    done = blockfit_command(*words[1:])
    if done.code:
        pytest.fail(f"{block}: {' '.join(words)} ended with code {done.code}:\n{done.err}")
    if file is not None:
        Path(file).write_text(done.out, "utf-8")


def make_room(words: list[str]) -> None:
    """Take away what an earlier block wrote there: pages show several ways to make ``small/``."""
    if "-o" in words and words[1] != "sweep" and "--overwrite" not in words:
        output = Path(words[words.index("-o") + 1])
        if output.is_dir():
            shutil.rmtree(output)
        output.unlink(missing_ok=True)


def run_python(block: Block, module: types.ModuleType) -> None:
    lines = "\n" * (block.line - 1) + block.text  # so that a traceback names the page's line
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(lines, str(block.page), "exec"), vars(module))  # noqa: S102


def check(block: Block) -> list[str]:
    """What is wrong with a block before anything is run."""
    if block.why_not is not None and len(block.why_not) < 8:
        return [f"{block}: say why it is not run"]
    if block.language not in SHELL | PYTHON | DATA:
        return [] if block.why_not else [f"{block}: a block in an unknown language"]
    faults = []
    if block.language in SHELL:
        for words in commands_of(block.text):
            fault = CHECKS.get(words[0], lambda _: None)(words)
            faults += [f"{block}: {fault}"] if fault else []
    return faults


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_options_targets_and_scripts_exist(page: Path) -> None:
    faults = [fault for block in blocks_of(page) for fault in check(block)]
    every = set().union(*OPTIONS.values(), SCRIPT_OPTIONS)
    for words in inline(page):
        if words[0].startswith("--"):
            fault = None if words[0].partition("=")[0] in every else f"no command has {words[0]}"
        else:
            fault = CHECKS[words[0]](words)
        faults += [f"{named(page)}: {fault}"] if fault else []
    assert faults == []


RUN = [p for p in PAGES if any(b.language not in DATA for b in blocks_of(p))]
"""Pages with blocks to run."""


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.views] if p.name == "README.md" else []) for p in RUN],
    ids=map(named, RUN),
)
@pytest.mark.usefixtures("here")
def test_every_block_runs(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "BLOCKFIT_SHARED", str(Path("../shared").resolve()))
    run_page(page, monkeypatch)


def run_page(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks of a page in order; its Python blocks share their names."""
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for block in blocks_of(page):
        for words in commands_of(block.before):
            run_command(block, words)
        if block.why_not is None and block.language in SHELL:
            for words in commands_of(block.text):
                run_command(block, words)
        elif block.why_not is None and block.language in PYTHON:
            run_python(block, module)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("```\nblockfit compres MODEL\n```", "no command blockfit compres"),
        ("```sh\nblockfit compress MODEL \\\n  --smaller\n```", "no option --smaller"),
        ("```\nmake coffee\n```", "no target coffee"),
        ("```\npip install -e '.[everything]'\n```", "no extra everything"),
        ("```\npython benchmarks/nothing.py\n```", "no script benchmarks/nothing.py"),
        ("```\npython benchmarks/speed.py --sped 3\n```", "no option --sped"),
        ("```ruby\nputs 1\n```", "unknown language"),
        ("<!-- not run: no -->\n```\nls\n```", "say why"),
    ],
)
def test_a_fault_is_seen(text: str, fault: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, "utf-8")
    (found,) = [fault for block in blocks_of(page) for fault in check(block)]
    assert fault in found
    assert "page.md:" in found


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("\n```\nls\n```", "page.md:3: cannot run 'ls'"),
        ("```\nblockfit evaluate nowhere --data TEST\n```", "code 2"),
        (
            "- item:\n\n  ```python\n  x = 1\n  ```\n\n```python\nassert x == 2, 'x == 2'\n```",
            "x == 2",
        ),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_block_that_fails_fails_its_page(
    text: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path("page.md")
    page.write_text(text, "utf-8")
    with pytest.raises((pytest.fail.Exception, AssertionError), match=re.escape(fault)):
        run_page(page, monkeypatch)


@pytest.mark.usefixtures("here")
def test_comments_keep_a_block_from_running_or_prepare_it(monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path("page.md")
    page.write_text(
        "<!-- not run: it would end the tests -->\n```\nshutdown now\n```\n\n"
        "<!-- run first: blockfit compress demo --images digits --limit 40 --span 3:4\n"
        "     -o small/ -->\n```console\n$ blockfit evaluate small/ --data digits:test \\\n"
        "  --limit 20 --json > worth.json\nsome output\n```\n",
        "utf-8",
    )
    run_page(page, monkeypatch)
    assert json.loads(Path("worth.json").read_text("utf-8"))["images"] == 20
