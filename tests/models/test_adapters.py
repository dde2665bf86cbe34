"""Case 19: models with LoRA that is not merged, in the forms in which people have it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import one_thread  # noqa: F401
from small import SmallViT, small_images, small_pictures, small_vit
from torch import Tensor, nn

import blockfit
from blockfit.models.adapters import adapters_in
from blockfit.models.blocks import block_modules, find_chain
from blockfit.models.residual import find_writers
from blockfit.models.trace import trace

RANK = 2


class Wrapped(nn.Module):
    """As PEFT's layers are: the layer, and two factors by the name of the adapter."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, RANK, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(RANK, base.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))

    def delta(self) -> Tensor:
        return self.lora_B["default"].weight @ self.lora_A["default"].weight


class Inherited(nn.Linear):
    """As loralib's are: a linear layer that adds its factors itself."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.lora_A = nn.Parameter(0.3 * torch.randn(RANK, base.in_features))
        self.lora_B = nn.Parameter(0.3 * torch.randn(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T

    def delta(self) -> Tensor:
        return self.lora_B @ self.lora_A


class Ours(nn.Module):
    """Somebody's own, by names that nobody knows."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.linear = base
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))

    def delta(self) -> Tensor:
        return self.up.weight @ self.down.weight


class OwnSum(nn.Linear):
    """A linear layer that adds something of its own, by no known name."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.more = nn.Parameter(0.2 * torch.randn(base.out_features, base.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.more.T

    def delta(self) -> Tensor:
        return self.more


def with_lora(kind: Callable[[nn.Linear], Any], seed: int = 3) -> tuple[SmallViT, SmallViT]:
    """A model with corrections at both writers of every block, and the same one merged."""
    model = small_vit(6)
    merged = copy.deepcopy(model)
    torch.manual_seed(seed)
    for block, plain in zip(model.blocks, merged.blocks, strict=True):
        for owner, name, target in (
            (block.attention, "out", plain.attention.out),
            (block.mlp, "narrow", plain.mlp.narrow),
        ):
            made = kind(getattr(owner, name))
            setattr(owner, name, made)
            with torch.no_grad():
                target.weight += made.delta()
    return model.eval(), merged.eval()


@pytest.mark.parametrize("kind", [Wrapped, Inherited])
def test_adapters_that_are_not_merged_are_refused_with_what_to_do(kind: Any) -> None:
    model, merged = with_lora(kind)
    torch.testing.assert_close(model(small_pictures(3)), merged(small_pictures(3)))
    assert len(adapters_in(model)) == 12
    assert adapters_in(merged) == []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(blockfit.BlockfitError) as refused:
        blockfit.compress(model, small_images(24), remove=1)
    assert "12 layers, the first is blocks.0.attention.out" in str(refused.value)
    assert "merge_and_unload()" in str(refused.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    blockfit.compress(merged, small_images(24), remove=1)


def test_a_small_model_with_adapters_is_not_saved_into_a_folder_that_nothing_loads(
    tmp_path: Path,
) -> None:
    small = blockfit.compress(small_vit(4), small_images(24), spans=["1:2"], final=0).model
    small.blocks[3].mlp.narrow = Wrapped(small.blocks[3].mlp.narrow)
    with pytest.raises(
        blockfit.BlockfitError, match=r"merge them first .* or the adapters by them"
    ):
        blockfit.save(small, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def writers_of(model: nn.Module) -> list[str]:
    blocks = find_chain(model, small_pictures(2))
    with torch.no_grad():
        seen = trace(model, blocks, small_pictures(4), [2])
    block = block_modules(model, blocks)[2]
    return [w.name for w in find_writers(block, seen.runner(block, 2), seen.states[2])]


def test_the_factors_of_an_unknown_correction_are_not_solved_in_its_layers_place() -> None:
    model, merged = with_lora(Ours)
    assert adapters_in(model) == []
    assert writers_of(model) == ["attention.out.linear", "mlp.narrow.linear"]
    found, expected = (
        blockfit.compress(m, small_images(48), spans=["3:5"], repair="mlp+attention")
        for m in (model, merged)
    )
    kl = [small.report["held_out"]["kl"] for small in (found, expected)]
    assert kl[0] == pytest.approx(kl[1], rel=0.05)


def test_a_layer_that_adds_something_of_its_own_to_its_product_is_no_writer() -> None:
    model, _ = with_lora(OwnSum)
    assert writers_of(model) == []


def test_a_weight_that_is_computed_from_others_is_not_solved() -> None:
    model = small_vit(6)
    for block in model.blocks:
        nn.utils.parametrizations.weight_norm(block.mlp.narrow)
    assert writers_of(model) == ["attention.out"]
    blockfit.compress(model, small_images(24), spans=["3:5"], repair="mlp+attention")
