"""Images for calibration and evaluation: from anywhere, drawn with a seed, decoded when needed.

``images`` turns a folder, files, a table, a data set, arrays, tensors or any re-iterable into
``Images``: batches that can be walked again and again, in the same order, with flat memory.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from blockfit import processes as ranks
from blockfit.arguments import at_least, checked
from blockfit.data.decode import Unreadable, decode
from blockfit.data.labels import Matching, match
from blockfit.data.loaders import Stream, stream_of
from blockfit.data.paths import from_files, from_path
from blockfit.data.records import (
    Columns,
    Records,
    from_arrays,
    from_digits,
    from_items,
    paired,
    unboxed,
)
from blockfit.data.streams import from_stream, from_transformed, is_streamed, is_transformed
from blockfit.data.tables import from_dataset, one_split
from blockfit.data.views import cropped
from blockfit.errors import BlockfitError, tell
from blockfit.models.forward import Batch
from blockfit.models.preprocessing import (
    Given,
    Prepare,
    Preprocessing,
    channels_taken,
    preprocessing_of,
    read_preprocessing,
)
from blockfit.models.text_tower import Tokenize
from blockfit.models.wrappers import bare

DIGESTED = 16
"""Images whose content tells one set from another of the same source and size."""

MOST_UNREADABLE = 0.1
"""The share of unreadable images beyond which a run stops."""


@dataclass
class LabelledBatch:
    """Some images, ready for the model.

    Args:
        inputs: a tensor (B, C, H, W), or a mapping of tensors that the model takes by name.
        labels: int64 (B,), numbers of the model's classes, −1 for an image that has none of them;
            ``None`` where no image of the batch has one.
        names: B names, of files or positions.
        number: the place of its first image, with which another walk can begin.
        places: B numbers, of the images in the walk's order; an unreadable image has one, too.
    """

    inputs: Batch
    labels: Tensor | None
    names: list[str]
    number: int = 0
    places: list[int] = field(default_factory=list)
    own_labels: Tensor | None = None
    """The same as the data set numbers them: int64 (B,), −1 for an image without a label."""


@dataclass(frozen=True, eq=False)
class Beside:
    """Texts that images are given with, one to each, for models of both.

    Args:
        name: by which the image tower takes images.
        order: which text goes with the image at a position, taken in turn.
        left_out: what was no text, and why.
    """

    source: str
    texts: Sequence[str]
    tokenize: Tokenize
    name: str
    order: np.ndarray
    left_out: Sequence[tuple[str, str]] = ()

    def beside(self, inputs: Batch, positions: Sequence[int]) -> Batch:
        """The images at some positions of all, with their texts."""
        chosen = [self.texts[self.order[p % len(self.order)]] for p in positions]
        pictures = {self.name: inputs} if isinstance(inputs, Tensor) else dict(inputs)
        return {**pictures, **self.tokenize(chosen)}

    def description(self) -> dict[str, Any]:
        """What was used, as JSON values."""
        return {
            "source": self.source,
            "total": len(self.texts),
            "left_out": dict(self.left_out),
        }


@dataclass(frozen=True, eq=False)
class Images:
    """Images that can be walked any number of times, in the same order; made by ``images``.

    Nothing is decoded before a walk and nothing is kept after it. An unreadable image is skipped,
    counted and named in ``skipped`` as soon as a walk has met it, and its batch is one shorter;
    which others are drawn does not depend on it.

    Args:
        limited: whether the user said how many there are to be.
        beyond: positions that were given and not drawn, in the order of the draw.
        texts: that they are given with; their own labels are not used then.
        views: how often a walk shows every image: as it is, then as crops of it, all images after
            one another. A view has a place of its own; ``len`` counts images.
    """

    records: Records | Stream
    positions: np.ndarray
    preprocessing: Preprocessing | Prepare | None
    batch_size: int
    seed: int
    workers: int
    drawn: int
    matching: Matching = field(default_factory=Matching)
    unreadable: dict[int, str] = field(default_factory=dict)
    uncounted: dict[int, str] = field(default_factory=dict)
    labelled: set[int] = field(default_factory=set)
    max_pixels: int | None = None
    shard: tuple[int, int] = (0, 1)
    limited: bool = False
    beyond: np.ndarray = field(default_factory=lambda: np.arange(0))
    texts: Beside | None = None
    views: int = 1

    def __len__(self) -> int:
        """The number of images, without those that a walk has found to be unreadable."""
        return len(self._own()) - len(self.skipped)

    def __iter__(self) -> Iterator[Batch]:
        return (batch.inputs for batch in self.batches())

    def first(self, purpose: str) -> Batch:
        """The inputs of the first batch.

        Raises:
            BlockfitError: where there is none: "there are no images to" ``purpose``.
        """
        found = next(iter(self), None)
        if found is None:
            raise BlockfitError(
                f"there are no images to {purpose}; give a folder or file that holds some"
            )
        return found

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of ``LabelledBatch.labels``, where known."""
        return self.matching.names

    @property
    def labels_line(self) -> str | None:
        """One line on how labels were matched and what is not counted; ``None`` without labels."""
        told = self._labels_told()
        return None if told is None else str(told["line"])

    @property
    def unused(self) -> str:
        """Why labels that are there are not used; empty where they are, or where there are none."""
        return getattr(self.records, "unused", "")

    @property
    def skipped(self) -> list[str]:
        """The names of the unreadable images met so far."""
        if not self.unreadable:
            return []
        return [self.unreadable[i] for i in self._own().tolist() if i in self.unreadable]

    def batches(self, start: int = 0) -> Iterator[LabelledBatch]:
        """The images in batches, with labels and names.

        Neighbours of another size begin a new batch.

        Args:
            start: begin with the image at this place, views counted.

        Raises:
            BlockfitError: where more than ``MOST_UNREADABLE`` of the images cannot be read.
        """
        count = len(self.positions)
        for view in range(start // max(1, count), self.views):
            for batch in self._batches(max(0, start - view * count)):
                yield self._seen(batch, view)

    def _seen(self, batch: LabelledBatch, view: int) -> LabelledBatch:
        """A batch with the texts that go with its images, and one view of them."""
        if self.texts is not None:
            positions = self.positions[batch.places].tolist()
            inputs = self.texts.beside(batch.inputs, positions)
            batch = replace(batch, inputs=inputs, labels=None, own_labels=None)
        if view == 0:
            return batch
        first = view * len(self.positions)
        return replace(
            batch,
            inputs=cropped(batch.inputs, batch.places, view, self.seed),
            names=[f"{name} (view {view})" for name in batch.names],
            number=first + batch.number,
            places=[first + place for place in batch.places],
        )

    def _batches(self, start: int) -> Iterator[LabelledBatch]:
        if isinstance(self.records, Stream):
            yield from self._streamed(self.records, start)
            return
        size = self.batch_size
        numbers = [n for n in self._numbers() if (n + 1) * size > start]
        for number, samples in zip(numbers, self._samples(numbers), strict=True):
            good: list[tuple[int, _Sample]] = []
            for place, sample in enumerate(samples, number * size):
                if sample.fault is not None:
                    raise BlockfitError(sample.fault)
                if sample.inputs is None:
                    self.unreadable[sample.position] = sample.name
                    self._stop_if_too_many(sample.reason)
                elif place >= start:
                    good.append((place, sample))
            for _, alike in itertools.groupby(good, lambda one: cast(Tensor, one[1].inputs).shape):
                yield self._batch(list(alike))

    def own(self) -> Images:
        """The share of this process: every n-th batch of a run on n processes."""
        return replace(self, shard=(ranks.rank(), ranks.count()))

    def learn(self, unreadable: Iterable[Sequence[Any]]) -> None:
        """Take over what another walk knew."""
        self.unreadable.update((int(position), str(name)) for position, name in unreadable)

    def exchange(self) -> None:
        """Tell the other processes which images this one could not read, and learn of theirs.

        Raises:
            BlockfitError: where too many cannot be read.
        """
        for found in ranks.gathered([*self.unreadable.items()]):
            self.learn(found)
        self._stop_if_too_many("on several processes")

    def take(self, count: int) -> Images:
        """The first ``count`` images of this order."""
        return replace(self._part(self.positions[:count]), limited=True)

    def draw(self, count: int, seed: int) -> Images:
        """``count`` of the images, drawn with the seed before anything is decoded.

        The others lie ``beyond`` them. Where the user said how many images there are to be, or
        there are no more than ``count``, they come back as they are.
        """
        if self.limited or len(self.positions) <= count:
            return self
        order = np.random.default_rng(seed).permutation(self.positions)
        drawn, beyond = (_in_order(self.records, part) for part in np.split(order, [count]))
        return replace(self, positions=drawn, beyond=beyond, seed=seed, drawn=count, limited=True)

    def apart(self, count: int, seed: int) -> tuple[Images, Images]:
        """These images, and ``count`` others that were given: those ``beyond`` come first.

        Where too few lie beyond, the rest is taken from these, drawn with the seed.
        """
        others, own = self.beyond[:count], self.positions
        if (missing := count - len(others)) > 0:
            taken = np.random.default_rng([seed, 1]).permutation(len(own))[:missing]
            others, own = np.concatenate([others, own[taken]]), np.delete(own, taken)
        rest = replace(self, positions=own, beyond=self.beyond[count:])
        part = replace(self, positions=others, beyond=self.beyond[:0], drawn=len(others))
        return rest, replace(part, unreadable=dict(self.unreadable))

    def between(self, start: int, stop: int) -> Images:
        """The images from place ``start`` to before ``stop`` of this order."""
        return self._part(self.positions[start:stop])

    @property
    def changing(self) -> bool:
        """Whether images that are read twice differ: random augmentation, a shuffled order."""
        few = self._part(self.positions[:2])
        once, again = (_tensors(next(iter(few), {})) for _ in range(2))
        return once.keys() != again.keys() or any(
            not torch.equal(value, again[key]) for key, value in once.items()
        )

    def shared_with(self, other: Images) -> int:
        """How many of these images another set has, too, by the files or rows that they lie in."""
        return len(self._places() & other._places())

    def _places(self) -> set[str]:
        records = self.records
        if not isinstance(records, Records) or not (records.names or Path(records.source).exists()):
            return set()  # tensors that look alike may be others
        return {os.path.abspath(records.name(position)) for position in self.positions.tolist()}

    def digest(self) -> str | None:
        """A short hash that tells these images from others of the same source and number.

        Of what a model gets of ``DIGESTED`` images spread over the set, the first ones where
        reading others takes a walk, and of the names and sizes of all files; ``None`` where
        images that are read twice differ.
        """
        few = replace(self, positions=self._spread(DIGESTED), batch_size=DIGESTED, shard=(0, 1))
        found = set()
        for _ in range(2):
            digest = hashlib.sha256(repr(self._files()).encode("utf-8", "replace"))
            for batch in few:
                for name, value in sorted(_tensors(batch).items()):
                    digest.update(f"{name} {tuple(value.shape)}".encode())
                    digest.update(value.detach().cpu().double().numpy().tobytes())
            found.add(digest.hexdigest()[:16])
        return found.pop() if len(found) == 1 else None

    def _spread(self, count: int) -> np.ndarray:
        """Positions evenly over the set; the first ones of what is read in order."""
        records, own = self.records, self.positions
        walks = records.in_order if isinstance(records, Records) else not records.by_position
        if walks or len(own) <= count:
            return own[:count]
        return own[np.linspace(0, len(own) - 1, count).round().astype(int)]

    def _files(self) -> list[tuple[str, int]]:
        """Name and bytes of every image that has a name; −1 bytes of what is no file."""
        records = self.records
        if not isinstance(records, Records) or records.names is None:
            return []
        names = [records.name(position) for position in self.positions.tolist()]
        return [(n, os.path.getsize(n) if os.path.isfile(n) else -1) for n in names]

    def split(self, fraction: float, seed: int | None = None) -> tuple[Images, Images]:
        """Two disjoint parts, drawn with the seed; the second holds ``fraction`` of the images.

        Raises:
            BlockfitError: where ``fraction`` is not between 0 and 1 or a part would be empty.
        """
        count = len(self.positions)
        held_out = round(fraction * count) if 0 < fraction < 1 else 0
        if not 0 < held_out < count:
            raise BlockfitError(
                f"cannot hold out a share of {fraction:g} of {count} images; "
                "give more images or a share between 0 and 1"
            )
        drawn = np.random.default_rng(self.seed if seed is None else seed).permutation(count)
        second = np.zeros(count, dtype=bool)
        second[drawn[:held_out]] = True
        return self._part(self.positions[~second]), self._part(self.positions[second])

    def description(self) -> dict[str, Any]:
        """What was used, as JSON values: source, numbers, seed, skipped images, preprocessing."""
        own = self.preprocessing
        if isinstance(own, Preprocessing):
            preprocessing = own.describe()
        else:
            preprocessing = "none, tensors as given" if own is None else "custom"
        return {
            "source": self.records.source,
            "total": self.records.size,
            "drawn": len(self.positions),
            "used": len(self),
            "seed": self.seed,
            "skipped": self.skipped,
            "left_out": dict(self.records.left_out),
            "labels": self._labels_told(),
            "labels_unused": self.unused or None,
            "columns": dict(self.records.columns),
            "preprocessing": preprocessing,
            **({} if self.texts is None else {"texts": self.texts.description()}),
        }

    def _part(self, positions: np.ndarray) -> Images:
        return replace(self, positions=positions)  # shares what is known to be unreadable

    def _streamed(self, stream: Stream, start: int) -> Iterator[LabelledBatch]:
        rank, of = self.shard
        places: Sequence[int] = range(len(self.positions))
        if stream.by_position:  # only the batches of this shard are made
            size = self.batch_size
            own = [n for n in self._numbers() if (n + 1) * size > start]
            places = [p for n in own for p in places[n * size : (n + 1) * size]]
        done = 0
        pieces = stream.batches(self.positions[list(places)], self.batch_size)
        for number, (inputs, given, names) in enumerate(pieces):
            here = list(places[done : done + len(names)])
            done += len(names)
            if here[0] >= start and (stream.by_position or number % of == rank):
                known = [None] * len(names) if given is None else given.tolist()
                labels, own_labels = self._numbered([int(name) for name in names], known)
                yield LabelledBatch(inputs, labels, names, here[0], here, own_labels)

    def _numbers(self) -> list[int]:
        """The numbers of the batches of this shard."""
        rank, of = self.shard
        return list(range(rank, -(-len(self.positions) // self.batch_size), of))

    def _own(self) -> np.ndarray:
        """The positions of this shard; of a stream that makes its own batches, about as many."""
        rank, of = self.shard
        if of == 1:
            return self.positions
        if isinstance(self.records, Stream) and not self.records.by_position:
            return self.positions[rank::of]
        batch = np.arange(len(self.positions)) // self.batch_size
        return self.positions[batch % of == rank]

    def _samples(self, numbers: Sequence[int]) -> Iterator[list[_Sample]]:
        reader = _Reader(cast(Records, self.records), self.preprocessing, self.max_pixels)
        size = self.batch_size
        chunks = [self.positions[n * size : (n + 1) * size].tolist() for n in numbers]
        if self.workers == 0:
            return ([reader[i] for i in chunk] for chunk in chunks)
        loader = DataLoader(
            reader,
            batch_sampler=chunks,
            num_workers=self.workers,
            collate_fn=list,
            generator=torch.Generator().manual_seed(self.seed),  # the global one stays as it is
        )
        return iter(loader)

    def _stop_if_too_many(self, reason: str) -> None:
        if len(self.unreadable) <= MOST_UNREADABLE * self.drawn:
            return
        names = list(self.unreadable.values())
        more = ", …" if len(names) > 3 else ""
        raise BlockfitError(
            f"{len(names)} or more of {self.drawn} images of {self.records.source} cannot be "
            f"read: {', '.join(names[:3])}{more} ({reason}); remove or repair them"
        )

    def _batch(self, alike: Sequence[tuple[int, _Sample]]) -> LabelledBatch:
        places, samples = [place for place, _ in alike], [sample for _, sample in alike]
        labels, own = self._numbered([s.position for s in samples], [s.label for s in samples])
        inputs = torch.stack([cast(Tensor, sample.inputs) for sample in samples])
        names = [sample.name for sample in samples]
        return LabelledBatch(inputs, labels, names, places[0], places, own)

    def _numbered(
        self, positions: Sequence[int], given: Sequence[int | None]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Labels as the model numbers them, and as the data set does; what has none is noted."""
        own = [-1 if label is None or label < 0 else label for label in given]
        numbers = [self.matching.of(label) for label in own]
        for position, label, number in zip(positions, own, numbers, strict=True):
            if label >= 0:
                self.labelled.add(position)
            if number is None:
                self.uncounted[position] = self.matching.call(label)
        found = [-1 if number is None else number for number in numbers]
        return _tensor_of(found), _tensor_of(own)

    def _labels_told(self) -> dict[str, Any] | None:
        """How labels were matched and how many images are not counted, as JSON values."""
        own = [i for i in self._own().tolist() if i not in self.unreadable]
        if self.texts is not None or self.labelled.isdisjoint(own):
            return None
        missing = Counter(self.uncounted[i] for i in own if i in self.uncounted)
        ordered = dict(missing.most_common())
        return {
            "by": self.matching.by,
            "counted": len(own) - missing.total(),
            "not_counted": {name or "no label": count for name, count in ordered.items()},
            "line": self.matching.line(ordered),
        }


def _tensor_of(numbers: list[int]) -> Tensor | None:
    """``None`` where all are −1."""
    return torch.tensor(numbers, dtype=torch.int64) if max(numbers) >= 0 else None


@checked
def images(
    source: Any,
    model: nn.Module | None = None,
    *,
    limit: int | str | None = None,
    seed: int = 0,
    batch_size: int = 32,
    preprocessing: Given | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
    workers: int = 0,
    max_pixels: int | None = None,
) -> Images:
    """Images from anywhere, prepared for a model.

    Args:
        source: where the images are; ``:SPLIT`` after a name or folder chooses one of its splits.

            - a folder: flat, one folder per class (WordNet ids in ImageNet's order), or of splits
            - an image file, or a list or pattern of them
            - a text file with a path per line, and perhaps a label after a tab or space
            - parquet or arrow files, a ``datasets`` folder or a Hub id
            - tar shards: files, a pattern such as ``shard-{000000..000003}.tar``, or their folder
            - a ``.npy`` file, or a ``.npz`` file with labels
            - a folder of torchvision's: MNIST, Fashion-MNIST, CIFAR-10, CIFAR-100
            - ``mnist``, ``fashion-mnist``, ``cifar10``, ``cifar100-fine``, ``cifar100-coarse``,
              ``imagenet-1k`` (from the Hub or its cache), ``digits`` (the demo's)
            - Pillow images: one, a list of them, or a list of (image, label) pairs
            - a uint8 array (N, H, W[, C]), a tensor (N, C, H, W) that is already prepared, or a
              pair of one of them (or of a list) and labels
            - a data set of ``datasets``, with the user's transform or streamed, too
            - a data set with positions, such as torchvision's; a ``DataLoader`` or any re-iterable
              of tensors, (tensor, label) pairs or dictionaries
        model: the model whose preprocessing and class names are used.
        limit: how many images to draw with the seed over the whole set; all, in their order,
            by default, of which a calibration draws 512. ``"all"`` makes it use all of them.
        seed: of the draw.
        batch_size: images per batch; a stream's own batches stay as they are.
        preprocessing: instead of the model's own: a ``Preprocessing``; any function from a Pillow
            image to a tensor (C, H, W); a size such as 224; a ``preprocessor_config.json``; or the
            name of a model that says.
        image_column: of a table or ``.npz`` file, or the ending in shards; found by default.
        label_column: likewise, or the key in the shards' ``.json``.
        split: of a data set with several.
        workers: processes that decode; 0 decodes in this one. The batches are the same.
        max_pixels: a picture of more is unreadable; Pillow's limit by default, 178,956,970.

    Raises:
        BlockfitError: where there are no images, or it is not clear how to prepare them.
    """
    count = None if limit == "all" else limit
    if isinstance(count, str):
        raise BlockfitError(f'limit must be a number of images or "all", got {limit!r}')
    model = None if model is None else bare(model)
    at_least(1, batch_size=batch_size, limit=count, max_pixels=max_pixels)
    at_least(0, workers=workers, seed=seed)
    records = _records(source, Columns(image_column, label_column, split), count, seed)
    if records.size == 0:
        raise BlockfitError(f"{records.source} holds no images; give one that holds some")
    prepare = _prepare(records, model, preprocessing)
    positions = np.arange(records.size)
    beyond = positions[:0]
    if count is not None:
        order = np.random.default_rng(seed).permutation(records.size)
        positions, beyond = _in_order(records, order[:count]), _in_order(records, order[count:])
    made = Images(
        records, positions, prepare, batch_size, seed, workers, len(positions),
        _matching(records, model), max_pixels=max_pixels,
        limited=limit is not None, beyond=beyond,
    )  # fmt: skip
    if made.unused:
        tell([made.unused])
    if isinstance(records, Records) and records.labels is not None:
        given = [*positions.tolist(), *beyond.tolist()]
        made._numbered(given, [records.labels[i] for i in given])
    return made


def prepared_images(
    images_: Any, model: nn.Module | None, preprocessing: Given | None = None, seed: int = 0
) -> Images:
    """``Images`` of whatever a verb was given.

    Raises:
        BlockfitError: for a preprocessing of images that have theirs already.
    """
    if not isinstance(images_, Images):
        return images(images_, model, seed=seed, preprocessing=preprocessing)
    if preprocessing is not None:
        raise BlockfitError(
            "the images have their preprocessing already; give preprocessing= to blockfit.images, "
            "or what the images were made from"
        )
    return images_


def _in_order(records: Records | Stream, positions: np.ndarray) -> np.ndarray:
    """Sorted, where pictures are best read so."""
    sequential = isinstance(records, Records) and records.in_order
    return np.sort(positions) if sequential else positions


def _matching(records: Records | Stream, model: nn.Module | None) -> Matching:
    if isinstance(records, Stream):
        return match(records.class_names, model)
    used = None
    if records.labels is not None:
        used = {label for label in records.labels if label is not None and label >= 0}
    return match(records.class_names, model, used, records.own_numbers, records.unit)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    if isinstance(batch, Tensor):
        return {"": batch}
    return {key: value for key, value in batch.items() if isinstance(value, Tensor)}


def _records(source: Any, asked: Columns, limit: int | None, seed: int) -> Records | Stream:
    name = type(source).__name__
    kind = {"list": "a list", "tuple": "pictures and labels"}.get(name, name)
    source = tuple(map(unboxed, source)) if type(source) is tuple else unboxed(source)
    if isinstance(source, str) and source in ("digits", "digits:test"):
        return from_digits(source)
    if isinstance(source, str | Path):
        return from_path(str(source), asked)
    if isinstance(source, np.ndarray | Tensor):
        return from_arrays(source)
    if hasattr(source, "columns") and hasattr(source, "to_dict"):  # a table of pandas'
        return from_items(source.to_dict("records"), kind, asked)
    if isinstance(source, Image.Image):
        source, kind = [source], "Pillow image"
    if isinstance(source, tuple) and len(source) == 2 and hasattr(source[0], "shape"):
        return from_arrays(*source)
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], list):
        return from_items(paired(*source), kind, asked)
    if type(source).__module__.partition(".")[0] == "datasets":
        table, kind = one_split(source, kind, asked.split)
        if is_streamed(table):
            return from_stream(table, kind, asked, limit, seed)
        if is_transformed(table):
            return from_transformed(table, kind, asked)
        return from_dataset(table, kind, asked)
    if isinstance(source, Sequence) and source and isinstance(source[0], str | Path):
        return from_files(source, asked)
    return stream_of(source) or from_items(source, kind, asked)


def _prepare(
    records: Records | Stream, model: nn.Module | None, given: Given | None
) -> Prepare | None:
    if isinstance(records, Stream) or records.prepared:
        if given is not None:
            raise BlockfitError(f"{records.source} is prepared already; leave preprocessing= out")
        return None
    if given is not None:
        return read_preprocessing(given) if isinstance(given, str | int) else given
    if model is None:
        raise BlockfitError(
            f"how are the images of {records.source} prepared? give the model, or preprocessing="
        )
    made = preprocessing_of(model)
    taken = {made.channels, channels_taken(model) or made.channels}
    if taken - {1, 3}:
        raise BlockfitError(
            f"{type(model).__name__} takes {max(taken - {1, 3})} channels, and pictures are read "
            "as grey or RGB; give its images as prepared tensors (images, channels, height, width)"
        )
    return made


@dataclass(frozen=True)
class _Sample:
    position: int
    name: str
    inputs: Tensor | None
    label: int | None = None
    reason: str = ""
    fault: str | None = None  # a BlockfitError's message, carried out of a worker process


@dataclass(frozen=True, eq=False)
class _Reader(Dataset[_Sample]):
    """Reads, decodes and prepares one image; what runs in the worker processes."""

    records: Records
    prepare: Prepare | None
    max_pixels: int | None = None

    def __getitem__(self, position: int) -> _Sample:
        name = self.records.name(position)
        try:
            picture, label = self.records.read(position)
            if isinstance(picture, Tensor) or self.prepare is None:
                return _Sample(position, name, cast(Tensor, picture), label)
            tensor = self.prepare(decode(picture, self.max_pixels))
        except Unreadable as error:
            return _Sample(position, name, None, reason=str(error))
        except BlockfitError as error:
            return _Sample(position, name, None, fault=str(error))
        if not isinstance(tensor, Tensor) or tensor.ndim != 3:
            got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
            fault = f"the preprocessing must return tensors (channels, height, width), got {got}"
            return _Sample(position, name, None, fault=fault)
        return _Sample(position, name, tensor, label)
