"""The judge: a candidate's score is what applying it to the model would give."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, one_thread  # noqa: F401
from small import SmallViT, small_blocks, small_images, small_pictures, small_vit
from torch import Tensor, nn

from blockfit.data.images import images as open_images
from blockfit.data.labels import Matching
from blockfit.errors import BlockfitError
from blockfit.fit.maps import empty_map
from blockfit.fit.plan import Plan, Replacement, Span
from blockfit.models.blocks import Blocks, find_chain, record
from blockfit.models.head import observe
from blockfit.search.fidelity import Fidelity, FidelityMeter
from blockfit.search.held_out import HeldOut
from blockfit.search.solve import Options, Solution, solve
from blockfit.search.states import TracedImages

FIT, NEW = small_pictures(24), small_pictures(20, seed=1)


def applied(model: nn.Module, blocks: Blocks, solution: Solution) -> Any:
    small = copy.deepcopy(model)
    solution.apply(small, blocks)
    return small


def really(model: nn.Module, blocks: Blocks, solution: Solution, images: Tensor) -> Fidelity:
    """The fidelity of a copy of the model that was compressed and run."""
    meter = FidelityMeter()
    small = applied(model, blocks, solution)
    for pair in images.split(2):
        meter.add(observe(model, blocks, pair), observe(small, blocks, pair))
    return meter.result()


def assert_alike(got: Fidelity, expected: Fidelity) -> None:
    assert (got.images, got.kl is None) == (expected.images, expected.kl is None)
    names = ["feature_cosine", "feature_relative_error"]
    for name in names if got.kl is None else [*names, "kl", "agreement"]:
        assert getattr(got, name) == pytest.approx(getattr(expected, name), rel=1e-3, abs=1e-5)


def random_solution(plan: Plan, blocks: Blocks) -> Solution:
    maps = [empty_map(entry, blocks.width, blocks.prefix_tokens) for entry in plan]
    for parameter in (p for module in maps for p in module.parameters()):
        parameter.data += 0.2 * torch.randn_like(parameter)
    return Solution(plan, tuple(maps))


PLANS = {
    "the first block": Plan.of(["0:1"], "affine"),
    "the last blocks": Plan.of(["2:4"], "scale"),
    "two spans": Plan(
        (Replacement(Span(1, 2), "identity"), Replacement(Span(3, 4), "low-rank", rank=3))
    ),
    "nothing": Plan(),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_score_is_the_fidelity_of_the_applied_model(name: str) -> None:
    family: Family = FAMILIES[name]
    model, images = family.build(), family.images(8)
    blocks = find_chain(model)
    known = TracedImages.of(model, blocks, open_images(images[:4], batch_size=4))
    held_out = HeldOut(
        TracedImages.everywhere(model, blocks, open_images(images[4:], batch_size=2))
    )
    solutions = [random_solution(plan, blocks) for plan in PLANS.values()]
    solutions.append(solve(known, Plan.of(["1:2"], "affine"), Options(ridge=0.1)))
    for solution in solutions:
        assert_alike(held_out.score(solution), really(model, blocks, solution, images[4:]))
    assert held_out.score(Solution(Plan(), ())).feature_relative_error < 1e-6


@pytest.mark.parametrize("kind", ["folded", "affine", "orthogonal", "identity"])
@pytest.mark.parametrize("repair", ["none", "mlp+attention"])
def test_folded_and_repaired_solutions_are_judged_as_they_are_used(kind: str, repair: str) -> None:
    model = small_vit()
    blocks = small_blocks(model)
    known = TracedImages.of(model, blocks, open_images(FIT, batch_size=8))
    held_out = HeldOut(TracedImages.everywhere(model, blocks, open_images(NEW, batch_size=8)))
    solution = solve(known, Plan.of(["2:3", "4:6"], kind), Options(repair=repair))
    assert_alike(held_out.score(solution), really(model, blocks, solution, NEW))


def runs(model: SmallViT) -> list[int]:
    """How often each block's attention was called, from now on."""
    count = [0] * len(model.blocks)
    for index, block in enumerate(model.blocks):

        def counted(module: nn.Module, args: object, index: int = index) -> None:
            count[index] += 1

        block.attention.register_forward_pre_hook(counted)
    return count


@pytest.mark.parametrize(
    ("plan", "run"),
    [
        (Plan.of(["0:2"], "affine"), [2, 3, 4, 5]),
        (Plan.of(["3:4"], "affine"), [4, 5]),
        (Plan.of(["5:6"], "affine"), []),
        (Plan.of(["1:2", "4:6"], "affine"), [2, 3]),
        (Plan.of(["3:5"], "folded"), [2, 5]),
    ],
    ids=str,
)
def test_only_blocks_behind_the_first_span_are_run(plan: Plan, run: list[int]) -> None:
    model = small_vit()
    blocks = small_blocks(model)
    solution = solve(TracedImages.of(model, blocks, open_images(FIT)), plan, Options(repair="none"))
    held_out = HeldOut(
        TracedImages.everywhere(model, blocks, open_images(NEW, batch_size=len(NEW)))
    )
    count = runs(model)
    held_out.score(solution)
    assert [index for index, times in enumerate(count) if times] == run
    assert max(count, default=0) <= 1
    assert held_out.cost(solution) == pytest.approx(len(run) / 6)
    assert held_out.passes == pytest.approx(len(NEW) * len(run) / 6)


def test_parts_of_the_images_add_up_to_all() -> None:
    model = small_vit()
    blocks = small_blocks(model)
    held_out = HeldOut(TracedImages.everywhere(model, blocks, open_images(NEW, batch_size=8)))
    assert len(held_out) == len(NEW)
    solution = random_solution(Plan.of(["2:4"], "affine"), blocks)
    parts = [held_out.score(solution, [number]) for number in range(3)]
    assert [part.images for part in parts] == [8, 8, 4]
    mean = sum(part.loss * part.images for part in parts) / len(NEW)
    assert held_out.score(solution).loss == pytest.approx(mean)
    assert held_out.score(solution, [0, 2]).images == 12


def test_accuracy_is_that_of_the_applied_model_on_labelled_images() -> None:
    model = small_vit()
    blocks = small_blocks(model)
    labels = model(NEW).argmax(1)
    labels[:5] = (labels[:5] + 1) % 4
    solution = random_solution(Plan.of(["1:4"], "affine"), blocks)
    held_out = HeldOut(
        TracedImages.everywhere(model, blocks, open_images((NEW, labels.numpy()), batch_size=8))
    )
    assert held_out.top1 == pytest.approx(15 / 20)
    right = applied(model, blocks, solution)(NEW).argmax(1) == labels
    assert held_out.judge(solution)[2] == pytest.approx(float(right.float().mean()))
    unlabelled = HeldOut(TracedImages.everywhere(model, blocks, open_images(NEW, batch_size=8)))
    assert (unlabelled.top1, unlabelled.judge(solution)[2]) == (None, None)


@torch.no_grad()
def test_accuracy_counts_labelled_images_and_only_labels_of_the_heads_classes() -> None:
    model = small_vit()
    blocks = small_blocks(model)
    solution = random_solution(Plan.of(["1:4"], "affine"), blocks)
    labels = model(NEW).argmax(1)
    labels[0], labels[1] = (labels[0] + 1) % 4, -1
    half_labelled = HeldOut(
        TracedImages.everywhere(model, blocks, open_images((NEW, labels.numpy()), batch_size=8))
    )
    assert half_labelled.top1 == pytest.approx(18 / 19)
    labels[2] = 4  # no class of the head: this one is not counted either
    one_outside = HeldOut(
        TracedImages.everywhere(model, blocks, open_images((NEW, labels.numpy()), batch_size=8))
    )
    assert one_outside.top1 == pytest.approx(17 / 18)
    others = HeldOut(
        TracedImages.everywhere(model, blocks, open_images((NEW, labels.numpy() + 4), batch_size=8))
    )
    assert (others.top1, others.judge(solution)[2]) == (None, None)
    names = Matching(names=["a", "b", "c"], own=["a", "b", "c"])
    three = replace(open_images((NEW, labels.numpy() % 3)), matching=names)
    assert HeldOut(TracedImages.everywhere(model, blocks, three)).top1 is None


@torch.no_grad()
def test_a_folded_maps_error_stands_beside_that_of_dropping_the_span() -> None:
    model = small_vit()
    blocks = small_blocks(model)
    plan = Plan.of(["3:5"], "folded")
    solution = solve(TracedImages.of(model, blocks, open_images(FIT)), plan, Options(repair="none"))
    (error,) = HeldOut(
        TracedImages.everywhere(model, blocks, open_images(NEW, batch_size=len(NEW)))
    ).judge(solution)[1]
    with record(model, blocks) as seen:
        model(NEW)
    small = applied(model, blocks, solution)
    with record(small, blocks) as after:
        small(NEW)
    target = seen[5].double()
    size = float((target - target.mean(dim=(0, 1))).square().sum())
    dropped = float((seen[3] - target).square().sum()) / size
    assert error.identity_error == pytest.approx(dropped, rel=1e-3)
    mapped = float((after[5] - target).square().sum()) / size
    assert error.error == pytest.approx(mapped, rel=1e-3)
    assert error.error < error.identity_error


def test_map_errors_are_those_of_the_applied_models_states_beside_identity() -> None:
    model = small_vit()
    blocks = small_blocks(model)
    plan = Plan.of(["1:2", "3:5"], "affine")
    solution = solve(TracedImages.of(model, blocks, open_images(FIT)), plan, Options(repair="mlp"))
    held_out = HeldOut(
        TracedImages.everywhere(model, blocks, open_images(NEW, batch_size=len(NEW)))
    )
    errors = held_out.judge(solution)[1]
    with record(model, blocks) as seen:
        model(NEW)
    small = applied(model, blocks, solution)
    with record(small, blocks) as after:
        small(NEW)
    assert [(error.span, error.map) for error in errors] == [("1:2", "affine"), ("3:5", "affine")]
    for error, span in zip(errors, plan.spans, strict=True):
        target = seen[span.stop].double()
        spread = target - target.mean(dim=(0, 1))
        gap, dropped = after[span.stop] - target, after[span.start] - target
        for tokens, of_map, of_identity in (
            (slice(None), error.error, error.identity_error),
            (slice(0, 1), error.prefix, error.identity_prefix),
            (slice(1, None), error.patch, error.identity_patch),
        ):
            size = float(spread[:, tokens].square().sum())
            assert of_map == pytest.approx(float(gap[:, tokens].square().sum()) / size, rel=1e-3)
            wanted = float(dropped[:, tokens].square().sum()) / size
            assert of_identity == pytest.approx(wanted, rel=1e-3)


def test_a_model_without_prefix_tokens_has_no_error_of_them() -> None:
    family = FAMILIES["plain-no-prefix"]
    model, images = family.build(), family.images(4)
    blocks = find_chain(model)
    held_out = HeldOut(TracedImages.everywhere(model, blocks, open_images(images)))
    (error,) = held_out.judge(random_solution(Plan.of(["1:2"], "affine"), blocks))[1]
    assert (error.prefix, error.identity_prefix) == (None, None)
    assert error.patch == pytest.approx(error.error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_judging_changes_neither_model_nor_solution(dtype: torch.dtype) -> None:
    model = small_vit().to(dtype).train()
    blocks = find_chain(model, NEW[:2].to(dtype))
    known = TracedImages.of(model, blocks, open_images(FIT.to(dtype)))
    held_out = HeldOut(
        TracedImages.everywhere(model, blocks, open_images(NEW.to(dtype), batch_size=8))
    )
    solution = solve(known, Plan.of(["1:2", "3:5"], "affine"))
    before = copy.deepcopy(model.state_dict())
    maps = copy.deepcopy([module.state_dict() for module in solution.maps])
    cached = [
        {b: state.clone() for b, state in seen.states.items()} for seen in held_out.images.traces
    ]
    first = held_out.score(solution)
    held_out.judge(solution)
    assert held_out.score(solution) == first
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for module, kept in zip(solution.maps, maps, strict=True):
        for name, value in module.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, kept[name])
    for seen, kept_states in zip(held_out.images.traces, cached, strict=True):
        assert all(torch.equal(seen.states[b], state) for b, state in kept_states.items())
    assert model.training
    assert not any("forward" in vars(block) for block in model.blocks)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_there_must_be_images_to_judge_by() -> None:
    model = small_vit()
    with pytest.raises(BlockfitError, match="no held-out images to judge by"):
        HeldOut(TracedImages.everywhere(model, small_blocks(model), small_images(4).take(0)))
    spoilt = NEW.clone()
    spoilt[3] = float("nan")
    with pytest.raises(BlockfitError, match="the input of block 0 holds NaN"):
        HeldOut(
            TracedImages.everywhere(model, small_blocks(model), open_images(spoilt, batch_size=8))
        )
