"""Spans and plans: which blocks go, written, read back and refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockfit.errors import BlockfitError
from blockfit.fit.plan import MAP_KINDS, Plan, Replacement, Span, spans_up_to

DEPTH = 12


@st.composite
def separate_spans(draw: st.DrawFn) -> list[Span]:
    """Spans that share no block, in any order; neighbours may touch."""
    cuts = draw(st.lists(st.integers(0, 30), unique=True, max_size=10).map(sorted))
    pairs = list(zip(cuts[::2], cuts[1::2], strict=False))
    return draw(st.permutations([Span(*pair) for pair in pairs]))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    spans = draw(separate_spans())
    stops = {span.stop for span in spans}
    entries = []
    for span in spans:
        foldable = span.start > 0 and span.start not in stops
        kind = draw(st.sampled_from([k for k in MAP_KINDS if k != "folded" or foldable]))
        rank = draw(st.integers(1, 64)) if kind == "low-rank" else None
        split = kind not in ("identity", "folded") and draw(st.booleans())
        entries.append(Replacement(span, kind, rank, split))
    return Plan(tuple(entries))


@given(plans())
def test_a_plan_survives_json(plan: Plan) -> None:
    text = json.dumps(plan.to_json())
    assert Plan.from_json(json.loads(text)) == plan


@given(separate_spans())
def test_a_plan_removes_each_block_of_its_spans_once_whatever_their_order(
    spans: list[Span],
) -> None:
    plan = Plan.of(spans, "affine")
    gone = [block for block in range(31) if any(s.start <= block < s.stop for s in spans)]
    assert list(plan.removed_blocks) == gone
    assert plan == Plan.of(reversed(spans), "affine")
    assert list(plan.spans) == sorted(spans, key=lambda span: span.start)


@given(*[st.tuples(st.integers(0, 12), st.integers(1, 6))] * 2)
def test_spans_that_share_a_block_are_refused_and_no_others(
    left: tuple[int, int], right: tuple[int, int]
) -> None:
    one, two = (Span(start, start + length) for start, length in (left, right))
    if set(one.blocks) & set(two.blocks):
        with pytest.raises(BlockfitError, match=r"overlap; spans of a plan must not share a block"):
            Plan.of([one, two], "affine")
    else:
        assert len(Plan.of([one, two], "affine").removed_blocks) == len(one) + len(two)


@given(st.integers(0, 99), st.integers(1, 99))
def test_a_span_is_written_as_it_is_read(start: int, length: int) -> None:
    span = Span(start, start + length)
    assert Span.parse(str(span)) == span
    assert (len(span), span.blocks[0], span.blocks[-1]) == (length, start, start + length - 1)


@pytest.mark.parametrize("text", ["", "3", "3:", ":3", "3:2", "3:3", "-1:2", "1:2:3", "a:b", "²:3"])
def test_what_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(BlockfitError, match="start:stop"):
        Span.parse(text)


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_blocks_are_whole_numbers(value: Any) -> None:
    with pytest.raises(BlockfitError, match="must be a whole number"):
        Span(value, 5)


def test_all_spans_up_to_a_length_leave_protected_blocks_alone() -> None:
    every = {Span(a, b) for a in range(DEPTH) for b in range(a + 1, DEPTH + 1) if b - a <= 6}
    assert len(every) == 57
    assert set(spans_up_to(DEPTH, 6)) == every
    free = {span for span in every if not {3, 9} & set(span.blocks)}
    assert set(spans_up_to(DEPTH, 6, [9, 3])) == free
    with pytest.raises(BlockfitError, match=r"protected block 12 does not exist.*0–11"):
        spans_up_to(DEPTH, 6, [12])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"map": "magic"}, "unknown map 'magic'; choose one of identity, scale"),
        ({"map": "low-rank"}, "needs a rank of 1 or more"),
        ({"map": "low-rank", "rank": 0}, "needs a rank of 1 or more"),
        ({"map": "low-rank", "rank": 2.5}, "must be a whole number"),
        ({"map": "affine", "rank": 4}, "only low-rank maps have a rank"),
        ({"map": "identity", "per_token_type": True}, "no parameters to split"),
        ({"map": "folded", "per_token_type": True}, "no parameters to split"),
    ],
)
def test_options_that_a_map_does_not_have_are_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(BlockfitError, match=message):
        Replacement(Span(2, 4), **options)


def test_a_folded_span_needs_a_kept_block_before_it() -> None:
    with pytest.raises(BlockfitError, match="0:2 cannot be folded: no kept block stands before it"):
        Replacement(Span(0, 2), "folded")
    with pytest.raises(BlockfitError, match="3:4 cannot be folded: the block before it is removed"):
        Plan((Replacement(Span(1, 3), "affine"), Replacement(Span(3, 4), "folded")))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, r"plan: expected a list of cuts"),
        ([3], r"plan\[0\] must hold an object, got int"),
        ([{"start": 1, "stop": 2}], r"plan\[0\]: key 'map' is missing"),
        ([{"start": 1, "stop": 2, "map": "affine", "mpa": 1}], r"plan\[0\]: unknown key 'mpa'"),
        ([{"start": 1, "stop": "2", "map": "affine"}], r"plan\[0\]: stop must be a whole number"),
        ([{"start": 1, "stop": 2, "map": ["affine"]}], r"plan\[0\]: map must be a text"),
        (
            [{"start": 1, "stop": 2, "map": "affine", "per_token_type": 1}],
            "per_token_type must be true or false",
        ),
    ],
)
def test_a_damaged_plan_is_refused_with_the_place(value: Any, message: str) -> None:
    with pytest.raises(BlockfitError, match=message):
        Plan.from_json(value)


def test_a_plan_is_checked_against_the_model() -> None:
    Plan.of(["9:12"], "affine").check(DEPTH, protected=[8])
    with pytest.raises(BlockfitError, match=r"span 9:13 leaves the model, which has blocks 0–11"):
        Plan.of(["9:13"], "affine").check(DEPTH)
    with pytest.raises(BlockfitError, match="span 9:12 removes block 10, which is protected"):
        Plan.of(["9:12"], "affine").check(DEPTH, protected=[10])
    with pytest.raises(BlockfitError, match="removes all 12 blocks; keep at least one"):
        Plan.of(["0:6", "6:12"], "affine").check(DEPTH)


def test_only_identity_and_folded_make_a_plain_checkpoint() -> None:
    plain = {
        kind
        for kind in MAP_KINDS
        if kind != "low-rank" and Plan.of(["2:4"], kind).not_plain(6) is None
    }
    assert plain == {"identity", "folded"}
    assert "low-rank map" in str(Plan.of(["2:4"], "low-rank", rank=2).not_plain(6))


MLP = {
    "block": 1, "part": "mlp", "kept": 24, "size": 64, "heads": 1,
    "rows": [["fc1", 0]], "reader": "fc2",
}  # fmt: skip
KEYS = {**MLP, "part": "keys", "rows": [["qkv", 0], ["qkv", 64]], "reader": ""}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kept": 65}, "block 1: mlp cannot keep 65 of 64 dimensions"),
        ({"kept": 0}, "kept of a narrowing must be at least 1"),
        ({"kept": 1.5}, r"plan\[0\]: kept must be a whole number, got 1.5"),
        ({"size": 10**30, "kept": 10**31}, "cannot keep"),
        ({"block": -1}, "block of a narrowing must be at least 0"),
        ({"part": "norm"}, "unknown part 'norm'; choose one of mlp, values, keys"),
        ({"part": ["mlp"]}, "part must be a text"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"rows": []}, "mlp of block 1 need one run or more of rows, got 0"),
        ({"rows": [["fc1"]]}, r"rows\[0\]: expected \[layer, first row\]"),
        ({"rows": [["fc1", -1]]}, r"rows\[0\]: expected \[layer, first row\]"),
        ({"rows": [["fc1", 0], ["fc1", 63]]}, "its rows of 'fc1' overlap"),
        ({"rows": [["fc2", 0]]}, "must name layers other than the reader"),
        ({"reader": ""}, "needs the layer that reads it"),
        ({"reader": 3}, "reader must be a text"),
        ({"heads": 2}, "has no heads"),
    ],
)
def test_a_damaged_narrowing_is_refused_with_the_place(change: Any, message: str) -> None:
    Plan.from_json([MLP])
    with pytest.raises(BlockfitError, match=message):
        Plan.from_json([MLP | change])


def test_a_plan_of_all_kinds_is_shown_a_line_per_block() -> None:
    span = {"start": 5, "stop": 8, "map": "affine"}
    last = {**MLP, "block": 10, "kept": 8, "size": 16}
    plan = Plan.from_json([KEYS, span, last, MLP])
    assert plan.lines() == [
        "block 1      mlp 24/64      keys 24/64",
        "blocks 5–7   → affine",
        "block 10     mlp 8/16",
    ]
    assert plan.brief == "5:8 affine, mlp 40% in 2, keys 38% in 1"
    assert plan.changed(12) == "of 12 blocks, 3 replaced and 2 narrowed"
    assert (plan.narrowed_blocks, plan.removed_blocks) == ((1, 10), (5, 6, 7))
    assert Plan(()).lines() == []
    assert (Plan(()).brief, Plan(()).changed(4)) == ("nothing removed", "of 4 blocks, none changed")
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
