"""The pictures of docs/how.md, drawn when mkdocs builds the site."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

BLUE, ORANGE, GREY, GREEN, RED = "#3f51b5", "#e65100", "#8a8f98", "#2e7d32", "#c62828"
PALE_TO_STRONG = ((232, 63), (234, 81), (246, 181))
"""Red, green and blue where nothing and where everything is explained."""

STYLE = "font-family:system-ui,sans-serif;font-size:13px;fill:#7d8590"


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures; the heat map is drawn from the table that lies beside this file."""
    folder = Path(config.docs_dir)
    pictures = {
        "chain": chain(),
        "r2": heat_map((folder / "assets" / "r2.csv").read_text("utf-8")),
    }
    for name, picture in pictures.items():
        files.append(File.generated(config, f"assets/{name}.svg", content=picture))
    return files


def svg(width: int, height: int, parts: Sequence[str]) -> str:
    """A picture without a background, readable on light and dark pages."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" style="{STYLE}">{"".join(parts)}</svg>\n'
    )


def text(x: float, y: float, words: str, anchor: str = "middle", fill: str = "") -> str:
    """Words at a place."""
    colour = f' fill="{fill}"' if fill else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{colour}>{html.escape(words)}</text>'


def box(x: float, y: float, width: float, colour: str, words: str, filled: bool = True) -> str:
    """A block or a map."""
    look = f'fill="{colour}"' if filled else f'fill="none" stroke="{colour}" stroke-dasharray="4 3"'
    label = text(x + width / 2, y + 25, words, fill="#fff" if filled else colour)
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="40" rx="5" {look}/>{label}'


def chain(depth: int = 12, spans: Sequence[tuple[int, int]] = ((2, 3), (5, 7))) -> str:
    """The blocks of a model before and after."""
    step, parts = 56, []
    starts, gone = dict(spans), {b for start, stop in spans for b in range(start, stop)}
    for row, y in enumerate((30, 120)):
        parts.append(text(0, y - 8, "compressed" if row else "original", "start"))
        for block in range(depth):
            x = block * step
            if block + 1 < depth:
                parts.append(f'<path d="M{x + 46} {y + 20}h10" stroke="{GREY}" stroke-width="2"/>')
            if not row or block not in gone:
                colour = GREEN if row and block > spans[0][0] else BLUE
                parts.append(box(x, y, 46, colour, str(block)))
        if row:
            for start, stop in starts.items():
                width = (stop - start) * step - 10
                parts.append(box(start * step, y, width, ORANGE, f"T{start}:{stop}"))
    for i, (colour, words) in enumerate(
        (
            (BLUE, "block as it was"),
            (ORANGE, "map"),
            (GREEN, "block whose output weights are solved anew"),
        )
    ):
        x = (0, 150, 230)[i]
        parts.append(f'<rect x="{x}" y="180" width="14" height="14" rx="3" fill="{colour}"/>')
        parts.append(text(x + 20, 192, words, "start"))
    return svg(depth * step - 10, 204, parts)


def heat_map(table: str, side: int = 34) -> str:
    """The R² of an affine map from one hidden state to a later one."""
    parts = [text(60, 14, "to", "start"), text(50, 32, "from", "end")]
    for i in range(12):
        parts.append(text(60 + (i + 0.5) * side, 32, f"h{i + 1}"))
        parts.append(text(50, 40 + (i + 0.5) * side + 4, f"h{i}", "end"))
    for line in table.split()[1:]:
        start, stop, r2 = line.split(",")
        x, y, strong = 60 + (int(stop) - 1) * side, 40 + int(start) * side, float(r2) ** 2
        red, green, blue = (round(a + (b - a) * strong) for a, b in PALE_TO_STRONG)
        look = f'width="{side}" height="{side}" fill="rgb({red},{green},{blue})"'
        parts.append(f'<rect x="{x}" y="{y}" {look}/>')
        ink = "#fff" if strong > 0.6 else "#1a237e"
        parts.append(text(x + side / 2, y + side / 2 + 5, f"{float(r2):.2f}"[1:], fill=ink))
    return svg(70 + 12 * side, 50 + 12 * side, parts)
