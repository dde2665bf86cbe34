"""Where the real model and images of the benchmarks lie: in ../shared, or in BLOCKFIT_SHARED.

With BLOCKFIT_ONEDNN=1 linear layers go through torch's oneDNN operator, in float32 as well: on AMD
processors a forward pass then takes 0.55 times as long (logits differ by some 5e-6 on the real
model), and so does a step of training. For tables of quality; those of cost and speed are of plain
torch.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

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


class OneDnnLinear(torch.autograd.Function):
    """A linear layer by oneDNN, whose operator has no derivative of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return one_dnn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows, inputs = grad.flatten(0, -2), x.flatten(0, -2)
        return (
            one_dnn(grad, weight.T.contiguous(), None) if of_x else None,
            one_dnn(rows.T.contiguous(), inputs.T.contiguous(), None) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def one_dnn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    done: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return done


def faster_linear() -> None:
    """Linear layers of float32 on the CPU by oneDNN, with their gradients.

    Where something watches the operations, such as a counter of FLOPs, they stay what they are.
    """
    usual = torch.nn.functional.linear

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        watched = torch._C._len_torch_dispatch_stack() > 0
        if watched or input.dtype != torch.float32 or input.device.type != "cpu":
            return usual(input, weight, bias)
        if torch.is_grad_enabled() and any(
            value is not None and value.requires_grad for value in (input, weight, bias)
        ):
            return OneDnnLinear.apply(input, weight, bias)
        return one_dnn(input, weight, bias)

    torch.nn.functional.linear = linear


if os.environ.get("BLOCKFIT_ONEDNN") == "1":
    faster_linear()
