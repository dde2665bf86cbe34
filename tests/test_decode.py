"""Whatever a picture was stored as, it becomes upright 8-bit RGB or is unreadable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, grey
from PIL import Image

from blockfit.decode import Unreadable, decode


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    image.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    upright = decode(encoded(image, exif=exif))
    assert upright.size == (2, 4)
    assert upright.getpixel((1, 0)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    options = {}
    if mode == "P":
        image = Image.new("P", (2, 1), 0)
        image.putpalette([0, 0, 0, 0, 0, 200])
        image.putpixel((1, 0), 1)
        options["transparency"] = 1
    else:
        image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
        image.putpixel((1, 0), (0, 0, 200, 0))
        image = image.convert(mode)
    out = decode(encoded(image, **options))
    assert out.mode == "RGB"
    assert [out.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    out = decode(encoded(Image.fromarray(values)))
    assert [out.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]


def test_floats_between_0_and_1_are_scaled() -> None:
    values = np.array([[0.0, 0.5, 1.0]], dtype=np.float32)
    out = decode(encoded(Image.fromarray(values), "TIFF"))
    assert [out.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]  # type: ignore[index]


@pytest.mark.parametrize(
    "image",
    [
        Image.new("CMYK", (4, 4), (0, 255, 255, 0)),
        Image.new("L", (4, 4), 200),
        Image.new("1", (4, 4), 1),
        Image.new("YCbCr", (4, 4), (120, 90, 210)),
    ],
    ids=lambda image: image.mode,
)
def test_other_modes_become_rgb_as_pillow_converts_them(image: Image.Image) -> None:
    form = "TIFF" if image.mode in ("CMYK", "YCbCr") else "PNG"
    out = decode(encoded(image, form))
    assert out.mode == "RGB"
    assert out.getpixel((1, 1)) == image.convert("RGB").getpixel((1, 1))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no picture",
        encoded(grey(9, 64), "JPEG")[:-300],
        encoded(grey(9, 64))[:-30],
        Path("/nowhere/x.png"),
    ],
    ids=["empty", "text", "truncated JPEG", "truncated PNG", "missing"],
)
def test_what_pillow_cannot_decode_is_unreadable(content: bytes | Path) -> None:
    with pytest.raises(Unreadable):
        decode(content)


def test_an_image_beyond_pillows_limit_is_unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Unreadable, match="DecompressionBomb"):
        decode(encoded(grey(9, 64)))
