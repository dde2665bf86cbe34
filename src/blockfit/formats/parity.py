"""Whether an exported model gives what the model gives, seen on pictures before it is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from blockfit.data.images import Images
from blockfit.errors import BlockfitError
from blockfit.models.forward import Batch, example_input, frames_of
from blockfit.models.preprocessing import Preprocessing
from blockfit.models.source import Source

LARGEST_ERROR = 1e-4
"""Of an exported float32 model's outputs, relative to the largest value; more is refused."""

_ROUNDINGS = 8
"""How many times the rounding of its dtype a half-precision model may be off."""

SAMPLES = 16
"""Pictures that are compared where none are given."""

Run = Callable[[Tensor], Mapping[str, Tensor]]
"""Images (B, C, H, W), or clips (B, T, C, H, W) → all outputs by name, batch first."""


@dataclass(frozen=True)
class Parity:
    """How far the outputs of an exported model are from the model's own.

    Args:
        images: compared.
        source: what they are.
        max_abs_error: the largest difference of any value of any output.
        largest_value: of the model's own outputs, for comparison.
        agreement: part of the images with the same top-1 class; ``None`` for outputs that are no
            classes.
    """

    images: int
    source: str
    max_abs_error: float
    largest_value: float
    agreement: float | None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        top1 = "" if self.agreement is None else f"top-1 the same on {self.agreement:.2%}; "
        return (
            f"largest difference {self.max_abs_error:.1e} in outputs up to "
            f"{self.largest_value:.3g}; {top1}{self.images} images ({self.source})"
        )

    def check(self, what: str, dtype: torch.dtype = torch.float32) -> None:
        """Refuse an export that differs.

        Args:
            what: was exported, for the message.
            dtype: of the model's weights.

        Raises:
            BlockfitError: where the largest difference, relative to the largest value, is more
                than ``LARGEST_ERROR``, or in half precision more than the roundings explain.
        """
        allowed = LARGEST_ERROR
        if dtype != torch.float32:
            allowed = max(allowed, _ROUNDINGS * torch.finfo(dtype).eps)
        if not self.max_abs_error <= allowed * self.largest_value:
            raise BlockfitError(
                f"the {what} was not kept: its outputs differ from the model's by "
                f"{self.max_abs_error:.2g} where they reach {self.largest_value:.3g} "
                f"({self.images} images, {self.source}); keep the folder that blockfit saved"
            )


def compare(
    expected: Run, found: Run, images: Iterable[Tensor], source: str, classes: str | None = None
) -> Parity:
    """Run both on the same images.

    Args:
        expected: the model.
        found: what was exported.
        images: batches (B, C, H, W), on the CPU.
        source: what they are, for people.
        classes: the output whose largest value is the predicted class; ``None`` where there is
            none.
    """
    count = same = 0
    worst = largest = 0.0
    for batch in images:
        wanted, got = expected(batch), found(batch)
        for name, value in wanted.items():
            value, other = value.double().cpu(), got[name].double().cpu()
            if value.shape != other.shape:
                raise BlockfitError(
                    f"the exported model's {name} has shape {tuple(other.shape)} where the "
                    f"model's has {tuple(value.shape)}"
                )
            error = (value - other).abs().nan_to_num(nan=torch.inf).max()
            worst = max(worst, float(error))
            largest = max(largest, float(value.abs().max()))
        count += len(batch)
        if classes is not None:
            same += int((wanted[classes].argmax(-1) == got[classes].argmax(-1)).sum())
    agreement = None if classes is None else same / count
    return Parity(count, source, worst, largest, agreement)


@dataclass(frozen=True)
class Pictures:
    """Real images to compare on, prepared for one model; can be walked again.

    Args:
        batches: tensors (B, C, H, W), of clips (B, T, C, H, W).
    """

    source: str
    batches: Iterable[Batch]

    @classmethod
    def of(cls, model: nn.Module, source: Source, images: Images | None = None) -> Pictures:
        """The user's own images; by default crops of scikit-learn's two sample photographs.

        Args:
            model: takes them; where its preprocessing is not known, it says what size it takes.

        Raises:
            BlockfitError: where it is not known how large a picture the model takes.
        """
        if images is not None:
            return cls(str(images.records.source), images)
        own = source.preprocessing
        if own is None:
            example = example_input(model)
            pixels = example if isinstance(example, Tensor) else example["pixel_values"]
            *_, channels, height, width = pixels.shape
            own = Preprocessing.plain((height, width), channels=channels)
        frames = frames_of(model)
        crops = sample_images(own) if frames is None else sample_clips(own, frames)
        return cls("crops of scikit-learn's sample photographs", [crops])

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            if isinstance(batch, Mapping) and len(batch) == 1:
                batch = next(iter(batch.values()))
            if not isinstance(batch, Tensor):
                raise BlockfitError("an exported model takes images alone; give plain images")
            yield batch

    def portions(
        self, fixed: int | None = None, size: tuple[int, int] | None = None
    ) -> Iterator[Tensor]:
        """One image, then all others in batches as they come; or always ``fixed`` at a time.

        Args:
            fixed: what is left over at the end is filled up with its last image.
            size: height and width to bring the images to, in pixels.
        """
        alone = True
        for batch in self:
            if size is not None and tuple(batch.shape[-2:]) != size:
                pictures = batch.flatten(0, -4)
                pictures = nn.functional.interpolate(pictures, size, mode="bicubic", antialias=True)
                batch = pictures.unflatten(0, batch.shape[:-3])
            if fixed is not None:
                for part in batch.split(fixed):
                    missing = [part[-1:]] * (fixed - len(part))
                    yield torch.cat([part, *missing])
            elif alone and len(batch) > 1:
                yield from (batch[:1], batch[1:])
            else:
                yield batch
            alone = False


CLIPS = 4
"""Clips that are compared where none are given."""


def sample_clips(preprocessing: Preprocessing, frames: int) -> Tensor:
    """Clips of such crops, shape (clips, frames, C, H, W)."""
    return sample_images(preprocessing, CLIPS * frames).unflatten(0, (CLIPS, frames))


def sample_images(preprocessing: Preprocessing, count: int = SAMPLES, seed: int = 0) -> Tensor:
    """Square crops of scikit-learn's two sample photographs, prepared; shape (count, C, H, W)."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    random = np.random.default_rng(seed)
    crops = []
    for index in range(count):
        photo = photos[index % len(photos)]
        height, width = photo.shape[:2]
        side = int(random.integers(height // 3, height + 1))
        top, left = random.integers(height - side + 1), random.integers(width - side + 1)
        crop = photo[top : top + side, left : left + side]
        crops.append(preprocessing(Image.fromarray(crop)))
    return torch.stack(crops)
