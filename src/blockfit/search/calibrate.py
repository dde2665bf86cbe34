"""The one pass: calibration images through the original model, moments at every boundary."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blockfit.checkpoint import Checkpoint
from blockfit.data.images import Images
from blockfit.errors import BlockfitError
from blockfit.fit.moments import Moments
from blockfit.fit.plan import Span
from blockfit.models.blocks import Blocks, call, record
from blockfit.models.forward import evaluating
from blockfit.models.padding import real_tokens
from blockfit.models.trace import check_finite
from blockfit.progress import Progress, silent

TOKENS_PER_IMAGE = 16
"""Patch tokens taken of each image where the moments of *all* spans are wanted.

All tokens of an image say much the same, and the products of 70 pairs of 12 blocks cost as much
as the forward pass itself; measured in docs/measurements.md. Final fits use every token.
"""


def calibrate(
    model: nn.Module,
    blocks: Blocks,
    images: Images,
    spans: Iterable[Span],
    *,
    tokens_per_image: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
    checkpoint: Checkpoint | None = None,
) -> Moments:
    """Run the images through ``model`` once and return the moments of all ``spans``.

    Memory above the model is that of the sums and of one batch, whatever the number of images.
    In a run on several processes each takes its own batches; the sums are added up, and all
    processes return the same.
    The model is run in eval mode without gradients and left as it was.

    Args:
        tokens_per_image: take this many patch tokens of each image, drawn with ``seed`` and the
            image's place in the walk; all where ``None``. Prefix tokens are always taken.
        checkpoint: where the sums are saved from time to time, and gone on from.

    Raises:
        BlockfitError: no image, NaN or infinite hidden states (block and image are named).
    """
    moments = Moments(spans, blocks.width, blocks.prefix_tokens)
    own, done, start = images.own(), 0, 0
    name = "moments-" + sha256(repr((moments.spans, tokens_per_image)).encode()).hexdigest()[:8]
    if checkpoint is not None and (stored := checkpoint.load(name)) is not None:
        (counts, done, start, unreadable), tensors = stored
        moments.restore(counts, tensors)
        images.learn(unreadable)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        states = stack.enter_context(record(model, blocks))
        for batch in own.batches(start):
            call(model, batch.inputs)
            for index, hidden in enumerate(states):
                check_finite(hidden, index, batch.names)
            real = None if blocks.stages else real_tokens(batch.inputs, states[0])
            _add(moments, dict(enumerate(states)), tokens_per_image, seed, batch.places, real)
            done += len(states[0])
            progress(done, own.views * len(own))
            start = batch.places[-1] + 1
            if checkpoint is not None and checkpoint.due():
                _save(checkpoint, name, moments, [done, start, [*images.unreadable.items()]])
    if checkpoint is not None:
        _save(checkpoint, name, moments, [done, start, [*images.unreadable.items()]])
    images.exchange()
    moments.reduce()
    if not any(moments.tokens.values()):
        raise BlockfitError(
            "there are no calibration images; give a folder or file that holds some"
        )
    return moments


def moments_of(
    kept: Iterable[tuple[Mapping[int, Tensor], Sequence[int], Tensor | None]],
    blocks: Blocks,
    spans: Iterable[Span],
    *,
    tokens_per_image: int | None = None,
    seed: int = 0,
) -> Moments:
    """What ``calibrate`` returns, from hidden states that are known already: no pass at all.

    Args:
        kept: for each batch of this process, l → h[l] of shape (images, tokens, width), the
            places of its images in the walk, and which tokens are no padding (``None``: all).
    """
    moments = Moments(spans, blocks.width, blocks.prefix_tokens)
    for states, places, real in kept:
        _add(moments, states, tokens_per_image, seed, places, real)
    moments.reduce()
    return moments


def _add(
    moments: Moments,
    states: Mapping[int, Tensor],
    tokens_per_image: int | None,
    seed: int,
    places: Sequence[int],
    real: Tensor | None = None,
) -> None:
    prefix_tokens = moments.prefix_tokens
    if real is not None:
        chosen = torch.zeros_like(real)
        chosen[drawn_of_real(real, prefix_tokens, tokens_per_image, seed, places)] = True
        moments.add_some(states, chosen, int(real[:, prefix_tokens:].sum()))
        return
    picked = _pick(states[0], prefix_tokens, tokens_per_image, seed, places)
    patches = states[0].shape[1] - prefix_tokens
    moments.add({b: picked(states[b]) for b in moments.boundaries}, patches)


def _save(checkpoint: Checkpoint, name: str, moments: Moments, rest: list[Any]) -> None:
    counts, tensors = moments.state()
    checkpoint.save(name, [counts, *rest], tensors)


def _pick(
    hidden: Tensor,
    prefix_tokens: int,
    tokens_per_image: int | None,
    seed: int,
    places: Sequence[int],
) -> Callable[[Tensor], Tensor]:
    """Takes the prefix tokens and some patch tokens; the choice depends on the image's place."""
    images, tokens = hidden.shape[:2]
    patches = tokens - prefix_tokens
    if tokens_per_image is None or tokens_per_image >= patches:
        return lambda hidden: hidden
    index = drawn_tokens(prefix_tokens, patches, tokens_per_image, seed, places)
    index = index.to(hidden.device)
    take = torch.arange(images, device=index.device)[:, None]
    return lambda hidden: hidden[take, index]


def drawn_tokens(
    prefix_tokens: int, patches: int, count: int, seed: int, places: Iterable[int]
) -> Tensor:
    """Positions of the prefix tokens and ``count`` drawn patch tokens, (images, prefix + count).

    The draw depends on ``seed`` and the image's place alone, not on the batch that it is in.
    """
    rows = []
    for number in places:
        # Not torch's generator: it sees only 32 bits of a seed, too few for a pair.
        drawn = np.random.default_rng((seed, number)).permutation(patches)[:count]
        rows.append(
            torch.cat([torch.arange(prefix_tokens), torch.from_numpy(drawn) + prefix_tokens])
        )
    return torch.stack(rows)


def drawn_of_real(
    real: Tensor,
    prefix_tokens: int,
    count: int | Callable[[int], int] | None,
    seed: int,
    places: Iterable[int],
) -> tuple[Tensor, Tensor]:
    """``drawn_tokens`` of padded texts: only real tokens are drawn, whatever the padding.

    Args:
        real: which tokens are no padding, bool (texts, tokens).
        prefix_tokens: leading tokens, all of which are taken where they are real.
        count: of other tokens of a text that are drawn, of how many it has; all where ``None``.
        places: of the texts in the walk.

    Returns:
        the numbers of text and token of every drawn token, text by text.
    """
    texts, tokens = [], []
    for row, (number, own) in enumerate(zip(places, real.cpu(), strict=True)):
        found = own.nonzero().flatten()
        first, others = found[found < prefix_tokens], found[found >= prefix_tokens]
        wanted = count(len(others)) if callable(count) else count
        if wanted is not None and wanted < len(others):
            others = others[drawn_tokens(0, len(others), wanted, seed, [number])[0]]
        tokens += [first, others]
        texts.append(torch.full((len(first) + len(others),), row))
    return torch.cat(texts).to(real.device), torch.cat(tokens).to(real.device)
