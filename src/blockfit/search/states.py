"""The original model on the fit images: the targets of every refit and repair."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from blockfit import processes as ranks
from blockfit.data.images import Images, LabelledBatch
from blockfit.errors import BlockfitError
from blockfit.models.blocks import Blocks, block_modules
from blockfit.models.forward import evaluating, first_images
from blockfit.models.parts import Parts, find_parts
from blockfit.models.residual import Skip, Writer, find_attention, find_writers, input_of, written
from blockfit.models.trace import Trace, trace
from blockfit.search.spill import Shelf
from blockfit.search.tokens import Draw

PROBE_IMAGES = 4
"""Images on which the residual writers of a block are looked for."""

STATES_LIMIT = 4 << 30
"""Bytes of hidden states that are kept without ``--max-memory``: 512 images of a ViT-B fit."""

MIDDLES_SHARE = 8
"""What drawn states before the MLPs may take: the limit of all states by this."""


class Originals:
    """What the original model computes on the fit images: the targets of every refit and repair.

    Hidden states at all boundaries are kept while they fit into ``limit_bytes``; beyond it, only
    h[0] is, and the others are computed again when they are asked for. In a run on several
    processes each holds its own batches: ``numbers`` are theirs, ``sizes`` are of all. A ``shelf``
    says where everything lies instead of the limit.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        images: Images,
        limit_bytes: int = STATES_LIMIT,
        progress: Callable[[int, int], None] | None = None,
        shelf: Shelf | None = None,
    ) -> None:
        self.model, self._shelf = model, shelf
        self.blocks = blocks
        self.modules = block_modules(model, blocks)
        self.traces: list[Trace] = []
        self.numbers: list[int] = []
        self._writers: dict[int, list[Writer]] = {}
        self._middles: dict[tuple[int, Draw], list[Tensor]] = {}
        self._bare: dict[int, bool] = {}
        self._parts: dict[int, Parts] = {}
        self._skips: dict[int, Skip | None] = {}
        self._held = 0
        self._limit = limit_bytes
        own = images.own()
        with evaluating(model):
            for batch in own.batches():
                self._trace(batch)
                if progress is not None:
                    progress(sum(len(seen.states[0]) for seen in self.traces), len(own))
            images.exchange()
            self._tell()
            if not self.sizes:
                raise BlockfitError(
                    "there are no images to fit on; give a folder or file that holds some"
                )
            alone = ranks.count() == 1
            inputs = self.traces[0].inputs if alone else next(iter(images))
            few = first_images(inputs, PROBE_IMAGES)
            self._probe = trace(model, blocks, few, range(blocks.depth))

    def _trace(self, batch: LabelledBatch) -> None:
        boundaries = range(self.blocks.depth + 1)
        seen = trace(self.model, self.blocks, batch.inputs, boundaries, batch.names, self.hold)
        size = sum(state.nbytes for state in seen.states.values())
        if self._shelf is not None:
            seen.inputs = self._shelf.hold_batch(seen.inputs)
        elif self._held + size > self._limit:
            seen.states = {0: seen.states[0]}
        else:
            self._held += size
        self.traces.append(seen)
        self.numbers.append(batch.number)

    def _tell(self) -> None:
        """Learn of the batches of all processes: images, rank, and whether all states are kept."""
        pairs = zip(self.numbers, self.traces, strict=True)
        depth = self.blocks.depth
        own = [[n, *t.states[0].shape[:2], len(t.states) > depth] for n, t in pairs]
        told = [(*row, rank) for rank, rows in enumerate(ranks.gathered(own)) for row in rows]
        self.sizes = {number: images for number, images, *_ in sorted(told)}
        self._tokens = {number: tokens for number, _, tokens, *_ in told}
        self._whole = {number for number, _, _, whole, _ in told if whole}
        self._owners = {row[0]: row[-1] for row in told}
        self._order = {number: place for place, number in enumerate(self.sizes)}

    @property
    def tokens(self) -> int:
        """Tokens of all images, of all processes."""
        return sum(images * self._tokens[number] for number, images in self.sizes.items())

    def judges(self, batch: int, every: int) -> bool:
        """Whether a batch is of the one part in ``every`` that judges and is not fitted on."""
        return self._order[self.numbers[batch]] % every == 1

    @property
    def complete(self) -> bool:
        """Whether the hidden states of all batches, of all processes, are kept."""
        return self._whole == set(self.sizes)

    def kept(self) -> Iterator[tuple[dict[int, Tensor], range]]:
        """The hidden states of each batch of this process, and the places of its images."""
        return ((seen.states, self.places(b)) for b, seen in enumerate(self.traces))

    def hold(self, tensor: Tensor) -> Tensor:
        """Where a tensor of every batch lies: in memory, or on the shelf."""
        return tensor if self._shelf is None else self._shelf.hold(tensor)

    @property
    def like(self) -> Tensor:
        """A hidden state, for its dtype and device."""
        return self._probe.states[0]

    def part(self, images: int) -> Originals:
        """The first batches with at least ``images`` images; the hidden states are shared."""
        few = copy.copy(self)
        few.sizes, few._middles = {}, {}
        for number, size in self.sizes.items():
            if sum(few.sizes.values()) >= images:
                break
            few.sizes[number] = size
        pairs = zip(self.numbers, self.traces, strict=True)
        own = [(number, seen) for number, seen in pairs if number in few.sizes]
        few.numbers, few.traces = [n for n, _ in own], [seen for _, seen in own]
        return few

    def with_more(self, traces: Sequence[Trace]) -> Originals:
        """These images and further ones, whose traces hold all states and every process has."""
        more = copy.copy(self)
        more._middles = {}
        first = max(self.sizes) + 1
        added = {first + place: seen for place, seen in enumerate(traces)}
        more.sizes = self.sizes | {n: len(seen.states[0]) for n, seen in added.items()}
        more._tokens = self._tokens | {n: seen.states[0].shape[1] for n, seen in added.items()}
        more._order = {number: place for place, number in enumerate(more.sizes)}
        more._whole = self._whole | set(added)
        more._owners = self._owners | {n: n % ranks.count() for n in added}
        own = [n for n in added if more._owners[n] == ranks.rank()]
        more.numbers = [*self.numbers, *own]
        more.traces = [*self.traces, *(added[n] for n in own)]
        return more

    def behind(self, part: Originals, images: int) -> tuple[dict[int, Trace], list[int], list[int]]:
        """The batches behind ``part``, up to ``images`` images or to states that are not kept.

        Returns:
            numbered anew from 0: the traces that this process holds, the images of every batch,
            and the rank that holds each.
        """
        taken: list[int] = []
        for number in list(self.sizes)[len(part.sizes) :]:
            if sum(self.sizes[n] for n in taken) >= images or number not in self._whole:
                break
            taken.append(number)
        held = dict(zip(self.numbers, self.traces, strict=True))
        return (
            {place: held[n] for place, n in enumerate(taken) if n in held},
            [self.sizes[n] for n in taken],
            [self._owners[n] for n in taken],
        )

    def places(self, batch: int) -> range:
        """Which of all fit images are those of one batch."""
        number = self.numbers[batch]
        first = sum(size for other, size in self.sizes.items() if other < number)
        return range(first, first + self.sizes[number])

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

    def parts(self, index: int) -> Parts:
        """What can be narrowed in block ``index``; found once."""
        if index not in self._parts:
            block, hidden = self.modules[index], self._probe.states[index]
            run = self._probe.runner(block, index)
            self._parts[index] = find_parts(block, index, self.writers(index), run, hidden)
        return self._parts[index]

    def bare(self, index: int) -> bool:
        """Whether block ``index`` with its two writers silenced returns its input unchanged."""
        if index not in self._bare:
            hidden, block = self._probe.states[index], self.modules[index]
            with written(block, {writer.name: 0.0 for writer in self.writers(index)}):
                self._bare[index] = torch.equal(self._probe.run(block, index, hidden), hidden)
        return self._bare[index]

    def skip(self, index: int) -> Skip | None:
        """The attention of block ``index``, where its MLP can be fed without it."""
        if index not in self._skips:
            found, writers = None, self.writers(index)
            if len(writers) == 2 and self.bare(index):
                run = self._probe.runner(self.modules[index], index)
                hidden = self._probe.states[index]
                pair = (writers[0], writers[1])
                found = find_attention(self.modules[index], pair, run, hidden)
            self._skips[index] = found
        return self._skips[index]

    def middle(self, batch: int, index: int, draw: Draw) -> Tensor:
        """The drawn tokens of the state of block ``index`` before its MLP's contribution.

        On the original's input; shape (images, drawn tokens, width).
        """
        key = (index, draw)
        if key not in self._middles:
            out = [
                self.hold(draw.take(self._middle(number, index), self.places(number)))
                for number in range(len(self.traces))
            ]
            known = sum(s.nbytes for rows in self._middles.values() for s in rows)
            if known + sum(s.nbytes for s in out) > self._limit // MIDDLES_SHARE:
                self._middles.clear()
            self._middles[key] = out
        return self._middles[key][batch]

    def _middle(self, batch: int, index: int) -> Tensor:
        seen, block, writers = self.traces[batch], self.modules[index], self.writers(index)
        hidden = self.state(batch, index)
        if not self.bare(index):
            with written(block, {writers[-1].name: 0.0}):
                return seen.run(block, index, hidden)
        read = input_of(block, writers[0].name, seen.runner(block, index), hidden)
        return hidden + writers[0].contribution(block, read)
