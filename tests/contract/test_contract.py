"""The one contract that every supported family passes, on a tiny random model."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import CLASSES, DEPTH, FAMILIES, WIDTH, Family, one_thread  # noqa: F401
from torch import Tensor, nn

import blockfit
from blockfit.errors import BlockfitError
from blockfit.fit.maps import empty_map
from blockfit.fit.plan import Plan, Replacement, Span
from blockfit.models.blocks import Blocks, block_modules, find_chain, overridden, record
from blockfit.models.head import observe
from blockfit.models.surgery import apply_plan, is_replaced, removed_plan

PLANS = {
    "affine 1:2": Plan.of(["1:2"], "affine"),
    "affine 1:3": Plan.of(["1:3"], "affine"),
    "identity 0:2": Plan.of(["0:2"], "identity"),
    "identity 0:1, affine 2:4": Plan(
        (Replacement(Span(2, 4), "affine"), Replacement(Span(0, 1), "identity"))
    ),
}

every_family = pytest.mark.parametrize("name", FAMILIES)
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))


def tensors(output: Any) -> list[Tensor]:
    """All tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return (
        [t for item in output for t in tensors(item)] if isinstance(output, (tuple, list)) else []
    )


@torch.no_grad()
def run(family: Family, model: nn.Module, images: Tensor) -> list[Tensor]:
    return tensors(family.run(model, images))


def assert_same(left: list[Tensor], right: list[Tensor], **tolerance: float) -> None:
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, **({"rtol": 0, "atol": 0} | tolerance))


def random_maps(plan: Plan, blocks: Blocks, seed: int = 0) -> list[nn.Module]:
    generator = torch.Generator().manual_seed(seed)
    maps = [empty_map(r, blocks.width, blocks.prefix_tokens) for r in plan]
    with torch.no_grad():
        for parameter in (p for m in maps for p in m.parameters()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return maps


def by_hand(
    family: Family, model: nn.Module, functions: Mapping[int, Callable[[Tensor], Tensor]]
) -> nn.Module:
    """A copy of the model whose blocks have another ``forward``, set without blockfit."""
    changed = copy.deepcopy(model)
    for index, function in functions.items():

        def forward(*args: Any, _function: Any = function, **kwargs: Any) -> Any:
            hidden = _function(args[0] if args else kwargs["tokens"])
            return (hidden, None) if family.tuple_output else hidden

        family.blocks(changed)[index].forward = forward  # type: ignore[method-assign]
    return changed


def planned_by_hand(
    family: Family, model: nn.Module, plan: Plan, maps: list[nn.Module]
) -> nn.Module:
    functions: dict[int, Callable[[Tensor], Tensor]] = {}
    for entry, module in zip(plan, maps, strict=True):
        functions.update(dict.fromkeys(entry.span.blocks, lambda hidden: hidden))
        if entry.map == "affine":
            weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
            functions[entry.span.stop - 1] = lambda hidden, w=weight, b=bias: hidden @ w.T + b
    return by_hand(family, model, functions)


@every_family
def test_blocks_are_found_as_the_model_states_them(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    blocks = find_chain(model)
    assert (blocks.path, blocks.depth, blocks.width) == (family.place(model), DEPTH, WIDTH)
    assert blocks.prefix_tokens == family.prefix_tokens(model)
    assert blocks.output_items == (2 if family.tuple_output else 0)
    assert block_modules(model, blocks) == family.blocks(model)


@every_family
def test_recorded_states_are_the_models_own(name: str) -> None:
    family = FAMILIES[name]
    model, images = family.build(), family.images()
    blocks = find_chain(model)
    with torch.no_grad(), record(model, blocks) as states:
        family.run(model, family.images(seed=1))
        before = [state.clone() for state in states]
        family.run(model, images)
    assert len(states) == len(before) == DEPTH + 1
    assert {state.shape for state in states} == {(3, states[0].shape[1], WIDTH)}
    assert all(not torch.equal(a, b) for a, b in zip(before, states, strict=True))
    if family.states is not None:
        with torch.no_grad():
            own = family.states(model, images)
        offered = [index for index, state in enumerate(own) if state.numel()]
        assert len(offered) >= DEPTH - 1
        assert_same([own[i] for i in offered], [states[i] for i in offered])
    assert all(not m._forward_pre_hooks for m in family.blocks(model))


@every_family
def test_identity_in_place_of_a_block_drops_it_and_then_gives_it_back(name: str) -> None:
    family = FAMILIES[name]
    model, images = family.build(), family.images()
    blocks, original = find_chain(model), run(family, model, images)
    dropped = run(family, by_hand(family, model, {1: lambda hidden: hidden}), images)
    with overridden(model, blocks, {1: lambda hidden: hidden}):
        assert_same(run(family, model, images), dropped)
    assert any(not torch.equal(a, b) for a, b in zip(original, dropped, strict=True))
    assert_same(run(family, model, images), original)


@every_plan
@every_family
def test_outputs_equal_those_of_blocks_replaced_by_hand(name: str, plan: Plan) -> None:
    family = FAMILIES[name]
    model, images = family.build(), family.images()
    kind, form, keys = type(model), type(family.run(model, images)), set(model.state_dict())
    blocks = find_chain(model)
    removed = [family.blocks(model)[i] for i in plan.removed_blocks]
    maps = random_maps(plan, blocks)
    expected = run(family, planned_by_hand(family, model, plan, maps), images)
    original = run(family, model, images)
    apply_plan(model, blocks, plan, maps)

    assert_same(run(family, model, images), expected, rtol=1e-5, atol=1e-5)
    assert any(not torch.allclose(a, b) for a, b in zip(original, expected, strict=True))
    assert type(model) is kind
    assert type(family.run(model, images)) is form
    assert len(family.blocks(model)) == DEPTH
    gone = sum(p.numel() for block in removed for p in block.parameters())
    added = sum(p.numel() for module in maps for p in module.parameters())
    assert count(model) == count(family.build()) - gone + added
    new = set(model.state_dict()) - keys
    assert all(".map." in f".{key}" for key in new)
    assert len(new) == sum(len(module.state_dict()) for module in maps)
    assert find_chain(model) == blocks
    assert removed_plan(model, blocks) == plan


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("called_before", [False, True])
@every_family
def test_intermediates_keep_their_number_and_are_right(name: str, called_before: bool) -> None:
    family = FAMILIES[name]
    if family.intermediates is None:
        pytest.skip("the model offers no hidden states")
    model, images, plan = family.build(), family.images(), PLANS["affine 1:3"]
    blocks = find_chain(model)
    maps = random_maps(plan, blocks)
    number = len(family.intermediates(copy.deepcopy(model), images))
    expected = family.intermediates(planned_by_hand(family, model, plan, maps), images)
    if called_before:
        family.intermediates(model, images)
    apply_plan(model, blocks, plan, maps)
    found = family.intermediates(model, images)
    assert len(found) == number
    assert_same(found, expected, rtol=1e-5, atol=1e-5)


@every_family
def test_state_dict_loads_strictly_into_a_fresh_model_with_the_same_plan(name: str) -> None:
    family, plan = FAMILIES[name], PLANS["identity 0:1, affine 2:4"]
    first, second, images = family.build(0), family.build(1), family.images()
    for seed, model in enumerate((first, second)):
        blocks = find_chain(model)
        apply_plan(model, blocks, plan, random_maps(plan, blocks, seed))
    assert any(
        map(
            torch.ne,
            run(family, first, images)[0].flatten(),
            run(family, second, images)[0].flatten(),
        )
    )
    second.load_state_dict(first.state_dict(), strict=True)
    assert_same(run(family, second, images), run(family, first, images))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@every_family
def test_copies_run_in_other_precisions(name: str, dtype: torch.dtype) -> None:
    family, plan = FAMILIES[name], PLANS["affine 1:3"]
    model, images = family.build(), family.images()
    blocks = find_chain(model)
    apply_plan(model, blocks, plan, random_maps(plan, blocks))
    expected = run(family, model, images)
    twin = copy.deepcopy(model)
    assert_same(run(family, twin, images), expected)
    found = run(family, twin.to(dtype), images.to(dtype))
    assert {t.dtype for t in found} == {dtype}
    close = {torch.float16: 0.05, torch.bfloat16: 0.3, torch.float64: 1e-4}[dtype]
    assert_same([t.float() for t in found], expected, atol=close, rtol=close)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@every_family
def test_refused_plans_change_nothing(name: str) -> None:
    family = FAMILIES[name]
    model, images = family.build(), family.images()
    blocks = find_chain(model)
    good = PLANS["affine 1:3"]
    maps = random_maps(good, blocks)
    wide = random_maps(good, replace(blocks, width=WIDTH + 1))
    beyond = Plan.of(["1:2", f"3:{DEPTH + 1}"], "affine")
    everything = Plan.of([f"0:{DEPTH}"], "affine")
    refused: list[tuple[Blocks, Plan, list[nn.Module], str]] = [
        (blocks, beyond, random_maps(beyond, blocks), "leaves the model"),
        (blocks, everything, random_maps(everything, blocks), "removes all"),
        (blocks, good, [], "0 maps"),
        (blocks, good, wide, f"width {WIDTH}"),
        (blocks, good, random_maps(PLANS["identity 0:2"], blocks), "none"),
        (replace(blocks, path="nowhere"), good, maps, "no module 'nowhere'"),
        (replace(blocks, depth=DEPTH + 1), good, maps, f"found {DEPTH}"),
    ]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected, modules = run(family, model, images), list(model.modules())
    for where, plan, given, message in refused:
        with pytest.raises(BlockfitError, match=message):
            apply_plan(model, where, plan, given)
    assert list(model.modules()) == modules
    assert_same(run(family, model, images), expected)
    assert list(before) == list(model.state_dict())
    assert_same(list(before.values()), list(model.state_dict().values()))

    apply_plan(model, blocks, good, maps)
    expected, modules = run(family, model, images), list(model.modules())
    again = Plan.of(["0:1", "2:3"], "affine")
    with pytest.raises(BlockfitError, match="block 2 is replaced already"):
        apply_plan(model, blocks, again, random_maps(again, blocks))
    assert list(model.modules()) == modules
    assert_same(run(family, model, images), expected)


@every_family
def test_removed_weights_are_freed_although_the_model_was_called_before(name: str) -> None:
    family, plan = FAMILIES[name], PLANS["affine 1:3"]
    model, images = family.build(), family.images()
    blocks = find_chain(model)
    with torch.no_grad():
        if family.intermediates is not None:
            family.intermediates(model, images)
    observe(model, blocks, images)
    weights = [
        weakref.ref(p) for i in plan.removed_blocks for p in family.blocks(model)[i].parameters()
    ]
    assert len(weights) > 10
    apply_plan(model, blocks, plan, random_maps(plan, blocks))
    gc.collect()
    assert [w for w in weights if w() is not None] == []


# One of each library and output form: compiling takes seconds.
@pytest.mark.parametrize(
    "name", ["timm-vit", "dinov2-classifier", "torchvision-vit", "plain-tuple"]
)
def test_compiles_into_one_graph(name: str) -> None:
    family, plan = FAMILIES[name], PLANS["affine 1:3"]
    model, images = family.build(), family.images()
    blocks = find_chain(model)
    try:
        run(family, torch.compile(model, backend="eager", fullgraph=True), images)
    except torch._dynamo.exc.Unsupported:
        pytest.skip("this torch makes several graphs of the original")
    apply_plan(model, blocks, plan, random_maps(plan, blocks))
    expected = run(family, model, images)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_same(run(family, compiled, images), expected, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@every_family
def test_gradients_reach_the_map_and_the_blocks_before_it(name: str) -> None:
    family, plan = FAMILIES[name], PLANS["affine 1:3"]
    if name == "plain-in-place":
        pytest.skip("a block that writes into its input cannot be trained")
    model = family.build().train()
    blocks = find_chain(model)
    apply_plan(model, blocks, plan, random_maps(plan, blocks))
    tensors(family.run(model, family.images()))[-1].square().sum().backward()
    modules = block_modules(model, blocks)
    assert [is_replaced(module) for module in modules] == [False, True, True, False]
    for module in (modules[0], modules[2], modules[3]):
        grads = [p.grad for p in module.parameters()]
        assert any(grad is not None and grad.abs().sum() > 0 for grad in grads)


@every_family
def test_features_lead_to_the_logits_through_the_head(name: str) -> None:
    family = FAMILIES[name]
    model, images = family.build(), family.images()
    seen = observe(model, find_chain(model), images)
    final = run(family, model, images)
    if not family.heads:
        assert seen.logits is None
        assert any(torch.equal(seen.features, tensor.flatten(1)) for tensor in final)
        return
    assert seen.logits is not None
    assert torch.equal(seen.logits, final[0])
    heads = [
        m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == CLASSES
    ]  # fmt: skip
    assert len(heads) == family.heads
    parts = seen.features.chunk(family.heads, dim=1)
    mean = torch.stack([h(part) for h, part in zip(heads, parts, strict=True)]).mean(0)
    torch.testing.assert_close(mean, final[0])


@every_family
def test_the_public_functions_work_on_every_family(name: str, tmp_path: Path) -> None:
    """Case 2: what docs/models.md promises, from compress to load, through what users call."""
    family, images = FAMILIES[name], FAMILIES[name].images(12)
    model = family.build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    small = blockfit.compress(model, images, spans=[(1, 2)])
    assert_same(list(before.values()), list(model.state_dict().values()))
    gone = sum(p.numel() for p in family.blocks(model)[1].parameters())
    # A map that is worse than nothing on the held-out images is dropped.
    (entry,) = small.plan
    added = WIDTH * (WIDTH + 1) if entry.map == "affine" else 0
    assert count(small.model) == count(model) - gone + added

    worth = blockfit.evaluate(small, images, against=model, measure=False)
    assert worth.images == len(images)
    assert worth.original is not None
    assert worth.original.flops == small.report["flops_before"]
    assert worth.compressed.flops == small.report["flops_after"] < worth.original.flops
    assert worth.compressed.parameters == count(small.model)
    assert worth.fidelity is not None
    assert (worth.fidelity.kl is not None) == bool(family.heads)
    assert 0 < worth.fidelity.feature_relative_error < 2

    blockfit.save(small, tmp_path / "small")
    fresh = family.build(1) if small.source.library == "module" else None
    back = blockfit.load(tmp_path / "small", model=fresh)
    assert_same(run(family, back, images), run(family, small.model, images))


@pytest.mark.parametrize(
    "name",
    [
        "timm-naflex-map",
        "timm-cait",
        "dinov2-backbone",
        "torchvision-vit",
        "open_clip",
        "plain-tuple",
    ],
)
def test_sweeps_reach_every_size_on_models_of_every_library(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    how = {"recipe": "plain", "cuts": "blocks"}
    found = blockfit.sweep(family.build(), family.images(12), tmp_path / "sweep", **how)
    assert [point["removed"] for point in found.points] == [*range(1, DEPTH - 1)]
    small = blockfit.from_sweep(tmp_path / "sweep", remove=1, model=family.build())
    assert small.report["removed_blocks"] >= 1
