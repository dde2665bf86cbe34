"""Figures of an evaluation, against the same figures worked out by hand."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from families import CLASSES, FAMILIES
from torch import Tensor, nn
from torch.nn import functional as F

from blockfit.data.images import Images, images
from blockfit.errors import BlockfitError
from blockfit.evaluation import summaries
from blockfit.evaluation.evaluate import evaluate
from blockfit.evaluation.summaries import evaluation
from blockfit.fit.maps import empty_map
from blockfit.fit.plan import Plan, Replacement, Span
from blockfit.models.blocks import Blocks, find_chain
from blockfit.models.cost import flops, parameters, size_bytes
from blockfit.search.fidelity import Fidelity
from blockfit.search.solve import Solution
from blockfit.summary import Table

PLAN = Plan((Replacement(Span(1, 2), "affine"), Replacement(Span(3, 4), "identity")))


def solution_of(plan: Plan, blocks: Blocks) -> Solution:
    """Random maps near the identity."""
    maps = [empty_map(entry, blocks.width, blocks.prefix_tokens) for entry in plan]
    for parameter in (p for m in maps for p in m.parameters()):
        parameter.data += 0.05 * torch.randn_like(parameter)
    return Solution(plan, tuple(maps))


def pair(name: str, plan: Plan = PLAN) -> tuple[Any, Any, Blocks, Solution]:
    """An original, what a solution makes of it, its blocks, and the solution."""
    original = FAMILIES[name].build()
    blocks = find_chain(original, FAMILIES[name].images())
    solution = solution_of(plan, blocks)
    compressed = copy.deepcopy(original)
    solution.apply(compressed, blocks)
    return original, compressed, blocks, solution


def some(name: str, labelled: bool = True, count: int = 10) -> Images:
    pictures = FAMILIES[name].images(count, seed=5)
    labels = torch.randint(CLASSES, (count,))
    return images((pictures, labels) if labelled else pictures, batch_size=4)


def everything(data: Images) -> tuple[Tensor, Tensor]:
    batches = list(data.batches())
    return (
        torch.cat([b.inputs for b in batches]),  # type: ignore[misc]
        torch.cat([b.labels for b in batches]),  # type: ignore[misc]
    )


def by_hand(original: Any, compressed: Any, data: Images) -> dict[str, float]:
    """The figures from two plain forward passes; the head of these models is ``head``."""
    pictures, labels = everything(data)
    seen: dict[str, list[Tensor]] = {"original": [], "compressed": []}
    for name, model in (("original", original), ("compressed", compressed)):
        handle = model.head.register_forward_hook(
            lambda m, args, out, name=name: seen[name].extend([args[0].double(), out.double()])
        )
        with torch.no_grad():
            model(pictures)
        handle.remove()
    (f, before), (g, after) = seen["original"], seen["compressed"]
    return {
        "top1 original": (before.argmax(1) == labels).double().mean().item(),
        "top1 compressed": (after.argmax(1) == labels).double().mean().item(),
        "kl": F.kl_div(
            after.log_softmax(1), before.log_softmax(1), log_target=True, reduction="batchmean"
        ).item(),
        "agreement": (before.argmax(1) == after.argmax(1)).double().mean().item(),
        "feature_cosine": F.cosine_similarity(f, g).mean().item(),
        "feature_relative_error": ((g - f).norm(dim=1) / f.norm(dim=1)).mean().item(),
    }


@pytest.mark.parametrize("name", ["plain", "plain-in-place", "timm-vit"])
def test_accuracy_and_fidelity_are_those_of_plain_forward_passes(name: str) -> None:
    original, compressed, _, _ = pair(name)
    data = some(name)
    out = evaluate(compressed, data, against=original, measure=False)
    expected = by_hand(original, compressed, data)
    assert out.images == 10
    assert out.original is not None
    assert out.fidelity is not None
    assert out.original.top1 == expected["top1 original"]
    assert out.compressed.top1 == expected["top1 compressed"]
    for key in ("kl", "agreement", "feature_cosine", "feature_relative_error"):
        assert getattr(out.fidelity, key) == pytest.approx(expected[key], rel=1e-5)
    assert expected["kl"] > 1e-4


def test_the_json_has_the_promised_keys() -> None:
    original, compressed, _, _ = pair("plain")
    out = evaluate(compressed, some("plain"), against=original)
    values = json.loads(json.dumps(out.to_json(), allow_nan=False))
    promised = ["images", "original", "compressed", "fidelity", "intervals"]
    assert list(values) == [*promised, "classes", "flips", "flipped", "made"]
    for name, model in (("original", original), ("compressed", compressed)):
        side = values[name]
        assert {"top1", "parameters", "flops", "size_bytes", "images_per_second"} <= side.keys()
        assert side["parameters"] == parameters(model)
        assert side["flops"] == flops(model, FAMILIES["plain"].images())
        assert side["size_bytes"] == size_bytes(model)
        assert side["images_per_second"] > 0
        assert {"median", "spread"} <= side["latency_ms"].keys()
        assert side["latency_ms"]["images"] == 1
        assert side["batch_ms"]["images"] == 4
    assert values["compressed"]["parameters"] < values["original"]["parameters"]
    assert values["compressed"]["flops"] < values["original"]["flops"]
    assert values["compressed"]["speedup"] > 0
    assert set(values["fidelity"]) == {
        "kl", "agreement", "feature_cosine", "feature_relative_error"
    }  # fmt: skip


def test_the_table_says_that_a_speed_up_is_of_rounds_timed_together() -> None:
    """It need not be the ratio of the two medians beside it."""
    original, compressed, _, _ = pair("plain")
    worth = evaluate(compressed, some("plain"), against=original).to_json()
    worth["original"]["images_per_second"], worth["compressed"]["images_per_second"] = 100.0, 250.0
    worth["compressed"] |= {"speedup": 1.5, "latency_part": 0.621}
    (table,) = (part for part in summaries.evaluation(worth) if isinstance(part, Table))
    told = {row[0]: row[-1] for row in table.rows}
    assert told["images per second"] == "1.50× (paired)"
    assert told["latency, ms"] == "62.1% (paired)"


def test_what_is_unknown_is_null() -> None:
    _, compressed, _, _ = pair("plain")
    alone = evaluate(compressed, some("plain", labelled=False), measure=False).to_json()
    assert alone["original"] is None
    assert alone["fidelity"] is None
    assert alone["compressed"]["top1"] is None
    assert alone["compressed"]["images_per_second"] is None
    assert alone["compressed"]["speedup"] is None
    assert alone["compressed"]["latency_part"] is None
    headless, smaller, _, _ = pair("vit")
    out = evaluate(smaller, some("vit"), against=headless, measure=False).to_json()
    assert out["compressed"]["top1"] is None
    assert out["fidelity"]["kl"] is None
    assert out["fidelity"]["agreement"] is None
    assert 0 < out["fidelity"]["feature_cosine"] < 1
    assert alone["compressed"]["no_head"] is None
    for side in (out["original"], out["compressed"]):
        assert "the output has shape" in side["no_head"]
    (line,) = [part for part in evaluation(out) if isinstance(part, str) and "no head" in part]
    assert line.startswith("no top-1, KL and agreement: no head was recognised; the output has")
    assert not any("no head" in str(part) for part in evaluation(alone))


def test_a_model_against_itself_is_the_same() -> None:
    model = FAMILIES["dinov2-classifier"].build()
    out = evaluate(model, some("dinov2-classifier"), against=model, measure=False)
    assert out.fidelity is not None
    assert out.fidelity.kl == pytest.approx(0, abs=1e-12)
    assert out.fidelity.agreement == 1
    assert out.fidelity.feature_relative_error == 0


def test_both_models_stay_as_they_were_and_progress_is_told() -> None:
    original, compressed, _, _ = pair("timm-vit")
    original.train()
    before = copy.deepcopy(original.state_dict()), torch.get_rng_state()
    told: list[tuple[int, int]] = []
    evaluate(compressed, some("timm-vit"), against=original, progress=lambda *now: told.append(now))
    assert told == [(4, 10), (8, 10), (10, 10)]
    assert original.training
    assert not compressed.training
    assert all(torch.equal(before[0][k], v) for k, v in original.state_dict().items())
    hooks = [m._forward_hooks or m._forward_pre_hooks for m in original.modules()]
    assert not any(hooks)


def test_models_of_two_dtypes_get_the_images_in_their_own() -> None:
    original, compressed, _, _ = pair("plain")
    data = some("plain")
    full = evaluate(compressed, data, against=original, measure=False)
    out = evaluate(compressed.to(torch.bfloat16), data, against=original, measure=False)
    assert out.original is not None
    assert out.fidelity is not None
    assert full.fidelity is not None
    assert out.fidelity.feature_cosine == pytest.approx(full.fidelity.feature_cosine, abs=0.01)
    assert out.compressed.size_bytes < 0.6 * out.original.size_bytes


def test_images_without_a_label_are_left_out_of_the_accuracy() -> None:
    _, compressed, _, _ = pair("plain")
    pictures, labels = everything(some("plain"))
    with torch.no_grad():
        guesses = compressed(pictures).argmax(1)
    labels = torch.where(torch.arange(10) < 4, guesses, -1)
    labels[3] = (guesses[3] + 1) % CLASSES
    data = images((pictures, labels), batch_size=4)
    assert evaluate(compressed, data, measure=False).compressed.top1 == 0.75


@pytest.mark.parametrize("batch_size", [1, 4, 10])
@pytest.mark.parametrize("missing", [-1, 9, 5])
def test_a_label_that_is_missing_or_beyond_the_head_costs_one_image(
    missing: int, batch_size: int
) -> None:
    """Case 8: the accuracy on the others does not depend on the batches."""
    _, compressed, _, _ = pair("plain")
    pictures = FAMILIES["plain"].images(10)
    with torch.no_grad():
        labels = compressed(pictures).argmax(1)
    labels[::2] = (labels[::2] + 1) % CLASSES
    labels[[1, 4]] = missing
    data = images((pictures, labels), batch_size=batch_size)
    found = evaluate(compressed, data, measure=False).compressed
    assert (found.top1, found.labelled) == (0.5, 8)


def test_labels_of_another_data_set_are_refused() -> None:
    _, compressed, _, _ = pair("plain")
    data = images((FAMILIES["plain"].images(4), torch.tensor([0, 7, 9, 6])))
    with pytest.raises(BlockfitError, match="3 of 4 labels are beyond the classes of the model's"):
        evaluate(compressed, data, measure=False)


def test_outputs_that_are_not_finite_are_refused() -> None:
    _, compressed, _, _ = pair("plain")
    compressed.head.bias.data[0] = float("nan")
    with pytest.raises(BlockfitError, match="output of the model 'compressed' holds NaN"):
        evaluate(compressed, some("plain"), measure=False)


def test_two_models_that_do_not_belong_together_are_refused() -> None:
    _, compressed, _, _ = pair("plain")
    other: Any = FAMILIES["plain"].build()
    other.head = nn.Linear(other.head.in_features, CLASSES + 1)
    with pytest.raises(BlockfitError, match=r"differ in shape, \(4, 6\) and \(4, 5\)"):
        evaluate(compressed, some("plain"), against=other, measure=False)


def test_an_original_with_other_blocks_is_said_to_be_another() -> None:
    _, compressed, blocks, _ = pair("plain")
    for other in (FAMILIES["timm-vit"].build(), nn.Linear(2, 2)):
        with pytest.raises(BlockfitError, match="give the model that it was made from"):
            evaluate(compressed, some("plain"), against=other, blocks=blocks, measure=False)


def known(fidelity: Fidelity | None) -> dict[str, float]:
    """What is not ``None``."""
    assert fidelity is not None
    return {key: value for key, value in asdict(fidelity).items() if value is not None}


def test_no_images_are_one_sentence() -> None:
    _, compressed, _, _ = pair("plain")
    none = some("plain").take(0)
    with pytest.raises(BlockfitError, match="no images to evaluate on"):
        evaluate(compressed, none)


def test_classes_and_flips_are_those_of_the_models() -> None:
    original, compressed, blocks, _ = pair("timm-vit")
    for parameter in compressed.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    data = some("timm-vit", count=40)
    found = evaluate(compressed, data, against=original, blocks=blocks, measure=False)
    inputs, labels = everything(data)
    with torch.no_grad():
        before, after = original.eval()(inputs), compressed.eval()(inputs)
    old, new = before.argmax(1), after.argmax(1)
    assert found.answers is not None
    for one in found.answers.classes:
        own = labels == int(one.name.removeprefix("class "))
        assert one.images == int(own.sum())
        assert (one.before, one.after) == (
            int((old == labels)[own].sum()),
            int((new == labels)[own].sum()),
        )
    assert sum(one.images for one in found.answers.classes) == 40
    kl = F.kl_div(after.double().log_softmax(1), before.double().log_softmax(1),
                  reduction="none", log_target=True).sum(1)  # fmt: skip
    wanted = sorted(((float(kl[i]), i) for i in range(40) if old[i] != new[i]), reverse=True)
    assert wanted
    assert found.answers.flipped == len(wanted)
    for flip, (cost, row) in zip(found.answers.flips, wanted, strict=True):
        assert abs(flip.cost - cost) < 1e-6
        assert flip.image.endswith(f"[{row}]")
        assert flip.label == f"class {int(labels[row])}"
        assert (flip.before, flip.after) == (f"class {int(old[row])}", f"class {int(new[row])}")
    told = json.loads(json.dumps(found.to_json()))
    assert told["flipped"] == len(told["flips"])
    assert set(told["made"]) == {"date", "machine", "versions"}
