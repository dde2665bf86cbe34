"""What people see: progress while a command runs, tables when it is done, all on standard error."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

WIDTH = 110
"""Columns of tables where standard error is no terminal."""


class Output:
    """Where a command's words go.

    Standard output gets one JSON object with ``--json`` and nothing otherwise; everything else
    goes to standard error. Progress shows on a terminal only.

    Args:
        as_json: ``--json`` was given; tables are left out.
        quiet: ``--quiet`` was given; errors alone are shown.
    """

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet
        self._console = Console(
            stderr=True, markup=False, emoji=False, highlight=False,
            width=None if sys.stderr.isatty() else WIDTH,
        )  # fmt: skip
        shown = self._console.is_terminal and not quiet
        self._bars = Bars(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), _Count(),
            console=self._console, transient=True, disable=not shown,
        )  # fmt: skip
        self._task = self._bars.add_task("starting", total=None)

    @contextlib.contextmanager
    def working(self) -> Iterator[Output]:
        """Progress is shown and other libraries are kept off standard output for the duration."""
        with (
            contextlib.redirect_stdout(sys.stderr),
            warnings.catch_warnings(),
            self._bars,
        ):
            warnings.simplefilter("ignore")
            yield self

    def say(self, line: str) -> None:
        """What is being done now."""
        self._bars.reset(self._task, total=None, description=line)

    def count(self, done: int, total: int) -> None:
        """How many images of all are done; a smaller number than before starts anew."""
        task = self._bars.tasks[0]
        if done < task.completed or task.total != total:
            self._bars.reset(self._task, total=total)
        self._bars.update(self._task, completed=done)

    def line(self, text: str = "") -> None:
        """A line for people."""
        if not (self.as_json or self.quiet):
            self._console.print(text, soft_wrap=True)

    def warn(self, lines: Iterable[str]) -> None:
        """Warnings, also beside ``--json``."""
        if not self.quiet:
            for text in lines:
                self._console.print(f"warning: {text}", style="yellow", soft_wrap=True)

    def table(self, header: Sequence[str], rows: Iterable[Sequence[str]], title: str = "") -> None:
        """A table whose first column is text and whose other columns are numbers."""
        if self.as_json or self.quiet:
            return
        table = Table(title=title or None, title_justify="left", title_style="bold")
        for column, name in enumerate(header):
            table.add_column(name, justify="left" if column == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self._console.print(table)

    def result(self, value: Mapping[str, Any]) -> None:
        """The one JSON object on standard output, where it was asked for."""
        if self.as_json:
            typer.echo(json.dumps(value, allow_nan=False))


class _Count(ProgressColumn):
    """Done, all, rate and time left, where there is a count; the time so far otherwise."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text(f"{task.elapsed or 0:.0f} s")
        text = f"{task.completed:.0f}/{task.total:.0f}"
        if task.speed:
            text += f", {task.speed:.0f}/s"
        if task.time_remaining is not None:
            text += f", {task.time_remaining:.0f} s left"
        return Text(text)


def amount(value: float | None, unit: str = "") -> str:
    """``22.1 M``, ``44.2 MB``; a dash where there is none."""
    if value is None:
        return "–"
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.2f} {prefix}{unit}"
    return f"{value:.0f} {unit}".rstrip()


def percent(value: float | None) -> str:
    """A fraction as percent; a dash where there is none."""
    return "–" if value is None else f"{value:.2%}"


def number(value: float | None, digits: int = 4) -> str:
    """A number; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def share(part: float | None, whole: float | None) -> str:
    """``part`` of ``whole`` in percent; a dash where either is missing."""
    return "–" if part is None or not whole else f"{part / whole:.1%}"


def size_rows(report: Mapping[str, Any], depth: int) -> list[tuple[str, ...]]:
    """Blocks, parameters and FLOPs before and after, from a report."""
    kept = depth - report["removed_blocks"]
    rows = [("blocks", str(depth), str(kept), share(kept, depth))]
    for name, key, unit in (("parameters", "parameters", ""), ("FLOPs per image", "flops", "")):
        before, after = report[f"{key}_before"], report[f"{key}_after"]
        rows.append((name, amount(before, unit), amount(after, unit), share(after, before)))
    return rows


MAP_HEADER = ("span", "map", "error", "identity's", "prefix", "identity's", "patch", "identity's")


def map_rows(maps: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Held-out error of every map beside identity's, in all and per token type."""
    keys = ("error", "identity_error", "prefix", "identity_prefix", "patch", "identity_patch")
    return [(m["span"], m["map"], *(number(m[key]) for key in keys)) for m in maps]


def fidelity_line(held_out: Mapping[str, Any]) -> str:
    """Held-out fidelity in one line."""
    parts = []
    if held_out["kl"] is not None:
        parts = [f"KL {held_out['kl']:.4f}", f"agreement {held_out['agreement']:.2%}"]
    parts += [
        f"feature cosine {held_out['feature_cosine']:.4f}",
        f"relative error {held_out['feature_relative_error']:.4f}",
    ]
    return f"on {held_out['images']} held-out images: {', '.join(parts)}"


def evaluation_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What ``Evaluation.to_json`` holds, one row per figure."""
    before, after = result["original"] or {}, result["compressed"]

    def both(show: Any, *keys: str) -> tuple[str, str]:
        return show(_inner(before, keys)), show(_inner(after, keys))

    def part(*keys: str) -> str:
        return share(_inner(after, keys), _inner(before, keys))

    def points() -> str:
        if before.get("top1") is None or after["top1"] is None:
            return "–"
        return f"{100 * (after['top1'] - before['top1']):+.2f} points"

    rows = [
        ("top-1", *both(percent, "top1"), points()),
        ("parameters", *both(amount, "parameters"), part("parameters")),
        ("FLOPs per image", *both(amount, "flops"), part("flops")),
        ("file", *both(_bytes, "size_bytes"), part("size_bytes")),
        ("images per second", *both(_rate, "images_per_second"), part("images_per_second")),
        ("latency, ms", *both(_timing, "latency_ms"), part("latency_ms", "median")),
        ("peak memory", *both(_bytes, "peak_memory_bytes"), part("peak_memory_bytes")),
    ]
    if (fidelity := result["fidelity"]) is not None:
        rows += [
            ("KL from the original", "", number(fidelity["kl"]), ""),
            ("top-1 agreement", "", percent(fidelity["agreement"]), ""),
            ("feature cosine", "", number(fidelity["feature_cosine"]), ""),
            ("feature relative error", "", number(fidelity["feature_relative_error"]), ""),
        ]
    return rows


def frontier_rows(
    points: Iterable[Mapping[str, Any]], original: Mapping[str, Any]
) -> list[tuple[str, ...]]:
    """The points of a sweep: size, what remains, held-out fidelity, plan."""
    return [
        (
            str(point["removed"]),
            share(point["parameters"], original["parameters"]),
            share(point["flops"], original["flops"]),
            number(point["held_out"]["kl"]),
            percent(point["held_out"]["agreement"]),
            number(point["held_out"]["feature_relative_error"]),
            ", ".join(f"{e['start']}:{e['stop']} {e['map']}" for e in point["plan"]),
        )
        for point in points
    ]


def _inner(values: Mapping[str, Any], keys: Sequence[str]) -> Any:
    found: Any = values
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _bytes(value: float | None) -> str:
    return amount(value, "B")


def _rate(value: float | None) -> str:
    return number(value, 1)


def _timing(value: Mapping[str, float] | None) -> str:
    return "–" if value is None else f"{value['median']:.2f} ± {value['spread'] / 2:.2f}"
