"""The original and the small model on a few images: what they say, what they see, where they part.

Predictions side by side, the principal components of the patch tokens as pictures, and the error
of every hidden state beside that of dropping the same blocks.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL import Image
from torch import Tensor, nn

from blockfit.data.images import Images, LabelledBatch
from blockfit.errors import BlockfitError
from blockfit.fit.numerics import exact
from blockfit.fit.plan import Plan
from blockfit.models.blocks import Blocks, block_modules, call, overridden, record
from blockfit.models.forward import evaluating, image_tensor, placed
from blockfit.models.head import observe
from blockfit.models.load import label_names
from blockfit.models.preprocessing import Preprocessing
from blockfit.models.surgery import removed_plan
from blockfit.progress import Progress, silent
from blockfit.search.fidelity import kl_divergence

SHOWN = 12
"""Images that are shown; half of them are kept free for those where the models differ."""

BATCH = 8
"""Images per forward: the hidden states of three models are kept at all boundaries."""

LONGEST_SIDE = 192
"""Pixels of a picture on the page."""

PCA_SIDE = 160
"""Pixels of a picture of principal components; patches stay squares of one colour."""

TOP = 3
"""Classes named per prediction."""

TOKENS = ("prefix", "patch")


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first, with the softmax of the head."""

    classes: tuple[str, ...]
    probabilities: tuple[float, ...]

    @property
    def guesses(self) -> list[tuple[str, float]]:
        """Each class with its probability."""
        return list(zip(self.classes, self.probabilities, strict=True))


@dataclass(frozen=True)
class Sample:
    """One image as both models see it.

    Args:
        name: of its file, or its position.
        picture: PNG, what the models were shown.
        label: its class, where known.
        original: prediction; ``None`` where the model has no head.
        cosine: of the two models' final features.
        cost: KL(original ‖ compressed) of this image, in nats; ``None`` without a head.
        right: whether original and compressed model name the label first; ``None`` without one.
        components: PNGs of the principal components of the patch tokens after the last block,
            original and compressed; ``None`` where the patches have no known grid.
    """

    name: str
    picture: bytes
    label: str | None
    original: Prediction | None
    compressed: Prediction | None
    cosine: float
    components: tuple[bytes, bytes] | None
    cost: float | None = None
    right: tuple[bool, bool] | None = None

    @property
    def sides(self) -> list[tuple[str, Prediction]]:
        """Both predictions by whose they are; none without a head."""
        both = (("original", self.original), ("compressed", self.compressed))
        return [(who, one) for who, one in both if one is not None]

    @property
    def differs(self) -> bool:
        """Whether the two models name another class first."""
        if self.original is None or self.compressed is None:
            return False
        return self.original.classes[0] != self.compressed.classes[0]


@dataclass(frozen=True)
class SideBySide:
    """Original and compressed model on the same images.

    Args:
        differing: on how many the first classes differ; ``None`` without a head.
        samples: the images that are shown; those that differ first, the costliest in front.
        errors: token type → error of h[l] for l = 0 … L: Σ‖h' − h‖² / Σ‖h − mean‖², as of maps.
        identity: the same where the plan's spans are dropped from the original, with no map; empty
            where it has none.
        explained: share of the patch tokens' variance in the three components of the pictures.
    """

    plan: Plan
    images: int
    source: str
    seed: int
    differing: int | None
    samples: tuple[Sample, ...]
    errors: dict[str, tuple[float, ...]]
    identity: dict[str, tuple[float, ...]]
    explained: float | None


@dataclass
class _Shown:
    """One image that may be shown, with what is needed to draw it."""

    name: str
    pixels: Tensor
    label: int | None
    logits: tuple[Tensor, Tensor] | None
    cosine: float
    patches: tuple[Tensor, Tensor]

    @property
    def differs(self) -> bool:
        return self.logits is not None and bool(self.logits[0].argmax() != self.logits[1].argmax())

    @property
    def cost(self) -> float | None:
        if self.logits is None:
            return None
        return float(kl_divergence(*(one.unsqueeze(0) for one in self.logits)))

    @property
    def right(self) -> tuple[bool, bool] | None:
        if self.logits is None or self.label is None or self.label < 0:
            return None
        first, second = (int(one.argmax()) == self.label for one in self.logits)
        return first, second


def side_by_side(
    original: nn.Module,
    compressed: nn.Module,
    blocks: Blocks,
    images: Images,
    progress: Progress = silent,
) -> SideBySide:
    """Run both models on all of ``images`` and keep ``SHOWN`` of them to look at.

    Args:
        compressed: the same after ``Solution.apply``: its block positions are the original's.
        images: a few dozen are enough.

    Raises:
        BlockfitError: where there are no images, or the models do not belong together.
    """
    plan = removed_plan(compressed, blocks)
    if not plan:
        raise BlockfitError("the second model is not compressed; give the small one")
    if len(block_modules(original, blocks)) != blocks.depth or removed_plan(original, blocks):
        raise BlockfitError("the first model is no original; give the model before compression")
    meter = _StateErrors(blocks)
    different: list[_Shown] = []
    others: list[_Shown] = []
    seen, differing, has_head = 0, 0, True
    few = images if images.batch_size <= BATCH else replace(images, batch_size=BATCH)
    few.first("compare on")
    with evaluating(original), evaluating(compressed), torch.no_grad():
        for batch in few.batches():
            shown = _compared(original, compressed, blocks, plan, batch, meter)
            seen += len(shown)
            for one in shown:
                has_head = has_head and one.logits is not None
                differing += one.differs
                if one.differs:
                    different.append(one)
                elif len(others) < SHOWN:
                    others.append(one)
            different = sorted(different, key=lambda one: -(one.cost or 0.0))[: SHOWN // 2]
            progress(seen, len(images))
    kept = different + others[: SHOWN - len(different)]
    names = images.class_names or label_names(original)
    samples, explained = _drawn(kept, names, images.preprocessing)
    return SideBySide(
        plan=plan,
        images=seen,
        source=images.records.source,
        seed=images.seed,
        differing=differing if has_head else None,
        samples=samples,
        errors=meter.result(0),
        identity=meter.result(1) if plan.spans else {},
        explained=explained,
    )


def _compared(
    original: nn.Module,
    compressed: nn.Module,
    blocks: Blocks,
    plan: Plan,
    batch: LabelledBatch,
    meter: _StateErrors,
) -> list[_Shown]:
    with record(original, blocks) as states:
        before = observe(original, blocks, placed(original, batch.inputs))
        whole = list(states)
    with record(compressed, blocks) as states:
        after = observe(compressed, blocks, placed(compressed, batch.inputs))
        small = list(states)
    naive = whole
    if plan.spans:
        dropped = dict.fromkeys(plan.removed_blocks, _same)
        with overridden(original, blocks, dropped), record(original, blocks) as states:
            call(original, batch.inputs)
            naive = list(states)
    meter.add(whole, small, naive)
    if before.features.shape != after.features.shape:
        raise BlockfitError(
            f"the two models' features differ in shape, {tuple(before.features.shape)} and "
            f"{tuple(after.features.shape)}; compare a small model with the one it was made from"
        )
    cosine = torch.cosine_similarity(exact(before.features), exact(after.features).cpu(), dim=1)
    pixels = image_tensor(batch.inputs)
    patches = [exact(state[-1][:, blocks.prefix_tokens :]).cpu() for state in (whole, small)]
    shown = []
    for row in range(len(before.features)):
        logits = None
        if before.logits is not None and after.logits is not None:
            logits = (exact(before.logits[row]).cpu(), exact(after.logits[row]).cpu())
        shown.append(
            _Shown(
                name=batch.names[row] if row < len(batch.names) else str(row),
                pixels=pixels[row].detach().float().cpu(),
                label=None if batch.labels is None else int(batch.labels[row]),
                logits=logits,
                cosine=float(cosine[row]),
                patches=(patches[0][row], patches[1][row]),
            )
        )
    return shown


class _StateErrors:
    """Sums of squared errors of every hidden state, per token type; row 0 compressed, 1 dropped."""

    def __init__(self, blocks: Blocks) -> None:
        self.prefix = blocks.prefix_tokens
        self.sums = torch.zeros(3, len(TOKENS), blocks.depth + 1, dtype=torch.float64)

    def add(self, whole: list[Tensor], small: list[Tensor], dropped: list[Tensor]) -> None:
        for level, (h, s, d) in enumerate(zip(whole, small, dropped, strict=True)):
            target = exact(h).cpu()
            spread = target - target.mean(dim=(0, 1))
            for row, gap in enumerate((exact(s).cpu() - target, exact(d).cpu() - target, spread)):
                squares = gap.square().sum(dim=(0, 2))
                self.sums[row, 0, level] += squares[: self.prefix].sum()
                self.sums[row, 1, level] += squares[self.prefix :].sum()

    def result(self, row: int) -> dict[str, tuple[float, ...]]:
        """Token type → error per boundary; types without tokens are left out."""
        tiny = torch.finfo(torch.float64).tiny
        found = {}
        for column, name in enumerate(TOKENS):
            spread = self.sums[2, column]
            if float(spread.sum()) > 0:
                found[name] = tuple((self.sums[row, column] / spread.clamp_min(tiny)).tolist())
        return found


def _same(hidden: Tensor) -> Tensor:
    return hidden


def _drawn(
    shown: Sequence[_Shown], names: list[str] | None, preprocessing: object
) -> tuple[tuple[Sample, ...], float | None]:
    pictures = _pictures([one.pixels for one in shown], preprocessing)
    components, explained = _components(shown)
    samples = []
    for number, (one, picture) in enumerate(zip(shown, pictures, strict=True)):
        sides = [_prediction(logits, names) for logits in one.logits or ()]
        samples.append(
            Sample(
                name=one.name,
                picture=picture,
                label=_class_name(one.label, names),
                original=sides[0] if sides else None,
                compressed=sides[1] if sides else None,
                cosine=one.cosine,
                cost=one.cost,
                right=one.right,
                components=components[number] if components else None,
            )
        )
    return tuple(samples), explained


def _class_name(number: int | None, names: list[str] | None) -> str | None:
    if number is None or number < 0:
        return None
    return names[number] if names and number < len(names) else f"class {number}"


def _prediction(logits: Tensor, names: list[str] | None) -> Prediction:
    best = logits.softmax(0).topk(min(TOP, len(logits)))
    return Prediction(
        tuple(str(_class_name(i, names)) for i in best.indices.tolist()),
        tuple(best.values.tolist()),
    )


def _pictures(images: Sequence[Tensor], preprocessing: object) -> list[bytes]:
    """Inputs as pictures: the normalisation undone where it is known, else the range stretched."""
    settings = preprocessing.settings if isinstance(preprocessing, Preprocessing) else {}
    mean, std = (settings.get(k, settings.get(f"image_{k}")) for k in ("mean", "std"))
    whole = torch.stack(list(images)) if len({i.shape for i in images}) == 1 else None
    if isinstance(mean, list) and isinstance(std, list):
        shift, scale = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))
        images = [image * scale + shift for image in images]
    elif whole is not None:
        low, high = float(whole.min()), float(whole.max())
        images = [(image - low) / max(high - low, 1e-12) for image in images]
    return [_png(image, LONGEST_SIDE) for image in images]


def _png(image: Tensor, longest: int) -> bytes:
    """(1 or 3 channels, H, W) in [0, 1] as PNG; small pictures are enlarged in whole steps."""
    channels = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    pixels = (channels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels)
    width, height = picture.size
    step = longest / max(width, height)
    if step >= 2:
        size = (width * int(step), height * int(step))
        picture = picture.resize(size, Image.Resampling.NEAREST)
    elif step < 1:
        picture = picture.resize((max(1, round(width * step)), max(1, round(height * step))))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def _components(shown: Sequence[_Shown]) -> tuple[list[tuple[bytes, bytes]], float | None]:
    """Three principal components of the original's patch tokens as red, green and blue.

    Both models' tokens are projected on the original's components and coloured on one scale, so
    that equal colours are equal features.
    """
    grids = [_grid(one) for one in shown]
    if not shown or None in grids:
        return [], None
    tokens = torch.cat([one.patches[0] for one in shown])
    mean = tokens.mean(0)
    covariance = (tokens - mean).T @ (tokens - mean)
    values, vectors = torch.linalg.eigh(covariance)
    directions = vectors[:, -3:].flip(1)
    projected = (tokens - mean) @ directions
    low, high = projected.quantile(0.02, 0), projected.quantile(0.98, 0)

    def picture(patches: Tensor, grid: tuple[int, int]) -> bytes:
        colours = ((patches - mean) @ directions - low) / (high - low).clamp_min(1e-12)
        return _png(colours.float().T.reshape(3, *grid), PCA_SIDE)

    total = float(values.clamp_min(0).sum())
    explained = float(values[-3:].clamp_min(0).sum()) / total if total > 0 else None
    return [
        (picture(one.patches[0], grid), picture(one.patches[1], grid))
        for one, grid in zip(shown, grids, strict=True)
        if grid is not None
    ], explained


def _grid(one: _Shown) -> tuple[int, int] | None:
    """Rows and columns of the patches, from the shape of the image; ``None`` where none fits."""
    count, (height, width) = len(one.patches[0]), one.pixels.shape[-2:]
    rows = round(math.sqrt(count * height / width))
    if rows < 1 or count % rows or count < 4:
        return None
    columns = count // rows
    return (rows, columns) if abs(rows / columns - height / width) < 0.05 * height / width else None
