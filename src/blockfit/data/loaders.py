"""Batches that somebody else makes: a ``DataLoader`` or any re-iterable of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import groupby
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
    default_collate,
)

from blockfit.data.records import SEVERAL, class_names_of, holds_several
from blockfit.errors import BlockfitError, tell
from blockfit.models.forward import Batch, image_count, image_tensor, images_at

Piece = tuple[Batch, Tensor | None, list[str]]

_LABELS = ("labels", "label", "target", "targets")


@dataclass(frozen=True)
class Stream:
    """Prepared images that come in order, one or many at a time, from a re-iterable.

    Args:
        size: the number of images, from the data set's length or from counting them once.
        items: the re-iterable, or a ``DataLoader`` whose data set is read by position.
        by_position: whether ``items`` is such a loader; its own shuffling is not used then.
        class_names: of the data set, in the order of its labels, where it says so.
        kind: what its items are, for people.
    """

    source: str
    size: int
    items: Iterable[Any]
    by_position: bool
    class_names: list[str] | None = None
    columns: dict[str, str] = field(default_factory=dict)
    left_out: Sequence[tuple[str, str]] = ()
    kind: str = "images"

    def batches(self, positions: np.ndarray, batch_size: int) -> Iterator[Piece]:
        """Inputs, labels and names of the images at ``positions``.

        A loader's come in the order of ``positions``, up to ``batch_size`` of one size at a time;
        those of other re-iterables in the order and the batches in which they come.
        """
        if self.by_position:
            yield from _by_position(cast(DataLoader[Any], self.items), positions, batch_size)
            return
        wanted = np.zeros(self.size, dtype=bool)
        wanted[positions] = True
        for inputs, labels, names in _joined(_numbered(self.items), batch_size):
            keep = np.flatnonzero(wanted[[int(name) for name in names]]).tolist()
            if len(keep) == len(names):
                yield inputs, labels, names
            elif keep:
                some = None if labels is None else labels[keep]
                yield images_at(inputs, keep), some, [names[row] for row in keep]


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
    return Stream(kind, sum(image_count(_parsed(item)[0]) for item in source), source, False)


def _loader(loader: DataLoader[Any]) -> Stream:
    dataset: Any = loader.dataset
    names = class_names_of(dataset)
    return Stream(f"DataLoader of {type(dataset).__name__}", len(dataset), loader, True, names)


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
        collate_fn=_Collate(loader.collate_fn),
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator().manual_seed(0),  # the global one stays as it is
    )
    for chunk, parts in zip(chunks, ordered, strict=True):
        first = 0
        for count, item in parts:
            inputs, labels, _ = _parsed(item, whole=True)
            yield inputs, labels, [str(position) for position in chunk[first : first + count]]
            first += count


@dataclass(frozen=True)
class _Collate:
    """A loader's own way to make a batch, for each run of samples of one size and one set of flags.

    The loader's default would make a tensor of flags; they stay what they are.
    """

    own: Callable[[list[Any]], Any]

    def __call__(self, samples: list[Any]) -> list[tuple[int, Any]]:
        runs = [list(run) for _, run in groupby(samples, key=_form)]
        return [(len(run), self._together(run)) for run in runs]

    def _together(self, samples: list[Any]) -> Any:
        if self.own is not default_collate:
            return self.own(samples)
        samples = [_numbered_label(sample) for sample in samples]
        if not isinstance(samples[0], Mapping):
            return self.own(samples)
        flags = {k: v for k, v in samples[0].items() if _is_flag(v) and k not in _LABELS}
        rest = [{k: v for k, v in sample.items() if k not in flags} for sample in samples]
        return {**self.own(rest), **flags}


def _numbered_label(sample: Any) -> Any:
    """The sample with −1 for a label that is missing."""
    if isinstance(sample, Mapping):
        return {k: -1 if v is None and k in _LABELS else v for k, v in sample.items()}
    if isinstance(sample, list | tuple) and len(sample) == 2 and sample[1] is None:
        return sample[0], -1
    return sample


def _form(sample: Any) -> Any:
    """Shapes and flags of a sample."""
    if isinstance(sample, Mapping):
        return [(key, _form(value)) for key, value in sample.items()]
    if isinstance(sample, list | tuple):
        return [_form(value) for value in sample]
    if isinstance(sample, Tensor | np.ndarray):
        return tuple(sample.shape)
    return sample if _is_flag(sample) else None


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, bool | str)


def _numbered(items: Iterable[Any]) -> Iterator[tuple[Batch, Tensor | None, list[str], bool]]:
    start = 0
    for item in items:
        inputs, labels, single = _parsed(item)
        stop = start + image_count(inputs)
        yield inputs, labels, [str(i) for i in range(start, stop)], single
        start = stop


def _joined(
    pieces: Iterable[tuple[Batch, Tensor | None, list[str], bool]], batch_size: int
) -> Iterator[Piece]:
    """Batches as they come, and single images put together."""
    waiting: list[Piece] = []
    for inputs, labels, names, single in pieces:
        joins = single and (not waiting or _whole_form(waiting[0][0]) == _whole_form(inputs))
        if waiting and not (joins and len(waiting) < batch_size):
            yield _together(waiting)
            waiting = []
        if single:
            waiting.append((inputs, labels, names))
        else:
            yield inputs, labels, names
    if waiting:
        yield _together(waiting)


def _whole_form(inputs: Batch) -> Any:
    """Shapes, and all that images of one batch share."""
    if isinstance(inputs, Tensor):
        return tuple(inputs.shape)
    return {k: tuple(v.shape) if _has_rows(v) else v for k, v in inputs.items()}


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _together(pieces: Sequence[Piece]) -> Piece:
    names = [name for _, _, own in pieces for name in own]
    numbers = [
        torch.full((len(own),), -1) if labels is None else labels for _, labels, own in pieces
    ]
    labels = None if all(own is None for _, own, _ in pieces) else torch.cat(numbers)
    first = pieces[0][0]
    if isinstance(first, Tensor):
        return torch.cat([cast(Tensor, inputs) for inputs, _, _ in pieces]), labels, names
    tables = [cast(Mapping[str, Any], inputs) for inputs, _, _ in pieces]
    return (
        {k: torch.cat([t[k] for t in tables]) if _has_rows(v) else v for k, v in first.items()},
        labels,
        names,
    )


def _parsed(item: Any, whole: bool = False) -> tuple[Batch, Tensor | None, bool]:
    """Inputs with a batch dimension, int64 labels (B,), and whether it was a single image.

    ``whole``: it is known to be a batch.
    """
    kind, labels = type(item).__name__, None
    if isinstance(item, list | tuple) and 1 <= len(item) <= 2:
        item, labels = item[0], item[1] if len(item) == 2 else None
    if isinstance(item, Mapping):
        found = next((key for key in _LABELS if key in item), None)
        labels = item[found] if found else labels
        item = {k: v for k, v in item.items() if k != found and not _only_for_people(v)}
    fits = isinstance(item, Tensor) or (
        isinstance(item, Mapping) and any(_has_rows(value) for value in item.values())
    )
    if not fits:
        raise BlockfitError(
            f"an item of the images is a {kind}; give tensors, (tensor, label) pairs or "
            "dictionaries of tensors"
        )
    single = not whole and image_tensor(item).ndim == 3
    if single and isinstance(item, Tensor):
        item = item[None]
    elif single:
        item = {k: v[None] if _has_rows(v) else v for k, v in item.items()}
    return item, _numbers(labels, image_count(item), single), single


def _only_for_people(value: Any) -> bool:
    """Names and the like that come one per image, which no model takes."""
    return isinstance(value, list | tuple) and any(
        not isinstance(one, int | float | list | tuple | Tensor) for one in value
    )


def _numbers(labels: Any, images: int, single: bool) -> Tensor | None:
    """Labels as int64 (images,), or of a single image; −1 where one is missing."""
    if labels is None:
        return None
    if isinstance(labels, list | tuple):
        labels = [-1 if label is None else label for label in labels]
    try:
        numbers = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BlockfitError(
            f"labels of {type(labels).__name__} are no numbers ({error}); give whole numbers"
        ) from error
    whole = numbers[None] if single else numbers
    if whole.ndim and len(whole) == images and holds_several(whole[0]):
        tell([SEVERAL])
        return None
    numbers = numbers.reshape(-1)
    if len(numbers) != images:
        raise BlockfitError(f"{images} images came with {len(numbers)} labels; give one per image")
    if numbers.is_floating_point():
        known = numbers.isfinite()
        if not torch.equal(numbers[known], numbers[known].round()):
            raise BlockfitError("the labels are fractions; give whole numbers, one per image")
        numbers = torch.where(known, numbers, -1)
    return numbers.to(torch.int64)


def _is_tensors(item: Any) -> bool:
    first = item[0] if isinstance(item, list | tuple) and item else item
    values = first.values() if isinstance(first, Mapping) else [first]
    return any(isinstance(value, Tensor) for value in values)
