"""Sums in float64 on devices that have it and on those that do not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from blockfit.fit.numerics import exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_exact_widens_without_changing_a_value(dtype: torch.dtype) -> None:
    value = torch.linspace(-3, 3, 7, dtype=dtype)
    found = exact(value)
    assert found.dtype == torch.float64
    assert torch.equal(found.to(dtype), value)


def test_exact_leaves_a_device_without_float64_before_it_widens() -> None:
    calls: list[str] = []

    class OnMps:
        device = SimpleNamespace(type="mps")

        def cpu(self) -> torch.Tensor:
            calls.append("cpu")
            return torch.ones(2)

        def to(self, dtype: torch.dtype) -> torch.Tensor:
            raise TypeError(f"MPS has no {dtype}")

    assert exact(cast(Any, OnMps())).dtype == torch.float64
    assert calls == ["cpu"]
