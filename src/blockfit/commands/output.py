"""What people see: progress on standard error, results on standard output."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task
from rich.progress import Progress as Bars
from rich.text import Text

from blockfit import processes as ranks
from blockfit.commands.outlook import Outlook, Step
from blockfit.commands.wording import as_options
from blockfit.errors import BlockfitError, BlockfitWarning
from blockfit.summary import Part, Table

if TYPE_CHECKING:
    from blockfit.data.images import Images

WIDTH = 110
"""Columns of tables where standard output is no terminal."""

BAD_INPUT, UNEXPECTED, INTERRUPTED = 2, 1, 130
"""Exit codes."""

LONGEST = 36
"""Characters of a line that stand beside a bar."""

WORTH_TELLING_S = 20.0
"""A run that takes less needs no word about it."""

STEP_S = 1.0
"""Least time between two lines on what is being done, where there is no terminal."""

TURN_S = 4.0
"""How long other processes than the first wait before they say what went wrong."""

INTERRUPTED_TEXT = "interrupted; nothing unfinished was saved"

SHOWN = 3
"""Names of skipped images that a line shows."""

LOG = logging.getLogger("blockfit")

PRESSED = threading.Event()
"""Ctrl-C was pressed and may not have been heeded yet."""


class Stopped(Exception):
    """Ctrl-C in a command that keeps what it had finished; the text says what, and how to go on."""


class Output:
    """Where a command's words go.

    Standard output gets the result: tables, or one JSON object and nothing else with ``--json``.
    Progress, notes and warnings go to standard error: one bar on a terminal, for the whole run
    where a command says its steps (``expect``); a line per step where there is none (at most one
    every ``STEP_S``, and none beside ``--json``). After the first pass both say what is left.

    Of several processes only the first one says anything but errors.

    Args:
        as_json: ``--json`` was given; tables are left out.
        quiet: ``--quiet`` was given; errors alone are shown.
        verbose: ``--verbose`` was given; tables that most runs do without are shown too.
        names: the command's options by their parameters' names, for the library's warnings.
    """

    def __init__(
        self,
        as_json: bool,
        quiet: bool,
        verbose: bool = False,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self._names = names or {}
        first = ranks.is_first()
        self.verbose = verbose
        self._images: list[Images] = []
        self.as_json, self.quiet = as_json and first, quiet or not first
        self._console, self._page = (
            Console(
                file=file, markup=False, emoji=False, highlight=False,
                width=None if file.isatty() else WIDTH,
            )
            for file in (sys.stderr, sys.stdout)
        )  # fmt: skip
        self._started = time.monotonic()
        self._next_line = self._started
        logged = LOG.isEnabledFor(logging.INFO)  # log lines and a bar would run into one another
        self._shown = self._console.is_terminal and not self.quiet and not logged
        self._in_lines = not (self._console.is_terminal or self.quiet or as_json or logged)
        self._bars = Bars(
            SpinnerColumn(), _Column(_what), BarColumn(bar_width=16),
            _Column(lambda _: _count(self._bars.tasks[1])), _Column(lambda _: self._clock()),
            console=self._console, transient=True, disable=not self._shown,
        )  # fmt: skip
        self._outlook: Outlook | None = None
        self._foretold = False
        self._task = self._bars.add_task("starting", total=None)
        self._step = self._bars.add_task("", total=None, visible=False)

    def expect(self, steps: Sequence[Step]) -> None:
        """Say what the run will do, so that progress is of the whole."""
        self._outlook = Outlook(steps, time.monotonic)

    def _left(self) -> float | None:
        return None if self._outlook is None else self._outlook.left_s

    def _clock(self) -> str:
        """The time since the command began, and what is left of the run."""
        left = self._left()
        more = "" if left is None else f", ~{told_time(left)} left"
        return f"[{clock(self._started)}{more}]"

    @contextlib.contextmanager
    def working(self) -> Iterator[Output]:
        """Progress is shown and other libraries are kept off standard output for the duration."""
        with (
            contextlib.redirect_stdout(sys.stderr),
            warnings.catch_warnings(),
            self._bars if self._shown else contextlib.nullcontext(),  # rich < 14.3 ends a line
        ):
            warnings.simplefilter("default" if LOG.isEnabledFor(logging.INFO) else "ignore")
            warnings.simplefilter("ignore", BlockfitWarning)  # commands print their own
            yield self

    def say(self, line: str) -> None:
        """What is being done now; Ctrl-C is heeded here at the latest."""
        heed()
        LOG.info(line)
        self._bars.reset(self._step, total=None)
        outlook, shown = self._outlook, line
        if outlook is None:
            self._bars.reset(self._task, total=None, description=line)
        else:
            outlook.say(line)
            if outlook.number and outlook.steps > 1:
                shown = f"{outlook.number}/{outlook.steps} {line}"
            total = 1.0 if outlook.number else None
            self._bars.update(self._task, total=total, completed=outlook.part, description=shown)
        if self._in_lines and time.monotonic() >= self._next_line:
            self._console.print(f"[{clock(self._started)}] {line}", soft_wrap=True)
            self._next_line = time.monotonic() + STEP_S
        self._foretell()

    def _foretell(self) -> None:
        """How long the run takes, once, when its first pass is done."""
        left = self._left()
        if left is None or self._foretold:
            return
        self._foretold = True
        if left >= WORTH_TELLING_S and (self._in_lines or self._shown):
            self._console.print(f"about {told_time(left)} left, going by the first pass")

    def count(self, done: int, total: int) -> None:
        """How many images of all are done; a smaller number than before starts again."""
        task = self._bars.tasks[1]
        if done < task.completed or task.total != total:
            self._bars.reset(self._step, total=total, visible=False)
        self._bars.update(self._step, completed=done)
        if self._outlook is None:
            self._bars.update(self._task, total=total, completed=done)
        else:
            self._outlook.count(done, total)
            self._bars.update(self._task, completed=self._outlook.part)

    def note(self, text: str) -> None:
        """What a run works with, told before there is a result."""
        if not (self.as_json or self.quiet):
            self._console.print(text, soft_wrap=True)

    def line(self, text: str) -> None:
        """A line of the result."""
        if not (self.as_json or self.quiet):
            self._page.print(text, soft_wrap=True)

    def warn(self, lines: Iterable[str]) -> None:
        """Warnings, also beside ``--json``."""
        if not self.quiet:
            for text in lines:
                told = as_options(text, self._names)
                self._console.print(f"warning: {told}", style="yellow", soft_wrap=True)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
        """A table whose first column is text and whose other columns are numbers."""
        if self.as_json or self.quiet:
            return
        if title:
            self._page.print(title, style="bold", soft_wrap=True)
        self._page.print(Table.of(header, rows).rich())

    def show(self, parts: Iterable[Part]) -> None:
        """Lines and tables of the result, in their order."""
        for part in parts:
            if isinstance(part, str):
                self.line(part)
            else:
                self.table(part.header, part.rows, part.title)

    def show_images(self, images: Images, device: str | None = None, usual: bool = False) -> None:
        """Which images are used, how they are prepared and their labels matched; and where.

        ``usual`` says that nobody asked for that number of images. What is skipped is told with the
        result, when all of them have been read.
        """
        told = images.description()
        drawn = "" if told["used"] == told["total"] else f", drawn with seed {told['seed']}"
        drawn += "; --limit all for all" if usual else ""
        kind = getattr(images.records, "kind", "images")
        self.note(f"{kind}: {told['used']:,} of {told['total']:,} from {told['source']}{drawn}")
        if (beside := told.get("texts")) is not None:
            self.note(f"texts: {beside['total']:,} from {beside['source']}")
        if kind == "images":
            self.note(f"preprocessing: {told['preprocessing']}")
        if told["labels"] is not None:
            self.note(told["labels"]["line"])
        elif told["labels_unused"]:
            self.note(told["labels_unused"])
        if device is not None:
            self.note(f"device: {device}")
        self._images.append(images)

    def result(self, value: Mapping[str, Any]) -> None:
        """What was skipped, and the one JSON object on standard output where it was asked for.

        Under ``data`` it says for each set of images what was used, skipped and left out, and how
        labels were matched; under ``seconds`` what the command took, where ``value`` says nothing.
        """
        told = [images.description() for images in self._images]
        self.warn(line for one in told if (line := skipped_line(one)) is not None)
        if self.as_json:
            data = {"data": told} if told else {}
            taken = {"seconds": round(time.monotonic() - self._started, 3)}
            typer.echo(json.dumps({**taken, **value, **data}, allow_nan=False))


def skipped_line(told: Mapping[str, Any]) -> str | None:
    """One line on the pictures of ``Images.description`` that are left out; ``None`` for none."""
    reasons: dict[str, list[str]] = {}
    for name, why in told["left_out"].items():
        reasons.setdefault(why, []).append(name)
    if told["skipped"]:
        reasons["cannot be read"] = list(told["skipped"])
    if not reasons:
        return None
    count = sum(map(len, reasons.values()))
    parts = [
        f"{', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''} ({why})"
        for why, names in reasons.items()
    ]
    return f"{count} image{'s' if count > 1 else ''} left out: {'; '.join(parts)}"


def clock(started: float) -> str:
    """Minutes and seconds since ``started``, of ``time.monotonic``."""
    return told_time(time.monotonic() - started)


def told_time(seconds: float) -> str:
    """Minutes and seconds; hours where there are some."""
    minutes, rest = divmod(int(seconds), 60)
    hours, least = divmod(minutes, 60)
    return f"{hours}:{least:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class _Column(ProgressColumn):
    """A text that a function makes of the task."""

    def __init__(self, text: Callable[[Task], str]) -> None:
        super().__init__()
        self.text = text

    def render(self, task: Task) -> Text:
        return Text(self.text(task))


def _what(task: Task) -> str:
    """What is done now, as far as there is room."""
    whole = task.description
    return whole if len(whole) <= LONGEST else f"{whole[: LONGEST - 1]}…"


def _count(task: Task) -> str:
    """Done, all and rate of a step, where there is a count."""
    if task.total is None:
        return ""
    rate = f", {task.speed:.0f}/s" if task.speed else ""
    return f"{task.completed:.0f}/{task.total:.0f}{rate}"


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Remember Ctrl-C until the ``with`` ends: an exception inside a finalizer would be dropped.

    Changes nothing outside the main thread and where somebody else handles the signal.
    """

    def pressed(*_: Any) -> None:
        PRESSED.set()
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, pressed)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        PRESSED.clear()


def heed() -> None:
    """Raise ``KeyboardInterrupt`` where Ctrl-C was pressed and the command still runs."""
    if PRESSED.is_set():
        PRESSED.clear()
        raise KeyboardInterrupt


@contextlib.contextmanager
def keeping(told: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C inside the ``with`` ends the command with what ``told`` returns."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(f"interrupted; {told()}") from None


def start_logging() -> None:
    """Log what the package does, and the warnings of other libraries, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s", "%H:%M:%S"))
    for name, level in (("blockfit", logging.DEBUG), ("py.warnings", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level)
    logging.captureWarnings(True)


def stop_logging() -> None:
    """Undo ``start_logging``."""
    for name in ("blockfit", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.NOTSET)
    logging.captureWarnings(False)


def guarded(command: Callable[[], int | None], debug: bool) -> int:
    """Run a typer command; whatever goes wrong becomes one line on standard error.

    Returns:
        The exit code: 0; ``BAD_INPUT`` where the message says what to do; ``UNEXPECTED`` for
        faults that nobody thought of; ``INTERRUPTED`` for Ctrl-C.
    """
    try:
        with listening():
            code = int(command() or 0)
        text = INTERRUPTED_TEXT if code == INTERRUPTED else None
    except Stopped as stop:
        code, text = INTERRUPTED, str(stop)
    except (KeyboardInterrupt, typer.Abort):
        code, text = INTERRUPTED, INTERRUPTED_TEXT
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, text = _fault(error)
    if text is not None:
        typer.echo(f"blockfit: {_turn()}{text}", err=True)
    return code


def _turn() -> str:
    """What stands before a process's error; all but the first wait, for most errors are of all.

    A launcher ends the other processes when one has failed, so that such an error is told once.
    """
    try:
        rank, count = ranks.launched()
    except BlockfitError:
        return ""
    if rank == 0:
        return ""
    time.sleep(TURN_S)
    return f"process {rank} of 0–{count - 1}: "


def _plainly(error: Any) -> str:
    """What typer says of an option, in the words of the other errors."""
    text = str(error.format_message()).rstrip(".")
    option = re.match(r"Invalid value for '([^']+)'(?: / '[^']+')?: (.*)", text, re.DOTALL)
    if option is not None:
        numbers = {"integer": "a whole number", "number": "a number"}
        for kind, wanted in numbers.items():
            if re.match(rf"(Input should be a valid|.* is not a valid) {kind}", option[2]):
                return f"{option[1]} takes {wanted}"
        return f"{option[1]}: {option[2]}"
    missing = re.match(r"Missing (option|argument) '([^']+)'(?: / '([^']+)')?", text)
    if missing is not None:
        return f"{missing[2]}{f' ({missing[3]})' if missing[3] else ''} is missing"
    extra = re.match(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", text)
    if extra is not None:
        words = extra[1].split()
        told = " ".join(words[:SHOWN]) + (" …" if len(words) > SHOWN else "")
        return f"{told} is too much here; put quotes round what belongs together, such as '*.png'"
    found = re.match(r"No such (option|command):? '?([\w-]+)'?\.?\s*(.*)", text, re.DOTALL)
    if found is None:
        return text
    alike = re.findall(r"[\w-]+", found[3].partition(":")[2] or found[3].partition("mean")[2])
    near = [f"did you mean {' or '.join(alike)}?"] if alike else []
    return "; ".join([f"there is no {found[1]} {found[2]}", *near])


def _fault(error: Exception) -> tuple[int, str]:
    if isinstance(error, BlockfitError):
        return BAD_INPUT, f"error: {error}"
    if hasattr(error, "format_message"):  # typer's own: an unknown option, a missing argument
        context = getattr(error, "ctx", None)
        path = "blockfit" if context is None else context.command_path
        return BAD_INPUT, f"error: {_plainly(error)} ({path} --help shows what there is)"
    first = (str(error).splitlines() or ["no message"])[0]
    text = f"error: unexpected {type(error).__name__}: {first}; add --debug to see where"
    return UNEXPECTED, text
