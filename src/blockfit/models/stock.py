"""What a library's own config can say of a smaller model: fewer blocks, one MLP width for all.

Nothing here knows a key of a config by name where the config holds it. Numbers that equal the depth
or the width, or that are the ratio of the two widths, are changed one at a time, until the library
builds exactly the tensors that are left.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.fit.maps import empty_map
from blockfit.fit.plan import Plan
from blockfit.models.blocks import Blocks, named_blocks
from blockfit.models.from_open_clip import with_usual_numbers
from blockfit.models.load import skeleton
from blockfit.models.source import Source
from blockfit.models.surgery import apply_plan
from blockfit.models.tensors import meta_copy, named_tensors

CONFIGURED = ("transformers", "timm", "torchvision", "open_clip")
"""Libraries whose models are built from a config or from arguments that a file can hold."""

_OF_STAGES = ("stage_names", "out_features", "out_indices")
"""Keys by which a transformers config numbers the blocks for use as a backbone."""

_PER_NEURON = (1.0, 1.5, 2.0)
"""What a config counts for one neuron: itself, three thirds of which two are kept (SwiGLU), or
its gate as well."""

Path = tuple[str, ...]
Value = TypeVar("Value")


class Stock:
    """Tells which plans a stock config can say, without weights."""

    def __init__(self, model: nn.Module, blocks: Blocks, source: Source) -> None:
        self.blocks, self.source = blocks, source
        self._bare = meta_copy(model)
        self._known: dict[Plan, bool] = {}

    def says(self, plan: Plan) -> bool:
        """Whether the library builds the small model from its config alone.

        Of a model that is built by no library (a user's own class) any uniform plan is one that
        its constructor might take.
        """
        if plan.not_plain(self.blocks.depth) is not None:
            return False
        if self.source.library not in CONFIGURED:
            return True
        if plan not in self._known:
            self._known[plan] = self._rebuilds(plan)
        return self._known[plan]

    def _rebuilds(self, plan: Plan) -> bool:
        if plan.removed_blocks and names_stages(self.source):
            return False
        bare = copy.deepcopy(self._bare)
        apply_plan(bare, self.blocks, plan, [empty_map(e, self.blocks.width) for e in plan])
        tensors = renumbered(named_tensors(bare), bare, self.blocks, plan)
        return stock_model(self.source, self.blocks, plan, tensors) is not None


def names_stages(source: Source) -> bool:
    """Whether the model names feature maps by the numbers of blocks, as backbones do."""
    arguments = source.arguments
    backbone = "backbone_config" in arguments.get("config", {})
    return backbone or str(arguments.get("class")).endswith("Backbone")


def renumbered(
    tensors: Mapping[str, Value], model: nn.Module, blocks: Blocks, plan: Plan
) -> dict[str, Value]:
    """Tensors of a small model by their names in one with fewer blocks, numbered without gaps."""
    names = list(named_blocks(model, blocks))
    gone = set(plan.removed_blocks)
    left = [name for index, name in enumerate(names) if index not in gone]
    inside = f"{blocks.path}." if blocks.path else ""
    moved = {f"{inside}{old}.": f"{inside}{new}." for old, new in zip(left, names, strict=False)}
    out = {}
    for name, value in tensors.items():
        prefix = next((p for p in moved if name.startswith(p)), None)
        out[name if prefix is None else moved[prefix] + name[len(prefix) :]] = value
    return out


def stock_model(
    source: Source, blocks: Blocks, plan: Plan, tensors: Mapping[str, Tensor]
) -> tuple[nn.Module, Source] | None:
    """The small model as its library builds it, on the meta device, and what it is built from.

    Args:
        plan: one that ``Plan.not_plain`` has nothing against.
        tensors: of the small model, renumbered; the names and shapes to be met.

    Returns:
        ``None`` where no change of one number for the depth and one for the width gives them.
    """
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    for smaller in _smaller(_complete(source), blocks, plan):
        try:
            bare = skeleton(smaller)
        except BlockfitError:  # not a number that counts blocks or neurons
            continue
        if {name: tuple(value.shape) for name, value in named_tensors(bare).items()} == shapes:
            return bare, smaller
    return None


def _smaller(source: Source, blocks: Blocks, plan: Plan) -> Iterator[Source]:
    """The source with one number changed for the depth and one for the width of MLPs."""
    removed, widths = plan.removed_blocks, plan.mlp_width(blocks.depth)
    base = _without(source.arguments, blocks.depth, removed) if removed else source.arguments
    depths = _depths(base, source.library, blocks.depth, len(removed)) if removed else [{}]
    for depth in depths:
        others = _widths(base, source.library, blocks.width, *widths) if widths else [{}]
        for width in others:
            yield replace(source, arguments=_changed(base, {**depth, **width}))


def _without(value: Any, depth: int, removed: tuple[int, ...]) -> Any:
    """Arguments whose lists with an entry per block have lost those of the removed ones."""
    if isinstance(value, Mapping):
        kept = {key: inner for key, inner in value.items() if key not in _OF_STAGES}
        return {key: _without(inner, depth, removed) for key, inner in kept.items()}
    if isinstance(value, list) and len(value) == depth:
        return [entry for index, entry in enumerate(value) if index not in removed]
    return value


def _depths(base: Any, library: str, depth: int, removed: int) -> Iterator[dict[Path, Any]]:
    if library == "timm":  # whose architectures know their depth without being told
        yield {("options", "depth"): depth - removed}
    for path, value in _numbers(base, library):
        if type(value) is int and value == depth:
            yield {path: depth - removed}


def _widths(
    base: Any, library: str, channels: int, old: int, new: int
) -> Iterator[dict[Path, Any]]:
    """Changes after which a config might say ``new`` neurons where it said ``old``."""
    if library == "timm":  # as for the depth
        for per in _PER_NEURON:
            for ratio in _ratios(per / channels, new):
                yield {("options", "mlp_ratio"): ratio}
    for path, value in _numbers(base, library):
        if type(value) is int and value == old:
            yield {path: new}
        elif any(abs(value * channels / (old * per) - 1) < 0.01 for per in _PER_NEURON):
            for ratio in _ratios(value / old, new):
                yield {path: int(ratio) if type(value) is int and ratio.is_integer() else ratio}


def _ratios(per_neuron: float, neurons: int) -> tuple[float, float]:
    """The ratio itself, and one that a cut to whole numbers cannot bring below it."""
    return per_neuron * neurons, per_neuron * (neurons + 0.5)


def _numbers(value: Any, library: str, path: Path = ()) -> Iterator[tuple[Path, int | float]]:
    """The numbers in nested mappings, and where they stand."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if library != "timm" or path or key == "options":
                yield from _numbers(inner, library, (*path, key))
    elif type(value) in (int, float) and value > 0:
        yield path, value


def _changed(base: Any, changes: Mapping[Path, Any]) -> Any:
    arguments = copy.deepcopy(base)
    for path, value in changes.items():
        inner = arguments
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
    return arguments


def _complete(source: Source) -> Source:
    """An open_clip source with the numbers that its config leaves to the library's defaults."""
    if source.library != "open_clip":
        return source
    return replace(source, arguments={"config": with_usual_numbers(source.arguments["config"])})
