"""From bytes, arrays and files to upright 8-bit RGB pictures, or to one clear refusal."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from blockfit.errors import BlockfitError

_SUFFIXES = "jpg jpeg jpe jfif png webp bmp gif tif tiff ppm pgm pbm pnm jp2 avif"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split(" "))
"""Files with these endings (in any case) count as images when a folder is read."""

LONGEST_SHAPE = 100
"""How many times as long as wide an image may be: preprocessing would blow a longer one up."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")


class Unreadable(Exception):
    """An image that cannot be decoded; ``data.Images`` skips, counts and names it."""


def decode(
    content: bytes | str | Path | Image.Image | np.ndarray, max_pixels: int | None = None
) -> Image.Image:
    """An upright RGB image with 8 bits per channel.

    EXIF orientation is applied, transparency is laid over white, greyscale, palette and CMYK are
    converted, 16 bits are scaled to 8 (Pillow alone would clip them), and the first frame of an
    animation is taken. What the content is counts, not the file's ending; formats that other
    programs would have to draw (EPS, WMF) are not tried.

    Args:
        content: an encoded file's bytes or path, a Pillow image, or a uint8 array (H, W),
            (H, W, 1), (H, W, 3) or (H, W, 4).
        max_pixels: of an encoded image; Pillow's limit by default, 178,956,970.

    Raises:
        Unreadable: for anything that Pillow cannot decode completely, empty, truncated or
            missing files, images beyond ``max_pixels`` and those of a shape beyond
            ``LONGEST_SHAPE`` included.
    """
    if isinstance(content, np.ndarray):
        return rgb(_checked(array_image(content)))
    if isinstance(content, Image.Image):
        return rgb(_upright(_checked(content)))
    try:
        if not isinstance(content, bytes) and not Path(content).is_file():
            raise Unreadable("it is not there, or no regular file")
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        with _own_limit(max_pixels) as most, Image.open(file, formats=_formats()) as image:
            if image.width * image.height > most:
                raise Unreadable(
                    f"{image.width} × {image.height} pixels are more than {most}, too many for an "
                    "image; allow more with max_pixels="
                )
            _checked(image).load()
            return rgb(_upright(image))
    except Unreadable:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything on broken files
        raise Unreadable(f"{type(error).__name__}: {error}") from error


def array_image(array: np.ndarray) -> Image.Image:
    """A uint8 array (H, W) or (H, W, 1, 3 or 4) as a Pillow image."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3):
        raise BlockfitError(
            f"an image array must be uint8 of shape (height, width) or (height, width, channels), "
            f"got {array.dtype} {array.shape}; give already prepared images as torch tensors"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim == 3 and array.shape[2] not in (3, 4):
        raise BlockfitError(f"an image array has 1, 3 or 4 channels last, got shape {array.shape}")
    return Image.fromarray(np.ascontiguousarray(array))


def rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = _eight_bits(image)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _own_limit(max_pixels: int | None) -> Iterator[float]:
    """How many pixels a picture may have; Pillow's own check, which is global, is off meanwhile."""
    usual = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield max_pixels or (float("inf") if usual is None else 2 * usual)
    finally:
        Image.MAX_IMAGE_PIXELS = usual


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(form for form in _FORMATS if form in Image.OPEN)


def _checked(image: Image.Image) -> Image.Image:
    short, long = sorted(image.size)
    if long > LONGEST_SHAPE * short:
        raise Unreadable(
            f"{image.width} × {image.height} pixels are more than {LONGEST_SHAPE} times as long "
            "as wide"
        )
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF: the picture itself may be whole
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16 bits to 8, and floats in [0, 1] likewise; other values are clipped to 0 … 255."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
    else:
        scale = 255.0 / 65535.0
    finite = np.nan_to_num(values * scale)
    return Image.fromarray(np.clip(np.rint(finite), 0, 255).astype(np.uint8))
