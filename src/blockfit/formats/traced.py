"""A model as one graph: images in, tensors out, at one resolution or at any."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from blockfit.errors import BlockfitError, first_line
from blockfit.formats.folder import Saved, put_plan
from blockfit.formats.unpadded import Unpadded
from blockfit.models.blocks import block_modules, call, example_input
from blockfit.models.forward import evaluating, image_tower, parameters_of
from blockfit.models.load import skeleton
from blockfit.models.tensors import fill, storable

SINGLE = "output"
"""The name of the output of a model that returns one tensor."""

_TELLING = ("logits", "image_embeds", "last_hidden_state")


@dataclass(frozen=True)
class Resolution:
    """Height and width in pixels that an export takes.

    Args:
        size: the fixed ones; ``None`` for any multiple of the patch size.
    """

    size: tuple[int, int] | None

    @classmethod
    def parse(cls, text: str) -> Resolution:
        """``224``, ``224x320`` (height first) or ``dynamic``.

        Raises:
            BlockfitError: for anything else.
        """
        if text == "dynamic":
            return cls(None)
        found = re.fullmatch(r"([1-9]\d*)(?:[x×]([1-9]\d*))?", text)
        if found is None:
            raise BlockfitError(
                f"cannot read the resolution {text!r}; write 224, 224x320 (height first) or dynamic"
            )
        return cls((int(found[1]), int(found[2] or found[1])))


class Bare(nn.Module):
    """A model as exporters want it: one tensor of images in; one tensor, or several by name, out.

    Args:
        model: in eval mode; of a model of images and texts the image tower runs.
        resized: ask the model to interpolate its position embeddings, where it can be asked.
    """

    def __init__(self, model: nn.Module, resized: bool = False) -> None:
        super().__init__()
        self.model = model
        takes = {p.name for p in parameters_of(model.forward)}
        asks = resized and "interpolate_pos_encoding" in takes
        self.options = {"interpolate_pos_encoding": True} if asks else {}

    def forward(self, images: Tensor) -> Tensor | dict[str, Tensor]:
        tower = image_tower(self.model)
        if tower is not None:
            out = tower(images)
            return {"image_embeds": getattr(out, "pooler_output", out)}
        out = self.model(images, **self.options)
        return out if isinstance(out, Tensor) else dict(_tensors(out))


def _tensors(output: Any) -> list[tuple[str, Tensor]]:
    """The tensors of an output, those in a list under its name and their number."""
    items = output.items() if isinstance(output, Mapping) else enumerate(output)
    found = []
    for key, value in items:
        name = str(key) if isinstance(key, str) else f"{SINGLE}_{key}"
        if isinstance(value, Tensor):
            found.append((name, value))
        elif isinstance(value, (tuple, list)):
            parts = enumerate(value)
            found += [(f"{name}_{n}", part) for n, part in parts if isinstance(part, Tensor)]
    return found


def by_name(output: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What ``Bare`` returns, always by name."""
    return {SINGLE: output} if isinstance(output, Tensor) else dict(output)


def primary(outputs: Mapping[str, Tensor]) -> str:
    """The name of the output that matters most; see ``head.primary_output``."""
    return next((name for name in _TELLING if name in outputs), next(iter(outputs)))


def run(bare: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The outputs of ``bare`` by name, without gradients, on the model's device, in its dtype."""
    like = next(p for p in bare.parameters() if p.is_floating_point())
    with torch.no_grad(), evaluating(bare):
        return by_name(bare(images.to(like)))


def bare_at(saved: Saved, native: tuple[int, int], resolution: Resolution | None) -> Bare:
    """The model made ready for a resolution that may not be its own; the model itself stays.

    Args:
        native: height and width that its preprocessing gives.
        resolution: the one to export; ``None`` for ``native``.

    Raises:
        BlockfitError: where a timm model cannot be built for it, and where images run through
            nothing that was made smaller.
    """
    model = saved.model
    _check_smaller_for_images(saved)
    if resolution is None or resolution.size == native:
        return Bare(model).eval()
    if saved.source.library == "timm":
        model = _any_size(saved) if resolution.size is None else _timm_at(model, resolution.size)
    return Bare(model, resized=True).eval()


def _check_smaller_for_images(saved: Saved) -> None:
    """Refuse a model of images and texts of which the text tower alone was made smaller."""
    if not saved.plan or image_tower(saved.model) is None:
        return
    ran: list[bool] = []
    with ExitStack() as undo, evaluating(saved.model), torch.no_grad():
        for block in block_modules(saved.model, saved.blocks):
            note = block.register_forward_pre_hook(lambda module, args: ran.append(True))
            undo.enter_context(note)
        call(saved.model, example_input(saved.model))
    if not ran:
        raise BlockfitError(
            f"what is exported of {type(saved.model).__name__} is its image tower, and its text "
            "tower alone was made smaller; use export_hub, which holds both"
        )


def _timm_at(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    if not hasattr(model, "set_input_size"):
        return model
    resized: Any = copy.deepcopy(model)
    try:
        resized.set_input_size(img_size=size)
    except (AssertionError, ValueError, RuntimeError, TypeError) as error:
        raise BlockfitError(
            f"timm cannot bring the model to {size[0]} × {size[1]}: {first_line(error)}; "
            "give another resolution="
        ) from error
    return resized


def _any_size(saved: Saved) -> nn.Module:
    """A timm model built again so that it interpolates its position embeddings in each forward."""
    arguments = saved.source.arguments
    options = {**arguments["options"], "dynamic_img_size": True}
    source = replace(saved.source, arguments={**arguments, "options": options})
    try:
        model = skeleton(source)
    except BlockfitError as error:
        raise BlockfitError(
            f"{saved.source.name} takes no images of any size ({error}); give a fixed resolution"
        ) from error
    put_plan(model, saved.blocks, saved.plan)
    fill(model, storable(saved.model))
    return model


def patch_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of a patch: the stride of the model's first convolution; 1 without one."""
    convolutions = (m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d))
    first = next(convolutions, None)
    return (1, 1) if first is None else (int(first.stride[-2]), int(first.stride[-1]))


def trace(
    bare: Bare,
    images: Tensor,
    *,
    any_batch: bool = True,
    any_size: bool = False,
    unpadded: bool = False,
) -> torch.export.ExportedProgram:
    """The graph of a model by torch.export, without the places in code where it was made.

    Args:
        images: (2 or more, C, H, W), of clips (2 or more, T, C, H, W); of the dtype of the model.
        any_batch: take any number of images, otherwise just as many.
        any_size: take any multiple of the patch size, otherwise just this height and width.
        unpadded: narrowed heads stay as narrow as they are. Runtimes whose kernels take queries and
            values of different sizes gain by it; PyTorch's fastest ones on GPUs do not take them.

    Raises:
        BlockfitError: where torch.export cannot follow the model, or the model fixes what should
            be free.
    """
    dims: dict[int, Any] = {0: torch.export.Dim("batch", min=1)} if any_batch else {}
    if any_size:
        rows, columns = (torch.export.Dim(name, min=1) for name in ("rows", "columns"))
        height, width = patch_size(bare)
        dims |= {images.ndim - 2: height * rows, images.ndim - 1: width * columns}
    try:
        with torch.no_grad(), evaluating(bare), Unpadded() if unpadded else nullcontext():
            program = torch.export.export(
                bare, (images,), dynamic_shapes={"images": dims}, strict=False
            )
    except Exception as error:  # whatever the model's own code raises under tracing
        raise BlockfitError(_why_not(bare.model, error, any_size)) from error
    if unpadded:
        program.graph_module.graph.eliminate_dead_code()
        program.graph_module.recompile()
    _forget_origins(program.graph_module)
    return program


def draws(program: torch.export.ExportedProgram) -> bool:
    """Whether a graph draws random numbers in each run, as masked autoencoders do.

    Dropout, also that of attention, draws none in eval mode.
    """
    random = torch.Tag.nondeterministic_seeded
    return any(
        random in node.target.tags and not re.search("dropout|attention", node.target.name())
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    )


def _why_not(model: nn.Module, error: Exception, any_size: bool) -> str:
    name = type(model).__name__
    if any_size:
        return (
            f"{name} cannot take images of any size ({first_line(error)}); "
            "give a fixed resolution, and export once for each that you need"
        )
    if "Constraints violated" in str(error):
        return (
            f"{name} turns the number of images into a plain number, as len(images) does, and so "
            "cannot take any; give batch=N"
        )
    return f"torch.export cannot follow {name}: {first_line(error)}"


def _forget_origins(graph_module: torch.fx.GraphModule) -> None:
    """Take out the names of files and of blockfit's classes, which torch notes for debugging.

    The paths of modules stay: they name the nodes of what is made from the graph.
    """
    for module in graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                for key in ("stack_trace", "source_fn_stack", "from_node"):
                    node.meta.pop(key, None)
                stack = node.meta.get("nn_module_stack", {})
                for key, (path, kind) in stack.items():
                    if "blockfit" in str(kind):
                        stack[key] = (path, "torch.nn.modules.module.Module")


def input_name(model: nn.Module) -> str:
    """``pixel_values`` where the model calls its images so, otherwise ``images``."""
    names = {parameter.name for parameter in parameters_of(model.forward)}
    return "pixel_values" if "pixel_values" in names else "images"
