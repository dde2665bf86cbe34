"""``compress``, ``save`` and ``load`` as a user calls them, on the shipped model."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

import blockfit
from blockfit.api import recipe_for
from blockfit.search.session import Session


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return blockfit.load("demo")


@pytest.fixture(scope="module")
def images(model: nn.Module):  # type: ignore[no-untyped-def]
    return blockfit.images("digits", model, limit=48, seed=0)


def logits(model: nn.Module, images) -> torch.Tensor:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images])


def test_compress_leaves_the_original_alone_and_returns_a_smaller_model(model, images):
    before = copy.deepcopy(model.state_dict())
    result = blockfit.compress(model, images, remove=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(result.plan.removed_blocks) == 2
    count = sum(p.numel() for p in result.model.parameters())
    assert count == result.report["parameters_after"] < result.report["parameters_before"]
    assert type(result.model) is type(model)


def test_the_report_names_the_kept_blocks_whose_weights_changed(model, images):
    original = dict(model.named_parameters())
    for recipe in ("default", "paper", "plain"):
        result = blockfit.compress(model, images, remove=2, recipe=recipe)
        changed = {
            int(name.split(".")[1])
            for name, value in result.model.named_parameters()
            if name in original and not torch.equal(value, original[name])
        }
        assert result.report["repaired_blocks"] == sorted(changed)
        assert bool(changed) == (recipe != "paper")


def test_inplace_changes_the_model_itself(images):
    model = blockfit.load("demo")
    result = blockfit.compress(model, images, spans=["2:3"], inplace=True)
    assert result.model is model


def test_saved_and_loaded_models_agree_bit_for_bit(model, images, tmp_path):
    result = blockfit.compress(model, images, remove=2)
    blockfit.save(result, tmp_path / "small")
    again = blockfit.load(tmp_path / "small")
    assert torch.equal(logits(result.model, images), logits(again, images))


def test_the_reported_held_out_kl_is_that_of_the_returned_model(model, images):
    result = blockfit.compress(model, images, remove=3)
    _, held_out = images.split(0.2, 0)
    p, q = logits(model, held_out).log_softmax(1), logits(result.model, held_out).log_softmax(1)
    kl = (p.exp() * (p - q)).sum(1).double().mean()
    assert result.report["held_out"]["kl"] == pytest.approx(float(kl), rel=1e-3, abs=1e-7)


def test_repair_and_refit_lower_the_loss_of_the_papers_linear_map(model, images):
    spans = ["1:4", "6:8"]
    paper = blockfit.compress(model, images, spans=spans, recipe="paper")
    ours = blockfit.compress(model, images, spans=spans, map="affine", repair="mlp+attention")
    assert ours.report["held_out"]["kl"] < paper.report["held_out"]["kl"]


def test_spans_by_hand_are_fitted_and_nothing_else_is_touched(model, images):
    result = blockfit.compress(model, images, spans=["3:5"], map="linear")
    kept = [f"blocks.{i}." for i in (0, 1, 2, 5, 6, 7, 8, 9, 10, 11)]
    small = result.model.state_dict()
    for name, value in model.state_dict().items():
        if any(name.startswith(prefix) for prefix in kept):
            assert torch.equal(small[name], value)


def test_plain_recipe_adds_no_parameter(model, images):
    result = blockfit.compress(model, images, remove=2, recipe="plain")
    assert result.plan.not_plain(result.blocks.depth) is None
    expected = [
        p.numel()
        for name, p in model.named_parameters()
        if not any(name.startswith(f"blocks.{i}.") for i in result.plan.removed_blocks)
    ]
    assert result.report["parameters_after"] == sum(expected)


@pytest.mark.parametrize(("budget", "key"), [("params", "parameters"), ("flops", "flops")])
def test_size_budgets_are_kept(model, images, budget, key):
    result = blockfit.compress(model, images, **{budget: "85%"})
    assert result.report[f"{key}_after"] <= 0.85 * result.report[f"{key}_before"]


def test_max_kl_is_kept_by_the_upper_end_of_the_interval(model, images):
    judged = blockfit.compress(model, images, max_kl=0.02).report["judged"]
    assert 0 <= judged["value"] < judged["bound"] <= 0.02


def test_max_drop_needs_labels(model):
    unlabelled = blockfit.images(torch.rand(2000, 1, 8, 8), model)
    with pytest.raises(blockfit.BlockfitError, match="labelled"):
        blockfit.compress(model, unlabelled, max_drop=1.0)


def test_protected_blocks_stay(model, images):
    protect = (0, 2, 4, 6, 8, 10)
    result = blockfit.compress(model, images, remove=2, protect=protect)
    assert not set(result.plan.removed_blocks) & set(protect)
    with pytest.raises(blockfit.BlockfitError, match="protected"):
        blockfit.compress(model, images, spans=["3:5"], protect=protect)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "say what to remove"),
        ({"remove": 2, "spans": ["1:2"]}, "say what to remove"),
        ({"remove": 2, "params": 0.5}, "not both"),
        ({"remove": 11}, "two must stay"),
        ({"remove": 0}, "whole number"),
        ({"params": "6O%"}, "cannot read"),
        ({"params": 0.01}, "cannot be reached"),
        ({"spans": ["3:9", "8:11"]}, "overlap"),
        ({"spans": ["3:19"]}, "leaves the model"),
        ({"spans": ["3:4"], "map": "cubic"}, "unknown map"),
        ({"remove": 2, "blocks": "nowhere"}, "nowhere"),
        ({"remove": 2, "recipe": "magic"}, "unknown recipe"),
        ({"spans": ["0:2"], "map": "folded"}, "folded"),
    ],
)
def test_refusals_are_one_sentence_and_change_nothing(model, images, arguments, words):
    before = logits(model, images.take(8))
    with pytest.raises(blockfit.BlockfitError, match=words):
        blockfit.compress(model, images, inplace=True, **arguments)
    assert torch.equal(logits(model, images.take(8)), before)


def test_a_compressed_model_is_not_compressed_again(model, images):
    small = blockfit.compress(model, images, spans=["3:5"]).model
    with pytest.raises(blockfit.BlockfitError, match="compressed already"):
        blockfit.compress(small, images, remove=1)


def test_one_span_may_be_longer_than_those_that_are_searched(model, images):
    result = blockfit.compress(model, images, remove=8, recipe="paper")
    assert [len(span) for span in result.plan.spans] == [8]


def test_one_map_per_token_type_and_weights_reach_the_plan(model, images):
    how = {"per_token_type": True, "prefix_weight": 4.0, "repair_ridge": 0.5}
    result = blockfit.compress(model, images, remove=1, **how)
    assert all(entry.per_token_type for entry in result.plan)
    options = result.report["recipe"]["options"]
    assert (options["prefix_weight"], options["repair_ridge"]) == (4.0, 0.5)


def test_too_few_images_are_refused(model, images):
    with pytest.raises(blockfit.BlockfitError, match="too few"):
        blockfit.compress(model, images.take(4), remove=1)


def test_an_automatic_ridge_is_between_none_and_all(model, images):
    result = blockfit.compress(model, images, spans=["1:4"], map="affine", ridge="auto")
    assert result.report["recipe"]["options"]["ridge"] is None
    error = result.report["maps"][0]
    assert error["error"] < error["identity_error"]


def test_by_hand_means_no_repair_unless_it_is_asked_for():
    assert recipe_for("default", True).options.repair == "none"
    assert recipe_for("default", True, repair="mlp").options.repair == "mlp"
    assert recipe_for("default").options.repair == "mlp+attention"


def test_a_costly_budget_is_called_so_with_the_nearest_safe_one(model, images, monkeypatch):
    monkeypatch.setattr("blockfit.search.session.SAFE_LOSS", 1e-9)
    result = blockfit.compress(model, images, remove=2)
    assert any("no number of blocks is safe" in line for line in result.report["warnings"])
    monkeypatch.setattr(
        "blockfit.search.session.SAFE_LOSS", result.report["held_out"]["kl"] * 0.999
    )
    again = blockfit.compress(model, images, remove=2)
    assert any("above" in line for line in again.report["warnings"])


def test_latency_budget_measures_the_model_that_it_returns(model, images, monkeypatch):
    seen = []

    def ratio(self: Session, solution) -> float:  # type: ignore[no-untyped-def]
        seen.append(solution.plan)
        return 1 - len(solution.plan.removed_blocks) / 12

    monkeypatch.setattr(Session, "latency_ratio", ratio)
    result = blockfit.compress(model, images, latency="80%")
    assert len(result.plan.removed_blocks) == 3
    assert result.plan in seen
    assert dataclasses.asdict(result)["report"]["budget"] == "latency 80%"
