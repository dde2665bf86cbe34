"""Images that decide nothing: how they are set apart, and the figures that they give."""

import pytest
import torch
from small import CLASSES, small_blocks, small_pictures, small_vit

import blockfit
from blockfit.data.images import images
from blockfit.errors import BlockfitError
from blockfit.fit.plan import Plan
from blockfit.search.final import FINAL_IMAGES, final_figures, set_apart
from blockfit.search.solve import solve
from blockfit.search.states import TracedImages


def numbers(part):
    return set() if part is None else set(part.positions.tolist())


def many(count, limit=None, seed=0):
    return images(torch.zeros(count, 1, 2, 2), limit=limit, seed=seed)


@pytest.mark.parametrize("judging", [False, True])
@pytest.mark.parametrize(
    ("count", "limit"), [(10_000, 512), (700, 512), (512, "all"), (40, None), (12, 10)]
)
def test_no_image_is_in_two_parts(count, limit, judging):
    parts = set_apart(many(count, limit), judging=judging)
    groups = [numbers(part) for part in (parts.calibration, parts.judge, parts.final)]
    assert sum(map(len, groups)) == len(set().union(*groups)) <= count
    assert bool(groups[1]) == judging
    assert groups[2]


@pytest.mark.parametrize(
    ("count", "limit", "judging", "sizes"),
    [
        (10_000, 512, False, (512, 0, FINAL_IMAGES)),
        (10_000, 512, True, (512, 8488, FINAL_IMAGES)),
        (10_000, 64, False, (64, 0, 128)),  # few calibrate: no long final figures
        (1_400, 512, True, (512, 592, 296)),  # beyond: a third, and two thirds
        (512, None, False, (410, 0, 102)),  # nothing beyond: a fifth
        (512, None, True, (308, 102, 102)),
        (520, 512, False, (416, 0, 104)),  # next to nothing beyond: a fifth of all
        (9, None, False, (8, 0, 1)),  # no more than a calibration can spare
        (8, None, False, (8, 0, 0)),
    ],
)
def test_what_was_left_is_used_and_a_fifth_where_nothing_was(count, limit, judging, sizes):
    parts = set_apart(many(count, limit), judging=judging)
    found = (len(numbers(p)) for p in (parts.calibration, parts.judge, parts.final))
    assert tuple(found) == sizes


def test_the_parts_are_drawn_with_the_seed_over_the_whole_set():
    one, same, other = (set_apart(many(3_000, 100, seed)) for seed in (1, 1, 2))
    assert numbers(one.final) == numbers(same.final) != numbers(other.final)
    assert max(numbers(one.final)) > 2_000 > 500 > min(numbers(one.final))


def test_the_number_of_final_images_can_be_said():
    assert set_apart(many(100, 60), 0).final is None
    assert len(set_apart(many(100, 60), 25).final) == 25
    taken = set_apart(many(100, 90), 30)
    assert (len(taken.final), len(taken.calibration)) == (30, 70)
    with pytest.raises(BlockfitError, match="from 0 to half of the 100 that were given, got 51"):
        set_apart(many(100, 60), 51)


def test_the_figures_are_those_of_both_models_on_the_same_images():
    model, pictures = small_vit(5), small_pictures(90)
    blocks = small_blocks(model)
    plan = Plan.of(["1:3"], "affine")
    solution = solve(TracedImages.of(model, blocks, images(pictures[:40])), plan)
    small = small_vit(5)
    solution.apply(small, blocks)
    shown = pictures[40:]
    with torch.no_grad():
        before, after = model(shown).double(), small(shown).double()
    labels = before.argmax(1)
    labels[:12] = (labels[:12] + 1) % CLASSES  # the original errs on some
    data = images((shown, labels), batch_size=7)
    found = final_figures(model, solution, blocks, data)
    p, q = before.log_softmax(1), after.log_softmax(1)
    right, still = before.argmax(1) == labels, after.argmax(1) == labels
    assert (found.images, found.labelled) == (50, 50)
    assert found.kl.value == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)
    assert found.agreement.value == float((before.argmax(1) == after.argmax(1)).double().mean())
    assert found.top1_before.value == pytest.approx(float(right.double().mean())) == 38 / 50
    assert found.top1_after.value == pytest.approx(float(still.double().mean()))
    assert found.drop.value == pytest.approx(
        100 * float(right.double().mean() - still.double().mean())
    )
    assert found.drop.low < found.drop.value < found.drop.high
    assert final_figures(model, small, blocks, data) == found
    assert torch.equal(model(shown), small_vit(5)(shown))  # the original is as it was


def test_images_without_labels_or_of_other_classes_give_no_accuracy():
    model, pictures = small_vit(4), small_pictures(20)
    blocks = small_blocks(model)
    labels = torch.zeros(20, dtype=torch.int64)
    for data in (images(pictures), images((pictures, labels + CLASSES))):
        found = final_figures(model, model, blocks, data)
        assert found.top1_before is found.top1_after is found.drop is None
        assert (found.agreement.value, found.kl.value) == (1.0, 0.0)
    labels[5:] = -1  # not known
    found = final_figures(model, model, blocks, images((pictures, labels)))
    assert (found.labelled, found.images, found.drop.value) == (5, 20, 0.0)


def test_outputs_that_are_not_finite_are_refused():
    model = small_vit(4)
    broken = small_vit(4)
    with torch.no_grad():
        broken.head.bias[0] = torch.nan
    with pytest.raises(BlockfitError, match="output of the model 'compressed' holds NaN"):
        final_figures(model, broken, small_blocks(model), images(small_pictures(4)))


def test_a_run_reports_them_beside_the_held_out_ones():
    model = small_vit(4)
    labels = torch.arange(120) % CLASSES
    data = images((small_pictures(120), labels), limit=48)
    result = blockfit.compress(model, data, spans=["1:2"])
    final, calibration = result.report["final"], result.report["calibration"]
    assert (final["images"], calibration["fit"], calibration["held_out"]) == (72, 38, 10)
    beyond = images((small_pictures(120), labels)).between(0, 120)
    rest = [i for i in range(120) if i not in set(data.positions.tolist())]
    with torch.no_grad():
        shown = torch.stack([small_pictures(120)[i] for i in rest])
        same = model(shown).argmax(1) == result.model(shown).argmax(1)
    assert final["agreement"]["value"] == float(same.double().mean())
    assert "beyond the calibration images" in final["source"]
    assert len(beyond) == 120
    none = blockfit.compress(model, data, spans=["1:2"], final=0).report
    assert (none["final"], none["calibration"]["final"]) == (None, 0)
