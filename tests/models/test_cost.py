"""What a model costs, against sums done by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from safetensors.torch import save_file
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.models.cost import (
    Timing,
    alternate,
    first_images,
    flops,
    parameters,
    peak_memory,
    size_bytes,
    speedup,
)
from blockfit.models.demo import DigitsViT, demo_arguments


def vit_flops(tokens: int, width: int, hidden: int, depth: int) -> int:
    """Two operations per multiplication of the matrix products of ``depth`` blocks."""
    projections = 4 * tokens * width * width
    attention = 2 * tokens * tokens * width  # scores, and their mix of the values
    mlp = 2 * tokens * width * hidden
    return 2 * depth * (projections + attention + mlp)


def demo_flops() -> int:
    patches, head = 16 * 64 * (1 * 2 * 2), 64 * 10
    return 2 * (patches + head) + vit_flops(tokens=17, width=64, hidden=256, depth=12)


def test_flops_of_a_transformer_are_those_of_its_matrix_products() -> None:
    model = DigitsViT(**demo_arguments())
    assert flops(model, torch.randn(1, 1, 8, 8)) == demo_flops()


def test_flops_are_those_of_one_image_whatever_the_batch() -> None:
    model = DigitsViT(**demo_arguments())
    assert flops(model, torch.randn(5, 1, 8, 8)) == demo_flops()


def test_flops_are_the_same_on_the_meta_device_and_in_half_precision() -> None:
    model = DigitsViT(**demo_arguments())
    images = torch.randn(2, 1, 8, 8)
    assert flops(copy.deepcopy(model).to("meta"), images) == demo_flops()
    assert flops(model.half(), images) == demo_flops()


@pytest.mark.parametrize("name", ["torchvision-vit", "plain"])
def test_the_fused_attention_of_torch_is_counted(name: str) -> None:
    """``nn.MultiheadAttention`` in eval mode runs as one kernel that the counter does not know."""
    family = FAMILIES[name]
    stem, head = 2 * 16 * 32 * (3 * 8 * 8), 2 * 32 * 5
    expected = stem + head + vit_flops(tokens=17, width=32, hidden=64, depth=4)
    assert flops(family.build(), family.images()) == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_eager_attention_and_torchs_own_count_alike() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8, num_labels=5,
    )  # fmt: skip
    counted = []
    for attention in ("eager", "sdpa"):
        config._attn_implementation = attention
        model = transformers.ViTForImageClassification(config)
        counted.append(flops(model, {"pixel_values": torch.randn(2, 3, 32, 32)}))
    stem, head = 2 * 16 * 32 * (3 * 8 * 8), 2 * 32 * 5
    expected = stem + head + vit_flops(tokens=17, width=32, hidden=64, depth=4)
    assert counted == [expected, expected]


class Pooled(nn.Module):
    """A query that is learned goes into a layer of its own, as a view of its parameter."""

    def __init__(self, held: str) -> None:
        super().__init__()
        query = torch.ones(1, 1, 4, requires_grad=True)
        if held == "parameter":
            self.query = nn.Parameter(query.detach())
        elif held == "buffer":
            self.register_buffer("query", query)
        else:
            self.query = query
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(self.query.expand(len(x), -1, -1)) + x)


@pytest.mark.parametrize("held", ["parameter", "buffer", "attribute"])
def test_a_view_of_a_weight_that_is_handed_to_a_layer_is_counted(held: str) -> None:
    """Case 2: the counter follows gradients, and such a view asks for some but has none."""
    model = Pooled(held)
    assert flops(model, torch.ones(2, 5, 4)) == 2 * (1 * 4 * 4 + 5 * 4 * 3)
    assert model.query.requires_grad
    assert all(p.requires_grad for p in model.parameters())


def test_tied_parameters_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert parameters(model) == 40
    model[1].weight = model[0].weight
    assert parameters(model) == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_size_is_that_of_the_file(tmp_path: Path, dtype: torch.dtype) -> None:
    model = FAMILIES["timm-vit"].build().to(dtype)
    model.register_buffer("count", torch.tensor(3))
    save_file(model.state_dict(), tmp_path / "w.safetensors", metadata={"format": "blockfit"})
    assert size_bytes(model) == (tmp_path / "w.safetensors").stat().st_size


class Marked(nn.Module):
    """Notes every call; sleeps by counting."""

    def __init__(self, name: str, calls: list[str]) -> None:
        super().__init__()
        self.name, self.calls = name, calls
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.calls.append(self.name)
        return x * self.weight


def test_models_are_timed_in_turn_and_left_as_they_were() -> None:
    calls: list[str] = []
    models = {name: Marked(name, calls) for name in ("a", "b")}
    times = alternate(models, torch.randn(4, 3), rounds=3)
    assert calls == ["a", "b"] * 5  # two of them to warm up
    assert all(len(t.seconds) == 3 and t.images == 4 for t in times.values())
    assert times["a"].threads == torch.get_num_threads()
    assert all(model.training for model in models.values())
    with pytest.raises(BlockfitError, match="at least 2 rounds"):
        alternate(models, torch.randn(4, 3), rounds=1)


def test_a_timing_gives_median_spread_and_throughput() -> None:
    timing = Timing((0.2, 0.1, 0.4, 0.3, 0.9), images=6, threads=2, device="x")
    assert timing.median_ms == pytest.approx(300)
    assert timing.spread_ms == pytest.approx(200)
    assert timing.images_per_second == pytest.approx(20)
    assert timing.to_json() == {
        "median": pytest.approx(300), "spread": pytest.approx(200),
        "images": 6, "runs": 5, "threads": 2, "device": "x",
    }  # fmt: skip


def test_a_speed_up_compares_what_was_measured_together() -> None:
    """The machine slows down threefold half way; the ratio within each round does not change."""
    before = Timing((2.0, 2.0, 6.0, 6.0), images=1, threads=1, device="x")
    after = Timing((1.0, 1.0, 3.0, 3.0), images=1, threads=1, device="x")
    assert speedup(before, after) == 2


@pytest.mark.skipif(not torch.profiler.kineto_available(), reason="torch without its profiler")
def test_peak_memory_is_weights_inputs_and_the_largest_moment(
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = nn.Sequential(
        nn.Linear(16, 1000, bias=False), nn.ReLU(), nn.Linear(1000, 4, bias=False)
    )
    floats = 16 * 1000 + 1000 * 4 + 8 * 16 + 2 * 8 * 1000  # before and after the ReLU
    # The matrix library may take a little room of its own, depending on what ran before.
    assert 4 * floats <= peak_memory(model, torch.randn(8, 16)) <= 1.05 * 4 * floats
    # The matrix library may take a little room of its own, depending on what ran before.
    assert 4 * floats <= peak_memory(model, torch.randn(8, 16)) <= 1.05 * 4 * floats
    assert capfd.readouterr() == ("", "")


def test_peak_memory_of_an_unknown_device_is_none() -> None:
    assert peak_memory(nn.Linear(2, 2).to("meta"), torch.randn(1, 2)) is None


def test_the_first_images_of_any_batch() -> None:
    batch: Any = {"pixel_values": torch.randn(5, 3), "flag": True}
    assert len(first_images(batch["pixel_values"], 2)) == 2
    taken: Any = first_images(batch, 2)
    assert taken["pixel_values"].shape == (2, 3)
    assert taken["flag"] is True
