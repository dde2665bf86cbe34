"""Weights in int8: which there are, what they hold, and torchao's tensors made of it.

An int8 weight is a matrix of integers and a factor per row (output channel), symmetric. Only
torchao knows how to compute with them; a file holds the integers and the factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from blockfit.errors import BlockfitError, need
from blockfit.fit.maps import Linear
from blockfit.models.blocks import Blocks, block_modules
from blockfit.models.forward import Batch, call, evaluating
from blockfit.models.tensors import (
    INT8_KINDS,
    int8_kind,
    named_tensors,
    on_grid,
    tied,
    worth_a_grid,
)


def targets(model: nn.Module, blocks: Blocks, inputs: Batch) -> dict[str, nn.Module]:
    """The linear layers and linear maps at the model's blocks that are called, by name.

    Fused kernels and some attentions read a layer's weight without calling it; those stay.

    Args:
        inputs: a batch, run once to see what is called.
    """
    inside = {id(part) for block in block_modules(model, blocks) for part in block.modules()}
    called: set[int] = set()
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Linear) and id(module) in inside
    }
    with ExitStack() as undo:
        for module in found.values():
            hook = module.register_forward_hook(lambda module, *_: called.add(id(module)))
            undo.callback(hook.remove)
        undo.enter_context(evaluating(model))
        undo.enter_context(torch.no_grad())
        call(model, inputs)
    return {name: module for name, module in found.items() if id(module) in called}


def to_int8(model: nn.Module, blocks: Blocks, kind: str, inputs: Batch) -> list[str]:
    """Bring the weights of ``targets`` to int8 in place; returns their names.

    Raises:
        BlockfitError: before anything is changed, where torchao is not installed, the kind is
            unknown, or there is nothing to bring to int8.
    """
    check_kind(kind)
    torchao = _torchao()
    check_no_int8(model, "rounded again")
    found = targets(model, blocks, inputs)
    if not found:
        raise BlockfitError("the blocks call no linear layers that could be brought to int8")
    chosen = {id(module) for module in found.values()}
    config = {
        "weight-only": torchao.Int8WeightOnlyConfig,
        "dynamic": torchao.Int8DynamicActivationInt8WeightConfig,
    }[kind](set_inductor_config=False)
    torchao.quantize_(model, config, filter_fn=lambda module, _: id(module) in chosen)
    return [f"{name}.weight" for name in found]


@torch.no_grad()
def round_embeddings(model: nn.Module, blocks: Blocks) -> list[str]:
    """Round patch, position and token embeddings to int8, in place; returns their names.

    They stay ordinary numbers, which any code computes with, and a file holds them in a byte each:
    whole multiples of one factor per output channel, token or position. So are convolutions
    between stages. Linear layers (the head), tensors that share memory, and small ones stay.
    """
    tensors = named_tensors(model)
    shared = tied(tensors)
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    kept = linear | {
        id(value) for block in block_modules(model, blocks) for value in block.parameters()
    }
    kept |= {id(tensors[name]) for name in (*shared, *shared.values())}
    found = {
        name: value
        for name, value in model.named_parameters()
        if id(value) not in kept
        and value.dtype == torch.float32
        and worth_a_grid(value)
        and bool(value.isfinite().all())
    }
    for value in found.values():
        value.copy_(on_grid(value))
    return list(found)


def put_int8(model: nn.Module, parts: Mapping[str, tuple[Tensor, Tensor]], kind: str) -> None:
    """Put int8 weights in the place of ordinary ones.

    ``weight-only`` weights stay ordinary numbers where torchao is not installed: the outputs are
    the same but for rounding.

    Raises:
        BlockfitError: where ``dynamic`` weights need torchao and it is not installed.
    """
    try:
        torchao = _torchao()
    except BlockfitError:
        if kind == "dynamic":
            raise
        return
    computing = _by_token() if kind == "dynamic" else None
    for name, (integers, factors) in parts.items():
        path, _, key = name.rpartition(".")
        weight = torchao.Int8Tensor(
            integers,
            factors,
            [1, integers.shape[1]],
            factors.dtype,
            zero_point=torch.zeros_like(factors, dtype=torch.int8),
            act_quant_kwargs=computing,
        )
        model.get_submodule(path)._parameters[key] = nn.Parameter(weight, requires_grad=False)


def _by_token() -> Any:
    """torchao's word for activations that are brought to int8 token by token, symmetric."""
    from torchao.quantization import PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import (
        QuantizeTensorToInt8Kwargs,
    )

    return QuantizeTensorToInt8Kwargs(granularity=PerRow())


def check_no_int8(model: nn.Module, purpose: str) -> None:
    """Refuse a model in int8, whoever rounded it, for what needs ordinary weights.

    torch's own quantized layers pack their weights; others keep parameters of a byte or less.
    """
    weights = list(model.parameters())
    small = any(w.dtype.itemsize == 1 and w.dtype != torch.bool for w in weights)
    packed = any(hasattr(module, "_packed_params") for module in model.modules())
    if small or packed or int8_kind(weights) is not None:
        raise BlockfitError(
            f"the model's weights are in int8 already and cannot be {purpose}; give the model "
            "before that step"
        )


def check_kind(kind: str) -> None:
    """Refuse an unknown kind."""
    if kind not in INT8_KINDS:
        raise BlockfitError(f"unknown int8 kind {kind!r}; choose {' or '.join(INT8_KINDS)}")


def _torchao() -> Any:
    return need("torchao.quantization", "quantize", "int8")
