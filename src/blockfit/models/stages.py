"""Residual blocks of models that are no one chain: stages, windows, maps, mixed kinds.

Nothing here knows a model by name. Such blocks can be narrowed: their MLPs' neurons and the
dimensions of their heads need no equal shapes and no chain. No span of them can be replaced.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockfit.arguments import checked
from blockfit.errors import BlockfitError
from blockfit.models import blocks as chains
from blockfit.models.blocks import Batch, Blocks
from blockfit.models.forward import (
    FORWARD_ERRORS,
    block_class,
    evaluating,
    example_input,
    of_towers,
    two_different,
)
from blockfit.models.residual import (
    RunBlock,
    Writer,
    find_placed_writers,
    find_writers,
    written,
)
from blockfit.models.trace import Trace, trace


@checked
def find_blocks(
    model: nn.Module,
    example: Batch | None = None,
    path: str | None = None,
    prefix_tokens: int | None = None,
) -> Blocks:
    """Find a model's blocks by looking: a chain of like blocks, or else residual blocks in stages.

    A chain is what ``blockfit.models.blocks.find_chain`` finds. Of a model of images and texts it
    is that of the tower which the example is for; of an example of both, the blocks are those of
    both towers, in two stages. Where there is none, or a small one whose blocks add nothing to
    what they are given, and no ``path`` is given, the blocks are the smallest modules that run once
    and add what a linear layer in them returns to what they were given, whatever their class,
    width, number of tokens and layout: those of hierarchical models. They can be narrowed, but no
    span of them removed.

    Args:
        model: any module; left as it was.
        example: what the model is called with; guessed where missing.
        path: the list by name, where looking is not enough.
        prefix_tokens: of a chain, where looking is not enough.

    Raises:
        BlockfitError: neither a chain nor residual blocks; the message says why there is no chain.
    """
    asked = path is not None or prefix_tokens is not None
    if not asked and example is not None and (both := of_towers(model, example)) is not None:
        return _find_towers(model, example, *both)
    inputs = None if asked else (example_input(model) if example is None else example)
    try:
        chain = chains.find_chain(model, example, path, prefix_tokens)
    except BlockfitError as error:
        if inputs is None:
            raise
        found = find_stages(model, two_different(model, inputs))
        if found is None:
            raise BlockfitError(
                f"{error}; nor is there a residual block in it that could be narrowed (a module "
                "that adds what a linear layer returns to what it was given)"
            ) from error
        return found
    if inputs is None:
        return chain
    if _is_a_stage(model, chain, example):
        return find_stages(model, two_different(model, inputs)) or chain
    return _larger(model, chain, inputs)


def _larger(model: nn.Module, chain: Blocks, inputs: Batch) -> Blocks:
    """A chain, or the residual blocks of a model that hold more of it than a chain without any.

    Layers of a head may be alike, too (MaskFormer's mask embedder).
    """
    modules = chains.block_modules(model, chain)
    own, whole = (sum(p.numel() for p in m.parameters()) for m in (nn.ModuleList(modules), model))
    if 2 * own > whole or any(parameter.is_meta for parameter in model.parameters()):
        return chain
    with evaluating(model), torch.no_grad():
        few = two_different(model, inputs)
        seen = trace(model, chain, few, range(chain.depth))
        for index, block in enumerate(modules):
            run, hidden = seen.runner(block, index), seen.states[index]
            if _keeps_something(block, run, hidden, find_writers(block, run, hidden)):
                return chain
    found = find_stages(model, few)
    if found is None:
        return chain
    parts = nn.ModuleList(chains.block_modules(model, found))
    return found if sum(p.numel() for p in parts.parameters()) > own else chain


def _find_towers(
    model: nn.Module, inputs: Batch, images: Mapping[str, Any], texts: Mapping[str, Any]
) -> Blocks:
    """The chains of blocks of an image tower and of a text tower, as two stages.

    Raises:
        BlockfitError: where one of them has no chain; it says which.
    """
    chain: dict[str, Blocks] = {}
    for name, own in {"image": images, "text": texts}.items():
        try:
            chain[name] = chains.find_chain(model, own)
        except BlockfitError as error:
            other = "texts" if name == "image" else "images"
            raise BlockfitError(
                f"the {name} tower: {error}; give {other} alone for the other tower"
            ) from error
    if chain["image"].path == chain["text"].path:
        raise BlockfitError(
            f"images and texts run through the same blocks at {chain['image'].where}; give images "
            "or texts alone"
        )
    stages = tuple(tuple(chains.block_paths(model, one)) for one in chain.values())
    blocks = Blocks(
        path="",
        depth=sum(map(len, stages)),
        width=max(one.width for one in chain.values()),
        prefix_tokens=0,
        input_name=next((one.input_name for one in chain.values() if one.input_name), ""),
        output_items=0,
        stages=stages,
        towers=True,
    )
    with evaluating(model), torch.no_grad():
        if not _follows(model, blocks, two_different(model, inputs)):
            raise BlockfitError(
                f"what the text tower of {type(model).__name__} is given depends on images; give "
                "images or texts alone"
            )
    return blocks


def _is_a_stage(model: nn.Module, chain: Blocks, example: Batch | None) -> bool:
    """Whether like blocks outside of a chain have more tokens before it, or fewer after it."""
    inside = {id(part) for block in chains.block_modules(model, chain) for part in block.modules()}
    kinds = {block_class(block) for block in chains.block_modules(model, chain)}
    others = [m for m in model.modules() if block_class(m) in kinds and id(m) not in inside]
    if not others or any(parameter.is_meta for parameter in model.parameters()):
        return False
    tokens: list[tuple[bool, int]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = next((v for v in (*args, *kwargs.values()) if _is_state(v)), None)
        if state is not None and not torch.equal(state[0], state[-1]):  # of images, not of texts
            tokens.append((id(module) in inside, state.shape[1]))

    inputs = example_input(model) if example is None else example
    first = chains.block_modules(model, chain)[0]
    with ExitStack() as undo, evaluating(model), torch.no_grad():
        for module in (first, *others):
            undo.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))
        chains.call(model, two_different(model, inputs))
    at = next((place for place, (in_chain, _) in enumerate(tokens) if in_chain), None)
    if at is None:
        return False
    own = tokens[at][1]
    return any(n > own for _, n in tokens[:at]) or any(n < own for _, n in tokens[at + 1 :])


@dataclass
class _Call:
    """One call of a module during a forward."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    name_of_input: str
    hidden: Tensor
    started: int
    output: Any = None
    count: int = 1
    width: int = 0

    def others(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors that the module is given in a call besides the hidden state."""
        named = {} if args else {self.name_of_input}
        return _tensors((args[1:], {k: v for k, v in kwargs.items() if k not in named}))

    def run(self, hidden: Tensor) -> Tensor:
        own = hidden.clone()
        if self.args:
            out = self.module(own, *self.args[1:], **self.kwargs)
        else:
            out = self.module(**{**self.kwargs, self.name_of_input: own})
        return _state(out)


def _state(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _is_state(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim in (3, 4, 5) and value.is_floating_point()


def find_stages(model: nn.Module, inputs: Batch) -> Blocks | None:
    """The residual blocks of a model, in the order in which they run; ``None`` where it has none.

    Args:
        inputs: two different images or more, as the model is called.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    with evaluating(model), torch.no_grad():
        try:
            calls = _calls(model, inputs)
        except FORWARD_ERRORS:
            return None
        found: list[_Call] = []
        inside: set[int] = set()
        for one in sorted(calls, key=lambda c: sum(1 for _ in c.module.modules())):
            if any(id(part) in inside for part in one.module.modules()):
                continue
            if _is_residual(one):
                found.append(one)
                inside |= {id(part) for part in one.module.modules()}
        found.sort(key=lambda one: one.started)
        names = {one.name_of_input for one in found if not one.args}
        found = [one for one in found if one.args or len(names) == 1]
        found = _alone(model, inputs, found)
        if not found:
            return None
        return _laid_out(model, inputs, found, next(iter(names), ""))


def _alone(model: nn.Module, inputs: Batch, found: Sequence[_Call]) -> list[_Call]:
    """The blocks that nothing but their hidden state carries other blocks' results to.

    A decoder's read the encoder's output as well (DETR), which is not followed when blocks are
    solved one after the other.
    """
    again: dict[str, list[Tensor]] = {}

    def before(one: _Call) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            again[one.name] = one.others(args, kwargs)

        return hook

    def moved(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        state = _state(output) * 1.5
        return (state, *output[1:]) if isinstance(output, tuple) else state

    with ExitStack() as undo:
        for one in found:
            undo.enter_context(one.module.register_forward_pre_hook(before(one), with_kwargs=True))
            undo.enter_context(one.module.register_forward_hook(moved))
        chains.call(model, inputs)
    return [one for one in found if _equal(one.others(one.args, one.kwargs), again[one.name])]


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value
    if not isinstance(value, Mapping | tuple | list):
        return []
    return [tensor for part in parts for tensor in _tensors(part)]


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def _laid_out(model: nn.Module, inputs: Batch, found: Sequence[_Call], name: str) -> Blocks | None:
    """The blocks in runs of which each reads what the one before returned.

    ``None`` where what they return does not decide what the blocks after them are given: nothing
    could be solved in order then.
    """
    runs: list[list[_Call]] = []
    for one in found:
        last = runs[-1][-1] if runs else None
        joined = (
            last is not None
            and _state(last.output).shape == one.hidden.shape
            and last.hidden.shape == one.hidden.shape
            and torch.equal(_state(last.output), one.hidden)
        )
        if joined:
            runs[-1].append(one)
        else:
            runs.append([one])
    for stages in (runs, [[one] for one in found]):
        blocks = Blocks(
            path="",
            depth=len(found),
            width=max(one.width for one in found),
            prefix_tokens=0,
            input_name=name,
            output_items=0,
            stages=tuple(tuple(one.name for one in stage) for stage in stages),
        )
        if _follows(model, blocks, inputs):
            return blocks
    return None


def _follows(model: nn.Module, blocks: Blocks, inputs: Batch) -> bool:
    """Whether the ends of the stages alone decide what the blocks after them are given."""
    seen = trace(model, blocks, inputs, range(blocks.depth + 1))
    return all(
        torch.equal(crossed(model, blocks, seen, seen.outputs, end), seen.states[end + 1])
        for end in blocks.ends
    )


def crossed(
    model: nn.Module, blocks: Blocks, seen: Trace, ends: Mapping[int, Tensor], index: int
) -> Tensor:
    """What the model gives to the block after ``index``, from what the ends of stages returned.

    Args:
        seen: of the same images.
        ends: of every stage up to ``index``: what its last block returns.
        index: the last block of a stage.
    """
    functions: dict[int, Callable[[Tensor], Tensor]] = dict.fromkeys(range(index + 1), _same)
    for end, output in ends.items():
        if end <= index:
            functions[end] = _known(output)
    return seen.given(model, index + 1, functions)


def _same(hidden: Tensor) -> Tensor:
    return hidden


def _known(output: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda hidden: output.clone()


def _linears(module: nn.Module) -> Iterator[nn.Linear]:
    return (part for part in module.modules() if type(part) is nn.Linear)


def _calls(model: nn.Module, inputs: Batch) -> list[_Call]:
    """What modules with linear layers in them were given, of those that ran once."""
    clock, calls = itertools.count(), dict[str, _Call]()

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in calls:
                calls[name].count += 1
                return
            key = next((key for key, value in kwargs.items() if _is_state(value)), "")
            given: Any = args[0] if args else kwargs.get(key)
            if _is_state(given):
                hidden = given.detach().clone()
                calls[name] = _Call(name, module, args, kwargs, key, hidden, next(clock))

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if name in calls:
                calls[name].output = output

        return hook

    with ExitStack() as undo:
        for name, module in model.named_modules():
            if name and type(module) is not nn.Linear and any(_linears(module)):
                start = module.register_forward_pre_hook(before(name), with_kwargs=True)
                undo.enter_context(start)
                undo.enter_context(module.register_forward_hook(after(name)))
        chains.call(model, inputs)
    return [one for one in calls.values() if one.count == 1 and _is_state(_state(one.output))]


def _is_residual(one: _Call) -> bool:
    """Whether a module adds what linear layers in it return to something of what it is given."""
    try:
        if not torch.equal(one.run(one.hidden), _state(one.output)):
            return False
        writers = find_placed_writers(one.module, one.run, one.hidden)
        one.width = writers[-1].linear(one.module).out_features if writers else 0
        return _keeps_something(one.module, one.run, one.hidden, writers)
    except FORWARD_ERRORS:
        return False


def _keeps_something(
    block: nn.Module, run: RunBlock, hidden: Tensor, writers: Sequence[Writer]
) -> bool:
    """Whether a block has writers, and without them returns anything of what it was given."""
    with written(block, {writer.name: 0.0 for writer in writers}):
        rest = run(hidden)
    return bool(writers) and bool((rest - rest.mean(dim=0, keepdim=True)).abs().max() > 0)
