"""Results on the terminal: which images are used, and what the summaries of results hold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from blockfit.summary import Part

if TYPE_CHECKING:
    from blockfit.commands.output import Output
    from blockfit.data.images import Images


CPU = "device: cpu"
"""What commands say that run models on the CPU alone."""


def show(out: Output, parts: Iterable[Part]) -> None:
    """Print lines and tables, in their order."""
    for part in parts:
        if isinstance(part, str):
            out.line(part)
        else:
            out.table(part.header, part.rows, part.title)


def show_images(
    out: Output, images: Images, device: str | None = None, usual: bool = False
) -> None:
    """Which images are used, how they are prepared and their labels matched; and where.

    ``usual`` says that nobody asked for that number of images. What is skipped is told with the
    result, when all of them have been read.
    """
    told = images.description()
    drawn = "" if told["used"] == told["total"] else f", drawn with seed {told['seed']}"
    drawn += "; --limit all for all" if usual else ""
    out.note(f"images: {told['used']:,} of {told['total']:,} from {told['source']}{drawn}")
    out.note(f"preprocessing: {told['preprocessing']}")
    if told["labels"] is not None:
        out.note(told["labels"]["line"])
    if device is not None:
        out.note(f"device: {device}")
    out.reads(images)
