"""What help and progress show at a terminal of 80 × 40, and options by their old names."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from commandline import FEW, Done, blockfit_command
from commandline import small as small
from families import one_thread as one_thread

from blockfit.commands import app as cli
from blockfit.commands import options as opt
from blockfit.commands import output
from blockfit.commands.help import GROUPS, Rare
from blockfit.commands.output import Output, clock
from blockfit.reports.runs import read_run
from blockfit.search.summaries import verdict

WIDTH, HEIGHT, DOZEN = 80, 40, 15
COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    return


def named(text: str) -> set[str]:
    """Options that have a line of their own."""
    return set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE))


def options(command: str) -> set[str]:
    return {max(p.opts, key=len) for p in COMMANDS[command].params if p.param_type_name == "option"}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_help_fits_one_screen(command: str) -> None:
    done = blockfit_command(*([command] if command else []), "--help")
    lines = done.out.splitlines()
    assert done.code == 0
    assert len(lines) <= HEIGHT
    assert max(map(len, lines)) < WIDTH


def test_help_of_compress_is_short_and_help_all_is_whole() -> None:
    short = named(blockfit_command("compress", "--help").out)
    assert {"--images", "--params", "--output", "--from", "--help-all"} <= short
    assert len(short) <= DOZEN
    assert "--prefix-weight" not in short


@pytest.mark.parametrize("command", COMMANDS)
def test_help_all_shows_every_option(command: str) -> None:
    parameters = COMMANDS[command].params
    rare = {
        max(p.opts, key=len)
        for p in parameters
        if isinstance(getattr(p, "rich_help_panel", None), Rare)
    }
    assert named(blockfit_command(command, "--help-all").out) == options(command)
    assert named(blockfit_command(command, "--help").out) == options(command) - rare
    for parameter in parameters:
        if parameter.param_type_name == "option" and not parameter.is_flag:
            assert parameter.metavar, parameter.opts


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example_that_the_command_reads(command: str) -> None:
    *_, title, line = blockfit_command(command, "--help").out.rstrip().splitlines()
    words = shlex.split(line)
    assert title == "Example:"
    assert words[:2] == ["blockfit", command]
    COMMANDS[command].make_context(command, words[2:])  # raises where it cannot be read


def test_commands_stand_in_groups() -> None:
    text = blockfit_command("--help").out
    for group in GROUPS:
        assert f"\n{group}:\n" in text
    assert all(re.search(rf"^  {name} +[A-Z]", text, re.MULTILINE) for name in COMMANDS)
    assert {c.declared.group for c in COMMANDS.values()} == set(GROUPS)


def test_help_says_defaults_and_what_is_required() -> None:
    text = blockfit_command("sweep", "--help-all").out
    assert re.search(r"--batch-size N +Images per forward\. \[32\]", text)
    assert re.search(r"-o, --output FOLDER +Folder to write\. \[required\]", text)
    assert text.startswith("Usage: blockfit sweep MODEL -o FOLDER [OPTIONS]")
    text = blockfit_command("check", "--help").out
    assert text.startswith("Usage: blockfit check SMALL --images DATA [OPTIONS]")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (("evaluate", "x", "--data", "DIGITS"), ("evaluate", "x", "--images", "DIGITS")),
        (("evaluate", "x", "--data=DIGITS"), ("evaluate", "x", "--images=DIGITS")),
        (("quantize", "x", "-o", "y", "--data", "z"), ("quantize", "x", "-o", "y", "--test", "z")),
        (
            ("reproduce", "--model", "x", "--data", "y"),
            ("reproduce", "x", "--images", "y"),
        ),
        (("reproduce", "--model=x", "--data=y"), ("reproduce", "x", "--images", "y")),
    ],
)
def test_old_names_are_read_as_the_new_ones(old: tuple[str, ...], new: tuple[str, ...]) -> None:
    def read(words: tuple[str, ...]) -> dict[str, Any]:
        return dict(COMMANDS[words[0]].make_context(words[0], list(words[1:])).params)

    assert read(old) == read(new)
    assert old != new


def test_images_and_output_are_called_the_same_everywhere() -> None:
    for name, command in COMMANDS.items():
        names = {option for p in command.params for option in p.opts}
        assert "--data" not in names, name
        assert ("--output" in names) == ("-o" in names), name
        if name not in ("demo", "doctor", "push", "bench"):
            assert "--images" in names, name


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, name in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=cuda: there)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda there=mps: there)
        assert opt.best_device() == name
    assert opt.Loading(device="auto").place() == "cpu"
    assert "device: cpu" in blockfit_command("analyze", "demo", *FEW).err


def test_every_command_that_runs_a_model_says_where(
    small: tuple[Path, Done], tmp_path: Path
) -> None:
    images = ("--images", "digits:test", "--limit", "8")
    runs: dict[str, tuple[str | Path, ...]] = {
        "evaluate": (small[0], *images, "--no-speed"),
        "compare": (small[0], "demo", *images),
        "check": (small[0], *images, "--dtype", "bfloat16"),
        "bench": (small[0], "--against", "demo", "--batch-size", "1", "--rounds", "2"),
        "export": (small[0], "--pt2", "-o", tmp_path / "small.pt2"),
        "quantize": (small[0], "-o", tmp_path / "tiny"),
    }
    for name, words in runs.items():
        done = blockfit_command(name, *words)
        assert done.code == 0, done.err
        assert done.err.count("device: cpu\n") == 1, name


def test_a_sweep_recommends_what_its_report_opens_with(tmp_path: Path) -> None:
    target = tmp_path / "a sweep"
    done = blockfit_command(
        "sweep", "demo", *FEW, "--select", "last", "--repair", "none", "-o", target
    )
    (line,) = (line for line in done.out.splitlines() if line.startswith("next: "))
    chosen = read_run(target).chosen
    assert chosen is not None
    assert line == f"next: {chosen.command}"
    words = shlex.split(line)[2:]
    made = blockfit_command(*words[:-1], tmp_path / "small", "--json").json
    assert made["plan"] == chosen.plan.to_json()


def test_speed_is_left_out_on_request(small: tuple[Path, Done]) -> None:
    given = ("evaluate", small[0], "--images", "digits:test", "--limit", "20", "--json")
    told = blockfit_command(*given, "--no-speed").json["compressed"]
    assert told["images_per_second"] is None
    assert told["top1"] is not None
    assert blockfit_command(*given).json["compressed"]["images_per_second"] > 0


def test_a_compression_says_one_verdict_and_the_maps_with_verbose(tmp_path: Path) -> None:
    given = ("compress", "demo", *FEW, "--span", "9:11", "-o")
    done = blockfit_command(*given, tmp_path / "a")
    assert done.out.count("verdict: ") == 1
    assert "Held-out error of each map" not in done.out
    assert "Held-out error of each map" in blockfit_command(*given, tmp_path / "b", "-v").out


def test_the_verdict_is_of_the_loss_and_the_weakest_map() -> None:
    maps = [
        {"span": "2:4", "error": 0.1, "identity_error": 0.5},
        {"span": "7:9", "error": 0.3, "identity_error": 0.4},
    ]
    report = {"held_out": {"kl": 0.02, "feature_relative_error": 0.5}, "maps": maps}
    assert verdict(report) == (
        "close to the original (KL 0.0200, at most 0.1 is); the weakest map, of 7:9, leaves 75.0% "
        "of the error without it"
    )
    report = {"held_out": {"kl": None, "feature_relative_error": 0.5}, "maps": []}
    assert verdict(report) == "not close to the original (feature error 0.5000, above 0.1)"


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.03, 0.09, "close to the original (KL 0.0600, 0.0300 to 0.0900; at most 0.1 is)"),
        (0.11, 0.2, "not close to the original (KL 0.0600, 0.1100 to 0.2000; above 0.1)"),
        (0.03, 0.2, "192 images do not tell whether it is close to the original "
                    "(KL 0.0600, 0.0300 to 0.2000; at most 0.1 is)"),
    ],
)  # fmt: skip
def test_the_verdict_is_of_the_images_that_decided_nothing(
    low: float, high: float, said: str
) -> None:
    held_out = {"kl": 0.01, "feature_relative_error": 0.2}
    final: dict[str, Any] = {"images": 192, "kl": {"value": 0.06, "low": low, "high": high}}
    assert verdict({"held_out": held_out, "maps": [], "final": final}) == said
    assert "0.0100" in verdict({"held_out": held_out, "maps": [], "final": None})
    for least, told in ((0.4, ", yet it loses 1.20 points of top-1 (0.40 to 2.10)"), (-0.4, "")):
        final["drop"] = {"value": 1.2, "low": least, "high": 2.1}
        lost = verdict({"held_out": held_out, "maps": [], "final": final})
        assert lost == said + (told if said.startswith("close") else "")


def test_a_pipe_gets_a_line_per_step_and_a_terminal_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now = [100.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    with contextlib.redirect_stderr(io.StringIO()) as pipe:
        out = Output(as_json=False, quiet=False)
        for after, line in ((0, "first"), (0.5, "too soon"), (65, "second"), (0.2, "again")):
            now[0] += after
            out.say(line)
            out.count(1, 2)
    assert pipe.getvalue() == "[0:00] first\n[1:05] second\n"
    assert clock(now[0] - 3599) == "59:59"
    for silent in ({"as_json": True, "quiet": False}, {"as_json": False, "quiet": True}):
        with contextlib.redirect_stderr(io.StringIO()) as pipe:
            Output(**silent).say("hush")
        assert pipe.getvalue() == ""
    with contextlib.redirect_stderr(Terminal()) as screen:
        out = Output(as_json=False, quiet=False)
        now[0] += 83
        with out.working():
            out.say("reading")
            out.count(3, 10)
    assert "[1:23]" in screen.getvalue()
    assert "3/10" in screen.getvalue()
