"""Pictures that are skipped are counted and named; values of any depth are right or refused."""

from __future__ import annotations

import struct
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import blockfit_command as run
from pictures import PIXELS, encoded, folder_of, grey, labels, levels, spoil, table
from PIL import Image
from small import small_vit
from tiny_models import timm_model

from blockfit.data.decode import Unreadable, decode
from blockfit.data.images import images
from blockfit.errors import BlockfitError

HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(40)


def tiff(array: np.ndarray, colours: int = 1, kind: int = 1, **tags: list[int]) -> bytes:
    """An uncompressed TIFF (height, width[, channels]), written by hand: one strip, little-endian.

    ``colours`` is the photometric interpretation, ``kind`` the sample format.
    """
    height, width, channels = (*array.shape, 1)[:3]
    entries = {
        256: [width], 257: [height], 258: [8 * array.itemsize] * channels, 259: [1],
        262: [colours], 273: [0], 277: [channels], 278: [height], 279: [array.nbytes], 284: [1],
        339: [kind] * channels, **{int(name.strip("t")): values for name, values in tags.items()},
    }  # fmt: skip
    start = 10 + 12 * len(entries) + 4
    beyond = sum(2 * len(v) for v in entries.values() if len(v) > 2)
    entries[273] = [start + beyond]
    rows, more = b"", b""
    for tag, values in sorted(entries.items()):
        if len(values) > 2:
            rows += struct.pack("<HHII", tag, 3, len(values), start + len(more))
            more += struct.pack(f"<{len(values)}H", *values)
        else:
            rows += struct.pack("<HHI", tag, 3, len(values))
            rows += struct.pack(f"<{len(values)}H", *values).ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + rows + struct.pack("<I", 0) + more + array.tobytes()


def ramp(top: int, dtype: str = "uint16", *channels: int) -> np.ndarray:
    line = np.linspace(0, top, 64).reshape(8, 8, *[1] * len(channels))
    return np.ascontiguousarray(np.broadcast_to(line, (8, 8, *channels)).astype(dtype))


@pytest.mark.parametrize("bits", [9, 10, 12, 14])
@pytest.mark.parametrize("form", ["TIFF", "PNG", "colours", "array in Pillow"])
def test_case_11_fewer_bits_than_the_file_has_are_refused(bits: int, form: str) -> None:
    values = ramp(2**bits - 1)
    content: Any = Image.fromarray(values)
    if form == "colours":
        content = tiff(ramp(2**bits - 1, "uint16", 3), colours=2)
    elif form != "array in Pillow":
        content = encoded(content, form)
    with pytest.raises(Unreadable, match=r"16 bits.* are used, so that white .* prepared tensors"):
        decode(content)


def test_case_11_a_tiff_that_says_what_white_is_is_read() -> None:
    out = np.asarray(decode(tiff(ramp(4095), t281=[4095])))
    expected = np.rint(np.linspace(0, 255, 64).reshape(8, 8))
    np.testing.assert_allclose(out[:, :, 0], expected, atol=1)


def test_sixteen_bits_are_sixteen_bits_where_values_tell() -> None:
    dark = (np.arange(64).reshape(8, 8) * 257).astype(np.uint16)  # 8 bits stretched to 16
    assert np.array_equal(np.asarray(decode(encoded(Image.fromarray(dark))))[:, :, 0], dark // 257)
    out = np.asarray(decode(tiff(ramp(60000, "uint16", 3), colours=2)))
    np.testing.assert_allclose(out[:, :, 1], ramp(60000) / 257, atol=1)
    assert np.asarray(decode(tiff(ramp(0)))).max() == 0  # black at any depth


@pytest.mark.parametrize(
    ("values", "fits"),
    [
        (ramp(1, "float32"), True),
        (np.rint(ramp(255, "float32")), True),
        (ramp(255, "float32"), False),
        (ramp(2, "float32") * 0.75, False),
        (ramp(3000, "float32"), False),
        (-ramp(1, "float32"), False),
        (ramp(1, "float32") * np.nan, False),
    ],
    ids=["0–1", "whole 0–255", "0–255", "0–1.5", "0–3000", "negative", "NaN"],
)
def test_case_11_floats_are_read_rightly_or_refused(values: np.ndarray, fits: bool) -> None:
    content = encoded(Image.fromarray(values), "TIFF")
    if not fits:
        with pytest.raises(Unreadable, match="so that white is not known"):
            decode(content)
        return
    out = np.asarray(decode(content))[:, :, 0]
    np.testing.assert_allclose(out, np.rint(values * 255 / values.max()), atol=1)


@pytest.mark.parametrize(
    "content",
    [
        tiff(ramp(200, "uint8", 2)),
        tiff(ramp(200, "uint8", 2), t338=[0]),
        tiff(ramp(200, "uint8", 4), colours=2),
        tiff(ramp(200, "uint8", 4), colours=2, t338=[0]),
        tiff(ramp(200, "uint8", 12)),
        tiff(ramp(4000, "uint16", 12)),
        tiff(ramp(1, "float32", 3), colours=2, kind=3),
        tiff(ramp(300, "int16"), kind=2),
        tiff(ramp(70000, "uint32")),
        tiff(ramp(60000), colours=0),
    ],
    ids=[
        "2",
        "2, extra",
        "4",
        "4, extra",
        "12",
        "12 × 16 bits",
        "floats",
        "signed",
        "32",
        "white 0",
    ],
)
def test_case_11_channels_that_no_picture_has_are_refused(content: bytes) -> None:
    with pytest.raises(Unreadable, match=r"prepared tensors \(images, channels, height, width\)"):
        decode(content)


def test_transparency_that_a_tiff_names_is_laid_over_white() -> None:
    array = np.zeros((8, 8, 4), np.uint8)
    assert np.asarray(decode(tiff(array, colours=2, t338=[2]))).min() == 255


@pytest.mark.parametrize("channels", [2, 5, 12])
def test_case_11_arrays_of_other_channels_are_refused_with_what_to_do(channels: int) -> None:
    data = images(np.zeros((4, 8, 8, channels), np.uint8), preprocessing=PIXELS)
    with pytest.raises(BlockfitError, match=r"1, 3 or 4 channels last, .* as prepared tensors"):
        list(data.batches())


def test_case_11_pictures_for_a_model_of_other_channels_are_refused_at_once() -> None:
    model = timm_model("vit_tiny_patch16_224", in_chans=12)
    pictures = np.zeros((4, 32, 32, 3), np.uint8)
    with pytest.raises(BlockfitError, match=r"takes 12 channels, .* as prepared tensors"):
        images(pictures, model)
    assert next(iter(images(torch.zeros(4, 12, 32, 32), model))).shape == (4, 12, 32, 32)  # type: ignore[union-attr]


def test_case_10_pictures_that_are_not_read_are_named_by_every_command(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "photos", 30)
    (folder / "b.heic").write_bytes(HEIC)
    (folder / "a.CR2").write_bytes(b"raw")
    (folder / ".hidden.heic").write_bytes(HEIC)
    (folder / "notes.txt").write_text("no picture")
    spoil(folder, 4)
    (folder / "006.png").write_bytes(b"")
    commands: list[list[Any]] = [
        ["evaluate", "demo", "--images", folder],
        ["analyze", "demo", "--images", folder],
        ["compress", "demo", "--images", folder, "--span", "9:11", "-o", tmp_path / "small"],
    ]
    for command in commands:
        done = run(*command)
        assert done.code == 0, done.err
        (line,) = [one for one in done.err.splitlines() if "left out" in one]
        assert line.startswith("warning: 4 images left out: ")
        for part in ("a.CR2 (CR2 is not read)", "b.heic (HEIC needs pillow-heif)"):
            assert part in line
        assert "004.png, " in line
        assert line.endswith("006.png (cannot be read)")
    told = run(*commands[0], "--json").json["data"][0]
    assert [Path(name).name for name in told["skipped"]] == ["004.png", "006.png"]
    assert {Path(name).name for name in told["left_out"]} == {"a.CR2", "b.heic"}
    assert (told["total"], told["used"]) == (30, 28)


def test_case_10_heic_alone_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(HEIC)
    with pytest.raises(BlockfitError, match=r"1 pictures, and none .* pip install pillow-heif"):
        images(tmp_path, preprocessing=PIXELS)
    with pytest.raises(Unreadable, match=r"it is HEIC, .*pip install pillow-heif"):
        decode(HEIC)


def test_heic_is_read_where_pillow_heif_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from blockfit.data import decode as module

    def register() -> None:  # stands in for its decoder
        monkeypatch.setitem(Image.OPEN, "HEIF", Image.OPEN["PNG"])

    heif = types.ModuleType("pillow_heif")
    heif.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", heif)
    module._find_heif.cache_clear()
    try:
        (tmp_path / "a.heic").write_bytes(encoded(grey(7)))
        assert levels(images(tmp_path, preprocessing=PIXELS)) == [7]
    finally:
        module._find_heif.cache_clear()


def test_links_in_a_circle_and_to_nowhere_cost_no_other_picture(tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        folder_of(tmp_path / name, 10)
    (tmp_path / "ant" / "again").symlink_to(tmp_path)
    (tmp_path / "bee" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    data = images(tmp_path, preprocessing=PIXELS)
    assert len(levels(data)) == 20
    assert [Path(name).name for name in data.skipped] == ["gone.png"]


def streamed(count: int = 12) -> Any:
    return table(count).to_iterable_dataset(num_shards=3)


def test_case_16_streamed_data_sets_are_walked_again_and_again() -> None:
    data = images(streamed(), preprocessing=PIXELS, batch_size=5)
    assert len(data) == 12
    assert levels(data) == list(range(12)) == levels(data)
    assert labels(data) == [i % 3 for i in range(12)]
    assert data.class_names == ["bee", "ant", "fly"]
    fit, held_out = data.split(0.25)
    assert sorted(levels(fit) + levels(held_out)) == list(range(12))


def test_case_16_a_limit_draws_over_the_stream_and_not_its_first_rows() -> None:
    drawn = [levels(images(streamed(60), preprocessing=PIXELS, limit=9, seed=s)) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 9
    assert max(drawn[0]) > 20
    data = images(streamed(60), preprocessing=PIXELS, limit=9, batch_size=4)
    assert labels(data) == [level % 3 for level in levels(data)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_case_16_a_broken_row_of_a_stream_is_skipped_and_named() -> None:
    for workers in (0, 1):
        source = table(20, broken=5).to_iterable_dataset()
        data = images(source, preprocessing=PIXELS, batch_size=6, workers=workers)
        assert levels(data) == [i for i in range(20) if i != 5]
        assert len(data.skipped) == 1


def twice(level: int) -> torch.Tensor:
    """What the user's own transform makes of a picture."""
    return torch.full((3, 4, 4), 2 * level / 255)


@pytest.mark.parametrize("kind", ["with_transform", "set_transform", "replaced", "mapped stream"])
def test_case_16_the_users_transform_is_kept(kind: str) -> None:
    def transform(rows: dict[str, list[Any]]) -> dict[str, Any]:
        made = [twice(picture.getpixel((0, 0))[0]) for picture in rows["picture"]]
        return {**rows, "picture" if kind == "replaced" else "pixel_values": made}

    source: Any = table(6)
    if kind == "set_transform":
        source.set_transform(transform)
    elif kind == "mapped stream":
        rows = source.to_iterable_dataset()
        source = rows.map(lambda row: {"pixel_values": twice(row["picture"].getpixel((0, 0))[0])})
    else:
        source = source.with_transform(transform)
    column = "kind" if kind == "mapped stream" else None  # whose types nobody knows any more
    data = images(source, label_column=column, batch_size=4)
    assert levels(data) == [0, 2, 4, 6, 8, 10]
    assert labels(data) == [0, 1, 2, 0, 1, 2]
    if kind != "mapped stream":
        assert data.class_names == ["bee", "ant", "fly"]


def test_case_16_a_transform_of_pictures_comes_before_the_models_preprocessing() -> None:
    def darker(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return {**rows, "picture": [p.point(lambda v: v + 10) for p in rows["picture"]]}

    data = images(table(4).with_transform(darker), preprocessing=PIXELS)
    assert levels(data) == [10, 11, 12, 13]


def test_case_16_all_tensors_that_a_transform_makes_reach_the_model() -> None:
    def processor(rows: dict[str, list[Any]]) -> dict[str, Any]:
        count = len(rows["picture"])
        pixels = [torch.full((6, 12), float(p.getpixel((0, 0))[0])) for p in rows["picture"]]
        masks = [torch.ones(6, dtype=torch.bool)] * count
        return {"pixel_values": pixels, "pixel_attention_mask": masks, "kind": rows["kind"]}

    data = images(table(5).with_transform(processor), batch_size=4)
    first = next(data.batches())
    assert isinstance(first.inputs, dict)
    assert {k: tuple(v.shape) for k, v in first.inputs.items()} == {
        "pixel_values": (4, 6, 12),
        "pixel_attention_mask": (4, 6),
    }
    assert first.labels is not None
    assert first.labels.tolist() == [0, 1, 2, 0]


def test_case_16_a_streamed_set_is_compressed() -> None:
    from blockfit import api

    data = images(streamed(24), preprocessing=PIXELS, batch_size=8)
    assert api.compress(small_vit(), data, spans=["1:2"]).report["removed_blocks"] == 1
