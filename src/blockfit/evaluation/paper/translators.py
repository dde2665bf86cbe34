"""Maps that the paper compares its linear map with: trained networks, one map per token position.

They are baselines for ``blockfit reproduce`` and are never part of a compressed model. The trained
ones are those of the comparison in TBA (arXiv 2410.04941), with Adam on stored hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blockfit.arguments import one_of
from blockfit.errors import BlockfitError
from blockfit.fit.closed_form import fit_affine
from blockfit.fit.moments import Regression

TRAINED = ("mlp", "res-mlp", "scaled-mlp")
"""``mlp``: width → width / 2 → width with GELU, no residual, on the hidden states as they are;
``res-mlp``: a residual branch with SiLU and dropout between two layer norms; both as in the paper.
``scaled-mlp`` is ours: it predicts the change, on channels of unit variance, and starts as the
identity, so that training has every advantage that scaling can give."""

STEPS, LEARNING_RATE, TOKENS = 300, 1e-3, 4096
"""Steps and rate as in the paper, which takes all tokens in every step; we take this many."""

LOOKED_AT = 8192
"""Tokens on which the loss before and after training is measured."""


@dataclass(frozen=True)
class Trained:
    """A trained translator.

    Args:
        module: in eval mode, float32.
        loss_before: mean squared error per element at the start, on ``LOOKED_AT`` of its tokens.
        loss_after: the same at the end.
    """

    module: nn.Module
    loss_before: float
    loss_after: float


class _Residual(nn.Module):
    """A branch of two layers beside the identity, between two layer norms."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.branch = nn.Sequential(
            nn.Linear(width, width), nn.SiLU(), nn.Dropout(0.2), nn.Linear(width, width)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.before(hidden)
        return self.after(normed + self.branch(normed))


class _Scaled(nn.Module):
    """``T(x) = x + mean + spread ∘ g(x̂)``, x̂ standardised; g is zero before training."""

    mean_x: Tensor
    spread_x: Tensor
    mean_change: Tensor
    spread_change: Tensor

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        change = y - x
        for name, value in (("x", x), ("change", change)):
            self.register_buffer(f"mean_{name}", value.mean(0))
            self.register_buffer(f"spread_{name}", value.std(0).clamp_min(1e-6))
        width = x.shape[1]
        self.network = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        last = self.network[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        predicted = self.network((hidden - self.mean_x) / self.spread_x)
        return hidden + self.mean_change + self.spread_change * predicted


def train(
    kind: str,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = STEPS,
    tokens: int = TOKENS,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Trained:
    """Train a translator for ``y ≈ T(x)`` with Adam on the mean squared error.

    The global random state comes back as it was.

    Args:
        kind: one of ``TRAINED``.
        x: hidden states before the span, shape (…, width), any floating dtype.
        y: hidden states after it, of the same shape.
        steps: of Adam.
        tokens: in every step, drawn with ``seed``; all of them where there are no more.
        device: where to train; that of ``x`` by default. The result lies where ``x`` does.

    Raises:
        BlockfitError: for an unknown kind, or where training ends in NaN or infinite values.
    """
    one_of("translator", kind, TRAINED)
    x, y = (side.reshape(-1, side.shape[-1]).float() for side in (x, y))
    device = torch.device(x.device if device is None else device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        module = _network(kind, x, y).to(device)
        before = _loss(module, x, y, device)
        _fit(module, x, y, steps, tokens, device)
    trained = Trained(module.to(x.device), before, _loss(module, x, y, x.device))
    if not trained.loss_after < float("inf"):
        raise BlockfitError(f"training the translator {kind} ended in NaN or infinite values")
    return trained


def _fit(
    module: nn.Module, x: Tensor, y: Tensor, steps: int, tokens: int, device: torch.device
) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=LEARNING_RATE)
    module.train()
    with torch.enable_grad():
        for _ in range(steps):
            rows = slice(None) if len(x) <= tokens else torch.randint(len(x), (tokens,))
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(module(x[rows].to(device)), y[rows].to(device))
            loss.backward()
            optimizer.step()
    module.eval().requires_grad_(False)


def _network(kind: str, x: Tensor, y: Tensor) -> nn.Module:
    width = x.shape[1]
    if kind == "mlp":
        half = max(1, width // 2)
        return nn.Sequential(nn.Linear(width, half), nn.GELU(), nn.Linear(half, width))
    return _Residual(width) if kind == "res-mlp" else _Scaled(x, y)


def _loss(module: nn.Module, x: Tensor, y: Tensor, device: torch.device) -> float:
    module.eval()
    few = x[:LOOKED_AT].to(device), y[:LOOKED_AT].to(device)
    with torch.no_grad():
        return float(nn.functional.mse_loss(module(few[0]), few[1]))


class PerPosition(nn.Module):
    """``T(x)[t] = A[t] x[t]``: a linear map of its own for every token position.

    Args:
        weight: shape (tokens, width, width).
    """

    weight: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, hidden: Tensor) -> Tensor:
        if hidden.shape[1] != len(self.weight):
            raise BlockfitError(
                f"maps were fitted for {len(self.weight)} token positions, but the images have "
                f"{hidden.shape[1]}; use images of one size"
            )
        return torch.einsum("bti,toi->bto", hidden, self.weight)


def fit_per_position(x: Tensor, y: Tensor, ridge: float = 0.0) -> PerPosition:
    """Fit one linear map per token position, each on that position's tokens alone.

    Args:
        x: hidden states before the span, shape (images, tokens, width).
        y: hidden states after it, of the same shape.
        ridge: λ towards the identity, as in ``fit.fit_map``; with 0 and fewer images than
            channels, the solution nearest to the identity.
    """
    maps = [
        fit_affine(Regression.of(x[:, t], y[:, t]), ridge, bias=False).weight.float()
        for t in range(x.shape[1])
    ]
    return PerPosition(torch.stack(maps))
