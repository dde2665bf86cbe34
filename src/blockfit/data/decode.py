"""From bytes, arrays and files to upright 8-bit RGB pictures, or to one clear refusal."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from blockfit.errors import BlockfitError

_SUFFIXES = "jpg jpeg jpe jfif png webp bmp gif tif tiff ppm pgm pbm pnm jp2 avif"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split(" "))
"""Files with these endings (in any case) count as images when a folder is read."""

_OTHERS = (
    "heic heif hif jxl svg psd eps ai exr hdr tga dds ico icns pcx xcf jxr wdp dcm "
    "dng cr2 cr3 nef arw orf rw2 raf pef srw x3f"
)
OTHER_SUFFIXES = frozenset(f".{suffix}" for suffix in _OTHERS.split(" "))
"""Pictures, too, which are not read: they are named and left out. HEIC is read with pillow-heif."""

AS_TENSORS = "give such images as prepared tensors (images, channels, height, width)"

LONGEST_SHAPE = 100
"""How many times as long as wide an image may be: preprocessing would blow a longer one up."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF")


_HEIC = (".heic", ".heif", ".hif")
_BITS, _PHOTOMETRIC, _CHANNELS, _WHITE, _EXTRA, _KIND = 258, 262, 277, 281, 338, 339  # TIFF's tags
_RGB, _CMYK = 2, 5
_SURE = 1 << 14  # a value that files of 14 bits or fewer cannot hold


class Unreadable(Exception):
    """An image that cannot be decoded; ``data.Images`` skips, counts and names it."""


def decode(
    content: bytes | str | Path | Image.Image | np.ndarray, max_pixels: int | None = None
) -> Image.Image:
    """An upright RGB image with 8 bits per channel.

    EXIF orientation is applied, transparency is laid over white, greyscale, palette and CMYK are
    converted, 16 bits are scaled to 8 (Pillow alone would clip them), and the first frame of an
    animation is taken. What the content is counts, not the file's ending; formats that other
    programs would have to draw (EPS, WMF) are not tried. Where it is not known which value is white
    (12 bits in a file of 16, floats above 1) or what the channels are, nothing is guessed.

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
            _check_channels(image)
            deep = _deep_colour(image)
            _checked(image).load()
            white = _white(image, deep)
            return rgb(_upright(image), white)
    except Unreadable:
        raise
    except UnidentifiedImageError as error:
        raise Unreadable(_why_not(content)) from error
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
        raise BlockfitError(
            f"an image array has 1, 3 or 4 channels last, got shape {array.shape}; {AS_TENSORS}"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def rgb(image: Image.Image, white: float | None = None) -> Image.Image:
    """Any Pillow image as 8-bit RGB; ``white`` is the value of white where there are more bits."""
    if _is_deep(image):
        image = _eight_bits(image, _white(image) or 0.0 if white is None else white)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(paper, image)
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


def _formats() -> tuple[str, ...]:
    _find_heif()
    Image.init()
    return tuple(form for form in _FORMATS if form in Image.OPEN)


@cache
def _find_heif() -> None:
    """Let Pillow read HEIC where pillow-heif is installed."""
    with suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()


def why_left_out(file: str | Path) -> str | None:
    """Why a picture with such a name is left out; ``None`` for what is read or is no picture."""
    suffix = Path(file).suffix.lower()
    if suffix not in OTHER_SUFFIXES:
        return None
    if suffix in _HEIC:
        return None if "HEIF" in _formats() else f"{suffix[1:].upper()} needs pillow-heif"
    return f"{suffix[1:].upper()} is not read"


def is_picture(file: str | Path) -> bool:
    """Whether a file's name says that it is a picture that can be read."""
    suffix = Path(file).suffix.lower()
    return suffix in IMAGE_SUFFIXES or (suffix in _HEIC and "HEIF" in _formats())


def _why_not(content: bytes | str | Path) -> str:
    """Why Pillow does not know what a file is."""
    with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
        start = file.read(16)
        if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1"):
            return "it is HEIC, which Pillow reads with pillow-heif (pip install pillow-heif) only"
        if start[:4] in (b"II*\0", b"MM\0*"):
            directory = TiffImagePlugin.ImageFileDirectory_v2(start[:8])
            with suppress(Exception):  # broken in any way
                file.seek(directory.next)
                directory.load(file)
            bits, channels = directory.get(_BITS, (1,)), directory.get(_CHANNELS, 1)
            if channels > 1 or max(bits) > 8:
                return (
                    f"it is a TIFF of {channels} channel{'s' if channels > 1 else ''} of "
                    f"{max(bits)} bits, which is not read; {AS_TENSORS}"
                )
    return "UnidentifiedImageError: cannot identify what kind of image it is"


def _check_channels(image: Image.Image) -> None:
    """Refuse TIFFs with channels that are neither colours nor said to be transparency."""
    tags = getattr(image, "tag_v2", {})
    channels = int(tags.get(_CHANNELS, 1))
    colours = {_RGB: 3, _CMYK: 4}.get(int(tags.get(_PHOTOMETRIC, 1)), 1)
    if image.format == "TIFF" and tags.get(_PHOTOMETRIC, 9) in (0, 1, _RGB, _CMYK):
        extra = tags.get(_EXTRA, ())
        if channels > colours and not set(extra) & {1, 2}:
            raise Unreadable(
                f"it has {channels} channels, and those beside its colours are not said to be "
                f"transparency; {AS_TENSORS}"
            )


def _deep_colour(image: Image.Image) -> bool:
    """Whether Pillow will cut colours of 16 bits to 8; asked before the picture is loaded."""
    bits = getattr(image, "tag_v2", {}).get(_BITS, (8,))
    modes = [str(tile[3]) for tile in getattr(image, "tile", ())]
    return not _is_deep(image) and (max(bits) > 8 or any(";16" in mode for mode in modes))


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def _white(image: Image.Image, deep_colour: bool = False) -> float | None:
    """The value of white of a picture with more than 8 bits; ``None`` for 8.

    Raises:
        Unreadable: where it cannot be known.
    """
    if deep_colour:
        high = max(top for _, top in image.convert("RGB").getextrema())  # type: ignore[misc]
        if 0 < high < _SURE >> 8:
            raise _unsure(f"16 bits per channel, of which {high.bit_length() + 8} are used")
        return None
    if not _is_deep(image):
        return None
    values = np.asarray(image)
    low, high = values.min(initial=0), values.max(initial=0)
    if image.mode == "F":
        if low >= -0.001 and high <= 1.001:
            return 1.0
        if low >= 0 and high <= 255 and np.array_equal(values, np.rint(values)):
            return 255.0
        raise _unsure(f"floats from {low:.3g} to {high:.3g}")
    tags = getattr(image, "tag_v2", {})
    said = tags.get(_WHITE)
    said = said[0] if isinstance(said, tuple) else said
    if low < 0 or high > 65535 or tags.get(_KIND, (1,))[0] == 2:
        raise _unsure(f"whole numbers from {low} to {high}")
    if tags.get(_PHOTOMETRIC) == 0:
        raise Unreadable(f"it holds 16 bits of which 0 is white, which is not read; {AS_TENSORS}")
    if image.format in ("JPEG2000", "PPM"):  # scaled to 16 bits by Pillow
        return 65535.0
    if isinstance(said, int) and 255 < said <= 65535 and high <= said:
        return float(said)
    whole = not (values % 257).any() or (high > 4095 and not (values % 256).any())
    if high >= _SURE or whole:
        return 65535.0
    raise _unsure(f"16 bits, of which {int(high).bit_length()} are used")


def _unsure(what: str) -> Unreadable:
    return Unreadable(
        f"it holds {what}, so that white is not known; scale to 8 bits, or {AS_TENSORS}"
    )


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


def _eight_bits(image: Image.Image, white: float) -> Image.Image:
    values = np.asarray(image).astype(np.float64) * (255.0 / white)
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
