"""The page and the card of a model of which parts are narrowed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from exporting import saved
from families import one_thread as one_thread

from blockfit.fit.plan import Narrowing, Plan, Replacement, Rows, Span
from blockfit.formats.card import model_card
from blockfit.formats.parity import Parity
from blockfit.reports import plots
from blockfit.reports.content import Candidate, Content
from blockfit.reports.headline import headline
from blockfit.reports.page import render

CUTS = (
    Narrowing(3, "mlp", 96, 384, 1, (Rows("fc1"),), "fc2"),
    Narrowing(3, "keys", 8, 16, 2, (Rows("qkv"), Rows("qkv", 32))),
)
PLAN = Plan((Replacement(Span(0, 2), "affine"),), CUTS)
CANDIDATE = Candidate(PLAN, 4, {"parameters": 100.0}, {"parameters": 60.0}, {"kl": 0.01})


def test_the_chain_shows_what_is_left_of_every_part() -> None:
    page = render(Content("a model", CANDIDATE))
    bars = re.findall(r'aria-label="([^"]+)"><b style="width:([\d.]+)%">', page)
    assert bars == [("mlp 96 of 384", "25.0"), ("values whole", "100.0"), ("keys 8 of 16", "50.0")]
    words = "2 of 4 blocks are kept. Replaced: blocks 0–1 by an affine map. Narrowed: block 3 (mlp "
    assert words + "96 of 384, keys 8 of 16)." in page
    assert "60% of the parameters; of 4 blocks, 2 replaced and 1 narrowed" in page
    assert headline(CANDIDATE, None)[0]["note"] == "50.0% remain, 1 of them narrowed"


def test_the_chain_is_drawn_with_bars() -> None:
    whole = replace(CANDIDATE, plan=Plan(PLAN.replacements))
    assert plots.chain(CANDIDATE).svg().count("<path") > plots.chain(whole).svg().count("<path") + 5


@pytest.mark.parametrize("share", [None, 0.5])
def test_the_card_has_a_table_of_what_is_left(share: float | None, tmp_path: Path) -> None:
    spans = Plan((Replacement(Span(0, 1), "affine"),))
    small = saved(tmp_path / "small", "vit-classifier", spans, share=share)
    card = model_card(small, Parity(4, "noise", 1e-7, 1.0, 1.0), "load()")
    title = next(line for line in card.splitlines() if line.startswith("# "))
    assert "| 0:1 | 0 | affine |" in card
    if share is None:
        assert title.endswith("without 1 of 4 blocks")
        assert "mlp" not in card
        return
    assert title.endswith("made smaller: of 4 blocks, 1 replaced and 3 narrowed")
    rows = re.findall(r"^\| (\d) \| (\d+) of (\d+) \| (\d+) of (\d+) \| .* \|$", card, re.M)
    assert [int(row[0]) for row in rows] == [1, 2, 3]
    for block, mlp, of_mlp, values, of_values in (map(int, row) for row in rows):
        cuts = small.plan.at(block)
        assert (mlp, of_mlp) == (cuts["mlp"].kept, cuts["mlp"].size)
        assert (values, of_values) == (cuts["values"].kept, cuts["values"].size)
