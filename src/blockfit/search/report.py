"""What is written down of a plan: an entry of ``sweep.json``, and the report of a small model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from blockfit.arguments import at_least
from blockfit.errors import BlockfitError
from blockfit.fields import LATER, LEFT_OUT
from blockfit.fit.plan import Plan
from blockfit.search.budget import Budget
from blockfit.search.fidelity import Fidelity
from blockfit.search.held_out import MapError
from blockfit.search.latency import Latency
from blockfit.search.loss_budget import Judged, Verdict


@dataclass(frozen=True)
class Original:
    """Figures of the original model.

    Args:
        flops: of one image; ``None`` where they cannot be counted.
        top1: of its own head on the held-out images; ``None`` without their labels.
    """

    parameters: int
    flops: float | None
    top1: float | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        if self.parameters <= 0 or (self.flops is not None and self.flops <= 0):
            raise BlockfitError("a model has parameters and FLOPs")
        _check_part(self.top1)


@dataclass(frozen=True, repr=False)
class Entry:
    """One plan with its figures.

    Args:
        share: the part of the parameters that it was found for; ``None`` where it was found for a
            number of blocks.
        parameters: of the small model.
        flops: of the small model, for one image; ``None`` where they are unknown.
        held_out: fidelity on the images that chose the plan.
        top1: of the small model on these images; ``None`` without their labels.
        maps: held-out errors of its maps.
        repaired_blocks: kept blocks with weights that were solved again; ``None`` where the sweep
            is of an earlier version.
        file: where its tensors lie in the folder of a sweep; empty before they are written.
        final: figures of images that decided nothing, as ``Final.to_json`` gives them.
        judged: what budgets of loss are decided by.
    """

    removed: int
    plan: Plan
    parameters: int
    flops: float | None
    held_out: Fidelity
    maps: tuple[MapError, ...]
    warnings: tuple[str, ...]
    file: str = ""
    seconds: float = 0.0
    repaired_blocks: tuple[int, ...] | None = field(default=None, metadata=LEFT_OUT)
    top1: float | None = field(default=None, metadata=LATER)
    share: float | None = field(default=None, metadata=LEFT_OUT)
    final: dict[str, Any] | None = field(default=None, metadata=LATER)
    judged: Judged | None = field(default=None, metadata=LEFT_OUT)
    latency: Latency | None = field(default=None, metadata=LEFT_OUT)

    def __post_init__(self) -> None:
        at_least(0, parameters=self.parameters, seconds=self.seconds)
        _check_part(self.top1)
        if len(self.plan.removed_blocks) != self.removed:
            raise BlockfitError("the plan removes another number of blocks than is written")
        if self.share is not None and not 0 < self.share < 1:
            raise BlockfitError(f"share must be between 0 and 1, got {self.share}")

    def __repr__(self) -> str:
        return f"Entry({self.named()}, loss {self.held_out.loss:.3g}, {self.plan.brief})"

    @property
    def size(self) -> float:
        """What tells it from the other plans of a sweep: its share, or the blocks it removes."""
        return self.removed if self.share is None else self.share

    def named(self, gerund: bool = False) -> str:
        """In words: by the part of the parameters that it leaves, or the blocks it removes."""
        if self.share is not None:
            return f"{'leaving ' if gerund else ''}{self.share:.0%} of the parameters"
        blocks = f"{self.removed} block{'' if self.removed == 1 else 's'}"
        return f"removing {blocks}" if gerund else blocks

    def fractions(self, original: Original) -> dict[str, float]:
        """What each kind of budget of size looks at, as far as it is known."""
        flops = None
        if self.flops is not None and original.flops is not None:
            flops = self.flops / original.flops
        known = {
            "removed": self.removed,
            "remove": self.removed,
            "params": self.parameters / original.parameters,
            "flops": flops,
            "latency": None if self.latency is None else self.latency.ratio,
        }
        return {kind: value for kind, value in known.items() if value is not None}


@dataclass(frozen=True)
class Report:
    """The report of a small model; ``fields.written`` makes it JSON.

    ``held_out`` and ``top1_before``, ``top1_after`` are of the images that chose the plan,
    ``final`` of images that decided nothing, ``fitted`` of some that it was solved on; ``command``
    is the command line that was run.
    """

    budget: str | None
    recipe: dict[str, Any]
    seed: int
    removed_blocks: int
    parameters_before: int
    parameters_after: int
    flops_before: float | None
    flops_after: float | None
    calibration: dict[str, Any]
    final: dict[str, Any] | None
    judged: Verdict | None
    held_out: Fidelity
    top1_before: float | None
    top1_after: float | None
    maps: tuple[MapError, ...]
    warnings: tuple[str, ...]
    repaired_blocks: tuple[int, ...] | None = field(default=None, metadata=LEFT_OUT)
    latency: Latency | None = field(default=None, metadata=LEFT_OUT)
    protect: tuple[int, ...] | None = field(default=None, metadata=LEFT_OUT)
    sweep: str | None = field(default=None, metadata=LEFT_OUT)
    fitted: Fidelity | None = field(default=None, metadata=LEFT_OUT)
    command: str | None = field(default=None, metadata=LEFT_OUT)

    @classmethod
    def of(
        cls,
        original: Original,
        entry: Entry,
        budget: Budget | None,
        verdict: Verdict | None,
        warnings: tuple[str, ...],
        **run: Any,
    ) -> Report:
        """Put together what is known.

        Args:
            budget: that it was chosen for.
            warnings: beside those of the entry.
            run: ``recipe``, ``seed``, ``calibration``, ``command``, and ``protect`` and ``fitted``,
                or ``sweep``.
        """
        return cls(
            budget=None if budget is None else str(budget),
            removed_blocks=entry.removed,
            parameters_before=original.parameters,
            parameters_after=entry.parameters,
            flops_before=original.flops,
            flops_after=entry.flops,
            final=entry.final,
            judged=verdict,
            held_out=entry.held_out,
            top1_before=original.top1,
            top1_after=entry.top1,
            maps=entry.maps,
            warnings=entry.warnings + warnings,
            repaired_blocks=entry.repaired_blocks,
            latency=entry.latency,
            **run,
        )


def _check_part(top1: float | None) -> None:
    if top1 is not None and not 0 <= top1 <= 1:
        raise BlockfitError(f"top1 must be between 0 and 1, got {top1}")
