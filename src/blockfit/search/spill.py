"""Tensors kept in memory up to a limit, and beyond it in files that are read when needed."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from blockfit.errors import BlockfitError, first_line
from blockfit.fit.moments import Moments
from blockfit.fit.plan import Span
from blockfit.models.forward import Batch

MOMENTS_SHARE, STATES_SHARE = 0.25, 0.25
"""Parts of a limit that sums and hidden states may take; the rest is for what is being computed."""


class Shelf:
    """Holds tensors of the CPU; those of other devices stay where they are.

    A tensor beyond the limit becomes a private map of a deleted file in the folder for temporary
    files (``TMPDIR``): the same bits, in pages that the system drops when memory is short.

    Args:
        limit_bytes: of the tensors that stay in memory.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes, self.used_bytes = limit_bytes, 0

    def hold(self, tensor: Tensor) -> Tensor:
        """The tensor, or a copy of it that takes no memory of its own.

        Raises:
            BlockfitError: where it cannot be written.
        """
        if tensor.device.type != "cpu" or not tensor.numel():
            return tensor
        size = tensor.nbytes
        if self.used_bytes + size <= self.limit_bytes:
            self.used_bytes += size
            weakref.finalize(tensor, self._free, size).atexit = False
            return tensor
        try:
            handle, name = tempfile.mkstemp(prefix="blockfit-", suffix=".states")
            try:
                with open(handle, "wb") as file:
                    file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                mapped = torch.from_file(
                    name, shared=False, size=tensor.numel(), dtype=tensor.dtype
                )
            finally:
                os.unlink(name)
        except (OSError, RuntimeError) as error:
            raise BlockfitError(
                f"cannot put hidden states into {tempfile.gettempdir()}: {first_line(error)}; make "
                "room, name another folder by TMPDIR, or raise max_memory="
            ) from error
        return mapped.reshape(tensor.shape)

    def tidy(self) -> None:
        """Give the system back what was freed but kept for later, where its C library can."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
        if trim is not None:  # glibc; others keep less
            trim(0)

    def hold_batch(self, inputs: Batch) -> Batch:
        """``hold`` for what a model is called with."""
        if isinstance(inputs, Tensor):
            return self.hold(inputs)
        return {k: self.hold(v) if isinstance(v, Tensor) else v for k, v in inputs.items()}

    def _free(self, size: int) -> None:
        self.used_bytes -= size


def check_batch(images: int, state: Tensor, depth: int, limit_bytes: int) -> None:
    """Refuse batches whose hidden states alone would fill half of a limit."""
    each = (depth + 1) * state[0].nbytes
    if images * each > limit_bytes / 2:
        fits = int(limit_bytes / 2 / each)
        do = f"use batch_size={fits}" if fits else "raise max_memory="
        raise BlockfitError(
            f"the hidden states of a batch of {images} images take {images * each / 1e9:.2g} GB, "
            f"more than half of max_memory={limit_bytes / 1e9:.2g} GB; {do}"
        )


def moments_bytes(boundaries: int, spans: int, width: int) -> int:
    """Memory of ``Moments``: two token types, float64."""
    square = width * width
    return 2 * 8 * (boundaries * (square + width) + spans * (square + 2))


def groups_of(spans: Iterable[Span], width: int, limit_bytes: float) -> list[list[Span]]:
    """The spans in as few groups as have moments within a limit; neighbours stay together.

    Raises:
        BlockfitError: where one span takes more.
    """
    groups: list[list[Span]] = []
    known: set[int] = set()
    for span in sorted(spans):
        more = known | {span.start, span.stop}
        fits = groups and moments_bytes(len(more), len(groups[-1]) + 1, width) <= limit_bytes
        if not fits:
            groups.append([])
            more = {span.start, span.stop}
        groups[-1].append(span)
        known = more
    if moments_bytes(2, 1, width) > limit_bytes:
        raise BlockfitError(
            f"the moments of one span take {moments_bytes(2, 1, width) / 1e9:.2g} GB at width "
            f"{width}, more than there is room for; raise max_memory= to "
            f"{moments_bytes(2, 1, width) / MOMENTS_SHARE / 1e9:.2g}GB at least"
        )
    return groups


class GroupedMoments:
    """Moments of many spans, taken group by group; one group is in memory at a time.

    Args:
        groups: from ``groups_of``.
        parts: the moments of each group, in the same order.
    """

    def __init__(self, groups: Iterable[list[Span]], parts: Iterable[Moments]) -> None:
        shelf = Shelf(0)
        self._stored: list[tuple[list[Span], list[int], dict[str, Tensor]]] = []
        for spans, moments in zip(groups, parts, strict=True):
            counts, tensors = moments.state()
            self.width, self._prefix = moments.width, moments.prefix_tokens
            held = {name: shelf.hold(tensor) for name, tensor in tensors.items()}
            self._stored.append((spans, counts, held))
        self.spans = tuple(sorted(s for spans, _, _ in self._stored for s in spans))
        self._loaded: Moments | None = None

    def of(self, span: Span) -> Moments:
        """Moments that hold a span.

        Raises:
            BlockfitError: where none do.
        """
        if self._loaded is None or span not in self._loaded.spans:
            self._loaded = None
            for spans, counts, tensors in self._stored:
                if span in spans:
                    self._loaded = Moments(spans, self.width, self._prefix)
                    self._loaded.restore(counts, tensors)
        if self._loaded is None:
            raise BlockfitError(f"no moments were taken for span {span}")
        return self._loaded
