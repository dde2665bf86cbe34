"""The plots of a report, by matplotlib: SVG in the page's colours; PNG and SVG files.

Every figure is drawn at the width of a telephone, so that its words stay readable there. Nothing
that comes from a file is drawn as text but numbers, names of maps and token types.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockfit.drawing import LOSSES, METRIC_WORDS, SIZES, heat_map
from blockfit.errors import need
from blockfit.evaluation.side_by_side import SideBySide
from blockfit.files import FileForm, check_file, new_file
from blockfit.fit.plan import PARTS
from blockfit.fit.similarity import Table
from blockfit.reports.content import BYTES, Candidate, Series
from blockfit.search.held_out import MapError

WIDTH = 4.2
"""Inches; 302 points, of which a telephone's page has 358."""

AXES = {**SIZES, "megabytes": "MB of weights in float32"}
"""What the frontier can be drawn against."""

RATE = 160
"""Dots per inch of PNG files."""


@dataclass(frozen=True)
class Palette:
    """The colours of a plot."""

    ink: str
    soft: str
    line: str
    main: str
    other: str
    paper: str
    runs: tuple[str, ...]


PAPER = Palette(
    "#1c2026", "#59616d", "#d8dce2", "#0b6e75", "#b4530a", "#ffffff",
    ("#0b6e75", "#b4530a", "#6a3fb5", "#2f6b1f", "#a8215b", "#1c5fb0"),
)  # fmt: skip
"""For files."""

PAGE = Palette(
    "#010101", "#020202", "#030303", "#040404", "#050505", "#060606",
    ("#070701", "#070702", "#070703", "#070704", "#070705", "#070706"),
)  # fmt: skip
"""Stand for the page's own colours, which change with its theme."""

_VARIABLES = {
    PAGE.ink: "var(--ink)",
    PAGE.soft: "var(--soft)",
    PAGE.line: "var(--line)",
    PAGE.main: "var(--main)",
    PAGE.other: "var(--other)",
    PAGE.paper: "var(--paper)",
    **{colour: f"var(--run-{number})" for number, colour in enumerate(PAGE.runs)},
}


FORMS = {
    "png": FileForm(".png", "Software\0blockfit"),
    "svg": FileForm(".svg", "<dc:title>blockfit<"),
}
"""The files of plots, by kind, and by what they are known again."""


@dataclass(frozen=True)
class Plot:
    """A figure that can be drawn in any colours.

    Args:
        title: what it shows, in a few words.
        text: what can be read from it, in place of the picture.
        draw: makes matplotlib's figure.
    """

    name: str
    title: str
    text: str
    draw: Callable[[Palette], Any]

    def svg(self, marks: Mapping[str, str] | None = None) -> str:
        """SVG to stand inside a page, coloured by the page.

        Args:
            marks: id of a mark in the figure → attributes that it gets there, as HTML.
        """
        file = io.StringIO()
        _write(self.draw(PAGE), file, "svg", signed=False)
        text = file.getvalue()
        text = text[text.index("<svg") :]
        for colour, variable in _VARIABLES.items():
            text = text.replace(colour, variable)
        text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
        text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px; font-family: inherit", text)
        opening = r'<svg viewBox="\1" aria-hidden="true" focusable="false">'
        text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', opening, text, count=1)
        for mark, attributes in (marks or {}).items():
            text = text.replace(f'<g id="{mark}">', f'<g id="{mark}" {attributes}>')
        text = re.sub(r'<g id="(run-\d+)">', r'<g class="\1">', text)
        text = re.sub(r'\bid="([^"]+)"', rf'id="{self.name}-\1"', text)
        text = re.sub(r'href="#([^"]+)"', rf'href="#{self.name}-\1"', text)
        return re.sub(r"url\(#([^)]+)\)", rf"url(#{self.name}-\1)", text).strip()

    def check(self, folder: Path) -> None:
        """Refuse now what ``write`` would refuse: another file of such a name in ``folder``."""
        for kind, form in FORMS.items():
            check_file(folder / f"{self.name}.{kind}", form, overwrite=True)

    def write(self, folder: Path) -> list[Path]:
        """``NAME.png`` and ``NAME.svg`` in a folder, which is made where there is none."""
        paths = []
        for kind, form in FORMS.items():
            path = folder / f"{self.name}.{kind}"
            with new_file(path, form, overwrite=True) as partial:
                _write(self.draw(PAPER), partial, kind)
            paths.append(path)
        return paths


def _write(figure: Any, target: Any, kind: str, signed: bool = True) -> None:
    import matplotlib

    maker = "blockfit" if signed else None
    metadata = {"Date": None, "Creator": maker, "Format": None, "Type": None}
    how = {"svg.fonttype": "none", "svg.hashsalt": "blockfit", "svg.image_inline": True}
    with matplotlib.rc_context(how):
        more: dict[str, Any] = {"metadata": metadata}
        if kind == "png":
            more = {"dpi": RATE, "metadata": {"Software": maker}}
        figure.savefig(target, format=kind, transparent=kind == "svg", **more)


def _figure(palette: Palette, height: float) -> tuple[Any, Any]:
    """A figure and its axis, bare but for what helps to read it."""
    make = need("matplotlib.figure", "report", "a report").Figure
    figure = make(figsize=(WIDTH, height), layout="constrained", facecolor=palette.paper)
    axis = figure.subplots()
    axis.set_facecolor("none")
    axis.tick_params(colors=palette.soft, labelsize=8, length=3, which="both")
    axis.xaxis.label.set(color=palette.ink, fontsize=8.5)
    axis.yaxis.label.set(color=palette.ink, fontsize=8.5)
    for side, spine in axis.spines.items():
        spine.set_color(palette.line)
        spine.set_visible(side in ("left", "bottom"))
    return figure, axis


MARKERS = "oDs^vPX*"
"""Of runs on the frontier, which are told apart without colours too."""


def frontier(series: Sequence[Series], size: str, loss: str) -> Plot | None:
    """One quality of all plans against what remains; ``None`` where nothing is known.

    The mark of a plan has the id ``plan-`` and its key, all that belongs to a run ``run-`` and its
    number. Filled marks are of the images that chose the plans, hollow ones with bars of images
    that decided nothing.
    """
    found = [
        (number, candidate, x, y)
        for number, run in enumerate(series)
        for candidate in run.candidates
        if (x := candidate.share(size)) is not None and (y := candidate.value(loss)) is not None
    ]
    if not found:
        return None
    part = loss in ("agreement", "top1")
    log = not part and all(y > 0 for *_, y in found)
    whole = {"agreement": 1.0, "top1": found[0][1].top1[0]}.get(loss, 0.0)
    end = _original(found[0][1], size)

    def draw(palette: Palette) -> Any:
        figure, axis = _figure(palette, 3.3)
        if log:
            axis.set_yscale("log")
        axis.grid(color=palette.line, linewidth=0.6, which="major")
        _draw_original(axis, palette, end, whole, log)
        for number, run in enumerate(series):
            own = [(c, x, y) for n, c, x, y in found if n == number]
            _draw_run(axis, palette, number, own, (size, loss), len(run.candidates) > 1)
        axis.set(xlabel=AXES[size], ylabel=LOSSES[loss])
        if size != "megabytes":
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        if part:
            axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
        elif log:
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.yaxis.set_minor_formatter("")
        axis.margins(0.06, 0.1)
        return figure

    (_, first, *at), (_, last, *to) = found[0], found[-1]
    form, unit = (".1f", " MB") if size == "megabytes" else (".0%", "")
    text = (
        f"{LOSSES[loss]} of {len(found)} plans against {AXES[size]}: from {at[1]:.3g} at "
        f"{at[0]:{form}}{unit} ({first.name}) to {to[1]:.3g} at {to[0]:{form}}{unit} ({last.name})."
    )
    text += "" if whole is None else f" The original's is {whole:.3g}."
    return Plot(f"frontier-{loss}-{size}".replace("_", "-"), f"{LOSSES[loss]}", text, draw)


def _original(candidate: Candidate, size: str) -> float | None:
    """Where the original stands on an axis."""
    if size == "megabytes":
        count = candidate.before.get("parameters")
        return None if count is None else BYTES * count / 1e6
    return 1.0


def _draw_original(
    axis: Any, palette: Palette, x: float | None, y: float | None, log: bool
) -> None:
    """A star, or on an axis that has no zero a line; nothing where it is not known."""
    if x is None or y is None:
        return
    where: tuple[float, float] = (x, y)
    across: Any = "data"
    if log:
        axis.axvline(x, color=palette.ink, lw=1, ls=":")
        where, across = (x, 0.92), ("data", "axes fraction")
    else:
        axis.axhline(y, color=palette.ink, lw=0.8, ls=":")
        axis.plot([x], [y], "*", color=palette.ink, ms=11, mec=palette.paper, clip_on=False)
    axis.annotate(
        "original", where, (-6, 5), xycoords=across, textcoords="offset points", ha="right",
        fontsize=7.5, color=palette.ink,
    )  # fmt: skip


def _draw_run(
    axis: Any,
    palette: Palette,
    number: int,
    own: Sequence[tuple[Candidate, float, float]],
    what: tuple[str, str],
    labelled: bool,
) -> None:
    """One run: its plans in a line, and what images that decided nothing say of them."""
    size, loss = what
    colour, marker = palette.runs[number % len(palette.runs)], MARKERS[number % len(MARKERS)]
    in_order = sorted(own, key=lambda one: one[1])
    group = f"run-{number}"
    axis.plot(
        [x for _, x, _ in in_order], [y for *_, y in in_order], color=colour, lw=1.1, gid=group
    )
    for plan, x, y in own:
        if plan.latency and size == "latency":
            axis.plot(plan.latency[1:], [y, y], color=colour, lw=2.2, alpha=0.6, gid=group)
        if (test := plan.tested(loss)) is not None:
            at, low, high = test[0].value, test[0].low, test[0].high
            axis.plot([x, x], [low, high], color=colour, lw=1.1, gid=group)
            axis.plot([x], [at], marker, color=palette.paper, mec=colour, mew=1.3, ms=5, gid=group)
        axis.plot(
            [x], [y], marker, color=colour, ms=7.5, mec=palette.paper, mew=1,
            gid=f"plan-{plan.key}", clip_on=False,
        )  # fmt: skip
    for plan, x, y in own[:: max(1, len(own) // 10)] if labelled else ():
        axis.annotate(
            plan.label, (x, y), (0, 8 if number % 2 == 0 else -13), textcoords="offset points",
            ha="center", fontsize=7.5, color=palette.soft, gid=group,
        )  # fmt: skip


def similarity(boundaries: Sequence[int], metric: str, token_type: str, table: Table) -> Plot:
    """A heat map of one metric between all pairs of hidden states; MSE on a log scale."""
    log = metric == "mse"
    known = [v for row in table for v in row if v is not None and not (log and v <= 0)]

    def draw(palette: Palette) -> Any:
        figure, axis = _figure(palette, 3.5)
        bar = heat_map(axis, boundaries, table, log, most_ticks=14)
        bar.solids.set_rasterized(True)
        bar.outline.set_visible(False)
        bar.ax.tick_params(colors=palette.soft, labelsize=7.5, length=2, which="both")
        axis.set(xlabel="hidden state", ylabel="hidden state")
        axis.set_gid("cells")
        return figure

    words = METRIC_WORDS[metric]
    span = f"from {min(known):.3g} to {max(known):.3g}" if known else "not defined"
    pairs = f"all pairs of {len(boundaries)} hidden states"
    text = f"{words} between {pairs}, {token_type} tokens: {span}."
    return Plot(f"similarity-{metric}-{token_type}", f"{words}, {token_type} tokens", text, draw)


def map_errors(candidate: Candidate, name: str) -> Plot | None:
    """The held-out error of every map beside identity's, per token type."""
    rows = [row for entry in candidate.maps for row in _map_rows(entry)]
    if not rows:
        return None

    def draw(palette: Palette) -> Any:
        from matplotlib.lines import Line2D

        figure, axis = _figure(palette, 0.95 + 0.2 * len(rows))
        for place, (_, error, identity) in enumerate(rows):
            axis.plot([error, identity], [place, place], color=palette.line, lw=2, zorder=1)
            axis.plot([identity], [place], "o", mfc=palette.paper, mec=palette.other, mew=1.4, ms=6)
            axis.plot([error], [place], "o", color=palette.main, ms=6.5)
        axis.set_yticks(range(len(rows)), [label for label, _, _ in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xlim(left=-0.02 * max(max(error, other) for _, error, other in rows))
        axis.grid(axis="x", color=palette.line, linewidth=0.6)
        axis.set_xlabel("held-out error, share of the variance")
        handles = [
            Line2D([], [], marker="o", ls="", color=palette.main, ms=6.5, label="map"),
            Line2D(
                [], [], marker="o", ls="", mfc=palette.paper, mec=palette.other, mew=1.4, ms=6,
                label="identity (span dropped)",
            ),
        ]  # fmt: skip
        figure.legend(
            handles=handles, loc="outside upper left", ncols=2, frameon=False, fontsize=8,
            labelcolor=palette.ink, handletextpad=0.2, borderpad=0.1,
        )  # fmt: skip
        return figure

    text = " ".join(f"{label}: {error:.3g}, identity {other:.3g}." for label, error, other in rows)
    return Plot(name, "Error of each map beside identity's", text, draw)


def _map_rows(entry: MapError) -> list[tuple[str, float, float]]:
    pairs = (
        ("prefix", entry.prefix, entry.identity_prefix),
        ("patch", entry.patch, entry.identity_patch),
    )
    known = [
        (f"{entry.span} {kind}", error, identity)
        for kind, error, identity in pairs
        if error is not None and identity is not None
    ]
    return known or [(f"{entry.span} all", entry.error, entry.identity_error)]


def state_errors(side: SideBySide, kind: str) -> Plot:
    """The error of every hidden state of one token type beside that of dropping the spans."""
    error, identity = side.errors[kind], side.identity.get(kind)

    def draw(palette: Palette) -> Any:
        figure, axis = _figure(palette, 2.7)
        if identity is not None:
            axis.plot(identity, "o--", color=palette.other, ms=3.5, lw=1.4, mfc=palette.paper)
        axis.plot(error, "o-", color=palette.main, ms=4, lw=1.8)
        axis.grid(color=palette.line, linewidth=0.6)
        axis.set(xlabel="hidden state", ylabel="error, share of the variance")
        axis.set_ylim(bottom=0)
        axis.set_xticks(range(0, len(error), -(-len(error) // 14)))
        lines = axis.get_lines()
        figure.legend(
            lines[::-1], ["compressed", "identity (spans dropped)"][: len(lines)],
            loc="outside upper left", ncols=2, frameon=False, fontsize=8, labelcolor=palette.ink,
            borderpad=0.1,
        )  # fmt: skip
        return figure

    text = f"Error of the {kind} tokens after the last block: {error[-1]:.3g}"
    text += "." if identity is None else f"; where the spans are dropped: {identity[-1]:.3g}."
    return Plot(f"error-{kind}", f"{kind.capitalize()} tokens, after every block", text, draw)


def chain(candidate: Candidate) -> Plot:
    """The blocks in a row, and what stands where the removed ones stood; for files."""
    in_row, height = 6, 0.62
    rows = -(-candidate.depth // in_row)

    def draw(palette: Palette) -> Any:
        from matplotlib.patches import FancyBboxPatch, Rectangle

        figure, axis = _figure(palette, 0.35 + height * rows)
        axis.axis("off")
        axis.set(xlim=(0, in_row), ylim=(rows, 0))
        maps = {block: entry for entry in candidate.plan for block in entry.span.blocks}
        for block in range(candidate.depth):
            x, y = block % in_row, block // in_row
            entry = maps.get(block)
            state = "kept"
            if entry is not None:
                state = entry.map if block == entry.span.stop - 1 else "passed"
            elif cuts := candidate.plan.at(block):
                state = "narrowed"
                for row, part in enumerate(PARTS):
                    left = cuts[part].kept / cuts[part].size if part in cuts else 1.0
                    at = x + 0.2, y + 0.725 + 0.045 * row
                    axis.add_patch(Rectangle(at, 0.6, 0.03, facecolor=palette.line))
                    axis.add_patch(Rectangle(at, 0.6 * left, 0.03, facecolor=palette.main))
            elif block in (candidate.repaired or ()):
                state = "repaired"
            colour = palette.soft if entry is None else palette.other
            box = FancyBboxPatch(
                (x + 0.08, y + 0.1), 0.84, 0.75, boxstyle="round,pad=0,rounding_size=0.08",
                facecolor="none", edgecolor=palette.main if state == "repaired" else colour,
                linestyle="-" if entry is None else "--", linewidth=1.2,
            )  # fmt: skip
            axis.add_patch(box)
            ink = palette.ink if entry is None else palette.other
            axis.text(x + 0.5, y + 0.38, block, ha="center", va="center", fontsize=9, color=ink)
            axis.text(
                x + 0.5, y + 0.62, state, ha="center", va="center", fontsize=6.5, color=palette.soft
            )
        return figure

    return Plot("chain", "The chain of blocks", chain_words(candidate), draw)


def chain_words(candidate: Candidate) -> str:
    """The plan as a sentence."""
    plan = candidate.plan
    gone = "; ".join(
        f"blocks {entry.span.start}–{entry.span.stop - 1} by {_map_name(entry.map)}"
        if len(entry.span) > 1
        else f"block {entry.span.start} by {_map_name(entry.map)}"
        for entry in plan
    )
    kept = candidate.depth - candidate.removed
    words = f"{kept} of {candidate.depth} blocks are kept. Replaced: {gone or 'none'}."
    narrowed = [
        f"block {block} ("
        + ", ".join(f"{part} {cut.kept} of {cut.size}" for part, cut in plan.at(block).items())
        + ")"
        for block in plan.narrowed_blocks
    ]
    return f"{words} Narrowed: {'; '.join(narrowed)}." if narrowed else words


def _map_name(kind: str) -> str:
    return "nothing (identity)" if kind == "identity" else f"a {kind} map".replace("a a", "an a")


def components(side: SideBySide) -> Plot | None:
    """Picture, original's and compressed model's principal components, one row per image."""
    shown = [(s.picture, *s.components) for s in side.samples if s.components is not None]
    if not shown:
        return None

    def draw(palette: Palette) -> Any:
        import numpy as np
        from PIL import Image

        figure, _ = _figure(palette, WIDTH * len(shown) / 3 + 0.3)
        figure.clear()
        axes = figure.subplots(len(shown), 3, squeeze=False)
        for row, pictures in enumerate(shown):
            for column, data in enumerate(pictures):
                axis = axes[row][column]
                axis.imshow(np.asarray(Image.open(io.BytesIO(data))), interpolation="nearest")
                axis.axis("off")
        for column, title in enumerate(("image", "original", "compressed")):
            axes[0][column].set_title(title, fontsize=8.5, color=palette.ink)
        return figure

    return Plot("pca", "Principal components of the patch tokens", "", draw)
