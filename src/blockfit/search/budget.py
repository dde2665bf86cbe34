"""What a plan has to reach, and which plan reaches it at the smallest loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from blockfit.arguments import one_of
from blockfit.errors import BlockfitError
from blockfit.fit.maps import empty_map
from blockfit.fit.plan import Plan
from blockfit.models.blocks import Batch, Blocks, block_modules
from blockfit.models.cost import flops as count_flops
from blockfit.models.forward import first_images
from blockfit.models.surgery import apply_plan
from blockfit.models.tensors import every_tensor, meta_copy, shared_copy

KINDS = ("remove", "params", "flops", "latency", "max_kl", "max_drop")


LEAST = 0.01
"""The smallest part of a model that may be asked for; nobody means less."""


@dataclass(frozen=True)
class Budget:
    """One goal for the search.

    Args:
        kind: ``remove`` (blocks), ``params``, ``flops`` or ``latency`` (at most this fraction of
            the original's remains), ``max_kl`` (nats, held-out) or ``max_drop`` (points of top-1).
        value: a whole number for ``remove``, a fraction in (0, 1] for the sizes, nats or points.
    """

    kind: str
    value: float

    def __post_init__(self) -> None:
        one_of("budget", self.kind, KINDS)
        if not math.isfinite(self.value):
            raise BlockfitError(f"{self.kind}= must be a number, got {self.value}")
        if self.kind == "remove" and (self.value < 1 or self.value != int(self.value)):
            raise BlockfitError(f"remove= takes a whole number of blocks, got {self.value:g}")
        if self.kind in ("params", "flops", "latency") and not LEAST <= self.value <= 1:
            meant = ""
            if 1 < self.value < 10:  # 150%
                meant = f" ({self.value:.0%}, more than there is)"
            elif 10 <= self.value <= 100:
                meant = f"; did you mean {self.value:g}%?"
            if 0 < self.value < LEAST:  # 0.62%
                meant = f"; did you mean {100 * self.value:g} or {1e4 * self.value:g}%?"
            raise BlockfitError(
                f"{self.kind}= takes the part that may remain, such as 0.62 or 62%, got "
                f"{self.value:g}{meant}"
            )
        if self.kind.startswith("max") and self.value < 0:
            raise BlockfitError(f"{self.kind}= must be 0 or more, got {self.value:g}")

    def __str__(self) -> str:
        if self.kind in ("params", "flops", "latency"):
            return f"{self.kind} {self.value:.0%}"
        return f"{self.kind} {self.value:g}"

    @classmethod
    def of(cls, **given: float | str | None) -> Budget | None:
        """The one budget among keyword arguments; ``None`` where all are ``None``.

        Values may be written as ``"62%"``.

        Raises:
            BlockfitError: where more than one is given or a value cannot be read.
        """
        named = {kind: value for kind, value in given.items() if value is not None}
        if len(named) > 1:
            told = " and ".join(f"{kind}=" for kind in named)
            raise BlockfitError(f"give one budget, not both {told}")
        for kind, value in named.items():
            return cls(kind, read_number(value, kind))
        return None

    @classmethod
    def one(cls, budget: Budget | None = None, **given: float | str | None) -> Budget:
        """``budget``, or the one among keyword arguments.

        Raises:
            BlockfitError: where there is none or more than one.
        """
        for kind in given:
            one_of("budget", kind, KINDS)
        named = cls.of(**given)
        if budget is not None and named is None:
            return budget
        if budget is not None or named is None:
            raise BlockfitError("say how small by one budget, such as remove=3 or params='62%'")
        return named

    def met_by_size(self, size: Mapping[str, float]) -> bool:
        """Whether a plan of this size (fractions of the original's, and ``removed``) fits."""
        if self.kind == "remove":
            return size["removed"] >= self.value
        return size[self.kind] <= self.value + 1e-9


def read_number(value: float | str, name: str) -> float:
    """``0.62``, ``"0.62"`` or ``"62%"`` as a number."""
    if isinstance(value, str):
        text = value.strip()
        try:
            return float(text[:-1]) / 100 if text.endswith("%") else float(text)
        except ValueError:
            raise BlockfitError(f"cannot read {value!r} as {name}=; write 0.62 or 62%") from None
    return float(value)


RUN = 10_000_000
"""Parameters of the largest model that is run to count its FLOPs where it could be on meta."""


class Sizes:
    """Parameters and FLOPs of any plan of one model, without building it.

    FLOPs are counted on the meta device, or where the model has at most ``RUN`` parameters on a
    real forward of one image, which then takes a third of the time; where the one cannot be
    counted, on the other; where neither can, they are unknown.

    Args:
        example: a batch; FLOPs are counted for its first image.
    """

    def __init__(self, model: nn.Module, blocks: Blocks, example: Batch) -> None:
        self.blocks = blocks
        self._example = first_images(example, 1)
        self.parameters = sum(p.numel() for p in model.parameters())
        ways = (meta_copy, shared_copy) if self.parameters > RUN else (shared_copy, meta_copy)
        for way in ways:
            self._bare = way(model)
            self.flops = self._count(self._bare)
            if self.flops is not None:
                break
        self._tensors = {id(tensor): tensor for tensor in every_tensor(self._bare)}
        self._savings: dict[str, list[float] | None] = {}
        self._parameters: dict[Plan, int] = {}
        self._flops: dict[Plan, int | None] = {}

    def of(self, plan: Plan) -> tuple[int, int | None]:
        """Parameters, and FLOPs for one image; ``None`` where they are unknown."""
        return self._parameters_of(plan), self._flops_of(plan)

    def fraction(self, plan: Plan, kind: str) -> float | None:
        """What remains of the original: of ``params`` or ``flops``; ``None`` where unknown.

        FLOPs take a forward pass to count, so they are counted for ``flops`` alone.
        """
        if kind == "params":
            return self._parameters_of(plan) / self.parameters
        flops = self._flops_of(plan)
        return flops / self.flops if flops is not None and self.flops else None

    def known_fraction(self, plan: Plan, kind: str) -> float:
        """The same.

        Raises:
            BlockfitError: where the FLOPs are unknown.
        """
        found = self.fraction(plan, kind)
        if found is None:
            raise BlockfitError(f"the {kind} of {plan} cannot be counted; give params=")
        return found

    def least(self, count: int, kind: str) -> float | None:
        """What would remain of ``kind`` were the ``count`` largest blocks gone for nothing.

        ``None`` where it is unknown.
        """
        if kind not in self._savings:
            plans = [Plan.of([f"{i}:{i + 1}"], "identity") for i in range(self.blocks.depth)]
            left = [self.fraction(plan, kind) for plan in plans]
            known = [1 - part for part in left if part is not None]
            self._savings[kind] = sorted(known, reverse=True) if len(known) == len(left) else None
        savings = self._savings[kind]
        return None if savings is None else 1 - sum(savings[:count])

    def _built(self, plan: Plan) -> nn.Module:
        """A model with the plan in it; the tensors, and blocks that nothing cuts, are the bare
        model's own."""
        memo: dict[int, Any] = dict(self._tensors)
        modules = block_modules(self._bare, self.blocks)
        parts = [id(part) for block in modules for part in block.modules()]
        if len(set(parts)) == len(parts):  # no block shares a layer with another
            cut = {*plan.removed_blocks, *plan.narrowed_blocks}
            memo |= {id(block): block for i, block in enumerate(modules) if i not in cut}
        small = copy.deepcopy(self._bare, memo)
        with next(self._bare.parameters()).device:
            maps = [empty_map(e, self.blocks.width, self.blocks.prefix_tokens) for e in plan]
        apply_plan(small, self.blocks, plan, maps)
        return small

    def _parameters_of(self, plan: Plan) -> int:
        if plan not in self._parameters:
            self._parameters[plan] = sum(p.numel() for p in self._built(plan).parameters())
        return self._parameters[plan]

    def _flops_of(self, plan: Plan) -> int | None:
        if plan not in self._flops:
            self._flops[plan] = self._count(self._built(plan))
        return self._flops[plan]

    def warnings(self) -> list[str]:
        """What to warn of where FLOPs are unknown."""
        if self.flops is not None:
            return []
        return ["FLOPs are unknown: torch's counter cannot follow a forward of this model"]

    def _count(self, model: nn.Module) -> int | None:
        return count_flops(model, self._example)
