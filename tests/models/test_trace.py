"""Traces: a batch as the blocks saw it, so that they can be run one by one again."""

from __future__ import annotations

import pytest
import torch
from families import DEPTH, FAMILIES, one_thread  # noqa: F401
from small import small_blocks, small_pictures, small_vit
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.models.blocks import block_modules, find_chain, record
from blockfit.models.forward import call
from blockfit.models.trace import check_finite, trace


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_blocks_run_one_by_one_give_the_states_of_the_whole_model(name: str) -> None:
    """Also blocks that are called with masks or keywords, or that write into their input."""
    family = FAMILIES[name]
    model, images = family.build(), family.images()
    blocks = find_chain(model)
    with record(model, blocks) as states:
        call(model, images)
    seen = trace(model, blocks, images, range(DEPTH + 1))
    kept = {boundary: state.clone() for boundary, state in seen.states.items()}
    for index, block in enumerate(block_modules(model, blocks)):
        torch.testing.assert_close(seen.run(block, index, seen.states[index]), states[index + 1])
    for boundary in range(DEPTH + 1):
        torch.testing.assert_close(seen.states[boundary], states[boundary])
        assert torch.equal(seen.states[boundary], kept[boundary])


def test_only_the_states_that_are_asked_for_are_kept() -> None:
    model = small_vit()
    seen = trace(model, small_blocks(model), small_pictures(3), [0, 4])
    assert set(seen.states) == {0, 4}
    assert not any(state.requires_grad for state in seen.states.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Spoil(nn.Module):
    """A block that breaks on the images with a bright first pixel."""

    def __init__(self, block: nn.Module, value: float) -> None:
        super().__init__()
        self.block, self.value = block, value

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x).clone()
        y[2, 1, 0] = self.value
        return y


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_block_and_the_image_of_a_nan_are_named(value: float) -> None:
    model = small_vit()
    blocks = small_blocks(model)
    inner = model.blocks[3].mlp
    model.blocks[3].mlp = Spoil(inner, value)
    with pytest.raises(
        BlockfitError, match=r"output of block 3 holds NaN or infinite .* for c.png"
    ):
        trace(model, blocks, small_pictures(4), [], names=["a.png", "b.png", "c.png", "d.png"])
    model.blocks[3].mlp = inner
    images = small_pictures(4)
    images[1, 0, 0, 0] = value
    with pytest.raises(
        BlockfitError, match=r"input of block 0 holds NaN .* for image 1 of the batch"
    ):
        trace(model, blocks, images, [])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_large_but_finite_states_pass() -> None:
    """Their sum overflows; they do not."""
    check_finite(torch.full((2, 3, 4), 3e38), 1, [])
    check_finite(torch.full((2, 3, 4), 1e300, dtype=torch.float64), 1, [])
    check_finite(torch.tensor([6e4, -6e4]).half().expand(2, 3, 2), 1, [])
