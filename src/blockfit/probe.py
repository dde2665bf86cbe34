"""Looking at an unknown model: its lists of modules, and what one forward pass shows of them.

Nothing here knows a model by name.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from blockfit.errors import BlockfitError

Batch = Tensor | Mapping[str, Tensor]
"""What a model is called with: a tensor as its one argument, a mapping as its keywords."""


def call(model: nn.Module, inputs: Batch) -> Any:
    """One forward: ``model(inputs)``, or ``model(**inputs)`` for a mapping.

    Tensors are brought to the model's device and floating dtype first.
    """
    inputs = placed(model, inputs)
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def placed(model: nn.Module, inputs: Batch) -> Batch:
    """``inputs`` on the model's device; floating tensors in the model's floating dtype."""
    floats = (t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())
    like = next(floats, torch.empty(0))

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(like) if value.is_floating_point() else value.to(like.device)

    if isinstance(inputs, Tensor):
        moved: Tensor = move(inputs)
        return moved
    return {name: move(value) for name, value in inputs.items()}


def first_images(inputs: Batch, count: int) -> Batch:
    """The first ``count`` images of a batch."""
    if isinstance(inputs, Tensor):
        return inputs[:count]
    return {n: v[:count] if isinstance(v, Tensor) else v for n, v in inputs.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the duration; every module's mode and the random state come back after."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def block_class(module: nn.Module) -> type[nn.Module]:
    """The class of a block; for a block that was replaced, the class of the one that was there."""
    kind: type[nn.Module] = getattr(type(module), "_blockfit_replaces", type(module))
    return kind


def runs_in(container: nn.Module) -> list[dict[str, nn.Module]]:
    """Runs of two or more same-class children that follow each other."""
    runs: list[dict[str, nn.Module]] = []
    last: type[nn.Module] | None = None
    for name, child in container._modules.items():
        if child is None:
            continue
        if block_class(child) is not last:
            runs.append({})
            last = block_class(child)
        runs[-1][name] = child
    return [run for run in runs if len(run) > 1]


def place(path: str) -> str:
    """A path as messages write it."""
    return repr(path) if path else "the model itself"


def container_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path.

    Raises:
        BlockfitError: where there is none; the message names paths that look alike.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    if path in known:
        return known[path]
    lists = [name for name, module in known.items() if name and runs_in(module)]
    near = difflib.get_close_matches(path, lists, 3, 0.3) or sorted(lists, key=len)[:3]
    there = (
        f"lists of modules in it are {', '.join(map(repr, near))}" if near else "it has no lists"
    )
    raise BlockfitError(f"the model has no module {path!r}; {there}; correct --blocks")


@dataclass
class Watch:
    """What one candidate list does during a forward pass: how far it got, or why it is no list."""

    path: str
    run: dict[str, nn.Module]
    problem: str = ""
    done: int = 0
    first: Tensor | None = None
    last: Tensor | None = None
    input_name: str = ""
    output_items: int = 0
    handles: list[Any] = field(default_factory=list)

    def listen(self) -> None:
        if len({id(module) for module in self.run.values()}) < len(self.run):
            self.problem = "some of its blocks are one and the same module"
            return
        for index, module in enumerate(self.run.values()):
            self.handles.append(
                module.register_forward_pre_hook(self._before(index), with_kwargs=True)
            )
            self.handles.append(module.register_forward_hook(self._after(index)))

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
    try:
        parameters = [*inspect.signature(block_class(module).forward).parameters.values()][1:]
    except (TypeError, ValueError):  # compiled code has no signature
        parameters = []
    name = next((p.name for p in parameters if p.kind is not p.VAR_POSITIONAL), "")
    if args:
        return (args[0] if _is_hidden(args[0]) else None), name
    if not _is_hidden(kwargs.get(name)):
        name = next((key for key, value in kwargs.items() if _is_hidden(value)), name)
    return (kwargs[name] if _is_hidden(kwargs.get(name)) else None), name


def _is_hidden(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point()


def _same(left: Tensor, right: Tensor) -> bool:
    if left is right:
        return True
    if left.shape != right.shape or left.dtype != right.dtype or left.device != right.device:
        return False
    return left.is_meta or torch.allclose(left, right, rtol=0, atol=0, equal_nan=True)


def candidates(model: nn.Module) -> list[Watch]:
    watches: dict[tuple[int, ...], Watch] = {}
    for path, module in model.named_modules():
        for run in runs_in(module):
            watches.setdefault(tuple(map(id, run.values())), Watch(path, run))
    return list(watches.values())


def watch_forward(model: nn.Module, watches: Sequence[Watch], inputs: Batch) -> None:
    try:
        for watch in watches:
            watch.listen()
        # Not inference_mode: a model may keep tensors that it made here and train with them later.
        with evaluating(model), torch.no_grad():
            call(model, inputs)
    except (
        RuntimeError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        AssertionError,
    ) as error:
        raise BlockfitError(
            f"the model cannot be run on the example ({describe(inputs)}): {error}; "
            "pass an example of what it is called with"
        ) from error
    finally:
        for watch in watches:
            watch.close()


def _model_float(model: nn.Module) -> Tensor:
    """A floating parameter (or buffer) of the model, for its dtype and device."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor
    return torch.empty(0)


def example_input(model: nn.Module) -> Batch:
    """Two random images of the size that the model says it takes, as it wants to be called.

    The size is read from ``image_size`` or ``img_size`` of the model's config or modules, or from
    ``input_size`` of its pretrained configuration; the channels from its first convolution. Shape
    (2, channels, height, width), standard normal, in the model's dtype and on its device; the
    global random state is not used.

    Raises:
        BlockfitError: where the model does not say what it takes.
    """
    size = _image_size(model)
    if size is None:
        raise BlockfitError(
            f"cannot tell what {type(model).__name__} is called with; pass an example, such as "
            "one batch of its images"
        )
    like = _model_float(model)
    noise = torch.randn((2, _channels(model), *size), generator=torch.Generator().manual_seed(0))
    pixels = noise.to(device=like.device, dtype=like.dtype)
    names = list(inspect.signature(model.forward).parameters)
    if "pixel_values" not in names[1:]:
        return pixels
    inputs = {"pixel_values": pixels}
    if "input_ids" in names:
        inputs["input_ids"] = torch.ones(2, 4, dtype=torch.long, device=like.device)
    return inputs


def _image_size(model: nn.Module) -> tuple[int, int] | None:
    config = getattr(model, "config", None)
    for holder in (config, getattr(config, "vision_config", None), *model.modules()):
        for name in ("image_size", "img_size"):
            size = getattr(holder, name, None)
            if isinstance(size, int) and not isinstance(size, bool):
                return size, size
            if isinstance(size, (tuple, list)) and len(size) == 2:
                return int(size[0]), int(size[1])
    for name in ("pretrained_cfg", "default_cfg"):
        size = (getattr(model, name, None) or {}).get("input_size")
        if size:
            return int(size[-2]), int(size[-1])
    return None


def _channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return int(getattr(getattr(model, "config", None), "num_channels", 3))


def two_different(model: nn.Module, example: Batch) -> Batch:
    """The first two entries of an example with noise added, on the model's device, in its dtype.

    Raises:
        BlockfitError: where the example is empty, not finite, or holds no tensors.
    """
    like = _model_float(model)
    generator = torch.Generator().manual_seed(1)

    def two(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if len(value) == 0:
            raise BlockfitError(f"{name} is empty; pass at least one image")
        rows = value[:2].detach().to(like.device)
        rows = torch.cat([rows, rows]) if len(rows) == 1 else rows
        if rows.is_floating_point():
            if not rows.is_meta and not rows.isfinite().all():
                raise BlockfitError(f"{name} holds NaN or infinite values; pass finite images")
            rows = rows.to(like.dtype)
        if rows.ndim < 3:
            return rows
        if rows.is_floating_point():
            return rows + torch.randn(rows.shape, generator=generator).to(rows)
        if rows.dtype == torch.uint8:
            return torch.randint(0, 256, rows.shape, generator=generator).to(rows)
        return rows

    if isinstance(example, Tensor):
        doubled: Batch = two("the example", example)
        return doubled
    if isinstance(example, Mapping):
        return {str(name): two(f"{name} of the example", v) for name, v in example.items()}
    raise BlockfitError(
        f"an example is a tensor or a mapping of names to tensors, not {type(example).__name__}"
    )


def describe(inputs: Batch) -> str:
    """The shapes of what a model is called with, for messages."""
    if isinstance(inputs, Mapping):
        return ", ".join(
            f"{name} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{name} {value!r}"
            for name, value in inputs.items()
        )
    return str(tuple(inputs.shape))
