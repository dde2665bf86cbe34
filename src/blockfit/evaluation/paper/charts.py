"""Pictures of the experiments' rows, with matplotlib (the extra ``plots``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from blockfit.errors import need
from blockfit.fit.similarity import Tables

Rows = Sequence[dict[str, Any]]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's, which colour-blind people can tell apart."""

MARKS = "osD^vPX"

LEAST_RANGE = 0.04
"""Of an axis of accuracies: noise of a few images must not look like a cliff."""


def draw(name: str, rows: Rows, path: Path, title: str) -> None:
    """Draw the picture of an experiment.

    Raises:
        BlockfitError: where matplotlib is not installed.
    """
    if name == "similarity":
        _similarity(rows).draw(path, title)
        return
    parts = _per_span(rows) if name == "positions" else [rows]
    panels = [(panel, part) for panel in _PANELS[name] for part in parts]
    width = 6.4 if len(panels) < 3 else 4.6
    make = need("matplotlib.figure", "plots", "the picture").Figure
    figure = make(figsize=(width * len(panels), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (panel, part) in zip(axes, panels, strict=True):
        panel(axis, part)
        if len(parts) > 1 and axis is not axes[-1]:
            axis.get_legend().remove()
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130, format="png")


def _similarity(rows: Rows) -> Tables:
    boundaries = sorted({row["start"] for row in rows} | {row["stop"] for row in rows})
    place = {boundary: i for i, boundary in enumerate(boundaries)}
    values: dict[str, dict[str, list[list[float | None]]]] = {}
    for row in rows:
        table = values.setdefault(row["metric"], {}).setdefault(
            row["token_type"], [[None] * len(boundaries) for _ in boundaries]
        )
        table[place[row["start"]]][place[row["stop"]]] = row["value"]
    return Tables(tuple(boundaries), {}, values)


def _spans(axis: Any, rows: Rows) -> None:
    _original(axis, rows)
    for number, (said, here) in enumerate(_by_removed(rows)):
        starts = [int(row["spans"].split(":")[0]) for row in here]
        _line(axis, starts, [row["top1"] for row in here], number, said)
    _percent(axis)
    axis.set_xlabel("first block of the span")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend(fontsize=8)


def _by_distance(axis: Any, rows: Rows) -> None:
    _original(axis, rows)
    for number, (said, here) in enumerate(_by_removed(rows)):
        axis.scatter(
            [row["mse"] for row in here], [row["top1"] for row in here], label=said,
            color=COLOURS[number % 7], marker=MARKS[number % 7], s=28,
        )  # fmt: skip
    if all(row["mse"] > 0 for row in rows if row["removed"]):
        axis.set_xscale("log")
    _percent(axis)
    axis.set_xlabel("MSE between the span's input and output")
    axis.legend(fontsize=8)


def _by_removed(rows: Rows) -> Iterator[tuple[str, Rows]]:
    """Rows by the number of blocks that go, in words."""
    for removed in _values(rows, "removed"):
        said = "1 block" if removed == 1 else f"{removed} blocks"
        yield said, [row for row in rows if row["removed"] == removed]


def _several(axis: Any, rows: Rows) -> None:
    _original(axis, rows)
    kinds: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["removed"]:
            many = "," in row["spans"]
            kind = f"separate spans, fitted {row['fitted']}" if many else "one span"
            kinds.setdefault(kind, []).append((row["removed"], row["top1"]))
    for number, (kind, points) in enumerate(kinds.items()):
        best: dict[int, float] = {}
        for removed, top1 in points:
            best[removed] = max(top1, best.get(removed, 0.0))
        said = kind if len(best) == len(points) else f"{kind}, best of several"
        _line(axis, list(best), list(best.values()), number, said)
    _percent(axis)
    axis.set_xlabel("blocks replaced")
    axis.set_xticks(_values(rows, "removed"))
    axis.legend(fontsize=8)


def _translators(axis: Any, rows: Rows) -> None:
    trained = {row["map"] for row in rows if row["removed"] and row["trained"]}
    kinds = {k: f"{k} (trained)" if k in trained else k for k in _values(rows, "map")}
    _bars(axis, rows, "map", kinds, trained)


def _samples(axis: Any, rows: Rows) -> None:
    _original(axis, rows)
    _by_images(axis, rows, "spans", lambda span: f"span {span}")


def _positions(axis: Any, rows: Rows) -> None:
    """One span; every panel has its own."""
    _original(axis, rows)
    _by_images(axis, rows, "per", lambda way: way if way == "all tokens" else f"one per {way}")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    span = _values(rows, "spans")[0]
    axis.set_title(f"blocks {span}", fontsize=10)


def _per_span(rows: Rows) -> list[Rows]:
    """The rows of each span, with the original's."""
    return [
        [row for row in rows if not row["removed"] or row["spans"] == span]
        for span in _values(rows, "spans")
    ]


def _transfer(axis: Any, rows: Rows) -> None:
    sources = {source: f"fitted on {source}" for source in _values(rows, "source")}
    if "none" in sources:
        sources["none"] = "none (identity)"
    _bars(axis, rows, "source", sources)


def _bars(
    axis: Any, rows: Rows, column: str, labels: dict[str, str], hatched: Collection[str] = ()
) -> None:
    """A group of bars per span, one for each value of ``column``, by its label."""
    spans, width = _values(rows, "spans"), 0.8 / len(labels)
    found = {(row["spans"], row[column]): row["top1"] for row in rows}
    for number, (value, label) in enumerate(labels.items()):
        axis.bar(
            [i + (number - (len(labels) - 1) / 2) * width for i in range(len(spans))],
            [found[span, value] for span in spans], width, label=label, color=COLOURS[number % 7],
            hatch="//" if value in hatched else None, edgecolor="white", linewidth=0.5,
        )  # fmt: skip
    _original(axis, rows)
    _percent(axis)
    axis.set_ylim(0, 1.02)
    axis.set_xticks(range(len(spans)), [f"blocks {span}" for span in spans])
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _seeds(axis: Any, rows: Rows) -> None:
    _original(axis, rows)
    here = [row for row in rows if row["removed"]]
    axis.errorbar(
        [row["removed"] for row in here], [row["top1"] for row in here],
        yerr=[row["top1_sd"] or 0.0 for row in here], color=COLOURS[0], marker="o", capsize=4,
        label="linear map, mean ± standard deviation",
    )  # fmt: skip
    for row in here:
        axis.annotate(
            row["spans"], (row["removed"], row["top1"]), textcoords="offset points",
            xytext=(7, 5), fontsize=8,
        )  # fmt: skip
    _percent(axis)
    axis.margins(x=0.12)
    axis.set_xlabel("blocks replaced")
    axis.set_xticks([row["removed"] for row in here])
    axis.legend(fontsize=8)


_PANELS: dict[str, tuple[Callable[[Any, Rows], None], ...]] = {
    "spans": (_spans, _by_distance),
    "several": (_several,),
    "translators": (_translators,),
    "samples": (_samples,),
    "positions": (_positions,),
    "transfer": (_transfer,),
    "seeds": (_seeds,),
}


def _values(rows: Rows, column: str) -> list[Any]:
    """The values of a column without the original's, each once, in their order."""
    return list(dict.fromkeys(row[column] for row in rows if row["removed"]))


def _line(axis: Any, x: Sequence[float], y: Sequence[float], number: int, label: str) -> None:
    """A line; later ones are thinner, so that those that they cover still show."""
    axis.plot(
        x, y, color=COLOURS[number % 7], marker=MARKS[number % 7], label=label,
        markersize=max(4.0, 8.0 - number), linewidth=max(1.0, 3.0 - 0.5 * number),
    )  # fmt: skip


def _original(axis: Any, rows: Rows) -> None:
    whole = next((row["top1"] for row in rows if not row["removed"]), math.nan)
    axis.axhline(whole, color="grey", linestyle="--", linewidth=1, label="original", zorder=1)


def _percent(axis: Any) -> None:
    low, high = axis.get_ylim()
    high = min(high + max(0.0, LEAST_RANGE - (high - low)) / 2, max(high, 1.01))
    axis.set_ylim(min(low, high - LEAST_RANGE), high)
    axis.yaxis.set_major_formatter(lambda value, position: f"{round(100 * value, 2):g}%")
    axis.set_ylabel("top-1 accuracy")


def _by_images(axis: Any, rows: Rows, column: str, label: Callable[[str], str]) -> None:
    """Accuracies by the number of images, a line per value of ``column``."""
    for number, value in enumerate(_values(rows, column)):
        here = [row for row in rows if row[column] == value]
        _line(axis, [r["images"] for r in here], [r["top1"] for r in here], number, label(value))
    numbers = sorted({row["images"] for row in rows if row["removed"]})
    axis.set_xscale("log")
    axis.set_xticks(numbers, [str(number) for number in numbers])
    axis.minorticks_off()
    axis.set_xlabel("calibration images")
    _percent(axis)
    axis.legend(fontsize=8)
