"""A comparison of speeds to look at: a table, a Markdown page and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import nan
from pathlib import Path
from typing import Any

from blockfit.errors import need
from blockfit.evaluation.speed import ORIGINAL, Bench, Row
from blockfit.files import FileForm
from blockfit.models.cost import Timing
from blockfit.units import number, share

COLUMNS = (
    "model",
    "batch",
    "engine",
    "dtype",
    "ms",
    "images/s",
    "promised",
    "measured",
    "part",
)
"""Of the table of times; a cell with a → holds the original's figure and the compressed one's."""

COST_COLUMNS = ("model", "parameters", "FLOPs per image", "weights file")

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def cells(row: Row) -> tuple[str, ...]:
    """One row of the table of times, as texts."""
    low, high = row.quartiles
    return (
        row.name,
        str(row.setting.batch_size),
        row.setting.engine,
        _SHORT[row.setting.dtype],
        f"{_time(row.before)} → {_time(row.after)}",
        f"{row.before.images_per_second:.0f} → {row.after.images_per_second:.0f}",
        number(row.promised, 2),
        f"{row.measured:.2f} ({low:.2f}–{high:.2f})",
        _part(row),
    )


def cost_columns(result: Bench) -> tuple[str, ...]:
    """The head of the table of costs: the last columns are peak memory in each setting."""
    return (*COST_COLUMNS, *(f"peak, {setting}" for setting in _peaks(result)))


def cost_cells(result: Bench) -> list[tuple[str, ...]]:
    """The table of costs, a row per model, as texts."""
    peaks = _peaks(result)
    return [
        (
            name,
            _in(cost["parameters"], 1e6, ".2f", "M"),
            _in(cost["flops"], 1e9, ".3f", "G"),
            _megabytes(cost["size_bytes"]),
            *(_megabytes(by_name[name]) for by_name in peaks.values()),
        )
        for name, cost in result.models.items()
    ]


def _peaks(result: Bench) -> dict[str, dict[str, int | None]]:
    """Peak bytes by setting and name of the model."""
    found: dict[str, dict[str, int | None]] = {}
    for row in result.rows:
        by_name = found.setdefault(str(row.setting), {})
        by_name[ORIGINAL], by_name[row.name] = row.memory
    return {setting: values for setting, values in found.items() if any(values.values())}


def how_measured(result: Bench) -> str:
    """What the figures are, in one sentence."""
    machine = result.machine
    return (
        f"{machine['device']}, {machine['threads']} of {machine['cores']} cores used by torch, "
        f"{result.rounds} passes of each model in turn; ms: median ± half the interquartile "
        "range; measured: median of the rounds' ratios (quartiles); part: measured of promised"
    )


def remark_lines(result: Bench) -> Iterator[str]:
    """What is to be said of single rows, each with the row named in front."""
    for row in result.rows:
        for remark in row.remarks:
            yield f"{row.name}, {row.setting}: {remark}"


SIGN = "<!-- written by blockfit bench -->"
FORMS = {
    ".md": FileForm(".md", SIGN),
    ".png": FileForm(".png", "Software\0blockfit"),
}
"""The page and the picture, by what they are known again."""


def markdown(result: Bench) -> str:
    """The comparison as a page of Markdown."""
    parts = [
        SIGN,
        f"{how_measured(result)}.",
        _table(COLUMNS, [cells(row) for row in result.rows]),
        _table(cost_columns(result), cost_cells(result)),
    ]
    if remarks := [f"- {line}" for line in (*remark_lines(result), *result.skipped)]:
        parts.append("\n".join(remarks))
    return "\n\n".join(parts) + "\n"


def draw(result: Bench, path: str | Path) -> None:
    """A picture: a bar per row with its quartiles, and a mark where the FLOPs' promise is.

    Raises:
        BlockfitError: where matplotlib is not installed.
    """
    rows = result.rows
    make = need("matplotlib.figure", "plots", "the picture").Figure
    figure = make(figsize=(9, 1.6 + 0.32 * len(rows)), layout="constrained")
    axis = figure.subplots()
    places = range(len(rows))
    measured = [row.measured for row in rows]
    low = [max(row.measured - row.quartiles[0], 0) for row in rows]
    high = [max(row.quartiles[1] - row.measured, 0) for row in rows]
    axis.barh(places, measured, xerr=(low, high), color="#7fa7c9", capsize=2, label="measured")
    promised = [nan if row.promised is None else row.promised for row in rows]
    axis.plot(promised, places, "|", color="black", markersize=13, mew=2, label="promised by FLOPs")
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.set_yticks(places, [_label(row) for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18 * max(map(_end, rows)))
    for place, row in zip(places, rows, strict=True):
        axis.text(_end(row), place, f"  {_part(row)}", va="center", fontsize=8)
    axis.set_xlabel("times as fast as the original (at the right: part of the promise)")
    axis.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    axis.set_title(_title(result.machine), fontsize=9, loc="left")
    figure.savefig(path, dpi=110, format="png", metadata={"Software": "blockfit"})


def _end(row: Row) -> float:
    """How far its bar and its mark reach."""
    return max(row.quartiles[1], row.promised or 0.0)


def _part(row: Row) -> str:
    return share(row.measured, row.promised, 0)


def _in(value: int | None, unit: float, form: str, letter: str) -> str:
    return "–" if value is None else f"{value / unit:{form}} {letter}"


def _label(row: Row) -> str:
    return f"{row.name}, {row.setting}"


def _title(machine: dict[str, Any]) -> str:
    return f"{machine['device']}, {machine['threads']} threads"


def _time(timing: Timing) -> str:
    return f"{timing.median_ms:.1f} ± {timing.spread_ms / 2:.1f}"


def _megabytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e6:.1f} MB"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
