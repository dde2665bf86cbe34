"""Recipes: named combinations, and what may replace a span in each."""

from __future__ import annotations

from typing import Any

import pytest

from blockfit.errors import BlockfitError
from blockfit.fit.plan import Replacement, Span
from blockfit.search.recipes import RECIPES, Recipe, named_recipe, recipe_for
from blockfit.search.solve import Options


def test_the_paper_recipe_is_the_paper() -> None:
    """TBA, arXiv 2410.04941: one span by MSE, a linear map by plain least squares, nothing else."""
    paper = named_recipe("paper")
    assert (paper.maps, paper.select, paper.contiguous) == (("linear",), "mse", True)
    assert (paper.options.ridge, paper.options.refit, paper.options.repair) == (0, False, "none")
    assert not paper.plain


def test_the_plain_recipe_adds_nothing() -> None:
    plain = named_recipe("plain")
    assert plain.plain
    kinds = [entry.map for entry in plain.replacements(Span(2, 4), 16)]
    assert kinds == ["identity", "folded"]
    # Nothing stands before the first block that a map could be folded into.
    assert [entry.map for entry in plain.replacements(Span(0, 2), 16)] == ["identity"]


def test_fields_of_a_recipe_can_be_changed_by_name() -> None:
    changed = named_recipe("paper", maps=("affine",), options=Options(repair="mlp"))
    assert (changed.name, changed.maps, changed.select) == ("paper", ("affine",), "mse")
    assert RECIPES["paper"].maps == ("linear",)
    assert named_recipe(changed) is changed
    assert named_recipe(changed, longest=2).longest == 2


def test_one_entry_for_every_kind_and_rank() -> None:
    span = Span(2, 4)
    mixed = Recipe(maps=("identity", "affine", "low-rank"), rank=5, per_token_type=True)
    assert mixed.replacements(span, 16) == [
        Replacement(span, "identity"),
        Replacement(span, "affine", None, True),
        Replacement(span, "low-rank", 5, True),
    ]
    ranks = [e.rank for e in Recipe(maps=("low-rank",)).replacements(span, 384)]
    assert ranks == [48, 96, 192]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maps": ("affin",)}, "unknown map 'affin'; choose one of identity, scale"),
        ({"maps": ()}, "needs a kind of map"),
        ({"rank": 4}, "only low-rank maps have a rank"),
        ({"maps": ("affine",), "uniform": True}, "no place for affine maps"),
        ({"maps": ("folded",), "uniform": True}, "cannot say narrower values"),
        ({"select": "best"}, "unknown selection 'best'; choose one of effect, mse"),
        ({"baseline": "corb"}, "unknown baseline 'corb'; choose one of corp, vbp, magnitude"),
    ],
)
def test_what_is_no_recipe_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BlockfitError, match=message):
        Recipe(**options)


def test_baselines_are_what_was_published() -> None:
    for name in ("corp", "vbp", "magnitude"):
        recipe = recipe_for(name)
        assert (recipe.name, recipe.baseline, recipe.cuts) == (name, name, ("mlp",))
        assert (recipe.options.refit, recipe.options.repair) == (False, "none")
    identity = recipe_for("identity", map=None)
    assert (identity.maps, identity.select, identity.contiguous) == (("identity",), "angular", True)
    assert recipe_for("identity", map="affine").maps == ("affine",)


@pytest.mark.parametrize(
    ("goal", "given", "words"),
    [
        ("remove=", {}, "a budget of params= or flops= and cannot be used with remove="),
        ("spans=", {}, "cannot be used with spans="),
        ("a sweep", {}, "cannot be used with a sweep"),
        ("params=", {"protect": (1,)}, "a published method as it is; leave protect= out"),
    ],
)
def test_baselines_refuse_what_they_have_no_place_for(
    goal: str, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(BlockfitError, match=f"^recipe corp .*{words}$"):
        RECIPES["corp"].check_use(goal, **given)
    RECIPES["corp"].check_use("flops=", protect=(), whole=None, per_token_type=False)
    RECIPES["paper"].check_use(goal, **given)


@pytest.mark.parametrize(
    "change", [{"map": "linear"}, {"ridge": 0.0}, {"cuts": "mlp"}, {"repair": "mlp"}], ids=str
)
def test_nothing_of_a_baseline_can_be_changed(change: dict[str, Any]) -> None:
    with pytest.raises(BlockfitError, match=f"leave {next(iter(change))}= out"):
        recipe_for("vbp", **change)
    with pytest.raises(BlockfitError, match="leave select= out"):
        named_recipe("vbp", select="mse")


def test_unknown_recipes_are_refused_with_the_known_ones() -> None:
    with pytest.raises(BlockfitError, match="unknown recipe 'papr'; choose one of default, paper"):
        named_recipe("papr")


def test_uniform_leaves_away_what_no_stock_config_can_say() -> None:
    uniform = recipe_for("default", uniform=True)
    assert (uniform.maps, uniform.cuts) == (("identity", "folded"), ("blocks", "mlp"))
    assert uniform.plain
    assert uniform.options == named_recipe("default").options
    assert recipe_for("default", uniform=True, cuts="mlp").cuts == ("mlp",)
    assert recipe_for("plain").uniform
    with pytest.raises(BlockfitError, match="cannot say narrower keys"):
        recipe_for("default", uniform=True, cuts="mlp,keys")
