"""What every family passes with parts of its blocks narrowed, on a tiny random model."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, one_thread  # noqa: F401
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.fit.plan import Narrowing, Plan
from blockfit.formats.folder import load, save
from blockfit.models.blocks import Blocks, block_modules, find_chain
from blockfit.models.forward import call, evaluating
from blockfit.models.head import primary_output
from blockfit.models.load import source_of
from blockfit.models.narrowed import narrowed
from blockfit.models.parts import Parts, find_parts
from blockfit.models.residual import find_writers
from blockfit.models.surgery import apply_plan, removed_plan
from blockfit.models.trace import trace

every_family = pytest.mark.parametrize("name", FAMILIES)

NO_MLP = {"timm-eva02"}
"""A norm stands between the activation and the second layer."""

NO_ATTENTION = {
    "timm-beit", "timm-beitv2-bare",  # biases beside the fused layer, which is not called
    "timm-cait",  # heads are mixed
    "torchvision-vit", "torchvision-vit-representation",  # nn.MultiheadAttention
    "open_clip", "open_clip-custom-text",
    "plain", "plain-no-prefix", "plain-in-place", "plain-nested", "plain-tuple", "plain-attributes",
}  # fmt: skip

NO_KEYS = {"timm-dinov3", "timm-eva02", "timm-pe-core", "dinov3", "dinov3-backbone"}
"""Rotary position embeddings turn queries and keys."""


def parts_of(model: nn.Module, blocks: Blocks, images: Tensor, index: int) -> Parts:
    with evaluating(model):
        seen = trace(model, blocks, images, range(blocks.depth))
        block, hidden = block_modules(model, blocks)[index], seen.states[index]
        run = seen.runner(block, index)
        return find_parts(block, index, find_writers(block, run, hidden), run, hidden)


def plan_for(family: Family, model: nn.Module, blocks: Blocks, share: float) -> Plan:
    """Every part of blocks 1 and 2 with a share of its dimensions."""
    cuts = [
        replace(part, kept=max(1, int(part.size * share)))
        for index in (1, 2)
        for part in parts_of(model, blocks, family.images(4), index).whole.values()
    ]
    return Plan((), tuple(cuts))


@torch.no_grad()
def output(model: nn.Module, images: Tensor) -> Tensor:
    return primary_output(call(model, images))


def masked(cut: Narrowing, size: int, device: Any = None) -> Tensor:
    """1 for the kept dimensions of every head, 0 for the others."""
    return (torch.arange(cut.size) < cut.kept).float().repeat(cut.heads)


def output_of_masked(model: nn.Module, blocks: Blocks, plan: Plan, images: Tensor) -> Tensor:
    """The whole model with what the plan leaves out set to zero by hooks."""
    model = copy.deepcopy(model)
    modules = block_modules(model, blocks)
    with ExitStack() as undo:
        for cut in plan.narrowings:
            mask, block = masked(cut, cut.size), modules[cut.block]
            if cut.reader:
                layer = block.get_submodule(cut.reader)
                undo.callback(
                    layer.register_forward_pre_hook(
                        lambda module, args, mask=mask: (args[0] * mask, *args[1:])
                    ).remove
                )
            else:
                for rows in cut.rows:
                    full = torch.ones(block.get_submodule(rows.layer).out_features)
                    full[rows.start : rows.start + len(mask)] = mask
                    undo.callback(
                        block.get_submodule(rows.layer)
                        .register_forward_hook(lambda module, args, out, full=full: out * full)
                        .remove
                    )
        return output(model, images)


@every_family
def test_the_parts_that_a_family_has_are_found(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    blocks = find_chain(model, family.images(2))
    parts = parts_of(model, blocks, family.images(4), 1)
    expected = {"mlp"} - ({"mlp"} if name in NO_MLP else set())
    if name not in NO_ATTENTION:
        expected |= {"values"} | (set() if name in NO_KEYS else {"keys"})
    assert set(parts.whole) == expected
    assert set(parts.refused) == {"mlp", "values", "keys"} - expected
    assert all(len(why) > 10 for why in parts.refused.values())


@every_family
def test_narrowed_blocks_compute_what_the_masked_model_does(name: str) -> None:
    family = FAMILIES[name]
    model, images = family.build(), family.images(3, seed=1)
    blocks = find_chain(model, images)
    plan = plan_for(family, model, blocks, 0.5)
    expected = output_of_masked(model, blocks, plan, images)
    assert (expected - output(model, images)).abs().max() > 1e-4  # something was cut
    with narrowed(model, blocks, plan.narrowings):
        torch.testing.assert_close(output(model, images), expected, rtol=1e-4, atol=1e-4)
    before = sum(p.numel() for p in model.parameters())
    apply_plan(model, blocks, plan, ())
    torch.testing.assert_close(output(model, images), expected, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in model.parameters()) < before
    assert removed_plan(model, blocks) == plan


@every_family
def test_narrowing_to_the_full_size_changes_no_bit(name: str) -> None:
    family = FAMILIES[name]
    model, images = family.build(), family.images(3, seed=1)
    blocks = find_chain(model, images)
    expected = output(model, images)
    apply_plan(model, blocks, plan_for(family, model, blocks, 1.0), ())
    assert torch.equal(output(model, images), expected)


@every_family
def test_a_narrowed_model_is_saved_and_loads_to_the_same_bits(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model, images = family.build(), family.images(3, seed=1)
    blocks, source = find_chain(model, images), source_of(model)
    plan = plan_for(family, model, blocks, 0.5)
    apply_plan(model, blocks, plan, ())
    save(tmp_path / "small", model, blocks, plan, source=source, report={})
    bare = family.build(seed=5) if source.library == "module" else None
    again = load(tmp_path / "small", model=bare)
    assert torch.equal(output(again, images), output(model, images))
    assert removed_plan(again, blocks) == plan


@pytest.mark.parametrize(
    "name", sorted(FAMILIES.keys() - {"plain-in-place"})
)  # which cannot train whole
def test_a_narrowed_model_trains_and_copies(name: str) -> None:
    family = FAMILIES[name]
    model, images = family.build(), family.images(3, seed=1)
    blocks = find_chain(model, images)
    plan = plan_for(family, model, blocks, 0.5)
    apply_plan(model, blocks, plan, ())
    other = copy.deepcopy(model)
    assert torch.equal(output(other, images), output(model, images))
    primary_output(call(model, images)).square().mean().backward()
    changed = [
        block_modules(model, blocks)[cut.block].get_submodule(rows.layer).weight
        for cut in plan.narrowings
        for rows in cut.rows
    ]
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in changed)


@pytest.mark.parametrize("name", ["timm-vit", "vit-classifier", "dinov2-classifier", "clip-vision"])
def test_a_copy_in_half_precision_computes_alike(name: str) -> None:
    family = FAMILIES[name]
    model, images = family.build(), family.images(3, seed=1)
    blocks = find_chain(model, images)
    apply_plan(model, blocks, plan_for(family, model, blocks, 0.5), ())
    expected = output(model, images)
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    found = output(half, images.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.05 * expected.norm()
    assert torch.equal(output(model, images), expected)


def test_layers_that_cannot_belong_to_a_part_are_refused() -> None:
    family = FAMILIES["timm-vit"]
    model, images = family.build(), family.images(3, seed=1)
    blocks, before = find_chain(model, images), output(model, images)
    cuts = {cut.part: cut for cut in plan_for(family, model, blocks, 0.5).narrowings}
    mlp, values, keys = (cuts[part] for part in ("mlp", "values", "keys"))
    for cut, why in (
        (replace(mlp, rows=()), "one run or more of rows, got 0"),
        (replace(values, rows=()), "need one run of rows, got 0"),
        (replace(keys, rows=keys.rows[:1]), "need two runs of rows, got 1"),
        (replace(keys, rows=keys.rows[:1] * 2), "rows of .* overlap"),
        (replace(mlp, reader=""), "needs the layer that reads it"),
        (replace(keys, reader=mlp.reader), "is read by no linear layer"),
        (replace(mlp, heads=2), "has no heads"),
        (replace(mlp, reader=mlp.rows[0].layer), "other than the reader"),
        (replace(values, reader=mlp.reader), "another of its parts uses"),
        (replace(values, rows=keys.rows[:1]), "has no rows"),
    ):
        others = tuple(one for one in cuts.values() if one.part != cut.part)
        with pytest.raises(BlockfitError, match=why):
            apply_plan(model, blocks, Plan((), (cut, *others)), ())
        assert torch.equal(output(model, images), before)


def test_a_plan_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    family = FAMILIES["vit-classifier"]
    model, images = family.build(), family.images(3, seed=1)
    blocks, before = find_chain(model, images), output(model, images)
    plan = plan_for(family, model, blocks, 0.5)
    wrong = replace(plan.narrowings[-1], size=24, kept=8)
    for cut, why in (
        (wrong, "does not fit the model"),
        (replace(plan.narrowings[-2], reader="nowhere"), "no layer 'nowhere'"),
    ):
        others = [c for c in plan.narrowings if (c.block, c.part) != (cut.block, cut.part)]
        with pytest.raises(BlockfitError, match=why):
            apply_plan(model, blocks, Plan((), (*others, cut)), ())
        assert torch.equal(output(model, images), before)
    apply_plan(model, blocks, plan, ())
    with pytest.raises(BlockfitError, match="cut already"):
        apply_plan(model, blocks, plan, ())
