"""Budgets of loss: decided by bounds, on as many images as it takes, refused where too few are."""

import numpy as np
import pytest
import torch
from scipy import stats
from small import CLASSES, small_blocks, small_pictures, small_vit

import blockfit
from blockfit.data.images import images
from blockfit.errors import BlockfitError
from blockfit.fit import intervals
from blockfit.fit.plan import Plan
from blockfit.search import loss_budget
from blockfit.search.budget import Budget
from blockfit.search.final import COLUMNS, Outcomes, set_apart
from blockfit.search.loss_budget import (
    FIRST_LOOK,
    Judge,
    Judged,
    Verdict,
    check_images,
    furthest,
    rounded_up,
)
from blockfit.search.solve import Solution


@pytest.mark.parametrize("count", [1, 2, 5, 10, 56])
def test_the_furthest_size_is_found_with_few_tries(count):
    for limit in range(count + 1):
        solved = []

        def solve(size, solved=solved):
            solved.append(size)
            return -size

        def judge(plan, limit=limit):
            return Verdict(-plan < limit, 0.0, 0.0, 1, 0.95)

        found = furthest(range(count), solve, judge)
        assert found.size == (limit - 1 if limit else None)
        assert found.solved == (1 - limit if limit else None)
        assert len(solved) == len(set(solved)) <= 2 * (limit + 2).bit_length()
        assert set(found.verdicts) == set(solved)


def test_sizes_may_be_parts_that_remain():
    parts = [0.95, 0.9, 0.85, 0.8, 0.75]
    found = furthest(parts, lambda part: part, lambda part: Verdict(part > 0.78, 0, 0, 1, 0.95))
    assert found.size == 0.8


@pytest.mark.parametrize(
    ("budget", "count", "limit", "message"),
    [
        # case 23: 192 labelled images cannot show half a point
        (
            ("max_drop", 0.5),
            192,
            None,
            r"at least 598 labelled images .* of the 192 .* 38 are left",
        ),
        (
            ("max_drop", 1.0),
            512,
            None,
            r"at least 299 labelled images .* of the 512 .* 102 are left",
        ),
        (("max_drop", 1.0), 700, 512, r"at least 299 .* give 970 or more"),
        (("max_kl", 0.1), 40, None, r"max_kl 0\.1 takes at least 10 images"),
        (("max_drop", 0.0), 10_000, 512, "cannot be shown on any number of images"),
        (("max_kl", 0.0), 10_000, 512, "cannot be shown on any number of images"),
    ],
)
def test_a_budget_that_the_images_cannot_decide_is_refused(budget, count, limit, message):
    parts = set_apart(images(torch.zeros(count, 1, 2, 2), limit=limit), judging=True)
    with pytest.raises(BlockfitError, match=message):
        check_images(Budget(*budget), parts)
    check_images(Budget(*budget), parts, force=True)


@pytest.mark.parametrize("points", [0.2, 0.5, 1.0, 5.0])
def test_as_many_images_as_a_refusal_asks_for_are_enough(points):
    budget = Budget("max_drop", points)
    few = set_apart(images(torch.zeros(60, 1, 2, 2), limit=40), judging=True)
    with pytest.raises(BlockfitError) as refused:
        check_images(budget, few)
    count = int(str(refused.value).split("; give ")[1].split()[0])
    check_images(budget, set_apart(images(torch.zeros(count, 1, 2, 2), limit=40), judging=True))


def table(labelled, before, after, kl):
    rows = torch.zeros(len(kl), len(COLUMNS), dtype=torch.float64)
    for name, values in (("labelled", labelled), ("before", before), ("after", after), ("kl", kl)):
        rows[:, COLUMNS.index(name)] = torch.as_tensor(values, dtype=torch.float64)
    return rows


def judge_of(budget, count, monkeypatch, rows, **how):
    """A judge whose models' answers are ``rows``; looks are written to its ``looks``."""
    model = small_vit(3)
    labels = torch.arange(count) % CLASSES
    data = images((torch.zeros(count, 3, 12, 12), labels), batch_size=4)
    judge = Judge(budget, model, small_blocks(model), data, **how)
    judge.looks = []

    def slices(model, small, blocks, part, progress, kept):
        judge.looks.append(len(part))
        return Outcomes(rows()[torch.from_numpy(part.positions)])

    monkeypatch.setattr(loss_budget, "outcomes", slices)
    return judge


NONE = Solution(Plan(), ())


@pytest.mark.parametrize(
    ("lost", "looks", "kept"),
    [
        (0, [256, 256, 512], True),  # nothing changes, but only 1,024 images show half a point
        (3, [256, 256, 512], False),  # too near: decided by all
        (30, [256], False),  # hopeless: given up at once
    ],
)
def test_a_look_ends_as_soon_as_the_bound_decides(lost, looks, kept, monkeypatch):
    count = 1024
    after = np.ones(count)
    after[np.linspace(0, count - 1, lost).astype(int)] = 0
    after[:256] = np.where(np.arange(256) < lost, 0, 1) if lost == 30 else after[:256]
    rows = table(np.ones(count), np.ones(count), after, np.zeros(count))
    judge = judge_of(Budget("max_drop", 0.4), count, monkeypatch, lambda: rows)
    verdict = judge.verdict(NONE)
    assert (judge.looks, verdict.kept) == (looks, kept)
    assert judge.decided[NONE.plan] is verdict
    assert verdict.value == pytest.approx(100 * lost / sum(looks), rel=0.5)


def test_a_plan_that_costs_nothing_is_taken_after_the_first_look(monkeypatch):
    rows = table(np.ones(2000), np.ones(2000), np.ones(2000), np.zeros(2000))
    judge = judge_of(Budget("max_drop", 5.0), 2000, monkeypatch, lambda: rows)
    verdict = judge.verdict(NONE)
    assert (judge.looks, verdict.kept, verdict.images) == ([FIRST_LOOK], True, FIRST_LOOK)
    assert verdict.confidence > 0.95


@pytest.mark.parametrize("kind", ["max_drop", "max_kl"])
def test_looking_several_times_errs_no_more_often_than_looking_once(kind, monkeypatch):
    """The true loss is the budget itself: at most one in twenty may be taken."""
    rng, count, trials = np.random.default_rng(0), 512, 60
    monkeypatch.setattr(intervals, "RESAMPLES", 200)

    def drawn():
        lost, won = rng.random(count) < 0.08, rng.random(count) < 0.04
        before, after = np.where(won & ~lost, 0, 1), np.where(lost, 0, 1)
        return table(np.ones(count), before, after, rng.exponential(0.1, count))

    value = 100 * (0.08 - 0.04 * 0.92) if kind == "max_drop" else 0.1
    rows: list[torch.Tensor] = [drawn()]
    judge = judge_of(Budget(kind, value), count, monkeypatch, lambda: rows[0])
    taken = 0
    for _ in range(trials):
        rows[0] = drawn()
        taken += judge.verdict(NONE).kept
    assert taken <= stats.binom.ppf(0.999, trials, 0.05)
    if kind == "max_drop":
        easier = judge_of(Budget(kind, value + 8), count, monkeypatch, lambda: rows[0])
        for _ in range(10):
            rows[0] = drawn()
            assert easier.verdict(NONE).kept  # it does not simply refuse everything


def test_forced_it_goes_by_what_is_measured(monkeypatch):
    after = np.ones(300)
    after[:2] = 0
    rows = table(np.ones(300), np.ones(300), after, np.zeros(300))
    budget = Budget("max_drop", 1.0)
    assert not judge_of(budget, 300, monkeypatch, lambda: rows).verdict(NONE).kept
    judge = judge_of(budget, 300, monkeypatch, lambda: rows, force=True)
    verdict = judge.verdict(NONE)
    assert verdict.kept
    (line,) = loss_budget.beyond_bound(budget, verdict)
    assert line.startswith("max_drop 1 is kept by what 300 images say, 0.667 points, but up to 2.0")


def test_a_refusal_tells_whether_more_images_or_a_larger_budget_help():
    model = small_vit(3)
    data = images((small_pictures(8), torch.zeros(8, dtype=torch.int64)))
    judge = Judge(Budget("max_drop", 1.0), model, small_blocks(model), data)
    sure = judge.refusal("removing one block", Verdict(False, 2.5, 4.0, 400, 0.95))
    assert "removing one block costs 2.5 points already" in str(sure)
    unsure = judge.refusal("removing one block", Verdict(False, 0.5, 1.5, 400, 0.95))
    assert "up to 1.5 remain possible" in str(unsure)
    assert "takes about 1600 images" in str(unsure)  # half the width takes four times as many
    assert [rounded_up(n) for n in (7, 99.5, 1487, 25001)] == [7, 100, 1500, 26000]


def test_points_need_labels_and_nats_a_head():
    model, pictures = small_vit(3), small_pictures(8)
    with pytest.raises(BlockfitError, match="max_drop needs labelled images"):
        Judge(Budget("max_drop", 1.0), model, small_blocks(model), images(pictures))
    model.head = torch.nn.Identity()
    with pytest.raises(BlockfitError, match="max_kl needs a model with a head"):
        Judge(Budget("max_kl", 1.0), model, small_blocks(model), images(pictures))


def test_what_a_sweep_keeps_decides_as_the_judge_does():
    kl = np.random.default_rng(0).exponential(0.1, 400)
    after = np.ones(400)
    after[:8] = 0
    found = Outcomes(table(np.ones(400), np.ones(400), after, kl))
    judged = Judged.of(found, apart=True)
    for points in (1.9, 2.1, 3.6, 5.0):
        verdict = judged.verdict(Budget("max_drop", points))
        assert verdict.value == 2.0
        assert verdict.bound == pytest.approx(100 * stats.beta.ppf(0.95, 9, 392), rel=1e-6)
        assert verdict.kept == (points > 3.58)
        assert judged.verdict(Budget("max_drop", points), force=True).kept == (points >= 2)
    assert judged.verdict(Budget("max_kl", float(kl.mean()))).kept is False
    assert judged.verdict(Budget("max_kl", 0.15)).kept
    headless = Outcomes(table(np.zeros(9), np.zeros(9), np.zeros(9), np.full(9, np.nan)))
    assert Judged.of(headless, True).verdict(Budget("max_kl", 1.0)) is None
    assert Judged.of(headless, True).verdict(Budget("max_drop", 1.0)) is None


def test_a_run_takes_what_the_bound_keeps_and_says_so():
    """The blocks after the second do next to nothing: the budget lets them go, and no more."""
    model = small_vit(6)
    with torch.no_grad():
        for block in model.blocks[2:]:
            block.gamma1.mul_(1e-3), block.gamma2.mul_(1e-3)
    pictures = small_pictures(900)
    with torch.no_grad():
        labels = model(pictures).argmax(1)
    data = images((pictures, labels), limit=32)
    result = blockfit.compress(model, data, max_drop=2.0, recipe="paper")
    judged, calibration = result.report["judged"], result.report["calibration"]
    assert set(result.plan.removed_blocks) == {2, 3, 4, 5}
    assert judged["kept"]
    assert judged["bound"] <= 2.0
    assert calibration["judged"] == 900 - 32 - calibration["final"]
    assert result.report["final"]["drop"]["value"] <= 2.0
    with pytest.raises(BlockfitError, match=r"at least 1497 labelled images"):
        blockfit.compress(model, data, max_drop=0.2, recipe="paper")
