"""Data sets as torchvision stores them: MNIST's and Fashion-MNIST's files, and CIFAR's.

CIFAR's files are pickles. They are not unpickled: their opcodes are only listed, and the numbers
and texts between them are taken where they stand, so that nothing in such a file is ever run.
"""

from __future__ import annotations

import gzip
import pickletools
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from blockfit.data.records import Columns, Records, from_arrays
from blockfit.errors import BlockfitError, first_line

_FASHION = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]
_DIGITS = [str(digit) for digit in range(10)]
_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_PARTS = {"train": ["train"], "test": ["test"]}
_CIFAR_KEYS = frozenset(
    (
        *("batch_label", "labels", "data", "filenames", "fine_labels", "coarse_labels"),
        *("label_names", "fine_label_names", "coarse_label_names"),
        *("num_cases_per_batch", "num_vis"),
    )
)


@dataclass(frozen=True)
class _Layout:
    """A data set found in a folder: its kind, where, and its splits' files."""

    kind: str
    folder: Path
    splits: Mapping[str, Sequence[Path]]


def from_layout(folder: Path, asked: Columns) -> Records | None:
    """The data set in torchvision's root or in the set's own folder; ``None`` where none is.

    Args:
        folder: such as ``ROOT``, ``ROOT/MNIST``, ``ROOT/cifar-10-batches-py``.
        asked: no image column, for there is only one; the label ``fine_label`` (the default) or
            ``coarse_label`` of CIFAR-100; the split ``train`` or ``test``.

    Raises:
        BlockfitError: where there are several, or a file is not what torchvision stores.
    """
    found, split = _layouts(folder), asked.split
    if not found:
        return None
    if len(found) > 1:
        places = ", ".join(str(layout.folder) for layout in found)
        raise BlockfitError(f"{folder} holds several data sets, {places}; give one of them")
    (layout,) = found
    labels = {"label"} if layout.kind != "cifar100" else {"fine_label", "coarse_label"}
    if asked.image is not None or (asked.label is not None and asked.label not in labels):
        raise BlockfitError(
            f"{layout.folder} has no column {asked.image or asked.label!r}; "
            f"its labels are {', '.join(sorted(labels))}"
        )
    if split is None and len(layout.splits) == 1:
        (split,) = layout.splits
    if split is None or split not in layout.splits:
        said = "say which" if split is None else f"there is no {split!r}"
        raise BlockfitError(
            f"{folder} has the splits {', '.join(layout.splits)}; {said}, as in {folder}:test"
        )
    files = layout.splits[split]
    source = f"{folder}:{split}"
    if layout.kind == "mnist":
        return _mnist(files[0], files[1], source, layout.folder)
    return _cifar(files, layout, source, asked.label or "fine_label")


def _layouts(root: Path) -> list[_Layout]:
    found = []
    for folder in (root, root / "raw", root / "MNIST" / "raw", root / "FashionMNIST" / "raw"):
        pairs = {"train": _idx_files(folder, "train"), "test": _idx_files(folder, "t10k")}
        splits = {name: files for name, files in pairs.items() if len(files) == 2}
        if splits:
            found.append(_Layout("mnist", folder, splits))
    for folder in (root, root / "cifar-10-batches-py"):
        if (folder / "batches.meta").is_file():
            found.append(_Layout("cifar10", folder, _cifar_files(folder, _BATCHES)))
    for folder in (root, root / "cifar-100-python"):
        if (folder / "meta").is_file() and _cifar_files(folder, _PARTS):
            found.append(_Layout("cifar100", folder, _cifar_files(folder, _PARTS)))
    return [layout for layout in found if layout.splits]


def _cifar_files(folder: Path, wanted: Mapping[str, Sequence[str]]) -> dict[str, list[Path]]:
    splits = {split: [folder / name for name in names] for split, names in wanted.items()}
    return {split: files for split, files in splits.items() if all(f.is_file() for f in files)}


def _idx_files(folder: Path, split: str) -> list[Path]:
    stems = (f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte")
    tries = [(folder / stem, folder / f"{stem}.gz") for stem in stems]
    return [path for pair in tries for path in [p for p in pair if p.is_file()][:1]]


def _mnist(images: Path, labels: Path, source: str, folder: Path) -> Records:
    numbers = _idx(labels, 1)
    pictures = _idx(images, 3)
    if len(pictures) != len(numbers):
        raise BlockfitError(
            f"{images} holds {len(pictures)} images, but {labels} {len(numbers)} labels; "
            "download both again"
        )
    names = {"MNIST": _DIGITS, "FashionMNIST": _FASHION}.get(folder.parent.name)
    return replace(
        from_arrays(pictures, numbers.astype(np.int64)), source=source, class_names=names
    )


def _idx(file: Path, axes: int) -> np.ndarray:
    """An array of uint8 in MNIST's format: 0, 0, 8 (its type), the number of axes, lengths."""
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        *magic, found = content[:4]
        shape = struct.unpack_from(f">{axes}I", content, 4)
        if magic != [0, 0, 8] or found != axes:
            raise ValueError("no such header")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise BlockfitError(
            f"{file} is no file of MNIST's kind with {axes} axes ({first_line(error)}); "
            "download it again"
        ) from error


def _cifar(files: Sequence[Path], layout: _Layout, source: str, label: str) -> Records:
    fine = layout.kind == "cifar10"
    key = "labels" if fine else f"{label}s"
    meta = layout.folder / ("batches.meta" if fine else "meta")
    class_names = _texts(_listed(meta).get("label_names" if fine else f"{label}_names", []))
    pictures, numbers = [], []
    for file in files:
        values = _listed(file)
        labels = [v for v in values.get(key, []) if isinstance(v, int)]
        pictures.append(_pictures(file, values.get("data", []), len(labels)))
        numbers += labels
    if not 0 <= min(numbers) <= max(numbers) < len(class_names):
        raise _no_cifar(meta, f"{len(class_names)} class names for labels up to {max(numbers)}")
    records = from_arrays(np.concatenate(pictures), numbers)
    columns = {} if fine else {"label": label}
    return replace(records, source=source, class_names=class_names, columns=columns)


def _pictures(file: Path, values: Sequence[object], count: int) -> np.ndarray:
    """uint8 (N, 32, 32, 3) of the longest byte string among the values of ``data``."""
    sizes = [len(value) if isinstance(value, bytes) else -1 for value in values]
    at = int(np.argmax(sizes)) if sizes else 0
    longest = values[at] if sizes else None
    if count == 0 or not isinstance(longest, bytes) or len(longest) != count * 3072:
        raise _no_cifar(file, f"{count} labels, {max(sizes, default=-1)} bytes of pixels")
    flags = [value for value in values[:at] if isinstance(value, bool)]
    if flags[-1:] == [True] or b"F" in values:
        raise _no_cifar(file, "its array is stored column by column")
    pixels = np.frombuffer(longest, np.uint8)
    return np.ascontiguousarray(pixels.reshape(count, 3, 32, 32).transpose(0, 2, 3, 1))


def _listed(file: Path) -> dict[str, list[object]]:
    """What stands in a pickle under each of CIFAR's keys: numbers, flags, and texts as bytes."""
    values: dict[str, list[object]] = {}
    current: list[object] = []
    try:
        with open(file, "rb") as content:
            for opcode, value, _ in pickletools.genops(content):
                if opcode.name in ("NEWTRUE", "NEWFALSE"):
                    current.append(opcode.name == "NEWTRUE")
                elif opcode.name.startswith(("BININT", "INT", "LONG")):
                    current.append(value)
                elif opcode.name.endswith(("STRING", "BYTES", "BYTES8", "UNICODE", "BYTEARRAY8")):
                    data: Any = value
                    text = data.encode("latin-1") if isinstance(data, str) else bytes(data)
                    key = text[:32].decode("latin-1")
                    if key in _CIFAR_KEYS:
                        current = values.setdefault(key, [])
                    else:
                        current.append(text)
    except (OSError, ValueError) as error:
        raise _no_cifar(file, first_line(error)) from error
    return values


def _texts(values: Sequence[object]) -> list[str]:
    return [value.decode("utf-8", "replace") for value in values if isinstance(value, bytes)]


def _no_cifar(file: Path, why: str) -> BlockfitError:
    return BlockfitError(
        f"{file} is not laid out as CIFAR's files are ({why}), and blockfit runs no pickles; give "
        "the parquet files (hf download uoft-cs/cifar10 or uoft-cs/cifar100 --repo-type dataset "
        "--local-dir FOLDER)"
    )
