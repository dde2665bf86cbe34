"""What ``--help`` shows: one screen, commands in groups, rare options with ``--help-all``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from blockfit.commands.options import DATA, FORM, HOW, OUT, REMOVE, Rare, option
from blockfit.provenance import started_with

GROUPS = ("Start", "Look", "Deploy", "Research")
PANELS = ("Arguments", FORM, DATA, REMOVE, HOW, OUT)
"""In the order in which they are shown."""

METAVARS = {"integer": "N", "float": "X", "path": "PATH"}
ALL = "--help-all"
WORDS = "blockfit.words"
"""Under which a context keeps what stood after the command's name."""


@dataclass(frozen=True)
class Declared:
    """What a command says of itself beside its options.

    Args:
        group: in which ``blockfit --help`` shows it.
        example: a whole command line, below its own help.
        old: names that options had before, by their names now; "" is an argument.
    """

    group: str
    example: str
    old: Mapping[str, str] = field(default_factory=dict)


def _show_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        context.meta[ALL] = True
        typer.echo(context.get_help())
        raise typer.Exit


HelpAll = option(ALL, "Show all options.", OUT, is_eager=True, callback=_show_all)


class Command(TyperCommand):
    """A command whose help fits a screen and that still reads the options' old names."""

    @property
    def declared(self) -> Declared:
        """What was given to ``commands.command``."""
        return vars(self.callback)["declared"]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Bring old names to those of now; everything else is click's."""
        words = _renamed(args, self.declared.old)
        ctx.meta[WORDS] = tuple(words)
        return super().parse_args(ctx, words)

    def invoke(self, ctx: Any) -> Any:
        """Run it; what it writes holds the command line."""
        with started_with(("blockfit", str(ctx.info_name), *ctx.meta.get(WORDS, ()))):
            return super().invoke(ctx)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Arguments, the options that must be there, and that there are others."""
        arguments, required = [], []
        for parameter in self.get_params(ctx):
            name = _row(parameter)[0]
            if parameter.param_type_name == "argument":
                arguments.append(name)
            elif parameter.required:
                required.append(name.replace(", --output", ""))
        return [*arguments, *required, "[OPTIONS]"]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """A section per panel; rare options only where all were asked for."""
        sections: dict[str, list[tuple[str, str]]] = {panel: [] for panel in PANELS}
        parameters = self.get_params(ctx)
        rare = any(_is_rare(p) for p in parameters)
        for parameter in parameters:
            needless = (ALL in parameter.opts and not rare) or "--help" in parameter.opts
            if needless or (_is_rare(parameter) and ALL not in ctx.meta):
                continue
            if parameter.param_type_name == "argument":
                panel = "Arguments"
            else:
                panel = getattr(parameter, "rich_help_panel", None) or OUT
            sections[panel].append(_row(parameter))
        for panel, rows in sections.items():
            if rows:
                with formatter.section(panel):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """The example."""
        with formatter.section("Example"):
            formatter.write(f"  {self.declared.example}\n")


class Group(TyperGroup):
    """All commands by what they are for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order in which they were declared."""
        return list(self.commands)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Commands first, one line each; then the options."""
        for group in GROUPS:
            rows = [
                (name, (command.help or "").partition(".")[0])
                for name, command in self.commands.items()
                if isinstance(command, Command) and command.declared.group == group
            ]
            with formatter.section(group):
                formatter.write_dl(rows)
        with formatter.section("Options"):
            formatter.write_dl(
                [_row(parameter) for parameter in self.get_params(ctx) if parameter.opts]
            )


def _is_rare(parameter: Any) -> bool:
    return isinstance(getattr(parameter, "rich_help_panel", None), Rare)


def _row(parameter: Any) -> tuple[str, str]:
    """The name of a parameter with what it takes; what it means with its default."""
    told = parameter.help or ""
    if parameter.param_type_name == "argument":
        name = parameter.metavar or parameter.name.upper()
        return name if parameter.required else f"[{name}]", told
    name = ", ".join(sorted(parameter.opts, key=len))
    if not parameter.is_flag:
        name += f" {parameter.metavar or METAVARS.get(parameter.type.name, 'TEXT')}"
    value = parameter.default
    if parameter.required:
        told += " [required]"
    elif (
        isinstance(value, (str, int, float, Path)) and value is not False and not parameter.is_flag
    ):
        told += f" [{value}]"
    return name, told


def _renamed(words: Sequence[str], old: Mapping[str, str]) -> list[str]:
    """A command line with the names of now."""
    renamed: list[str] = []
    for number, word in enumerate(words):
        if word == "--":
            return [*renamed, *words[number:]]
        name, equals, value = word.partition("=")
        if name not in old:
            renamed.append(word)
        elif old[name]:
            renamed.append(f"{old[name]}{equals}{value}")
        elif equals:
            renamed.append(value)
    return renamed
