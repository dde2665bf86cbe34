"""The ``blockfit`` command: its parts, and one way out for whatever goes wrong."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from blockfit import __version__
from blockfit.commands.analyze import analyze
from blockfit.commands.bench import bench
from blockfit.commands.check import check
from blockfit.commands.compare import compare
from blockfit.commands.compress import compress
from blockfit.commands.demo import demo
from blockfit.commands.doctor import doctor
from blockfit.commands.evaluate import evaluate
from blockfit.commands.export import export
from blockfit.commands.help import Command, Group
from blockfit.commands.output import guarded, stop_logging
from blockfit.commands.push import push
from blockfit.commands.quantize import quantize
from blockfit.commands.report import report
from blockfit.commands.reproduce import reproduce
from blockfit.commands.sweep import sweep

QUIET_LIBRARIES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
}
"""Keeps other libraries' bars and warnings off the screen; what the user has set stays."""

WAITING = {"GOMP_SPINCOUNT": "1000"}
"""How often a thread of PyTorch looks whether the others are done before it sleeps, by default
300,000 times: beside another program it looks on for as long as the thread that it waits for has
no core, and a run may take twenty times as long. libgomp reads it when torch is imported."""

WAITING_TOLD = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
"""By these a user says how threads wait."""

QUIET_LOGGERS = ("torch.utils._pytree", "torch.utils.cpp_extension")
"""Warn of what no user of this command can change, when torchao or a compiler is loaded."""

UNWRITABLE = ("strict", "surrogateescape")
"""What Python does by default where a terminal or pipe has no such character: it raises."""

COMMANDS = (
    demo, compress, sweep, doctor,
    evaluate, compare, analyze, bench, check, report,
    export, quantize, push,
    reproduce,
)  # fmt: skip
"""In the order of ``blockfit --help``."""

app = typer.Typer(
    name="blockfit",
    cls=Group,
    help="Make a pretrained vision transformer smaller and faster without training it.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"blockfit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make a pretrained vision transformer smaller and faster without training it."""


for _command in COMMANDS:
    app.command(cls=Command)(_command)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; see ``output.guarded``."""
    command = list(arguments) or ["--help"]
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    if command[0] != "bench" and not any(name in os.environ for name in WAITING_TOLD):
        os.environ.update(WAITING)  # bench times models as other programs run them
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return guarded(
            lambda: app(command, prog_name="blockfit", standalone_mode=False), "--debug" in command
        )
    finally:
        stop_logging()


def main() -> None:
    """The entry point of ``blockfit`` and ``python -m blockfit``."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in UNWRITABLE:
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python has it for standard error
    sys.exit(run(sys.argv[1:]))
