"""Text files that list pictures, and NumPy files that hold them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import PIXELS, encoded, folder_of, grey, labels, levels

from blockfit.data.images import images
from blockfit.errors import BlockfitError


def listed(folder: Path, text: str | bytes, name: str = "list.txt") -> Path:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder / name


def test_a_list_gives_its_files_in_its_order(tmp_path: Path) -> None:
    folder_of(tmp_path / "far" / "away", 9)
    outside = tmp_path / "far" / "away" / "003.png"
    file = listed(tmp_path / "far", f"away/007.png\r\n\n  away/001.png  \n{outside}\n")
    data = images(file, preprocessing=PIXELS)
    assert levels(data) == [7, 1, 3]
    assert labels(data) is None
    assert next(data.batches()).names[2] == str(outside)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-8"])
def test_a_list_of_powershell_is_read(encoding: str, tmp_path: Path) -> None:
    """``dir -name > list.txt`` writes UTF-16 there, with a mark and carriage returns."""
    folder_of(tmp_path, 3)
    (tmp_path / "é.png").write_bytes(encoded(grey(9)))
    text = "\ufeff002.png\r\né.png\r\n000.png\r\n"
    assert levels(images(listed(tmp_path, text.encode(encoding)), preprocessing=PIXELS)) == [
        2,
        9,
        0,
    ]


@pytest.mark.parametrize("sign", ["\t", " ", "   "], ids=["tab", "space", "spaces"])
def test_a_label_stands_after_a_tab_or_a_space(sign: str, tmp_path: Path) -> None:
    folder_of(tmp_path, 4)
    numbers = listed(tmp_path, "".join(f"00{i}.png{sign}{i * 5}\n" for i in (3, 0, 2)))
    assert labels(images(numbers, preprocessing=PIXELS)) == [15, 0, 10]
    texts = listed(tmp_path, f"001.png{sign}honey bee\n000.png{sign}ant\n", "x.tsv")
    data = images(texts, preprocessing=PIXELS)
    assert (labels(data), data.class_names) == ([1, 0], ["ant", "honey bee"])
    unknown = images(listed(tmp_path, f"001.png{sign}-1\n"), preprocessing=PIXELS)
    assert labels(unknown) is None


def test_names_with_spaces_dots_and_signs_are_kept_whole(tmp_path: Path) -> None:
    names = ["my photo.png", "a.png b.PNG", "12 3.png", "x 7", "é#.png"]
    for level, name in enumerate(names):
        (tmp_path / name).write_bytes(encoded(grey(level)))
    data = images(listed(tmp_path, "\ufeff" + "\n".join(names)), preprocessing=PIXELS)
    assert levels(data) == [0, 1, 2, 3, 4]
    with_labels = "\n".join(f"{name}\t{level}" for level, name in enumerate(names))
    assert labels(images(listed(tmp_path, with_labels), preprocessing=PIXELS)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("commas.txt", "002.png,bee\n000.png, ant\n001.png,ant\n"),
        ("windows.txt", ".\\002.png\tbee\r\n.\\000.png\tant\r\n.\\001.png\tant\r\n"),
        ("header.tsv", "label\tpath\nbee\t002.png\nant\t000.png\nant\t001.png\n"),
        ("header.csv", 'id,Path,Label\n7,"002.png",bee\n8,000.png,ant\n\n9,001.png,ant\n'),
        ("semicolons.csv", "image;class\n002.png;bee\n000.png;ant\n001.png;ant\n"),
        ("other.csv", "id,image_id,label\n1,002.png,bee\n2,000.png,ant\n3,001.png,ant\n"),
        ("plain.csv", "002.png,bee\n000.png,ant\n001.png,ant\n"),
    ],
    ids=lambda value: value if "\n" not in value else "",
)
def test_lists_as_other_programs_write_them(name: str, text: str, tmp_path: Path) -> None:
    folder_of(tmp_path, 3)
    data = images(listed(tmp_path, text, name), preprocessing=PIXELS)
    assert levels(data) == [2, 0, 1]
    assert (labels(data), data.class_names) == ([1, 0, 0], ["ant", "bee"])


def test_whole_numbers_that_a_table_wrote_as_fractions_are_numbers(tmp_path: Path) -> None:
    folder_of(tmp_path, 3)
    file = listed(tmp_path, "path,label\n002.png,2.0\n000.png,\n001.png,11.0\n", "x.csv")
    assert labels(images(file, preprocessing=PIXELS)) == [2, -1, 11]


def test_the_columns_of_a_list_are_named(tmp_path: Path) -> None:
    folder_of(tmp_path, 2)
    file = listed(tmp_path, "path,kind,label\n001.png,3,0\n000.png,2,0\n", "x.csv")
    assert labels(images(file, preprocessing=PIXELS)) == [0, 0]
    assert labels(images(file, preprocessing=PIXELS, label_column="kind")) == [3, 2]
    with pytest.raises(BlockfitError, match=r"has no column 'no'; it has path, kind, label"):
        images(file, preprocessing=PIXELS, label_column="no")
    short = listed(tmp_path, "path,label\n001.png\n", "short.csv")
    with pytest.raises(BlockfitError, match="line 2 has fewer columns than the first line"):
        images(short, preprocessing=PIXELS)
    with pytest.raises(BlockfitError, match="its first line names no columns"):
        images(listed(tmp_path, "001.png 1\n"), preprocessing=PIXELS, label_column="kind")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("000.png 1\n001.png\n", "line 2 has no label and line 1 has"),
        ("000.png\n\n001.png 1\n", "line 1 has no label and line 3 has"),
        ("\n\n", "names no images; write one path per line"),
        ("nope.png\n000.png\n", "line 1 names nope.png, which is not there; paths count from"),
        (b"\xff\xfe\x00", "cannot read the list"),
    ],
    ids=["second without", "first without", "empty", "missing", "no text"],
)
def test_a_list_that_cannot_be_used_is_one_sentence(
    text: str | bytes, message: str, tmp_path: Path
) -> None:
    folder_of(tmp_path, 2)
    with pytest.raises(BlockfitError, match=message) as caught:
        images(listed(tmp_path, text), preprocessing=PIXELS)
    assert "\n" not in str(caught.value)


def test_a_missing_file_further_down_is_skipped_and_named(tmp_path: Path) -> None:
    folder_of(tmp_path, 20)
    text = "".join(f"{i:03d}.png\n" for i in range(20)).replace("012", "nope")
    data = images(listed(tmp_path, text), preprocessing=PIXELS)
    assert levels(data) == [i for i in range(20) if i != 12]
    assert data.skipped == [str(tmp_path / "nope.png")]


def pictures(count: int, *channels: int) -> np.ndarray:
    level = np.arange(count, dtype=np.uint8).reshape(-1, *[1] * (2 + len(channels)))
    return np.zeros((count, 6, 5, *channels), np.uint8) + level


@pytest.mark.parametrize("channels", [(), (1,), (3,), (4,)], ids=str)
def test_an_array_file_is_read_by_position_and_not_as_a_whole(
    channels: tuple[int, ...], tmp_path: Path
) -> None:
    array = pictures(9, *channels)
    if channels == (4,):
        array[..., 3] = 255
    np.save(tmp_path / "x.npy", array)
    data = images(tmp_path / "x.npy", preprocessing=PIXELS, limit=4, workers=1)
    assert levels(data) == np.random.default_rng(0).permutation(9)[:4].tolist()
    assert len(pickle.dumps(data.records)) < 600
    assert data.description()["source"] == str(tmp_path / "x.npy")


def test_an_archive_of_arrays_gives_its_pictures_and_labels(tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    np.savez(file, images=pictures(4, 3), labels=[3, 1, 2, 0], ids=np.arange(9), note="text")
    data = images(file, preprocessing=PIXELS)
    assert (levels(data), labels(data)) == ([0, 1, 2, 3], [3, 1, 2, 0])
    assert data.description()["columns"] == {"image": "images", "label": "labels"}
    np.savez_compressed(file, a=pictures(4), b=pictures(3), c=[1, 1, 1, 2], d=[0, 0, 0, 1])
    with pytest.raises(BlockfitError, match=r"the arrays of images a, b; name one with image_c"):
        images(file, preprocessing=PIXELS)
    assert labels(images(file, preprocessing=PIXELS, image_column="a")) is None  # c or d
    chosen = images(file, preprocessing=PIXELS, image_column="a", label_column="d")
    assert labels(chosen) == [0, 0, 0, 1]


def test_an_archive_with_splits_is_read_by_its_split(tmp_path: Path) -> None:
    keras, medical = tmp_path / "mnist.npz", tmp_path / "medical.npz"
    np.savez(
        keras,
        x_train=pictures(5),
        y_train=np.arange(5, dtype=np.uint8),
        x_test=pictures(5)[3:],
        y_test=np.array([8, 9], dtype=np.uint8),
    )
    data = images(f"{keras}:test", preprocessing=PIXELS)
    assert (levels(data), labels(data)) == ([3, 4], [8, 9])
    assert labels(images(keras, preprocessing=PIXELS, split="train")) == [0, 1, 2, 3, 4]
    np.savez(
        medical,
        **{f"{split}_images": pictures(3, 3) for split in ("train", "val")},
        **{
            f"{split}_labels": np.array([[1], [0], [i]]) for i, split in enumerate(("train", "val"))
        },
    )
    assert labels(images(f"{medical}:val", preprocessing=PIXELS)) == [1, 0, 1]
    with pytest.raises(BlockfitError, match="name one with image_column"):
        images(f"{medical}:dev", preprocessing=PIXELS)


class Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("it-ran"),)


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
def test_objects_in_numpy_files_are_never_unpickled(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    objects = np.array([Runs(), Runs()], dtype=object)
    with open(name, "wb") as file:
        np.save(file, objects, allow_pickle=True) if name == "x.npy" else np.savez(file, a=objects)
    for options in ({}, {"image_column": "a"}):
        with pytest.raises(BlockfitError):
            images(name, preprocessing=PIXELS, **options)  # type: ignore[arg-type]
    assert not Path("it-ran").exists()


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 4, 3)), "must be uint8"),
        (np.zeros((4, 4), np.uint8), "must be uint8"),
        (np.zeros((0, 4, 4), np.uint8), "holds no images"),
    ],
    ids=["floats", "one picture", "none"],
)
def test_arrays_that_are_no_pictures_are_refused(
    array: np.ndarray, message: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(BlockfitError, match=rf"x\.npy.*{message}"):
        images(tmp_path / "x.npy", preprocessing=PIXELS)


def test_broken_numpy_files_and_missing_arrays_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    with pytest.raises(BlockfitError, match=r"x\.npz: holds no array of images.*it has a$"):
        images(tmp_path / "x.npz", preprocessing=PIXELS)
    with pytest.raises(BlockfitError, match=r"x\.npz: has no array 'b'; it has a"):
        images(tmp_path / "x.npz", preprocessing=PIXELS, image_column="b")
    np.save(tmp_path / "y.npy", pictures(3))
    whole = (tmp_path / "y.npy").read_bytes()
    for content in (b"", b"no array", whole[:90], whole[:-5]):
        (tmp_path / "y.npy").write_bytes(content)
        with pytest.raises(BlockfitError, match=r"cannot read .*y\.npy"):
            images(tmp_path / "y.npy", preprocessing=PIXELS)
