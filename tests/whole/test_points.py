"""How ``blockfit sweep --points`` reads its list."""

from __future__ import annotations

import pytest

from blockfit.commands.sweep import shares
from blockfit.errors import BlockfitError


@pytest.mark.parametrize("text", ["95,78,62", "95%, 78%,62 %", "0.95,0.78,.62", "0.95,78,62%"])
def test_percentages_and_parts_mean_the_same(text: str) -> None:
    assert shares(text) == pytest.approx([0.95, 0.78, 0.62])


@pytest.mark.parametrize("text", ["", "a", "95,,62", "0", "100", "1.2", "1", "-5", "nan", "162%"])
def test_what_is_no_part_or_may_be_two_is_refused(text: str) -> None:
    with pytest.raises(BlockfitError, match="write percentages, such as 95,78,62"):
        shares(text)
