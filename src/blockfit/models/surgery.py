"""Putting a plan into a model: maps where spans of blocks stood, block positions unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.fit.maps import Identity, PerTokenType, empty_map
from blockfit.fit.plan import Plan, Replacement
from blockfit.models.attentions import asks_for_map, follow
from blockfit.models.blocks import Blocks, block_modules, named_blocks
from blockfit.models.forward import block_class
from blockfit.models.narrowed import HOOKS, narrow, narrowings_of

_FRESH = (frozenset(nn.Module().__dict__) | {"gradient_checkpointing"}) - {"training"}

# A replacement has none of its base class's parts, which the base class's own versions may expect.
_OWN = ("train", "_apply", "_save_to_state_dict", "_load_from_state_dict", "__setstate__")

_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Read the hidden state as the removed block did, ignore all other arguments, map it."""
    if asks_for_map(kwargs):
        raise BlockfitError(
            f"this block was removed ({self._blockfit_replacement}) and has no attention map; ask "
            "a block that was kept"
        )
    hidden = self.map(args[0] if args else kwargs[self._blockfit_input_name])
    items = self._blockfit_output_items
    return (hidden, *[None] * (items - 1)) if items else hidden


def _set(self: Any, name: str, value: Any) -> None:
    """As every module; but tools that give all blocks a class of their own pass this one over.

    There is nothing in it that their forward could use. Subclasses of its own class are taken.
    """
    if name != "__class__" or issubclass(value, type(self)):
        nn.Module.__setattr__(self, name, value)
    else:
        self.__dict__["_blockfit_stands_for"] = value  # so that it is still one of its list


def _reduce(self: Any, protocol: Any) -> Any:
    """Classes made at run time have no importable name: name the replaced class instead."""
    return _bare, (block_class(self),), self.__dict__.copy()


def _replacement_class(replaced: type[nn.Module]) -> type[nn.Module]:
    """A subclass of the replaced block's class, so that code that looks for that class finds it."""
    if replaced in _CLASSES:
        return _CLASSES[replaced]
    members = {
        "__doc__": f"Stands where a {replaced.__name__} stood.",
        "__module__": replaced.__module__,
        "_blockfit_replaces": replaced,
        "extra_repr": lambda self: str(self._blockfit_replacement),
        **{name: getattr(nn.Module, name) for name in _OWN},
        "__setattr__": _set,
    }
    made = type(f"Replaced{replaced.__name__}", (replaced,), members)
    # Set after the class exists: some libraries wrap the forward of every new subclass.
    setattr(made, "forward", _forward)  # noqa: B010
    setattr(made, "__reduce_ex__", _reduce)  # noqa: B010
    _CLASSES[replaced] = made
    return made


def _bare(replaced: type[nn.Module]) -> nn.Module:
    """A replacement without the replaced class's own ``__init__``, hence without its weights."""
    module = object.__new__(_replacement_class(replaced))
    nn.Module.__init__(module)
    return module


def _replacement(
    block: nn.Module, blocks: Blocks, entry: Replacement, map_module: nn.Module
) -> nn.Module:
    """What stands in for ``block``: its plain attributes, its mode, and the map."""
    module = _bare(block_class(block))
    for name, value in block.__dict__.items():
        if name not in _FRESH and isinstance(value, (bool, int, float, str, type(None))):
            module.__dict__[name] = value
    module.__dict__["_blockfit_input_name"] = blocks.input_name
    module.__dict__["_blockfit_output_items"] = blocks.output_items
    module.__dict__["_blockfit_replacement"] = entry
    module.map = map_module
    return module


def _like(block: nn.Module, model: nn.Module, map_module: nn.Module) -> nn.Module:
    """A copy of the map with the dtype, device and mode of the block whose place it takes."""
    own = copy.deepcopy(map_module).train(block.training)
    weights = [p for p in block.parameters() if p.is_floating_point()]
    weights = weights or [p for p in model.parameters() if p.is_floating_point()]
    if weights:
        largest = max(weights, key=torch.Tensor.numel)
        own = own.to(device=largest.device, dtype=largest.dtype)
    return own.requires_grad_(any(p.requires_grad for p in block.parameters()))


def is_replaced(module: nn.Module) -> bool:
    """Whether a module stands where ``apply_plan`` removed a block."""
    return block_class(module) is not type(module)


def removed_plan(model: nn.Module, blocks: Blocks) -> Plan:
    """The plan that was applied to a model; empty for a model that is whole."""
    modules = block_modules(model, blocks)
    found = [getattr(m, "_blockfit_replacement", None) for m in modules]
    spans = tuple(dict.fromkeys(entry for entry in found if entry is not None))
    return Plan(spans, tuple(cut for m in modules for cut in narrowings_of(m)))


def apply_plan(
    model: nn.Module,
    blocks: Blocks,
    plan: Plan,
    maps: Sequence[nn.Module],
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Replace the plan's spans and narrow its parts inside ``model``, in place.

    Of a span, blocks start … stop − 2 become parameter-free pass-throughs and block stop − 1
    becomes the map; the list of blocks keeps its length and names. Each replacement is a subclass
    of the removed block's class, takes whatever arguments the block took and returns the same
    form. Forward hooks move over; the weights of the removed blocks are dropped; the map's weights
    are called ``<path>.<name of block>.map.*``. A narrowed block stays the module that it was; its
    smaller layers hold the first dimensions of each head until their weights are set.

    Args:
        plan: the spans, in any state of ``model`` in which none of their blocks is replaced yet.
        maps: one module per replacement of the plan, in its order; copied, and cast to the dtype
            and device of the block whose place they take.
        weights: solved values of narrowed layers, by their names in the model, as in ``narrow``.

    Raises:
        BlockfitError: before anything is changed, where the plan or the maps do not fit.
    """
    named = named_blocks(model, blocks)
    modules = list(named.values())
    _check(modules, blocks, plan, maps)
    narrow(model, blocks, plan.narrowings, weights)
    swaps: dict[int, tuple[nn.Module, nn.Module]] = {}
    for entry, map_module in zip(plan, maps, strict=True):
        for index in entry.span.blocks:
            last = index == entry.span.stop - 1
            own = _like(modules[index], model, map_module) if last else Identity()
            new = _replacement(modules[index], blocks, entry, own)
            swaps[id(modules[index])] = (modules[index], new)

    for old, new in swaps.values():
        for name in HOOKS:
            # The same dictionaries, so that handles given out for them can still remove hooks.
            new.__dict__[name] = old.__dict__[name]
            old.__dict__[name] = type(old.__dict__[name])()
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in swaps:
                parent._modules[name] = swaps[id(child)][1]
    if swaps:
        after = block_modules(model, blocks)
        follow(model, blocks.path, [not is_replaced(module) for module in after])
    _remember(model, blocks)


class OwnWriter:
    """Stands for a method by which a model's library saves it.

    The library would write a checkpoint whose config knows nothing of the plan, and fill what is
    missing with random weights when it is loaded.
    """

    writers: ClassVar[dict[str, Callable[..., Any]]] = {}
    """Name of a method → what writes a compressed model instead."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        write = self.writers.get(self.name)
        if write is None:
            raise BlockfitError(
                f"{self.name} knows nothing of the blocks that are gone: loaded again, they would "
                "have random weights; use blockfit.save(model, FOLDER), or "
                "blockfit.export_hub(model, FOLDER) for transformers"
            )
        return write(self.model, *args, **kwargs)


def _remember(model: nn.Module, blocks: Blocks) -> None:
    """What saving needs later, on the model itself: it survives copies and training."""
    model.__dict__["blockfit_blocks"] = blocks
    for name in ("save_pretrained", "push_to_hub"):
        if hasattr(type(model), name):
            model.__dict__[name] = OwnWriter(model, name)


def _check(
    modules: Sequence[nn.Module], blocks: Blocks, plan: Plan, maps: Sequence[nn.Module]
) -> None:
    plan.check(blocks.depth)
    if len(maps) != len(plan):
        raise BlockfitError(
            f"the plan has {len(plan)} spans, but {len(maps)} maps were given; give one per span"
        )
    for cut in plan.narrowings:
        if narrowings_of(modules[cut.block]) or is_replaced(modules[cut.block]):
            raise BlockfitError(
                f"block {cut.block} is cut already; apply one plan to the original model"
            )
    for entry, map_module in zip(plan, maps, strict=True):
        for index in entry.span.blocks:
            if is_replaced(modules[index]):
                raise BlockfitError(
                    f"block {index} is replaced already, so span {entry.span} cannot remove it; "
                    "apply one plan to the original model"
                )
        if entry.map == "folded" and is_replaced(modules[entry.span.start - 1]):
            raise BlockfitError(
                f"span {entry.span} cannot be folded: block {entry.span.start - 1} is "
                "replaced; choose another map"
            )
        _check_map(entry, blocks, map_module)


def _check_map(entry: Replacement, blocks: Blocks, map_module: nn.Module) -> None:
    with torch.device("meta"):
        expected = empty_map(entry, blocks.width, blocks.prefix_tokens)
    wanted = {name: tuple(value.shape) for name, value in expected.state_dict().items()}
    given = {name: tuple(value.shape) for name, value in map_module.state_dict().items()}
    if wanted != given:
        raise BlockfitError(
            f"the map of span {entry.span} has weights {given or 'none'}, but a map of kind "
            f"{entry.map!r} for width {blocks.width} has {wanted or 'none'}"
        )
    split = getattr(map_module, "prefix_tokens", None)
    if isinstance(expected, PerTokenType) and split != blocks.prefix_tokens:
        raise BlockfitError(
            f"the map of span {entry.span} splits after {split} prefix tokens, "
            f"but the model has {blocks.prefix_tokens}"
        )


@contextmanager
def swapped(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the named parameters of ``model`` hold other values until the ``with`` ends."""
    known = {name: model.get_parameter(name) for name in weights}
    before = {name: parameter.data for name, parameter in known.items()}
    try:
        for name, value in weights.items():
            known[name].data = value.to(known[name])
        yield
    finally:
        for name, value in before.items():
            known[name].data = value
