"""Data sets of ``datasets`` that have a transform of the user's own, or that are streamed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blockfit.data.decode import Unreadable
from blockfit.data.loaders import Stream, stream_of
from blockfit.data.records import (
    LABEL_NAMES,
    Columns,
    Picture,
    Records,
    numbered,
    used,
    whole_number,
    why_unused,
)
from blockfit.errors import BlockfitError

BUFFER = 1000
"""Rows at least among which those of a stream are drawn."""

_IMAGE_NAMES = ("pixel_values", "image", "img", "jpg", "png", "picture", "photo")


def is_streamed(dataset: Any) -> bool:
    """Whether rows come in order only, as of a data set that was opened with ``streaming=True``."""
    return not hasattr(dataset, "__len__")


def is_transformed(dataset: Any) -> bool:
    """Whether the user has given rows a transform (``with_transform``, ``set_transform``)."""
    return bool(dataset.format["type"] == "custom")


def from_transformed(dataset: Any, source: str, asked: Columns) -> Records | Stream:
    """A data set as its transform shows it: prepared tensors, or pictures to be prepared.

    Where a row holds several tensors beside the label and the columns of the data set, all of them
    go to the model by name.

    Raises:
        BlockfitError: where a row holds no image.
    """
    row = dataset[0]
    image, label = _names_in(row, dataset.features, source, asked)
    names = _class_names(dataset.features, label)
    more = [
        k for k, v in row.items() if isinstance(v, Tensor) and v.ndim and k not in (image, label)
    ]
    if image == "pixel_values" and set(more) - {*dataset.features}:
        made = stream_of(DataLoader(_Rows(dataset, [image, *more], label)))
        assert made is not None
        return Stream(source, made.size, made.items, True, names)
    read = _Transformed(dataset, image, label)
    prepared, unused = _is_prepared(row[image]), why_unused([row[label]] if label else [])
    columns = used(image, label)
    return Records(
        source, len(dataset), read, None, names, columns, prepared=prepared, unused=unused
    )


def from_stream(dataset: Any, source: str, asked: Columns, limit: int | None, seed: int) -> Records:
    """A streamed data set, walked once to count it; pictures are read in their order.

    With a limit, that many rows are drawn by ``datasets``' own shuffling: shards in random order,
    and rows among the next ``BUFFER`` or four times the limit.

    Raises:
        BlockfitError: where a row holds no image.
    """
    if limit is not None:
        dataset = dataset.shuffle(seed=seed, buffer_size=max(BUFFER, 4 * limit)).take(limit)
        source = f"{source} (streamed, {limit} rows drawn with seed {seed})"
    row = next(iter(dataset), None)
    if row is None:
        raise BlockfitError(f"{source} holds no rows; give a data set that has some")
    image, label = _names_in(row, dataset.features, source, asked)
    prepared = _is_prepared(row[image])
    dataset = _undecoded(dataset.with_format(None), image)
    found = [one[label] if label else None for one in dataset]
    labels, texts = numbered([_label(one) for one in found])
    names = _class_names(dataset.features, label) or texts
    return Records(
        source, len(found), _InOrder(dataset, image, labels), None, names, used(image, label),
        prepared, labels=labels if label else None, own_numbers=texts is None, in_order=True,
        unused=why_unused(found),
    )  # fmt: skip


def _undecoded(dataset: Any, image: str) -> Any:
    """The same with the image column as bytes, where that is known to be one."""
    from datasets import Image as ImageFeature

    if dataset.features is not None and isinstance(dataset.features.get(image), ImageFeature):
        return dataset.cast_column(image, ImageFeature(decode=False))
    return dataset


@dataclass(frozen=True, eq=False)
class _Transformed:
    dataset: Any
    image: str
    label: str | None

    def __call__(self, position: int) -> tuple[Picture, int | None]:
        row = self.dataset[position]
        label = whole_number(row[self.label]) if self.label else None
        return _picture(row[self.image]), label


@dataclass(frozen=True, eq=False)
class _Rows(Dataset[dict[str, Any]]):
    """The tensors of each row and its label, for a ``DataLoader``."""

    dataset: Any
    keys: list[str]
    label: str | None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = self.dataset[position]
        number = whole_number(row[self.label]) if self.label else None
        label = {"labels": -1 if number is None else number} if self.label else {}
        return {**{key: row[key] for key in self.keys}, **label}


@dataclass(eq=False)
class _InOrder:
    """Reads rows by position; one that lies before the last one begins a new walk."""

    dataset: Any
    image: str
    labels: list[int | None]
    _rows: Iterator[Any] | None = None
    _next: int = field(default=0)

    def __call__(self, position: int) -> tuple[Picture, int | None]:
        if self._rows is None or position < self._next:
            self._rows, self._next = iter(self.dataset), 0
        for row in self._rows:
            self._next += 1
            if self._next > position:
                return _picture(row[self.image]), self.labels[position]
        raise BlockfitError(
            f"the streamed data set ended after {self._next} rows and had more before; give one "
            "that gives the same rows in every walk"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None, "_next": 0}  # every process walks by itself


def _names_in(
    row: Mapping[str, Any], features: Any, source: str, asked: Columns
) -> tuple[str, str | None]:
    """The keys of a row's image and label."""
    for given in asked[:2]:
        if given is not None and given not in row:
            raise BlockfitError(f"{source} has no column {given!r}; it has {', '.join(row)}")
    pictures = [key for key, value in row.items() if _is_picture(value)]
    usual = [key for key in _IMAGE_NAMES if key in pictures]
    image = asked.image or next(iter(usual or pictures), None)
    if image is None:
        raise BlockfitError(
            f"{source}: a row holds no image among {', '.join(row)}; name it with image_column="
        )
    named = [key for key in row if _class_names(features, key) is not None]
    usual = [key for key in LABEL_NAMES if key in (named or row)]
    return image, asked.label or next(iter(named if len(named) == 1 else usual), None)


def _is_picture(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "bytes" in value
    return isinstance(value, Image.Image) or (
        isinstance(value, Tensor | np.ndarray) and value.ndim >= 2
    )


def _is_prepared(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return bool(np.issubdtype(value.dtype, np.floating))
    return isinstance(value, Tensor) and value.is_floating_point()


def _picture(value: Any) -> Picture:
    if isinstance(value, Mapping):
        if value.get("bytes") is None and not Path(str(value.get("path"))).exists():
            return _fetched(value)
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if value is None:
        raise Unreadable("the cell is empty")
    if _is_prepared(value):
        return torch.as_tensor(value).to(torch.float32)
    if isinstance(value, Tensor):  # uint8 (channels, height, width)
        value = value.permute(1, 2, 0).numpy() if value.ndim == 3 else value.numpy()
    return value if isinstance(value, bytes | str | Image.Image) else np.asarray(value)


def _fetched(value: Mapping[str, Any]) -> Picture:
    """The picture at a path that ``datasets`` alone can open: in an archive, on a server."""
    from datasets import Image as ImageFeature

    try:
        picture: Image.Image = ImageFeature().decode_example(dict(value))
    except Exception as error:  # whatever the server, the archive or Pillow raise
        raise Unreadable(f"{type(error).__name__}: {error}") from error
    return picture


def _label(value: Any) -> int | str | None:
    return value if isinstance(value, str) else whole_number(value)


def _class_names(features: Any, label: str | None) -> list[str] | None:
    names = getattr((features or {}).get(label), "names", None)
    return None if names is None else [str(name) for name in names]
