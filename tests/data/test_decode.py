"""Whatever a picture was stored as, it becomes upright 8-bit RGB or is unreadable."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, grey
from PIL import Image

from blockfit.data.decode import Unreadable, decode


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
    content = encoded(image, "TIFF" if image.mode in ("CMYK", "YCbCr") else "PNG")
    try:
        Image.open(io.BytesIO(content)).load()
    except OSError:
        pytest.skip("this Pillow cannot read what it writes in this mode")
    out = decode(content)
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
    with pytest.raises(Unreadable, match=r"64 × 64 pixels are more than 200, .*max_pixels="):
        decode(encoded(grey(9, 64)))
    assert decode(encoded(grey(9, 64)), max_pixels=64 * 64).size == (64, 64)
    with pytest.raises(Unreadable, match="more than 4095"):
        decode(encoded(grey(9, 64)), max_pixels=64 * 64 - 1)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_files_of_every_size_and_bomb_are_decoded_or_refused(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "dot.png")
    assert decode(tmp_path / "dot.png").getpixel((0, 0)) == (1, 2, 3)
    Image.new("L", (1, 100), 7).save(tmp_path / "long.png")
    assert decode(tmp_path / "long.png").size == (1, 100)
    Image.new("L", (1, 60_000), 7).save(tmp_path / "longer.png")
    with pytest.raises(Unreadable, match="1 × 60000 pixels are more than 100 times as long"):
        decode(tmp_path / "longer.png")
    header = b"IHDR" + struct.pack(">2I5B", 20_000, 20_000, 1, 0, 0, 0, 0)  # 400 megapixels
    whole = bytearray(encoded(Image.new("1", (8, 8))))
    whole[12:33] = header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "bomb.png").write_bytes(whole)
    with pytest.raises(Unreadable, match="20000 × 20000 pixels are more than 178956970"):
        decode(tmp_path / "bomb.png")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_becomes_upright_in_every_format(
    form: str, turn: int, tmp_path: Path
) -> None:
    upright = Image.new("RGB", (48, 32), (0, 0, 0))
    upright.paste((250, 250, 250), (0, 0, 16, 16))  # white top left
    upright.paste((250, 0, 0), (32, 0, 48, 16))  # red top right
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[turn]) if turn in undo else upright
    exif = Image.Exif()
    exif[0x0112] = turn
    stored.save(tmp_path / "x", form, exif=exif)
    out = decode(tmp_path / "x")
    assert out.size == (48, 32)
    np.testing.assert_allclose(np.asarray(out)[8, 8], (250, 250, 250), atol=12)
    np.testing.assert_allclose(np.asarray(out)[8, 40], (250, 0, 0), atol=12)
    np.testing.assert_allclose(np.asarray(out)[24, 8], (0, 0, 0), atol=12)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_does_not_cost_the_picture(form: str, tmp_path: Path) -> None:
    for exif in (b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", b"\x00"):
        grey(90).save(tmp_path / "x", form, exif=exif)
        assert decode(tmp_path / "x").getpixel((4, 4)) == (90, 90, 90)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_files_keep_their_contrast(form: str, tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "x", form)
    out = np.asarray(decode(tmp_path / "x"))
    assert np.array_equal(out, np.repeat(np.arange(256).reshape(16, 16, 1), 3, 2))


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk_files_become_their_colours(form: str, tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "x", form)
    np.testing.assert_allclose(np.asarray(decode(tmp_path / "x"))[8, 8], (255, 0, 0), atol=4)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(form: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    frames[0].save(
        tmp_path / "x",
        form,
        save_all=True,
        append_images=frames[1:],
        **options,  # type: ignore[arg-type]
    )
    assert decode(tmp_path / "x").getpixel((4, 4)) == (255, 0, 0)


def test_the_content_counts_and_not_the_ending(tmp_path: Path) -> None:
    grey(90).save(tmp_path / "really_a_png.jpg", "PNG")
    assert decode(tmp_path / "really_a_png.jpg").getpixel((4, 4)) == (90, 90, 90)
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    with pytest.raises(Unreadable, match="cannot identify"):
        decode(tmp_path / "page.jpg")


def test_no_other_program_is_started_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow would hand PostScript, whatever the file is called, to Ghostscript."""

    def started(*args: object, **options: object) -> None:
        pytest.fail("Ghostscript was asked for")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", started)
    grey(90).save(tmp_path / "x.jpg", "EPS")
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.format == "EPS"
    with pytest.raises(Unreadable):
        decode(tmp_path / "x.jpg")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_a_file_cut_short_is_unreadable_in_every_format(form: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encoded(Image.fromarray(noise), form)
    (tmp_path / "x").write_bytes(content)
    assert decode(tmp_path / "x").size == (64, 64)
    for part in (0.0, 0.02, 0.5, 0.8):
        (tmp_path / "x").write_bytes(content[: int(part * len(content))])
        with pytest.raises(Unreadable):
            decode(tmp_path / "x")
