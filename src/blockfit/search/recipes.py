"""Recipes: named combinations of map, selection, refit and repair."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from blockfit.arguments import at_least, check_fields, one_of
from blockfit.errors import BlockfitError
from blockfit.fit.plan import MAP_KINDS, PARTS, Replacement, Span
from blockfit.fit.published import BASELINES
from blockfit.search.solve import Options

CUTS = ("blocks", *PARTS)
"""Kinds of cuts: whole blocks, and parts of blocks."""

PLAIN_MAPS = ("identity", "folded")
"""Kinds of maps that add no module."""

UNIFORM_CUTS = ("blocks", "mlp")
"""Kinds of cuts that stock configs can say: fewer blocks, and one width for all MLPs."""

ENOUGH_TO_FIT, ENOUGH_TO_MEASURE = 256, 128
"""Where there are fewer images to fit on, or to measure effects on, so many views of them are taken
(docs/measurements.md)."""

MOST_VIEWS = 8
"""Views of an image that are taken where nobody says how many."""

VIEWS_LIMIT = 64
"""More cannot be asked for: each takes the time of another image, and is a crop of the same."""

SELECTIONS = ("effect", "mse", "angular", "first", "last", "random")


@dataclass(frozen=True)
class Recipe:
    """How spans are chosen and what replaces them.

    Args:
        name: for messages and reports.
        maps: kinds of map that may be chosen; the best one of each span is taken.
        rank: rank of ``low-rank`` maps; ``None`` tries an eighth, a quarter and half of the width
            and takes the smallest that loses next to nothing.
        per_token_type: one map for prefix and one for patch tokens.
        select: ``effect`` judges by the model's output on held-out images; ``mse`` is the
            paper's similarity (smallest MSE between h[start] and h[stop]); ``angular`` the angle
            between them (Gromov et al., arXiv 2403.17887); ``first``, ``last`` and ``random`` are
            baselines.
        contiguous: one span only, as in the paper.
        longest: the longest span that is scored on its own.
        options: how maps and repairs are solved.
        cuts: kinds of cuts that a budget other than ``remove`` may use: whole ``blocks``, neurons
            of ``mlp``s, dimensions of heads' ``values``, and of their queries and ``keys``.
        baseline: a published method that narrows all MLPs alike, instead of all the above: one of
            ``BASELINES``.
        uniform: what is left can be said by a stock config: one width for the MLPs of all blocks,
            whole blocks that leave no module.
        views: how often each image that is fitted on, or effects are measured on, is shown: as it
            is, then as crops of it. ``None``: more often the fewer images there are, and once for
            published methods.

    Raises:
        BlockfitError: for an unknown map, selection, kind of cut or baseline, for views below 1
            or above 64, and for what a stock config cannot say where ``uniform`` is asked for.
    """

    name: str = "default"
    maps: tuple[str, ...] = ("affine",)
    rank: int | None = None
    per_token_type: bool = False
    select: str = "effect"
    contiguous: bool = False
    longest: int = 6
    options: Options = field(default_factory=Options)
    cuts: tuple[str, ...] = CUTS
    baseline: str | None = None
    uniform: bool = False
    views: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(1, views=self.views)
        if self.views is not None and self.views > VIEWS_LIMIT:
            raise BlockfitError(
                f"views must be {VIEWS_LIMIT} or less, got {self.views}: more crops show nothing "
                "new; add images instead"
            )
        for cut in self.cuts:
            if cut not in CUTS:
                raise BlockfitError(f"unknown kind of cut {cut!r}; choose from {', '.join(CUTS)}")
        if not self.cuts:
            raise BlockfitError(f"a recipe needs a kind of cut; name one of {', '.join(CUTS)}")
        for kind in self.maps:
            one_of("map", kind, MAP_KINDS)
        if not self.maps:
            raise BlockfitError("a recipe needs a kind of map; name one of its maps")
        if self.rank is not None and "low-rank" not in self.maps:
            raise BlockfitError("only low-rank maps have a rank; leave rank= out or add the map")
        one_of("selection", self.select, SELECTIONS)
        if self.baseline is not None:
            one_of("baseline", self.baseline, BASELINES)
        self._check_uniform()

    def _check_uniform(self) -> None:
        if not self.uniform:
            return
        if other := sorted({*self.maps} - {*PLAIN_MAPS}):
            raise BlockfitError(
                f"a stock config has no place for {other[0]} maps; with uniform= choose "
                f"{' or '.join(PLAIN_MAPS)}"
            )
        if other := [cut for cut in self.cuts if cut not in UNIFORM_CUTS]:
            raise BlockfitError(
                f"a stock config cannot say narrower {other[0]}; with uniform= choose "
                f"{' or '.join(UNIFORM_CUTS)}"
            )

    def replacements(self, span: Span, width: int) -> list[Replacement]:
        """What may replace ``span`` in a model of this width: one entry per kind and rank."""
        out = []
        for kind in self.maps:
            if kind == "folded" and span.start == 0:
                continue
            split = self.per_token_type and kind not in ("identity", "folded")
            ranks: list[int | None] = [None]
            if kind == "low-rank":
                tried = (width // 8, width // 4, width // 2)
                ranks = [self.rank] if self.rank else [max(1, rank) for rank in tried]
            out += [Replacement(span, kind, rank, split) for rank in ranks]
        return out

    def check_use(self, goal: str, **given: object) -> None:
        """Refuse what a published baseline has no place for.

        Args:
            goal: what is asked for: ``params=`` or another budget, ``spans=``, ``a sweep``.
            given: what else, by the name of its parameter; ``None``, ``False`` and ``()`` ask for
                nothing.

        Raises:
            BlockfitError: where this is a baseline, for all but ``params=`` and ``flops=``.
        """
        if self.baseline is None:
            return
        if goal not in ("params=", "flops="):
            raise BlockfitError(
                f"recipe {self.name} narrows all MLPs alike: it takes a budget of params= or "
                f"flops= and cannot be used with {goal}"
            )
        for name, value in given.items():
            if value is not None and value is not False and value != ():
                raise BlockfitError(
                    f"recipe {self.name} is a published method as it is; leave {name}= out"
                )

    def views_of(self, images: int, enough: int) -> int:
        """How often each of so many images is shown, to make about ``enough``."""
        if self.views is not None:
            return self.views
        if self.select != "effect" or self.baseline is not None:
            return 1
        return min(MOST_VIEWS, max(1, enough // max(1, images)))

    @property
    def narrows(self) -> bool:
        """Whether plans of the recipe may narrow parts of blocks."""
        by_effect = self.select == "effect" and not self.contiguous
        return by_effect and any(part in self.cuts for part in PARTS)

    @property
    def plain(self) -> bool:
        """Whether every plan of the recipe can be written as a stock checkpoint."""
        return set(self.maps) <= {*PLAIN_MAPS}


BARE = Options(refit=False, repair="none")
"""No refit, no repair."""

RECIPES = {
    "default": Recipe(),
    "paper": Recipe(
        name="paper",
        maps=("linear",),
        select="mse",
        contiguous=True,
        options=replace(BARE, ridge=0.0),
        cuts=("blocks",),
    ),
    "plain": Recipe(name="plain", maps=PLAIN_MAPS, cuts=UNIFORM_CUTS, uniform=True),
    "identity": Recipe(
        name="identity",
        maps=("identity",),
        select="angular",
        contiguous=True,
        options=BARE,
        cuts=("blocks",),
    ),
    **{name: Recipe(name=name, options=BARE, cuts=("mlp",), baseline=name) for name in BASELINES},
}
"""``default`` is the best measured; ``paper`` is TBA as published (arXiv 2410.04941): one span
chosen by similarity, a linear map by plain least squares; ``plain`` adds no module and gives the
MLPs of all blocks one width, so its models can be written as stock checkpoints. The others are
baselines: ``identity`` drops the span of smallest angular distance (arXiv 2403.17887); ``corp``,
``vbp`` and ``magnitude`` narrow all MLPs alike (``fit.published``)."""


def named_recipe(name: str | Recipe, **changes: Any) -> Recipe:
    """A recipe by name, with some of its fields changed.

    Raises:
        BlockfitError: for an unknown name.
    """
    if isinstance(name, str):
        one_of("recipe", name, RECIPES)
    recipe = RECIPES[name] if isinstance(name, str) else name
    recipe.check_use("params=", **changes)
    return replace(recipe, **changes) if changes else recipe


def recipe_for(
    recipe: str | Recipe,
    spans_given: bool = False,
    *,
    map: str | None = None,
    rank: int | None = None,
    per_token_type: bool | None = None,
    cuts: Iterable[str] | str | None = None,
    uniform: bool | None = None,
    views: int | None = None,
    **solving: Any,
) -> Recipe:
    """The recipe that a call means.

    Spans written by hand get the map that was asked for and nothing else: no repair, unless the
    call names one or a recipe other than the default. ``None`` values change nothing.

    Args:
        recipe: a name, or a recipe to start from.
        spans_given: spans were written by hand.
        map: the only kind of map.
        cuts: kinds of cuts, also as one text with commas.
        uniform: what a stock config can say: the maps and cuts of the recipe that it cannot are
            left out.
        views: how often each image that is fitted on, or effects are measured on, is shown.
        solving: fields of ``Options``; ``ridge`` may be ``"auto"``.
    """
    by_default = recipe == "default"
    maps = None if map is None else (map,)
    kinds = cuts.split(",") if isinstance(cuts, str) else cuts
    changes: dict[str, Any] = {"maps": maps, "rank": rank, "per_token_type": per_token_type}
    changes["views"] = views
    changes["cuts"] = None if kinds is None else tuple(kind.strip() for kind in kinds)
    recipe = _uniform(named_recipe(recipe)) if uniform else recipe
    given = {k: v for k, v in solving.items() if v is not None}
    asked = {"map": map, "rank": rank, "per_token_type": per_token_type, "cuts": cuts, **given}
    asked["views"] = views
    named_recipe(recipe).check_use("params=", **asked)
    chosen = named_recipe(recipe, **{k: v for k, v in changes.items() if v is not None})
    if "ridge" in given:
        given["ridge"] = _ridge(given["ridge"])
    if spans_given and "repair" not in given and chosen.name == "default" and by_default:
        given["repair"] = "none"
    return replace(chosen, options=replace(chosen.options, **given))


def _uniform(recipe: Recipe) -> Recipe:
    """The recipe with nothing in it that a stock config cannot say."""
    if recipe.baseline is not None:  # which narrows all MLPs alike
        return recipe
    cuts = tuple(cut for cut in recipe.cuts if cut in UNIFORM_CUTS)
    return replace(recipe, maps=PLAIN_MAPS, rank=None, cuts=cuts, uniform=True)


def _ridge(value: float | str) -> float | None:
    """λ as a number; ``None`` for ``auto``."""
    try:
        return None if value == "auto" else float(value)
    except ValueError:
        raise BlockfitError(
            f"cannot read {value!r} as ridge; give a number, such as 1e-4, or auto"
        ) from None
