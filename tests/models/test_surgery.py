"""What a model keeps and loses when a plan is applied to it."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import DEPTH, FAMILIES, WIDTH, PlainBlock, PlainViT, one_thread  # noqa: F401
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.fit.maps import Linear, LowRank, PerTokenType, empty_map
from blockfit.fit.plan import Plan, Replacement, Span
from blockfit.models.blocks import Blocks, block_modules, find_chain, overridden, record
from blockfit.models.surgery import apply_plan, is_replaced, removed_plan

PLAN = Plan.of(["1:3"], "affine")


@pytest.fixture
def images() -> Tensor:
    return FAMILIES["plain"].images()


def affine(seed: int = 0) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    module = Linear(WIDTH, bias=True)
    module.load_state_dict(
        {
            "weight": torch.randn(WIDTH, WIDTH, generator=generator) / 8,
            "bias": torch.randn(WIDTH, generator=generator),
        }
    )
    return module


def compressed(name: str = "plain", plan: Plan = PLAN) -> tuple[Any, Blocks]:
    model = FAMILIES[name].build()
    blocks = find_chain(model)
    apply_plan(model, blocks, plan, [affine(i) for i in range(len(plan))])
    return model, blocks


def test_only_the_last_block_of_a_span_holds_parameters_under_its_own_name() -> None:
    model, _ = compressed()
    keys = [key for key in model.state_dict() if key.startswith(("transformer.1", "transformer.2"))]
    assert keys == ["transformer.2.map.weight", "transformer.2.map.bias"]
    assert list(model.transformer[1].parameters()) == []


def test_replacements_share_one_subclass_of_the_removed_blocks_class() -> None:
    (first, _), (second, _) = compressed(), compressed()
    kinds = {type(b) for model in (first, second) for b in model.transformer if is_replaced(b)}
    assert len(kinds) == 1
    assert issubclass(kinds.pop(), PlainBlock)
    assert repr(first.transformer[2]).startswith("ReplacedPlainBlock(\n  1:3 affine")


def test_maps_are_copied_so_that_one_can_serve_two_models(images: Tensor) -> None:
    own = affine()
    models = [FAMILIES["plain"].build().half(), FAMILIES["plain"].build()]
    for model in models:
        apply_plan(model, find_chain(model), PLAN, [own])
    assert own.weight.dtype == torch.float32
    assert models[0].transformer[2].map.weight.dtype == torch.float16
    with torch.no_grad():
        models[1].transformer[2].map.weight.zero_()
    assert own.weight.abs().sum() > 0


def test_maps_take_precision_mode_and_gradients_from_the_removed_block() -> None:
    model = FAMILIES["plain"].build().to(torch.float64).requires_grad_(False)
    model.transformer[2].train()
    model.transformer[3].requires_grad_(True)
    apply_plan(model, find_chain(model), Plan.of(["1:3", "3:4"], "affine"), [affine(), affine()])
    frozen, trained = model.transformer[2], model.transformer[3]
    assert (frozen.training, frozen.map.training, trained.training) == (True, True, False)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in trained.parameters())


def test_every_kind_of_map_can_be_put_in(images: Tensor) -> None:
    model = FAMILIES["plain"].build()
    blocks = find_chain(model)
    rank = LowRank(WIDTH, 2)
    nn.init.normal_(rank.up)
    nn.init.normal_(rank.down)
    split = PerTokenType(affine(1), affine(2), 1)
    plan = Plan(
        (
            Replacement(Span(0, 1), "low-rank", rank=2),
            Replacement(Span(1, 2), "affine", per_token_type=True),
            Replacement(Span(3, 4), "folded"),
        )
    )
    with torch.no_grad():
        functions = {0: rank, 1: split, 3: lambda hidden: hidden}
        with overridden(model, blocks, functions):
            expected = model(images)
        maps = [rank, split, empty_map(plan.replacements[2], WIDTH)]
        apply_plan(model, blocks, plan, maps)
        assert torch.equal(model(images), expected)
    assert removed_plan(model, blocks) == plan


def test_maps_of_another_kind_or_split_are_refused() -> None:
    model = FAMILIES["plain"].build()
    blocks = find_chain(model)
    with pytest.raises(BlockfitError, match="the map of span 1:3 has weights"):
        apply_plan(model, blocks, PLAN, [Linear(WIDTH, bias=False)])
    plan = Plan.of(["1:3"], "affine", per_token_type=True)
    with pytest.raises(BlockfitError, match="splits after 2 prefix tokens, but the model has 1"):
        apply_plan(model, blocks, plan, [PerTokenType(affine(), affine(), 2)])
    with pytest.raises(BlockfitError, match="no prefix"):
        apply_plan(
            model, replace(blocks, prefix_tokens=0), plan, [PerTokenType(affine(), affine(), 0)]
        )
    assert not any(is_replaced(block) for block in block_modules(model, blocks))


def test_a_second_plan_may_remove_other_blocks_but_not_fold_into_a_replaced_one(
    images: Tensor,
) -> None:
    model, blocks = compressed(plan=Plan.of(["1:2"], "affine"))
    folded = Plan.of(["2:3"], "folded")
    with pytest.raises(BlockfitError, match="cannot be folded: block 1 is replaced"):
        apply_plan(model, blocks, folded, [empty_map(r, WIDTH) for r in folded])
    apply_plan(model, blocks, Plan.of(["3:4"], "affine"), [affine(1)])
    assert removed_plan(model, blocks) == Plan.of(["1:2", "3:4"], "affine")


def test_removed_plan_of_a_whole_model_is_empty() -> None:
    model = FAMILIES["plain"].build()
    assert removed_plan(model, find_chain(model)) == Plan()


def test_hooks_of_removed_blocks_move_over_and_can_still_be_removed(images: Tensor) -> None:
    model = FAMILIES["plain"].build()
    blocks, calls = find_chain(model), []
    old = model.transformer[2]
    handles = [
        old.register_forward_hook(lambda m, a, k, o: calls.append("after"), with_kwargs=True),
        old.register_forward_pre_hook(lambda m, a: calls.append("before")),
    ]
    apply_plan(model, blocks, PLAN, [affine()])
    model(images)
    assert calls == ["before", "after"]
    old(torch.zeros(1, 2, WIDTH))
    for handle in handles:
        handle.remove()
    model(images)
    assert calls == ["before", "after"]


def test_states_are_recorded_across_the_surgery(images: Tensor) -> None:
    model = FAMILIES["plain"].build()
    blocks = find_chain(model)
    with record(model, blocks) as states:
        apply_plan(model, blocks, PLAN, [affine()])
        model(images)
        assert len(states) == DEPTH + 1
    assert torch.equal(states[1], states[2])
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_plain_attributes_stay_readable_and_parts_are_gone() -> None:
    model = FAMILIES["plain"].build()
    old = model.transformer[2]
    old.attention_type, old.index, old.note = "full", 2, None
    old.cache = [torch.zeros(3)]
    apply_plan(model, find_chain(model), PLAN, [affine()])
    new = model.transformer[2]
    assert (new.attention_type, new.index, new.note) == ("full", 2, None)
    assert not hasattr(new, "cache")
    with pytest.raises(AttributeError):
        _ = new.mlp


def test_a_block_registered_in_two_places_is_replaced_in_both() -> None:
    model = FAMILIES["plain"].build()
    model.also = nn.ModuleDict({"middle": model.transformer[1]})
    apply_plan(model, find_chain(model), PLAN, [affine()])
    assert model.also["middle"] is model.transformer[1]
    assert is_replaced(model.also["middle"])


def test_methods_that_need_the_removed_parts_do_not_break_the_replacement(images: Tensor) -> None:
    class Particular(PlainBlock):
        def train(self, mode: bool = True) -> Particular:
            super().train(mode)
            self.mlp[1].eval()
            return self

        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            self.mlp[0].weight.sum()
            super()._load_from_state_dict(*args, **kwargs)

    model = PlainViT(Particular)
    apply_plan(model, find_chain(model), PLAN, [affine()])
    model.train().eval()
    model.load_state_dict(model.state_dict())
    assert model(images).isfinite().all()


def test_copies_and_pickles_keep_class_and_outputs(images: Tensor) -> None:
    model, blocks = compressed()
    expected = model(images)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for twin in (copy.deepcopy(model), loaded):
        assert torch.equal(twin(images), expected)
        assert type(twin.transformer[2]) is type(model.transformer[2])
        assert twin.transformer[2].map.weight is not model.transformer[2].map.weight
        assert removed_plan(twin, blocks) == PLAN


def test_a_state_dict_is_saved_and_loaded_as_weights_only(images: Tensor) -> None:
    (model, _), (fresh, _) = compressed(), compressed()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    with torch.no_grad():
        fresh.transformer[2].map.weight.zero_()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(images), model(images))


def test_a_model_without_weights_takes_a_plan_and_then_its_weights(images: Tensor) -> None:
    model, blocks = compressed()
    with torch.device("meta"):
        skeleton = PlainViT().eval()
    apply_plan(skeleton, blocks, PLAN, [empty_map(r, WIDTH) for r in PLAN])
    assert all(p.is_meta for p in skeleton.parameters())
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(skeleton(images), model(images))


@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing_enabled_before_or_after_the_surgery_trains(when: str) -> None:
    pytest.importorskip("transformers")
    family = FAMILIES["dinov2-classifier"]
    model: Any = family.build()
    blocks = find_chain(model)
    if when == "before":
        model.gradient_checkpointing_enable()
    apply_plan(model, blocks, PLAN, [affine()])
    if when == "after":
        model.gradient_checkpointing_enable()
    model.train()
    model(family.images()).logits.sum().backward()
    assert all(p.grad is not None for p in block_modules(model, blocks)[2].parameters())


def test_hidden_states_are_those_of_a_chosen_index_too() -> None:
    pytest.importorskip("transformers")
    model, blocks = compressed("dinov2-classifier")
    images = FAMILIES["dinov2-classifier"].images()
    with torch.no_grad(), record(model, blocks) as states:
        own = model(images, output_hidden_states=True).hidden_states
    assert [torch.equal(a, b) for a, b in zip(own, states, strict=True)] == [True] * (DEPTH + 1)
