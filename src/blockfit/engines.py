"""What runs a model: torch as it is or compiled, behind one function without arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from blockfit.measure import measuring, peak_memory, wait
from blockfit.models import source_of
from blockfit.probe import Batch, call, example_input, image_tower, placed

ENGINES = ("eager", "compiled")
DTYPES = ("float32", "bfloat16", "float16")

MOST_COMPILED = 64
"""Compiled models and batch sizes of one class that torch may hold at once."""


@dataclass(frozen=True)
class Engine:
    """A model that is ready to run on one batch.

    Args:
        run: one forward pass, waited for.
        memory: measures its peak in bytes; ``None`` where that cannot be had.
    """

    run: Callable[[], object]
    memory: Callable[[], int | None]


@contextmanager
def ready(engine: str, model: nn.Module, inputs: Batch) -> Iterator[Engine]:
    """Prepare ``model`` for ``inputs`` on its own device and in its own dtype.

    It is in eval mode and makes no gradients as long as the context lasts.

    Args:
        engine: one of ``ENGINES``.
        model: on the device and in the dtype that are to be measured.
        inputs: a batch.
    """
    batch = placed(model, inputs)
    with measuring(model):
        if engine == "compiled":
            model = _compiled(model)
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


def _compiled(model: nn.Module) -> nn.Module:
    made: Any = torch.compile(model, dynamic=False)
    return made


def _waited(model: nn.Module, batch: Batch) -> Callable[[], object]:
    """One forward pass with nothing around it that a user's own code would not do."""
    values = [batch] if isinstance(batch, Tensor) else batch.values()
    device = next(value.device for value in values if isinstance(value, Tensor))
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
