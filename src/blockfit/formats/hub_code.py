"""The code that goes into a Hub folder: read there as text, word for word, without blockfit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from blockfit.fit.maps import Identity, Linear, LowRank, PerTokenType, Scale
from blockfit.models.narrowed import HeadColumns, HeadRows


def make_map(how: Mapping[str, Any], width: int, prefix_tokens: int) -> nn.Module:
    """The module of one map, before its weights are loaded."""

    def one() -> nn.Module:
        kind = how["map"]
        if kind == "scale":
            return Scale(width)
        if kind == "low-rank":
            return LowRank(width, how["rank"])
        if kind in ("linear", "affine", "orthogonal"):
            return Linear(width, bias=kind != "linear")
        return Identity()

    return PerTokenType(one(), one(), prefix_tokens) if how["per_token_type"] else one()


def stand_in(
    block: nn.Module, map_module: nn.Module, input_name: str, output_items: int
) -> nn.Module:
    """What stands where ``block`` stood: of its class, with its plain attributes, but for the map.

    It takes what the block took and returns what it returned in the same form.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = self.map(args[0] if args else kwargs[input_name])
        return (hidden, *[None] * (output_items - 1)) if output_items else hidden

    made: Any = type("Replaced" + type(block).__name__, (type(block),), {})
    made.forward = forward
    new = object.__new__(made)
    nn.Module.__init__(new)
    for name, value in vars(block).items():
        if name not in vars(nn.Module()) and isinstance(value, (bool, int, float, str, type(None))):
            vars(new)[name] = value
    # Those by which transformers records hidden states: some models have them from the start.
    for hooks in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        getattr(new, hooks).update(getattr(block, hooks))
    new.train(block.training)
    new.map = map_module
    return new


def narrowed_layer(layer: Any, how: Mapping[str, Any]) -> nn.Module:
    """The smaller layer that stands where ``layer`` stood, before its weights are loaded."""

    def empty(*shape: int) -> nn.Parameter:
        return nn.Parameter(layer.weight.new_empty(shape))

    outputs, inputs = layer.weight.shape[:2]
    bias = layer.bias is not None
    if "channels" in how:
        count = how["channels"]
        return nn.Conv2d(
            count, count, layer.kernel_size, layer.stride, layer.padding, layer.dilation, count,
            bias, layer.padding_mode, layer.weight.device, layer.weight.dtype,
        )  # fmt: skip
    if "rows" in how:
        count = sum(heads * kept for heads, kept, _ in how["rows"])
        return HeadRows(empty(count, inputs), empty(count) if bias else None, how["rows"])
    if "columns" in how:
        heads, kept, _ = how["columns"]
        new = empty(outputs, heads * kept)
        return HeadColumns(new, empty(outputs) if bias else None, how["columns"])
    outputs, inputs = how["shape"]
    return nn.Linear(inputs, outputs, bias, layer.weight.device, layer.weight.dtype)


PIECES: tuple[type[nn.Module] | Callable[..., Any], ...] = (
    Identity, Scale, Linear, LowRank, PerTokenType, HeadRows, HeadColumns,
    make_map, stand_in, narrowed_layer,
)  # fmt: skip
"""What the folder's code holds, in order."""
