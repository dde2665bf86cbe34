"""Blocks with narrowed parts: the same class and forward, smaller linear layers inside.

An MLP that keeps fewer neurons has plain ``nn.Linear`` layers of other sizes. An attention whose
heads keep fewer value or query-key dimensions computes only those, and hands the block's own
forward heads of the size that it expects, the missing dimensions being zero. So the forward, the
softmax scale and whatever else is made of the head size stay as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby

import torch
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.fit.plan import Narrowing
from blockfit.models.blocks import Blocks, block_modules, block_paths

HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
"""Attributes of a module that hold the hooks of its forward."""

Layer = nn.Linear | nn.Conv2d
"""What is narrowed: linear layers, and depthwise convolutions between those of an MLP."""

Segment = tuple[int, int, int]
"""Heads, dimensions that are kept of each, dimensions that each had."""


class HeadRows(nn.Linear):
    """A linear layer that computes some dimensions of every head and gives zero for the others.

    Args:
        weight: shape (Σ heads · kept, inputs).
        bias: shape (Σ heads · kept,), or ``None``.
        segments: of the outputs, in order: queries, keys and values where they are fused.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, segments: Sequence[Segment]
    ) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = weight, bias  # type: ignore[assignment]
        self.segments = tuple(segments)
        self.in_features = weight.shape[1]
        self.out_features = sum(heads * size for heads, _, size in segments)

    def forward(self, input: Tensor) -> Tensor:
        computed = nn.functional.linear(input, self.weight, self.bias)
        sizes = [heads * kept for heads, kept, _ in self.segments]
        # Runtimes copy what is split into one part.
        parts = computed.split(sizes, dim=-1) if len(sizes) > 1 else [computed]
        full = []
        for place, (heads, kept, size) in enumerate(self.segments):
            part = parts[place]  # torch.fx follows an index, but no loop over the parts
            if kept < size:
                padded = nn.functional.pad(part.unflatten(-1, (heads, kept)), (0, size - kept))
                part = padded.flatten(-2)
            full.append(part)
        return full[0] if len(full) == 1 else torch.cat(full, dim=-1)

    def extra_repr(self) -> str:
        kept = ", ".join(f"{kept}/{size} of {heads} heads" for heads, kept, size in self.segments)
        return f"{super().extra_repr()}, keeps {kept}"


class HeadColumns(nn.Linear):
    """A linear layer that reads only the first dimensions of every head.

    Args:
        weight: shape (outputs, heads · kept).
        bias: shape (outputs,), or ``None``.
        segment: heads, kept dimensions, dimensions that it is given.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, segment: Segment) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = weight, bias  # type: ignore[assignment]
        self.segment = segment
        self.in_features, self.out_features = segment[0] * segment[2], weight.shape[0]

    def forward(self, input: Tensor) -> Tensor:
        heads, kept, size = self.segment
        read = input.unflatten(-1, (heads, size))[..., :kept].flatten(-2)
        return nn.functional.linear(read, self.weight, self.bias)

    def extra_repr(self) -> str:
        heads, kept, size = self.segment
        return f"{super().extra_repr()}, reads {kept}/{size} of {heads} heads"


def is_depthwise(module: nn.Module | None) -> bool:
    """Whether a module is a convolution of every channel alone."""
    return type(module) is nn.Conv2d and (
        module.groups == module.in_channels == module.out_channels > 1
    )


def rows_in(layer: Layer) -> int:
    """How many rows a layer has: its outputs, or its channels."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def _segments(layer: Layer, cuts: Sequence[Narrowing], name: str) -> list[Segment]:
    """How the output rows of a layer are made up once all its cuts are applied, in order."""
    runs = sorted((rows.start, cut) for cut in cuts for rows in cut.rows if rows.layer == name)
    segments, at = [], 0
    for start, cut in runs:
        stop = start + cut.heads * cut.size
        if start < at or stop > rows_in(layer):
            raise BlockfitError(
                f"block {cut.block}: {name} has no rows {start}–{stop - 1} for its {cut.part}; "
                "the plan does not fit the model"
            )
        if start > at:
            segments.append((1, start - at, start - at))
        segments.append((cut.heads, cut.kept, cut.size))
        at = stop
    if at < rows_in(layer):
        segments.append((1, rows_in(layer) - at, rows_in(layer) - at))
    return segments


def _first_rows(segments: Sequence[Segment]) -> Tensor:
    """Numbers of the first kept rows of every head of a layer."""
    numbers, at = [], 0
    for heads, kept, size in segments:
        rows = at + torch.arange(heads)[:, None] * size + torch.arange(kept)
        numbers.append(rows.flatten())
        at += heads * size
    return torch.cat(numbers)


def _layers(
    block: nn.Module, cuts: Sequence[Narrowing], weights: Mapping[str, Tensor] | None = None
) -> dict[str, Layer]:
    """The layers that take the place of a block's own, by their dotted paths.

    Their weights are those of ``weights`` that fit, which are not copied, or the first kept rows
    and columns of the block's own layers.
    """
    known = weights or {}
    made: dict[str, Layer] = {}
    _check_layers(cuts)
    for name in dict.fromkeys(rows.layer for cut in cuts for rows in cut.rows):
        neurons = all(cut.part == "mlp" for cut in cuts if name in {r.layer for r in cut.rows})
        source = _layer(block, name, cuts[0].block, depthwise=neurons)
        segments = _segments(source, cuts, name)
        index = _first_rows(segments)
        weight = _narrower(source.weight, index, 0, known.get(f"{name}.weight"))
        bias = source.bias
        if bias is not None:
            bias = _narrower(bias, index, 0, known.get(f"{name}.bias"))
        if isinstance(source, nn.Conv2d):
            made[name] = _fewer_channels(source, weight, bias)
        else:
            made[name] = _plain(weight, bias) if neurons else HeadRows(weight, bias, segments)
    for cut in cuts:
        if not cut.reader:
            continue
        layer = _layer(block, cut.reader, cut.block)
        assert isinstance(layer, nn.Linear)
        if layer.in_features != cut.heads * cut.size:
            raise BlockfitError(
                f"block {cut.block}: {cut.reader} reads {layer.in_features} dimensions, not "
                f"{cut.heads} × {cut.size}; the plan does not fit the model"
            )
        segment = (cut.heads, cut.kept, cut.size)
        index = _first_rows([segment])
        weight = _narrower(layer.weight, index, 1, known.get(f"{cut.reader}.weight"))
        bias = layer.bias
        if cut.part == "mlp":
            made[cut.reader] = _plain(weight, bias)
        else:
            made[cut.reader] = HeadColumns(weight, bias, segment)
    for name, new in made.items():
        new.train(block.get_submodule(name).training)
    return made


def _check_layers(cuts: Sequence[Narrowing]) -> None:
    """Refuse cuts of one block that use a layer for two things."""
    for cut in cuts:
        cut.check_layers()
    readers = Counter(cut.reader for cut in cuts if cut.reader)
    for cut in cuts:
        if readers[cut.reader] > 1 or any(rows.layer in readers for rows in cut.rows):
            raise BlockfitError(
                f"block {cut.block}: {cut.part} uses a layer that another of its parts uses; "
                "the plan does not fit the model"
            )


def _layer(block: nn.Module, name: str, number: int, depthwise: bool = False) -> Layer:
    try:
        layer = block.get_submodule(name)
    except AttributeError:
        layer = None
    if type(layer) is nn.Linear or (depthwise and is_depthwise(layer)):
        assert isinstance(layer, Layer)
        return layer
    what = "no layer" if layer is None else f"a {type(layer).__name__} called"
    raise BlockfitError(
        f"block {number} has {what} {name!r} where the plan narrows a linear layer; "
        "apply the plan to the model that it was made for"
    )


def _narrower(whole: Tensor, index: Tensor, axis: int, known: Tensor | None) -> nn.Parameter:
    """What was solved for some rows or columns of a layer, or else these of its own."""
    shape = [*whole.shape]
    shape[axis] = len(index)
    if known is None or [*known.shape] != shape:
        value = whole.detach()[index] if axis == 0 else whole.detach()[:, index]
    else:
        value = known.to(whole)
    return nn.Parameter(value, requires_grad=whole.requires_grad)


def _plain(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    layer = nn.Linear.__new__(nn.Linear)  # whose __init__ would draw weights
    nn.Module.__init__(layer)
    layer.in_features, layer.out_features = weight.shape[1], weight.shape[0]
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer


def _fewer_channels(like: nn.Conv2d, weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Conv2d:
    """A depthwise convolution as ``like`` is, of fewer channels."""
    if isinstance(like.padding, str):
        padding: str | tuple[int, int] = like.padding
    else:
        padding = (like.padding[0], like.padding[1])
    with torch.device("meta"):
        layer = nn.Conv2d(
            len(weight),
            len(weight),
            (like.kernel_size[0], like.kernel_size[1]),
            (like.stride[0], like.stride[1]),
            padding,
            (like.dilation[0], like.dilation[1]),
            groups=len(weight),
            bias=bias is not None,
            padding_mode=like.padding_mode,
        )
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer


def _put(block: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put layers into a block; returns those that were there."""
    before = {}
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        holder = block.get_submodule(parent) if parent else block
        before[name] = holder._modules[last]
        holder._modules[last] = layer
    return {name: layer for name, layer in before.items() if layer is not None}


def narrow(
    model: nn.Module,
    blocks: Blocks,
    cuts: Sequence[Narrowing],
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Narrow parts of blocks in place; the kept dimensions are the first of each head.

    Args:
        weights: solved values of the narrower layers, by their names in the model: copied, where
            their shapes fit, in the place of the layers' own.

    Raises:
        BlockfitError: before anything is changed, where a cut does not fit its block.
    """
    modules = block_modules(model, blocks)
    own = _own_weights(model, blocks, weights)
    made = {n: _layers(modules[n], some, own.get(n)) for n, some in by_block(cuts).items()}
    for number, layers in made.items():
        block = modules[number]
        for name, layer in layers.items():
            old = block.get_submodule(name)
            for hooks in HOOKS:
                layer.__dict__[hooks] = old.__dict__[hooks]
            for value in layer.parameters():
                value.data = value.data.clone(memory_format=torch.contiguous_format)
        _put(block, layers)
        block.__dict__["_blockfit_narrowings"] = tuple(by_block(cuts)[number])


def narrowings_of(block: nn.Module) -> tuple[Narrowing, ...]:
    """What was narrowed in a block; nothing in a block that is whole."""
    return getattr(block, "_blockfit_narrowings", ())


def by_block(cuts: Iterable[Narrowing]) -> dict[int, list[Narrowing]]:
    """Narrowings of a plan by the number of their block."""
    ordered = sorted(cuts, key=lambda cut: cut.block)
    return {block: list(some) for block, some in groupby(ordered, key=lambda cut: cut.block)}


def _own_weights(
    model: nn.Module, blocks: Blocks, weights: Mapping[str, Tensor] | None
) -> dict[int, dict[str, Tensor]]:
    """Values by the number of their block, with their names in it; nothing without any."""
    if not weights:
        return {}
    starts = [f"{path}." for path in block_paths(model, blocks)]
    return {
        number: {k.removeprefix(start): v for k, v in weights.items() if k.startswith(start)}
        for number, start in enumerate(starts)
    }


@contextmanager
def narrowed_block(
    block: nn.Module, cuts: Sequence[Narrowing], weights: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """Narrow parts of one block until the ``with`` ends.

    Args:
        weights: values of the narrower layers, by their names in the block: in the place of the
            layers' own where their shapes fit, and not copied.
    """
    before = _put(block, _layers(block, cuts, weights)) if cuts else {}
    try:
        yield
    finally:
        _put(block, before)


@contextmanager
def narrowed(
    model: nn.Module,
    blocks: Blocks,
    cuts: Iterable[Narrowing],
    weights: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Narrow parts of several blocks of ``model`` until the ``with`` ends.

    Args:
        weights: values of the narrower layers, by their names in the model, as in
            ``narrowed_block``.
    """
    modules, own = block_modules(model, blocks), _own_weights(model, blocks, weights)
    with ExitStack() as undo:
        for number, some in by_block(cuts).items():
            undo.enter_context(narrowed_block(modules[number], some, own.get(number)))
        yield
