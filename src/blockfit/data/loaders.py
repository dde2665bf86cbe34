"""Batches that somebody else makes: a ``DataLoader`` or any re-iterable of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from blockfit.errors import BlockfitError
from blockfit.models.forward import Batch

Piece = tuple[Batch, Tensor | None, list[str]]

_LABELS = ("labels", "label", "target", "targets")


@dataclass(frozen=True)
class Stream:
    """Prepared images that come in order, one or many at a time, from a re-iterable.

    Args:
        source: what it is, for people.
        size: the number of images, from the data set's length or from counting them once.
        items: the re-iterable, or a ``DataLoader`` whose data set is read by position.
        by_position: whether ``items`` is such a loader; its own shuffling is not used then.
    """

    source: str
    size: int
    items: Iterable[Any]
    by_position: bool
    class_names: list[str] | None = None
    columns: dict[str, str] = field(default_factory=dict)

    def batches(self, positions: np.ndarray, batch_size: int) -> Iterator[Piece]:
        """Inputs, labels and names of the images at ``positions``.

        A loader's come in the order of ``positions``, ``batch_size`` at a time; those of other
        re-iterables in the order and the batches in which they come.
        """
        if self.by_position:
            yield from _by_position(cast(DataLoader[Any], self.items), positions, batch_size)
            return
        wanted = np.zeros(self.size, dtype=bool)
        wanted[positions] = True
        for inputs, labels, names in _joined(_numbered(self.items), batch_size):
            keep = torch.from_numpy(wanted[[int(name) for name in names]])
            if bool(keep.all()):
                yield inputs, labels, names
            elif bool(keep.any()):
                chosen = [name for name, k in zip(names, keep.tolist(), strict=True) if k]
                yield _rows(inputs, keep), None if labels is None else labels[keep], chosen


def stream_of(source: Any) -> Stream | None:
    """A ``Stream`` for a loader or a re-iterable of tensors; ``None`` for pictures by position.

    Raises:
        BlockfitError: for a generator or another one-shot iterator, and for what is no iterable.
    """
    kind = type(source).__name__
    if isinstance(source, Iterator):
        raise BlockfitError(
            f"a {kind} can be walked only once, and calibration walks the images several times; "
            "give a list, a DataLoader or an object whose __iter__ starts again"
        )
    if isinstance(source, DataLoader):
        if _plain_loader(source):
            return _loader(source)
    elif not isinstance(source, Mapping) and hasattr(source, "__getitem__"):
        if len(source) == 0:
            raise BlockfitError(f"the {kind} holds no images")
        if not _is_tensors(source[0]):
            return None
        if _parsed(source[0])[2]:
            return _loader(DataLoader(source))
    if not isinstance(source, Iterable) or isinstance(source, Mapping):
        raise BlockfitError(
            f"a {kind} is no source of images; give a folder, files, a data set, an array, a "
            "tensor or an iterable of tensors"
        )
    return Stream(kind, sum(_length(_parsed(item)[0]) for item in source), source, False)


def _loader(loader: DataLoader[Any]) -> Stream:
    dataset: Any = loader.dataset
    return Stream(f"DataLoader of {type(dataset).__name__}", len(dataset), loader, True)


def _plain_loader(loader: DataLoader[Any]) -> bool:
    """Whether the loader shows every image of its data set once, so that positions can be drawn."""
    whole = isinstance(loader.sampler, SequentialSampler) or (
        isinstance(loader.sampler, RandomSampler)
        and not loader.sampler.replacement
        and loader.sampler.num_samples == len(cast(Sized, loader.dataset))
    )
    return (
        not isinstance(loader.dataset, IterableDataset)
        and type(loader.batch_sampler) is BatchSampler
        and whole
    )


def _by_position(
    loader: DataLoader[Any], positions: np.ndarray, batch_size: int
) -> Iterator[Piece]:
    chunks = [
        positions[start : start + batch_size].tolist()
        for start in range(0, len(positions), batch_size)
    ]
    ordered = DataLoader(
        loader.dataset,
        batch_sampler=chunks,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator().manual_seed(0),  # the global one stays as it is
    )
    for chunk, item in zip(chunks, ordered, strict=True):
        inputs, labels, _ = _parsed(item)
        yield inputs, labels, [str(position) for position in chunk]


def _numbered(items: Iterable[Any]) -> Iterator[tuple[Batch, Tensor | None, list[str], bool]]:
    start = 0
    for item in items:
        inputs, labels, single = _parsed(item)
        stop = start + _length(inputs)
        yield inputs, labels, [str(i) for i in range(start, stop)], single
        start = stop


def _joined(
    pieces: Iterable[tuple[Batch, Tensor | None, list[str], bool]], batch_size: int
) -> Iterator[Piece]:
    """Batches as they come, and single images put together."""
    waiting: list[Piece] = []
    for inputs, labels, names, single in pieces:
        if not single:
            yield inputs, labels, names
            continue
        waiting.append((inputs, labels, names))
        if len(waiting) == batch_size:
            yield _together(waiting)
            waiting = []
    if waiting:
        yield _together(waiting)


def _together(pieces: Sequence[Piece]) -> Piece:
    names = [name for _, _, own in pieces for name in own]
    numbers = [labels for _, labels, _ in pieces if labels is not None]
    labels = torch.cat(numbers) if len(numbers) == len(pieces) else None
    first = pieces[0][0]
    if isinstance(first, Tensor):
        return torch.cat([cast(Tensor, inputs) for inputs, _, _ in pieces]), labels, names
    tables = [cast(Mapping[str, Tensor], inputs) for inputs, _, _ in pieces]
    return {key: torch.cat([table[key] for table in tables]) for key in first}, labels, names


def _parsed(item: Any) -> tuple[Batch, Tensor | None, bool]:
    """Inputs with a batch dimension, int64 labels (B,), and whether it was a single image."""
    labels: Any = None
    if isinstance(item, list | tuple) and 1 <= len(item) <= 2:
        item, labels = item[0], item[1] if len(item) == 2 else None
    elif isinstance(item, Mapping):
        found = next((key for key in _LABELS if key in item), None)
        labels = item[found] if found else None
        item = {k: v for k, v in item.items() if k != found and isinstance(v, Tensor)}
    tensors = [item] if isinstance(item, Tensor) else list(getattr(item, "values", list)())
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        raise BlockfitError(
            f"an item of the images is a {type(item).__name__}; give tensors, (tensor, label) "
            "pairs or dictionaries of tensors"
        )
    single = max(t.ndim for t in tensors) == 3
    if single:
        item = item[None] if isinstance(item, Tensor) else {k: v[None] for k, v in item.items()}
    if labels is not None:
        labels = torch.as_tensor(labels).to(torch.int64).reshape(-1)
        if len(labels) != _length(item):
            raise BlockfitError(
                f"{_length(item)} images came with {len(labels)} labels; give one per image"
            )
    return item, labels, single


def _is_tensors(item: Any) -> bool:
    first = item[0] if isinstance(item, list | tuple) and item else item
    values = first.values() if isinstance(first, Mapping) else [first]
    return any(isinstance(value, Tensor) for value in values)


def _length(inputs: Batch) -> int:
    return len(inputs) if isinstance(inputs, Tensor) else len(next(iter(inputs.values())))


def _rows(inputs: Batch, keep: Tensor) -> Batch:
    if isinstance(inputs, Tensor):
        return inputs[keep]
    return {key: value[keep] for key, value in inputs.items()}
