"""Trained translators learn, and maps per token position are the least squares of each position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import one_thread as one_thread

from blockfit.errors import BlockfitError
from blockfit.evaluation.paper.translators import TRAINED, PerPosition, fit_per_position, train

WIDTH = 12


def states(
    images: int = 60, tokens: int = 5, rank: int = WIDTH
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states before and behind something that a small network can learn."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(images, tokens, rank, generator=generator)
    x = x @ torch.randn(rank, WIDTH, generator=generator) / rank**0.5 if rank < WIDTH else x
    turn = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    return x, x + torch.tanh(x @ turn)


@pytest.mark.parametrize("kind", TRAINED)
def test_training_lowers_the_loss(kind: str) -> None:
    x, y = states(rank=4)  # a network of half the width can hold it
    done = train(kind, x, y, steps=300)
    with torch.no_grad():
        after = float((done.module(x) - y).square().mean())
    assert done.loss_after == pytest.approx(after, rel=1e-4)
    assert done.loss_after < 0.5 * done.loss_before
    assert not done.module.training
    assert not any(p.requires_grad for p in done.module.parameters())


def test_the_scaled_translator_starts_as_the_identity_with_the_right_mean() -> None:
    x, y = states()
    begun = train("scaled-mlp", x, y, steps=0)
    shifted = x + (y - x).mean((0, 1))
    assert torch.allclose(begun.module(x), shifted, atol=1e-6)
    assert begun.loss_before == begun.loss_after


def test_more_steps_help_and_a_seed_repeats_a_training() -> None:
    x, y = states()
    few, many = (train("scaled-mlp", x, y, steps=n, tokens=64, seed=1) for n in (5, 200))
    again = train("scaled-mlp", x, y, steps=5, tokens=64, seed=1)
    other = train("scaled-mlp", x, y, steps=5, tokens=64, seed=2)
    assert many.loss_after < few.loss_after
    assert again.loss_after == few.loss_after
    assert other.loss_after != few.loss_after


def test_training_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    train("res-mlp", *states(), steps=2)
    assert torch.equal(before, torch.get_rng_state())


def test_an_unknown_translator_is_refused() -> None:
    with pytest.raises(BlockfitError, match="choose one of mlp"):
        train("transformer", *states())


def test_maps_per_position_equal_least_squares_of_each_position() -> None:
    x, y = states()
    fitted = fit_per_position(x, y)
    for position in range(x.shape[1]):
        a, b = (side[:, position].double().numpy() for side in (x, y))
        expected = np.linalg.lstsq(a, b, rcond=None)[0]
        assert np.allclose(fitted.weight[position].numpy(), expected.T, atol=1e-5)
    out = fitted(x[:2])
    assert torch.allclose(out[1, 3], fitted.weight[3] @ x[1, 3], atol=1e-5)


def test_with_fewer_images_than_channels_positions_are_met_exactly_and_stay_near_identity() -> None:
    x, y = states(images=4)
    fitted = fit_per_position(x, y)
    assert torch.allclose(fitted(x), y, atol=1e-4)
    gap = (fitted.weight - torch.eye(WIDTH)).flatten(1).norm(dim=1)
    assert bool((gap < 4).all())


def test_maps_per_position_refuse_images_of_another_size() -> None:
    maps = PerPosition(torch.eye(WIDTH).repeat(5, 1, 1))
    with pytest.raises(BlockfitError, match="5 token positions"):
        maps(torch.zeros(1, 7, WIDTH))
