"""Where pictures lie: files, tables, arrays and other people's data sets, each read by position.

A ``Records`` value knows how many pictures there are, their names and labels, and reads one at a
time; ``data.Images`` draws, decodes, prepares and batches.
"""

from __future__ import annotations

import glob
import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blockfit.decode import IMAGE_SUFFIXES, Unreadable
from blockfit.errors import BlockfitError

Picture = bytes | str | Path | Image.Image | np.ndarray | Tensor
"""What ``Records.read`` returns: something to decode, or a tensor that is already prepared."""

_SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
_LABEL_NAMES = ("label", "labels", "fine_label", "target", "class", "cls")


@dataclass(frozen=True, eq=False)
class Records:
    """Pictures that can be read by position; a plain value that worker processes receive.

    Args:
        source: where they come from, for people.
        size: how many there are.
        read: picture and label (or ``None``) at a position; raises ``Unreadable``.
        names: of the pictures; the source and the position by default.
        class_names: in the order of the labels, where known.
        columns: the columns of a table that are used.
        prepared: whether ``read`` returns tensors that the model takes as they are.
    """

    source: str
    size: int
    read: Callable[[int], tuple[Picture, int | None]]
    names: list[str] | None = None
    class_names: list[str] | None = None
    columns: dict[str, str] = field(default_factory=dict)
    prepared: bool = False

    def name(self, position: int) -> str:
        """What to call the picture at a position."""
        return f"{self.source}[{position}]" if self.names is None else self.names[position]


@dataclass(frozen=True, eq=False)
class _Files:
    paths: list[str]
    labels: list[int] | None = None

    def __call__(self, position: int) -> tuple[Picture, int | None]:
        return Path(self.paths[position]), self.labels[position] if self.labels else None


@dataclass(frozen=True, eq=False)
class _Table:
    dataset: Any
    image: str
    label: str | None
    numbers: dict[str, int]  # of the class names, where labels are texts

    def __call__(self, position: int) -> tuple[Picture, int | None]:
        row = self.dataset[position]
        label: Any = row[self.label] if self.label else None
        label = self.numbers.get(label, label)
        return _cell(row[self.image]), None if label in (None, -1) else int(label)


@dataclass(frozen=True, eq=False)
class _Arrays:
    images: np.ndarray | Tensor
    labels: Tensor | None

    def __call__(self, position: int) -> tuple[Picture, int | None]:
        return self.images[position], None if self.labels is None else int(self.labels[position])


@dataclass(frozen=True, eq=False)
class _Items:
    items: Any
    image: str | None
    label: str | None

    def __call__(self, position: int) -> tuple[Picture, int | None]:
        picture, label = _split_item(self.items[position], self.image, self.label)
        whole = isinstance(label, int | np.integer) or (
            isinstance(label, Tensor) and label.ndim == 0
        )
        return picture, int(label) if whole else None


def from_path(
    source: str, image_column: str | None, label_column: str | None, split: str | None
) -> Records:
    """A file, a folder, a pattern, a data set on disk or a Hub data set id."""
    path = Path(source).expanduser()
    if not path.exists() and split is None and re.search(r"[^:/\\]:[\w.-]+$", source):
        source, _, split = source.rpartition(":")
        path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path, image_column, label_column, split)
    if path.is_file():
        return from_files([path], image_column, label_column, split)
    if any(sign in source for sign in "*?["):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        if not found:
            raise BlockfitError(f"no file matches {source}")
        return from_files(found, image_column, label_column, split)
    if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source):
        return _from_hub(source, image_column, label_column, split)
    raise BlockfitError(f"there is no file or folder {source}")


def from_files(
    paths: Sequence[str | Path],
    image_column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
) -> Records:
    """Image files, or parquet or arrow files, in the order given."""
    files = [Path(p).expanduser() for p in paths]
    source = str(files[0]) if len(files) == 1 else f"{files[0]} … ({len(files)} files)"
    suffixes = {file.suffix.lower() for file in files}
    if suffixes <= {".parquet", ".arrow"} and len(suffixes) == 1:
        return _from_tables(files, suffixes.pop(), source, image_column, label_column)
    if split is not None or image_column is not None or label_column is not None:
        raise BlockfitError(f"{source}: image files have neither columns nor splits")
    names = [str(file) for file in files]
    return Records(source, len(names), _Files(names), names)


def from_dataset(
    dataset: Any, source: str, image_column: str | None, label_column: str | None
) -> Records:
    """A ``datasets.Dataset``; its image and label columns are found by their types."""
    library = _datasets()
    image, label = _columns(dataset.features, source, image_column, label_column)
    dataset = dataset.with_format(None).select_columns([image, label] if label else [image])
    if isinstance(dataset.features[image], library.Image):
        dataset = dataset.cast_column(image, library.Image(decode=False))
    names = getattr(dataset.features[label], "names", None) if label else None
    numbers = {}
    if label and dataset.features[label].dtype == "string":
        names = sorted(name for name in dataset.unique(label) if name is not None)
        numbers = {name: number for number, name in enumerate(names)}
    columns = {"image": image, **({"label": label} if label else {})}
    read = _Table(dataset, image, label, numbers)
    return Records(source, len(dataset), read, None, names, columns)


def from_arrays(images: np.ndarray | Tensor, labels: Any = None) -> Records:
    """uint8 arrays (N, H, W) or (N, H, W, C), or tensors (N, C, H, W) that are already prepared."""
    numbers = None if labels is None else torch.as_tensor(labels).to(torch.int64)
    if numbers is not None and numbers.shape != (len(images),):
        raise BlockfitError(f"{len(images)} images, but labels of shape {tuple(numbers.shape)}")
    kind = f"{type(images).__name__} {tuple(images.shape)}"
    if isinstance(images, Tensor):
        if images.ndim != 4 or not images.is_floating_point():
            raise BlockfitError(
                "tensors are taken as already prepared: floats (images, channels, height, width); "
                f"got {images.dtype} {tuple(images.shape)}; give raw pictures as a NumPy array "
                "(images, height, width, channels) of uint8"
            )
    elif images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise BlockfitError(
            "an array of pictures must be uint8 (images, height, width[, channels]); got "
            f"{images.dtype} {images.shape}; give already prepared images as a torch tensor"
        )

    read = _Arrays(images, numbers)
    return Records(kind, len(images), read, prepared=isinstance(images, Tensor))


def from_items(
    items: Any, source: str, image_key: str | None = None, label_key: str | None = None
) -> Records:
    """A sequence of pictures, (picture, label) pairs or dictionaries: lists, torchvision's sets."""
    names = getattr(items, "classes", None)
    names = [str(name) for name in names] if isinstance(names, list | tuple) else None
    return Records(source, len(items), _Items(items, image_key, label_key), None, names)


def _split_item(item: Any, image_key: str | None, label_key: str | None) -> tuple[Any, Any]:
    """One item of a data set as picture and label (or ``None``)."""
    if isinstance(item, Mapping):
        image = image_key or next((k for k in ("image", "img", "pixel_values") if k in item), None)
        if image not in item:
            raise BlockfitError(f"no image among the keys {', '.join(map(str, item))}")
        label = label_key or next((k for k in _LABEL_NAMES if k in item), None)
        return item[image], None if label is None else item[label]
    if isinstance(item, list | tuple):
        return item[0], item[1] if len(item) > 1 else None
    return item, None


def _from_folder(
    folder: Path, image_column: str | None, label_column: str | None, split: str | None
) -> Records:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        loaded = _datasets().load_from_disk(str(folder))
        return from_dataset(*one_split(loaded, str(folder), split), image_column, label_column)
    found = _files_in(folder)
    pictures = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
    if not pictures:
        if any(path.suffix.lower() in (".parquet", ".arrow") for path in found):
            return _from_hub(str(folder), image_column, label_column, split)
        raise BlockfitError(f"{folder} holds no images (and no parquet or arrow files)")
    if split is not None or image_column is not None or label_column is not None:
        raise BlockfitError(f"{folder}: a folder of images has neither columns nor splits")
    names = [str(path) for path in pictures]
    parents = [path.relative_to(folder).parts[0] for path in pictures]
    classes = sorted(set(parents))
    if any(path.parent == folder for path in pictures) or len(classes) < 2:
        return Records(str(folder), len(names), _Files(names), names)
    if _SPLIT_NAMES.issuperset(name.lower() for name in classes):
        raise BlockfitError(f"{folder} holds the splits {', '.join(classes)}; give one of them")
    number = {name: i for i, name in enumerate(classes)}
    labels = [number[parent] for parent in parents]
    return Records(str(folder), len(names), _Files(names, labels), names, classes)


def _files_in(folder: Path) -> list[Path]:
    """All files below, sorted; hidden ones left out, links followed, circles cut."""
    found, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        folders[:] = [] if real in seen else [f for f in folders if not f.startswith(".")]
        if real not in seen:
            found += [Path(root, file) for file in files if not file.startswith(".")]
        seen.add(real)
    return sorted(found)


def _from_tables(
    files: Sequence[Path],
    suffix: str,
    source: str,
    image_column: str | None,
    label_column: str | None,
) -> Records:
    library = _datasets()
    try:
        if suffix == ".parquet":
            dataset = library.Dataset.from_parquet([str(file) for file in files])
        else:
            parts = [library.Dataset.from_file(str(file)) for file in files]
            dataset = library.concatenate_datasets(parts)
    except Exception as error:  # datasets and pyarrow share no base class of errors
        cause = error.__cause__ or error
        raise BlockfitError(f"cannot read {source}: {_first_line(cause)}") from error
    return from_dataset(dataset, source, image_column, label_column)


def _from_hub(
    name: str, image_column: str | None, label_column: str | None, split: str | None
) -> Records:
    library = _datasets()
    try:
        loaded = library.load_dataset(name)
    except Exception as error:  # datasets and the Hub's client share no base class of errors
        if Path(name).is_dir():
            raise BlockfitError(f"cannot read the data set {name}: {_first_line(error)}") from error
        raise BlockfitError(
            f"there is no file or folder {name}, and the Hub gives no data set of that name "
            f"({_first_line(error)}); where there is no network, download it elsewhere "
            f"(hf download {name} --repo-type dataset --local-dir FOLDER) and give FOLDER"
        ) from error
    return from_dataset(*one_split(loaded, name, split), image_column, label_column)


def one_split(loaded: Any, source: str, split: str | None) -> tuple[Any, str]:
    if not isinstance(loaded, Mapping):
        if split is not None:
            raise BlockfitError(f"{source} has no splits; leave {split!r} away")
        return loaded, source
    if split is None and len(loaded) == 1:
        (split,) = loaded
    if split not in loaded:
        said = "say which" if split is None else f"there is no {split!r}"
        raise BlockfitError(
            f"{source} has the splits {', '.join(loaded)}; {said}, as in "
            f"{source}:{next(iter(loaded))}"
        )
    return loaded[split], f"{source}:{split}"


def _columns(
    features: Mapping[str, Any], source: str, image_column: str | None, label_column: str | None
) -> tuple[str, str | None]:
    for given in (image_column, label_column):
        if given is not None and given not in features:
            raise BlockfitError(f"{source} has no column {given!r}; it has {', '.join(features)}")
    library = _datasets()
    images = [n for n, f in features.items() if isinstance(f, library.Image)] or [
        n for n, f in features.items() if _holds_bytes(f)
    ]
    image = image_column or _preferred(images, ("image", "img", "jpg", "png"))
    if image is None:
        said = f"several image columns, {', '.join(images)}" if images else "no image column"
        raise BlockfitError(
            f"{source} has {said}; name it with image_column= (--image-column); "
            f"the columns are {', '.join(features)}"
        )
    labels = [n for n, f in features.items() if isinstance(f, library.ClassLabel)] or [
        n for n, f in features.items() if n in _LABEL_NAMES and "int" in getattr(f, "dtype", "")
    ]
    return image, label_column or _preferred(labels, _LABEL_NAMES)


def _preferred(found: Sequence[str], names: Sequence[str]) -> str | None:
    if len(found) == 1:
        return found[0]
    return next((name for name in names if name in found), None)


def _holds_bytes(feature: Any) -> bool:
    if isinstance(feature, Mapping):
        return "bytes" in feature
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _cell(value: Any) -> Picture:
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise Unreadable("the cell is empty")
    return value if isinstance(value, bytes | str | Image.Image) else np.asarray(value)


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise BlockfitError(
            'datasets is not installed; pip install "blockfit[datasets]"'
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
