"""What a report says of pictures, and how they get into the page."""

from __future__ import annotations

import base64
import io

from PIL import Image

from blockfit.evaluation.side_by_side import SideBySide


def png_data(png: bytes) -> str:
    """The address of a picture that lies in the page itself."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def png_width(png: bytes) -> int:
    """In pixels."""
    return Image.open(io.BytesIO(png)).width


def file_name(name: str) -> str:
    """A file's name without its folders."""
    return name.replace("\\", "/").rpartition("/")[2] or name


def samples_words(side: SideBySide) -> str:
    """On how many images the models differ, and which are shown."""
    words = f"{len(side.samples)} of {side.images} images from {side.source}. "
    if side.differing is None:
        return words + "The model has no head, so that only features are compared."
    if not side.differing:
        return words + f"The two models name the same class first on all {side.images}."
    shown = sum(sample.differs for sample in side.samples)
    return words + (
        f"The two models name another class first on {side.differing} of the {side.images}; "
        f"the {shown} costliest of these come first, then others."
    )


def pca_words(side: SideBySide) -> str:
    """How the colours come about."""
    part = "" if side.explained is None else f" ({side.explained:.0%} of their variance)"
    return (
        "The patch tokens after the last block: the original's first three principal components"
        f"{part} as red, green and blue. Both models are coloured on the same scale, so that the "
        "same colour means the same feature."
    )
