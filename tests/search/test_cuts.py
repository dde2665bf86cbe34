"""Budgets that narrow parts of blocks, from one calibration, on the demo and on tiny models."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_images, small_vit

import blockfit
from blockfit.fit.plan import PARTS, Plan
from blockfit.models.blocks import find_chain
from blockfit.models.probe import Probe
from blockfit.search.budget import Budget
from blockfit.search.cuts import CutSearch
from blockfit.search.sweep import MARK, Frontier, from_sweep, read_sweep, sweep

POINTS = (0.9, 0.7, 0.5)


@pytest.fixture(scope="module")
def model() -> Any:
    return blockfit.load("demo")


@pytest.fixture(scope="module")
def images(model: Any) -> Any:
    found = blockfit.images("digits", model, limit=48, seed=0)
    return dataclasses.replace(found, beyond=found.beyond[:64])


@pytest.fixture(scope="module")
def folder(model: Any, images: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("cuts") / "sweep"
    sweep(model, images, target, points=POINTS)
    return target


@pytest.fixture(scope="module")
def small(model: Any, images: Any) -> blockfit.Result:
    return blockfit.compress(model, images, params=0.7)


def part_of(result: blockfit.Result, key: str) -> float:
    return float(result.report[f"{key}_after"]) / float(result.report[f"{key}_before"])


def test_a_budget_of_parameters_is_met_closely_and_counted_truly(
    model: Any, small: blockfit.Result
) -> None:
    assert 0.695 <= part_of(small, "parameters") <= 0.7
    counted = sum(p.numel() for p in small.model.parameters())
    assert counted == small.report["parameters_after"]
    assert small.plan.narrowings
    assert type(small.model) is type(model)


def test_a_budget_of_flops_is_met_closely(model: Any, images: Any) -> None:
    small = blockfit.compress(model, images, flops=0.75)
    assert 0.74 <= part_of(small, "flops") <= 0.75


def test_narrowing_loses_less_than_whole_blocks_alone(
    model: Any, images: Any, small: blockfit.Result
) -> None:
    blocks = blockfit.compress(model, images, params=0.7, cuts="blocks")
    assert not blocks.plan.narrowings
    final = [r.report["final"]["kl"]["value"] for r in (small, blocks)]
    assert final[0] < 0.5 * final[1]


def test_only_what_cuts_allow_is_cut(model: Any, images: Any) -> None:
    small = blockfit.compress(model, images, params=0.85, cuts=("mlp", "keys"), whole=[0, 11])
    assert {cut.part for cut in small.plan.narrowings} <= {"mlp", "keys"}
    assert {cut.block for cut in small.plan.narrowings} <= set(range(1, 11))
    assert not small.plan.replacements


def test_widths_are_multiples_of_what_was_asked_for(model: Any, images: Any) -> None:
    small = blockfit.compress(model, images, params=0.8, cuts="mlp", multiple_of=48)
    assert all(cut.kept % 48 == 0 for cut in small.plan.narrowings)


def test_a_plan_is_applied_again_to_the_same_outputs(
    model: Any, images: Any, small: blockfit.Result
) -> None:
    again = blockfit.compress(model, images, plan=Plan.from_json(small.plan.to_json()))
    x = next(iter(images))
    with torch.no_grad():
        assert torch.equal(again.model(x), small.model(x))


@pytest.mark.parametrize("part", ["mlp", "keys", "values"])
def test_the_plan_of_another_architecture_is_refused(part: str) -> None:
    """Rows that are there, but belong to something else, must not be cut."""
    timm = pytest.importorskip("timm")
    size = {"img_size": 16, "patch_size": 4, "depth": 3, "num_classes": 5}

    def vit(width: int) -> Any:
        how = {**size, "embed_dim": width, "num_heads": width // 16}
        return timm.create_model("vit_tiny_patch16_224", **how).eval()

    own, other, pictures = vit(32), vit(64), torch.randn(24, 3, 16, 16)
    with torch.no_grad():
        found = Probe(own, find_chain(own), pictures[:4]).parts(1).whole[part]
    plan = Plan((), (dataclasses.replace(found, kept=found.size // 2),))
    assert blockfit.compress(own, pictures, plan=plan).plan == plan
    with pytest.raises(blockfit.BlockfitError, match=f"the plan narrows {part} of .* same arch"):
        blockfit.compress(other, pictures, plan=plan)


@pytest.mark.parametrize(
    ("budget", "cuts"), [("flops", "mlp"), ("params", "blocks,mlp"), ("points", "blocks,keys")]
)
def test_a_size_that_nothing_has_is_refused_before_effects_are_measured(
    model: Any, images: Any, budget: str, cuts: str, tmp_path: Path, monkeypatch: Any
) -> None:
    def measured(*args: Any, **how: Any) -> Any:
        raise AssertionError("effects are measured")

    monkeypatch.setattr("blockfit.search.cuts.curves", measured)
    how: dict[str, Any] = {budget: [0.0005] if budget == "points" else 0.01, "cuts": cuts}
    how |= {"protect": [0, 1, 2]} if budget == "params" else {}
    run = partial(sweep, folder=tmp_path / "s") if budget == "points" else blockfit.compress
    with pytest.raises(blockfit.BlockfitError, match=r"more than .* remains"):
        run(model, images, **how)


def test_an_impossible_budget_is_refused_with_what_remains(images: Any, model: Any) -> None:
    with pytest.raises(blockfit.BlockfitError, match=r"cannot be reached.*% remains"):
        blockfit.compress(model, images, params=0.01, cuts="keys")
    with pytest.raises(blockfit.BlockfitError, match=r"or give less than multiple_of=1000$"):
        blockfit.compress(model, images, params=0.7, cuts="mlp", multiple_of=1000)


def test_a_budget_of_loss_goes_as_far_as_its_bound_allows(model: Any, images: Any) -> None:
    many = blockfit.images("digits", model, limit=48, seed=0)
    small = blockfit.compress(model, many, max_kl=0.01)
    assert small.plan.narrowings
    assert small.report["judged"]["bound"] <= 0.01
    assert part_of(small, "parameters") < 0.9


def test_latency_is_bought_by_what_saves_time_when_it_is_measured(
    model: Any, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock by which only MLPs take time, only MLPs and blocks go."""
    from blockfit.search.session import Session

    def ratio(self: Session, solution: Any) -> float:
        cuts = [c for c in solution.plan.narrowings if c.part == "mlp"]
        gone = sum(1 - c.kept / c.size for c in cuts) + len(solution.plan.removed_blocks)
        return 1 - gone / 12

    monkeypatch.setattr(Session, "latency_ratio", ratio)
    small = blockfit.compress(model, images, latency=0.8)
    assert {cut.part for cut in small.plan.narrowings} == {"mlp"}
    assert sum(1 - c.kept / c.size for c in small.plan.narrowings) >= 0.2 * 12 - 1e-9


@pytest.mark.parametrize("power", [0.7, 1.5])
def test_a_budget_of_latency_is_used_up_where_parts_save_other_than_they_add_up(
    power: float, model: Any, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that is faster than it need be has lost more than it need have."""
    from blockfit.search.session import Session

    def ratio(self: Session, solution: Any) -> float:
        gone = sum(1 - c.kept / c.size for c in solution.plan.narrowings)
        return 1 - (gone / 36) ** power

    monkeypatch.setattr(Session, "latency_ratio", ratio)
    small = blockfit.compress(model, images, latency=0.7, cuts="mlp,values,keys")
    assert 0.66 <= ratio(None, small) <= 0.7


def clock(monkeypatch: pytest.MonkeyPatch, told: Callable[[int, float], float]) -> None:
    """Latency is what ``told`` makes of how often it was asked for and what part is gone."""
    from blockfit.search.session import Session

    times = itertools.count(1)

    def ratio(self: Session, solution: Any) -> float:
        gone = sum(1 - c.kept / c.size for c in solution.plan.narrowings) / 36
        return told(next(times), gone)

    monkeypatch.setattr(Session, "latency_ratio", ratio)


def test_one_slow_time_does_not_end_a_budget_of_latency(
    model: Any, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside another program a plan may be timed at twice its time: less is then asked for."""
    clock(monkeypatch, lambda time, gone: 1 - gone + (time == 4))  # three prices come first
    small = blockfit.compress(model, images, latency=0.7, cuts="mlp,values,keys")
    assert sum(1 - c.kept / c.size for c in small.plan.narrowings) >= 0.3 * 36 - 1e-9


def test_a_latency_out_of_reach_is_told_by_the_number_that_was_asked_for(
    model: Any, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock(monkeypatch, lambda time, _: 0.6 if time < 4 else 1.7 + time / 100)
    with pytest.raises(blockfit.BlockfitError, match=r"latency 70\.0% cannot be .* takes 174\.0%"):
        blockfit.compress(model, images, latency=0.7, cuts="mlp,values,keys")


def test_a_model_without_parts_loses_blocks_instead() -> None:
    """``nn.MultiheadAttention`` and an MLP after a norm: nothing can be narrowed by probing."""
    small = blockfit.compress(small_vit(4), small_images(24), params=0.8, cuts=("blocks", "keys"))
    assert small.plan.replacements


def test_a_sweep_gets_smaller_and_loses_more_point_by_point(folder: Path) -> None:
    frontier = read_sweep(folder)
    assert [point["share"] for point in frontier.points] == list(POINTS)
    parameters = [point["parameters"] for point in frontier.points]
    assert parameters == sorted(parameters, reverse=True)
    losses = [frontier.best(Budget("params", share)).held_out.loss for share in POINTS]
    assert losses == sorted(losses)


def test_a_model_from_a_sweep_is_the_one_that_compress_makes(
    folder: Path, model: Any, images: Any, small: blockfit.Result
) -> None:
    made = from_sweep(folder, Budget("params", 0.7), model)
    assert made.plan == small.plan
    x = next(iter(images))
    with torch.no_grad():
        assert torch.equal(made.model(x), small.model(x))
    assert from_sweep(folder, Budget("params", 0.72), model).plan == small.plan


def test_with_images_a_sweep_meets_any_budget_by_its_own_curves(
    folder: Path, model: Any, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its points too; what comes out is what ``compress`` makes of the same images."""
    expected = blockfit.compress(model, images, params=0.613)

    def never(*given: Any, **more: Any) -> None:
        raise AssertionError("curves that are known are not measured again")

    monkeypatch.setattr("blockfit.search.cuts.curves", never)
    made = read_sweep(folder).compress(params="61.3%", model=model, images=images)
    assert made.plan == expected.plan
    assert 0.608 <= part_of(made, "parameters") <= 0.613
    assert made.report["sweep"] == str(folder)
    x = next(iter(images))
    with torch.no_grad():
        assert torch.equal(made.model(x), expected.model(x))
    gentle = blockfit.from_sweep(folder, flops=0.81, model=model, images=images, final=8)
    assert 0.8 <= part_of(gentle, "flops") <= 0.81
    assert gentle.report["final"]["images"] == 8


def test_what_needs_images_is_refused_without_them(folder: Path, model: Any) -> None:
    with pytest.raises(blockfit.BlockfitError, match="final= has no use without images="):
        blockfit.from_sweep(folder, params=0.7, model=model, final=8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda search: search.pop("spans"), "are damaged"),
        (lambda search: search.update(spans=[[[], "x"]]), "are damaged"),
        (lambda search: search["curves"][0]["whole"].update(size=7, kept=7), "of another model"),
        (lambda search: search["curves"][0].update(unit="x"), "unit"),
    ],
)
def test_damaged_curves_are_refused(
    folder: Path, model: Any, images: Any, tmp_path: Path, change: Any, message: str
) -> None:
    data = json.loads((folder / MARK).read_text())
    change(data["search"])
    (tmp_path / MARK).write_text(json.dumps(data))
    with pytest.raises(blockfit.BlockfitError, match=message):
        blockfit.from_sweep(tmp_path, params=0.65, model=model, images=images, final=0)


def test_blocks_to_remove_are_refused_by_a_sweep_of_cuts(folder: Path, model: Any) -> None:
    with pytest.raises(blockfit.BlockfitError, match="cuts='blocks'"):
        from_sweep(folder, Budget("remove", 2), model)


def test_a_stopped_sweep_goes_on_from_its_curves_to_the_same_bits(
    folder: Path, model: Any, images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, point = tmp_path / "sweep", CutSearch.point

    def stops(self: CutSearch, *given: Any) -> Any:
        if (target / MARK).exists():
            raise KeyboardInterrupt
        return point(self, *given)

    monkeypatch.setattr(CutSearch, "point", stops)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, images, target, points=POINTS)
    assert len(read_sweep(target).points) == 1
    monkeypatch.setattr(CutSearch, "point", point)

    def never(*given: Any, **more: Any) -> None:
        raise AssertionError("curves that are known are not measured again")

    monkeypatch.setattr("blockfit.search.cuts.curves", never)
    sweep(model, images, target, points=POINTS)
    for file in [point["file"] for point in read_sweep(folder).points]:
        assert (target / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("share", 1.5, "share must be between 0 and 1"), ("plan", [{"part": "mlp"}], "is missing")],
)
def test_a_damaged_sweep_of_cuts_is_refused(
    folder: Path, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    data = json.loads((folder / MARK).read_text())
    data["points"][0][key] = value
    (tmp_path / MARK).write_text(json.dumps(data))
    with pytest.raises(blockfit.BlockfitError, match=message):
        read_sweep(tmp_path)


def test_parts_are_named_as_the_option_names_them() -> None:
    assert set(blockfit.RECIPES["default"].cuts) == {"blocks", *PARTS}
    assert isinstance(Frontier, type)
