"""Looking at an unknown model: its lists of modules, and what one forward pass shows of them.

Nothing here knows a model by name.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from blockfit.errors import BlockfitError

Batch = Tensor | Mapping[str, Any]
"""What a model is called with: a tensor as its one argument, a mapping as its keywords.

Beside tensors with a row per image a mapping may hold what all images share: flags, numbers,
tensors without dimensions. It is passed on as it is.
"""

_PIXELS = ("pixel_values", "images", "image", "x", "input", "inputs", "input_ids")


FORWARD_ERRORS = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
)
"""What the code of a model raises where it cannot be run on what it is given."""


class Enough(Exception):
    """Ends a forward as soon as what was looked for has been seen."""


def call(model: nn.Module, inputs: Batch) -> Any:
    """One forward: ``model(inputs)``, or ``model(**inputs)`` for a mapping.

    Tensors are brought to the model's device and floating dtype first. Of a model of images and
    texts the towers run that are given something: the output is ``{"image_embeds": …}``,
    ``{"text_embeds": …}`` or both. In eval mode a model that draws random numbers (masking) draws
    the same ones in every call.
    """
    inputs = placed(model, inputs)
    with nullcontext() if model.training else same_draws(model):
        if (towers := _towers_for(model, inputs)) is not None:
            return {name: _embeddings(*tower) for name, tower in towers.items()}
        if not isinstance(inputs, Mapping):
            return model(inputs)
        if not model.training and _fills_a_cache(model, inputs):
            # A block that is run again on its own would find its own keys in the cache.
            return model(**inputs, use_cache=False)
        return model(**inputs)


@contextmanager
def forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``module`` compute ``forward`` instead of its own until the ``with`` ends.

    Parameters, hooks, and a ``forward`` that somebody else put on the instance stay as they are.
    """
    attributes = module.__dict__
    before = {"forward": attributes["forward"]} if "forward" in attributes else {}
    attributes["forward"] = forward
    try:
        yield
    finally:
        attributes.pop("forward", None)
        attributes.update(before)


def _fills_a_cache(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the model is a decoder that keeps keys and values, and is not told otherwise."""
    wanted = getattr(getattr(model, "config", None), "use_cache", False)
    names = {p.name for p in parameters_of(model.forward)}
    return bool(wanted) and "use_cache" in names and "use_cache" not in inputs


_TEXTS = {"input_ids", "text"}


def image_tower(model: nn.Module) -> Callable[..., Any] | None:
    """What gives the features of images alone, where the model's forward wants texts, too."""
    if _TEXTS.isdisjoint(p.name for p in parameters_of(model.forward)):
        return None
    own = (getattr(model, name, None) for name in ("get_image_features", "encode_image"))
    return next(filter(callable, own), None)


def text_tower(model: nn.Module) -> Callable[..., Any] | None:
    """What gives the features of texts alone, where there is such a function."""
    own = (getattr(model, name, None) for name in ("get_text_features", "encode_text"))
    return next(filter(callable, own), None)


def takes_texts(model: nn.Module) -> bool:
    """Whether the model is called with texts, alone or beside images."""
    return not _TEXTS.isdisjoint(p.name for p in parameters_of(model.forward))


def image_name(model: nn.Module) -> str | None:
    """By which name the image tower takes images; ``None`` for a model that is no two towers."""
    tower = image_tower(model)
    if tower is None or text_tower(model) is None:
        return None
    return next((p.name for p in parameters_of(tower)), None)


def of_towers(
    model: nn.Module, inputs: Batch
) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """What a batch of images and texts gives to either tower of a model of both.

    ``None`` for a batch of one kind alone, and for a model without two towers.
    """
    tower = image_tower(model)
    if tower is None or text_tower(model) is None or not isinstance(inputs, Mapping):
        return None
    own = {p.name for p in parameters_of(tower)}
    images = {name: value for name, value in inputs.items() if name in own}
    texts = {name: value for name, value in inputs.items() if name not in own}
    return (images, texts) if images and not _TEXTS.isdisjoint(texts) else None


def _towers_for(
    model: nn.Module, inputs: Batch
) -> dict[str, tuple[Callable[..., Any], Batch]] | None:
    """Output → the tower that makes it and what that is given; ``None`` for the whole model."""
    images, texts = image_tower(model), text_tower(model)
    if images is None:
        return None
    if isinstance(inputs, Tensor) or _TEXTS.isdisjoint(inputs):
        return {"image_embeds": (images, inputs)}
    if texts is None:
        return None
    if (both := of_towers(model, inputs)) is not None:
        return {"image_embeds": (images, both[0]), "text_embeds": (texts, both[1])}
    return {"text_embeds": (texts, inputs)}


def _embeddings(tower: Callable[..., Any], inputs: Batch) -> Any:
    out = tower(**inputs) if isinstance(inputs, Mapping) else tower(inputs)
    return getattr(out, "pooler_output", out)


@contextmanager
def same_draws(model: nn.Module) -> Iterator[None]:
    """Random numbers as after a fixed seed; the random state comes back after."""
    devices = _gpus(model)
    with torch.random.fork_rng(devices=devices):
        # Not torch.manual_seed: it would also seed devices whose state is not brought back.
        torch.default_generator.manual_seed(0)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(0)
        yield


def _gpus(model: nn.Module) -> list[torch.device]:
    """Where its parameters lie on GPUs; where none is in use, they are not looked through."""
    if not torch.cuda.is_initialized():
        return []
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


def placed(model: nn.Module, inputs: Batch) -> Batch:
    """``inputs`` on the model's device; floating tensors in the model's floating dtype."""
    like = _model_float(model)

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(like) if value.is_floating_point() else value.to(like.device)

    if isinstance(inputs, Tensor):
        return move(inputs)
    return {name: move(value) for name, value in inputs.items()}


def _run_on(model: nn.Module) -> torch.device:
    """Where a model runs whose weights accelerate brings there for each module's forward."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return torch.device("meta")


def offloaded(model: nn.Module) -> bool:
    """Whether some weights lie elsewhere and come only for a module's forward."""
    return any(parameter.is_meta for parameter in model.parameters())


def first_images(inputs: Batch, count: int) -> Batch:
    """The first ``count`` images of a batch."""
    return images_at(inputs, range(min(count, image_count(inputs))))


def images_at(inputs: Batch, rows: Sequence[int]) -> Batch:
    """Some images of a batch, and whole what all images share."""
    count, chosen = image_count(inputs), list(rows)
    part: Any = slice(chosen[0], chosen[-1] + 1) if _in_a_row(chosen) else chosen

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and len(value) == count:
            return value[part]
        if isinstance(value, list) and len(value) == count:
            return [value[row] for row in chosen]
        return value

    if isinstance(inputs, Tensor):
        return inputs[part]
    return {name: pick(value) for name, value in inputs.items()}


def _in_a_row(rows: list[int]) -> bool:
    return bool(rows) and rows == list(range(rows[0], rows[0] + len(rows)))


def image_count(inputs: Batch) -> int:
    """How many images (or texts) a batch holds."""
    return len(image_tensor(inputs))


def image_tensor(inputs: Batch) -> Tensor:
    """The tensor of a batch that has one row per image: by its name, or of the most dimensions.

    Raises:
        BlockfitError: where there is none.
    """
    if isinstance(inputs, Tensor):
        return inputs
    tensors = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and v.ndim}
    named = next((tensors[name] for name in _PIXELS if name in tensors), None)
    if named is not None:
        return named
    if not tensors:
        raise BlockfitError(
            f"what the model is called with ({', '.join(map(str, inputs)) or 'nothing'}) holds no "
            "tensor with a row per image; give one, such as pixel_values"
        )
    return max(tensors.values(), key=lambda tensor: tensor.ndim)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the duration; every module's mode and the random state come back after."""
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=_gpus(model)):
        try:
            for module, mode in modes:
                if mode:
                    module.training = False
            yield
        finally:
            for module, mode in modes:
                if module.training != mode:
                    module.training = mode


def block_class(module: nn.Module) -> type[nn.Module]:
    """The class of a block; for a block that was replaced, the class of the one that was there."""
    replaced = getattr(type(module), "_blockfit_replaces", type(module))
    return module.__dict__.get("_blockfit_stands_for", replaced)


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


def held_by(run: Mapping[str, nn.Module]) -> dict[str, nn.Module] | None:
    """The blocks that the modules of a run hold in their turn, as ``0.0``, ``0.1``, ``1.0`` …

    For a model that keeps its blocks in chunks (DINOv2's ``block_chunks``, nested ``Sequential``).
    Placeholders without weights are passed over. ``None`` where the modules hold anything else, or
    the parts of a block (their parameters have other names than those of the part before).
    """
    found: dict[str, nn.Module] = {}
    for name, holder in run.items():
        inner = {n: m for n, m in holder.named_children() if _counts(m)}
        if not inner or next(holder.parameters(recurse=False), None) is not None:
            return None
        found |= {f"{name}.{key}": module for key, module in inner.items()}
    whole = [module for module in found.values() if not _touched(module)]
    alike = len(set(map(block_class, found.values()))) == 1
    names = {frozenset(name for name, _ in module.named_parameters()) for module in whole}
    leaves = any(next(module.children(), None) is None for module in whole)
    return found if alike and len(names) <= 1 and not leaves and len(found) > len(run) else None


def _counts(module: nn.Module) -> bool:
    return _touched(module) or next(module.parameters(), None) is not None


def _touched(module: nn.Module) -> bool:
    """Whether a block in it, or it, was replaced."""
    return any(block_class(part) is not type(part) for part in module.modules())


def lists_in(container: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """``runs_in``, and after each the blocks that its modules hold in their turn."""
    for run in runs_in(container):
        inner: dict[str, nn.Module] | None = run
        while inner is not None:
            yield inner
            inner = held_by(inner)


def place(path: str) -> str:
    """A path as messages write it."""
    return repr(path) if path else "the model itself"


def container_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path.

    Raises:
        BlockfitError: where there is none; the message names paths that look alike.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        known = dict(model.named_modules(remove_duplicate=False))
    lists = [name for name, module in known.items() if name and runs_in(module)]
    near = difflib.get_close_matches(path, lists, 3, 0.3) or sorted(lists, key=len)[:3]
    there = (
        f"lists of modules in it are {', '.join(map(repr, near))}" if near else "it has no lists"
    )
    raise BlockfitError(f"the model has no module {path!r}; {there}; correct blocks=")


def parameters_of(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return [*inspect.signature(forward).parameters.values()]
    except (TypeError, ValueError):  # compiled code has no signature
        return []


def _model_float(model: nn.Module) -> Tensor:
    """A floating parameter (or buffer) of the model, for its dtype and the device it runs on."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            if tensor.is_meta and (device := _run_on(model)).type != "meta":
                return torch.empty(0, dtype=tensor.dtype, device=device)
            return tensor
    return torch.empty(0)


def example_input(model: nn.Module) -> Batch:
    """Two random images of the size that the model says it takes, as it wants to be called.

    The size is read from ``image_size`` or ``img_size`` of the model's config or modules, or from
    ``input_size`` of its pretrained configuration; the channels from its first convolution. Shape
    (2, channels, height, width), for models of clips (2, frames, channels, height, width), standard
    normal, in the model's dtype and on its device; the global random state is not used.

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
    frames = frames_of(model)
    shape = (2, *([] if frames is None else [frames]), _channels(model), *size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    pixels = noise.to(device=like.device, dtype=like.dtype)
    names = list(inspect.signature(model.forward).parameters)
    if "pixel_values" not in names[1:] or image_tower(model) is not None:
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


def frames_of(model: nn.Module) -> int | None:
    """Frames of the clips that a transformers model takes; ``None`` where it takes images."""
    frames = getattr(getattr(model, "config", None), "num_frames", None)
    return frames if isinstance(frames, int) and frames > 0 else None


def _channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            return module.in_channels
    return int(getattr(getattr(model, "config", None), "num_channels", 3))


def two_different(model: nn.Module, example: Batch) -> Batch:
    """The first two entries of an example with noise added, on the model's device, in its dtype.

    What accompanies images (texts, times) is the same for both. Of texts alone the second one is
    the first that differs from the first.

    Raises:
        BlockfitError: where the example is empty, not finite, or holds no tensors.
    """
    like = _model_float(model)
    generator = torch.Generator().manual_seed(1)
    if not isinstance(example, Tensor | Mapping):
        raise BlockfitError(
            f"an example is a tensor or a mapping of names to tensors, not {type(example).__name__}"
        )
    main = image_tensor(example)
    count, pictures = len(main), main.ndim >= 3
    if count == 0:
        raise BlockfitError("the example is empty; pass at least one image")
    second = 1
    if not pictures and not main.is_floating_point() and not main.is_meta:
        second = next((row for row in range(1, count) if not main[row].equal(main[0])), 1)

    def two(name: str, value: Any) -> Any:
        if isinstance(value, list) and len(value) == count:
            return (2 * value)[:2] if count == 1 else value[:2]
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        # Texts come in numbers of their own beside images; a single row is shared by all of them.
        counted = value.ndim >= 2 and len(value) > 1 and not value.is_floating_point()
        if len(value) != count and not counted:
            return value
        rows = value[[0, second]] if len(value) == count > 1 else value[:2]
        rows = rows.detach().to(like.device)
        rows = torch.cat([rows, rows]) if len(rows) == 1 else rows
        if rows.is_floating_point():
            if not rows.is_meta and not rows.isfinite().all():
                raise BlockfitError(f"{name} holds NaN or infinite values; pass finite images")
            rows = rows.to(like.dtype)
        if rows.ndim < 3:
            return rows[:1].expand_as(rows) if pictures else rows  # the same text for both images
        if rows.is_floating_point():
            return rows + torch.randn(rows.shape, generator=generator).to(rows)
        if rows.dtype == torch.uint8:
            return torch.randint(0, 256, rows.shape, generator=generator).to(rows)
        return rows

    if isinstance(example, Tensor):
        return two("the example", example)
    return {str(name): two(f"{name} of the example", v) for name, v in example.items()}


def describe(inputs: Batch) -> str:
    """The shapes of what a model is called with, for messages."""
    if isinstance(inputs, Mapping):
        return ", ".join(
            f"{name} {tuple(value.shape)}" if isinstance(value, Tensor) else f"{name} {value!r}"
            for name, value in inputs.items()
        )
    return str(tuple(inputs.shape))
