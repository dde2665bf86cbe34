"""What the site needs beyond its pages: the command line's reference, notebooks, mathematics.

mkdocs calls the functions by their names. Nothing is written beside the pages, so that nothing can
fall out of step with the code.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

from blockfit.commands import app as cli


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made of something else."""
    files.append(File.generated(config, "cli.md", content=cli_page()))
    for notebook in sorted(Path(config.docs_dir).glob("notebooks/*.ipynb")):
        text = notebook_page(json.loads(notebook.read_text("utf-8")), notebook.name)
        name = f"notebooks/{notebook.stem}.md"
        files.append(File.generated(config, name, content=text))
    return files


def on_page_content(text: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw without a script."""
    return re.sub(
        r'<(span|div) class="arithmatex">(?:\\\((.+?)\\\)|\\\[(.+?)\\\])</\1>',
        lambda m: convert(
            html.unescape(m[2] or m[3]).strip(), display="inline" if m[2] else "block"
        ),
        text,
        flags=re.DOTALL,
    )


def cli_page() -> str:
    """Every command with its options, by the panels of ``--help``."""
    root: Any = typer.main.get_command(cli.app)
    lines = [
        "# Command line",
        "",
        f"{root.help} This page is made from the code; `blockfit COMMAND --help` says the same.",
        "",
        "Every command prints its result on standard output and its progress on standard error. "
        "The exit code is 0; 2 where the message says what to change; 1 for a fault that nobody "
        "thought of; 130 after Ctrl-C.",
    ]
    for name, command in root.commands.items():
        types = get_type_hints(command.callback)
        panels: dict[str, list[str]] = {"Arguments": []}
        arguments, required = [], []
        for parameter in command.params:
            panel = getattr(parameter, "rich_help_panel", None) or "Other options"
            shown = ", ".join(sorted(parameter.opts, key=len))
            if parameter.param_type_name == "argument":
                panel, shown = "Arguments", parameter.name.upper()
                arguments.append(shown if parameter.required else f"[{shown}]")
            elif parameter.required:
                required.append(f"{parameter.opts[-1]} {parameter.name.upper()}")
            panels.setdefault(panel, []).append(row(shown, types, parameter))
        panels["Output"] = panels.pop("Output", [])  # behind all others
        usage = " ".join(["blockfit", name, *arguments, *required, "[OPTIONS]"])
        lines += ["", f"## blockfit {name}", "", command.help, "", "```text", usage, "```"]
        for panel, rows in panels.items():
            if rows:
                lines += ["", f"| {panel} | | |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


KINDS = {str: "text", int: "whole number", float: "number", Path: "path"}


def row(shown: str, types: dict[str, Any], parameter: Any) -> str:
    """An argument or option: its name, what it takes, what it means."""
    parts = {types[parameter.name], *get_args(types[parameter.name])}
    kind = next((KINDS[part] for part in KINDS if part in parts or list[part] in parts), "")
    told = [html.escape(parameter.help or "").replace("|", "\\|")]
    if isinstance(parameter.default, (str, float, int)) and parameter.default is not False:
        told.append(f"Default: `{parameter.default}`.")
    if parameter.required:
        told.append("Required.")
    return f"| `{shown}` | {kind} | {' '.join(told)} |"


def notebook_page(notebook: dict[str, Any], name: str) -> str:
    """A notebook as a page, with the outputs that it was saved with."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace(".ipynb)", ".md)"))
        else:
            parts.append(f"```python\n{source}\n```")
            parts += [output(value) for value in cell["outputs"]]
    title, _, rest = "\n\n".join(parts).partition("\n")
    return f"{title}\n\n[Download the notebook]({name})\n\n{rest}\n"


def output(value: dict[str, Any]) -> str:
    """One output of a cell: its picture, its table, or its text."""
    data = value.get("data", {})
    if "image/png" in data:
        image = "".join(data["image/png"]).replace("\n", "")
        return f'<img alt="What the code above draws" src="data:image/png;base64,{image}">'
    if "text/html" in data:
        lines = "".join(data["text/html"]).splitlines()
        return "<div>{}</div>".format("\n".join(line for line in lines if line.strip()))
    text = "".join(value.get("text", data.get("text/plain", "")))
    return f"```text\n{text.rstrip()}\n```"
