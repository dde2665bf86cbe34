"""Semantic segmentation: mean intersection over union of a dense head's map with masks."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from blockfit import processes as ranks
from blockfit.data.images import Images
from blockfit.data.paths import from_path
from blockfit.data.records import Columns
from blockfit.errors import BlockfitError
from blockfit.files import expanded
from blockfit.models.forward import call, evaluating
from blockfit.models.head import primary_output
from blockfit.models.preprocessing import Preprocessing
from blockfit.progress import Progress, silent

IGNORED = 255
"""The label of pixels that do not count, as in most data sets of masks."""

MASK_SUFFIXES = (".png", ".bmp", ".gif", ".tif", ".tiff")
"""Files whose pixels come back as they were written."""

Masks = Callable[[str, int], np.ndarray]
"""Name and position of an image → its mask, whole numbers, shape (height, width)."""


def open_masks(where: str, data: str | None = None) -> Masks:
    """Masks from a folder that has one for each image's name, or from a column of a table.

    Args:
        where: a folder, in which ``a/b.jpg`` has its mask at ``a/b.png`` or ``b.png``; or, where
            there is no such folder, the column of ``data`` with the masks.
        data: the table that the images come from.

    Raises:
        BlockfitError: where there is neither such a folder nor such a column.
    """
    folder = expanded(where)
    if folder.is_dir():
        return _from_folder(folder)
    if data is None:
        raise BlockfitError(f"there is no folder {where} with masks; check the path")
    try:
        records = from_path(data, Columns(where))
    except BlockfitError as error:
        raise BlockfitError(
            f"masks={str(where)!r} is neither a folder nor a column of {data}: {error}"
        ) from error
    return lambda name, position: _mask(records.read(position)[0], name)


def _from_folder(folder: Path) -> Masks:
    files: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in MASK_SUFFIXES:
            relative = file.relative_to(folder).with_suffix("")
            files.setdefault(relative.as_posix(), file)
            files.setdefault(relative.name, file)
    if not files:
        raise BlockfitError(f"{folder} holds no masks; give files {', '.join(MASK_SUFFIXES)}")

    def read(name: str, position: int) -> np.ndarray:
        parts = Path(name).with_suffix("").parts
        endings = ("/".join(parts[start:]) for start in range(len(parts)))
        file = next((files[ending] for ending in endings if ending in files), None)
        if file is None:
            raise BlockfitError(f"{folder} has no mask for the image {name}; give one of that name")
        return _mask(file, name)

    return read


def _mask(picture: Any, name: str) -> np.ndarray:
    """The pixels as they were written: palettes are not looked up."""
    try:
        if isinstance(picture, bytes):
            picture = BytesIO(picture)
        image = picture if isinstance(picture, Image.Image) else Image.open(picture)
        mask = np.asarray(image)
    except Exception as error:  # Pillow's plugins raise nearly anything on broken files
        raise BlockfitError(f"the mask of {name} cannot be read ({error}); repair it") from error
    if mask.ndim != 2 or mask.dtype == bool or not np.issubdtype(mask.dtype, np.integer):
        raise BlockfitError(
            f"the mask of {name} has mode {image.mode} and shape {mask.shape}; a mask is one "
            "channel of whole numbers, one per class"
        )
    return mask.astype(np.int64)


def confusion(
    model: nn.Module,
    images: Images,
    masks: Masks,
    progress: Progress = silent,
) -> Tensor:
    """How many pixels of each class (rows) the model takes for each class (columns), int64.

    The head's map is brought to the mask's size (bilinear) before the largest class is taken, as
    transformers' ``post_process_semantic_segmentation`` does. Pixels of ``IGNORED`` do not count;
    where the checkpoint's preprocessing says ``do_reduce_labels``, 0 is ignored, too, and the other
    labels are one less.

    Raises:
        BlockfitError: where the model's output is no map of classes, the preprocessing cuts
            pictures, or a mask is missing or has a label that is no class.
    """
    _check_whole(images.preprocessing)
    reduce = isinstance(images.preprocessing, Preprocessing) and bool(
        images.preprocessing.settings.get("do_reduce_labels")
    )
    own, total, done = images.own(), torch.zeros(0), 0
    with evaluating(model), torch.no_grad():
        for batch in own.batches():
            maps = primary_output(call(model, batch.inputs)).float().cpu()
            if maps.ndim != 4:
                raise BlockfitError(
                    f"{type(model).__name__} gives an output of shape {tuple(maps.shape)}; "
                    "the protocol dense needs a map of classes (images, classes, height, width)"
                )
            if not len(total):
                total = torch.zeros(maps.shape[1], maps.shape[1], dtype=torch.int64)
            for scores, name, place in zip(maps, batch.names, batch.places, strict=True):
                mask = masks(name, int(images.positions[place]))
                total += _pixels(scores, torch.from_numpy(mask), reduce, name)
            done += len(maps)
            progress(done, len(own))
    images.exchange()
    sizes = ranks.gathered(len(total))
    if not any(sizes):
        raise BlockfitError("there are no images to judge; give some that can be read")
    if not len(total):
        total = torch.zeros(max(sizes), max(sizes), dtype=torch.int64)
    ranks.reduce([total])
    return total


def _pixels(scores: Tensor, mask: Tensor, reduce: bool, name: str) -> Tensor:
    classes = len(scores)
    size = (mask.shape[0], mask.shape[1])
    guessed = nn.functional.interpolate(
        scores[None], size=size, mode="bilinear", align_corners=False
    )[0].argmax(0)
    if reduce:
        mask = torch.where((mask == 0) | (mask == IGNORED), IGNORED, mask - 1)
    counted = mask != IGNORED
    if counted.any() and int(mask[counted].max()) >= classes:
        raise BlockfitError(
            f"the mask of {name} has a label {int(mask[counted].max())}, but the model has "
            f"{classes} classes, 0–{classes - 1} ({IGNORED} is ignored)"
        )
    pairs = mask[counted] * classes + guessed[counted]
    return torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def _check_whole(preprocessing: object) -> None:
    """Masks lie on whole pictures: the model must see them whole."""
    if isinstance(preprocessing, Preprocessing) and preprocessing.settings.get("do_center_crop"):
        raise BlockfitError(
            "the model's preprocessing cuts out the centre of each image, and the masks are of "
            "whole images; the protocol dense needs one that only resizes"
        )


def scores(counts: Tensor) -> dict[str, float]:
    """``miou`` over the classes that occur in masks or guesses, and ``pixel_accuracy``.

    Raises:
        BlockfitError: where no pixel counts.
    """
    right = counts.diagonal().double()
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    if not counts.any():
        raise BlockfitError(
            f"all pixels of the masks are ignored ({IGNORED}); give masks with classes"
        )
    occurs = union > 0
    return {
        "miou": float((right[occurs] / union[occurs]).mean()),
        "pixel_accuracy": float(right.sum() / counts.sum()),
    }
