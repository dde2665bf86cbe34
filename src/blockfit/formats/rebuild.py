"""What a compressed model is rebuilt from, settled when it is saved, and whether outputs agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from blockfit.errors import BlockfitError, first_line
from blockfit.formats.int8 import put_int8
from blockfit.models.attributes import first_difference, replaced_by_identity
from blockfit.models.forward import call, evaluating, example_input, placed
from blockfit.models.load import refreshed, with_classes
from blockfit.models.source import Source
from blockfit.models.tensors import (
    dequantized,
    fill,
    int8_kind,
    int8_parts,
    kept_apart,
    named_tensors,
    tied,
    valueless,
)

Rebuild = Callable[[Source], nn.Module]
"""A source → the compressed model on the meta device."""

HALVES = (torch.float16, torch.bfloat16)

DIFFERS = "differs"
"""The argument of a module's source that says why its library cannot rebuild it."""


def settled(
    model: nn.Module, tensors: Mapping[str, Tensor], source: Source, rebuild: Rebuild
) -> tuple[Source, nn.Module | None]:
    """The source that gives the model as it is now, and what it gives.

    A config that was changed since the model was loaded (labels, a head of other classes) is taken
    from the model. Where nothing that a library builds is the model, it is the user's own class.

    Args:
        model: compressed, perhaps trained or changed since.
        tensors: all of it, by name.
        rebuild: applies the plan, too.
    """
    if source.library == "module":
        return source, None
    why: str | None = None
    for candidate in _candidates(model, tensors, source, rebuild):
        try:
            bare = rebuild(candidate)
        except BlockfitError as error:
            found: str | None = str(error)
        else:
            found = _difference(model, tensors, bare)
            if found is None:
                return candidate, bare
        why = why or found
    cls = type(model)
    name = f"{cls.__module__}.{cls.__qualname__}"
    return replace(source, library="module", name=name, arguments={DIFFERS: why}), None


def _candidates(
    model: nn.Module, tensors: Mapping[str, Tensor], source: Source, rebuild: Rebuild
) -> Iterator[Source]:
    now = refreshed(source, model)
    yield now
    try:
        bare = rebuild(now)
    except BlockfitError:
        return
    if gone := replaced_by_identity(model, bare):
        yield replace(now, passed_on=(*now.passed_on, *gone))
    expected = named_tensors(bare)
    heads = {
        tensor.shape[0]
        for name, tensor in tensors.items()
        if name in expected
        and tensor.ndim
        and tensor.shape != expected[name].shape
        and tensor.shape[1:] == expected[name].shape[1:]
    }
    if len(heads) == 1:
        yield with_classes(now, heads.pop())
    yield source


def _difference(model: nn.Module, tensors: Mapping[str, Tensor], bare: nn.Module) -> str | None:
    """Why a rebuilt model is not the model; ``None`` where it is."""
    expected = {name: tuple(tensor.shape) for name, tensor in named_tensors(bare).items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in kept_apart(bare) & expected.keys() & found.keys():
        if len(found[name]) == len(expected[name]):
            expected[name] = found[name]
    for name in dict.fromkeys((*found, *expected)):
        if expected.get(name) != found.get(name):
            shape, rebuilt = found.get(name, "none"), expected.get(name, "none")
            return f"{name} has shape {shape}, rebuilt {rebuilt}"
    if (why := first_difference(model, bare)) is not None:
        return why
    loose = valueless(bare)
    return None if loose is None else f"{loose} is neither a parameter nor a buffer"


@torch.no_grad()
def check_outputs(model: nn.Module, tensors: Mapping[str, Tensor], bare: nn.Module) -> None:
    """Compare the model with the rebuilt one, filled with the model's own values, on one batch.

    A model on several devices is rebuilt on the CPU, whose outputs agree but for rounding. One of
    which nobody knows what it takes is not compared.

    Raises:
        BlockfitError: where the outputs differ; it names the cause where one is found.
    """
    if (example := _example(model)) is None:
        return
    several = len(_devices(tensors)) > 1
    _put_values(bare, {n: t.cpu() for n, t in tensors.items()} if several else tensors)
    batch, own = example
    with evaluating(bare):
        try:
            other = _tensors(call(bare, placed(bare, batch) if several else batch))
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise BlockfitError(
                f"the model cannot be saved: what would be loaded again does not run "
                f"({first_line(error)}){_cause(model)}"
            ) from error
    if _equal(own, other) or (several and _close([one.cpu() for one in own], other)):
        return
    again = _example(model)
    if again is not None and not _equal(own, again[1]) and _close(own, other):
        return  # the model does not repeat itself to the last bit either
    raise BlockfitError(
        f"the model cannot be saved: what would be loaded again has other outputs{_cause(model)}"
    )


def _devices(tensors: Mapping[str, Tensor]) -> set[torch.device]:
    return {tensor.device for tensor in tensors.values()}


def _put_values(bare: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a rebuilt model values as a folder would; weights in int8 stay in int8."""
    aliases = tied(tensors)
    values = {name: tensor.detach() for name, tensor in tensors.items() if name not in aliases}
    parts = {name: pair for name, value in values.items() if (pair := int8_parts(value))}
    values |= {name: dequantized(*pair) for name, pair in parts.items()}
    fill(bare, values | {alias: values[name] for alias, name in aliases.items()})
    if (kind := int8_kind(tensors.values())) is not None:
        put_int8(bare, parts, kind)


def _example(model: nn.Module) -> tuple[Any, list[Tensor]] | None:
    """A batch and the model's outputs for it; ``None`` where it is not known what it takes."""
    try:
        batch = example_input(model)
        with evaluating(model):
            return batch, _tensors(call(model, batch))
    except (BlockfitError, RuntimeError, ValueError, TypeError, AttributeError):
        return None


def example_outputs(model: nn.Module) -> list[Tensor] | None:
    """The model's outputs for the example that it says it takes; ``None`` where it does not say."""
    example = _example(model)
    return None if example is None else example[1]


def _cause(model: nn.Module) -> str:
    """What may change outputs beside tensors and attributes, as the end of a sentence."""
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"; {path or 'the model'} has a forward hook, remove it or build it into a class"
    return "; something beside its tensors and attributes changes them"


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    items = output.values() if isinstance(output, Mapping) else output
    if not isinstance(output, (Mapping, list, tuple)):
        return []
    return [tensor for item in items for tensor in _tensors(item)]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        left.shape == right.shape and torch.equal(left.nan_to_num(), right.nan_to_num())
        for left, right in zip(one, other, strict=True)
    )


def _close(one: list[Tensor], other: list[Tensor]) -> bool:
    """Equal up to the rounding of another device or another run."""
    return len(one) == len(other) and all(
        left.shape == right.shape and torch.allclose(left, right, rtol=room, atol=room)
        for left, right in zip(one, other, strict=True)
        for room in (2e-2 if left.dtype in HALVES else 1e-3,)
    )
