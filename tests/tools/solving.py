"""A small model's images, plans and states, and independent least squares."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from sklearn.linear_model import LinearRegression
from small import small_blocks, small_pictures
from torch import Tensor, nn

from blockfit.data.images import images as open_images
from blockfit.fit.plan import Plan
from blockfit.models.blocks import Blocks, record
from blockfit.search.solve import Options, Solution
from blockfit.search.states import TracedImages

FIT, NEW = small_pictures(24), small_pictures(64, seed=1)
BARE = Options(ridge=0.0, repair="none")
TWO = Plan.of(["1:2", "3:4"], "affine")


@torch.no_grad()
def states(model: nn.Module, blocks: Blocks, images: Tensor) -> list[Tensor]:
    with record(model, blocks) as seen:
        model(images)
    return seen


def applied(model: nn.Module, blocks: Blocks, solution: Solution) -> Any:
    small = copy.deepcopy(model)
    solution.apply(small, blocks)
    return small


def originals(model: nn.Module, images: Tensor = FIT, **options: Any) -> TracedImages:
    return TracedImages.of(model, small_blocks(model), open_images(images, batch_size=8), **options)


def regression(x: Tensor, y: Tensor) -> Tensor:
    """Fitted values of scikit-learn's least squares with a bias, on all tokens of all images."""
    rows, targets = (t.flatten(0, 1).double().numpy() for t in (x, y))
    fitted = LinearRegression().fit(rows, targets).predict(rows)
    return torch.as_tensor(fitted).reshape(y.shape).float()


def kl(model: nn.Module, small: nn.Module, images: Tensor = NEW) -> float:
    with torch.no_grad():
        p, q = (m(images).double().log_softmax(1) for m in (model, small))
    return float((p.exp() * (p - q)).sum(1).mean())


def untouched(model: nn.Module) -> Callable[[], None]:
    """Remember a model; the result asserts that nothing of it has changed since."""
    weights = copy.deepcopy(model.state_dict())
    objects = [id(p) for p in model.parameters()], [id(m) for m in model.modules()]
    modes = [m.training for m in model.modules()]

    def check() -> None:
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert ([id(p) for p in model.parameters()], [id(m) for m in model.modules()]) == objects
        assert [m.training for m in model.modules()] == modes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert all(p.grad is None for p in model.parameters())

    return check
