"""What a test knows of one kind of model, and how it gets one with random weights that matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DEPTH, WIDTH, CLASSES = 4, 32, 5


def _called(model: Any, images: Tensor) -> Any:
    return model(images)


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Args:
        make: builds it; the weights are made random afterwards.
        image: side of its images, in pixels.
        path: where its blocks are; ``new|old`` where versions of the library differ.
        prefix_tokens: their number, as the model itself states it.
        intermediates: the hidden states or feature maps that the model offers, if it does.
        states: the model's own h[0] … h[L − 1], if it offers them.
        tuple_output: whether its blocks return (hidden state, something).
        heads: number of linear layers whose mean is the logits.
        run: how it is given images; as its one argument by default.
    """

    make: Callable[[], nn.Module]
    path: str
    prefix_tokens: Callable[[Any], int]
    image: int = 32
    intermediates: Callable[[Any, Tensor], list[Tensor]] | None = None
    states: Callable[[Any, Tensor], list[Tensor]] | None = None
    tuple_output: bool = False
    heads: int = 0
    run: Callable[[Any, Tensor], Any] = _called

    def build(self, seed: int = 0) -> nn.Module:
        """A fresh model; the same weights for the same seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = self.make()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    def images(self, count: int = 3, seed: int = 0) -> Tensor:
        """Random images, shape (count, 3, side, side)."""
        generator = torch.Generator().manual_seed(1000 + seed)
        return torch.randn(count, 3, self.image, self.image, generator=generator)

    def place(self, model: nn.Module) -> str:
        """The path that this version of the library has."""
        names = {name for name, _ in model.named_modules()}
        return next(path for path in self.path.split("|") if path in names)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The modules that stand where the blocks are, taken by hand."""
        children = list(model.get_submodule(self.place(model)).children())
        kind = "Block", "Layer"
        return [child for child in children if type(child).__name__.endswith(kind)]


def one(model: Any) -> int:
    """The number of prefix tokens of a model with a class token only."""
    return 1


def none(model: Any) -> int:
    """The number of prefix tokens of a model without any."""
    return 0
