"""Sums and comparisons in float64, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def exact(value: Tensor) -> Tensor:
    """``value`` in float64; on the CPU where its device has none (Apple's MPS)."""
    return (value.cpu() if value.device.type == "mps" else value).to(torch.float64)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Products of float32 keep all of its bits: no TF32, no bfloat16 passes, no autocast.

    A model may run as its user likes; sums over its states may not. What was set is set again.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
