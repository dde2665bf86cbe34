"""Case 20: what works on a compressed model; every row of docs/works-on-the-result.md is a test."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, PlainBlock, PlainViT, one_thread  # noqa: F401
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.fit.maps import empty_map
from blockfit.fit.plan import Narrowing, Plan
from blockfit.models.blocks import Blocks, block_modules, find_chain
from blockfit.models.forward import evaluating
from blockfit.models.probe import Probe
from blockfit.models.surgery import apply_plan, is_replaced

PAGE = Path(__file__).resolve().parents[2] / "docs" / "works-on-the-result.md"
NAMES = ["timm-vit", "dinov2-classifier", "torchvision-vit", "plain"]
every_library = pytest.mark.parametrize("name", NAMES)


def small(name: str, model: nn.Module | None = None) -> tuple[Any, Tensor, Any]:
    """A tiny model without blocks 1 and 2, the others narrowed; images, what it says of them."""
    model = FAMILIES[name].build() if model is None else model
    images, blocks = FAMILIES[name].images(), find_chain(model)
    plan = Plan(Plan.of(["1:3"], "affine").replacements, tuple(halves(model, blocks, images)))
    maps = [empty_map(entry, blocks.width, blocks.prefix_tokens) for entry in plan]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in maps[0].parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    apply_plan(model, blocks, plan, maps)
    return model, images, logits(model, images).detach()


def halves(model: nn.Module, blocks: Blocks, images: Tensor) -> list[Narrowing]:
    """Every part of blocks 0 and 3 that can be narrowed, to half of its size."""
    with evaluating(model), torch.no_grad():
        probe = Probe(model, blocks, images)
        parts = [part for index in (0, 3) for part in probe.parts(index).whole.values()]
    assert {"mlp"} <= {part.part for part in parts}
    return [replace(part, kept=part.size // 2) for part in parts]


def logits(model: Any, images: Tensor) -> Tensor:
    out = model(images)
    return out if isinstance(out, Tensor) else out["logits"]


def assert_says(model: Any, images: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(logits(model, images).detach(), expected, rtol=1e-4, atol=1e-5)


@every_library
def test_deepcopy(name: str) -> None:
    model, images, expected = small(name)
    assert_says(copy.deepcopy(model), images, expected)


@every_library
def test_pickle(name: str) -> None:
    model, images, expected = small(name)
    assert_says(pickle.loads(pickle.dumps(model)), images, expected)  # noqa: S301


@every_library
def test_state_dict(name: str) -> None:
    model, images, expected = small(name)
    other, _, before = small(name, FAMILIES[name].build(seed=1))
    assert not torch.allclose(before, expected)
    other.load_state_dict(model.state_dict(), strict=True)
    assert_says(other, images, expected)


@every_library
def test_data_parallel(name: str) -> None:
    model, images, expected = small(name)
    assert_says(nn.DataParallel(model), images, expected)


@every_library
def test_half_and_device(name: str) -> None:
    model, images, expected = small(name)
    found = logits(model.to("cpu").bfloat16(), images.bfloat16())
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.5)
    assert {p.device.type for p in model.to("meta").parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["timm-vit", "dinov2-classifier"])
def test_gradient_checkpointing(name: str) -> None:
    model, images, _ = small(name)
    model.train()
    logits(model, images).square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    if name == "timm-vit":
        model.set_grad_checkpointing(True)
    else:
        model.gradient_checkpointing_enable()
    logits(model, images).square().sum().backward()
    again = [p.grad for p in model.parameters() if p.grad is not None]
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-4)


@every_library
def test_forward_hooks(name: str) -> None:
    model, images, _ = small(name)
    seen: list[int] = []
    for index, block in enumerate(block_modules(model, find_chain(model))):
        block.register_forward_hook(lambda *_, index=index: seen.append(index))
    logits(model, images)
    assert seen == [0, 1, 2, 3]


@every_library
def test_torch_export(name: str) -> None:
    model, images, expected = small(name)
    assert_says(torch.export.export(model, (images,)).module(), images, expected)


@pytest.mark.parametrize("name", ["timm-vit", "dinov2-classifier", "plain"])
def test_torch_jit_trace(name: str) -> None:
    model, images, expected = small(name)
    traced = torch.jit.trace(model, images, strict=False, check_trace=False)
    assert_says(traced, images, expected)


def test_torch_jit_script() -> None:
    model, _, _ = small("timm-vit")
    with pytest.raises(Exception, match="variable number of arguments"):
        torch.jit.script(model)


def test_symbolic_trace() -> None:
    model, images, expected = small("timm-vit")
    assert_says(torch.fx.symbolic_trace(model), images, expected)


def test_feature_extraction() -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, images, _ = small("torchvision-vit")
    layer, last = "encoder.layers.encoder_layer_", "encoder.layers.encoder_layer_3.add_1"
    states: dict[int, Tensor] = {}
    for index in (2, 3):
        block = model.get_submodule(f"{layer}{index}")
        block.register_forward_hook(lambda m, a, out, index=index: states.update({index: out}))
    model(images)
    expected = dict(states)
    found = extraction.create_feature_extractor(model, [f"{layer}2.map.linear", last])(images)
    torch.testing.assert_close(found[f"{layer}2.map.linear"], expected[2])
    torch.testing.assert_close(found[last], expected[3])
    with pytest.raises(ValueError, match="not present"):
        extraction.create_feature_extractor(model, [f"{layer}1.add_1"])


class Counting(PlainBlock):
    """A tool's own block: the same, and it notes that it ran."""

    ran: list[int] = []  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        self.ran.append(x.shape[1])
        return super().forward(x)


def test_a_class_of_its_own_for_every_block() -> None:
    model, images, expected = small("plain")
    for module in model.modules():
        if isinstance(module, PlainBlock):
            module.__class__ = Counting
    Counting.ran.clear()
    assert_says(model, images, expected)
    assert len(Counting.ran) == 2
    assert [is_replaced(b) for b in block_modules(model, find_chain(model))] == [
        False, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize("called_before", [False, True])
def test_attention_maps(called_before: bool) -> None:
    """Case 17: one entry per block, None where a block went; the maps are those of their blocks."""
    model = FAMILIES["dinov2-classifier"].build()
    model.set_attn_implementation("eager")
    images = FAMILIES["dinov2-classifier"].images()
    if called_before:
        model(images, output_attentions=True)
    model, images, _ = small("dinov2-classifier", model)
    seen: dict[int, Tensor] = {}
    for index, block in enumerate(block_modules(model, find_chain(model))):
        for path, part in block.named_modules():
            if path == "attention.attention" or path == "attention":
                part.register_forward_hook(
                    lambda m, a, out, index=index: seen.update({index: out[1]})
                )
    for twin in (model, copy.deepcopy(model)):
        out = twin(images, output_attentions=True, output_hidden_states=True)
        assert [m is None for m in out.attentions] == [False, True, True, False]
        assert len(out.hidden_states) == 5
        if twin is model:
            assert torch.equal(out.attentions[3], seen[3])
    bare = model(images, output_attentions=True, return_dict=False)[-1]
    assert [m is None for m in bare] == [False, True, True, False]


class Dino(PlainViT):
    """As DINO's code asks its last block for the attention map."""

    def last_attention(self, images: Tensor) -> Any:
        hidden = self.tokens(images)
        for block in self.transformer[:2]:
            hidden = block(hidden)
        return self.transformer[2](hidden, return_attention=True)


def test_return_attention() -> None:
    """Case 17: a block that is gone has no map, and does not return its state instead."""
    model, images, _ = small("plain", Dino().eval())
    with pytest.raises(BlockfitError, match=r"removed \(1:3 affine\) and has no attention map"):
        model.last_attention(images)


def test_every_row_of_the_page_is_a_test_of_this_file() -> None:
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")][1:]
    named = [re.findall(r"`(test_\w+)`", row)[-1] for row in rows]
    here: list[Callable[..., Any]] = [v for k, v in globals().items() if k.startswith("test_")]
    tests = {test.__name__ for test in here} - {
        test_every_row_of_the_page_is_a_test_of_this_file.__name__
    }
    assert set(named) - {"test_compiles_into_one_graph"} == tests
