"""The original model on the fit images: the targets of every refit and repair."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from blockfit.blocks import Blocks, block_modules
from blockfit.data import Images
from blockfit.errors import BlockfitError
from blockfit.probe import evaluating, first_images
from blockfit.residual import Writer, find_writers, written
from blockfit.trace import Trace, trace

PROBE_IMAGES = 4
"""Images on which the residual writers of a block are looked for."""


class Originals:
    """What the original model computes on the fit images: the targets of every refit and repair.

    Hidden states at all boundaries are kept while they fit into ``limit_bytes``; beyond it, only
    h[0] is, and the others are computed again when they are asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        images: Images,
        limit_bytes: int = 2 << 30,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.model = model
        self.blocks = blocks
        self.modules = block_modules(model, blocks)
        self.traces: list[Trace] = []
        self._writers: dict[int, list[Writer]] = {}
        self._middles: dict[int, list[Tensor]] = {}
        self._bare: dict[int, bool] = {}
        self._held = 0
        self._limit = limit_bytes
        done = 0
        with evaluating(model):
            for batch in images.batches():
                seen = trace(model, blocks, batch.inputs, range(blocks.depth + 1), batch.names)
                self.traces.append(seen)
                size = sum(s.nbytes for s in seen.states.values())
                if self._held + size > limit_bytes:
                    seen.states = {0: seen.states[0]}
                else:
                    self._held += size
                done += len(seen.states[0])
                if progress is not None:
                    progress(done, len(images))
            if not self.traces:
                raise BlockfitError(
                    "there are no images to fit on; give a folder or file with some"
                )
            few = first_images(self.traces[0].inputs, PROBE_IMAGES)
            self._probe = trace(model, blocks, few, range(blocks.depth))

    def part(self, images: int) -> Originals:
        """The first batches with at least ``images`` images; the hidden states are shared."""
        few = copy.copy(self)
        few.traces, few._middles = [], {}
        for seen in self.traces:
            if sum(len(t.states[0]) for t in few.traces) >= images:
                break
            few.traces.append(seen)
        return few

    def state(self, batch: int, boundary: int) -> Tensor:
        """h[boundary] of one batch."""
        seen = self.traces[batch]
        known = max(b for b in seen.states if b <= boundary)
        hidden = seen.states[known]
        for index in range(known, boundary):
            hidden = seen.run(self.modules[index], index, hidden)
        if boundary != known:
            # Boundaries are asked for in order: keep the last one to go on from.
            seen.states = {0: seen.states[0], boundary: hidden}
        return hidden

    def writers(self, index: int) -> list[Writer]:
        """The residual writers of block ``index``; found once."""
        if index not in self._writers:
            block = self.modules[index]
            hidden = self._probe.states[index]
            self._writers[index] = find_writers(block, self._probe.runner(block, index), hidden)
        return self._writers[index]

    def bare(self, index: int) -> bool:
        """Whether block ``index`` with its two writers silenced returns its input unchanged."""
        if index not in self._bare:
            hidden, block = self._probe.states[index], self.modules[index]
            with written(block, {writer.name: 0.0 for writer in self.writers(index)}):
                self._bare[index] = torch.equal(self._probe.run(block, index, hidden), hidden)
        return self._bare[index]

    def middle(self, batch: int, index: int) -> Tensor:
        """The state of block ``index`` before its MLP's contribution, on the original's input."""
        kept = self._middles.get(index)
        if kept is not None:
            return kept[batch]
        block = self.modules[index]
        silenced = {self.writers(index)[-1].name: 0.0}
        out = []
        for number, seen in enumerate(self.traces):
            with written(block, silenced):
                out.append(seen.run(block, index, self.state(number, index)))
        size = sum(s.nbytes for s in out)
        if self._held + size > self._limit:
            self._middles = {index: out}
        else:
            self._middles[index] = out
            self._held += size
        return out[batch]
