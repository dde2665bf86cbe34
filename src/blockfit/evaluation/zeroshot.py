"""Zero-shot classification: an image is of the class whose name it lies nearest to.

The protocol of CLIP (Radford et al., arXiv 2103.00020, section 3.1): every class name is put into
every prompt, the embeddings of a class are averaged and normalised, and an image takes the class of
the largest cosine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.evaluation.protocols import Features
from blockfit.fit.intervals import paired_drop, wilson
from blockfit.models.text_tower import Tokenize, embed_texts

PROMPT = "a photo of a {}."
"""The one that is used where none is given."""


def class_embeddings(
    model: nn.Module, tokenize: Tokenize, names: Sequence[str], prompts: Sequence[str] = (PROMPT,)
) -> Tensor:
    """One embedding of length 1 per class, float32, shape (classes, F).

    Args:
        tokenize: the checkpoint's (``texts.tokenizer``).
        names: of the classes, in the order of the labels.
        prompts: texts with ``{}`` where the name goes.

    Raises:
        BlockfitError: no or one name, a prompt without ``{}``, no text tower.
    """
    if len(names) < 2:
        raise BlockfitError(f"zero-shot needs the names of two classes or more, not {len(names)}")
    for prompt in prompts:
        if "{}" not in prompt:
            raise BlockfitError(
                f"the prompt {prompt!r} has no {{}} where the class name goes; "
                f"write it as {PROMPT!r}"
            )
    total = torch.zeros(())
    for prompt in prompts:
        total = total + embed_texts(model, tokenize, [prompt.replace("{}", n) for n in names])
    return nn.functional.normalize(total, dim=-1)


def zero_shot(classes: Tensor, images: Features) -> float:
    """The fraction of the images whose nearest class by cosine is their own: mean of ``right``."""
    return float(np.mean(right(classes, images)))


def right(classes: Tensor, images: Features) -> np.ndarray:
    """Whether each image's nearest class by cosine is its own, bool, shape (images,).

    Raises:
        BlockfitError: where a label has no class, or the embeddings are of two sizes.
    """
    if images.values.shape[1] != classes.shape[1]:
        raise BlockfitError(
            f"image embeddings have {images.values.shape[1]} numbers and text embeddings "
            f"{classes.shape[1]}; zero-shot needs a model that projects both into one space"
        )
    if int(images.labels.max()) >= len(classes):
        raise BlockfitError(
            f"the images have a label {int(images.labels.max())}, but there are {len(classes)} "
            f"class names, for labels 0–{len(classes) - 1}; give one name per label"
        )
    # Lengths of images do not change which class is the nearest.
    guessed = (torch.from_numpy(images.values) @ classes.T).argmax(1).numpy()
    return guessed == images.labels


def with_intervals(found: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The accuracy of each model with its 95% interval, and what the small one loses.

    Args:
        found: model → what ``right`` says of the same images; ``original`` and ``compressed``.

    Returns:
        JSON values: accuracies by model; under ``intervals`` those of each (Wilson) and the
        ``drop`` from the original in points, paired image by image (Tango).
    """
    ends: dict[str, Any] = {
        name: asdict(wilson(int(one.sum()), len(one))) for name, one in found.items()
    }
    if (old := found.get("original")) is not None:
        new = found["compressed"]
        lost = paired_drop(int((old & ~new).sum()), int((new & ~old).sum()), len(new))
        ends["drop"] = asdict(lost.in_points())
    return {**{name: float(one.mean()) for name, one in found.items()}, "intervals": ends}


def read_names(file: Path) -> list[str]:
    """Class names, one per line, in the order of the labels.

    Raises:
        BlockfitError: where the file cannot be read or has an empty line between names.
    """
    try:
        names = [line.strip() for line in file.read_text("utf-8").rstrip().splitlines()]
    except (OSError, ValueError) as error:
        raise BlockfitError(
            f"{file} cannot be read ({error}); give a text, one class name per line"
        ) from error
    if "" in names:
        raise BlockfitError(
            f"{file}: line {names.index('') + 1} is empty; write one class name per line"
        )
    return names
