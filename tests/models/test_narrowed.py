"""The layers that stand in the place of those of narrowed heads, by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blockfit.models.narrowed import HeadColumns, HeadRows


@pytest.mark.parametrize("segments", [[(2, 3, 4)], [(2, 3, 4), (2, 4, 4), (2, 1, 4)]])
def test_torch_jit_script_of_the_layers_in_place_of_narrowed_ones(
    segments: list[tuple[int, int, int]],
) -> None:
    rows = sum(heads * kept for heads, kept, _ in segments)
    weight, states = torch.randn(rows, 5), torch.randn(2, 3, 5)
    layer = HeadRows(nn.Parameter(weight), None, segments)
    kept = torch.cat([torch.arange(size) < k for heads, k, size in segments for _ in range(heads)])
    full = torch.zeros(len(kept), 5)
    full[kept] = weight
    torch.testing.assert_close(torch.jit.script(layer)(states), states @ full.T)


def test_torch_jit_script_of_a_layer_that_reads_narrowed_heads() -> None:
    layer = HeadColumns(nn.Parameter(torch.randn(5, 6)), None, (2, 3, 4))
    states = torch.randn(2, 7, 8)
    read = states[..., [0, 1, 2, 4, 5, 6]]
    torch.testing.assert_close(torch.jit.script(layer)(states), read @ layer.weight.T)
