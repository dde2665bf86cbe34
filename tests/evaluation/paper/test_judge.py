"""The judge says what the compressed model itself would say, by its head and by linear probes."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import CLASSES as FAMILY_CLASSES
from families import FAMILIES
from families import one_thread as one_thread
from small import CLASSES, SmallViT, small_blocks, small_images, small_pictures, small_vit
from torch import nn

from blockfit.data.images import Images
from blockfit.data.images import images as open_images
from blockfit.data.labels import Matching
from blockfit.errors import BlockfitError
from blockfit.evaluation.evaluate import evaluate
from blockfit.evaluation.paper.judge import Judge, fitting_judge
from blockfit.evaluation.protocols import Features, linear_probe_sgd
from blockfit.fit.maps import Linear, empty_map
from blockfit.fit.plan import Plan, Replacement, Span
from blockfit.models.blocks import Blocks, find_chain
from blockfit.search.fidelity import kl_divergence
from blockfit.search.solve import Solution


def labelled(count: int, seed: int) -> Images:
    """Pictures whose label is what the small model says, one in four of them changed."""
    pictures = small_pictures(count, seed)
    with torch.no_grad():
        labels = small_vit()(pictures).argmax(1)
    labels[::4] = (labels[::4] + 1) % CLASSES
    return open_images((pictures, labels), batch_size=8)


def solution(span: str = "2:4") -> Solution:
    module = Linear(16, bias=False)
    module.weight.data += 0.1 * torch.randn(16, 16, generator=torch.Generator().manual_seed(5))
    return Solution(Plan.of([span], "linear"), (module,))


def applied(model: SmallViT) -> SmallViT:
    small = copy.deepcopy(model)
    solution().apply(small, small_blocks(small))
    return small


def features(model: SmallViT, images: Images) -> Features:
    """What reaches the head."""
    rows: list[torch.Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _, args: rows.append(args[0].detach()))
    batches = list(images.batches())
    with torch.no_grad():
        for batch in batches:
            model(batch.inputs)
    hook.remove()
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    return Features(torch.cat(rows).numpy(), labels.numpy())


def test_the_heads_verdict_is_that_of_the_applied_model() -> None:
    model, test = small_vit(), labelled(40, 1)
    judge = Judge(model, small_blocks(model), test)
    found = judge.verdicts({"a": solution()})["a"]
    pictures = torch.cat([batch.inputs for batch in test.batches()])
    labels = torch.cat([batch.labels for batch in test.batches()])
    with torch.no_grad():
        before, after = model(pictures), applied(model)(pictures)
    assert found.top1 == pytest.approx(float((after.argmax(1) == labels).float().mean()))
    assert found.kl == pytest.approx(float(kl_divergence(before, after).mean()), rel=1e-4)
    assert found.agreement == pytest.approx(
        float((before.argmax(1) == after.argmax(1)).float().mean())
    )
    whole = judge.original()
    assert whole.top1 == pytest.approx(0.75)
    assert (whole.kl, whole.agreement, whole.feature_error) == (0, 1, 0)


@pytest.mark.parametrize("kind", ["probe-fixed", "probe-new"])
def test_a_probes_verdict_is_that_of_features_of_the_applied_model(kind: str) -> None:
    model, train, test = small_vit(), labelled(64, 2), labelled(40, 1)
    judge = Judge(model, small_blocks(model), test, kind, train)
    found = judge.verdicts({"a": solution()}, seed=3)["a"]
    learnt_from = model if kind == "probe-fixed" else applied(model)
    judged_on = features(applied(model), test)
    guess = linear_probe_sgd(features(learnt_from, train), 3)(judged_on)
    assert found.top1 == pytest.approx(float(np.mean(guess == judged_on.labels)))
    own = features(model, test)
    expected = linear_probe_sgd(features(model, train), 3)(own)
    assert judge.original(3).top1 == pytest.approx(float(np.mean(expected == own.labels)))


@pytest.mark.parametrize("kind", ["head", "probe-fixed", "probe-new"])
def test_little_memory_changes_no_verdict(kind: str) -> None:
    model, train, test = small_vit(), labelled(32, 2), labelled(24, 1)
    solutions = {"a": solution(), "b": solution("3:5")}
    blocks = small_blocks(model)
    much = Judge(model, blocks, test, kind, train)
    little = Judge(model, blocks, test, kind, train, most_bytes=1)
    for _ in range(2):  # the second time from what was kept, and from running anew
        assert much.verdicts(solutions) == little.verdicts(solutions)
    assert much._test._kept is not None
    assert little._test._kept is None


def test_the_judge_leaves_the_model_as_it_was() -> None:
    model = small_vit().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Judge(model, small_blocks(model), labelled(8, 1)).verdicts({"a": solution()})
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_what_cannot_be_judged_is_refused() -> None:
    model = small_vit()
    blocks = small_blocks(model)
    with pytest.raises(BlockfitError, match="choose one of head"):
        Judge(model, blocks, labelled(8, 1), "vote")
    with pytest.raises(BlockfitError, match="images to learn from"):
        Judge(model, blocks, labelled(8, 1), "probe-new")
    unlabelled = open_images(small_pictures(8), batch_size=8)
    with pytest.raises(BlockfitError, match="no images with a label"):
        Judge(model, blocks, unlabelled).original()
    bare = small_vit()
    bare.head = nn.Identity()
    with pytest.raises(BlockfitError, match="no head of its own"):
        Judge(bare, small_blocks(bare), labelled(8, 1)).original()


def test_a_head_judges_only_where_it_has_the_images_classes() -> None:
    model, example = small_vit(), small_pictures(2)
    blocks = small_blocks(model)
    data = small_images(2)
    for names, kind in ((["a", "b", "c", "d"], "head"), (None, "head"), (["a", "b"], "probe-new")):
        named = replace(data, matching=Matching(names=names, own=names))
        assert fitting_judge(model, blocks, example, named) == kind
    none = replace(data, matching=Matching("nothing", ["a", "b", "c", "d"], {}))
    assert fitting_judge(model, blocks, example, none) == "probe-new"
    model.head = nn.Identity()
    assert fitting_judge(model, blocks, example, data) == "probe-new"


PLANS = {
    "nothing": Plan(),
    "first": Plan.of(["0:1"], "affine"),
    "middle": Plan.of(["1:3"], "linear"),
    "last": Plan.of(["3:4"], "identity"),
    "two": Plan((Replacement(Span(1, 2), "affine"), Replacement(Span(3, 4), "identity"))),
    "all but one": Plan.of(["0:2", "3:4"], "affine"),
}


def solution_of(plan: Plan, blocks: Blocks) -> Solution:
    """Random maps near the identity."""
    maps = [empty_map(entry, blocks.width, blocks.prefix_tokens) for entry in plan]
    for parameter in (p for m in maps for p in m.parameters()):
        parameter.data += 0.05 * torch.randn_like(parameter)
    return Solution(plan, tuple(maps))


def some(name: str, count: int = 10) -> Images:
    pictures = FAMILIES[name].images(count, seed=5)
    return open_images((pictures, torch.randint(FAMILY_CLASSES, (count,))), batch_size=4)


@pytest.mark.parametrize("name", ["dinov2-classifier", "plain-in-place", "plain-tuple", "timm-vit"])
def test_many_verdicts_in_one_pass_equal_each_model_on_its_own(name: str) -> None:
    model = FAMILIES[name].build()
    blocks = find_chain(model, FAMILIES[name].images())
    solutions = {key: solution_of(plan, blocks) for key, plan in PLANS.items()}
    if name == "plain-in-place":
        weight = model.get_parameter("transformer.3.norm1.weight")
        repaired = {"transformer.3.norm1.weight": 1.5 * weight.data}
        middle = solutions["middle"]
        solutions["repaired"] = Solution(middle.plan, middle.maps, repaired)
    data, told = some(name), list[tuple[int, int]]()
    judge = Judge(model, blocks, data, progress=lambda *now: told.append(now))
    verdicts = judge.verdicts(solutions)
    assert told[-1] == (10, 10)
    assert list(verdicts) == list(solutions)
    for key, solution in solutions.items():
        compressed = copy.deepcopy(model)
        solution.apply(compressed, blocks)
        alone = evaluate(compressed, data, against=model, blocks=blocks, measure=False)
        found, fidelity = verdicts[key], alone.fidelity
        assert fidelity is not None
        assert found.top1 == alone.compressed.top1
        assert (found.kl, found.agreement, found.feature_error) == pytest.approx(
            (fidelity.kl, fidelity.agreement, fidelity.feature_relative_error), rel=1e-4, abs=1e-9
        )
    assert verdicts["nothing"].feature_error == 0
    assert verdicts["first"].feature_error > 1e-3


def test_many_verdicts_run_only_the_blocks_that_solutions_change() -> None:
    """One pass for all: the stem runs per solution, a block only behind the first change."""
    model: Any = FAMILIES["plain"].build()
    blocks = find_chain(model, FAMILIES["plain"].images())
    ran = [0] * blocks.depth
    for index, block in enumerate(model.transformer):
        block.attention.register_forward_hook(
            lambda *_, index=index: ran.__setitem__(index, ran[index] + 1)
        )
    solutions = {
        "late": solution_of(Plan.of(["2:3"], "affine"), blocks),
        "later": solution_of(Plan.of(["3:4"], "affine"), blocks),
    }
    Judge(model, blocks, some("plain", count=4)).verdicts(solutions)
    assert ran == [1, 1, 1, 2]
