"""What a report shows, as plain values: found in folders by ``runs``, drawn by ``report``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from blockfit.errors import BlockfitError
from blockfit.evaluation.side_by_side import SideBySide
from blockfit.fit.plan import Plan
from blockfit.fit.similarity import Tables
from blockfit.search.final import Final
from blockfit.search.held_out import MapError
from blockfit.search.session import SAFE_LOSS

FIDELITY = ("kl", "agreement", "feature_cosine", "feature_relative_error")
"""The figures of ``Fidelity`` beside its number of images."""


@dataclass(frozen=True)
class Candidate:
    """A plan and what is known of it.

    Args:
        plan: what goes.
        depth: blocks of the original.
        before: ``parameters`` and ``flops`` of the original, where known.
        after: the same of the small model.
        fidelity: the figures of ``FIDELITY`` and the number of ``images``, where known.
        maps: local held-out error of each map beside identity's.
        repaired: kept blocks with weights that were solved anew; ``None`` where nobody wrote down
            which.
        warnings: of the run.
        command: that makes it.
        top1: the original's and its own on the held-out images, where known.
        latency: of the original's, and the quartiles of the rounds; where it was measured.
        final: figures of images that decided nothing, where there are any.
        target: the part of the parameters that the plan was found for; ``None`` for a number of
            removed blocks.
    """

    plan: Plan
    depth: int
    before: Mapping[str, float | None]
    after: Mapping[str, float | None]
    fidelity: Mapping[str, float | None]
    maps: tuple[MapError, ...] = ()
    repaired: tuple[int, ...] | None = None
    warnings: tuple[str, ...] = ()
    command: str | None = None
    top1: tuple[float | None, float | None] = (None, None)
    latency: tuple[float, float, float] | None = None
    final: Final | None = None
    target: float | None = None

    @property
    def key(self) -> str:
        """What tells it from the other plans of its sweep."""
        return str(self.removed) if self.target is None else f"p{1000 * self.target:.0f}"

    @property
    def name(self) -> str:
        """What it is called: by the blocks that go, or by the parameters that stay."""
        if self.target is not None:
            return f"{self.target:.0%} of the parameters"
        return "1 block removed" if self.removed == 1 else f"{self.removed} blocks removed"

    @property
    def label(self) -> str:
        """The same in a picture."""
        return str(self.removed) if self.target is None else f"{self.target:.0%}"

    @property
    def removed(self) -> int:
        """Blocks that go."""
        return len(self.plan.removed_blocks)

    @property
    def loss(self) -> float | None:
        """KL, or the relative feature error where there is no head; ``None`` where unknown."""
        kl = self.fidelity.get("kl")
        return self.fidelity.get("feature_relative_error") if kl is None else kl

    def value(self, loss: str) -> float | None:
        """``top1``, or a figure of ``FIDELITY``."""
        return self.top1[1] if loss == "top1" else self.fidelity.get(loss)

    def share(self, size: str) -> float | None:
        """The part of the original's ``parameters``, ``flops`` or ``latency`` that remains."""
        if size == "latency":
            return None if self.latency is None else self.latency[0]
        before, after = self.before.get(size), self.after.get(size)
        return None if after is None or not before else after / before


@dataclass(frozen=True)
class Fact:
    """One line of the provenance."""

    name: str
    value: str


@dataclass(frozen=True)
class Command:
    """A command line and what it is for."""

    what: str
    line: str


@dataclass(frozen=True)
class Experiment:
    """One experiment of ``blockfit reproduce``: what it says, its rows as texts, and its PNG."""

    title: str
    finding: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    picture: bytes | None = None


@dataclass(frozen=True)
class Content:
    """All that is known of one or several runs on one model.

    Args:
        model: its name.
        compressed: the one small model that the report is about.
        frontier: of a sweep, the gentlest first.
        similarity: of the original's hidden states.
        experiments: of the paper, on this model.
        evaluation: figures of ``Evaluation.to_json``, checked.
        side: original and small model on a few images.
        facts: where it all came from.
        commands: that made it.
        warnings: that belong to no single plan.
    """

    model: str
    compressed: Candidate | None = None
    frontier: tuple[Candidate, ...] = ()
    similarity: Tables | None = None
    experiments: tuple[Experiment, ...] = ()
    evaluation: Evaluated | None = None
    side: SideBySide | None = None
    facts: tuple[Fact, ...] = ()
    commands: tuple[Command, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def chosen(self) -> Candidate | None:
        """The plan that the page opens with: the one that was measured, else the suggested one.

        Raises:
            BlockfitError: where the evaluation, or the images side by side, are of none of them.
        """
        fitting = [self.compressed] if self.compressed else list(self.frontier)
        if not fitting:
            return None
        count = None if self.evaluation is None else self.evaluation.compressed.parameters
        for what, fits in (
            ("the evaluation", lambda c: count in (None, c.after.get("parameters"))),
            ("the small model", lambda c: self.side is None or self.side.plan == c.plan),
        ):
            fitting = [candidate for candidate in fitting if fits(candidate)]
            if not fitting:
                raise BlockfitError(
                    f"{what} is of a model that none of the other folders holds; "
                    "give the folder of that model, or report them apart"
                )
        return suggested(fitting)


@dataclass(frozen=True)
class Measured:
    """One model's figures of ``blockfit evaluate``; ``None`` where one was not measured."""

    top1: float | None = None
    parameters: float | None = None
    flops: float | None = None
    size_bytes: float | None = None
    images_per_second: float | None = None
    latency_ms: float | None = None
    peak_memory_bytes: float | None = None


@dataclass(frozen=True)
class Evaluated:
    """What ``blockfit evaluate`` found on test images."""

    images: int
    compressed: Measured
    original: Measured | None = None
    fidelity: Mapping[str, float | None] = field(default_factory=dict)
    speedup: float | None = None


def suggested(frontier: Sequence[Candidate]) -> Candidate | None:
    """The smallest plan at a loss of at most ``SAFE_LOSS``; the first where none does."""
    safe = [c for c in frontier if c.loss is not None and c.loss <= SAFE_LOSS]
    smallest = min(safe, key=lambda c: c.share("parameters") or 1.0, default=None)
    return smallest or (frontier[0] if frontier else None)


def joined(parts: Mapping[str, Content]) -> Content:
    """The findings of several runs on one model, by the names of the runs.

    Raises:
        BlockfitError: where two runs are of different models or hold the same thing.
    """
    whole: Content | None = None
    holders: dict[str, str] = {}
    for name, part in parts.items():
        if whole is None:
            whole = replace(part, facts=(), commands=(), warnings=())
        elif part.model and whole.model and part.model != whole.model:
            raise BlockfitError(
                f"{name} is of the model {part.model}, the other runs are of {whole.model}; "
                "report them apart"
            )
        for one in fields(Content):
            value = getattr(part, one.name)
            if not value or one.name == "model":
                continue
            if one.name in ("facts", "commands", "warnings"):
                old = getattr(whole, one.name)
                new = tuple(v for v in value if v not in old)
                whole = replace(whole, **{one.name: old + new})
                continue
            if one.name in holders:
                raise BlockfitError(
                    f"{holders[one.name]} and {name} both hold {WHAT[one.name]}; report them apart"
                )
            holders[one.name] = name
            whole = replace(whole, **{one.name: value})
        whole = replace(whole, model=whole.model or part.model)
    if whole is None:
        raise BlockfitError("give at least one folder to report")
    return whole


WHAT = {
    "compressed": "a compressed model",
    "frontier": "a sweep",
    "similarity": "similarity tables",
    "experiments": "experiments",
    "evaluation": "an evaluation",
    "side": "images side by side",
}
