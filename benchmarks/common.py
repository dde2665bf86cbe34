"""Where the real model and images of the benchmarks lie: in ../shared, or in BLOCKFIT_SHARED.

With BLOCKFIT_ONEDNN=1 linear layers go through torch's oneDNN operator, in float32 as well: on AMD
processors a forward pass then takes 0.55 times as long (logits differ by some 5e-6 on the real
model). For tables of quality; those of cost and speed are of plain torch.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("BLOCKFIT_SHARED") or ROOT.parent / "shared")
MODEL = str(SHARED / "models" / "dinov2-small-cifar10")
TRAIN = str(SHARED / "data" / "cifar10" / "train.parquet")
TEST = str(SHARED / "data" / "cifar10" / "test.parquet")


def say(line: str) -> None:
    """One line, at once."""
    print(line, flush=True)


def faster_linear() -> None:
    """Linear layers of float32 on the CPU, where no gradient is asked for, by oneDNN.

    Where something watches the operations, such as a counter of FLOPs, they stay what they are.
    """
    usual = torch.nn.functional.linear

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        plain = torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack() > 0
        if plain or input.dtype != torch.float32 or input.device.type != "cpu":
            return usual(input, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")

    torch.nn.functional.linear = linear


if os.environ.get("BLOCKFIT_ONEDNN") == "1":
    faster_linear()
