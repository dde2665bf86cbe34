"""What a report shows, as plain values: found in folders by ``runs``, drawn by ``report``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from blockfit.errors import BlockfitError
from blockfit.evaluation.answers import Answers
from blockfit.evaluation.side_by_side import SideBySide
from blockfit.fit.intervals import Interval
from blockfit.fit.plan import Plan
from blockfit.fit.similarity import Tables
from blockfit.search.final import Final
from blockfit.search.held_out import MapError
from blockfit.search.session import SAFE_LOSS

FIDELITY = ("kl", "agreement", "feature_cosine", "feature_relative_error")
"""The figures of ``Fidelity`` beside its number of images."""

BYTES = 4
"""Of a weight in float32, by which megabytes of different runs are compared."""

TESTED = {
    "kl": "kl",
    "top1": "top1_after",
    "agreement": "agreement",
    "feature_relative_error": "feature_error",
}
"""Quality → where ``Final`` has it with its interval."""


@dataclass(frozen=True)
class Candidate:
    """A plan and what is known of it.

    Args:
        before: ``parameters`` and ``flops`` of the original, where known.
        after: the same of the small model.
        fidelity: the figures of ``FIDELITY`` and the number of ``images``, where known.
        repaired: kept blocks with weights that were solved again; ``None`` where nobody wrote down
            which.
        top1: the original's and its own on the held-out images, where known.
        latency: of the original's, and the quartiles of the rounds; where it was measured.
        final: figures of images that decided nothing, where there are any.
        target: the part of the parameters that the plan was found for; ``None`` for a number of
            removed blocks.
        series: number of the run that it belongs to, among those on the frontier.
        test: what ``blockfit evaluate`` found of it.
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
    series: int = 0
    test: Evaluated | None = None

    @property
    def key(self) -> str:
        """What tells it from the other plans of the page."""
        own = str(self.removed) if self.target is None else f"p{1000 * self.target:.0f}"
        return f"r{self.series}-{own}" if self.series else own

    @property
    def name(self) -> str:
        """What it is called: by the blocks that go, or by the parameters that stay."""
        if self.target is not None:
            return f"{self.target:.0%} of the parameters"
        if self.plan.narrowings and (part := self.share("parameters")) is not None:
            return f"{part:.0%} of the parameters"
        return "1 block removed" if self.removed == 1 else f"{self.removed} blocks removed"

    @property
    def label(self) -> str:
        """The same in a picture."""
        part = self.target
        if part is None and self.plan.narrowings:
            part = self.share("parameters")
        return str(self.removed) if part is None else f"{part:.0%}"

    @property
    def removed(self) -> int:
        """Blocks that go."""
        return len(self.plan.removed_blocks)

    @property
    def loss(self) -> float | None:
        """KL, or the relative feature error where there is no head; ``None`` where unknown."""
        kl = self.fidelity.get("kl")
        return self.fidelity.get("feature_relative_error") if kl is None else kl

    @property
    def sure_loss(self) -> float | None:
        """The upper end of the final figures' interval of it; without them ``loss``.

        Held-out figures chose the plan, and flatter it.
        """
        if self.final is None:
            return self.loss
        return (self.final.kl or self.final.feature_error).high

    def value(self, loss: str) -> float | None:
        """``top1``, or a figure of ``FIDELITY``."""
        return self.top1[1] if loss == "top1" else self.fidelity.get(loss)

    def tested(self, loss: str) -> tuple[Interval, int] | None:
        """A figure of images that decided nothing, and how many they are; the evaluation's, else
        the run's own."""
        for final in (None if self.test is None else self.test.intervals, self.final):
            figure: Interval | None = None if final is None else getattr(final, TESTED[loss])
            if final is not None and figure is not None:
                return figure, final.labelled if loss == "top1" else final.images
        return None

    def share(self, size: str) -> float | None:
        """The part of the original's ``parameters``, ``flops`` or ``latency`` that remains; of
        ``megabytes`` how many there are in float32."""
        if size == "latency":
            return None if self.latency is None else self.latency[0]
        if size == "megabytes":
            count = self.after.get("parameters")
            return None if count is None else BYTES * count / 1e6
        before, after = self.before.get(size), self.after.get(size)
        return None if after is None or not before else after / before


@dataclass(frozen=True)
class Fact:
    """One line of the provenance; ``run`` is the folder or file that says so, of several."""

    name: str
    value: str
    run: str = ""


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
class Series:
    """The plans of one run on the frontier, the gentlest first."""

    name: str
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Content:
    """All that is known of one or several runs on one model.

    Args:
        compressed: the one small model that the report is about.
        frontier: of a sweep, the gentlest first.
        facts: where it all came from.
        warnings: that belong to no single plan.
        run: what the run is called on the page.
        small: what the run of ``compressed`` is called.
        more: other runs that stand on the same frontier: sweeps, baselines, single models.
        tests: other evaluations.
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
    run: str = ""
    small: str = ""
    more: tuple[Series, ...] = ()
    tests: tuple[Evaluated, ...] = ()

    @property
    def evaluations(self) -> tuple[Evaluated, ...]:
        """All of them."""
        return (*((self.evaluation,) if self.evaluation else ()), *self.tests)

    @property
    def series(self) -> tuple[Series, ...]:
        """Everything that stands on the frontier, with what was measured of it."""
        found = [Series(self.run, self.frontier)] if self.frontier else []
        if self.compressed is not None and (found or self.more):
            found.append(Series(self.small or self.run, (self.compressed,)))
        found += self.more
        return tuple(
            Series(
                one.name,
                tuple(replace(c, series=n, test=self.test_of(c)) for c in one.candidates),
            )
            for n, one in enumerate(found)
        )

    def test_of(self, candidate: Candidate) -> Evaluated | None:
        """The evaluation of a plan's model, known by its number of parameters."""
        count = candidate.after.get("parameters")
        fitting = (e for e in self.evaluations if count and e.compressed.parameters == count)
        return next(fitting, None)

    @property
    def chosen(self) -> Candidate | None:
        """The plan that the page opens with: the one that was measured, else the suggested one.

        Raises:
            BlockfitError: where the evaluation, or the images side by side, are of none of them.
        """
        fitting = [self.compressed] if self.compressed else list(self.frontier)
        if not fitting:
            return None
        others = {c.after.get("parameters") for one in self.more for c in one.candidates}
        counts = {one.compressed.parameters for one in self.evaluations} - others - {None}
        for what, fits in (
            ("the evaluation", lambda c: not counts or c.after.get("parameters") in counts),
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
    intervals: Final | None = None
    answers: Answers | None = None


def suggested(frontier: Sequence[Candidate]) -> Candidate | None:
    """The smallest plan at a ``sure_loss`` of at most ``SAFE_LOSS``; the first where none is.

    Plans that a command makes come before those for which a sweep gives a better one.
    """
    made = [c for c in frontier if c.command is not None] or frontier
    safe = [c for c in made if c.sure_loss is not None and c.sure_loss <= SAFE_LOSS]
    smallest = min(safe, key=lambda c: c.share("parameters") or 1.0, default=None)
    return smallest or (made[0] if made else None)


def joined(parts: Mapping[str, Content]) -> Content:
    """The findings of several runs on one model, by the names of the runs.

    Raises:
        BlockfitError: where two runs are of different models or hold the same thing.
    """
    whole: Content | None = None
    holders: dict[str, str] = {}
    for path, part in parts.items():
        name = short_name(path)
        part = replace(part, run=f"{name} ({part.run})" if part.run else name)
        if whole is None:
            whole = replace(part, facts=(), commands=(), warnings=())
        elif part.model and whole.model and part.model != whole.model:
            raise BlockfitError(
                f"{path} is of the model {part.model}, the other runs are of {whole.model}; "
                "report them apart"
            )
        for one in fields(Content):
            value = getattr(part, one.name)
            if not value or one.name in ("model", "run", "small", "more", "tests"):
                continue
            if one.name in ("facts", "commands", "warnings"):
                told = _as_told_by(name, value) if len(parts) > 1 else value
                changed: Any = {one.name: _with(getattr(whole, one.name), told)}
                whole = replace(whole, **changed)
            elif one.name in holders and one.name in ("compressed", "frontier", "evaluation"):
                whole = _beside(whole, part, one.name)
            elif one.name in holders:
                raise BlockfitError(
                    f"{holders[one.name]} and {path} both hold {WHAT[one.name]}; report them apart"
                )
            else:
                holders[one.name] = path
                whole = replace(whole, **{one.name: value})
                if one.name == "frontier":
                    whole = replace(whole, run=part.run)
                if one.name == "compressed":
                    whole = replace(whole, small=part.run)
        whole = replace(whole, model=whole.model or part.model)
    if whole is None:
        raise BlockfitError("give at least one folder to report")
    return whole


def _as_told_by(name: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(replace(v, run=name) if isinstance(v, Fact) else v for v in values)


OF_ONE_RUN = ("date", "duration")
"""Facts that each run has for itself, equal or not."""


def _with(old: tuple[Any, ...], new: tuple[Any, ...]) -> tuple[Any, ...]:
    """Both, without what another run has said already; two may end in the same second."""

    def said(one: object) -> object:
        if isinstance(one, Fact) and one.name not in OF_ONE_RUN:
            return one.name, one.value
        return one

    known = {said(one) for one in old}
    return old + tuple(one for one in new if said(one) not in known)


def _beside(whole: Content, part: Content, kind: str) -> Content:
    """``whole`` with a second sweep, model or evaluation of the same original."""
    if kind == "evaluation" and part.evaluation is not None:
        return replace(whole, tests=(*whole.tests, part.evaluation))
    if kind == "compressed" and part.compressed is not None:
        return replace(whole, more=(*whole.more, Series(part.run, (part.compressed,))))
    return replace(whole, more=(*whole.more, Series(part.run, part.frontier)))


def short_name(name: str) -> str:
    """The last part of a path; ``owner/model`` and other names as they are."""
    parts = name.replace("\\", "/").rstrip("/").split("/")
    path = parts[0] in ("", ".", "..", "~") or parts[0].endswith(":") or len(parts) > 2
    return (parts[-1] or name) if path else name.rstrip("/") or name


WHAT = {
    "compressed": "a compressed model",
    "frontier": "a sweep",
    "similarity": "similarity tables",
    "experiments": "experiments",
    "evaluation": "an evaluation",
    "side": "images side by side",
}
