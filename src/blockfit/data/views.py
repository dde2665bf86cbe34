"""Other views of the same images: crops, drawn with a seed, shown to a model at its own size.

Where images are few, what is solved on them fits them too closely. A crop of an image is worth a
good part of another image (docs/measurements.md), and costs a forward, not a photograph.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from blockfit.models.forward import Batch, image_tensor

SMALLEST = 0.5
"""The least part of an image's height and width that a view shows."""


def can_be_cropped(inputs: Batch) -> bool:
    """Whether a batch holds pictures (B, C, H, W) of one or three channels, and nothing that says
    what is where in them."""
    pixels = image_tensor(inputs)
    if not isinstance(inputs, Tensor):
        others = [v for v in inputs.values() if isinstance(v, Tensor) and v is not pixels]
        if any(other.ndim > 2 for other in others):
            return False
    return pixels.ndim == 4 and pixels.shape[1] in (1, 3) and pixels.is_floating_point()


def cropped(inputs: Batch, places: Sequence[int], view: int, seed: int) -> Batch:
    """Another view of every image of a batch: a crop, resized to the size that the image has.

    Crops keep the shape of the image and show at least ``SMALLEST`` of each side; nothing is
    mirrored, for what is written in a picture may matter.

    Args:
        inputs: pictures, shape (B, C, H, W), alone or in a mapping with what else a model takes,
            which stays as it is.
        places: of the images in their set: with ``view`` and ``seed`` they decide on the crops.
        view: 1, 2, …
    """
    pixels = image_tensor(inputs)
    rows = [
        _crop(image, np.random.default_rng((seed, place, view)))
        for image, place in zip(pixels, places, strict=True)
    ]
    shown = torch.stack(rows)
    if isinstance(inputs, Tensor):
        return shown
    return {name: shown if value is pixels else value for name, value in inputs.items()}


def _crop(image: Tensor, draw: np.random.Generator) -> Tensor:
    height, width = image.shape[-2:]
    side = draw.uniform(SMALLEST, 1)
    tall, wide = max(1, round(side * height)), max(1, round(side * width))
    top, left = (int(draw.integers(room + 1)) for room in (height - tall, width - wide))
    part = image[None, :, top : top + tall, left : left + wide].float()
    resized = torch.nn.functional.interpolate(
        part, size=(height, width), mode="bicubic", align_corners=False
    )
    return resized[0].to(image.dtype)
