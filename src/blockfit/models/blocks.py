"""Where a model keeps its blocks, found by looking; how to listen to them and to stand in for them.

Nothing here knows a model by name. A block is whatever sits in the longest list of modules of
one class that hand a tensor of shape (batch, tokens, width) from one to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor, nn

from blockfit.arguments import checked
from blockfit.errors import BlockfitError
from blockfit.fields import LEFT_OUT, fields_written, read
from blockfit.models.forward import (
    Batch,
    block_class,
    call,
    container_at,
    example_input,
    forward_as,
    image_tensor,
    lists_in,
    place,
    two_different,
)
from blockfit.models.watch import Watch, candidates, watch_forward, watches_at

__all__ = [
    "Batch",
    "Blocks",
    "block_modules",
    "call",
    "example_input",
    "find_chain",
    "named_blocks",
    "overridden",
    "record",
]

HINT = "name the list of blocks with blocks="


@dataclass(frozen=True)
class Blocks:
    """Where a model keeps its blocks and how they are called: plain values only.

    Args:
        path: dotted path of the module that holds the blocks; ``""`` is the model itself.
        depth: number of blocks L.
        width: channels d of the hidden state.
        prefix_tokens: leading tokens that are no image patches (class, distillation, register).
        input_name: keyword under which a block takes the hidden state when not positional.
        output_items: 0 where a block returns the hidden state itself; n where it returns a tuple
            of n items that begins with it.
        stages: dotted paths of the blocks where they are no chain at ``path``: in order, in runs of
            which each block reads what the one before it returned. Such blocks may differ in
            class, width, tokens and layout, and may be narrowed, but not replaced.
        towers: whether the stages are two, the image tower of a model and its text tower.
    """

    path: str
    depth: int
    width: int
    prefix_tokens: int
    input_name: str
    output_items: int
    stages: tuple[tuple[str, ...], ...] = field(default=(), metadata=LEFT_OUT)
    towers: bool = field(default=False, metadata=LEFT_OUT)

    @property
    def first_of_texts(self) -> int:
        """The first block of the text tower where there are two towers; 0 elsewhere."""
        return len(self.stages[0]) if self.towers else 0

    @property
    def ends(self) -> tuple[int, ...]:
        """The last blocks of all stages but the last: the model does something after them."""
        ends, at = [], 0
        for stage in self.stages:
            at += len(stage)
            ends.append(at - 1)
        return tuple(ends[:-1])

    @property
    def where(self) -> str:
        """Where the blocks are, for messages."""
        if not self.stages:
            return place(self.path)
        return f"{self.stages[0][0]!r} … {self.stages[-1][-1]!r}"

    def need_chain(self, what: str) -> None:
        """Refuse what only a chain of blocks of one width can have.

        Raises:
            BlockfitError: where the blocks are in stages.
        """
        if self.towers:
            raise BlockfitError(
                f"{what} needs one chain of blocks, and an image tower and a text tower are two, "
                "in which MLPs and attentions can be narrowed, but no block removed; ask for "
                "params, flops or latency, or give images or texts alone for one tower"
            )
        if self.stages:
            raise BlockfitError(
                f"{what} needs one chain of blocks with one number of tokens and one width; the "
                f"{self.depth} blocks of this model ({self.where}) are in {len(self.stages)} "
                "stages, in which MLPs and attentions can be narrowed, but no block removed; ask "
                "for params, flops or latency"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return fields_written(self)

    def hidden_in(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The hidden state among the arguments of a block's call."""
        return args[0] if args else kwargs[self.input_name]

    def hidden_out(self, output: Any) -> Tensor:
        """The hidden state in what a block returned."""
        several = isinstance(output, tuple) if self.stages else bool(self.output_items)
        return output[0] if several else output

    def as_output(self, hidden: Tensor, rest: tuple[Any, ...] | None = None) -> Any:
        """``hidden`` in the form in which the blocks return it; other items become ``None``.

        Args:
            hidden: the state.
            rest: what a block in a stage returned beside its state; ``None`` where nothing.
        """
        if self.stages:
            return hidden if rest is None else (hidden, *rest)
        return (hidden, *[None] * (self.output_items - 1)) if self.output_items else hidden

    @classmethod
    def from_json(cls, value: object, where: str = "blocks") -> Blocks:
        """Read what ``asdict`` wrote; ``where`` names the place in messages."""
        found = read(cls, value, where)
        for name, least in {"depth": 1, "width": 1, "prefix_tokens": 0, "output_items": 0}.items():
            if (entry := getattr(found, name)) < least:
                raise BlockfitError(f"{where}: {name} must be at least {least}, got {entry}")
        count = sum(map(len, found.stages))
        if found.stages and (count != found.depth or not all(found.stages)):
            raise BlockfitError(f"{where}: stages hold {count} blocks, and depth is {found.depth}")
        if found.towers and len(found.stages) != 2:
            raise BlockfitError(f"{where}: two towers are two stages, not {len(found.stages)}")
        return found


def named_blocks(model: nn.Module, blocks: Blocks) -> dict[str, nn.Module]:
    """The blocks by the names that their container gives them, in order.

    Raises:
        BlockfitError: where the model does not hold ``blocks.depth`` blocks at ``blocks.path``.
    """
    if blocks.stages:
        return {name: _block_at(model, name) for stage in blocks.stages for name in stage}
    found = 0
    for run in lists_in(container_at(model, blocks.path)):
        if len(run) == blocks.depth:
            return run
        found = max(found, len(run))
    raise BlockfitError(
        f"expected {blocks.depth} blocks at {place(blocks.path)} and found {found}; "
        "the model has changed since its blocks were looked up, so find them again"
    )


def block_paths(model: nn.Module, blocks: Blocks) -> list[str]:
    """Dotted paths of the blocks from the model on, in order: what their parameters' names begin
    with.

    Raises:
        BlockfitError: as ``named_blocks``.
    """
    return [".".join(filter(None, (blocks.path, name))) for name in named_blocks(model, blocks)]


def _block_at(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise BlockfitError(
            f"the model has no block {name!r}; it has changed since its blocks were looked up, so "
            "find them again"
        ) from None


def block_modules(model: nn.Module, blocks: Blocks) -> list[nn.Module]:
    """The modules that now stand at ``blocks.path``: blocks, and what replaced them."""
    return list(named_blocks(model, blocks).values())


@contextmanager
def record(model: nn.Module, blocks: Blocks) -> Iterator[list[Tensor]]:
    """Listen to the hidden states: after each forward the list holds its h[0] … h[L].

    The states are detached copies of shape (batch, tokens, width) in the model's dtype and on its
    device: a block that writes into its input does not change what was recorded.
    """
    states: list[Tensor] = []

    def first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.clear()
        states.append(blocks.hidden_in(args, kwargs).detach().clone())

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states.append(blocks.hidden_out(output).detach().clone())

    modules = block_modules(model, blocks)
    with ExitStack() as hooks:
        hooks.enter_context(modules[0].register_forward_pre_hook(first, with_kwargs=True))
        for module in modules:
            hooks.enter_context(module.register_forward_hook(after))
        yield states


@contextmanager
def overridden(
    model: nn.Module,
    blocks: Blocks,
    functions: Mapping[int, Callable[[Tensor], Tensor]],
    rests: Mapping[int, tuple[Any, ...] | None] | None = None,
) -> Iterator[None]:
    """Let block i compute ``functions[i](hidden)`` instead of itself until the ``with`` ends.

    Parameters, hooks and the form of the block's output stay as they are. ``rests`` are what blocks
    in stages return beside their states.

    Raises:
        BlockfitError: where there is no block i.
    """
    modules = block_modules(model, blocks)
    for index in functions:
        if not 0 <= index < blocks.depth:
            raise BlockfitError(f"there is no block {index}; the blocks are 0–{blocks.depth - 1}")

    def stand_in(index: int, function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        rest = None if rests is None else rests.get(index)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return blocks.as_output(function(blocks.hidden_in(args, kwargs)), rest)

        return forward

    with ExitStack() as undo:
        for index, function in functions.items():
            undo.enter_context(forward_as(modules[index], stand_in(index, function)))
        yield


@checked
def find_chain(
    model: nn.Module,
    example: Batch | None = None,
    path: str | None = None,
    prefix_tokens: int | None = None,
) -> Blocks:
    """Find a model's blocks by looking, and confirm them by one small forward pass.

    The blocks are the longest list (``ModuleList``, ``Sequential`` or any module with same-class
    children in a row) whose modules are each called once, in order, with a tensor of shape
    (batch, tokens, width) and return that shape to the next; a list inside another one's blocks
    does not count. Prefix tokens are the leading tokens of h[0] that do not depend on the image.
    The model is left as it was: modes, hooks, random state.

    Args:
        example: what the model is called with; guessed by ``example_input`` where missing. The
            first two entries are used, with noise added.
        path: the list by name, where looking is not enough.

    Raises:
        BlockfitError: no list, two lists of the same greatest length, a ``path`` that is not
            there or is no list of blocks, an example that is not finite or does not fit.
    """
    watches = _lists(model, path)
    two = two_different(model, example_input(model) if example is None else example)
    watch_forward(model, watches, two)
    watch = _choose(model, watches, path)
    assert watch.first is not None
    images, tokens, width = watch.first.shape
    if tokens == 2 != images:
        raise BlockfitError(
            f"the blocks at {place(watch.path)} take (tokens, batch, width); only blocks that take "
            "(batch, tokens, width) are supported"
        )
    if prefix_tokens is None:
        prefix_tokens = _count_prefix_tokens(watch.first)
        if image_tensor(two).ndim == 2:  # texts may begin alike: one token is for the whole text
            prefix_tokens = min(prefix_tokens, 1)
    elif not 0 <= prefix_tokens < tokens:
        raise BlockfitError(f"prefix_tokens is {prefix_tokens}, but the model has {tokens} tokens")
    blocks = Blocks(
        path=watch.path,
        depth=len(watch.run),
        width=width,
        prefix_tokens=prefix_tokens,
        input_name=watch.input_name,
        output_items=watch.output_items,
    )
    if named_blocks(model, blocks) != watch.run:
        raise BlockfitError(
            f"{place(watch.path)} holds two lists of {blocks.depth} modules, one of them blocks; "
            "keep the blocks in an nn.ModuleList of their own"
        )
    return blocks


def _lists(model: nn.Module, path: str | None) -> Sequence[Watch]:
    """Lists of like modules: all of the model's, or those at ``path``."""
    if path is None:
        if watches := candidates(model):
            return watches
        raise BlockfitError(
            f"found no blocks: {type(model).__name__} has no list of same-class modules; {HINT}"
        )
    if watches := watches_at(path, container_at(model, path)):
        return watches
    raise BlockfitError(
        f"{place(path)} holds no two modules of one class in a row; correct blocks="
    )


def _choose(model: nn.Module, watches: Sequence[Watch], path: str | None) -> Watch:
    good = [watch for watch in watches if not watch.problem]
    if not good and path is not None:
        tried = max(watches, key=lambda watch: len(watch.run))
        where = f"{place(tried.path)} with {len(tried.run)} modules"
        raise BlockfitError(f"{where} is no list of blocks: {tried.problem}; correct blocks=")
    chunks = [watch.chunks for watch in good if watch.chunks is not None]
    good = [watch for watch in good if not any(watch is held for held in chunks)]
    outer = [w for w in good if not any(_inside(w, other) for other in good)]
    if path is None:
        outer = _without_stages(model, watches, outer)
        outer = [watch for watch in outer if _depends_on_input(watch)] or outer
    longest = max(len(watch.run) for watch in outer)
    best = [watch for watch in outer if len(watch.run) == longest]
    if len(best) > 1:
        names = " and ".join(place(watch.path) for watch in best)
        raise BlockfitError(f"found {len(best)} lists of {longest} blocks, {names}; {HINT}")
    if path is None:
        _refuse_the_smaller_part(best[0], watches)
        _refuse_chunks(best[0], watches)
    return best[0]


def _refuse_chunks(best: Watch, watches: Sequence[Watch]) -> None:
    """Raise where each module of the list is a chain of blocks, but all together are none."""
    inner = next((watch for watch in watches if watch.chunks is best), None)
    if inner is None:
        return
    first = next(iter(best.run.values()))
    own = sum(any(part is module for part in first.modules()) for module in inner.run.values())
    if inner.done == own:
        raise BlockfitError(
            f"the {len(best.run)} modules at {place(best.path)} hold {len(inner.run)} blocks, but "
            f"{inner.problem}; to remove whole modules, give blocks={best.path}"
        )


def _refuse_the_smaller_part(best: Watch, watches: Sequence[Watch]) -> None:
    """Raise where a longer and larger list of modules works on maps, not on tokens."""
    for watch in watches:
        if watch.chunks is not None:
            continue  # what several modules hold is a list only where it works on tokens
        on_maps = watch.problem and len(watch.takes) == 3
        apart = not _inside(watch, best) and not _inside(best, watch)
        if on_maps and apart and len(watch.run) > len(best.run) and _size(watch) > _size(best):
            shape = " × ".join(map(str, watch.takes))
            raise BlockfitError(
                f"the {len(watch.run)} modules at {place(watch.path)} work on maps ({shape}), not "
                f"on (tokens, width), and the {len(best.run)} blocks at {place(best.path)} are the "
                f"smaller part of the model; to compress these alone, give blocks={best.path}"
            )


def _size(watch: Watch) -> int:
    return sum(p.numel() for module in watch.run.values() for p in module.parameters())


def _without_stages(model: nn.Module, watches: Sequence[Watch], good: list[Watch]) -> list[Watch]:
    """The lists of blocks that are no stages of a hierarchical model.

    Stages are lists inside several modules of a list that changes the shape, and lists of one
    class of which a later one has fewer tokens.

    Raises:
        BlockfitError: where there is none; it says what was seen.
    """
    changes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    stages: list[Watch] = []
    for outer in watches:
        inner = [watch for watch in good if _inside(watch, outer)]
        if outer.turned and len({_place_in(outer, watch) for watch in inner}) > 1:
            changes, stages = [*changes, outer.turned], [*stages, *inner]
    for one, other in permutations(good, 2):
        if _is_stage_before(one, other):
            changes, stages = [*changes, (one.takes, other.takes)], [*stages, one, other]
    left = [watch for watch in good if all(watch is not stage for stage in stages)]
    if left:
        return left
    tried = max(watches, key=lambda watch: len(watch.run))
    if not stages:
        changes = _changes_around(tried, watches)
    if changes:
        before, after = (" × ".join(map(str, shape)) for shape in changes[0])
        hint = f"; name one stage, such as blocks={stages[0].path}" if stages else ""
        raise BlockfitError(
            f"{type(model).__name__} is hierarchical: from one of its blocks or stages to the next "
            f"the hidden state turns from {before} to {after}, and a map needs one number of "
            f"tokens and one width in all blocks{hint}"
        )
    raise BlockfitError(
        f"found no blocks: the longest list is {place(tried.path)} with {len(tried.run)} modules, "
        f"but {tried.problem}; {HINT}"
    )


def _changes_around(
    tried: Watch, watches: Sequence[Watch]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Changes of shape in a list that failed, in the lists around it, and to lists of its class."""
    around = [w.turned for w in watches if w is tried or _several_hold(w, tried.block_class)]
    if tried.block_class.__module__.startswith("torch.nn"):
        return [*filter(None, around)]  # linear layers of two sizes are no stages
    alike = [
        (one.takes, other.takes)
        for one, other in combinations(watches, 2)
        if one.block_class is other.block_class is tried.block_class
        and one.takes
        and other.takes
        and one.takes != other.takes
    ]
    return [*filter(None, around), *alike]


def _several_hold(outer: Watch, kind: type[nn.Module]) -> bool:
    holders = (any(block_class(m) is kind for m in one.modules()) for one in outer.run.values())
    return sum(holders) > 1


def _is_stage_before(one: Watch, other: Watch) -> bool:
    return (
        one.block_class is other.block_class
        and 0 <= one.started < other.started
        and one.takes[0] > other.takes[0]
        and _depends_on_input(one)
        and _depends_on_input(other)
    )


def _depends_on_input(watch: Watch) -> bool:
    """Whether the list's first hidden state differs between the two entries of the example."""
    first = watch.first
    return first is None or first.is_meta or len(first) < 2 or not torch.equal(first[0], first[1])


def _inside(watch: Watch, other: Watch) -> bool:
    """Whether the modules of ``watch`` are parts of a block of ``other``."""
    return watch is not other and _place_in(other, watch) is not None


def _place_in(outer: Watch, watch: Watch) -> str | None:
    """The name of the module of ``outer`` that has the modules of ``watch`` as its parts."""
    part = next(iter(watch.run.values()))
    for name, module in outer.run.items():
        if part is not module and any(part is inner for inner in module.modules()):
            return name
    return None


def _count_prefix_tokens(first: Tensor) -> int:
    """Leading tokens of h[0], shape (2, tokens, width), that are the same for both images."""
    ask = "pass prefix_tokens"
    if first.is_meta or len(first) < 2:
        raise BlockfitError(
            f"cannot tell prefix tokens from patch tokens without two images; {ask}"
        )
    if not first.isfinite().all():
        raise BlockfitError(
            "the input of block 0 holds NaN or infinite values; check the model's weights"
        )
    change = (first[0].float() - first[1].float()).abs().amax(dim=-1)
    # Rounding may differ between rows of one batch; patch tokens all change about alike.
    same = (change <= 1e-3 * change.max()).tolist()
    if all(same):
        raise BlockfitError(f"the hidden state before block 0 does not depend on the input; {ask}")
    return same.index(False)
