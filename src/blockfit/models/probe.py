"""What the blocks of a model consist of, found by running them on a few images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from blockfit.models.blocks import Batch, Blocks, block_modules
from blockfit.models.forward import evaluating, first_images
from blockfit.models.parts import Parts, find_parts
from blockfit.models.residual import (
    Skip,
    Writer,
    find_attention,
    find_placed_writers,
    find_writers,
    input_of,
    written,
)
from blockfit.models.trace import trace

PROBE_IMAGES = 4
"""Images on which the residual writers of a block are looked for."""


def shared_parameters(model: nn.Module, blocks: Iterable[nn.Module]) -> frozenset[int]:
    """Ids of the parameters that several blocks, or several layers, of a model have in common."""
    users = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    users.update(id(p) for block in blocks for p in block.parameters())
    once = 2  # its layer, and its block
    return frozenset(parameter for parameter, count in users.items() if count > once)


class Probe:
    """Looks into every block at most once, at the first question about it, in eval mode.

    Args:
        model: in any mode, which stays.
        inputs: a batch; its first ``PROBE_IMAGES`` images are run.
    """

    def __init__(self, model: nn.Module, blocks: Blocks, inputs: Batch) -> None:
        self._modules, self._blocks = block_modules(model, blocks), blocks
        few = first_images(inputs, PROBE_IMAGES)
        with evaluating(model):
            self._trace = trace(model, blocks, few, range(blocks.depth))
        self._writers: dict[int, list[Writer]] = {}
        self._parts: dict[int, Parts] = {}
        self._bare: dict[int, bool] = {}
        self._tokens: dict[int, int] = {}
        self._shared = shared_parameters(model, self._modules)
        self._skips: dict[int, Skip | None] = {}

    @property
    def state(self) -> Tensor:
        """A hidden state, for its shape (images, tokens, width), dtype and device."""
        return self._trace.states[0]

    def writers(self, index: int) -> list[Writer]:
        """The residual writers of block ``index``."""
        if index not in self._writers:
            block, hidden = self._modules[index], self._trace.states[index]
            run = self._trace.runner(block, index)
            find = find_placed_writers if self._blocks.stages else find_writers
            with evaluating(block):
                self._writers[index] = find(block, run, hidden, self._shared)
        return self._writers[index]

    def parts(self, index: int) -> Parts:
        """What can be narrowed in block ``index``."""
        if index not in self._parts:
            block, hidden = self._modules[index], self._trace.states[index]
            run = self._trace.runner(block, index)
            writers = self.writers(index)
            with evaluating(block):
                self._parts[index] = find_parts(block, index, writers, run, hidden, self._shared)
        return self._parts[index]

    def tokens(self, index: int) -> int:
        """Tokens of one image in block ``index``, as its MLP sees them."""
        if not self._blocks.stages:
            return self.state.shape[1]
        if index not in self._tokens:
            block, hidden = self._modules[index], self._trace.states[index]
            writer = self.writers(index)[-1]
            run = self._trace.runner(block, index)
            with evaluating(block):
                read = input_of(block, writer.name, run, hidden)
            self._tokens[index] = writer.rows(read, len(hidden)).shape[1]
        return self._tokens[index]

    def bare(self, index: int) -> bool:
        """Whether block ``index`` with its two writers silenced returns its input unchanged.

        Not asked of blocks in stages, whose states have layouts of their own, nor of those whose
        sums are not what they return.
        """
        if self._blocks.stages or any(writer.given_to for writer in self.writers(index)):
            return False
        if index not in self._bare:
            block, hidden = self._modules[index], self._trace.states[index]
            silent = {writer.name: 0.0 for writer in self.writers(index)}
            with evaluating(block), written(block, silent):
                self._bare[index] = torch.equal(self._trace.run(block, index, hidden), hidden)
        return self._bare[index]

    def skip(self, index: int) -> Skip | None:
        """The attention of block ``index``, where its MLP can be fed without it."""
        if index not in self._skips:
            attention, writers = None, self.writers(index)
            if len(writers) == 2 and self.bare(index):
                block, hidden = self._modules[index], self._trace.states[index]
                pair = (writers[0], writers[1])
                run = self._trace.runner(block, index)
                with evaluating(block):
                    attention = find_attention(block, pair, run, hidden)
            self._skips[index] = attention
        return self._skips[index]
