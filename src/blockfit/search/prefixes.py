"""Cache of refitted prefixes that several plans share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from blockfit.fit.plan import Plan, Replacement

Entries = tuple[Replacement, ...]


@dataclass(frozen=True)
class Beginning:
    """The first spans of a plan, refitted.

    Args:
        maps: of these spans.
        hidden: per batch, the compressed state after the last of them.
    """

    maps: dict[Replacement, nn.Module]
    hidden: list[Tensor]


class Beginnings:
    """Caches the refitted first spans that at least two of some plans share.

    Only for refits without repair, and not for plans with folded maps, which change the block
    before their span.
    """

    def __init__(self, plans: Iterable[Plan]) -> None:
        counts = Counter(entries for plan in plans for entries in _beginnings(plan))
        self._shared = {entries for entries, times in counts.items() if times > 1}
        self._known: dict[Entries, Beginning] = {}

    def longest(self, plan: Plan) -> tuple[Entries, Beginning] | None:
        """The longest beginning of ``plan`` that is known."""
        known = [(e, self._known[e]) for e in _beginnings(plan) if e in self._known]
        return known[-1] if known else None

    def keep(
        self, entries: Entries, maps: dict[Replacement, nn.Module], hidden: list[Tensor]
    ) -> None:
        """Keep a beginning if another plan has it too."""
        if entries in self._shared:
            self._known[entries] = Beginning(dict(maps), hidden)


def _beginnings(plan: Plan) -> Iterator[Entries]:
    entries = plan.replacements
    if all(entry.map != "folded" for entry in entries):
        yield from (entries[:count] for count in range(1, len(entries) + 1))
