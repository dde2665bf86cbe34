"""Judging many solutions of one model on labelled test images: by its head, or by linear probes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockfit.arguments import one_of
from blockfit.data.images import Images, LabelledBatch
from blockfit.data.labels import by_name
from blockfit.errors import BlockfitError
from blockfit.evaluation.evaluate import Accuracy
from blockfit.evaluation.protocols import Features, Probe, linear_probe_sgd, vectors
from blockfit.fit.plan import Plan
from blockfit.models.blocks import Blocks
from blockfit.models.forward import Batch, evaluating
from blockfit.models.head import observe
from blockfit.models.trace import Trace, trace
from blockfit.progress import Progress, silent
from blockfit.search.fidelity import FidelityMeter
from blockfit.search.held_out import observe_solution
from blockfit.search.solve import Solution

JUDGES = ("head", "probe-fixed", "probe-new")
"""``head``: the model's own. ``probe-fixed``: the paper's linear probe (Adam, 5 epochs, rate 1e-2,
batches of 256), learnt from the original's features and kept. ``probe-new``: the same probe, learnt
again from each compressed model's features, as in TBA (arXiv 2410.04941, section 4)."""

MOST_BYTES = 2 << 30
"""Memory for the hidden states of the images, and again for the features of solutions."""

WHOLE = Solution(Plan(), ())


@dataclass(frozen=True)
class Verdict:
    """What a solution is worth on the test images.

    Args:
        top1: as a fraction.
        agreement: fraction of images with the original's top-1 class; ``None`` without a head.
        kl: KL(original ‖ solution) of the head's softmax in nats; ``None`` without a head.
        feature_error: relative error of the final features.
    """

    top1: float
    agreement: float | None
    kl: float | None
    feature_error: float


class _Walk:
    """Images as the original saw them; hidden states are kept where all of them fit.

    Otherwise a walk runs the original again, and only one batch is held at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        images: Images,
        most_bytes: int,
        classes: Sequence[str] | None = None,
        by_head: bool = False,
    ) -> None:
        self.model, self.blocks, self.images = model, blocks, images
        self._by_head = by_head
        own = images.records.class_names
        self._place = by_name(own, classes) if own and classes else None
        self._most_bytes = most_bytes
        self._kept: list[tuple[Trace, Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[Trace, Tensor]]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[tuple[Trace, Tensor]] = []
        room, labelled = True, False
        for batch in self.images.batches():
            labels = self._labels(batch)
            labelled = labelled or bool((labels >= 0).any())
            keep = range(self.blocks.depth + 1)
            seen = trace(self.model, self.blocks, batch.inputs, keep, batch.names)
            if not kept:
                size = sum(state.nbytes for state in seen.states.values()) / len(labels)
                room = size * len(self.images) <= self._most_bytes
            if room:
                kept.append((seen, labels))
            yield seen, labels
        if not labelled:
            raise BlockfitError(
                f"{self.images.records.source} has no images with a label that counts; give others"
            )
        if room:
            self._kept = kept

    def _labels(self, batch: LabelledBatch) -> Tensor:
        """Of the model's classes for its head, else the data set's own; −1 for none."""
        labels = batch.labels if self._by_head else batch.own_labels
        if labels is None:
            return torch.full((len(batch.names),), -1)
        if self._place is None or self._by_head:
            return labels
        return torch.tensor([self._place.get(int(label), -1) for label in labels])


class Judge:
    """Judges solutions of one model; each runs only the blocks after the first that it touches.

    Args:
        model: the original; left as it was.
        kind: one of ``JUDGES``.
        train: labelled images that probes learn from.
        most_bytes: memory for hidden states of test and training images each, and for features.

    Raises:
        BlockfitError: for an unknown kind, or a probe without images to learn from.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Blocks,
        test: Images,
        kind: str = "head",
        train: Images | None = None,
        most_bytes: int = MOST_BYTES,
        progress: Progress = silent,
    ) -> None:
        one_of("judge", kind, JUDGES)
        if kind != "head" and train is None:
            raise BlockfitError(f"the judge {kind} needs labelled images to learn from; give some")
        self.model, self.blocks, self.kind = model, blocks, kind
        self.images = len(test)
        names = None if train is None else train.records.class_names
        self._test = _Walk(model, blocks, test, most_bytes, names, kind == "head")
        self._train = None if train is None else _Walk(model, blocks, train, most_bytes)
        self._most_bytes, self._progress = most_bytes, progress
        self._original: dict[int, tuple[Verdict, Probe | None]] = {}

    def original(self, seed: int = 0) -> Verdict:
        """The original's own verdict; ``seed`` is that of a probe."""
        return self._learnt(seed)[0]

    def verdicts(self, solutions: Mapping[str, Solution], seed: int = 0) -> dict[str, Verdict]:
        """Judge solutions by name; ``seed`` is that of a probe.

        Raises:
            BlockfitError: where no image has a label, most have one that the head does not have, or
                hidden states are not finite.
        """
        if self.kind == "head":
            return self._by_head(solutions)
        probe = self._learnt(seed)[1] if self.kind == "probe-fixed" else None
        return self._by_probe(solutions, seed, probe)[0]

    def _learnt(self, seed: int) -> tuple[Verdict, Probe | None]:
        if seed not in self._original:
            if self.kind == "head":
                self._original[seed] = self._by_head({"": WHOLE})[""], None
            else:
                verdicts, probes = self._by_probe({"": WHOLE}, seed)
                self._original[seed] = verdicts[""], probes[""]
        return self._original[seed]

    def _by_head(self, solutions: Mapping[str, Solution]) -> dict[str, Verdict]:
        meters = {name: FidelityMeter() for name in solutions}
        right = {name: Accuracy() for name in solutions}
        done = 0
        with evaluating(self.model):
            for seen, labels in self._test:
                original = observe_solution(self.model, self.blocks, seen, WHOLE)
                if original.logits is None:
                    raise BlockfitError(
                        "the model has no head of its own; judge it by probe-fixed or probe-new"
                    )
                for name, solution in solutions.items():
                    found = observe_solution(self.model, self.blocks, seen, solution)
                    meters[name].add(original, found)
                    right[name].add(found, labels)
                done += len(labels)
                self._tell(done)
        return {n: _verdict(right[n].top1 or 0.0, meters[n]) for n in solutions}

    def _by_probe(
        self, solutions: Mapping[str, Solution], seed: int, fixed: Probe | None = None
    ) -> tuple[dict[str, Verdict], dict[str, Probe]]:
        assert self._train is not None
        verdicts: dict[str, Verdict] = {}
        probes: dict[str, Probe] = {}
        with evaluating(self.model):
            for names in self._groups(list(solutions)):
                part = {name: solutions[name] for name in names}
                meters = {name: FidelityMeter() for name in part}
                if fixed is None:
                    for name, features in self._features(self._train, part).items():
                        probes[name] = linear_probe_sgd(features, seed)
                for name, features in self._features(self._test, part, meters).items():
                    probe = probes.get(name) or fixed
                    assert probe is not None, "a probe is either fixed or learnt"
                    top1 = float((probe(features) == features.labels).mean())
                    verdicts[name] = _verdict(top1, meters[name])
        return verdicts, probes

    def _groups(self, names: list[str]) -> Iterator[list[str]]:
        """As many solutions at a time as their features have room for."""
        assert self._train is not None
        seen = next(iter(self._test))[0]
        whole = observe_solution(self.model, self.blocks, seen, WHOLE)
        each = 4 * vectors(whole, self.blocks.prefix_tokens)[0].numel()
        size = max(1, self._most_bytes // (each * max(self.images, len(self._train.images))))
        return (names[start : start + size] for start in range(0, len(names), size))

    def _features(
        self,
        walk: _Walk,
        solutions: Mapping[str, Solution],
        meters: Mapping[str, FidelityMeter] | None = None,
    ) -> dict[str, Features]:
        rows: dict[str, list[Tensor]] = {name: [] for name in solutions}
        labels: list[Tensor] = []
        for seen, given in walk:
            original = None
            if meters is not None:
                original = observe_solution(self.model, self.blocks, seen, WHOLE)
            for name, solution in solutions.items():
                found = observe_solution(self.model, self.blocks, seen, solution)
                rows[name].append(vectors(found, self.blocks.prefix_tokens).float().cpu())
                if meters is not None and original is not None:
                    meters[name].add(original, found)
            labels.append(given)
            self._tell(sum(map(len, labels)), len(walk.images))
        numbers = torch.cat(labels)
        known = numbers >= 0
        return {
            name: Features(torch.cat(part)[known].numpy(), numbers[known].numpy())
            for name, part in rows.items()
        }

    def _tell(self, done: int, total: int | None = None) -> None:
        self._progress(done, self.images if total is None else total)


def fitting_judge(model: nn.Module, blocks: Blocks, example: Batch, images: Images) -> str:
    """``head`` where the model has one whose classes are the images', else ``probe-new``."""
    logits = observe(model, blocks, example).logits
    matching = images.matching
    if logits is None or not (matching.fits(logits.shape[1]) and matching.fits_most):
        return "probe-new"
    return "head"


def _verdict(top1: float, meter: FidelityMeter) -> Verdict:
    fidelity = meter.result()
    return Verdict(top1, fidelity.agreement, fidelity.kl, fidelity.feature_relative_error)
