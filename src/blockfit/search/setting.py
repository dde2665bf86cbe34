"""What a run is about: the model, its blocks, parts of the images; refused before any work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from blockfit.data.images import Images
from blockfit.data.views import can_be_cropped
from blockfit.errors import BlockfitError
from blockfit.fit.plan import Plan
from blockfit.models.adapters import check_merged
from blockfit.models.blocks import Batch, Blocks
from blockfit.models.forward import evaluating, first_images, image_tensor, offloaded
from blockfit.models.preprocessing import own_preprocessing
from blockfit.models.stages import find_blocks
from blockfit.models.surgery import removed_plan
from blockfit.models.trace import trace
from blockfit.search.budget import Budget
from blockfit.search.recipes import ENOUGH_TO_FIT, ENOUGH_TO_MEASURE, Recipe
from blockfit.search.span_search import QUICK_IMAGES

HOLD_OUT = 0.2
CALIBRATION_IMAGES = 512
"""Drawn where nobody says how many (docs/measurements.md: more gain little)."""

JUDGE_BATCH = 16
"""Batch size of the held-out images: the unit in which the race of candidates spends them."""

FEWEST_IMAGES = 8

MOST_PREPARED = 20
"""A value that no pixel has after a mean was subtracted and divided by a deviation."""


@dataclass(frozen=True)
class Setting:
    """What a run is about: the model, where its blocks are, and the parts of the images."""

    model: nn.Module
    blocks: Blocks
    fit: Images
    held_out: Images
    example: Batch
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        images: Images,
        path: str | None = None,
        hold_out: float = HOLD_OUT,
        seed: int = 0,
    ) -> Setting:
        """Find the blocks and split the images.

        Raises:
            BlockfitError: no blocks, a model that is compressed already, fewer than
                ``FEWEST_IMAGES`` images.
        """
        if len(images) < FEWEST_IMAGES:
            raise BlockfitError(
                f"{len(images)} calibration images are too few; give at least {FEWEST_IMAGES}, "
                "better a few hundred"
            )
        if offloaded(model):
            raise BlockfitError(
                "some of the model's weights are offloaded (on the meta device), and a "
                "compression changes weights; load it whole, or spread it over devices "
                "(device_map), or only calibrate or analyze it"
            )
        example = next(iter(images))
        blocks = find_blocks(model, example, path)
        if done := removed_plan(model, blocks):
            raise BlockfitError(
                f"the model is compressed already ({done}); compress the original again instead"
            )
        if done := _elsewhere(model, blocks):
            raise BlockfitError(
                f"another part of the model is compressed already ({done}); compress the original, "
                "with images and texts in one call for both towers of a model"
            )
        check_merged(model)
        fit, held_out = images.split(hold_out, seed)
        fit = replace(fit, batch_size=_fit_batch(fit.batch_size))
        held_out = replace(held_out, batch_size=JUDGE_BATCH)
        warnings = (
            *changing(images),
            *unprepared(images, model, example),
            *all_alike(images, example),
        )
        return cls(model, blocks, fit, held_out, example, warnings)

    def state(self) -> Tensor:
        """The first hidden state of one image, shape (1, tokens, width)."""
        with evaluating(self.model):
            return trace(self.model, self.blocks, first_images(self.example, 1), [0]).states[0]


def views_of(recipe: Recipe, setting: Setting) -> tuple[int, int]:
    """How often every image is shown that is fitted on, and that effects are measured on.

    Raises:
        BlockfitError: where a recipe asks for views of what is no picture.
    """
    if can_be_cropped(setting.example):
        return (
            recipe.views_of(len(setting.fit), ENOUGH_TO_FIT),
            recipe.views_of(len(setting.held_out), ENOUGH_TO_MEASURE),
        )
    if recipe.views is not None and recipe.views > 1:
        raise BlockfitError(
            f"views={recipe.views} shows crops of pictures (images, 1 or 3 channels, height, "
            "width), and the model is given something else here; leave it out"
        )
    return 1, 1


def _elsewhere(model: nn.Module, blocks: Blocks) -> Plan:
    """What was taken out of the model at other blocks than these."""
    known = getattr(model, "blockfit_blocks", None)
    return Plan() if known is None or known == blocks else removed_plan(model, known)


def changing(images: Images) -> tuple[str, ...]:
    """What to tell where images are others each time that they are read."""
    if not images.changing:
        return ()
    return (
        f"the images of {images.records.source} differ each time that they are read (a random "
        "augmentation, or a shuffled order), but a calibration reads them several times; give "
        "images that stay the same",
    )


def unprepared(images: Images, model: nn.Module, example: Batch) -> tuple[str, ...]:
    """What to tell where tensors that are to be prepared already do not look like it."""
    pixels = image_tensor(example)
    if images.preprocessing is not None or pixels.ndim < 4:
        return ()
    low, high = float(pixels.min()), float(pixels.max())
    source = getattr(model, "blockfit_source", None)
    own = getattr(source, "preprocessing", None) or own_preprocessing(model, look_up=False)
    centred = own is not None and any(
        own.settings.get("mean") or own.settings.get("image_mean", ())
    )
    if high <= MOST_PREPARED and not (centred and low >= 0 and high <= 1):
        return ()
    return (
        f"the tensors of {images.records.source} hold values from {low:.3g} to {high:.3g} and are "
        "given to the model as they are, which looks like images that are not normalised yet; give "
        "them as the model is called with them, or as uint8 arrays (images, height, width, "
        "channels), which are prepared",
    )


FEWEST_ALIKE = 4
"""Images of one batch that are not the same by chance."""


def all_alike(images: Images, example: Batch) -> tuple[str, ...]:
    """What to tell where a whole batch is one image again and again: a broken loader."""
    each = image_tensor(example)
    if len(each) < FEWEST_ALIKE or not bool((each == each[:1]).all()):
        return ()
    return (
        f"the first {len(each)} images of {images.records.source} are all the same to the model; "
        "nothing can be learnt from them, nor judged by them; look at how they are read",
    )


def _fit_batch(asked: int) -> int:
    """The largest power of two up to what was asked for and ``QUICK_IMAGES``.

    Batches then end where the quick refits do, so that these see the same images at any batch size.
    """
    return 1 << (min(asked, QUICK_IMAGES).bit_length() - 1)


def check_whole(whole: Iterable[int], depth: int) -> None:
    """Refuse blocks that do not exist."""
    for block in whole:
        if not 0 <= block < depth:
            raise BlockfitError(
                f"whole: block {block} does not exist; the model has blocks 0–{depth - 1}"
            )


def check_stages(
    blocks: Blocks, recipe: Recipe, budget: Budget | None = None, plan: Plan | None = None
) -> None:
    """Refuse, before any work, what cannot be done with blocks in stages."""
    if budget is not None and budget.kind == "remove":
        blocks.need_chain("remove=")
    if plan is not None and plan.replacements:
        blocks.need_chain("a plan that removes blocks")
    if blocks.stages and recipe.uniform:
        raise BlockfitError(
            "uniform= gives the MLPs of all blocks one width, and those of this model's "
            f"{len(blocks.stages)} stages have their own; leave it out"
        )
    if plan is None and recipe.baseline is None and not recipe.narrows:
        blocks.need_chain(f"a recipe that cuts {' and '.join(recipe.cuts)} alone")
