"""Images that somebody else has prepared: arrays, tensors, loaders and re-iterables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import PIXELS, folder_of, grey, labels, levels, stack
from torch.utils.data import DataLoader, TensorDataset

from blockfit.data.images import images
from blockfit.errors import BlockfitError, BlockfitWarning
from blockfit.models.demo import load_demo


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 1), (5, 6, 7, 3)], ids=str)
def test_arrays_of_uint8_are_pictures(shape: tuple[int, ...]) -> None:
    array = np.zeros(shape, np.uint8) + np.arange(5, dtype=np.uint8).reshape(
        -1, *[1] * (len(shape) - 1)
    )
    assert levels(images(array, preprocessing=PIXELS)) == [0, 1, 2, 3, 4]
    paired = images((array, [4, 3, 2, 1, 0]), preprocessing=PIXELS)
    assert labels(paired) == [4, 3, 2, 1, 0]
    with pytest.raises(BlockfitError, match="5 images, but 2 labels; give one label per image"):
        images((array, [1, 2]), preprocessing=PIXELS)


TEXTS: dict[str, Callable[[list[Any], list[Any]], Any]] = {
    "pair of lists": lambda pictures, names: (pictures, names),
    "pair of arrays": lambda pictures, names: (np.stack(pictures), np.array(names)),
    "list of pairs": lambda pictures, names: list(zip(pictures, names, strict=True)),
    "dictionaries": lambda pictures, names: [
        {"image": picture, "label": name} for picture, name in zip(pictures, names, strict=True)
    ],
}


@pytest.mark.parametrize("form", TEXTS)
def test_labels_that_are_texts_are_classes(form: str) -> None:
    pictures = [np.full((8, 8, 3), level, np.uint8) for level in range(4)]
    data = images(TEXTS[form](pictures, ["fly", "ant", "", "fly"]), preprocessing=PIXELS)
    assert (labels(data), data.class_names) == ([1, 0, -1, 1], ["ant", "fly"])


def test_paths_in_arrays_and_tables_are_read_with_their_labels(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    paths = [str(folder_of(tmp_path, 3) / f"00{level}.png") for level in (2, 0, 1)]
    frame = pandas.DataFrame({"path": paths, "label": ["fly", None, "ant"]})
    for source in (frame, (frame["path"], frame["label"]), (np.array(paths), ["fly", None, "ant"])):
        data = images(source, preprocessing=PIXELS)
        assert (levels(data), labels(data)) == ([2, 0, 1], [1, -1, 0])
        assert next(data.batches()).names == paths
    assert levels(images(np.array(paths), preprocessing=PIXELS)) == [2, 0, 1]


def test_labels_in_one_column_count_and_those_of_several_are_refused() -> None:
    array = np.zeros((3, 8, 8), np.uint8)
    assert labels(images((array, np.array([[2], [0], [1]])), preprocessing=PIXELS)) == [2, 0, 1]
    with pytest.raises(BlockfitError, match="the labels have 5 values per image"):
        images((array, np.eye(5)[:3]), preprocessing=PIXELS)


def test_texts_of_a_data_set_without_classes_are_told_of() -> None:
    class Named:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, position: int) -> Any:
            return grey(position), "ant"

    with pytest.warns(BlockfitWarning, match="are texts such as 'ant' and are not used"):
        assert labels(images(Named(), preprocessing=PIXELS)) is None


def test_one_picture_is_no_stack_of_grey_ones() -> None:
    with pytest.raises(BlockfitError, match="is one image with its channels last"):
        images(np.zeros((8, 9, 3), np.uint8), preprocessing=PIXELS)


class Batches:
    """A re-iterable that knows no length, as a user writes one."""

    def __init__(self, *items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def pairs() -> TensorDataset:
    return TensorDataset(stack(20), torch.arange(20) % 4)


STREAMS: dict[str, Callable[[], Any]] = {
    "tensor": lambda: (stack(20), torch.arange(20) % 4),
    "loader": lambda: DataLoader(pairs(), batch_size=3),
    "shuffled loader": lambda: DataLoader(pairs(), batch_size=3, shuffle=True),
    "loader with workers": lambda: DataLoader(pairs(), batch_size=3, num_workers=1),
    "data set": pairs,
    "list of batches": lambda: list(DataLoader(pairs(), batch_size=3)),
    "list of images": lambda: [pairs()[i] for i in range(20)],
    "re-iterable of batches": lambda: Batches(*DataLoader(pairs(), batch_size=3)),
    "re-iterable of images": lambda: Batches(*[pairs()[i] for i in range(20)]),
    "dictionaries": lambda: Batches(
        *[{"pixel_values": x, "labels": y} for x, y in DataLoader(pairs(), batch_size=3)]
    ),
    "list of single dictionaries": lambda: [
        {"pixel_values": x, "label": int(y)} for x, y in (pairs()[i] for i in range(20))
    ],
}


@pytest.mark.parametrize("name", STREAMS)
def test_prepared_images_come_from_anything_that_can_be_walked_again(name: str) -> None:
    source = STREAMS[name]()
    data = images(source, batch_size=4)
    assert len(data) == 20
    assert levels(data) == list(range(20))
    assert labels(data) == [i % 4 for i in range(20)]
    drawn = images(source, limit=9, seed=1, batch_size=4)
    found = levels(drawn)
    assert len(set(found)) == 9 == len(drawn)
    assert max(found) > 12
    assert labels(drawn) == [level % 4 for level in found]
    assert levels(drawn) == found
    fit, held_out = drawn.split(0.33)
    assert sorted(levels(fit) + levels(held_out)) == sorted(found)
    assert sum(len(batch.names) for batch in fit.batches()) == len(fit)


def test_prepared_images_take_no_preprocessing() -> None:
    with pytest.raises(BlockfitError, match="prepared already; leave preprocessing= out"):
        images(stack(3), preprocessing=PIXELS)
    assert images(stack(3)).description()["preprocessing"] == "none, tensors as given"


def test_pillow_images_and_pairs_by_position_are_prepared() -> None:
    pictures = [grey(level) for level in (3, 1, 2)]
    assert levels(images(pictures, preprocessing=PIXELS)) == [3, 1, 2]
    both = [(picture, i) for i, picture in enumerate(pictures)]
    assert labels(images(both, preprocessing=PIXELS)) == [0, 1, 2]
    rows = [{"image": picture, "label": 5} for picture in pictures]
    data = images(rows, preprocessing=PIXELS)
    assert (levels(data), labels(data)) == ([3, 1, 2], [5, 5, 5])


def test_text_batches_pass_through_whole() -> None:
    tokens = [{"input_ids": torch.ones(2, 5, dtype=torch.long) * i} for i in range(3)]
    found = list(images(Batches(*tokens), limit=3))
    assert sum(len(batch["input_ids"]) for batch in found) == 3  # type: ignore[index]


def test_what_was_given_is_called_by_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(BlockfitError, match="1 or more of 1 images of pictures and labels cannot"):
        next(iter(images(([tmp_path / "0.png"], [0]), load_demo(), preprocessing=8)))
