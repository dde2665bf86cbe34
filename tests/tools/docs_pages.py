"""README.md, CONTRIBUTING.md and docs/ as the tests see them: fenced blocks, markers, commands."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)``` *$", re.M | re.S
)
MARKER = re.compile(
    r"<!--\s*(?P<kind>not run|run first):\s*(?P<text>(?:(?!-->).)+)-->\s*\Z", re.DOTALL
)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")

SHELL = {"", "sh", "bash", "shell", "console"}
PYTHON = {"python", "py"}
DATA = {"text", "json", "yaml", "toml", "csv", "ini", "html"}
"""What a block may be: commands, Python, or something to look at."""


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Args:
        page: its file.
        line: the number of its first line in it, counted from 1.
        language: the first word behind the fence.
        text: what stands in it.
        why_not: why it is not run; ``None`` where it is.
        before: commands that a reader of the page need not see, run before it.
    """

    page: Path
    line: int
    language: str
    text: str
    why_not: str | None
    before: str

    def __str__(self) -> str:
        page = self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page.name
        return f"{page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page in order, each with the comment just before it."""
    text = page.read_text("utf-8")
    found = []
    for match in FENCE.finditer(text):
        marker = MARKER.search(text[: match.start()])
        kind, told = (marker["kind"], " ".join(marker["text"].split())) if marker else (None, "")
        found.append(
            Block(
                page=page,
                line=text.count("\n", 0, match.start("body")) + 1,
                language=(match["info"].split() or [""])[0],
                text=textwrap.dedent(match["body"]),
                why_not=told if kind == "not run" else None,
                before=told if kind == "run first" else "",
            )
        )
    return found


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block; comments, prompts and output are left out.

    Where commands stand behind ``$ ``, the other lines are their output.
    """
    lines = text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    for line in lines:
        if words := shlex.split(line, comments=True):
            yield words


def inline_commands(page: Path) -> Iterator[list[str]]:
    """Code within sentences and tables that is a command or an option, split into words."""
    for match in INLINE.finditer(FENCE.sub("", page.read_text("utf-8"))):
        text = match[1].replace("\n", " ").strip()
        if re.match(r"(blockfit|make|python|pip) |--\w", text):
            yield text.split() if "'" in text and text.count("'") % 2 else shlex.split(text)
