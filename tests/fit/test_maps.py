"""The map modules: what they compute, what they weigh, what they start from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import one_thread  # noqa: F401
from torch import Tensor

from blockfit.errors import BlockfitError
from blockfit.fit.maps import empty_map
from blockfit.fit.plan import MAP_KINDS, Replacement, Span

WIDTH, PREFIX = 6, 2

EVERY = [
    Replacement(Span(1, 3), kind, rank, split)
    for kind in MAP_KINDS
    for rank in ([1, 4, WIDTH] if kind == "low-rank" else [None])
    for split in ([False] if kind in ("identity", "folded") else [False, True])
]
every_map = pytest.mark.parametrize("entry", EVERY, ids=str)


def hidden() -> Tensor:
    return torch.randn(3, 5, WIDTH)


def random_map(entry: Replacement) -> Any:
    module = empty_map(entry, WIDTH, PREFIX)
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter)
    return module


@every_map
def test_an_empty_map_is_the_identity(entry: Replacement) -> None:
    x = hidden()
    assert torch.equal(empty_map(entry, WIDTH, PREFIX)(x), x)


PARAMETERS = {
    "identity": 0, "folded": 0, "scale": 2 * WIDTH, "linear": WIDTH**2,
    "affine": WIDTH**2 + WIDTH, "orthogonal": WIDTH**2 + WIDTH,
}  # fmt: skip
"""DESIGN.md's table."""


@every_map
def test_a_map_has_the_parameters_of_the_table(entry: Replacement) -> None:
    each = PARAMETERS.get(entry.map, 2 * (entry.rank or 0) * WIDTH + WIDTH)
    built = sum(p.numel() for p in empty_map(entry, WIDTH, PREFIX).parameters())
    assert built == each * (2 if entry.per_token_type else 1)


def formula(kind: str, module: Any, x: Tensor) -> Tensor:
    """DESIGN.md's table, token by token."""
    out = torch.empty_like(x)
    for image, token in [(i, t) for i in range(x.shape[0]) for t in range(x.shape[1])]:
        v = x[image, token]
        out[image, token] = {
            "scale": lambda v=v: module.weight * v + module.bias,
            "linear": lambda v=v: module.weight.mv(v),
            "affine": lambda v=v: module.weight.mv(v) + module.bias,
            "orthogonal": lambda v=v: module.weight.mv(v) + module.bias,
            "low-rank": lambda v=v: v + module.up.mv(module.down.mv(v)) + module.bias,
        }[kind]()
    return out


@pytest.mark.parametrize("kind", ["scale", "linear", "affine", "orthogonal", "low-rank"])
@torch.no_grad()
def test_a_map_computes_its_formula_on_every_token(kind: str) -> None:
    rank = 3 if kind == "low-rank" else None
    one, two = (random_map(Replacement(Span(1, 3), kind, rank)) for _ in range(2))
    x = hidden()
    torch.testing.assert_close(one(x), formula(kind, one, x))

    split = empty_map(Replacement(Span(1, 3), kind, rank, per_token_type=True), WIDTH, PREFIX)
    split.prefix.load_state_dict(one.state_dict())
    split.patch.load_state_dict(two.state_dict())
    expected = torch.cat([formula(kind, one, x[:, :2]), formula(kind, two, x[:, 2:])], 1)
    torch.testing.assert_close(split(x), expected)


def test_options_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(BlockfitError, match="rank 7 of span 1:3 is larger than the model's width"):
        empty_map(Replacement(Span(1, 3), "low-rank", 7), WIDTH)
    with pytest.raises(BlockfitError, match="1:3 asks for one map per token type, but the model"):
        empty_map(Replacement(Span(1, 3), "affine", per_token_type=True), WIDTH, prefix_tokens=0)
