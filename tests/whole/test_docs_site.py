"""The site builds without a warning, holds every command, and asks nothing of another server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer
from docs_pages import ROOT

from blockfit.commands import app as cli

pytest.importorskip("mkdocs")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


class Fetched(HTMLParser):
    """What a browser fetches to show a page: everything but the targets of its links."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "a":
            self.urls += [value or "" for name, value in attrs if name in ("src", "href")]


def test_a_page_fetches_nothing_from_another_server(site: Path) -> None:
    for page in site.rglob("*.html"):
        parser = Fetched()
        parser.feed(page.read_text("utf-8"))
        assert parser.urls
        assert [url for url in parser.urls if re.match(r"(https?:)?//", url)] == []
    styles = "".join(file.read_text("utf-8") for file in site.rglob("*.css"))
    assert re.findall(r"@import|url\(['\"]?https?:[^)]*", styles) == []


def test_every_page_is_built(site: Path) -> None:
    written = {str(p.relative_to(ROOT / "docs"))[:-3] for p in (ROOT / "docs").rglob("*.md")}
    assert written <= {str(p.relative_to(site))[:-5] for p in site.rglob("*.html")}


def test_the_command_line_is_listed_whole(site: Path) -> None:
    text = (site / "cli.html").read_text("utf-8")
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        start = text.index(f'id="blockfit-{name}"')
        section = text[start : text.find("<h2", start + 1)]
        for parameter in command.params:
            shown = parameter.name.upper() if parameter.param_type_name == "argument" else ""
            for word in [shown] if shown else parameter.opts:
                assert re.search(rf"<code>[^<]*{re.escape(word)}\b[^<]*</code>", section), word


def test_the_public_names_are_described(site: Path) -> None:
    import blockfit

    text = (site / "api.html").read_text("utf-8")
    assert [name for name in blockfit.__all__ if f'id="blockfit.{name}"' not in text] == []
