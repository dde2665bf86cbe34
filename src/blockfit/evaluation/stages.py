"""Compress, then bring to int8: what each step costs in accuracy and gives in size and time."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockfit.data.images import Images
from blockfit.errors import BlockfitError
from blockfit.evaluation.engines import noise_for
from blockfit.evaluation.evaluate import Accuracy
from blockfit.formats.folder import Saved
from blockfit.formats.int8 import check_kind, round_embeddings, to_int8
from blockfit.models.cost import ROUNDS, Timing, alternate, measuring
from blockfit.models.forward import Batch, call, first_images, placed
from blockfit.models.head import Observation, observe, primary_output
from blockfit.progress import Progress, silent


def quantize(saved: Saved, kind: str) -> Saved:
    """The same model with the weights of its blocks and maps in int8; the given one stays.

    Weights are rounded per output channel, symmetric, by torchao. Embeddings are rounded likewise
    (``int8.round_embeddings``) and computed with as ordinary numbers. Norms, biases and the head
    stay as they are.

    Args:
        kind: ``weight-only``, or ``dynamic``, which also brings every token to int8.

    Raises:
        BlockfitError: where torchao is not installed, the kind is unknown, the model is in int8
            already, or its blocks call no linear layers.
    """
    check_kind(kind)
    model = copy.deepcopy(saved.model).float()
    to_int8(model, saved.blocks, kind, noise_for(model, 1))
    round_embeddings(model, saved.blocks)
    return dataclasses.replace(saved, model=model, report={**saved.report, "int8": kind})


@dataclass(frozen=True)
class Stage:
    """One model on the way from the original to the smallest.

    Args:
        size_bytes: of its weights file.
        top1: fraction of labelled images; ``None`` without labels or head.
        agreement: fraction of images with the original's top-1 class; likewise.
        error: of its outputs, relative to the original's (root of the ratio of summed squares).
    """

    name: str
    size_bytes: int
    top1: float | None
    agreement: float | None
    error: float
    latency: Timing
    throughput: Timing

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "name": self.name,
            "size_bytes": self.size_bytes,
            "top1": self.top1,
            "agreement": self.agreement,
            "relative_error": self.error,
            "latency_ms": self.latency.to_json(),
            "batch_ms": self.throughput.to_json(),
            "images_per_second": self.throughput.images_per_second,
        }


class _Tally:
    """Sums over batches for one stage."""

    def __init__(self, data: Images) -> None:
        self.accuracy = Accuracy(data.matching.fits)
        self.same = 0
        self.off = self.whole = 0.0

    def add(self, output: Tensor, original: Tensor, classes: bool, labels: Tensor | None) -> None:
        self.off += float((output - original).square().sum())
        self.whole += float(original.square().sum())
        if classes:
            self.accuracy.add(Observation(output, output), labels)
            self.same += int((output.argmax(1) == original.argmax(1)).sum())


def stages(
    models: Mapping[str, nn.Module],
    sizes: Mapping[str, int],
    data: Images,
    saved: Saved,
    *,
    rounds: int = ROUNDS,
    progress: Progress = silent,
) -> list[Stage]:
    """Run all models over the same images, and time them in turn.

    Args:
        models: by name, the original first; anything that gives outputs as the original does.
        sizes: bytes of their weights, by name.
        saved: the compressed model, which says whether there is a head.

    Raises:
        BlockfitError: where there are no images or outputs differ in shape.
    """
    first = data.first("compare on")
    classes = observe(saved.model, saved.blocks, placed(saved.model, first)).logits is not None
    tallies = {name: _Tally(data) for name in models}
    done = 0
    for batch in data.batches():
        outputs = {name: _output(model, batch.inputs) for name, model in models.items()}
        original = next(iter(outputs.values()))
        for name, output in outputs.items():
            if output.shape != original.shape:
                raise BlockfitError(
                    f"the outputs of {name} have shape {tuple(output.shape)}, the original's "
                    f"{tuple(original.shape)}; give the model that it was made from"
                )
            tallies[name].add(output, original, classes, batch.labels)
        done += len(original)
        progress(done, len(data))
    latency = alternate(models, first_images(first, 1), rounds)
    throughput = alternate(models, first, rounds)
    return [
        Stage(
            name,
            sizes[name],
            tally.accuracy.top1,
            tally.same / done if classes else None,
            (tally.off / tally.whole) ** 0.5 if tally.whole else 0.0,
            latency[name],
            throughput[name],
        )
        for name, tally in tallies.items()
    ]


def _output(model: nn.Module, inputs: Batch) -> Tensor:
    with measuring(model):
        return primary_output(call(model, inputs)).detach().to("cpu", torch.float32)
