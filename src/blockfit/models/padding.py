"""Texts of unequal length: which tokens of a batch are padding, so that they count in no sum."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from blockfit.models.forward import Batch, image_tensor


def real_tokens(inputs: Batch, hidden: Tensor, of_texts: bool = False) -> Tensor | None:
    """Which tokens of a batch of texts are no padding, by its ``attention_mask``.

    Args:
        inputs: what the model was called with.
        hidden: a state of it, shape (texts, tokens, width).
        of_texts: whether it is known to be of texts, where the model has images beside them.

    Returns:
        bool, shape (texts, tokens), on the device of ``hidden``; ``None`` where every token
        counts: nothing is padded, there is no mask, or the mask is of something else.
    """
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if not isinstance(mask, Tensor) or hidden.ndim < 3 or mask.shape != hidden.shape[:2]:
        return None
    if image_tensor(inputs).ndim > 2 and not of_texts:  # states of images, the mask of texts
        return None
    real = mask.to(hidden.device) != 0
    return None if bool(real.all()) else real


def real_rows(values: Tensor, real: Tensor | None) -> Tensor:
    """Of values (texts, tokens, …) those of real tokens, shape (tokens of all texts, …).

    Without padding (``real`` is ``None``) they come back as they are.
    """
    return values if real is None else values[real.to(values.device)]


def without_padding(values: Tensor, real: Tensor | None) -> Tensor:
    """Values (texts, tokens, …) with zeros at padding; as they are where ``real`` is ``None``."""
    if real is None:
        return values
    padding = ~real.to(values.device)
    return values.masked_fill(padding.reshape(*real.shape, *[1] * (values.ndim - 2)), 0)
