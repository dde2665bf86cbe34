"""What hierarchical and hybrid models pass: found, narrowed, solved, saved, exported."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import one_thread  # noqa: F401
from families_stages import STAGED, _timm
from torch import Tensor, nn

import blockfit
from blockfit.errors import BlockfitError
from blockfit.fit.plan import Narrowing, Plan
from blockfit.formats.folder import load, save
from blockfit.models.blocks import Blocks, block_modules
from blockfit.models.forward import call, evaluating
from blockfit.models.head import primary_output
from blockfit.models.load import source_of
from blockfit.models.probe import Probe
from blockfit.models.stages import find_blocks
from blockfit.models.surgery import apply_plan
from blockfit.models.trace import trace
from blockfit.progress import silent
from blockfit.search.solve import Options, _Walk
from blockfit.search.states import TracedImages

every_family = pytest.mark.parametrize("name", STAGED)


def found(name: str) -> tuple[nn.Module, Tensor, Blocks]:
    family = STAGED[name].family
    model, images = family.build(), family.images(4)
    return model, images, find_blocks(model, images)


def plan_for(model: nn.Module, blocks: Blocks, images: Tensor, share: float = 0.5) -> Plan:
    """Every part of every block with a share of its dimensions."""
    with evaluating(model):
        probe = Probe(model, blocks, images)
        parts = [part for i in range(blocks.depth) for part in probe.parts(i).whole.values()]
    return Plan((), tuple(replace(part, kept=max(1, int(part.size * share))) for part in parts))


@torch.no_grad()
def output(model: nn.Module, images: Tensor) -> Tensor:
    return primary_output(call(model, images))


def output_of_masked(model: nn.Module, blocks: Blocks, plan: Plan, images: Tensor) -> Tensor:
    """The whole model with what the plan leaves out set to zero by hooks."""
    modules = block_modules(model, blocks)

    def mask(cut: Narrowing) -> Tensor:
        return (torch.arange(cut.size) < cut.kept).float().repeat(cut.heads)

    def on_inputs(factors: Tensor) -> Any:
        return lambda module, args: (args[0] * factors, *args[1:])

    def on_outputs(factors: Tensor) -> Any:
        return lambda module, args, out: out * factors

    with ExitStack() as undo:
        for cut in plan.narrowings:
            block, factors = modules[cut.block], mask(cut)
            if cut.reader:
                layer = block.get_submodule(cut.reader)
                undo.callback(layer.register_forward_pre_hook(on_inputs(factors)).remove)
                continue
            for rows in cut.rows:
                layer = block.get_submodule(rows.layer)
                full = torch.ones(layer.out_features)
                full[rows.start : rows.start + len(factors)] = factors
                undo.callback(layer.register_forward_hook(on_outputs(full)).remove)
        return output(model, images)


@every_family
def test_the_blocks_and_their_parts_are_found(name: str) -> None:
    model, images, blocks = found(name)
    assert (blocks.depth, len(blocks.stages)) == (STAGED[name].depth, STAGED[name].stages)
    assert Blocks.from_json(blocks.to_json()) == blocks
    parts = {cut.part for cut in plan_for(model, blocks, images).narrowings}
    assert parts == STAGED[name].parts


@every_family
def test_narrowed_blocks_compute_what_the_masked_model_does(name: str, tmp_path: Path) -> None:
    model, images, blocks = found(name)
    source = source_of(model)
    plan = plan_for(model, blocks, images)
    expected, size = output_of_masked(model, blocks, plan, images), output(model, images)
    before = sum(parameter.numel() for parameter in model.parameters())
    apply_plan(model, blocks, plan, ())
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    assert (output(model, images) - expected).abs().max() < 1e-4 * size.abs().max()
    save(tmp_path / "small", model, blocks, plan, source=source, report={})
    bare = STAGED[name].family.build(seed=5) if source.library == "module" else None
    again = load(tmp_path / "small", model=bare)
    assert torch.equal(output(again, images), output(model, images))


@every_family
def test_a_family_is_compressed_saved_and_loaded_to_the_same_bits(
    name: str, tmp_path: Path
) -> None:
    family = STAGED[name].family
    model, images = family.build(), family.images(16, seed=1)
    before = sum(parameter.numel() for parameter in model.parameters())
    batches = [images[:8], images[8:]]
    result = blockfit.compress(model, blockfit.images(batches), params=STAGED[name].kept)
    after = sum(parameter.numel() for parameter in result.model.parameters())
    assert after <= STAGED[name].kept * before
    assert not result.plan.replacements
    result.save(tmp_path / "small")
    bare = family.build(seed=5) if source_of(model).library == "module" else None
    again = blockfit.load(tmp_path / "small", model=bare)
    assert torch.equal(output(again, images), output(result.model, images))


@pytest.mark.parametrize(
    "name",
    [
        "timm-swin-padded", "timm-swin-v2", "timm-convnext", "timm-hiera", "timm-pvt-v2",
        "timm-davit", "swin-v2", "segformer", "detr", "maskformer", "mask2former",
    ],
)  # fmt: skip
def test_the_states_of_the_walk_are_those_of_the_solved_model(name: str) -> None:
    family = STAGED[name].family
    model, images = family.build(), family.images(8, seed=1)
    blocks = find_blocks(model, images)
    traced = TracedImages.of(model, blocks, blockfit.images([images[:4], images[4:]]))
    plan = plan_for(model, blocks, images)
    with evaluating(model), torch.no_grad():
        walk = _Walk(traced, plan, Options())
        solution = walk.solution(silent)
    small = copy.deepcopy(model)
    solution.apply(small, blocks)
    with evaluating(small):
        last = trace(small, blocks, images[4:], [blocks.depth]).states[blocks.depth]
    assert walk.hidden is not None
    assert torch.allclose(walk.hidden[1], last, atol=1e-3 * float(last.abs().max()))
    whole, cut = output(model, images), copy.deepcopy(model)
    apply_plan(cut, blocks, plan, ())
    assert (output(small, images) - whole).norm() < (output(cut, images) - whole).norm()


@pytest.mark.parametrize("name", ["timm-swin", "timm-convnext"])
def test_onnxruntime_runs_narrowed_stages(name: str, tmp_path: Path) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    model, images, blocks = found(name)
    apply_plan(model, blocks, plan_for(model, blocks, images), ())
    pictures = blockfit.images([images])
    done = blockfit.export_onnx(model, tmp_path / "small.onnx", images=pictures)
    assert done.parity.max_abs_error < 1e-4 * done.parity.largest_value


def test_states_that_are_not_kept_are_computed_again() -> None:
    model, images, blocks = found("timm-swin")
    batches = blockfit.images([images])
    kept = TracedImages.of(model, blocks, batches)
    bare = TracedImages.of(model, blocks, batches, limit_bytes=0)
    assert not bare.complete
    with evaluating(model), torch.no_grad():
        for index in range(blocks.depth):
            assert torch.equal(bare.state(0, index), kept.state(0, index))
            assert torch.equal(bare.returned(0, index), kept.returned(0, index))


def test_blocks_in_stages_are_not_removed_and_that_is_said_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(*args: Any, **how: Any) -> Any:
        raise AssertionError("the original is run on all images")

    monkeypatch.setattr("blockfit.calibration.Session", run)
    model, images, blocks = found("timm-swin")
    pictures = blockfit.images([images, images, images])
    chain = "needs one chain.*are in 2 stages.*no block removed"
    for options, why in (
        ({"remove": 1}, f"remove= {chain}"),
        ({"spans": ["0:1"]}, chain),
        ({"params": 0.8, "cuts": "blocks"}, chain),
        ({"params": 0.8, "recipe": "paper"}, chain),
        ({"params": 0.8, "uniform": True}, "uniform= gives the MLPs of all blocks one width"),
    ):
        with pytest.raises(BlockfitError, match=why):
            blockfit.compress(model, pictures, **options)
    with pytest.raises(BlockfitError, match=chain):
        blockfit.sweep(model, pictures, tmp_path / "sweep", cuts="blocks")
    with pytest.raises(BlockfitError, match="'layers' with 2 modules is no list"):
        blockfit.find_blocks(model, images, "layers")
    assert find_blocks(model, images) == blocks


@pytest.mark.parametrize("recipe", ["corp", "vbp"])
def test_published_methods_cut_the_mlps_of_stages_alike(recipe: str) -> None:
    family = STAGED["timm-convnext"].family
    model, images = family.build(), family.images(16, seed=1)
    result = blockfit.compress(model, blockfit.images([images]), params=0.8, recipe=recipe)
    shares = {round(cut.kept / cut.size, 1) for cut in result.plan.narrowings}
    assert len(result.plan.narrowings) == 5
    assert len(shares) == 1


def test_a_response_norm_between_the_layers_of_an_mlp_is_a_reason() -> None:
    family = _timm("convnextv2_atto", depths=(1, 1, 2, 1), dims=(16, 16, 32, 32), conv_mlp=False)
    pictures = blockfit.images([family.images(16)])
    with pytest.raises(BlockfitError, match=r"nothing in this model can be cut.*one by one"):
        blockfit.compress(family.build(), pictures, params=0.7)


def test_a_stage_of_several_blocks_between_single_ones_is_no_chain() -> None:
    blocks = found("timm-pvt-v2")[2]
    assert [len(stage) for stage in blocks.stages] == [1, 1, 2, 1]
