"""Whether a model holds in half precision: hidden states against float32, and what overflows."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockfit.data.images import Images
from blockfit.errors import BlockfitError
from blockfit.formats.int8 import check_no_int8
from blockfit.models.blocks import Blocks, block_modules, record
from blockfit.models.cost import measuring
from blockfit.models.forward import Batch, call, first_images, placed
from blockfit.models.head import observe, primary_output
from blockfit.models.surgery import is_replaced
from blockfit.progress import Progress, silent

HALVES = ("bfloat16", "float16")

NEAR = 0.25
"""Part of a dtype's largest number from which on a hidden state is called close to it."""

LARGEST_ERROR = 0.05
"""Of the output, relative to float32's; more is called a loss."""

LEAST_AGREEMENT = 0.99
"""Part of the images that must keep their top-1 class; less is called a loss."""

FEW = 8
"""Images that ``overflow_warnings`` looks at."""


@dataclass(frozen=True)
class Boundary:
    """A hidden state in half precision.

    Args:
        index: l of h[l].
        largest: its largest absolute value, in float32.
        error: relative to float32's (root of the ratio of summed squares); NaN where it overflows.
        not_finite: how many of its values are NaN or infinite.
    """

    index: int
    largest: float
    error: float
    not_finite: int


@dataclass(frozen=True)
class Precision:
    """A model in half precision beside itself in float32.

    Args:
        boundaries: h[0] … h[L], each as the whole model in half precision makes it.
        output_error: of the model's output, likewise; ``None`` where it is not finite.
        agreement: fraction of images with the same top-1 class; ``None`` without a head.
    """

    dtype: str
    images: int
    boundaries: tuple[Boundary, ...]
    output_error: float | None
    agreement: float | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "dtype": self.dtype,
            "images": self.images,
            "boundaries": [
                {
                    "index": b.index,
                    "largest": b.largest,
                    "relative_error": None if math.isnan(b.error) else b.error,
                    "not_finite": b.not_finite,
                }
                for b in self.boundaries
            ],
            "output_error": self.output_error,
            "agreement": self.agreement,
            "warnings": list(self.warnings),
        }


class _Sums:
    """Squares of differences and of values, largest values, over batches."""

    def __init__(self) -> None:
        self.off = self.whole = self.largest = 0.0
        self.not_finite = 0

    def add(self, half: Tensor, exact: Tensor) -> None:
        half, exact = half.to(exact.device, torch.float32), exact.float()
        self.off += float((half - exact).double().square().sum())
        self.whole += float(exact.double().square().sum())
        self.largest = max(self.largest, float(exact.abs().max()))
        self.not_finite += int((~half.isfinite()).sum())

    @property
    def error(self) -> float:
        if self.not_finite:
            return math.nan
        return math.sqrt(self.off / self.whole) if self.whole else 0.0


def check_precision(
    model: nn.Module,
    blocks: Blocks,
    data: Images,
    dtype: str,
    progress: Progress = silent,
) -> Precision:
    """Run a model in half precision and in float32 over the same images.

    Args:
        model: compressed or not; left as it is.
        dtype: one of ``HALVES``.

    Raises:
        BlockfitError: for another dtype, int8 weights, or where there are no images.
    """
    if dtype not in HALVES:
        raise BlockfitError(f"unknown dtype {dtype!r}; choose {' or '.join(HALVES)}")
    check_no_int8(model, "checked in half precision")
    data.first("check with")
    exact = copy.deepcopy(model).float()
    half = copy.deepcopy(model).to(getattr(torch, dtype))
    states = [_Sums() for _ in range(blocks.depth + 1)]
    output, same, done = _Sums(), 0, 0
    head = False
    for number, batch in enumerate(data.batches()):
        if number == 0:
            head = observe(exact, blocks, batch.inputs).logits is not None
        before, wanted = _seen(exact, blocks, batch.inputs)
        after, got = _seen(half, blocks, batch.inputs)
        for sums, low, high in zip(states, after, before, strict=True):
            sums.add(low, high)
        output.add(got, wanted)
        same += int((got.argmax(1) == wanted.argmax(1)).sum()) if head else 0
        done += len(wanted)
        progress(done, len(data))
    found = Precision(
        dtype,
        done,
        tuple(
            Boundary(index, sums.largest, sums.error, sums.not_finite)
            for index, sums in enumerate(states)
        ),
        None if output.not_finite else output.error,
        same / done if head else None,
        (),
    )
    said = (*_too_large(exact, dtype), *_of_states(found), *_of_output(found))
    return Precision(**{**vars(found), "warnings": said})


def overflow_warnings(model: nn.Module, blocks: Blocks, inputs: Batch) -> list[str]:
    """What of a float32 model would overflow in float16: weights, and states beside its maps.

    Args:
        inputs: images; the first ``FEW`` are run.
    """
    floats = [p.dtype for p in model.parameters() if p.is_floating_point()]
    if set(floats) != {torch.float32}:
        return []
    states, _ = _seen(model, blocks, first_images(inputs, FEW))
    limit = torch.finfo(torch.float16).max
    beside = {
        boundary
        for index, module in enumerate(block_modules(model, blocks))
        if is_replaced(module)
        for boundary in (index, index + 1)
    }
    largest = {index: float(states[index].abs().max()) for index in sorted(beside)}
    return [
        *_too_large(model, "float16"),
        *(_overflow(index, v, "float16") for index, v in largest.items() if v > limit),
    ]


def _seen(model: nn.Module, blocks: Blocks, inputs: Batch) -> tuple[list[Tensor], Tensor]:
    """All hidden states, and the output."""
    with measuring(model), record(model, blocks) as states:
        output = primary_output(call(model, placed(model, inputs)))
        return list(states), output


def _too_large(model: nn.Module, dtype: str) -> Iterator[str]:
    limit = torch.finfo(getattr(torch, dtype)).max
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel():
            largest = float(parameter.detach().abs().max())
            if largest > limit:
                yield f"{name} reaches {largest:.3g}, more than the {limit:.3g} of {dtype}"


def _where(index: int) -> str:
    return "the input of block 0" if index == 0 else f"the output of block {index - 1}"


def _overflow(index: int, largest: float, dtype: str) -> str:
    where, limit = _where(index), torch.finfo(getattr(torch, dtype)).max
    return f"{where} reaches {largest:.3g}, more than the {limit:.3g} of {dtype}; use bfloat16"


def _of_states(found: Precision) -> Iterator[str]:
    """On the first state that overflows, or comes close."""
    limit = torch.finfo(getattr(torch, found.dtype)).max
    for boundary in found.boundaries:
        where = _where(boundary.index)
        if boundary.largest > limit:
            yield _overflow(boundary.index, boundary.largest, found.dtype)
            return
        if boundary.not_finite:
            yield f"{where} holds {boundary.not_finite} NaN or infinite values in {found.dtype}"
            return
        if boundary.largest > NEAR * limit:
            yield (
                f"{where} reaches {boundary.largest:.3g}, close to the {limit:.3g} of {found.dtype}"
            )
            return


def _of_output(found: Precision) -> Iterator[str]:
    if found.output_error is None:
        yield f"the output holds NaN or infinite values in {found.dtype}"
        return
    if found.output_error > LARGEST_ERROR:
        yield f"the output is off by {found.output_error:.1%} in {found.dtype}"
    if found.agreement is not None and found.agreement < LEAST_AGREEMENT:
        yield f"only {found.agreement:.2%} of the images keep their top-1 class in {found.dtype}"
