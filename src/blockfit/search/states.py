"""Images as the original model saw them: the one holder of batches and their hidden states."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from blockfit import processes as ranks
from blockfit.data.images import Images, LabelledBatch
from blockfit.data.labels import Matching
from blockfit.errors import BlockfitError
from blockfit.models.blocks import Blocks, block_modules
from blockfit.models.forward import evaluating
from blockfit.models.probe import Probe
from blockfit.models.residual import input_of, written
from blockfit.models.trace import Trace, trace
from blockfit.progress import Progress, silent
from blockfit.search.spill import Shelf
from blockfit.search.tokens import Draw

STATES_LIMIT = 4 << 30
"""Bytes of hidden states that are kept without ``--max-memory``: 512 images of a ViT-B fit."""

MIDDLES_SHARE = 8
"""What drawn states before the MLPs may take: the limit of all states by this."""


class TracedImages:
    """Batches of images with what the original model computed on them.

    Hidden states at all boundaries are kept while they fit into a limit; beyond it, only h[0] is,
    and the others are computed again when they are asked for. A ``shelf`` says where everything
    lies instead of the limit.

    In a run on several processes each holds its own batches, ``numbers`` are theirs, and ``owners``
    says who holds which; or all hold all of them, and ``owners`` is ``None``. ``sizes`` are of all
    batches either way: number → images.

    Args:
        matching: how labels became classes of the model.
        limit_bytes: of the hidden states of this process.
        shelf: where images and hidden states lie.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        matching: Matching,
        limit_bytes: float = STATES_LIMIT,
        shelf: Shelf | None = None,
    ) -> None:
        self.model, self.blocks, self.matching = model, blocks, matching
        self.modules = block_modules(model, blocks)
        self.probe: Probe
        """What the blocks consist of."""
        self.traces: list[Trace] = []
        self.labels: list[Tensor | None] = []
        self.numbers: list[int] = []
        self.sizes: dict[int, int] = {}
        self._shows: dict[int, int] = {}
        """Which batch each is a view of: its own number, where it shows images as they are."""
        self.owners: dict[int, int] | None = None
        self._tokens: dict[int, int] = {}
        self._whole: set[int] = set()
        self._middles: dict[tuple[int, int, Draw], Tensor] = {}
        self._spent = 0
        self._held, self._limit, self._shelf = 0, limit_bytes, shelf

    @classmethod
    def of(
        cls,
        model: nn.Module,
        blocks: Blocks,
        images: Images,
        limit_bytes: float = STATES_LIMIT,
        progress: Progress = silent,
        shelf: Shelf | None = None,
    ) -> TracedImages:
        """Run the original on images; each process of a run takes its own batches.

        Args:
            limit_bytes: of the hidden states of this process.
            shelf: where images and hidden states lie instead of the limit.

        Raises:
            BlockfitError: no image, NaN or infinite hidden states.
        """
        made = cls(model, blocks, images.matching, limit_bytes, shelf)
        own = images.own()
        with evaluating(model):
            made._trace_all(own, progress)
            images.exchange()
            made._gather(images.views)
            if not made.sizes:
                raise BlockfitError(
                    "there are no images to fit on; give a folder or file that holds some"
                )
            alone = ranks.count() == 1
            inputs = made.traces[0].inputs if alone else next(iter(images))
            made.probe = Probe(model, blocks, inputs)
        return made

    @classmethod
    def everywhere(
        cls,
        model: nn.Module,
        blocks: Blocks,
        images: Images,
        progress: Progress = silent,
        shelf: Shelf | None = None,
    ) -> TracedImages:
        """The same with all batches and all their hidden states on every process.

        For images to judge by: the unit of their work is a batch, numbered from 0.
        """
        made = cls(model, blocks, images.matching, math.inf, shelf)
        with evaluating(model):
            made._trace_all(images, progress)
            if not made.traces:
                raise BlockfitError("there are no held-out images to judge by; give more images")
            made.probe = Probe(model, blocks, made.traces[0].inputs)
        made.numbers = list(range(len(made.traces)))
        rows = ((number, *_counts(seen)) for number, seen in enumerate(made.traces))
        made._count(rows, images.views)
        made._whole = set(made.numbers)
        return made

    def _trace_all(self, images: Images, progress: Progress) -> None:
        for batch in images.batches():
            self._trace(batch)
            progress(len(self), images.views * len(images))

    def _trace(self, batch: LabelledBatch) -> None:
        boundaries = range(self.blocks.depth + 1)
        seen = trace(self.model, self.blocks, batch.inputs, boundaries, batch.names, self.hold)
        size = sum(s.nbytes for kept in (seen.states, seen.outputs) for s in kept.values())
        if self._shelf is not None:
            seen.inputs = self._shelf.hold_batch(seen.inputs)
        elif self._held + size > self._limit:
            seen.states, seen.outputs = {0: seen.states[0]}, {}
        else:
            self._held += size
        self.traces.append(seen)
        self.labels.append(batch.labels)
        self.numbers.append(batch.number)

    def _gather(self, views: int) -> None:
        """Learn of the batches of all processes: images, rank, and whether all states are kept."""
        pairs = zip(self.numbers, self.traces, strict=True)
        depth = self.blocks.depth
        own = [[n, *_counts(t), len(t.states) > depth] for n, t in pairs]
        rows = [(*row, rank) for rank, part in enumerate(ranks.gathered(own)) for row in part]
        self._count((row[:3] for row in sorted(rows)), views)
        self._whole = {number for number, _, _, whole, _ in rows if whole}
        self.owners = {row[0]: row[-1] for row in rows}

    def _count(self, rows: Iterable[tuple[int, int, int]], views: int) -> None:
        """Note the batches of all processes; views come one after the other, alike in batches."""
        for number, images, tokens in rows:
            self.sizes[number], self._tokens[number] = images, tokens
        order = list(self.sizes)
        each = max(1, len(order) // views)
        self._shows = {number: order[place % each] for place, number in enumerate(order)}

    def __len__(self) -> int:
        """Images that this process holds."""
        return sum(len(seen.states[0]) for seen in self.traces)

    @property
    def tokens(self) -> int:
        """Tokens of all images, of all processes, without padding; of two towers of the texts."""
        return sum(self._tokens[number] for number in self.sizes)

    @property
    def complete(self) -> bool:
        """Whether the hidden states of all batches, of all processes, are kept."""
        return self._whole == set(self.sizes)

    def kept(self) -> Iterator[tuple[dict[int, Tensor], range, Tensor | None]]:
        """The hidden states of each batch of this process, the places of its images, and which
        tokens are no padding."""
        return ((seen.states, self.places(b), seen.real) for b, seen in enumerate(self.traces))

    def drawn(self, batch: int, index: int, draw: Draw, values: Tensor) -> Tensor:
        """The drawn tokens of one batch, of values (images, tokens, …) in block ``index``.

        Padding is never drawn.
        """
        return draw.take(values, self.places(batch), self.traces[batch].real_in(index))

    def weights(
        self, batch: int, index: int, draw: Draw, prefix_weight: float, tokens: int
    ) -> Tensor | None:
        """Weight of every drawn token of an image of one batch with so many tokens in a block.

        Of padded texts, of every drawn token of the batch; ``None`` where all weigh 1.
        """
        real = self.traces[batch].real_in(index)
        if real is None:
            return draw.weights(prefix_weight, tokens)
        return draw.weights_of_real(prefix_weight, real, self.places(batch))

    def hold(self, tensor: Tensor) -> Tensor:
        """Where a tensor of every batch lies: in memory, or on the shelf."""
        return tensor if self._shelf is None else self._shelf.hold(tensor)

    def tidy(self) -> None:
        """Between blocks: under a limit, memory that was freed goes back to the system."""
        if self._shelf is not None:
            self._shelf.tidy()

    def checks(self, batch: int, every: int) -> bool:
        """Whether a batch is of the one part in ``every`` that a ridge is chosen by.

        All views of an image are of the same part.
        """
        different = [number for number, shown in self._shows.items() if number == shown]
        return different.index(self._shows[self.numbers[batch]]) % every == 1

    def shown(self, views: int) -> TracedImages:
        """So many of the views of every image; 1 is the images as they are."""
        seen: Counter[int] = Counter()
        taken = []
        for number, shown in self._shows.items():
            seen[shown] += 1
            if seen[shown] <= views:
                taken.append(number)
        return self._only({number: number for number in taken})

    def part(self, images: int) -> TracedImages:
        """The first batches with at least ``images`` images; the hidden states are shared."""
        first: list[int] = []
        for number in self.sizes:
            if sum(self.sizes[n] for n in first) >= images:
                break
            first.append(number)
        return self._only({number: number for number in first})

    def after(self, part: TracedImages, images: int) -> TracedImages:
        """The batches after ``part``, numbered from 0.

        Up to ``images`` images, or to the first batch whose hidden states are not kept.
        """
        taken: list[int] = []
        for number in list(self.sizes)[len(part.sizes) :]:
            if sum(self.sizes[n] for n in taken) >= images or number not in self._whole:
                break
            taken.append(number)
        return self._only({number: place for place, number in enumerate(taken)})

    def _only(self, renumbered: dict[int, int]) -> TracedImages:
        """Some of the batches, under other numbers."""
        few = copy.copy(self)
        few._middles, few._spent = {}, 0
        few.sizes = {new: self.sizes[n] for n, new in renumbered.items()}
        few._tokens = {new: self._tokens[n] for n, new in renumbered.items()}
        few._whole = {new for n, new in renumbered.items() if n in self._whole}
        few._shows = {new: renumbered.get(self._shows[n], new) for n, new in renumbered.items()}
        if self.owners is not None:
            few.owners = {new: self.owners[n] for n, new in renumbered.items()}
        rows = zip(self.numbers, self.traces, self.labels, strict=True)
        own = [(renumbered[n], seen, labels) for n, seen, labels in rows if n in renumbered]
        few.numbers = [number for number, _, _ in own]
        few.traces = [seen for _, seen, _ in own]
        few.labels = [labels for _, _, labels in own]
        return few

    def with_more(self, others: TracedImages) -> TracedImages:
        """These images and further ones that every process holds, whose states are all kept."""
        assert self.owners is not None
        assert others.owners is None
        more = copy.copy(self)
        more._middles, more._spent = {}, 0
        first = max(self.sizes) + 1
        more.sizes = self.sizes | {first + n: size for n, size in others.sizes.items()}
        more._tokens = self._tokens | {first + n: size for n, size in others._tokens.items()}
        more._shows = self._shows | {first + n: first + s for n, s in others._shows.items()}
        more._whole = self._whole | {first + n for n in others.numbers}
        added = {first + n: (first + n) % ranks.count() for n in others.numbers}
        more.owners = self.owners | added
        own = [n for n in others.numbers if added[first + n] == ranks.rank()]
        more.numbers = [*self.numbers, *(first + n for n in own)]
        more.traces = [*self.traces, *(others.traces[n] for n in own)]
        more.labels = [*self.labels, *(others.labels[n] for n in own)]
        return more

    def places(self, batch: int) -> range:
        """Which of all images are those of one batch."""
        number = self.numbers[batch]
        first = sum(size for other, size in self.sizes.items() if other < number)
        return range(first, first + self.sizes[number])

    def state(self, batch: int, boundary: int) -> Tensor:
        """h[boundary] of one batch."""
        seen = self.traces[batch]
        if self.blocks.stages and boundary not in seen.states:
            if boundary == self.blocks.depth:
                return self.returned(batch, boundary - 1)
            return seen.given(self.model, boundary)
        known = max(b for b in seen.states if b <= boundary)
        hidden = seen.states[known]
        for index in range(known, boundary):
            hidden = seen.run(self.modules[index], index, hidden)
        if boundary != known:
            # Boundaries are asked for in order: keep the last one to go on from.
            seen.states = {0: seen.states[0], boundary: hidden}
        return hidden

    def returned(self, batch: int, index: int) -> Tensor:
        """What block ``index`` returned for one batch."""
        if not self.blocks.stages:
            return self.state(batch, index + 1)
        seen = self.traces[batch]
        if (known := seen.after(index)) is not None:
            return known
        return seen.run(self.modules[index], index, self.state(batch, index))

    def tokens_of(self, index: int) -> int:
        """Tokens of all images, of all processes, in block ``index``."""
        blocks = self.blocks
        if not blocks.stages or (blocks.towers and index >= blocks.first_of_texts):
            return self.tokens
        return sum(self.sizes.values()) * self.probe.tokens(index)

    def middle(self, batch: int, index: int, draw: Draw) -> Tensor:
        """The drawn tokens of the state of block ``index`` before its MLP's contribution.

        On the original's input; shape as of ``drawn``.
        """
        key = (batch, index, draw)
        if (known := self._middles.get(key)) is not None:
            return known
        middle = self.hold(self.drawn(batch, index, draw, self._middle(batch, index)))
        if self._spent + middle.nbytes <= self._limit // MIDDLES_SHARE:
            self._middles[key] = middle
            self._spent += middle.nbytes
        return middle

    def target(self, batch: int, index: int) -> Tensor:
        """The sum to which the MLP of block ``index`` adds, in the block's layout."""
        mlp = self.probe.writers(index)[-1]
        if not mlp.given_to:
            return self.returned(batch, index)
        run = self.traces[batch].runner(self.modules[index], index)
        return mlp.sum(self.modules[index], run, self.state(batch, index))

    def _middle(self, batch: int, index: int) -> Tensor:
        seen, block = self.traces[batch], self.modules[index]
        writers, hidden = self.probe.writers(index), self.state(batch, index)
        if writers[0].given_to:
            return writers[0].tokens(writers[0].sum(block, seen.runner(block, index), hidden))
        if not self.probe.bare(index):
            with written(block, {writers[-1].name: 0.0}):
                return writers[-1].tokens(seen.run(block, index, hidden))
        read = input_of(block, writers[0].name, seen.runner(block, index), hidden)
        return hidden + writers[0].contribution(block, read)


def _counts(seen: Trace) -> tuple[int, int]:
    """Images of a batch, and its tokens in all, without padding."""
    images, tokens = seen.states[0].shape[:2]
    return images, images * tokens if seen.real is None else int(seen.real.sum())
