"""The latency of a solved plan against the original's."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from blockfit.errors import BlockfitError
from blockfit.models.blocks import Batch, Blocks
from blockfit.models.cost import ROUNDS, alternate, device_name, paired_ratios
from blockfit.models.forward import image_tensor, placed
from blockfit.search.solve import Solution

LEAST_S = 0.3
"""Seconds for which two models are timed at least: one disturbance weighs less then."""

MOST_ROUNDS = 201


@dataclass(frozen=True)
class Latency:
    """Original and small model timed in turn on the same images.

    Args:
        ratio: the small model's latency over the original's, the median over rounds.
        low: below which a quarter of the rounds lies.
        high: above which a quarter lies.
        original_ms: median time of one forward pass, in milliseconds.
        compressed_ms: the same of the small model.
    """

    ratio: float
    low: float
    high: float
    original_ms: float
    compressed_ms: float
    batch_size: int
    threads: int
    device: str

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name != "device" and not 0 < value < math.inf:
                raise BlockfitError(f"{name} must be above 0, got {value}")


def way_of(model: nn.Module, inputs: Batch) -> dict[str, Any]:
    """The fields of ``Latency`` that say how it is measured, as they would be now."""
    ready = image_tensor(placed(model, inputs))
    threads = torch.get_num_threads()
    return {"batch_size": len(ready), "threads": threads, "device": device_name(ready.device)}


def latency_of(model: nn.Module, blocks: Blocks, solution: Solution, inputs: Batch) -> Latency:
    """Build the small model beside the original and time both."""
    small = solution.built(model, blocks)
    pair = {"original": model, "compressed": small}
    once = sum(statistics.median(timing.seconds) for timing in alternate(pair, inputs, 2).values())
    rounds = min(max(ROUNDS, int(LEAST_S / once)), MOST_ROUNDS)
    timings = alternate(pair, inputs, rounds)
    before, after = timings["original"], timings["compressed"]
    ratios = paired_ratios(after, before)
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Latency(
        ratio=statistics.median(ratios),
        low=low,
        high=high,
        original_ms=before.median_ms,
        compressed_ms=after.median_ms,
        batch_size=after.images,
        threads=after.threads,
        device=after.device,
    )
