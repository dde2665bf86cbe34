"""What people at a terminal count on: Ctrl-C, colours, logs, completion."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commandline import FEW, blockfit_command
from PIL import Image

from blockfit import api
from blockfit.commands.app import WAITING_TOLD
from blockfit.commands.output import Output, guarded
from blockfit.search.span_search import Search

CHEAP = ("--select", "last", "--map", "identity", "--repair", "none")


@pytest.fixture(autouse=True)
def ctrl_c_is_heeded() -> Iterator[None]:
    """Also where the tests themselves run behind a shell's ``&``, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_stopped_sweep_says_what_it_has_kept_and_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    solved = Search.solved

    def stops(self: Search, size: int) -> Any:
        if size == 4:
            raise KeyboardInterrupt
        return solved(self, size)

    monkeypatch.setattr(Search, "solved", stops)
    command = ("sweep", "demo", *FEW, *CHEAP, "-o", tmp_path / "sweep")
    done = blockfit_command(*command, "-q")
    assert (done.code, done.out) == (130, "")
    assert done.err == (
        f"blockfit: interrupted; 3 plans are kept in {tmp_path / 'sweep'}, "
        "and the same command goes on from there\n"
    )
    monkeypatch.setattr(Search, "solved", solved)
    assert len(blockfit_command(*command, "--json").json["points"]) == 10


def test_a_sweep_that_is_stopped_at_once_says_that_there_is_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stops(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "load", stops)
    done = blockfit_command("sweep", "demo", *FEW, "-o", tmp_path / "sweep", "-q")
    assert (done.code, done.err) == (130, "blockfit: interrupted; no plan was finished yet\n")
    assert not list(tmp_path.iterdir())


def test_ctrl_c_in_a_process_of_its_own_leaves_nothing_half_done(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "blockfit", "sweep", "demo", "--images", "digits"]
    command += ["--cuts", "blocks"]
    running = subprocess.Popen(
        [*command, "-v", "-o", str(tmp_path / "sweep")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stderr is not None
    for line in running.stderr:
        if "moments" in line:
            break
    time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1].startswith("blockfit: interrupted; ")
    assert "Traceback" not in err
    assert not list(tmp_path.rglob("*.partial"))


def test_ctrl_c_is_heeded_also_where_python_drops_the_exception(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reached: list[str] = []

    def command() -> int:
        out = Output(as_json=False, quiet=True)
        with out.working():
            with contextlib.suppress(KeyboardInterrupt):  # as after a finalizer
                signal.raise_signal(signal.SIGINT)
            reached.append("before")
            out.say("the next step")
            reached.append("behind")
        return 0

    before = signal.getsignal(signal.SIGINT)
    assert guarded(command, debug=False) == 130
    assert reached == ["before"]
    assert capsys.readouterr().err.startswith("blockfit: interrupted; ")
    assert signal.getsignal(signal.SIGINT) is before


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("colours", [True, False])
def test_no_color_is_heeded(monkeypatch: pytest.MonkeyPatch, colours: bool) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    if not colours:
        monkeypatch.setenv("NO_COLOR", "1")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    Output(as_json=False, quiet=False).warn(["costly"])
    coloured = re.search(r"\x1b\[[\d;]*3\dm", screen.getvalue()) is not None
    assert coloured is colours
    assert "costly" in screen.getvalue()


def test_verbose_logs_what_is_done_and_leaves_nothing_behind(tmp_path: Path) -> None:
    command = ("compress", "demo", *FEW, "--span", "9:11", "-o", tmp_path / "small")
    done = blockfit_command(*command, "-v", "--json")
    assert done.json["removed_blocks"] == 2
    lines = [line for line in done.err.splitlines() if re.match(r"\d\d:\d\d:\d\d blockfit", line)]
    assert any("loading demo" in line for line in lines)
    assert any("solving 9:11 affine" in line for line in lines)
    logger = logging.getLogger("blockfit")
    assert (logger.handlers, logger.level, logger.propagate) == ([], logging.NOTSET, True)
    quiet = blockfit_command("doctor")
    assert quiet.err == ""


@pytest.mark.parametrize(
    ("told", "command", "spins"),
    [
        ({}, "compress", "1000"),
        ({}, "bench", None),
        ({"GOMP_SPINCOUNT": "300000"}, "compress", "300000"),
        ({"OMP_WAIT_POLICY": "active"}, "compress", None),
    ],
)
def test_threads_do_not_spin_for_long_unless_the_user_says_so(
    told: dict[str, str], command: str, spins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {name: value for name, value in os.environ.items() if name not in WAITING_TOLD}
    monkeypatch.setattr(os, "environ", {**own, **told})
    assert blockfit_command(command, "--help").code == 0
    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_a_pipe_without_a_character_shows_its_number() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blockfit", "doctor"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u2013" in done.stdout


@pytest.fixture
def latin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder in the working folder, named in Latin-1: its last byte is no UTF-8."""
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(OSError):
        os.mkdir(b"caf\xe9")
        return os.fsdecode(b"caf\xe9")
    pytest.skip("this file system takes only names in UTF-8")


def test_names_in_another_encoding_are_read(latin: str) -> None:
    for index in range(20):
        Image.new("L", (8, 8), 12 * index).save(Path(latin, f"{index}.png"))
    done = blockfit_command(
        "compress", "demo", "--images", latin, "--params", "80%", "--final", "4", "-o", "small"
    )
    assert done.code == 0, done.err
    text = Path("small/blockfit.json").read_text("utf-8")
    assert "caf\\udce9" in text
    assert repr(latin)[1:-1] in repr(json.loads(text))  # as it was told
    assert blockfit_command("report", "small", "-o", "small.html").code == 0


def test_names_in_another_encoding_are_not_written_before_any_work(latin: str) -> None:
    for target in (f"{latin}/small", f"{latin}2"):
        command = ("compress", "absent/model", "--images", "digits", "--remove", "1", "-o", target)
        assert "is not UTF-8" in blockfit_command(*command).error
    os.chdir(latin)
    command = ("analyze", "absent/model", "--images", "digits", "-o", "here")
    assert "is not UTF-8" in blockfit_command(*command).error
    assert os.listdir() == []


def test_the_shell_completes_commands_and_options() -> None:
    def completed(words: str, place: int) -> str:
        told = {
            "_BLOCKFIT_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(place),
        }
        done = subprocess.run(
            [sys.executable, "-m", "blockfit"], env={**os.environ, **told},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        return done.stdout

    assert set(completed("blockfit re", 1).split()) == {"report", "reproduce"}
    assert set(completed("blockfit compress --rep", 2).split()) >= {"--repair", "--report"}
