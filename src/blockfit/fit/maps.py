"""The maps that stand where a span of blocks stood: plain modules, linear in the hidden state.

Every map takes and returns hidden states of shape ``(..., tokens, width)`` and any floating
dtype. Weights follow ``torch.nn.Linear``: a map with weight ``W`` computes ``x @ W.T``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blockfit.errors import BlockfitError
from blockfit.fit.plan import Replacement


class Identity(nn.Module):
    """``T(x) = x``: the span is dropped. Also stands for ``folded``, which lies elsewhere."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden


class Scale(nn.Module):
    """``T(x) = a ∘ x + b``, one factor and one shift per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.addcmul(self.bias, hidden, self.weight)


class Linear(nn.Module):
    """``T(x) = A x`` (the paper's map) or, with ``bias``, ``A x + b`` (affine, orthogonal)."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight, self.bias)


class LowRank(nn.Module):
    """``T(x) = x + U V x + b`` with ``U`` of shape (width, rank) and ``V`` of (rank, width)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.zeros(rank, width))
        self.up = nn.Parameter(torch.zeros(width, rank))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor) -> Tensor:
        inner = nn.functional.linear(hidden, self.down)
        return hidden + nn.functional.linear(inner, self.up, self.bias)


class PerTokenType(nn.Module):
    """One map for the first ``prefix_tokens`` tokens and another for the patch tokens."""

    def __init__(self, prefix: nn.Module, patch: nn.Module, prefix_tokens: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.patch = patch
        self.prefix_tokens = prefix_tokens

    def forward(self, hidden: Tensor) -> Tensor:
        k = self.prefix_tokens
        return torch.cat([self.prefix(hidden[..., :k, :]), self.patch(hidden[..., k:, :])], dim=-2)


def empty_map(replacement: Replacement, width: int, prefix_tokens: int = 0) -> nn.Module:
    """The module of a replacement before its weights are set: it computes the identity.

    Args:
        replacement: the kind and its options.
        width: channels of the hidden state.
        prefix_tokens: where patch tokens begin; used only by maps per token type.

    Raises:
        BlockfitError: where the options do not fit the width or the tokens.
    """
    kind, rank = replacement.map, replacement.rank
    if rank is not None and rank > width:
        raise BlockfitError(
            f"rank {rank} of span {replacement.span} is larger than the model's width; "
            f"give at most {width}"
        )

    def one() -> nn.Module:
        if kind == "scale":
            return Scale(width)
        if kind == "low-rank" and rank is not None:
            return LowRank(width, rank)
        if kind in ("linear", "affine", "orthogonal"):
            return Linear(width, bias=kind != "linear")
        return Identity()

    if not replacement.per_token_type:
        return one()
    if prefix_tokens < 1:
        raise BlockfitError(
            f"span {replacement.span} asks for one map per token type, but the model has no prefix "
            "tokens; use one map for all tokens"
        )
    return PerTokenType(one(), one(), prefix_tokens)
