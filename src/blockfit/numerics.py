"""Sums and comparisons in float64, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def exact(value: Tensor) -> Tensor:
    """``value`` in float64; on the CPU where its device has none (Apple's MPS)."""
    return (value.cpu() if value.device.type == "mps" else value).to(torch.float64)
