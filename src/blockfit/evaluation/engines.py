"""What runs a model: torch as it is or compiled, or onnxruntime, behind one function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from blockfit.formats.folder import Saved
from blockfit.formats.onnx_file import Session, export_onnx
from blockfit.models.cost import measuring, peak_memory, wait
from blockfit.models.forward import (
    Batch,
    call,
    example_input,
    first_images,
    image_tensor,
    image_tower,
    placed,
)
from blockfit.models.load import source_of
from blockfit.models.stages import find_blocks
from blockfit.models.surgery import removed_plan
from blockfit.provenance import installed_versions

ENGINES = ("eager", "compiled", "onnx")
DTYPES = ("float32", "bfloat16", "float16")

MOST_COMPILED = 64
"""Compiled models and batch sizes of one class that torch may hold at once."""


@dataclass(frozen=True)
class Engine:
    """A model that is ready to run on one batch.

    Args:
        memory: measures its peak in bytes; ``None`` where that cannot be had.
    """

    run: Callable[[], object]
    memory: Callable[[], int | None]


def unable(engine: str, dtype: str, device: str) -> str | None:
    """Why an engine cannot run in a dtype on a device; ``None`` where it can."""
    if engine == "onnx" and (dtype != "float32" or torch.device(device).type != "cpu"):
        return f"onnx in {dtype} on {device} is not measured: onnxruntime runs float32 on the cpu"
    return None


def onnx_files(models: Mapping[str, nn.Module], inputs: Batch, folder: Path) -> dict[str, Path]:
    """Every model as an ONNX file for any number of images, by name.

    Raises:
        BlockfitError: where one cannot be exported.
    """
    out = {}
    for number, (name, model) in enumerate(models.items()):
        blocks = find_blocks(model, placed(model, first_images(inputs, 2)))
        plan, source = removed_plan(model, blocks), source_of(model)
        out[name] = folder / f"{number}.onnx"
        export_onnx(Saved(model, blocks, plan, {}, source, installed_versions()), out[name])
    return out


@contextmanager
def ready(
    engine: str, model: nn.Module, inputs: Batch, file: Path | None = None
) -> Iterator[Engine]:
    """Prepare ``model`` for ``inputs`` on its own device and in its own dtype.

    It is in eval mode and makes no gradients as long as the context lasts.
    """
    batch = placed(model, inputs)
    if file is not None:
        yield _in_onnx(Session(file), batch)
        return
    with measuring(model):
        if engine == "compiled":
            model = cast(nn.Module, torch.compile(model, dynamic=False))
        yield Engine(_waited(model, batch), functools.partial(peak_memory, model, batch))


@contextmanager
def compiling(engine: str) -> Iterator[None]:
    """Room for several compiled models of one class; what was compiled is forgotten at the end."""
    if engine != "compiled":
        yield
        return
    from torch import _dynamo as dynamo

    room: dict[str, Any] = {
        "recompile_limit": MOST_COMPILED,
        "accumulated_recompile_limit": MOST_COMPILED,
        "fail_on_recompile_limit_hit": True,  # the rest would silently run uncompiled
    }
    dynamo.reset()
    try:
        with dynamo.config.patch(room):
            yield
    finally:
        dynamo.reset()


def noise_for(model: nn.Module, count: int) -> Batch:
    """``count`` images of noise of the size that a model takes, as it wants to be called.

    Raises:
        BlockfitError: where the model does not say what it takes.
    """
    own = source_of(model).preprocessing
    if own is not None:
        shape = own(Image.fromarray(np.zeros((64, 64, 3), np.uint8))).shape
        return torch.randn((count, *shape), generator=torch.Generator().manual_seed(0))
    example = example_input(model)

    def repeated(value: Tensor) -> Tensor:
        return value[:1].repeat(count, *[1] * (value.ndim - 1))

    if isinstance(example, Tensor):
        return repeated(example)
    return {name: repeated(value) for name, value in example.items()}


def _in_onnx(session: Session, batch: Batch) -> Engine:
    """onnxruntime takes and gives arrays; what it allocates cannot be seen from here."""
    pixels = batch if isinstance(batch, Tensor) else batch["pixel_values"]
    feed = {session.input: pixels.numpy()}
    return Engine(functools.partial(session.session.run, None, feed), lambda: None)


def _waited(model: nn.Module, batch: Batch) -> Callable[[], object]:
    """One forward pass with nothing around it that a user's own code would not do."""
    device = image_tensor(batch).device
    if image_tower(model) is not None:
        forward: Callable[[], object] = functools.partial(call, model, batch)
    elif isinstance(batch, Tensor):
        forward = functools.partial(model, batch)
    else:
        forward = functools.partial(model, **batch)

    def run() -> object:
        output = forward()
        wait(device)
        return output

    return run
