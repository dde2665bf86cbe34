"""Models whose forward looks at values, and one that cannot be counted at all."""

from __future__ import annotations

from typing import Any

import torch
from small import SmallViT, small_vit
from torch import Tensor, nn


class Asserting(SmallViT):
    def forward(self, x: Tensor) -> Tensor:
        assert x.max() < 50, "give normalized images"
        return super().forward(x)


class ReadingItems(SmallViT):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean().item())


class Masking(SmallViT):
    """Pixels that are not numbers count as black."""

    def forward(self, x: Tensor) -> Tensor:
        clean = x.clone()
        clean[x.isnan()] = 0
        return super().forward(clean)


class ThroughNumpy(SmallViT):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.from_numpy(x.cpu().numpy().copy()).to(x.device))


class Uncountable(SmallViT):
    """Its code refuses to run while torch's operations are listened to."""

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils._python_dispatch import _get_current_dispatch_mode

        if _get_current_dispatch_mode() is not None:
            raise RuntimeError("not while somebody listens")
        return super().forward(x)


LOOKING: dict[str, type[SmallViT]] = {
    "assert": Asserting, "item": ReadingItems, "boolean mask": Masking, "numpy": ThroughNumpy,
}  # fmt: skip


def looking(kind: type[SmallViT], depth: int = 6) -> Any:
    """The small model, its weights as ``small_vit`` draws them, with another forward."""
    model: nn.Module = small_vit(depth)
    model.__class__ = kind
    return model
