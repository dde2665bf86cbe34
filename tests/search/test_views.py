"""Few images are shown several times: what is fitted sees views, what judges does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small import small_blocks, small_images, small_vit
from torch import Tensor

import blockfit
from blockfit.errors import BlockfitError
from blockfit.search.recipes import RECIPES, Recipe, recipe_for
from blockfit.search.session import Session
from blockfit.search.setting import Setting, views_of
from blockfit.search.states import TracedImages
from blockfit.search.summaries import compression

pytestmark = pytest.mark.views


def test_the_fewer_the_images_the_more_views_of_each() -> None:
    counts = (8, 26, 32, 51, 102, 128, 129, 256, 10_000)
    assert [Recipe().views_of(count, 256) for count in counts] == [8, 8, 8, 5, 2, 2, 1, 1, 1]
    assert {Recipe(views=3).views_of(count, 256) for count in counts} == {3}


@pytest.mark.parametrize("name", ["paper", "identity", "corp", "vbp", "magnitude"])
def test_published_methods_see_every_image_once(name: str) -> None:
    assert RECIPES[name].views_of(8, 256) == 1


@torch.no_grad()
def test_the_first_view_is_the_images_as_they_are() -> None:
    model, data = small_vit(), small_images(20)
    blocks = small_blocks(model)
    viewed = TracedImages.of(model, blocks, replace(data, views=3))
    once = TracedImages.of(model, blocks, data)
    assert len(viewed) == 60
    assert viewed.tokens == 3 * once.tokens
    first = viewed.shown(1)
    assert first.sizes == once.sizes
    for one, other in zip(first.traces, once.traces, strict=True):
        assert torch.equal(one.states[0], other.states[0])
    assert viewed.shown(2).sizes == TracedImages.of(model, blocks, replace(data, views=2)).sizes
    assert viewed.shown(3).sizes == viewed.sizes


@torch.no_grad()
def test_all_views_of_an_image_are_in_one_part_when_a_ridge_is_chosen() -> None:
    model, data = small_vit(), small_images(48)
    blocks = small_blocks(model)
    viewed = TracedImages.of(model, blocks, replace(data, views=2))
    held_out = replace(small_images(16, seed=1), views=2)
    more = viewed.with_more(TracedImages.everywhere(model, blocks, held_out))
    checks = [more.checks(batch, 5) for batch in range(len(more.traces))]
    assert checks[:6] == [False, True, False, False, False, False]  # 6 batches, then their views
    assert checks[6:12] == checks[:6]
    assert checks[12:14] == checks[14:16] == [True, False]  # the seventh and eighth of all


def session_of(count: int = 20, **changes: int) -> Session:
    setting = Setting.of(small_vit(), small_images(count))
    return Session(setting, recipe_for("default", **changes))  # type: ignore[arg-type]


def test_what_judges_is_never_a_view() -> None:
    session = session_of()
    assert session.views == 8
    assert len(session.originals) == 8 * 16
    assert len(session.held_out) == 4
    assert len(session.held_out.views) == 8 * 4  # for solutions on all images
    assert len(session.held_out.wider) == 8 * 4  # for effects
    blocks = small_blocks(session.setting.model)
    as_they_are = TracedImages.of(session.setting.model, blocks, session.setting.held_out)
    for one, other in zip(session.held_out.images.traces, as_they_are.traces, strict=True):
        assert torch.equal(one.states[0], other.states[0])


def test_another_recipe_of_a_calibration_sees_its_own_views() -> None:
    session = session_of()
    once = session.with_recipe(RECIPES["vbp"])
    assert (once.views, len(once.originals), len(once.held_out.views)) == (1, 16, 4)
    assert (session.views, len(session.originals)) == (8, 8 * 16)
    assert session.with_recipe(Recipe(name="other")).views == 8
    assert session_of(views=2).with_recipe(Recipe(name="other")).views == 2
    with pytest.raises(BlockfitError, match="asks for 4 views"):
        session_of(views=2).with_recipe(Recipe(name="other", views=4))


def equal(one: blockfit.Result, other: blockfit.Result) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return one.plan == other.plan and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("recipe", "budget"), [("paper", {"remove": 1}), ("corp", {"params": 0.9})]
)
def test_a_calibration_gives_published_methods_what_they_give_alone(
    recipe: str, budget: dict[str, float]
) -> None:
    model, data = small_vit(), small_images(24)
    calibration = blockfit.calibrate(model, data, final=0)
    shared = calibration.compress(recipe=recipe, **budget)  # type: ignore[arg-type]
    alone = blockfit.compress(model, data, recipe=recipe, final=0, **budget)  # type: ignore[arg-type]
    assert equal(shared, alone)
    assert shared.report["calibration"]["views"] == 1


def kl(model: torch.nn.Module, small: torch.nn.Module, pictures: list[Tensor]) -> float:
    with torch.no_grad():
        old, new = (torch.cat([m(x) for x in pictures]).log_softmax(1) for m in (model, small))
    return float((old.exp() * (old - new)).sum(1).mean())


def test_views_make_a_better_model_of_few_images() -> None:
    model = blockfit.load("demo")
    test = [x for x in blockfit.images("digits:test", model) if isinstance(x, Tensor)]
    losses = {}
    for views in (None, 1):
        data = blockfit.images("digits", model, limit=32)
        result = blockfit.compress(model, data, params="55%", views=views, final=0)
        assert result.report["calibration"]["views"] == (views or 8)
        losses[views] = kl(model, result.model, test)
    assert losses[None] < 0.8 * losses[1]


def test_views_are_of_pictures_alone() -> None:
    pictures = Setting.of(small_vit(), small_images(16))
    clips = replace(pictures, example=torch.randn(2, 3, 4, 8, 8))
    assert views_of(Recipe(), pictures) == (8, 8)
    assert views_of(Recipe(), Setting.of(small_vit(), small_images(160))) == (2, 4)
    assert views_of(Recipe(), clips) == views_of(Recipe(views=1), clips) == (1, 1)
    with pytest.raises(BlockfitError, match="views=2 shows crops of pictures"):
        views_of(Recipe(views=2), clips)


def test_what_is_no_number_of_views_is_refused_before_any_work() -> None:
    model = small_vit()
    with pytest.raises(BlockfitError, match="views must be at least 1, got 0"):
        blockfit.compress(model, small_images(16), params=0.9, views=0)
    with pytest.raises(BlockfitError, match="recipe corp is a published method as it is"):
        blockfit.compress(model, small_images(16), params=0.9, recipe="corp", views=2)


@pytest.mark.parametrize("views", [1, 3])
def test_a_run_tells_how_close_it_is_on_what_it_was_solved_on(views: int) -> None:
    model, data = small_vit(), small_images(40)
    result = blockfit.compress(model, data, params=0.8, views=views, final=0)
    fit, _ = data.split(0.2, 0)
    fitted = result.report["fitted"]
    shown = [x for x in fit if isinstance(x, Tensor)][: fitted["images"] // 8]
    assert fitted["images"] == 8
    assert fitted["kl"] == pytest.approx(kl(model, result.model, shown), rel=1e-3, abs=1e-7)
    own, held_out = fitted["feature_relative_error"], result.report["held_out"]
    times = held_out["feature_relative_error"] / own
    told = str(result.summary())
    assert f"on 8 of the images it was solved on: relative error {own:.4f}" in told
    assert f"; {times:.1f} times that on the 8 held-out ones" in told
    assert ("more calibration images would make a better model" in told) == (times > 2)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.15, "; 1.5 times that on 300 that decided nothing (1.4 to 1.7)"),
        (
            0.25,
            "; 2.5 times that on 300 that decided nothing (2.4 to 2.7), so more calibration images "
            "would make a better model",
        ),
    ],
)
def test_images_that_decided_nothing_tell_whether_more_would_help(value: float, said: str) -> None:
    model, data = small_vit(), small_images(24)
    report = blockfit.compress(model, data, params=0.8, final=0).report
    report["fitted"]["feature_relative_error"] = 0.1
    interval = {"value": value, "low": value - 0.01, "high": value + 0.02}
    report["final"] = {
        "images": 300, "source": "x", "confidence": 0.95, "feature_error": interval,
        "top1_before": None,
    }  # fmt: skip
    told = [part for part in compression(report, 6) if "it was solved on" in str(part)]
    images = report["fitted"]["images"]
    assert told == [f"on {images} of the images it was solved on: relative error 0.1000{said}"]
