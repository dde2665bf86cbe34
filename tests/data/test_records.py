"""Pictures in files, folders, tables and data sets are found, named and labelled."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import PIXELS, encoded, folder_of, grey, labels, levels, table
from PIL import Image
from torch import Tensor, nn

from blockfit.data.images import images
from blockfit.errors import BlockfitError


def test_a_folder_per_class_gives_labels_in_the_order_of_the_names(tmp_path: Path) -> None:
    for start, name in enumerate(("zebra", "ant", "bee")):
        folder_of(tmp_path / name / "deeper", start + 1)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "ant" / ".hidden.png").write_bytes(b"")
    data = images(tmp_path, preprocessing=PIXELS)
    assert data.class_names == ["ant", "bee", "zebra"]
    assert labels(data) == [0, 0, 1, 1, 1, 2]


def test_a_flat_folder_and_a_single_subfolder_have_no_labels(tmp_path: Path) -> None:
    folder_of(tmp_path / "one", 3)
    assert labels(images(tmp_path, preprocessing=PIXELS)) is None
    folder_of(tmp_path, 4)
    data = images(tmp_path, preprocessing=PIXELS)
    assert labels(data) is None
    assert len(data) == 7


def test_a_folder_of_splits_asks_for_one_of_them(tmp_path: Path) -> None:
    folder_of(tmp_path / "train" / "ant", 1)
    folder_of(tmp_path / "val" / "ant", 1)
    with pytest.raises(BlockfitError, match="holds the splits train, val; give one of them"):
        images(tmp_path, preprocessing=PIXELS)


def test_files_come_as_one_a_list_or_a_pattern(tmp_path: Path) -> None:
    folder_of(tmp_path, 12)
    one = images(tmp_path / "004.png", preprocessing=PIXELS)
    assert (levels(one), next(one.batches()).names) == ([4], [str(tmp_path / "004.png")])
    several = [tmp_path / "009.png", str(tmp_path / "002.png")]
    assert levels(images(several, preprocessing=PIXELS)) == [9, 2]
    assert levels(images(str(tmp_path / "01*.png"), preprocessing=PIXELS)) == [10, 11]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/at/all", "there is no file or folder /nowhere/at/all"),
        ("/nowhere/*.png", "no file matches"),
        ([], "the list holds no images"),
        (np.zeros((0, 4, 4, 3), np.uint8), "holds no images"),
        (torch.zeros(0, 3, 4, 4), "holds no images"),
        (np.zeros((2, 4, 4, 3)), r"must be uint8 .* give already prepared images as a torch"),
        (np.zeros((4, 4), np.uint8), "must be uint8"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "taken as already prepared: floats"),
        (torch.zeros(3, 4, 4), "taken as already prepared"),
        (7, "a int is no source of images"),
        ({"a": 1}, "a dict is no source of images"),
        ((torch.zeros(1, 3, 4, 4) for _ in range(2)), "can be walked only once"),
        ([object(), object()], "cannot be read"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else type(value).__name__,
)
def test_what_gives_no_images_is_one_sentence(source: Any, message: str) -> None:
    with pytest.raises(BlockfitError, match=message) as caught:
        list(images(source, preprocessing=PIXELS))
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(BlockfitError, match=f"{tmp_path} holds no images"):
        images(tmp_path, preprocessing=PIXELS)


def test_without_a_model_and_a_preprocessing_it_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(BlockfitError, match="give the model, or preprocessing="):
        images(folder_of(tmp_path, 1))
    with pytest.raises(BlockfitError, match="Linear does not say"):
        images(tmp_path, nn.Linear(2, 2))


def test_neighbours_of_another_size_begin_a_new_batch(tmp_path: Path) -> None:
    """Case 15: pictures whose aspect ratio is kept come in batches of one size each."""
    sizes = (8, 9, 9, 8, 8)
    for i, size in enumerate(sizes):
        (tmp_path / f"{i}.png").write_bytes(encoded(grey(i, size)))

    def whole(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    data = images(tmp_path, preprocessing=whole, batch_size=4)
    found = [(b.number, b.places, len(b.names), b.inputs.shape[-1]) for b in data.batches()]
    assert found == [(0, [0], 1, 8), (1, [1, 2], 2, 9), (3, [3], 1, 8), (4, [4], 1, 8)]
    assert [batch.number for batch in data.batches(start=2)] == [2, 3, 4]  # from the middle of one
    assert data.description()["preprocessing"] == "custom"


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved folder", "object"])
def test_tables_are_read_and_their_columns_found_by_type(kind: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    source: Any = table(20, broken=5, number=datasets.Value("int64"))
    if kind == "parquet":
        source.to_parquet(tmp_path / "x.parquet")
        source = tmp_path / "x.parquet"
    elif kind != "object":
        source.save_to_disk(tmp_path / "x")
        source = tmp_path / "x" if kind == "saved folder" else next(tmp_path.rglob("*.arrow"))
    data = images(source, preprocessing=PIXELS, workers=0)
    assert levels(data) == [i for i in range(20) if i != 5]
    assert labels(data) == [i % 3 for i in range(20) if i != 5]
    assert data.class_names == ["bee", "ant", "fly"]
    assert data.description()["columns"] == {"image": "picture", "label": "kind"}
    assert len(data.skipped) == 1
    assert data.skipped[0].endswith("[5]")


def test_a_table_written_without_datasets_is_read_by_its_bytes(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = {
        "jpg": [encoded(grey(i)) for i in range(4)],
        "label": [3, 1, 2, -1],
        "text": ["a", "b", "c", "d"],
    }
    parquet.write_table(pyarrow.table(rows), tmp_path / "x.parquet")
    data = images(tmp_path / "x.parquet", preprocessing=PIXELS, batch_size=3)
    assert levels(data) == [0, 1, 2, 3]
    first, second = data.batches()
    assert first.labels is not None
    assert first.labels.tolist() == [3, 1, 2]
    assert second.labels is None  # −1 is how data sets write "unknown"
    texts = images(tmp_path / "x.parquet", preprocessing=PIXELS, label_column="text")
    assert (labels(texts), texts.class_names) == ([0, 1, 2, 3], ["a", "b", "c", "d"])


def test_a_column_of_texts_that_is_called_label_holds_labels() -> None:
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": encoded(grey(i)), "path": None} for i in range(3)]
    rows = datasets.Dataset.from_dict({"image": cells, "label": ["fly", "ant", "fly"]})
    data = images(rows.cast_column("image", datasets.Image()), preprocessing=PIXELS)
    assert (labels(data), data.class_names) == ([1, 0, 1], ["ant", "fly"])


def test_columns_that_are_not_clear_must_be_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    two = table().add_column("other", [{"bytes": encoded(grey(99)), "path": None}] * 6)
    two = two.cast_column("other", datasets.Image())
    with pytest.raises(BlockfitError, match="several image columns, picture, other; name it"):
        images(two, preprocessing=PIXELS)
    assert levels(images(two, preprocessing=PIXELS, image_column="other")) == [99] * 6
    with pytest.raises(BlockfitError, match=r"no column 'nope'; it has picture, kind"):
        images(table(), preprocessing=PIXELS, label_column="nope")
    lists = table().add_column("many", [[1, 2]] * 6)
    with pytest.raises(BlockfitError, match="'many' holds a list, and a label is a whole number"):
        images(lists, preprocessing=PIXELS, label_column="many")
    with pytest.raises(BlockfitError, match="has no image column"):
        images(table().remove_columns("picture"), preprocessing=PIXELS)


def test_a_folder_with_several_splits_of_tables_asks_for_one(tmp_path: Path) -> None:
    table(6).to_parquet(tmp_path / "train.parquet")
    table(3).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(BlockfitError, match=r"has the splits train, test; say which, as in"):
        images(tmp_path, preprocessing=PIXELS)
    assert len(images(f"{tmp_path}:test", preprocessing=PIXELS)) == 3
    assert len(images(tmp_path, preprocessing=PIXELS, split="train")) == 6
    with pytest.raises(BlockfitError, match="there is no 'dev'"):
        images(tmp_path, preprocessing=PIXELS, split="dev")


def test_a_hub_data_set_that_cannot_be_reached_says_what_to_download() -> None:
    pytest.importorskip("datasets")
    match = r"Hub gives no data set .*hf download nobody/nothing --repo-type dataset --local-dir"
    with pytest.raises(BlockfitError, match=match):
        images("nobody/nothing", preprocessing=PIXELS)


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "x.parquet").write_bytes(b"no table")
    with pytest.raises(BlockfitError, match=r"cannot read .*x\.parquet"):
        images(tmp_path / "x.parquet", preprocessing=PIXELS)


@pytest.mark.parametrize("kind", ["files", "table", "array", "items"])
def test_records_can_be_sent_to_worker_processes(kind: str, tmp_path: Path) -> None:
    sources: dict[str, Callable[[], Any]] = {
        "files": lambda: folder_of(tmp_path, 3),
        "table": lambda: table(3),
        "array": lambda: np.zeros((3, 8, 8), np.uint8),
        "items": lambda: [(grey(i), i) for i in range(3)],
    }
    records = images(sources[kind](), preprocessing=PIXELS).records
    sent = pickle.loads(pickle.dumps(records))  # noqa: S301
    assert sent.size == 3
    assert sent.read(2)[1] == records.read(2)[1]  # type: ignore[union-attr]
