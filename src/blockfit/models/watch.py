"""The lists of modules of an unknown model, and what one forward pass shows of each.

Nothing here knows a model by name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.models.forward import (
    FORWARD_ERRORS,
    Batch,
    block_class,
    call,
    describe,
    evaluating,
    held_by,
    lists_in,
    parameters_of,
)


@dataclass
class Watch:
    """What one candidate list does during a forward pass: how far it got, or why it is no list.

    Args:
        started: how many candidate lists had begun before it; −1 where it never ran.
        takes: shape of the first tensor that the first module was given, without the batch.
        turned: shapes, without the batch, before and after the first module that changed them.
        chunks: the list whose modules hold the modules of this one, where it was made of such.
    """

    path: str
    run: dict[str, nn.Module]
    problem: str = ""
    done: int = 0
    first: Tensor | None = None
    last: Tensor | None = None
    others: tuple[Tensor, ...] = ()
    given: tuple[Any, ...] = ()
    input_name: str = ""
    output_items: int = 0
    started: int = -1
    takes: tuple[int, ...] = ()
    turned: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    chunks: Watch | None = None
    handles: list[Any] = field(default_factory=list)

    @property
    def block_class(self) -> type[nn.Module]:
        return block_class(next(iter(self.run.values())))

    def listen(self, clock: Iterator[int]) -> None:
        if len({id(module) for module in self.run.values()}) < len(self.run):
            self.problem = "some of its blocks are one and the same module"
            return
        for index, module in enumerate(self.run.values()):
            shapes = module.register_forward_hook(self._shapes(clock), with_kwargs=True)
            before = module.register_forward_pre_hook(self._before(index), with_kwargs=True)
            after = module.register_forward_hook(self._after(index))
            self.handles += [shapes, before, after]

    def _shapes(self, clock: Iterator[int]) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            taken, given = _main((*args, *kwargs.values())), _main(output)
            if self.started < 0:
                self.started, self.takes = next(clock), taken
            if taken and given and taken != given and self.turned is None:
                self.turned = taken, given

        return hook

    def _before(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.problem:
                return
            hidden, name = hidden_argument(module, args, kwargs)
            if index != self.done:
                self.problem = f"block {index} ran when block {self.done} was due"
            elif hidden is None:
                self.problem = f"block {index} does not take a tensor (batch, tokens, width) first"
            elif self.last is None:
                self.first, self.last = hidden.clone(), hidden
                self.input_name = name
            elif not _same(hidden, self.last):
                self.problem = f"block {index} does not read what block {index - 1} returned"
            elif any(value is one for value in (*args, *kwargs.values()) for one in self.others):
                self.problem = (
                    f"block {index} reads more than one tensor of what block {index - 1} returned"
                )
            elif _hidden_count(args) > 1 and _hidden_count(self.given) > 1:
                self.problem = f"block {index} carries several hidden states"
            else:
                self.last = hidden

        return hook

    def _after(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self.problem or self.last is None:
                return
            items = len(output) if isinstance(output, tuple) else 0
            hidden = output[0] if items else output
            if not isinstance(hidden, Tensor) or hidden.shape != self.last.shape:
                self.problem = f"block {index} does not return the shape that it takes"
            elif index and items != self.output_items:
                self.problem = f"block {index} returns another number of items than block 0"
            else:
                self.output_items, self.last, self.done = items, hidden, index + 1
                rest = output[1:] if items else ()
                self.given = output if items else ()
                self.others = tuple(t for t in rest if isinstance(t, Tensor) and t is not hidden)

        return hook

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        if not self.problem and self.done < len(self.run):
            self.problem = f"only {self.done} of its {len(self.run)} modules ran"


def hidden_argument(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Tensor | None, str]:
    """The hidden state among a block's arguments, and the name of the parameter that takes it."""
    parameters = parameters_of(block_class(module).forward)[1:]
    name = next((p.name for p in parameters if p.kind is not p.VAR_POSITIONAL), "")
    if args:
        return (args[0] if _is_hidden(args[0]) else None), name
    if not _is_hidden(kwargs.get(name)):
        name = next((key for key, value in kwargs.items() if _is_hidden(value)), name)
    return (kwargs[name] if _is_hidden(kwargs.get(name)) else None), name


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()


def _hidden_count(values: tuple[Any, ...]) -> int:
    return sum(map(_is_hidden, values))


def _main(values: Any) -> tuple[int, ...]:
    """Shape without the batch of the first floating tensor of tokens or of a map; () if none."""
    for value in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(value, Tensor) and value.ndim >= 3 and value.is_floating_point():
            return tuple(value.shape[1:])
    return ()


def _same(left: Tensor, right: Tensor) -> bool:
    if left is right:
        return True
    if left.shape != right.shape or left.dtype != right.dtype or left.device != right.device:
        return False
    return left.is_meta or torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)


def candidates(model: nn.Module) -> list[Watch]:
    watches: dict[tuple[int, ...], Watch] = {}
    for path, module in model.named_modules():
        for watch in watches_at(path, module):
            if all(next(part.parameters(), None) is None for part in watch.run.values()):
                continue  # a row of dropouts and the like hands a tensor on, but is no block
            watches.setdefault(tuple(map(id, watch.run.values())), watch)
    return list(watches.values())


def watches_at(path: str, container: nn.Module) -> list[Watch]:
    """The lists of one module, and those of blocks that are kept in chunks."""
    found: list[Watch] = []
    for run in lists_in(container):
        held = bool(found) and held_by(found[-1].run) == run
        found.append(Watch(path, run, chunks=found[-1] if held else None))
    return found


def watch_forward(model: nn.Module, watches: Sequence[Watch], inputs: Batch) -> None:
    try:
        clock = itertools.count()
        for watch in watches:
            watch.listen(clock)
        # Not inference_mode: a model may keep tensors that it made here and train with them later.
        with evaluating(model), torch.no_grad():
            call(model, inputs)
    except FORWARD_ERRORS as error:
        raise BlockfitError(
            f"the model cannot be run on the example ({describe(inputs)}): {error}; "
            "pass an example of what it is called with"
        ) from error
    finally:
        for watch in watches:
            watch.close()
