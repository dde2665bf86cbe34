"""Pictures in tables: parquet and arrow files, saved folders and Hub ids, through ``datasets``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from blockfit.data.decode import Unreadable
from blockfit.data.records import (
    FRACTIONS,
    LABEL_NAMES,
    SEVERAL,
    Columns,
    Picture,
    Records,
    numbered,
    used,
)
from blockfit.errors import BlockfitError, first_line, need
from blockfit.models.hub import silent


@dataclass(frozen=True, eq=False)
class _Table:
    dataset: Any
    image: str
    labels: list[int | None] | None

    def __call__(self, position: int) -> tuple[Picture, int | None]:
        row = self.dataset[position]
        return _cell(row[self.image]), self.labels[position] if self.labels else None


def from_dataset(dataset: Any, source: str, asked: Columns) -> Records:
    """A ``datasets.Dataset``; its image and label columns are found by their types."""
    library = need("datasets", "datasets")
    image, label = _columns(dataset.features, source, asked)
    dataset = dataset.with_format(None)
    labels, names, own_numbers = None, None, True
    unused = SEVERAL if label is None and _holds_lists(dataset.features) else ""
    if label:
        try:
            labels, names, own_numbers = _labels(dataset, label, source)
        except BlockfitError:
            if asked.label:
                raise
            label, unused = None, FRACTIONS
    dataset = dataset.select_columns([image])
    if isinstance(dataset.features[image], library.Image):
        dataset = dataset.cast_column(image, library.Image(decode=False))
    read = _Table(dataset, image, labels)
    return Records(
        source, len(dataset), read, None, names, used(image, label),
        labels=labels, own_numbers=own_numbers, unused=unused,
    )  # fmt: skip


def _holds_lists(features: Mapping[str, Any]) -> bool:
    """Whether a column that is called as labels are holds lists of them."""
    from datasets import Value

    return any(n in LABEL_NAMES and not isinstance(f, Value) for n, f in features.items())


def _labels(
    dataset: Any, column: str, source: str
) -> tuple[list[int | None], list[str] | None, bool]:
    """Labels, their names where there are any, and whether their numbers are the column's own."""
    kind = getattr(dataset.features[column], "dtype", "a list")
    values = dataset.select_columns([column])[:][column]
    whole = kind.startswith("float") and all(
        v is None or math.isnan(v) or float(v).is_integer() for v in values
    )
    if not whole and not re.fullmatch(r"u?int\d+|bool|(large_)?string", kind):
        raise BlockfitError(
            f"{source}: the column {column!r} holds {kind}, and a label is a whole number or a "
            "text; name another with label_column="
        )
    numbers, texts = numbered(values)
    names = getattr(dataset.features[column], "names", None) or texts
    return numbers, names, texts is None


def from_tables(files: Sequence[Path], source: str, asked: Columns) -> Records:
    """Parquet files, or arrow files, one after the other."""
    library = need("datasets", "datasets")
    try:
        if files[0].suffix.lower() == ".parquet":
            dataset = library.Dataset.from_parquet([str(file) for file in files])
        else:
            parts = [library.Dataset.from_file(str(file)) for file in files]
            dataset = library.concatenate_datasets(parts)
    except Exception as error:  # datasets and pyarrow share no base class of errors
        cause = error.__cause__ or error
        raise BlockfitError(
            f"cannot read {source}: {first_line(cause)}; download or write it again"
        ) from error
    return from_dataset(dataset, source, asked)


def from_saved(folder: Path, asked: Columns) -> Records:
    """What ``save_to_disk`` of ``datasets`` wrote."""
    loaded = need("datasets", "datasets").load_from_disk(str(folder))
    return from_dataset(*one_split(loaded, str(folder), asked.split), asked)


def load_dataset(name: str, **options: Any) -> Any:
    """``datasets.load_dataset``, with its cache, its offline switches and its errors.

    Raises:
        ConnectionError: where a Hub that does not answer would have to be asked.
    """
    library = need("datasets", "datasets")
    if Path(name).is_dir() or library.config.HF_HUB_OFFLINE or not silent():
        return library.load_dataset(name, **options)
    library.config.HF_HUB_OFFLINE = True  # its cache alone
    try:
        return library.load_dataset(name, **options)
    except ConnectionError as error:
        raise ConnectionError("the Hub does not answer, nor does the cache hold it") from error
    finally:
        library.config.HF_HUB_OFFLINE = False


def from_hub(name: str, asked: Columns) -> Records:
    """A folder that ``load_dataset`` reads, or a Hub id."""
    try:
        loaded = load_dataset(name)
    except BlockfitError:
        raise
    except Exception as error:  # datasets and the Hub's client share no base class of errors
        if Path(name).is_dir():
            raise BlockfitError(f"cannot read the data set {name}: {first_line(error)}") from error
        raise BlockfitError(
            f"there is no file or folder {name}, and the Hub gives no data set of that name "
            f"({first_line(error)}); where there is no network, download it elsewhere "
            f"(hf download {name} --repo-type dataset --local-dir FOLDER) and give FOLDER"
        ) from error
    return from_dataset(*one_split(loaded, name, asked.split), asked)


def one_split(loaded: Any, source: str, split: str | None) -> tuple[Any, str]:
    """One split of what ``datasets`` loaded, and what to call it."""
    if not isinstance(loaded, Mapping):
        if split is not None:
            raise BlockfitError(f"{source} has no splits; leave {split!r} out")
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


def _columns(features: Mapping[str, Any], source: str, asked: Columns) -> tuple[str, str | None]:
    for given in asked[:2]:
        if given is not None and given not in features:
            raise BlockfitError(f"{source} has no column {given!r}; it has {', '.join(features)}")
    library = need("datasets", "datasets")
    images = [n for n, f in features.items() if isinstance(f, library.Image)] or [
        n for n, f in features.items() if _holds_bytes(f)
    ]
    image = asked.image or _preferred(images, ("image", "img", "jpg", "png"))
    if image is None:
        said = f"several image columns, {', '.join(images)}" if images else "no image column"
        raise BlockfitError(
            f"{source} has {said}; name it with image_column=; "
            f"the columns are {', '.join(features)}"
        )
    labels = [n for n, f in features.items() if isinstance(f, library.ClassLabel)] or [
        n
        for n, f in features.items()
        if n in LABEL_NAMES and re.search("int|bool|float|string", str(getattr(f, "dtype", "")))
    ]
    return image, asked.label or _preferred(labels, LABEL_NAMES)


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
