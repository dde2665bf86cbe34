"""Budgets as they are written, and the sizes of plans without building them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, one_thread  # noqa: F401
from hypothesis import given
from hypothesis import strategies as st
from looking import LOOKING, Uncountable, looking
from small import small_blocks, small_pictures, small_vit
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from blockfit.errors import BlockfitError
from blockfit.fit.maps import empty_map
from blockfit.fit.plan import Plan, Replacement, Span
from blockfit.models.blocks import find_chain
from blockfit.models.surgery import apply_plan
from blockfit.search.budget import KINDS, Budget, Sizes, read_number
from blockfit.search.reach import BY_BLOCKS, BY_CUTS


@pytest.mark.parametrize(
    ("given", "kind", "value"),
    [
        ({"remove": 3}, "remove", 3),
        ({"params": "62%"}, "params", 0.62),
        ({"flops": " 70 % "}, "flops", 0.7),
        ({"latency": "0.7"}, "latency", 0.7),
        ({"max_kl": 0}, "max_kl", 0),
        ({"max_drop": "0.5"}, "max_drop", 0.5),
    ],
)
def test_budgets_are_read_as_they_are_written(given: Any, kind: str, value: float) -> None:
    budget = Budget.of(**{**dict.fromkeys(KINDS), **given})
    assert budget is not None
    assert (budget.kind, budget.value) == (kind, pytest.approx(value))


def test_one_budget_at_most() -> None:
    assert Budget.of(remove=None, params=None) is None
    with pytest.raises(BlockfitError, match="give one budget, not both remove= and params="):
        Budget.of(remove=2, params="62%", flops=None)


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        ("size", 1, "unknown budget 'size'; choose one of remove, params"),
        ("remove", 0, "remove= takes a whole number of blocks, got 0"),
        ("remove", 1.5, "remove= takes a whole number of blocks, got 1.5"),
        ("params", 0, "params= takes the part that may remain"),
        (
            "flops",
            62,
            r"flops= takes the part .* such as 0\.62 or 62%, got 62; did you mean 62%\?",
        ),
        ("params", 1.5, r"got 1\.5 \(150%, more than there is\)$"),
        ("params", 0.0062, r"got 0\.0062; did you mean 0\.62 or 62%\?"),
        ("latency", -0.1, "latency= takes the part that may remain"),
        ("max_kl", -1, "max_kl= must be 0 or more"),
        ("max_drop", float("nan"), "max_drop= must be a number"),
        ("params", float("inf"), "params= must be a number"),
    ],
)
def test_values_that_do_not_fit_are_refused(kind: str, value: float, message: str) -> None:
    with pytest.raises(BlockfitError, match=message):
        Budget(kind, value)


@given(st.floats(0, 1))
def test_percent_are_hundredths(part: float) -> None:
    assert read_number(f"{part * 100!r}%", "params") == pytest.approx(part)
    assert read_number(repr(part), "params") == part


def test_what_is_no_number_is_refused() -> None:
    for text in ("", "%", "many", "6 2"):
        with pytest.raises(BlockfitError, match=r"as params=; write 0\.62 or 62%"):
            read_number(text, "params")


def test_a_budget_is_met_by_what_is_as_small_or_smaller() -> None:
    size = {"removed": 3.0, "params": 0.62, "flops": 0.7}
    assert Budget("remove", 3).met_by_size(size)
    assert not Budget("remove", 4).met_by_size(size)
    assert Budget("params", 0.62).met_by_size(size)
    assert not Budget("params", 0.61).met_by_size(size)
    assert Budget("flops", 0.71).met_by_size(size)


PLANS = [
    Plan(),
    Plan.of(["1:3"], "identity"),
    Plan.of(["1:3"], "folded"),
    Plan.of(["0:1", "2:4"], "affine"),
    Plan((Replacement(Span(1, 2), "low-rank", 3), Replacement(Span(3, 4), "scale"))),
    Plan.of(["2:4"], "linear", per_token_type=True),
]


@pytest.mark.parametrize("name", ["timm-deit-distilled", "dinov2-classifier", "plain"])
def test_sizes_of_plans_are_those_of_the_built_models(name: str) -> None:
    family = FAMILIES[name]
    model, images = family.build(), family.images(3)
    blocks = find_chain(model)
    sizes = Sizes(model, blocks, images)
    before = copy.deepcopy(model.state_dict())
    for plan in PLANS:
        small = copy.deepcopy(model)
        maps = [empty_map(entry, blocks.width, blocks.prefix_tokens) for entry in plan]
        apply_plan(small, blocks, plan, maps)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            small(images[:1])
        parameters, flops = sizes.of(plan)
        assert parameters == sum(p.numel() for p in small.parameters())
        # Kernels of attention that torch's counter does not know count nothing there.
        assert flops >= counter.get_total_flops() > 0
        assert flops < sizes.flops or not len(plan)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_flops_are_those_of_the_matrix_products() -> None:
    """Counted by hand: 10 tokens, width 16, MLP of 32, 4 × 4 × 3 pixels per patch."""
    model = small_vit(6)
    sizes = Sizes(model, small_blocks(model), small_pictures(2))
    tokens, width = 10, 16
    layers = 3 * width + width + 2 * width + 2 * width
    block = 2 * tokens * width * layers + 2 * 2 * tokens * tokens * width
    stem, head = 2 * 9 * 48 * width, 2 * width * 4
    assert sizes.flops == stem + 6 * block + head
    assert sizes.of(Plan.of(["1:3"], "identity"))[1] == stem + 4 * block + head
    mapped = sizes.of(Plan.of(["1:3"], "affine"))[1]
    assert mapped == stem + 4 * block + head + 2 * tokens * width * width


def test_every_kind_of_budget_has_its_ways() -> None:
    assert set(BY_BLOCKS) == set(KINDS)
    assert set(BY_CUTS) == set(KINDS) - {"remove"}


def test_what_remains_without_the_largest_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_vit(6)
    sizes = Sizes(model, small_blocks(model), small_pictures(2))
    assert sizes.least(2, "params") == pytest.approx(
        sizes.fraction(Plan.of(["1:3"], "identity"), "params")
    )
    monkeypatch.setattr(Sizes, "_count", lambda self, model: None)
    assert sizes.least(2, "flops") is None


@pytest.mark.parametrize("plan", [Plan(), Plan.of(["1:3"], "affine")], ids=str)
def test_a_run_counts_what_the_meta_device_counts(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_vit(6)
    run = Sizes(model, small_blocks(model), small_pictures(2))
    monkeypatch.setattr("blockfit.search.budget.RUN", 0)
    meta = Sizes(model, small_blocks(model), small_pictures(2))
    assert run.of(plan) == meta.of(plan)


def test_counting_leaves_the_model_alone_and_sees_layers_that_blocks_share() -> None:
    model = small_vit(6)
    plan = Plan.of(["1:3", "4:5"], "affine")
    apart = Sizes(model, small_blocks(model), small_pictures(2)).of(plan)[0]
    model.blocks[5].mlp = model.blocks[4].mlp  # type: ignore[union-attr]
    shared = Sizes(model, small_blocks(model), small_pictures(2)).of(plan)[0]
    before = list(model.modules())
    assert shared == apart  # the layer stays, in block 5
    assert list(model.modules()) == before


def test_fractions_are_of_the_original() -> None:
    model = small_vit(6)
    sizes = Sizes(model, small_blocks(model), small_pictures(2))
    assert sizes.fraction(Plan(), "params") == sizes.fraction(Plan(), "flops") == 1
    block = sum(p.numel() for p in model.blocks[0].parameters())
    total = sum(p.numel() for p in model.parameters())
    part = sizes.fraction(Plan.of(["1:3"], "affine"), "params")
    assert part == pytest.approx((total - 2 * block + 16 * 17) / total)


def test_a_budget_of_parameters_counts_no_flops_of_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each count is a forward pass under torch's counter: as long as dozens of plain ones."""
    sizes = Sizes(small_vit(6), small_blocks(small_vit(6)), small_pictures(2))
    counted: list[nn.Module] = []
    monkeypatch.setattr(Sizes, "_count", lambda _, model: counted.append(model))
    plan = Plan.of(["1:3"], "affine")
    assert sizes.known_fraction(plan, "params") == sizes.fraction(plan, "params") < 1
    assert not counted
    with pytest.raises(BlockfitError, match=r"flops of .* cannot be counted; give params="):
        sizes.known_fraction(plan, "flops")
    assert len(counted) == 1


@pytest.mark.parametrize("kind", LOOKING.values(), ids=list(LOOKING))
def test_flops_of_models_that_look_at_values_are_those_of_their_products(kind: Any) -> None:
    """Case 14: on a real forward of one image, for the original and for plans."""
    plan = Plan.of(["1:3"], "affine")
    model, plain = looking(kind), small_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sizes, expected = (
        Sizes(m, small_blocks(plain), small_pictures(4)) for m in (model, plain)
    )  # fmt: skip
    assert (sizes.flops, sizes.of(plan)) == (expected.flops, expected.of(plan))
    for size in ("params", "flops"):
        assert sizes.fraction(plan, size) == expected.fraction(plan, size)
    assert sizes.warnings() == []
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_flops_that_cannot_be_counted_are_unknown() -> None:
    """Case 14: parameters are known all the same, and one sentence says what is not."""
    model, plan = looking(Uncountable), Plan.of(["1:3"], "affine")
    sizes = Sizes(model, small_blocks(model), small_pictures(4))
    parameters, flops = sizes.of(plan)
    assert (sizes.flops, flops) == (None, None)
    assert sizes.fraction(plan, "params") == parameters / sizes.parameters
    assert sizes.fraction(plan, "flops") is None
    assert "FLOPs are unknown" in sizes.warnings()[0]
