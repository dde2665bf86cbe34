"""Pictures that are read by position, wherever they lie, and those that are in memory already.

A ``Records`` value knows how many pictures there are, their names and labels, and reads one at a
time; ``data.Images`` draws, decodes, prepares and batches.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from blockfit.errors import BlockfitError, tell

Picture = bytes | str | Path | Image.Image | np.ndarray | Tensor
"""What ``Records.read`` returns: something to decode, or a tensor that is already prepared."""

SPLIT_NAMES = frozenset(("train", "training", "val", "valid", "validation", "test", "testing"))
_UNKNOWN = ("", "-1", "nan", "NaN", "None", "<NA>")
LABEL_NAMES = ("label", "labels", "fine_label", "target", "class", "cls")
PATH_NAMES = ("path", "file", "filename", "file_name", "filepath", "image_path")


class Columns(NamedTuple):
    """What to read of a table, an archive or shards; what is ``None`` is found.

    Args:
        image: column, array or ending of the pictures.
        label: the same of their labels.
        split: one of several parts.
    """

    image: str | None = None
    label: str | None = None
    split: str | None = None

    @property
    def named(self) -> bool:
        """Whether a column was named."""
        return self.image is not None or self.label is not None


UNNAMED = Columns()
"""Everything is found."""


def split_in(name: str) -> str | None:
    """The split that a name speaks of: ``train`` of ``x_train``, ``val`` of ``val/000.tar``."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((word for word in words if word in SPLIT_NAMES), None)


def used(image: str, label: str | None) -> dict[str, str]:
    """The columns that were read, as ``Records`` has them."""
    return {"image": image, **({"label": label} if label else {})}


@dataclass(frozen=True, eq=False)
class Records:
    """Pictures that can be read by position; a plain value that worker processes receive.

    Args:
        read: picture and label (or ``None``) at a position; raises ``Unreadable``.
        names: of the pictures; the source and the position by default.
        class_names: in the order of the labels, where known.
        columns: the columns of a table that are used.
        prepared: whether ``read`` returns tensors that the model takes as they are.
        labels: of all pictures, where they are known without reading them.
        own_numbers: whether the labels' numbers are the data set's own; else they number the sorted
            ``class_names``.
        unit: what carries a label, such as ``folders``.
        left_out: name and reason of each picture that was found but does not count.
        unused: why labels that are there are not used.
        in_order: whether pictures are best read in their order.
    """

    source: str
    size: int
    read: Callable[[int], tuple[Picture, int | None]]
    names: Sequence[str] | None = None
    class_names: list[str] | None = None
    columns: dict[str, str] = field(default_factory=dict)
    prepared: bool = False
    labels: Sequence[int | None] | None = None
    own_numbers: bool = True
    unit: str = "classes"
    left_out: Sequence[tuple[str, str]] = ()
    in_order: bool = False
    unused: str = ""

    def name(self, position: int) -> str:
        """What to call the picture at a position."""
        return f"{self.source}[{position}]" if self.names is None else self.names[position]


@dataclass(frozen=True, eq=False)
class _Files:
    paths: list[str]
    labels: list[int | None] | None = None

    def __call__(self, position: int) -> tuple[Picture, int | None]:
        return Path(self.paths[position]), self.labels[position] if self.labels else None


@dataclass(frozen=True, eq=False)
class _Arrays:
    images: np.ndarray | Tensor
    labels: Sequence[int | None] | None

    def __call__(self, position: int) -> tuple[Picture, int | None]:
        return self.images[position], None if self.labels is None else self.labels[position]


@dataclass(frozen=True, eq=False)
class _Items:
    items: Any
    image: str | None
    label: str | None
    class_names: list[str] | None = None
    labels: Sequence[int | None] | None = None

    def __call__(self, position: int) -> tuple[Picture, int | None]:
        picture, label = _split_item(self.items[position], self.image, self.label)
        if self.labels is not None:
            return picture, self.labels[position]
        if isinstance(label, str) and self.class_names and label in self.class_names:
            return picture, self.class_names.index(label)
        return picture, whole_number(label)


SEVERAL = "the labels hold several values per image and are not used; a label is one class"
"""Why the labels of multi-label and detection data, and soft ones, count in nothing."""


FRACTIONS = "the labels are fractions and are not used; a label is the number or name of a class"
"""Why the values of regression count in nothing."""


def holds_several(label: Any) -> bool:
    """Whether a label is a list, a dictionary or an array of more than one value."""
    if isinstance(label, Tensor | np.ndarray):
        return bool(label.ndim) and math.prod(label.shape) != 1
    return isinstance(label, Mapping) or (isinstance(label, list | tuple) and len(label) != 1)


def why_unused(labels: Iterable[Any]) -> str:
    """``Records.unused``: ``SEVERAL`` where one of the labels is no single value."""
    return SEVERAL if any(map(holds_several, labels)) else ""


def whole_number(value: Any) -> int | None:
    """A label as a number; ``None`` for what is none: NaN, texts, −1 ("unknown" in data sets)."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return int(value) if isinstance(value, int | np.integer) and value >= 0 else None


def from_pictures(
    paths: Sequence[Path],
    source: str,
    labels: Sequence[int | str | None] | None = None,
    class_names: Sequence[str] = (),
) -> Records:
    """Image files in the order given, with the label of each where known.

    ``class_names`` are names beside those of ``labels``, of classes without pictures.
    """
    names = [str(path) for path in paths]
    numbers, known = numbered(labels, class_names) if labels else (None, None)
    read = _Files(names, numbers)
    return Records(
        source, len(names), read, names, known, labels=numbers, own_numbers=known is None
    )


def from_arrays(images: np.ndarray | Tensor, labels: Any = None) -> Records:
    """uint8 arrays (N, H, W) or (N, H, W, C), or tensors (N, C, H, W) that are already prepared."""
    numbers, names = (None, None) if labels is None else numbered(_listed(labels, len(images)))
    kind = f"{type(images).__name__} {tuple(images.shape)}"
    if isinstance(images, Tensor):
        if images.ndim != 4 or not images.is_floating_point():
            raise BlockfitError(
                "tensors are taken as already prepared: floats (images, channels, height, width); "
                f"got {images.dtype} {tuple(images.shape)}; give raw images as a NumPy array "
                "(images, height, width, channels) of uint8"
            )
    elif images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise BlockfitError(
            "an array of images must be uint8 (images, height, width[, channels]); got "
            f"{images.dtype} {images.shape}; give already prepared images as a torch tensor"
        )
    elif images.ndim == 3 and images.shape[2] in (3, 4) and min(images.shape[:2]) > 4:
        raise BlockfitError(
            f"an array {images.shape} is one image with its channels last; give it in a list"
        )
    read, prepared, own = _Arrays(images, numbers), isinstance(images, Tensor), names is None
    return Records(
        kind, len(images), read, None, names, prepared=prepared, labels=numbers, own_numbers=own
    )


def from_items(items: Any, source: str, asked: Columns = UNNAMED) -> Records:
    """A sequence of pictures, (picture, label) pairs or dictionaries: lists, torchvision's sets.

    Of a list all labels are looked at: they may be texts. Of a data set the first one alone.
    """
    names = class_names_of(items)
    if not isinstance(items, list | tuple) or names is not None:
        first = _split_item(items[0], asked.image, asked.label)[1] if names is None else None
        if isinstance(first, str):
            tell(
                [
                    f"the labels of {source} are texts such as {first!r} and are not used, for it "
                    "has no list of classes; give it the attribute classes, or whole numbers"
                ]
            )
        read = _Items(items, asked.image, asked.label, names)
        return Records(source, len(items), read, None, names, unused=why_unused([first]))
    pairs = [_split_item(item, asked.image, asked.label) for item in items]
    numbers, names = numbered([label for _, label in pairs])
    if all(isinstance(picture, str | Path) for picture, _ in pairs):
        given = None if set(numbers) == {None} else [label for _, label in pairs]
        return from_pictures([Path(picture).expanduser() for picture, _ in pairs], source, given)
    read = _Items(items, asked.image, asked.label, names, numbers)
    own, unused = names is None, why_unused(label for _, label in pairs)
    return Records(
        source, len(items), read, None, names, labels=numbers, own_numbers=own, unused=unused
    )


def paired(items: Sequence[Any], labels: Any) -> list[tuple[Any, Any]]:
    """Pictures with the label of each.

    Raises:
        BlockfitError: for more or fewer labels than pictures.
    """
    return list(zip(items, _listed(labels, len(items)), strict=True))


def _listed(labels: Any, images: int) -> list[Any]:
    """Labels of any kind (a list, an array or tensor (N,) or (N, 1), a column) as a list."""
    given = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    alone = [one[0] if isinstance(one, list | tuple) and len(one) == 1 else one for one in given]
    if several := next((one for one in alone if isinstance(one, list | tuple)), None):
        raise BlockfitError(
            f"the labels have {len(several)} values per image; give one per image, the number or "
            "the name of its class"
        )
    if len(alone) != images:
        raise BlockfitError(f"{images} images, but {len(alone)} labels; give one label per image")
    return alone


def class_names_of(dataset: Any) -> list[str] | None:
    """``classes`` of a data set, or of the one that it is a subset of, as torchvision's have."""
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if isinstance(names, list | tuple) else None


def from_digits(source: str) -> Records:
    """The demo's pictures: ``digits``, or ``digits:test``."""
    from blockfit.models.demo import digits

    pictures = digits("test" if source.endswith(":test") else "calibration")
    names = [str(digit) for digit in range(10)]
    return replace(from_arrays(*pictures), source=source, class_names=names)


def numbered(
    labels: Sequence[int | str | None], more: Sequence[str] = ()
) -> tuple[list[int | None], list[str] | None]:
    """Labels as numbers; texts are numbered in their alphabetical order and returned, too.

    −1 is how data sets write "unknown", and an empty text or NaN how tables do: they become
    ``None``. ``more`` are names without labels.
    """
    texts = any(isinstance(label, str) for label in labels)
    if not texts:
        return [whole_number(label) for label in labels], None
    known = [None if str(label) in _UNKNOWN else str(label) for label in labels]
    names = sorted({label for label in known if label is not None} | set(more))
    number = {name: i for i, name in enumerate(names)}
    return [None if label is None else number[label] for label in known], names


def unboxed(source: Any) -> Any:
    """Texts or pictures in an array of NumPy's or a column of pandas' as a list."""
    texts = getattr(getattr(source, "dtype", None), "kind", "") in ("O", "U", "T")
    return source.tolist() if texts else source


def _split_item(item: Any, image_key: str | None, label_key: str | None) -> tuple[Any, Any]:
    """One item of a data set as picture and label (or ``None``)."""
    if isinstance(item, Mapping):
        usual = ("image", "img", "pixel_values", *PATH_NAMES)
        image = image_key or next((key for key in usual if key in item), None)
        if image not in item:
            raise BlockfitError(
                f"no image among the keys {', '.join(map(str, item))}; name it with image_column="
            )
        label = label_key or next((k for k in LABEL_NAMES if k in item), None)
        return item[image], None if label is None else item[label]
    if isinstance(item, list | tuple):
        return item[0], item[1] if len(item) > 1 else None
    return item, None
