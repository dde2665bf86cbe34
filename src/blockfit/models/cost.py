"""What a model costs: parameters, file size, FLOPs, time and memory of a forward pass."""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockfit.errors import BlockfitError
from blockfit.models.forward import (
    FORWARD_ERRORS,
    Batch,
    call,
    evaluating,
    first_images,
    image_count,
    image_tensor,
    placed,
)
from blockfit.models.tensors import (
    every_tensor,
    file_bytes,
    held,
    int8_kind,
    meta_copy,
    named_tensors,
    shared_copy,
)

ROUNDS = 11
"""Timed forward passes of each model; odd, so that the median is one of them."""


def parameters(model: nn.Module) -> int:
    """The number of parameters; one that is used in several places counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def size_bytes(model: nn.Module) -> int:
    """The bytes of the weights file that the model is saved as."""
    return file_bytes(model)


def flops(model: nn.Module, inputs: Batch) -> int | None:
    """Floating-point operations of one forward pass of one image, by torch's counter.

    A multiplication and an addition count as two; matrix products and convolutions count,
    elementwise work does not. Attention is counted whichever kernel the model would use. Works on
    the meta device, too, where the model's code looks at no values.

    Args:
        inputs: a batch; its first image is used.

    Returns:
        ``None`` where the forward cannot be counted.
    """
    bare = plain(model)
    if int8_kind(bare.parameters()) is None:
        return _counted(bare, inputs)
    # The counter does not know int8 products: on a copy with ordinary weights.
    found = _counted(meta_copy(bare), inputs)
    return _counted(shared_copy(bare), inputs) if found is None else found


def _counted(model: nn.Module, inputs: Batch) -> int | None:
    from torch.utils.flop_counter import FlopCounterMode

    try:
        one = placed(model, first_images(inputs, 1))
        counter = FlopCounterMode(display=False)
        with measuring(model), _frozen(model), _countable(), counter:
            call(model, one)
    except FORWARD_ERRORS:
        return None
    return int(counter.get_total_flops())


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No tensor of the model asks for gradients for the duration.

    The counter follows the gradients of whatever a module is given, and a view of a parameter that
    was made without gradients asks for them but has none.
    """
    asking = [tensor for tensor in every_tensor(model) if tensor.requires_grad and tensor.is_leaf]
    try:
        for tensor in asking:
            tensor.requires_grad_(False)
        yield
    finally:
        for tensor in asking:
            tensor.requires_grad_(True)


@dataclass(frozen=True)
class Timing:
    """Times of one model, measured in turn with others.

    Args:
        seconds: of every timed forward pass, in order.
        images: in each of them.
        threads: that torch used on the CPU.
    """

    seconds: tuple[float, ...]
    images: int
    threads: int
    device: str

    @property
    def median_ms(self) -> float:
        """The median time of a forward pass in milliseconds."""
        return 1000 * statistics.median(self.seconds)

    @property
    def spread_ms(self) -> float:
        """The range in milliseconds that the middle half of the passes fell into."""
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return 1000 * (high - low)

    @property
    def images_per_second(self) -> float:
        """Images per second at the median time."""
        return self.images / statistics.median(self.seconds)

    def to_json(self) -> dict[str, Any]:
        """Median and spread in milliseconds, and what they were measured on."""
        return {
            "median": self.median_ms,
            "spread": self.spread_ms,
            "images": self.images,
            "runs": len(self.seconds),
            "threads": self.threads,
            "device": self.device,
        }


def alternate(
    models: Mapping[str, nn.Module], inputs: Batch, rounds: int = ROUNDS
) -> dict[str, Timing]:
    """Time forward passes of several models in turn: A B A B, so that all meet the same weather.

    Every model runs twice untimed first. On an accelerator each pass is waited for.

    Args:
        inputs: the same images for all; each model gets them on its device and in its dtype.
        rounds: timed passes of each model, two at least.
    """
    ready = {name: placed(model, inputs) for name, model in models.items()}

    def run(name: str) -> None:
        call(models[name], ready[name])
        wait(image_tensor(ready[name]).device)

    with ExitStack() as modes:
        for model in models.values():
            modes.enter_context(measuring(model))
        seconds = in_turn({name: functools.partial(run, name) for name in models}, rounds)
    return {
        name: Timing(
            seconds[name],
            image_count(ready[name]),
            torch.get_num_threads(),
            device_name(image_tensor(ready[name]).device),
        )
        for name in models
    }


def in_turn(
    runs: Mapping[str, Callable[[], object]], rounds: int = ROUNDS
) -> dict[str, tuple[float, ...]]:
    """Call functions in turn, A B A B, and return the seconds that each call took, by name.

    Every function is called twice untimed first.

    Args:
        runs: by name; each has done all of its work when it returns.
        rounds: timed calls of each, two at least.

    Raises:
        BlockfitError: for fewer than two rounds.
    """
    if rounds < 2:
        raise BlockfitError(f"a spread needs at least 2 rounds, got {rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-2, rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            taken = time.perf_counter() - start
            if turn >= 0:
                seconds[name].append(taken)
    return {name: tuple(values) for name, values in seconds.items()}


def paired_ratios(before: Timing, after: Timing) -> list[float]:
    """How many times faster ``after`` was in each round, per image."""
    share = after.images / before.images
    return [share * a / b for a, b in zip(before.seconds, after.seconds, strict=True)]


def speedup(before: Timing, after: Timing) -> float:
    """How many times faster ``after`` is: the median over rounds that were measured together."""
    return statistics.median(paired_ratios(before, after))


def peak_memory(model: nn.Module, inputs: Batch) -> int | None:
    """The most bytes of tensors alive during one forward pass: weights, inputs and what is between.

    On CUDA the allocator's own count; on the CPU the sum of the allocations and releases that
    torch's profiler records. Workspaces inside kernels' libraries are in neither. ``None`` on
    other devices and where torch has no profiler.
    """
    bare = plain(model)
    batch = placed(bare, inputs)
    device = image_tensor(batch).device
    weights = held(named_tensors(bare)).values()
    values = [batch] if isinstance(batch, Tensor) else batch.values()
    given = [value for value in values if isinstance(value, Tensor)]
    alive = {id(t): t.nbytes for t in (*weights, *given)}
    with measuring(bare):
        call(model, batch)  # what is made once and kept is made now
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            call(model, batch)
            torch.cuda.synchronize(device)
            return sum(alive.values()) + torch.cuda.max_memory_allocated(device) - before
        if device.type != "cpu" or not torch.profiler.kineto_available():
            return None
        return sum(alive.values()) + _profiled_peak(model, batch)


def plain(model: nn.Module) -> nn.Module:
    """The module inside a compiled one; any other as it is."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _profiled_peak(model: nn.Module, inputs: Batch) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        _quiet_profiler(),
        torch.profiler.profile(activities=activities, profile_memory=True) as profiler,
    ):
        call(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event.get("name") == "[memory]"]
    alive = most = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        most = max(most, alive)
    return most


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """The profiler's library logs its starts and stops to standard error unless told not to."""
    key = "KINETO_LOG_LEVEL"
    if key in os.environ:
        yield
        return
    os.environ[key] = "99"
    try:
        yield
    finally:
        os.environ.pop(key, None)


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients for the duration."""
    with evaluating(model), torch.no_grad():
        yield


@contextmanager
def _countable() -> Iterator[None]:
    """Attention out of plain matrix products: fused kernels are not all known to the counter."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def device_name(device: torch.device) -> str:
    """What a device is called where figures are told."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.machine() if device.type == "cpu" else device.type


def runs_on(model: nn.Module) -> str | None:
    """What the device of a model's first weights is called; ``None`` where it has no weights."""
    device = next((p.device for p in model.parameters()), None)
    return None if device is None else device_name(device)


def wait(device: torch.device) -> None:
    """Until an accelerator has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
